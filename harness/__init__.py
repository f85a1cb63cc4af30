"""Submit once, walk away: training that is killed and goes on as if nothing had happened, bit for bit.

Reading order, which is the order of a run:

    train.py        the program: settings, task, the loop
    run/            the library that the loop is written with: init, track, batches, log, evaluate
    config/         every setting                         data/         which sample comes next
    step.py         one optimizer step                    state/        what survives a kill
    tracking/       what is kept beside a state_dict      untracked/    what is not kept, by its name
    saving/         the writer's side of a save           checkpoint/   the format: committed, found, verified
    selfcheck/      recomputed steps, compared            store/        where files lie
    distributed/    the other processes                   preemption/   signals, deadlines, the watchdog
    supervision/    launches, restarts, the job script    monitoring/   events, console, goodput, trackers
    exchange/       files for others, and from others     report/       what a run has spent its time on
    drill/          faults on purpose                     retry.py      what is tried again, and how long
    text.py         lines, tables, durations              arguments.py  what `init` was given

Imports only go down these layers, and each third-party library has one door:

    train, cli
    drill
    report
    exchange
    run
    saving
    selfcheck, tracking
    untracked
    arguments
    monitoring
    supervision
    state, step, checkpoint
    data
    distributed
    config
    store, preemption, task
    retry, text
    errors
"""

from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.exchange.compare import compare
    from harness.exchange.describe import describe
    from harness.exchange.export import export
    from harness.exchange.importing import import_checkpoint
    from harness.exchange.rebuild import load_model
    from harness.exchange.weights import load_weights, warm_start
    from harness.run import Run, init
    from harness.task import Task

__all__ = [
    "HarnessError",
    "Run",
    "Task",
    "compare",
    "describe",
    "export",
    "import_checkpoint",
    "init",
    "load_model",
    "load_weights",
    "warm_start",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import on first use, so that a command that needs no torch starts at once."""
    import importlib

    homes = {
        "Run": "run", "init": "run", "Task": "task", "compare": "exchange.compare", "describe": "exchange.describe",
        "export": "exchange.export", "import_checkpoint": "exchange.importing", "load_model": "exchange.rebuild",
        "load_weights": "exchange.weights", "warm_start": "exchange.weights",
    }  # fmt: skip
    if name not in homes:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(f"harness.{homes[name]}"), name)
