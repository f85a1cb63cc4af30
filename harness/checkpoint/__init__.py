"""Checkpoints: the format, how one is committed, found, verified and let go.

    <run>/checkpoints/step_00000120-0003.pt     the data of step 120, written by attempt 3
    <run>/checkpoints/step_00000120-0003.json   its manifest
    <run>/attempts/0003.json                    attempt 3: who, nonce, from which checkpoint it went on
    <run>/attempts/0003.end.json                how it ended: finished, stopped, failed, superseded
    <run>/events/0003.jsonl                     what happened, one line an event
    <run>/config.yaml                           the settings of the newest attempt

The data file is what `torch.save` writes; `harness/state.py` lists what is in it. The manifest holds its size and its BLAKE3
digest, computed while writing, and is sealed by a digest of its own.

* A checkpoint exists if and only if its manifest exists: written last, deleted first. Nothing written under a name changes.
* Every manifest carries its lineage: [(attempt, last step of it that counts), …]. The head is the newest readable manifest by
  (attempt, step); the history is what lies within the head's lineage. So a newer attempt cuts its predecessors off with its
  first committed manifest, and a process that was thought dead can write what it likes: nobody looks there any more.
* An attempt's number is one more than any number in any name, created exclusively. It never repeats and never goes back.
* Step 0 is allowed only if nothing hints at a history.
* A damaged checkpoint is passed over, loudly, for the next older one that every rank accepts, and set aside (`.damaged`).

Modules: `format` names and manifests, `history` what is there and what of it counts, `attempts` claim and fence, `save`, `load`,
`retention`.
"""
