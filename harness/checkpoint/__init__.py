"""Checkpoints: the format, and how a checkpoint is committed, found, verified and deleted.

The files of a run:

    <run>/checkpoints/step_00000120-0003.pt     data of step 120, written by attempt 3
    <run>/checkpoints/step_00000120-0003/00007.pt   the parts of rank 7, and what is its own,
                                                    if the state is sharded
    <run>/checkpoints/step_00000120-0003.json   manifest of that checkpoint
    <run>/attempts/0003.json                    attempt 3: host, pid, nonce, the resume point,
                                                the retention
    <run>/attempts/0003.end.json                how it ended: finished, stopped, failed, superseded
    <run>/events/0003.jsonl                     event log of attempt 3, one event per line
    <run>/events/0003.steps                     samples and losses of each step since the last
                                                checkpoint
    <run>/attempts/0003.replay.json             whether the steps that attempt 3 recomputed were
                                                equal to the original ones
    <run>/launches/1234.0.json                  what a supervisor started (SLURM job 1234, its first
                                                launch)
    <run>/launches/1234.0.end.json              how that launch ended
    <run>/requests/0003.stop-5f3a….json         request to attempt 3 to stop, or to save
    <run>/run.json                              marks a run as submitted; a job that does not find
                                                this file has another disk mounted
    <run>/files/samples/a.png                   files that the user's code keeps with the run:
                                                `Run.keep`
    <run>/config.yaml                           settings of the newest attempt, for people to read

The data file is a `torch.save` file except for the CRC-32 of its tensors, which no reader checks.
`harness/state` lists its content. The manifest holds the size and the BLAKE3 digest of the data
file, which is computed during the write. The manifest also holds a digest of its own fields. A
checkpoint of a sharded model has a shard for each rank beside the data file, which is then called
its main file (`harness/sharding`). They are written before it, and the manifest names them all.

* A checkpoint exists if and only if its manifest exists. The manifest is written last and deleted
  first. A file never changes after it was written under its name.
* Every manifest carries its lineage: [(attempt, last step of it that counts), …]. The head is the
  newest readable manifest by (attempt, step). The history is the set of checkpoints within the
  head's lineage. A newer attempt therefore cuts its predecessors off with its first committed
  manifest. A stale process that still runs may write more checkpoints: no reader considers them.
* The number of an attempt is one more than the greatest number in any file name. Its record is
  created exclusively. A number is never reused and never decreases.
* A run starts from step 0 only if nothing hints at a history.
* A checkpoint is read once, into memory that is sealed when its digest matches. All ranks of a
  machine parse that memory.
* A damaged checkpoint is skipped with a notice, in favour of the next older one that every rank
  accepts, and set aside (`.damaged`).

A run may live in two stores, a directory and a bucket. Both hold the same tree. Then:

* The history comes from both listings together. If a file of a checkpoint is damaged in one store,
  that of the other store is tried before an older checkpoint.
* The directory may be one that each machine has for itself (`run.scratch=true`): each rank writes
  and reads its shard in its own, and a shard that is not there is looked for in the bucket.
* An attempt is claimed in the bucket, which is the authority, and recorded in the directory too.
* Each checkpoint is committed in the directory, then copied to the bucket under the same name, byte
  for byte, in the same order: data, then manifest.
* A copy in the bucket that is damaged in a second full read as well is not renamed. It is marked
  (`….json.damaged`) and becomes the last choice.
* The bucket holds the event log in segments (`events/0003-000001.jsonl`), because an object cannot
  be appended to.
* Data without a manifest in the bucket may be in flight from a live process elsewhere. Only
  `harness prune` deletes it.
* A checkpoint that could not be fetched does not count as damaged. The start fails and is retried.

The newest step may also lie in the memory of the machines that write, in a store of its own (the
memory tier). It counts if it is newer than the head, and if each rank finds its shard there. No
other file is ever looked up there, and no attempt is claimed there.

Modules: `format` (names and manifests), `records` (field validation of small JSON records),
`attempts` (claim and fence), `catalog` (listing of a run and its history), `known` (each small file
is read once), `commit`, `load`, `broadcast` (verified bytes to all ranks), `replicate` (copies to
the other store), `retention`, `memory_copy` (memory tier). Related modules elsewhere:
`harness.saving.writer_process` (the process that writes), `harness.supervision.launches`,
`harness.supervision.restart_policy` (derives the state of a run and whether to restart it),
`harness.supervision.attempt_history`, `harness.supervision.control_requests`,
`harness.selfcheck.step_records` (samples and losses of each step).
"""
