"""What survives a kill: the one list of everything that a checkpoint captures, and how it is given back.

    step, epoch, loss, metrics    where the run stands, and how well
    N_state_dict                  every tracked object N: modules (without DDP's "module." prefix), optimizers, schedulers,
                                  gradient scaler, averaged weights, and whatever else has state_dict and load_state_dict
    rng                           one entry a rank: Python, NumPy, torch's CPU generator, each GPU's generator
    data                          epoch, position in it, seed, global batch size, dataset size and fingerprint; for iterable
                                  datasets the state of each rank's own iterator; kinds and order, what is left of an epoch's order
                                  and its sampler's state, only while it does not follow from (seed, epoch)
    state                         the user's plain values (`run.state`)
    best                          the best value so far of the metric that checkpoints are ranked by
    config                        the settings of the run
    format_version                of this list: 2 if something of the next one is there

What is there only if there is something to keep:

      own                         one entry a rank, for what each has for itself

Capturing never moves or changes a live module. Everything is plain: tensors, numbers, strings, lists, tuples and dicts, so
that it loads with `weights_only=True`.
"""

from harness.state.capturing import (
    Captured,
    before_update,
    capture,
    captured,
    check,
    check_finite,
    on_untracked_update,
    plain_data,
    size_bytes,
    untracked_schedule,
)
from harness.state.generators import kept_generators, rng_state, seed_rank, set_rng_state
from harness.state.restoring import (
    apply_override,
    as_built,
    check_tensors,
    class_name,
    mismatch_table,
    mismatches,
    restore,
    restore_one,
)

__all__ = [
    "Captured",
    "apply_override",
    "as_built",
    "before_update",
    "capture",
    "captured",
    "check",
    "check_finite",
    "check_tensors",
    "class_name",
    "kept_generators",
    "mismatch_table",
    "mismatches",
    "on_untracked_update",
    "plain_data",
    "restore",
    "restore_one",
    "rng_state",
    "seed_rank",
    "set_rng_state",
    "size_bytes",
    "untracked_schedule",
]
