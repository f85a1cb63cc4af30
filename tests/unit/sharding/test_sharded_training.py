"""`train.shard`: the program shards the modules of a task, and trains as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from library_runs import newest
from programs import Lived, live
from torch import nn

from harness.distributed import fsdp
from harness.errors import UsageError
from harness.exchange.compare import differences
from harness.selfcheck.identity import AttemptIdentities

PROGRAM = """
import threading
from pathlib import Path
from harness import train


def die():
    while not (Path(sys.argv[1]) / "checkpoints/step_00000006-0001.json").exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("DIE"):
    threading.Thread(target=die, daemon=True).start()
small = dict(layers=2, channels=24, heads=2, block_size=16, eval_windows=9)
train.main([
    f"run.dir={sys.argv[1]}", "task.name=harness.tasks.bytes:build",
    *(f"task.args.{key}={value}" for key, value in small.items()),
    "train.global_batch_size=8", "train.max_steps=12", "eval.every_steps=5", "eval.batch_size=4",
    "checkpoint.every_steps=3", "checkpoint.every_s=null", "log.every_steps=1", *SETTINGS
])
"""
EVERYTHING = (
    "train.precision=bf16",
    "train.micro_batch_size=1",
    "train.ema_decay=0.9",
    "train.checkpoint_activations=true",
)
SLOW = pytest.mark.slow


def lived(folder: Path, name: str, *settings: str, ranks: int = 2, die: bool = False) -> Lived:
    source = PROGRAM.replace("SETTINGS", repr(list(settings)))
    return live(folder, source, name, ranks=ranks, env={"DIE": "1"} if die else {})


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        pytest.param(2, ("train.shard=fsdp",), id="fsdp"),
        pytest.param(2, ("train.shard=fsdp", *EVERYTHING), id="everything", marks=SLOW),
        pytest.param(2, ("train.shard=fsdp", "train.precision=fp16"), id="fp16", marks=SLOW),
        pytest.param(2, ("train.checkpoint_activations=true",), id="ddp", marks=SLOW),
        pytest.param(4, ("train.shard=hsdp", "train.shard_size=2"), id="hsdp", marks=SLOW),
    ],
)
def test_a_killed_run_equals_the_undisturbed_one(
    tmp_path: Path, ranks: int, settings: tuple[str, ...]
) -> None:
    whole = lived(tmp_path, "whole", *settings, ranks=ranks)
    killed = lived(tmp_path, "killed", *settings, ranks=ranks, die=True)
    again = lived(tmp_path, "killed", *settings, ranks=ranks)
    assert set(whole.codes) == set(again.codes) == {0} and killed.code == -9, again.texts
    assert "resumes from step" in again.text and "warning" not in again.text, again.text
    rows = differences(newest(tmp_path / "whole"), newest(tmp_path / "killed"))
    assert [row for row in rows if row[0] != "config.run.dir"] == []


def weights(run: Path, key: str = "model_state_dict") -> dict[str, torch.Tensor]:
    return dict(newest(run)[key])


def test_it_trains_as_without_sharding(tmp_path: Path) -> None:
    settings = ("train.micro_batch_size=1", "train.ema_decay=0.9", "train.clip_norm=0.5")
    for name, *more in (("ddp",), ("fsdp", "train.shard=fsdp")):
        life = lived(tmp_path, name, *settings, *more)
        assert life.codes == [0, 0], life.texts
    for key in ("model_state_dict", "ema_state_dict"):
        one, other = weights(tmp_path / "ddp", key), weights(tmp_path / "fsdp", key)
        assert one.keys() == other.keys()
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


def test_sharding_may_change_at_a_restart_and_other_last_bits_are_expected_then(
    tmp_path: Path,
) -> None:
    assert lived(tmp_path, "run", die=True).code == -9
    again = lived(tmp_path, "run", "train.shard=fsdp")
    assert again.codes == [0, 0], again.texts
    assert "setting changed: train.shard: 'none' -> 'fsdp'" in again.text
    assert "warning" not in again.text, again.text


@pytest.mark.parametrize(
    ("before", "now", "said"),
    [
        ({}, ["fsdp", None], ["train.shard: none before, fsdp now"]),
        ({"sharding": ["hsdp", 2]}, ["hsdp", 4], ["train.shard: hsdp by 2 before, hsdp by 4 now"]),
        ({"sharding": "nonsense"}, ["none", None], []),
        ({"sharding": ["fsdp", None]}, ["fsdp", None], []),
    ],
)
def test_a_change_of_sharding_explains_other_steps(
    before: dict[str, Any], now: list[Any], said: list[str]
) -> None:
    programs = {1: before, 2: {"sharding": now}}
    assert AttemptIdentities(2, {}, {1: {}}, programs).expected(1) == said


def test_ranks_that_do_not_divide_into_replicas_are_refused(tmp_path: Path) -> None:
    life = lived(tmp_path, "run", "train.shard=hsdp", "train.shard_size=3")
    assert life.codes == [78, 78] and "expected: one of 1, 2" in life.text, life.texts


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))
        self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8))


def test_repeated_modules_are_the_blocks() -> None:
    model = Model()
    assert fsdp.blocks_of(model, ()) == list(model.blocks)
    given = [model.head, model.blocks[0], nn.Linear(1, 1)]
    assert fsdp.blocks_of(model, given) == given[:2]
    assert fsdp.blocks_of(nn.Linear(2, 2), ()) == []


def test_a_block_that_shares_a_parameter_with_another_part_is_none() -> None:
    model = Model()
    first: Any = model.blocks[0]
    first[0].weight = model.blocks[2][0].weight  # type: ignore[index]
    assert fsdp.blocks_of(model, ()) == [model.blocks[1]]


def sharder_of(model: nn.Module) -> fsdp.Sharder:
    """A sharder that has sharded the model, as far as it concerns optimizers."""
    sharder = object.__new__(fsdp.Sharder)
    vars(sharder).update(_built=list(model.parameters()), _sharded={})
    return sharder


def test_an_optimizer_with_state_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(UsageError, match="state before the first step"):
        sharder_of(model).follow([optimizer])


def test_a_parameter_that_no_optimizer_updates_is_refused() -> None:
    """Or one that nothing finds, such as one in a list: the model would not be trained."""
    model = nn.Linear(2, 2)
    sharder_of(model).follow([torch.optim.SGD(model.parameters(), lr=0.1)])
    model.bias.requires_grad_(False)
    sharder_of(model).follow([torch.optim.SGD([model.weight], lr=0.1)])
    hidden = type("Several", (), {})()
    hidden.parts = [torch.optim.SGD(model.parameters(), lr=0.1)]
    with pytest.raises(UsageError, match="no optimizer of the task updates 1 parameter"):
        sharder_of(model).follow([hidden])


def test_modules_that_share_a_parameter_are_refused() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    fsdp.check_apart({"one": one, "other": other})
    other.weight = one.weight
    with pytest.raises(UsageError, match="one and other share parameters"):
        fsdp.check_apart({"one": one, "other": other})


def test_blocks_that_count_their_forward_passes_are_not_made_again() -> None:
    fsdp.check_recomputable([nn.Linear(2, 2)])
    with pytest.raises(UsageError, match="counts its forward passes"):
        fsdp.check_recomputable([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))])
    with pytest.raises(UsageError, match="no blocks"):
        fsdp.check_recomputable([])


def test_lists_of_modules_are_no_blocks() -> None:
    model = nn.Sequential(*(nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for _ in range(2)))
    assert len(fsdp.blocks_of(model, ())) == 4


TASK = """
from harness.task import Task


def build():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = list(model.parameters())

    def loss(model, batch):
        penalty = sum(one.square().sum() for one in kept)
        return (model(batch[0]) - batch[1]).square().mean() + penalty * KEPT

    def step(run, batch):
        return {"loss": 0.0}

    return Task(model, optimizer, points(), loss=loss, step=STEP)


sys.modules["task_of_test"] = sys.modules["__main__"]
from harness import train

train.main([
    f"run.dir={sys.argv[1]}", "task.name=task_of_test:build", "train.global_batch_size=8",
    "train.max_steps=3", "train.shard=fsdp"
])
"""


@pytest.mark.parametrize(
    ("kept", "step", "words"),
    [
        ("1", "None", "a parameter that it has kept from before"),
        ("0", "step", "a `step` of its own"),
    ],
)
def test_a_task_that_would_train_something_else_is_refused(
    tmp_path: Path, kept: str, step: str, words: str
) -> None:
    source = TASK.replace("KEPT", kept).replace("STEP", step)
    life = live(tmp_path, source, "run", ranks=2)
    assert life.codes == [78, 78] and words in life.text, life.texts
