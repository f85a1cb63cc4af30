"""Programs that people have written, each killed once: they end as the ones that were not, or are
refused in words."""

from __future__ import annotations

import signal

from programs import STEP, killed_once

PLAIN = (
    """
run = init()
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=2):"""
    + STEP
)


def test_a_plain_loop_ends_as_the_one_that_was_not_killed(tmp_path):
    outcome = killed_once(tmp_path, PLAIN)
    assert outcome.killed.code == -signal.SIGKILL
    assert "resumes from step 6" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows


def test_on_two_ranks_too(tmp_path):
    outcome = killed_once(
        tmp_path,
        PLAIN.replace("nn.Linear(8, 1)", "nn.parallel.DistributedDataParallel(nn.Linear(8, 1))"),
        ranks=2,
    )
    assert outcome.killed.codes == [-signal.SIGKILL] * 2
    assert "resumes from step 6" in outcome.resumed.text
    assert outcome.is_equal, outcome.rows
