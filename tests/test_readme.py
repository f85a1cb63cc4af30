"""The README's commands, run in their order in a fresh copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import CLEAN, REPO


def after(diff: str) -> str:
    """The program that a diff of all of it leads to; at most four lines are new."""
    lines = diff.splitlines()
    assert 0 < sum(line.startswith("+") for line in lines) <= 4
    return "\n".join(line[2:] for line in lines if not line.startswith("-")) + "\n"


def make_environment(copy: Path) -> None:
    """As `scripts/environment` would, but with the packages that are installed already: the copy is what its programs run."""
    venv.create(copy / ".venv", symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(copy / ".venv"), "platbase": str(copy / ".venv")})
    Path(paths["purelib"], "here.pth").write_text(f"{copy}\n{sysconfig.get_path('purelib')}\n")
    for program in Path(sys.prefix, "bin").iterdir():
        made = Path(paths["scripts"], program.name)
        if not made.exists() and program.is_file():
            first, newline, rest = program.read_bytes().partition(b"\n")
            is_script = first.startswith(b"#!") and str(sys.prefix).encode() in first
            made.write_bytes(f"#!{paths['scripts']}/python\n".encode() + rest if is_script else first + newline + rest)
            made.chmod(0o755)
    state = "cat pyproject.toml scripts/constraints.txt | sha256sum | cut -c 1-16"
    found = subprocess.run(["bash", "-c", state], cwd=copy, capture_output=True, text=True, check=True).stdout.strip()
    (copy / ".venv" / f"made-dev-{found}").touch()


@pytest.mark.parametrize("most", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["its beginning", "all of it"])
def test_every_command_and_every_program_of_the_readme_works(most: int | None, tmp_path: Path) -> None:
    copy = tmp_path / "harness"
    shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache", "build"))
    make_environment(copy)
    blocks = re.findall(r"```(bash|python|diff)\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 9
    said = []
    for number, (language, block) in enumerate(blocks[:most]):
        if language != "bash":
            program = after(block) if language == "diff" else block
            (copy / program.split("\n", 1)[0].removeprefix("# ")).write_text(program)
            continue
        script = copy / f"block_{number}.sh"
        script.write_text(f"set -eo pipefail\n{block}")
        environment = CLEAN | {"OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(["bash", script.name], cwd=copy, env=environment, capture_output=True, text=True, timeout=300)
        said.append(done.stdout)
        assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    together = "\n".join(said)
    assert "resumes from step" in together, "the run was not killed in the middle"
    assert "equal, bit for bit" in said[1]
    accuracy = re.search(r"val_acc ([\d.]+)", said[0])
    assert accuracy and float(accuracy[1]) >= 0.97
    assert os.listdir(copy / "runs")
