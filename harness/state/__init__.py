"""Capture everything that must survive a kill as plain data, and restore it.

This is the one list of the entries of a checkpoint:

    step, epoch, loss, metrics    the progress of the run, and how good the model is
    N_state_dict                  the state dict of each tracked object N: modules (without DDP's
                                  "module." prefix), optimizers, schedulers, the gradient scaler,
                                  averaged weights, and any other object that has state_dict and
                                  load_state_dict
    rng                           one entry per rank: the generators of Python and NumPy, torch's
                                  CPU generator, and the generator of each GPU that the rank sees;
                                  own_gpu: which of these is the rank's own, if that does not
                                  follow from the rank
    data                          epoch, position in it, seed, global batch size, dataset size and
                                  fingerprint; for iterable datasets the state of each rank's own
                                  iterator; for second sources their identity and position;
                                  kinds: how samples are ordered and seeded, if this differs from
                                  the runs of an older harness; order: the rest of an epoch's
                                  order and the state of its sampler, as long as they do not
                                  follow from (seed, epoch)
    state                         the user's plain values (`run.state`)
    best                          the best value so far of the metric that ranks checkpoints
    config                        the settings of the run
    format_version                the version of this list: 4 if the state is sharded; 2 if the
                                  checkpoint holds an optional entry (below), if `data` holds kinds
                                  or second sources, or `rng` an own_gpu; else 1

These entries are optional. Each exists only if there is something to keep:

      layout                      how sharded tensors are cut into the parts that the shards hold
                                  (`harness/sharding/shards.py`); they stand in the state dicts
                                  without data
      made_by_head                by path: the digest of what the head of the epoch has made on the
                                  writer, such as a copy of the model; it is no state, and does
                                  not raise the version
      gradients                   by parameter: the gradient as written after the last step of its
                                  optimizer ("zeros" if it is zero everywhere)
      attributes                  of tracked modules: what differs from the module as built, namely
                                  modes, frozen parameters, plain attributes and non-persistent
                                  buffers; each as built and as it is now
      own                         one entry per rank, for the state that each rank has for itself:
                                  gradients and attributes, if they differ by rank; communication
                                  hooks; tracked generators; values, and their kinds, that differ
                                  by rank; ddp: of modules in DDP that differ, whether the next
                                  forward pass broadcasts buffers; head: inside an epoch, the
                                  generators (by name, the global ones under "") before what the
                                  loop over epochs has drawn ahead of its first batch
      names                       the parameter names of each optimizer, group by group, if their
                                  order is not the order of the tracked modules
      kinds                       by path: the kind of each value, in the user's state or in a state
                                  dict, that is not plain data itself: a kind of the standard
                                  library or of NumPy, or a tensor of its own class

If the state is sharded, the entries for each rank (`rng`, `own`, and the iterators in `data`) are
in the shard of the rank, and the main file has in their place

      ranks                       the number of ranks, which of them need the same samples, and the
                                  names of what any of them has for itself
                                  (`harness/distributed/data_ranks.py`)

In version 3, the first for sharded state, they were in the main file for all ranks.

Capturing never moves or changes a live module. All captured data is plain: tensors, numbers,
strings, lists, tuples and dicts. It therefore loads with `weights_only=True`.
"""

from harness.data.generator_objects import is_generator
from harness.state.capturing import (
    Captured,
    as_captured,
    before_update,
    capture,
    captured,
    captured_object,
    check,
    check_finite,
    check_user_state,
    plain_data,
    size_bytes,
)
from harness.state.checks import check_tensors, mismatch_table, mismatches
from harness.state.kinds import copied, rebuilt
from harness.state.lr_schedules import apply_override, as_built, digest_of_built, other_settings
from harness.state.parameter_names import to_live, without_shells
from harness.state.plain_values import put_into
from harness.state.restoring import class_name, restore, restore_object
from harness.state.rng import (
    kept_generators,
    restore_rng_state,
    rng_state,
    seed_rank,
    set_rng_state,
)

__all__ = [
    "Captured",
    "apply_override",
    "as_built",
    "as_captured",
    "before_update",
    "capture",
    "captured",
    "captured_object",
    "check",
    "check_finite",
    "check_tensors",
    "check_user_state",
    "class_name",
    "copied",
    "digest_of_built",
    "is_generator",
    "kept_generators",
    "mismatch_table",
    "mismatches",
    "other_settings",
    "plain_data",
    "put_into",
    "rebuilt",
    "restore",
    "restore_object",
    "restore_rng_state",
    "rng_state",
    "seed_rank",
    "set_rng_state",
    "size_bytes",
    "to_live",
    "without_shells",
]
