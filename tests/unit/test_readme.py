"""The commands of all READMEs, run in their order in a fresh copy."""

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
    """As `scripts/environment` would, but with the packages that are installed already: the copy is
    what its programs run."""
    venv.create(copy / ".venv", symlinks=True)
    paths = sysconfig.get_paths(vars={"base": str(copy / ".venv"), "platbase": str(copy / ".venv")})
    Path(paths["purelib"], "here.pth").write_text(f"{copy}\n{sysconfig.get_path('purelib')}\n")
    for program in Path(sys.prefix, "bin").iterdir():
        made = Path(paths["scripts"], program.name)
        if not made.exists() and program.is_file():
            first, newline, rest = program.read_bytes().partition(b"\n")
            is_script = first.startswith(b"#!") and str(sys.prefix).encode() in first
            made.write_bytes(
                f"#!{paths['scripts']}/python\n".encode() + rest
                if is_script
                else first + newline + rest
            )
            made.chmod(0o755)
    state = "cat pyproject.toml scripts/constraints.txt | sha256sum | cut -c 1-16"
    found = subprocess.run(
        ["bash", "-c", state], cwd=copy, capture_output=True, text=True, check=True
    ).stdout.strip()
    (copy / ".venv" / f"made-dev-{found}").touch()


# In their order: what a later one needs, an earlier one has made. All READMEs of the project are
# among them.
PAGES = (
    "README.md",
    "harness/run/README.md",
    "harness/report/README.md",
    "harness/store/README.md",
    "harness/exchange/README.md",
    "slurm/README.md",
    "configs/README.md",
    "scripts/README.md",
    "harness/README.md",
    "tests/README.md",
)


def pages() -> list[Path]:
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*README.md"],
        cwd=REPO,
        capture_output=True,
        text=True,
        check=True,
    )
    return [REPO / name for name in tracked.stdout.split()]


def test_the_front_page_is_short_and_every_page_is_known_and_linked_from_it() -> None:
    assert {str(page.relative_to(REPO)) for page in pages()} == set(PAGES)
    front = (REPO / "README.md").read_text()
    assert len(front.splitlines()) <= 220
    assert all(f"]({page})" in front for page in PAGES[1:])


@pytest.mark.parametrize("page", [*PAGES, ".github/CONTRIBUTING.md", ".github/CHANGELOG.md"])
def test_every_link_of_a_page_leads_somewhere(page: str) -> None:
    def anchors(path: Path) -> set[str]:
        titles = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
        return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

    for link in re.findall(r"\]\(([^)]+)\)", (REPO / page).read_text()):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            path = ((REPO / page).parent / target).resolve()
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize(
    "most", [2, pytest.param(None, marks=pytest.mark.slow)], ids=["its beginning", "all of it"]
)
def test_every_command_and_every_program_of_the_pages_works(
    most: int | None, tmp_path: Path
) -> None:
    copy = tmp_path / "harness"
    shutil.copytree(
        REPO,
        copy,
        ignore=shutil.ignore_patterns(".venv*", ".git", "runs", "__pycache__", ".*_cache", "build"),
    )
    make_environment(copy)
    text = "\n".join((REPO / page).read_text() for page in PAGES)
    blocks = re.findall(r"```(bash|python|diff)\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 19
    said = []
    try:
        for number, (language, block) in enumerate(blocks[:most]):
            if language != "bash":
                program = after(block) if language == "diff" else block
                (copy / program.split("\n", 1)[0].removeprefix("# ")).write_text(program)
                continue
            script = copy / f"block_{number}.sh"
            script.write_text(f"set -eo pipefail\n{block}")
            environment = CLEAN | {"OMP_NUM_THREADS": "1"}
            environment.pop("PYTHONPATH", None)
            done = subprocess.run(
                ["bash", script.name],
                cwd=copy,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            said.append(done.stdout)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
    finally:
        if (copy / ".s3").exists():  # a block before its end has failed
            subprocess.run(["scripts/s3", "stop"], cwd=copy, check=False)
    together = "\n".join(said)
    assert "resumes from step" in together, "the run was not killed in the middle"
    assert "equal, bit for bit" in said[1]
    accuracy = re.search(r"val_acc ([\d.]+)", said[0])
    assert accuracy and float(accuracy[1]) >= 0.97
    assert os.listdir(copy / "runs")
