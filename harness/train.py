"""The training program: `torchrun harness/train.py --config FILE key=value …`.

It builds the task and contains the training loop.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if __name__ == "__main__" and sys.path[0] == str(Path(__file__).resolve().parent):
    # If this file is started by its path, Python looks for modules in this folder. `import harness`
    # would find no package there, or another one.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from typing import TYPE_CHECKING, Any

from harness import config, preemption
from harness.errors import HarnessError, report
from harness.text import fill_closed_streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.config import Config
    from harness.config.schema import InitSettings
    from harness.run import Run
    from harness.task import Task


def train(build: Callable[..., Task], settings: Config, stored: dict[str, Any]) -> None:
    """Train the task that `build` returns, from the resume point of its run to its end.

    Args:
        build: Function that returns the task.
        settings: The settings of the run.
        stored: The settings as plain data, as they are stored in each checkpoint.
    """
    from harness import step
    from harness.data.plan import accumulation

    run = start(settings, stored)
    job = build(**settings.task.args)
    begin = partial(warm_start, run, job, settings.init)
    stepper = step.Stepper(job, settings.train, run.world, begin)
    run.track(**stepper.tracked)
    size = settings.train.global_batch_size
    accumulate = accumulation(size, run.world_size, settings.train.micro_batch_size)
    # The name keeps the iterator alive until an error in the loop is reported. Without it, the
    # iterator would be closed first, and its message would come before the error.
    batches = run.batches(
        job.train_data,
        size,
        accumulate=accumulate,
        epochs=settings.train.epochs,
        max_steps=settings.train.max_steps,
        drop_last=settings.data.drop_last,
        num_workers=settings.data.num_workers,
        check_stream=settings.data.check_stream,
        collate_fn=job.collate,
    )
    for batch in batches:
        values = (
            job.step(run, batch)
            if job.step
            else stepper(batch if accumulate > 1 else [batch], run.weights, run.step)
        )
        stepper.average()
        run.log(**values)
        if job.eval_data is not None and run.due(settings.eval.every_steps):
            run.evaluate(
                job.eval_data,
                stepper.evaluate,
                batch_size=settings.eval.batch_size,
                collate_fn=job.collate,
            )
    run.say("  ".join(f"{name} {value:.4f}" for name, value in run.metrics.items()))
    if best := run.best_checkpoint():
        run.say(f"best checkpoint: {best}")
    run.world.leave()


def start(settings: Config, stored: dict[str, Any]) -> Run:
    """Join the other ranks and return the run, at its resume point.

    Collective: every rank must call it.
    """
    import harness

    more = config.arguments(settings, harness.init)
    return harness.init(settings.run.dir, remote=settings.run.remote, config=stored, **more)


def warm_start(run: Run, job: Task, settings: InitSettings) -> None:
    """Load the weights that `init.from` names, if any, into the modules of a new run.

    Collective: every rank must call it.
    """
    import harness

    if settings.from_ is not None:
        harness.warm_start(
            run, job.modules, settings.from_, strict=settings.strict, rename=settings.rename
        )


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train; errors in the settings are printed without a traceback."""
    fill_closed_streams()
    parser = argparse.ArgumentParser(
        prog="harness/train.py",
        description="Train a task; resume from the newest checkpoint if there is one.",
        epilog="example: torchrun --standalone --nproc-per-node=2 harness/train.py "
        f"--config configs/digits.yaml run.dir=runs/a\n\n{config.help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        help="YAML file, relative to the working directory; without it the defaults train the "
        "digits",
    )
    parser.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that override the file's"
    )
    parsed = parser.parse_intermixed_args(arguments)
    # Before the imports, which take seconds: a stop signal during the import of torch must count as
    # a stop, not as a crash.
    preemption.install()
    preemption.die_with_launcher()
    try:
        from harness import task

        settings, stored = config.load(parsed.config, parsed.settings)
        build = task.find(settings.task.name, settings.task.args, stored["task"]["args"])
        stored["task"]["args"] = task.defaults(build) | stored["task"]["args"]
    except HarnessError as error:
        report(error)
        sys.exit(error.exit_code)
    train(build, settings, stored)


if __name__ == "__main__":
    main()
