"""A fault-tolerant training harness for PyTorch: a killed run resumes bit for bit.

Reading order, which is the order of a run:

    train.py        the program: settings, task, the loop
    run/            the training-loop library: init, track, batches, log, evaluate
    config/         all settings                       data/         order and loading of samples
    step.py         one optimizer step                 state/        capture and restore of state
    tracking/       state outside of state_dicts       untracked/    warnings about untracked state
    saving/         saves, as made by the writer       checkpoint/   format: commit, find, verify
    selfcheck/      comparison of recomputed steps     store/        local and remote file stores
    distributed/    ranks and DDP                      preemption/   signals, deadlines, watchdog
    supervision/    launches, restarts, job script     monitoring/   events, goodput, trackers
    exchange/       export and import of files         report/       summary of a run's time
    drill/          injected faults                    retry.py      retries of failed requests
    text.py         lines, tables, durations           arguments.py  validated arguments of `init`
    task.py         the task that a user defines       errors.py     errors and exit codes
    cli/            the commands                       tasks/        example tasks
    threads.py      the frames of all threads      source_code/  names that a program sets or reads
    sharding/       checkpoints of sharded models      ema.py         average of the weights
    hf/             safetensors, Hugging Face folders
    meta/           models made on the device meta

Imports only go down these layers, and each third-party library has one door:

    train, cli
    drill
    report
    exchange
    run
    saving
    selfcheck, tracking, sharding
    untracked
    arguments
    monitoring
    supervision
    state, step, checkpoint
    ema
    data
    meta
    distributed
    config
    store, preemption, task
    hf
    retry, text, threads, source_code
    errors
"""

from typing import TYPE_CHECKING, Any

from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.exchange.compare import compare
    from harness.exchange.describe import describe
    from harness.exchange.exporting import export
    from harness.exchange.importing import import_checkpoint
    from harness.exchange.rebuild import load_model
    from harness.exchange.weights import load_weights, warm_start
    from harness.meta.materialize import materialize
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
    "materialize",
    "warm_start",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that a command that needs no torch starts at once."""
    import importlib

    homes = {
        "Run": "run",
        "init": "run",
        "Task": "task",
        "compare": "exchange.compare",
        "describe": "exchange.describe",
        "export": "exchange.exporting",
        "import_checkpoint": "exchange.importing",
        "load_model": "exchange.rebuild",
        "load_weights": "exchange.weights",
        "materialize": "meta.materialize",
        "warm_start": "exchange.weights",
    }
    if name not in homes:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(f"harness.{homes[name]}"), name)
