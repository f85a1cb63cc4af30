"""Ranks that are stopped in a save of a sharded state, taken for dead, and wake when another
attempt has finished the run: all of them, or those that were not killed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from library_runs import newest, steps_of
from programs import SHARDED, born, live

from harness.checkpoint.catalog import read_catalog
from harness.cli import main
from harness.errors import EXIT_SUPERSEDED
from harness.exchange.compare import differences
from harness.store import LocalStore

pytestmark = pytest.mark.slow

# Each rank stops in the save of step 6 at the place that AT names for it: the writer before it
# looks whether it is superseded or after that, the other one around its shard and its word.
PROGRAM = (
    """
from torch.distributed.fsdp import fully_shard
from harness.checkpoint import commit
from harness.distributed.words import Words
from harness.sharding import rank_save

run = init()
"""
    + SHARDED
    + """place = os.environ.get("AT", ",").split(",")[run.rank]
steps = []


def stops(at):
    if at == place and steps[-1] == 6:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)  # on a busy machine this thread goes on for a moment


def checks(*arguments, check=commit.check_fence):
    stops("before the fence")
    check(*arguments)
    stops("after the fence")


def writes(store, attempt, step, *arguments, write=rank_save.write_shard):
    steps.append(step)
    stops("before its shard")
    file = write(store, attempt, step, *arguments)
    stops("before its word")
    return file


def tells(words, key, value, tell=Words.tell):
    tell(words, key, value)
    if key.startswith("save/"):
        stops("after its word")


commit.check_fence, rank_save.write_shard, Words.tell = checks, writes, tells
for x, y in run.batches(points(), 16, epochs=1):
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert live(folder, PROGRAM, "run", ranks=2).codes == [0, 0]
    return newest(folder / "run")


@pytest.mark.parametrize(
    ("at", "killed"),
    [
        pytest.param(",before its word", None, id="before the last word"),
        pytest.param("after the fence,after its word", None, id="after the fence"),
        pytest.param("before the fence,after its word", 1, id="the writer alone"),
        pytest.param("after the fence,after its word", 1, id="the writer alone, after the fence"),
        pytest.param(",before its shard", 0, id="the other rank alone"),
    ],
)
def test_ranks_that_wake_after_another_attempt_do_no_harm(
    tmp_path: Path, undisturbed: dict[str, Any], at: str, killed: int | None
) -> None:
    zombies = born(tmp_path, PROGRAM, "run", ranks=2, env={"AT": at})
    try:
        for rank, zombie in enumerate(zombies):
            if at.split(",")[rank]:
                zombie.wait_stopped()
        if at.startswith(","):  # the writer waits for the word of the other one
            zombies[0].stop()
        if killed is not None:
            assert zombies[killed].kill() == -signal.SIGKILL
        life = live(tmp_path, PROGRAM, "run", ranks=2)
        assert life.codes == [0, 0] and "resumes from step 3" in life.text, life.texts
        for rank, zombie in enumerate(zombies):
            if rank != killed:
                zombie.wake()
        codes = [zombie.wait() for zombie in zombies]
    finally:
        for zombie in zombies:
            zombie.kill()
    texts = [zombie.text for zombie in zombies]
    assert 0 not in codes and not any("finished" in text for text in texts), texts
    if killed is None:
        assert codes[0] == EXIT_SUPERSEDED, (codes, texts)
    directory = tmp_path / "run"
    assert list(differences(undisturbed, newest(directory))) == []
    catalog = read_catalog(LocalStore(directory))
    assert catalog.head is not None and catalog.head.attempt == 2
    assert [step for step in steps_of(directory) if step > 3][-1] == catalog.head.step == 10
    if "after the fence" not in at:  # there a manifest may name shards that the claim has deleted
        assert main(["verify", str(directory)]) == 0
    again = live(tmp_path, PROGRAM, "run", ranks=2)
    assert again.codes == [0, 0] and "is finished: step 10" in again.text, again.texts
