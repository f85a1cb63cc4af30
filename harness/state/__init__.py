"""What survives a kill: the one list of everything that a checkpoint captures, and how it is given back.

    step, epoch, loss, metrics    where the run stands, and how well
    N_state_dict                  every tracked object N: modules (without DDP's "module." prefix), optimizers, schedulers,
                                  gradient scaler, averaged weights, and whatever else has state_dict and load_state_dict
    rng                           one entry a rank: Python, NumPy, torch's CPU generator, each GPU's generator
    data                          epoch, position in it, seed, global batch size, dataset size and fingerprint; for iterable
                                  datasets the state of each rank's own iterator; of second sources what they are and how far;
                                  kinds: how samples are ordered and seeded, if otherwise than in a run of an older harness; order: what
                                  is left of an epoch's order, and its sampler's state, while it does not follow from (seed, epoch)
    state                         the user's plain values (`run.state`)
    best                          the best value so far of the metric that checkpoints are ranked by
    config                        the settings of the run
    format_version                of this list: 2 if something of the next one is there

What is there only if there is something to keep:

      gradients                   by parameter, what was written after the last step of its optimizer ("zeros": nothing but zeros)
      attributes                  of tracked modules, what differs from them as built: modes, what is frozen, plain attributes, buffers
                                  that are not persistent; each as built and now
      own                         one entry a rank, for what each has for itself: gradients and attributes, if they differ by rank;
                                  communication hooks; generators that are tracked
      names                       of each optimizer's parameters, group by group, where their order is not that of the tracked modules
      kinds                       by its path, the kind of each value of the user's or of a state dict that is not plain itself: of
                                  the standard library's or NumPy's, or a tensor of a class of its own

Capturing never moves or changes a live module. Everything is plain: tensors, numbers, strings, lists, tuples and dicts, so
that it loads with `weights_only=True`.
"""

from harness.data.generator_objects import is_generator
from harness.state.capturing import (
    Captured,
    as_captured,
    before_update,
    capture,
    captured,
    captured_one,
    check,
    check_finite,
    check_user_state,
    plain_data,
    size_bytes,
)
from harness.state.foreign_optimizers import gives_nothing, on_untracked_update, untracked_schedule
from harness.state.kinds import rebuilt
from harness.state.lr_schedules import apply_override, as_built, other_settings
from harness.state.parameter_names import to_live, without_shells
from harness.state.restoring import check_tensors, class_name, mismatch_table, mismatches, restore, restore_one
from harness.state.rng import kept_generators, rng_state, seed_rank, set_rng_state

__all__ = [
    "Captured",
    "apply_override",
    "as_built",
    "as_captured",
    "before_update",
    "capture",
    "captured",
    "captured_one",
    "check",
    "check_finite",
    "check_tensors",
    "check_user_state",
    "class_name",
    "gives_nothing",
    "is_generator",
    "kept_generators",
    "mismatch_table",
    "mismatches",
    "on_untracked_update",
    "other_settings",
    "plain_data",
    "rebuilt",
    "restore",
    "restore_one",
    "rng_state",
    "seed_rank",
    "set_rng_state",
    "size_bytes",
    "to_live",
    "untracked_schedule",
    "without_shells",
]
