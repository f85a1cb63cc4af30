"""Write a model for use elsewhere: weights, checkpoint, safetensors, TorchScript or torch.export.

CHECKPOINT is a run, one of its checkpoints, or any file that torch.save, safetensors or TorchScript
wrote, or a folder of Hugging Face or of torch.distributed.checkpoint. Both CHECKPOINT and OUT are a
path or a URL; for hf and dcp, OUT is a new folder, as `from_pretrained` or `dcp.load` takes it. The
formats module, torchscript and exported need the
task that builds the model. It is the run's task if that comes with this package. A task of your own
is code that a file names: confirm it by --trust, or name it yourself, as for files of other
programs: --config FILE, task.name=package.module:build.

example: harness export runs/a model.pt
example: harness export s3://bucket/a model.safetensors --format safetensors --which best
"""

from __future__ import annotations

import argparse
import re

from harness.errors import UsageError
from harness.exchange import exporting
from harness.text import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `harness export`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out", metavar="OUT", help="a path or URL that does not exist yet")
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="the task of a file that does not name it"
    )
    parser.add_argument("--format", choices=exporting.FORMATS, default="weights")
    parser.add_argument("--which", default="newest", metavar="newest|best|STEP", help="of a run")
    parser.add_argument("--ema", action="store_true", help="the averaged weights")
    parser.add_argument("--module", metavar="NAME", help="of several modules")
    parser.add_argument(
        "--file-size", default="5GB", metavar="SIZE", help="of one file of hf (5GB, 500MB)"
    )
    parser.add_argument("--legacy", action="store_true", help="as PyTorch before 1.6 wrote")
    parser.add_argument("--force", action="store_true", help="replace OUT")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="let the file run code: a task of yours that it names, a pickle's own",
    )
    parser.add_argument("--config", metavar="FILE")


def run(given: argparse.Namespace) -> int:
    """Export the model, print the lines of code that load it, and return 0."""
    asked = exporting.ExportOptions(
        format=given.format,
        which=given.which,
        ema=given.ema,
        module=given.module,
        overwrite=given.force,
        trust=given.trust,
        legacy=given.legacy,
        file_bytes=_bytes(given.file_size),
        config=given.config,
        settings=given.settings,
    )
    summary = exporting.export_as_asked(given.checkpoint, given.out, asked)
    say(f"wrote {given.out} {summary}")
    return 0


def _bytes(text: str) -> int:
    """Return a size in bytes. Raises UsageError for a text that is none."""
    match = re.fullmatch(r"(\d+) *([kMGT]?)B?", text)
    if match is None or int(match[1]) == 0:
        raise UsageError(f"--file-size={text} is no size", "expected: a number, as 5GB or 500MB")
    times: int = 1000 ** " kMGT".index(match[2] or " ")
    return int(match[1]) * times
