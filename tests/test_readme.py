"""The README's commands, run in their order in a fresh copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CLEAN, REPO


def after(diff: str) -> str:
    """The program that a diff of all of it leads to; at most four lines are new."""
    lines = diff.splitlines()
    assert 0 < sum(line.startswith("+") for line in lines) <= 4
    return "\n".join(line[2:] for line in lines if not line.startswith("-")) + "\n"


@pytest.mark.parametrize("most", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["its beginning", "all of it"])
def test_every_command_and_every_program_of_the_readme_works(most: int | None, tmp_path: Path) -> None:
    if Path(sys.prefix) == REPO / ".venv":  # if it were out of date the copy would renew it, with programs that belong to the copy
        subprocess.run(["bash", "-c", "source scripts/environment; make_environment dev"], cwd=REPO, check=True)
    copy = tmp_path / "harness"
    shutil.copytree(REPO, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "__pycache__", ".*_cache", "build"))
    (copy / ".venv").symlink_to(Path(sys.prefix))
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
    assert "goes on from step" in together, "the run was not killed in the middle"
    assert "equal, bit for bit" in said[1]
    accuracy = re.search(r"val_acc ([\d.]+)", said[0])
    assert accuracy and float(accuracy[1]) >= 0.97
    assert os.listdir(copy / "runs")
