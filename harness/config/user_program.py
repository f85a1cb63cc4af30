"""Check the user's program before it is started: its file, what it would import, and its run.

The program and its arguments are the setting `run.loop`.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib.machinery import all_suffixes
from pathlib import Path

from harness.errors import UsageError


def check_loop(command: list[str]) -> Path:
    """Return the absolute path of the user's program. Raises UsageError."""
    file = Path(command[0]).expanduser().absolute()
    if not file.is_file():
        raise UsageError(
            "there is no such program",
            f"found: no file {file}",
            "Name the .py file of your loop, from this folder.",
        )
    # Python searches the program's folder first.
    check_alone(file.resolve().parent, "the program")
    return file


def check_alone(folder: Path, who: str) -> None:
    """Raise UsageError if an import from this folder would find another package `harness`.

    A folder `harness` without `__init__.py`, such as a clone of the repository, does not count: the
    import then finds this package.

    Args:
        folder: Folder that Python searches first.
        who: Description of the importing code, for the message.
    """
    package = Path(__file__).resolve().parent.parent
    others = [
        folder / "harness" / "__init__.py",
        *(folder / f"harness{suffix}" for suffix in all_suffixes()),
    ]
    for other in others:
        if other.is_file() and other.resolve().parent != package:
            raise UsageError(
                f"{who} would import another harness",
                f"found: {other}",
                f"Rename {other.name}, or start from a folder without it. The harness that runs is "
                f"{package}.",
            )


def check_named(given: Collection[str]) -> None:
    """Raise UsageError if the settings do not name the run that the user's program trains.

    The default of `run.dir` is meant for another run.

    Args:
        given: The names of the settings that the configuration file or the command line gives.
    """
    if not {"run.dir", "run.remote"} & set(given):
        raise UsageError(
            "it is not said which run this program trains",
            remedy="Name it as to harness.init: run.dir=… or run.remote=…",
        )
