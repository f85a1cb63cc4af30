"""The commands of `harness`, one module each.

The docstring of a command's module is its help text. The module has two functions:
`add_arguments` adds the arguments to the parser, and `run` returns the exit code.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys

from harness import errors
from harness.errors import HarnessError
from harness.text import say

COMMANDS = {
    "launch": "train on this machine under supervision: start torchrun, and again after a crash",
    "submit": "submit a run to SLURM, once",
    "stop": "ask a running job to save and stop, through its store",
    "save": "ask a running job to save now, through its store",
    "drill": "prove it on your own program: "
    "train undisturbed, then with faults, and compare bit for bit",
    "doctor": "before an expensive run: "
    "check its directory, its bucket, their speed, and that all ranks agree",
    "status": "running, to be continued, finished, or failed: and why",
    "top": "several runs at once: state, step, rate, time left, last checkpoint, last problem",
    "report": "what its time was spent on, over all attempts; --html draws it",
    "ls": "every checkpoint of a run",
    "show": "what is in a checkpoint, without reading the tensors",
    "verify": "read and check everything, name what is damaged",
    "diff": "which tensors and settings of two checkpoints differ",
    "prune": "delete what retention lets go, and what crashes left behind",
    "rollback": "let a run resume from an older checkpoint",
    "supervise": "for job scripts: may this launch begin, shall there be another one",
    "export": "a model for others: weights, safetensors, TorchScript, torch.export …",
    "import": "let a checkpoint, or anybody's file, become the beginning of a run",
}

TAKE_SETTINGS = ("launch", "submit", "drill")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    A HarnessError is printed as a message without a traceback.

    Args:
        arguments: Name of the command and its arguments; None: those of this process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] not in COMMANDS:
        return _overview(given)
    name, *rest = given
    try:
        return _run(name, rest)
    except HarnessError as error:
        # Not imported by name: `report` is also the name of a command in this package.
        errors.report(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _run(name: str, rest: list[str]) -> int:
    """Import the command's module, parse the arguments and return the exit code."""
    module = importlib.import_module(
        f"harness.cli.{name.rstrip('_')}_" if name == "import" else f"harness.cli.{name}"
    )
    summary, _, details = (module.__doc__ or "").strip().partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"harness {name}",
        description=f"{summary}\n{details}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    if name in TAKE_SETTINGS:
        from harness.config import help_text  # not imported for the other commands

        parser.epilog = help_text()
    return int(module.run(*_parsed(parser, with_loop(rest) if name in TAKE_SETTINGS else rest)))


def with_loop(given: list[str]) -> list[str]:
    """Replace the user's program and all words after it by the setting `run.loop`.

    The program is the first word that ends with .py and is neither an option nor a setting. Without
    one, the words are returned unchanged.
    """
    at = next(
        (
            at
            for at, word in enumerate(given)
            if word.endswith(".py") and "=" not in word and not word.startswith("-")
        ),
        None,
    )
    return (
        given
        if at is None
        else [*given[:at], f"run.loop={json.dumps(given[at:], ensure_ascii=False)}"]
    )


def _parsed(
    parser: argparse.ArgumentParser, rest: list[str]
) -> tuple[argparse.Namespace, ...] | tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of a command and return the arguments for its `run`.

    A command that sets the parser default `passes_on` gets the unknown arguments as a second one.
    """
    try:
        if parser.get_default("passes_on"):
            return parser.parse_known_args(rest)
        return (parser.parse_intermixed_args(rest),)
    except SystemExit as stop:
        # argparse exits with 2 for a wrong command line. Here, every usage error exits with 78.
        if stop.code == 2:
            raise SystemExit(78) from None
        raise


def _overview(given: list[str]) -> int:
    """Print the list of commands and return the exit code: 0 if it was asked for, else 78."""
    asked = not given or given[0] in ("-h", "--help", "help")
    width = max(map(len, COMMANDS))
    lines = [
        "usage: harness COMMAND …",
        "",
        *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
    ]
    lines += [
        "",
        "harness COMMAND --help says more, with an example. "
        "To train: harness launch, or torchrun harness/train.py.",
    ]
    if not asked:
        lines.insert(0, f"harness: error: there is no command {given[0]!r}")
    say("\n".join(lines), sys.stdout if asked else sys.stderr)
    return 0 if asked else 78
