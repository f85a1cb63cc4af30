"""Checkpoints: the format, how one is committed, found, verified and let go.

    <run>/checkpoints/step_00000120-0003.pt     the data of step 120, written by attempt 3
    <run>/checkpoints/step_00000120-0003.json   its manifest
    <run>/attempts/0003.json                    attempt 3: who, nonce, from which checkpoint it went on
    <run>/attempts/0003.end.json                how it ended: finished, stopped, failed, superseded
    <run>/events/0003.jsonl                     what happened, one line an event
    <run>/events/0003.steps                     what each step since the last checkpoint was
    <run>/attempts/0003.replay.json             whether the steps that attempt 3 made again are what they were
    <run>/launches/1234.0.json, …0.end.json     what a supervisor (SLURM job 1234, its first life) started, and how that ended
    <run>/requests/0003.stop-5f3a….json         attempt 3 is asked to stop, or to save
    <run>/run.json                              the run was submitted: a job that does not find this stands before another disk
    <run>/files/samples/a.png                   what the user's own code keeps with the run: `Run.keep`
    <run>/config.yaml                           the settings of the newest attempt, for people to read

The data file is what `torch.save` writes, but for the CRC-32 of its tensors, which nobody checks; `harness/state` lists what is in it. The
manifest holds its size and its BLAKE3 digest, computed while writing, and is sealed by a digest of its own.

* A checkpoint exists if and only if its manifest exists: written last, deleted first. Nothing written under a name changes.
* Every manifest carries its lineage: [(attempt, last step of it that counts), …]. The head is the newest readable manifest by
  (attempt, step); the history is what lies within the head's lineage. So a newer attempt cuts its predecessors off with its
  first committed manifest, and a process that was thought dead can write what it likes: nobody looks there any more.
* An attempt's number is one more than any number in any name, created exclusively. It never repeats and never goes back.
* Step 0 is allowed only if nothing hints at a history.
* A checkpoint is read once, into memory that is sealed when its digest fits; that memory is what is parsed, on all ranks of a machine.
* A damaged checkpoint is passed over, loudly, for the next older one that every rank accepts, and set aside (`.damaged`).

A run may live in two stores, a directory and a bucket; the same tree lies in both. Then

* the history is that of both listings together; a checkpoint that is damaged here is looked for there before an older one is taken;
* an attempt is claimed in the bucket, which is the authority, and recorded in the directory as well;
* each checkpoint is committed in the directory, and copied under the same name, byte for byte, in the same order: data, then manifest;
* what is found damaged in the bucket, on a second full reading, is not renamed but marked (`….json.damaged`): the last choice;
* events lie there in segments (`events/0003-000001.jsonl`), as nothing can be appended;
* data without a manifest may be on its way from a process that is alive elsewhere: only `harness prune` deletes it;
* what could not be fetched is not taken for damaged: the start fails, and is tried again.

The newest step may also lie in the memory of the machine that writes, in a store of its own (`tier`): it counts if it is newer than the
head. Nothing else is ever looked for there, and no attempt is claimed there.

Modules: `format` names and manifests, `history` what is there and what of it counts, `attempts` claim and fence, `save`, `scribe` (the
process that writes), `load`, `spread` to all ranks, `replicate` to the other store, `retention`; `launches`, and `standing`, which tells
from all that how a run stands and whether it is to be started again; `past`, what earlier attempts tell; `records`, which of their fields
are of their kind; `steps`, what each step was; `tier`; `requests`.
"""
