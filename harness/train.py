"""The program: `torchrun harness/train.py --config FILE key=value …`. It builds the task and holds the loop."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__" and sys.path[0] == str(Path(__file__).resolve().parent):
    # Started by its path, Python looks for modules in this folder, where `import harness` would find nothing, or another one.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from typing import TYPE_CHECKING, Any

from harness import config, preemption
from harness.errors import HarnessError, report
from harness.text import fill_closed_streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.config import Config
    from harness.task import Task


def train(build: Callable[..., Task], settings: Config, stored: dict[str, Any]) -> None:
    """Train the task that `build` makes to its end, from wherever its run stands."""
    import harness
    from harness import step
    from harness.data.plan import accumulation

    run = harness.init(
        settings.run.dir,
        remote=settings.run.remote, seed=settings.train.seed,
        save_every_s=settings.checkpoint.every_s,
        save_every_steps=settings.checkpoint.every_steps,
        keep_last=settings.checkpoint.keep_last, keep_every_steps=settings.checkpoint.keep_every_steps,
        keep_best=settings.checkpoint.keep_best,
        best=settings.checkpoint.best, snapshot=settings.checkpoint.snapshot, when_busy=settings.checkpoint.when_busy,
        memory=settings.checkpoint.memory and settings.checkpoint.memory_every_steps,
        wait_s=settings.store.wait_s,
        remote_keep={"last": settings.store.keep_last, "every_steps": settings.store.keep_every_steps, "best": settings.store.keep_best},
        config=stored, accept=settings.resume.accept, override=settings.resume.override,
        environment=settings.resume.environment, on_mismatch=settings.resume.on_mismatch,
        deterministic=settings.train.deterministic, timeout_s=settings.run.timeout_s, step_timeout_s=settings.run.step_timeout_s,
        grace_s=settings.run.grace_s, margin_s=settings.run.margin_s, is_scratch=settings.run.scratch, notices=settings.run.notices,
        log_every_steps=settings.log.every_steps, log_to=settings.log.to, rehearse=settings.checkpoint.rehearse,
    )  # fmt: skip
    job = build(**settings.task.args)
    if settings.init.from_ is not None:
        harness.warm_start(run, job.modules, settings.init.from_, strict=settings.init.strict, rename=settings.init.rename)
    stepper = step.Stepper(job, settings.train, run.world)
    run.track(**stepper.tracked)
    accumulate = accumulation(settings.train.global_batch_size, run.world_size, settings.train.micro_batch_size)
    batches = run.batches(  # by name: an error lives to be told before the loop is let go
        job.train_data,
        settings.train.global_batch_size,
        accumulate=accumulate,
        epochs=settings.train.epochs,
        max_steps=settings.train.max_steps,
        drop_last=settings.data.drop_last,
        num_workers=settings.data.num_workers,
        check_stream=settings.data.check_stream,
        collate_fn=job.collate,
    )
    for batch in batches:
        values = job.step(run, batch) if job.step else stepper(batch if accumulate > 1 else [batch], run.weights, run.step)
        stepper.average()
        run.log(**values)
        if job.eval_data is not None and run.due(settings.eval.every_steps):
            run.evaluate(job.eval_data, stepper.evaluate, batch_size=settings.eval.batch_size, collate_fn=job.collate)
    run.say("  ".join(f"{name} {value:.4f}" for name, value in run.metrics.items()))
    if best := run.best_checkpoint():
        run.say(f"best checkpoint: {best}")
    run.world.leave()


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and train; errors that a user can mend are said in words."""
    fill_closed_streams()
    parser = argparse.ArgumentParser(
        prog="harness/train.py",
        description="Train a task; go on from the newest checkpoint if there is one.",
        epilog="example: torchrun --standalone --nproc-per-node=2 harness/train.py --config configs/digits.yaml run.dir=runs/a",
    )
    parser.add_argument("--config", help="YAML file, relative to the working directory; without it the defaults train the digits")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings that override the file's")
    parsed = parser.parse_intermixed_args(arguments)
    preemption.install()  # before what takes seconds: a stop that comes while torch is loaded is a stop, not a crash
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
