"""Copy the code that a submitted job runs: this package, and the sources of the user's task."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from harness.errors import UsageError

# Size limit of a copied file in bytes, and limit of the number of copied files.
MOST_BYTES, MOST_FILES = 1 << 20, 5000
# The files that are copied from a folder that is not a git checkout.
SOURCES = (".py", ".json", ".yaml", ".yml", ".toml", ".txt", ".csv")


def copy_code(target: Path, directory: Path, task_file: Path | None) -> int:
    """Copy this package, and the sources of the working directory if they contain the task.

    A requeued job runs the code that was submitted, even if the original was edited since. From a
    git checkout, the files that git does not ignore are copied; from another folder, the files with
    a suffix in `SOURCES`. Files of more than `MOST_BYTES`, links, hidden folders, bytecode, Python
    environments and run directories are left out, so that data stays where it is.

    Args:
        target: Folder that receives the copy.
        directory: Working directory of the job.
        task_file: File that defines the task, or None.

    Returns:
        The number of copied files.

    Raises:
        UsageError: There are more than `MOST_FILES` files to copy.
    """
    package = Path(__file__).resolve().parents[1]
    files = {
        path: Path("harness") / path.relative_to(package)
        for path in package.rglob("*")
        if path.suffix in (".py", ".typed")
    }
    inside = (
        task_file is not None
        and directory in task_file.parents
        and package not in task_file.parents
    )
    if inside and "site-packages" not in str(task_file):
        files = {
            path: path.relative_to(directory)
            for path in [*_sources(directory), task_file]
            if path is not None
        } | files
    if len(files) > MOST_FILES:
        raise UsageError(
            f"there are too many files to copy in {directory}",
            f"found: {len(files)}, expected: at most {MOST_FILES}",
            "Submit from the folder that holds the task's code, or make it a git checkout.",
        )
    for source, name in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target / name)
    return len(files)


def _sources(directory: Path) -> Iterable[Path]:
    """Return the files of the working directory that `copy_code` copies."""
    listed = [
        "git",
        "-C",
        str(directory),
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]
    try:
        names = subprocess.run(listed, capture_output=True, check=True).stdout.split(b"\0")
        paths: Iterable[Path] = [directory / os.fsdecode(name) for name in names if name]
    except (OSError, subprocess.CalledProcessError):
        paths = (path for path in directory.rglob("*") if path.suffix in SOURCES)
    mine = (path for path in paths if not _is_foreign(path, directory))
    return [
        path
        for path in mine
        if path.is_file() and not path.is_symlink() and path.stat().st_size <= MOST_BYTES
    ]


def _is_foreign(path: Path, directory: Path) -> bool:
    """Return whether a file is bytecode, or in a hidden folder, an environment or a run."""
    parents = [parent for parent in path.parents if directory in parent.parents]
    marks = ("pyvenv.cfg", "attempts", "launches", "submitted")
    return any(
        p.name.startswith(".")
        or p.name in ("site-packages", "__pycache__")
        or any((p / mark).exists() for mark in marks)
        for p in parents
    )
