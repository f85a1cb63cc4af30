"""The library as a user's own loop sees it: init, track, batches, log, evaluate, finish."""

from __future__ import annotations

import copy
import inspect
import io
import json
import random
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ENVIRONMENT, events, run
from library_runs import Custom, net, newest, saved_and_read, steps_of, train
from small_task import Noisy
from there import there
from torch import nn

import harness
from harness import cli, state, step
from harness import train as training
from harness.checkpoint.catalog import read_catalog
from harness.config.schema import TrainSettings
from harness.distributed.ranks import World
from harness.ema import Ema
from harness.errors import NonFiniteError, UsageError
from harness.exchange.compare import differences
from harness.store import LocalStore

pytestmark = pytest.mark.usefixtures("process_as_it_was")


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in sorted(directory.rglob("*"))
    }


def test_a_plain_loop_trains_to_its_end(tmp_path):
    run_ = train(tmp_path / "a")
    assert run_.finished and run_.step == 12 and run_.epoch == 2 and run_.state == {"steps": 12}
    head = there(read_catalog(LocalStore(tmp_path / "a")).head)
    assert (head.step, head.epoch, head.final) == (12, 2, {"epochs": 2, "max_steps": None})
    assert head.loss == pytest.approx(newest(tmp_path / "a")["loss"]) and there(head.loss) > 0
    assert head.classes == {"model": "Sequential", "optimizer": "AdamW", "scheduler": "StepLR"}
    kinds = [
        event["event"]
        for event in events(tmp_path / "a")
        if event["event"] not in ("rehearsed", "held_at_start")
    ]  # the former comes when it comes, the latter is of what the tests hold
    assert (
        kinds[0] == "begun"
        and kinds[-1] == "finished"
        and sorted(kinds[1:-1]) == ["saved", "saved", "saved", "step"]
    )
    assert json.loads((tmp_path / "a/attempts/0001.end.json").read_text())["why"] == "finished"


@pytest.mark.parametrize("leave_at", [1, 5, 6, 7, 11])
def test_a_loop_that_was_left_goes_on_exactly(tmp_path, uninterrupted, leave_at):
    train(tmp_path / "a", leave_at=leave_at)
    assert steps_of(tmp_path / "a") == [4, 8][: (leave_at - 1) // 4], (
        "a bare break finishes nothing and saves nothing"
    )
    torch.manual_seed(999), random.seed(999), np.random.seed(999)
    run_ = train(tmp_path / "a")
    assert run_.step == 12 and run_.state == {"steps": 12}
    assert cli.main(["diff", str(uninterrupted), str(tmp_path / "a")]) == 0


@pytest.mark.slow
def test_a_start_says_what_the_end_before_it_has_cost(tmp_path, capfd):
    train(tmp_path / "a", leave_at=7, log_every_steps=1)
    assert "to recompute" not in capfd.readouterr().out
    train(tmp_path / "a", leave_at=10, log_every_steps=1)
    assert re.search(
        r"resumes from step 4 \(\S+\) in \S+; saved \d+ s ago, 2 steps to recompute\n",
        capfd.readouterr().out,
    )
    train(tmp_path / "a", log_every_steps=1)
    assert re.search(
        r"resumes from step 8 \(\S+\) in \S+; saved \d+ s ago, 1 step to recompute\n",
        capfd.readouterr().out,
    )
    train(tmp_path / "a", epochs=3)
    assert re.search(
        r"resumes from step 12 \(\S+\) in \S+; saved \d+ s ago, 0 steps to recompute\n",
        capfd.readouterr().out,
    )


def test_the_comparison_sees_a_difference(tmp_path, uninterrupted, capfd):
    train(tmp_path / "a", seed=4)
    assert cli.main(["diff", str(uninterrupted), str(tmp_path / "a")]) == 1
    assert "model_state_dict" in capfd.readouterr().out


@pytest.mark.parametrize("save_every_steps", [1, 5])
def test_how_often_it_is_saved_changes_no_bit(tmp_path, uninterrupted, save_every_steps):
    train(tmp_path / "a", save_every_steps=save_every_steps)
    assert cli.main(["diff", str(uninterrupted), str(tmp_path / "a")]) == 0


def test_a_failing_step_saves_nothing_half_way(tmp_path, uninterrupted):
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "a", fail_at=8)
    assert steps_of(tmp_path / "a") == [4], "step 8 was due, but not made"
    train(tmp_path / "a")
    assert cli.main(["diff", str(uninterrupted), str(tmp_path / "a")]) == 0


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_replaced_standard_streams_do_not_hurt(tmp_path, uninterrupted, monkeypatch, stream):
    """As in a notebook, in a test runner, or in a daemon that closed them."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)
        assert train(tmp_path / "a").finished
    assert cli.main(["diff", str(uninterrupted), str(tmp_path / "a")]) == 0


def test_every_generator_goes_on_where_it_was(tmp_path):
    def draw():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.normal(),
            random.random(),
            random.gauss(0, 1),
        )

    def drawn(directory, leave_at):
        found = {}
        run_ = harness.init(directory, seed=1, save_every_steps=1)
        run_.track(model=net())
        for _ in run_.batches(Noisy(40), 10, num_workers=leave_at % 2, epochs=1):
            found[run_.step] = draw()
            if run_.step == leave_at:
                break
        return found

    whole = drawn(tmp_path / "whole", 4)
    assert len({str(value) for value in whole.values()}) == 4
    assert drawn(tmp_path / "a", 3) == {at: whole[at] for at in (1, 2, 3)}
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    assert drawn(tmp_path / "a", 4) == {at: whole[at] for at in (3, 4)}


def test_a_finished_run_is_finished_and_nothing_is_written(tmp_path, capfd):
    train(tmp_path / "a")
    before = listing(tmp_path / "a")
    weights = newest(tmp_path / "a")["model_state_dict"]
    run_ = train(tmp_path / "a", fail_at=13)
    assert run_.finished and run_.step == 12
    assert "is finished: step 12" in capfd.readouterr().out
    assert listing(tmp_path / "a") == before
    assert all(
        torch.equal(value, run_.tracked["model"].state_dict()[key])
        for key, value in weights.items()
    )


def test_more_epochs_go_on(tmp_path):
    train(tmp_path / "a", epochs=1)
    train(tmp_path / "b", epochs=2)
    run_ = train(tmp_path / "a", epochs=2)
    assert run_.step == 12
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert train(tmp_path / "a", epochs=1).step == 12, "fewer epochs than it has: finished"


def finishing(directory: Path, at: int, **options: object):
    run_ = harness.init(directory, seed=1, save_every_steps=2)
    run_.track(model=net())
    made = []
    for _ in run_.batches(Noisy(60), 10, **options):  # type: ignore[arg-type]
        made.append(run_.step)
        if run_.step == at:
            run_.finish()
    return run_, made


def test_finish_ends_early_and_the_run_stays_finished(tmp_path):
    run_, made = finishing(tmp_path / "a", 3, epochs=2)
    assert run_.finished and made == [1, 2, 3] and steps_of(tmp_path / "a") == [2, 3]
    before = listing(tmp_path / "a")
    run_, made = finishing(tmp_path / "a", 99, epochs=2)
    assert run_.finished and run_.step == 3 and made == []
    assert listing(tmp_path / "a") == before
    run_, made = finishing(tmp_path / "a", 99, epochs=3)
    assert made == list(range(4, 19)), "extended, it goes on in mid-epoch"


def test_max_steps_end_a_run_and_more_of_them_extend_it(tmp_path):
    run_, made = finishing(tmp_path / "a", 99, epochs=5, max_steps=7)
    assert made == [1, 2, 3, 4, 5, 6, 7] and run_.finished
    assert finishing(tmp_path / "a", 99, epochs=5, max_steps=7)[1] == []
    assert finishing(tmp_path / "a", 99, epochs=5, max_steps=9)[1] == [8, 9]
    assert finishing(tmp_path / "a", 99, epochs=2)[1] == [10, 11, 12]


def test_every_last_step_is_due(tmp_path):
    run_ = harness.init(tmp_path / "a")
    run_.track(model=net())
    due = [run_.step for _ in run_.batches(Noisy(60), 10, epochs=1, max_steps=5) if run_.due(2)]
    assert due == [2, 4, 5]
    assert run_.due(None)


@pytest.mark.parametrize(("finish_at", "expected"), [(0, [5, 8]), (3, [3])])
def test_the_last_step_is_evaluated_wherever_the_run_ends(tmp_path, finish_at, expected):
    """Of a stream, whose end shows only when it is there, and after `run.finish()`."""
    training.main(
        [
            "task.name=small_task:build_stream",
            f"task.args.finish_at={finish_at}",
            "train.global_batch_size=12",
            "train.epochs=2",
            "eval.every_steps=5",
            "checkpoint.best=val_loss:min",
            f"run.dir={tmp_path / 'a'}",
        ]
    )
    assert [event["step"] for event in events(tmp_path / "a", "evaluated")] == expected


def test_the_loss_of_a_checkpoint_is_the_last_that_was_logged(tmp_path):
    def made(name: str, leave_at: int | None = None, **often: object) -> dict:
        (run_, _), value = tracked_run(tmp_path / name, seed=1, **often), torch.zeros(())
        for _ in run_.batches(Noisy(60), 10, epochs=2):
            if run_.step in (2, 7):
                value.fill_(run_.step)
                run_.log(loss=value)
            if run_.step == 8:
                value.zero_()  # the program's own again
            if run_.step == leave_at:
                break
        return newest(tmp_path / name)

    whole = made("a", save_every_steps=1, log_every_steps=1)
    assert whole["loss"] == 7
    assert made("b", log_every_steps=100)["loss"] == 7
    made("c", leave_at=6, save_every_steps=5, log_every_steps=3)
    assert newest(tmp_path / "c")["loss"] == 2
    assert made("c", log_every_steps=4)["loss"] == 7
    assert cli.main(["diff", str(tmp_path / "a"), str(tmp_path / "c")]) == 0


def test_the_best_value_so_far_is_one_of_the_metric_that_ranks_now(tmp_path, capfd):
    def made(best: str, epochs: int) -> list[bool]:
        run_, _ = tracked_run(tmp_path / "a", seed=1, best=best, save_every_steps=6)
        improved = []
        for _ in run_.batches(Noisy(60), 10, epochs=epochs):
            value = 1.5 + 0.01 * run_.step
            run_.evaluate(
                Noisy(4), lambda batch, v=value: {"val_loss": 4 * v, "val_acc": 4 * v / 2}
            )
            improved.append(run_._metric_buffer.new_best)
        return improved

    assert made("val_acc:max", 1) == [True] * 6
    capfd.readouterr()
    said = "checkpoints were ranked by val_acc:max, and are ranked by val_loss:min from here on"
    assert made("val_loss:min", 2) == [True] + [False] * 5
    assert capfd.readouterr().out.count(said) == 1
    best = newest(tmp_path / "a")["best"]
    assert made("val_loss:min", 3) == [False] * 6
    assert newest(tmp_path / "a")["best"] == best == pytest.approx(1.57)
    assert said not in capfd.readouterr().out


def tracked_run(directory: Path, **options: object):
    run_ = harness.init(directory, save_every_s=None, **options)  # type: ignore[arg-type]
    model = net()
    run_.track(model=model)
    return run_, model


def test_misuse_of_track_is_said_in_words(tmp_path):
    run_, _ = tracked_run(tmp_path / "a")
    with pytest.raises(UsageError, match="two objects are tracked as 'model'"):
        run_.track(model=net())
    with pytest.raises(UsageError, match="without state_dict"):
        run_.track(count=3)
    for _ in run_.batches(Noisy(20), 10, epochs=1):
        with pytest.raises(UsageError, match="after the first batch"):
            run_.track(late=net())
    with pytest.raises(UsageError, match="after the first batch"):
        run_.track(late=net())


def test_nothing_tracked_is_refused_before_anything_is_written(tmp_path):
    run_ = harness.init(tmp_path / "a")
    with pytest.raises(UsageError, match="nothing is tracked"):
        next(run_.batches(Noisy(20), 10, epochs=1))
    assert not (tmp_path / "a").exists()


def test_batches_inside_batches_are_refused_and_the_outer_loop_goes_on(tmp_path):
    run_, _ = tracked_run(tmp_path / "a")
    made = 0
    for _ in run_.batches(Noisy(40), 10, epochs=1):
        made += 1
        with pytest.raises(UsageError, match="inside the loop"):
            next(run_.batches(Noisy(20), 10, epochs=1))
    assert made == 4 and run_.finished


def test_a_second_loop_of_one_run_is_refused_in_words(tmp_path):
    """`for epoch in range(3): for batch in run.batches(…, epochs=1)` is an easy mistake; no other
    start is to blame for it."""
    run_, _ = tracked_run(tmp_path / "a")
    assert len(list(run_.batches(Noisy(40), 10, epochs=1))) == 4
    with pytest.raises(UsageError, match="batches"):
        next(run_.batches(Noisy(40), 10, epochs=1))


def test_tracked_names_have_to_stay(tmp_path):
    train(tmp_path / "a", epochs=1)
    run_, _ = tracked_run(tmp_path / "a")
    with pytest.raises(UsageError, match="holds what is not tracked: optimizer, scheduler"):
        next(run_.batches(Noisy(60), 10, epochs=2))
    with pytest.raises(UsageError, match="has no 'other'"):
        run_.track(other=net())


def test_other_data_and_another_way_to_deal_it_out_are_refused(tmp_path):
    def resume(dataset, batch=10, accept=(), seed=0, **options):
        run_, _ = tracked_run(tmp_path / "a", accept=accept, seed=seed)
        return next(run_.batches(dataset, batch, epochs=2, **options))

    run_, _ = tracked_run(tmp_path / "a")
    list(run_.batches(Noisy(40), 10, epochs=1))
    other = Noisy(40)
    other.x[7] += 1
    with pytest.raises(UsageError, match=r"not what this run was trained on(.|\n)*last bits of fl"):
        resume(other)
    with pytest.raises(UsageError, match="size: found 41, expected 40") as refused:
        resume(Noisy(41))
    assert "last bits" not in str(refused.value)
    with pytest.raises(UsageError, match="not what this run was trained on"):
        resume(other, accept=["config"])
    with pytest.raises(UsageError, match="global_batch_size: found 20, expected 10"):
        resume(Noisy(40), 20)
    with pytest.raises(UsageError, match="seed: found 5, expected 0"):
        resume(Noisy(40), seed=5)
    with pytest.raises(UsageError, match="shuffle"):
        resume(Noisy(40), shuffle=False, accept=["data"])
    with pytest.raises(UsageError, match="drop_last"):
        resume(Noisy(40), drop_last=False)
    assert (
        steps_of(tmp_path / "a") == [4] and len(list((tmp_path / "a/attempts").iterdir())) == 2
    ), "a refused start claims nothing"
    assert resume(other, accept=["data"]) is not None


def test_a_dataset_that_names_its_content_may_have_other_last_bits_on_another_machine(tmp_path):
    class Named(Noisy):
        fingerprint = "noise, 40 samples"

    run_, _ = tracked_run(tmp_path / "a")
    here, there_ = Named(40), Named(40)
    there_.x += 1e-7
    list(run_.batches(here, 10, epochs=1))
    run_, _ = tracked_run(tmp_path / "a")
    assert len(list(run_.batches(there_, 10, epochs=2))) == 4


def test_a_place_that_is_none_is_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match="a run needs a place"):
        harness.init(None)
    with pytest.raises(UsageError, match="not a place for a run") as caught:
        harness.init(tmp_path / "a", remote="s3://user:secret@bucket/a?key=secret")
    assert "secret" not in str(caught.value)
    with pytest.raises(UsageError, match="the same place"):
        harness.init(tmp_path / "a", remote=f"file://{tmp_path}/a")


def test_settings_of_the_run_are_kept_and_compared(tmp_path):
    train(tmp_path / "a", epochs=1, config={"lr": 1e-2, "note": ["a", None]})
    assert newest(tmp_path / "a")["config"] == {"lr": 1e-2, "note": ["a", None]}
    with pytest.raises(UsageError, match=r"lr: 0\.01 -> 0\.02"):
        train(tmp_path / "a", config={"lr": 2e-2, "note": ["a", None]})
    train(tmp_path / "a", config={"lr": 2e-2, "note": ["a", None]}, accept=["config"])
    assert newest(tmp_path / "a")["config"]["lr"] == 2e-2


def test_plain_values_of_the_user_survive_and_others_are_refused(tmp_path):
    values = {
        "patience": 3,
        "best": 0.5,
        "name": "a",
        "list": [1, {"x": None}],
        "pair": (1, 2),
        "numpy": np.float64(0.25),
    }
    run_, _ = tracked_run(tmp_path / "a")
    for _ in run_.batches(Noisy(20), 10, epochs=1):
        run_.state |= values
    run_, _ = tracked_run(tmp_path / "a")
    assert run_.state == values and type(run_.state["numpy"]) is np.float64
    run_.state["open"] = {1, 2}
    with pytest.raises(UsageError, match=r"state\['open'\] cannot be saved as plain data"):
        list(run_.batches(Noisy(20), 10, epochs=2))
    assert steps_of(tmp_path / "a") == [2]


def test_accumulating_yields_lists_with_one_weight_each(tmp_path):
    run_, _ = tracked_run(tmp_path / "a")
    shares = [
        (batches, run_.weights)
        for batches in run_.batches(Noisy(26), 12, accumulate=3, drop_last=False, epochs=1)
    ]
    assert [[len(x) for x, _ in batches] for batches, _ in shares] == [
        [4, 4, 4],
        [4, 4, 4],
        [1, 1, 1],
    ]
    assert [weights for _, weights in shares] == [pytest.approx((1 / 3,) * 3)] * 2 + [
        (0.0, 0.5, 0.5)
    ]
    run_, _ = tracked_run(tmp_path / "b")
    assert all(
        isinstance(batch, list) and len(batch) == 2 and len(batch[0]) == 12
        for batch in run_.batches(Noisy(26), 12, epochs=1)
    )


def test_a_collate_function_and_an_order_are_used(tmp_path):
    run_, _ = tracked_run(tmp_path / "a")
    batches = list(
        run_.batches(
            [*range(6)], 2, collate_fn=tuple, order=lambda epoch: [5, 4, 3, 2, 1, 0], epochs=1
        )
    )
    assert batches == [(5, 4), (3, 2), (1, 0)]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, size: int) -> None:
        self.size, self.at = size, 0

    def __iter__(self):
        while self.at < self.size:
            self.at += 1
            yield torch.full((12,), float(self.at - 1))
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def streamed(
    directory: Path, leave_at: int | None = None, size: int = 11, epochs: int = 3
) -> list[list[float]]:
    run_ = harness.init(directory, save_every_steps=1)
    run_.track(model=net())
    found = []
    for x in run_.batches(Stream(size), 4, epochs=epochs):
        found.append(x[:, 0].tolist())
        if run_.step == leave_at:
            break
    return found


@pytest.mark.slow
def test_a_stream_goes_on_after_its_last_used_sample(tmp_path):
    whole = streamed(tmp_path / "whole")
    assert whole == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
    for leave_at in range(2, 7):
        assert streamed(tmp_path / str(leave_at), leave_at) == whole[:leave_at]
        assert streamed(tmp_path / str(leave_at)) == whole[leave_at - 1 :]


def test_a_stream_with_too_few_samples_is_refused_like_a_dataset_with_too_few(tmp_path):
    with pytest.raises(UsageError):
        streamed(tmp_path / "a", size=3)
    assert steps_of(tmp_path / "a") == [], "a run that trained nothing is not finished"


def test_evaluate_sees_each_sample_once_and_gives_the_means(tmp_path):
    run_, model = tracked_run(tmp_path / "a")
    dataset = [torch.full((12,), float(at)) for at in range(23)]
    seen = []

    def measure(batch):
        assert not torch.is_grad_enabled() and not model.training
        seen.extend(batch[:, 0].tolist())
        return {
            "val_loss": batch[:, 0].sum(),
            "one": len(batch),
            "late": 46.0 if len(seen) == 23 else 0.0,
        }

    assert (
        run_.evaluate(dataset, measure, batch_size=5)
        == {"val_loss": 11.0, "one": 1.0, "late": 2.0}
        == run_.metrics
    )
    assert seen == list(range(23))


@pytest.mark.parametrize("fails", [False, True])
def test_evaluate_leaves_modes_and_generators_as_they_were(tmp_path, fails):
    run_, model = tracked_run(tmp_path / "a")
    model[1].eval()  # a frozen part stays frozen
    modes = [part.training for part in model.modules()]
    buffers = copy.deepcopy(model.state_dict())
    before = state.rng_state()

    def measure(batch):
        model(batch[0]), torch.rand(3), np.random.rand(3), random.random()
        if fails:
            raise ZeroDivisionError
        return {"val_loss": 1.0}

    if fails:
        with pytest.raises(ZeroDivisionError):
            run_.evaluate(Noisy(10), measure)
    else:
        run_.evaluate(Noisy(10), measure)
    assert [part.training for part in model.modules()] == modes and torch.is_grad_enabled()
    assert all(torch.equal(value, buffers[key]) for key, value in model.state_dict().items())
    after = state.rng_state()
    assert torch.equal(before["torch"], after["torch"]) and torch.equal(
        before["python"]["words"], after["python"]["words"]
    )
    assert (
        torch.equal(before["numpy"]["key"], after["numpy"]["key"])
        and before["numpy"]["pos"] == after["numpy"]["pos"]
    )


def test_evaluating_changes_no_bit_of_the_training(tmp_path):
    def trained(directory, evaluating):
        run_ = harness.init(directory, seed=2, save_every_s=None)
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run_.track(model=model, optimizer=optimizer)
        for x, y in run_.batches(Noisy(40), 10, epochs=1):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            if evaluating:
                run_.evaluate(
                    Noisy(20),
                    lambda batch: {"v": F.mse_loss(model(batch[0]) + torch.rand(1), batch[1])},
                )
        return newest(directory)

    one, other = trained(tmp_path / "a", False), trained(tmp_path / "b", True)
    for key in ("model_state_dict", "rng"):
        assert list(differences(one[key], other[key])) == []
    assert other["metrics"].keys() == {"v"}


def test_metrics_are_saved_and_the_best_checkpoint_is_kept_as_a_file_of_its_own(tmp_path):
    scores = [0.9, 0.2, 0.5, 0.7, 0.6, 0.8]
    run_, model = tracked_run(tmp_path / "a", save_every_steps=1, keep_last=1, keep_best=1)
    for _ in run_.batches(Noisy(60), 10, epochs=1):
        with torch.no_grad():
            model[0].bias.fill_(run_.step)
        run_.evaluate(
            [0.0], lambda batch: {"val_loss": scores[run_.step - 1], "other": float("nan")}
        )
    assert steps_of(tmp_path / "a") == [2, 5, 6], "the best, and always the two newest"
    best = Path(run_.best_checkpoint() or "")
    assert best.is_file() and not best.is_symlink() and best.stat().st_nlink == 1
    payload = torch.load(best, weights_only=True)
    assert payload["step"] == 2 and payload["metrics"]["val_loss"] == 0.2 and payload["best"] == 0.2
    assert torch.all(payload["model_state_dict"]["0.bias"] == 2)
    by_step = {
        manifest.step: manifest.metrics["val_loss"]
        for manifest in read_catalog(run_.store).manifests
    }
    assert by_step == {2: 0.2, 5: 0.6, 6: 0.8}


def test_a_new_best_is_saved_at_once_also_after_going_on(tmp_path):
    scores = {1: 0.5, 2: 0.6, 3: 0.4, 4: 0.45, 5: 0.41}

    def trained(leave_at):
        run_, _ = tracked_run(tmp_path / "a", best="acc:min", keep_last=9)
        for _ in run_.batches(Noisy(60), 10, max_steps=6, epochs=1):
            if run_.step in scores:
                run_.evaluate([0.0], lambda batch: {"acc": scores[run_.step]})
            if run_.step == leave_at:
                break

    trained(4)
    assert steps_of(tmp_path / "a") == [1, 3]
    trained(6)
    assert steps_of(tmp_path / "a") == [1, 3]
    assert (
        tracked_run(tmp_path / "a", best="acc:min")[0]
        .best_checkpoint()
        .endswith("step_00000003-0001.pt")
    )


# --- what is captured -----------------------------------------------------------------------------


def stepped(optimizer_class=torch.optim.AdamW, model: nn.Module | None = None):
    model = model or net()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    model(torch.randn(8, 12)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_capturing_changes_no_live_object():
    model, optimizer = stepped()
    wrapped = torch.compile(model)
    places = {
        key: (value.data_ptr(), value.device, value.requires_grad)
        for key, value in dict(model.named_parameters()).items()
    }
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    captured = state.capture({"model": wrapped, "optimizer": optimizer})
    assert list(differences(before, (model.state_dict(), optimizer.state_dict()))) == []
    assert {
        key: (v.data_ptr(), v.device, v.requires_grad) for key, v in model.named_parameters()
    } == places
    assert all(
        torch.equal(p.grad, gradient)
        for p, gradient in zip(model.parameters(), gradients, strict=True)
    )
    assert model.training and captured["model_state_dict"].keys() == model.state_dict().keys()
    assert not any(value.requires_grad for value in captured["model_state_dict"].values())


def test_the_shells_of_ddp_and_compile_leave_no_prefix(tmp_path):
    run_ = harness.init(tmp_path / "a")
    plain = net()
    shells = [
        nn.parallel.DistributedDataParallel(copy.deepcopy(plain)),
        torch.compile(copy.deepcopy(plain)),
    ]
    shells.append(torch.compile(nn.parallel.DistributedDataParallel(copy.deepcopy(plain))))
    assert run_.world_size == 1
    for shell in shells:
        captured = state.capture({"model": shell})["model_state_dict"]
        assert list(captured) == list(plain.state_dict())
        other = net()
        state.restore(
            {"model": other}, {"model": "Sequential"}, {"model_state_dict": captured}, "here"
        )
        assert all(torch.equal(value, captured[key]) for key, value in other.state_dict().items())


def test_tied_tensors_stay_tied(tmp_path):
    class Tied(nn.Module):
        part: torch.Tensor

        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 40), nn.Linear(40, 50, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("part", torch.arange(1000.0)[:10])
            self.register_buffer("again", self.part)

    captured = state.capture({"model": Tied()})
    assert (
        captured["model_state_dict"]["embed.weight"] is captured["model_state_dict"]["head.weight"]
    )
    read = saved_and_read(tmp_path, captured)["model_state_dict"]
    assert read["embed.weight"].data_ptr() == read["head.weight"].data_ptr()
    assert read["part"].data_ptr() == read["again"].data_ptr() != read["embed.weight"].data_ptr()


def test_a_view_does_not_drag_its_storage_along(tmp_path):
    whole = torch.arange(1_000_000, dtype=torch.float32)
    captured = state.capture(
        {"custom": Custom({"head": whole[:10], "columns": whole.view(1000, 1000)[:, :2]})}
    )
    torch.save(captured, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 20_000
    read = torch.load(tmp_path / "x.pt", weights_only=True)["custom_state_dict"]["value"]
    assert torch.equal(read["head"], whole[:10]) and torch.equal(
        read["columns"], whole.view(1000, 1000)[:, :2]
    )


def test_fresh_tensors_of_several_objects_are_not_taken_for_one():
    """What state_dict() made for one object is gone when the next one makes its own, maybe at the
    same address."""

    class Fresh(Custom):
        def state_dict(self):
            return {"value": torch.full((2000,), float(self.value))[:1000]}

    captured = state.capture({f"part{at}": Fresh(at) for at in range(6)})
    assert [captured[f"part{at}_state_dict"]["value"][0].item() for at in range(6)] == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        object(),
        [Path("x")],
        {"a": lambda: 0},
        defaultdict(lambda: 0),
        np.random.default_rng(0),
    ],
)
def test_state_that_is_not_plain_is_refused_with_its_place(value):
    with pytest.raises(
        UsageError, match=r"custom_state_dict\['value'\].* cannot be saved as plain data"
    ):
        state.capture({"custom": Custom(value)})


def test_plain_state_comes_back_as_it_was(tmp_path):
    value = {
        "a": [1, 2.5, True, None, "x", b"y", 1j],
        "b": (1, (2,)),
        3: {"n": np.int64(7)},
        "t": np.arange(3),
    }
    read = saved_and_read(tmp_path, state.capture({"custom": Custom(value)}))["custom_state_dict"][
        "value"
    ]
    assert (
        read["a"] == value["a"]
        and read["b"] == value["b"]
        and read[3] == {"n": 7}
        and read["t"].tolist() == [0, 1, 2]
    )
    assert [type(item) for item in read["a"]] == [type(item) for item in value["a"]]


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_refused(broken):
    model = net()
    with torch.no_grad():
        model.get_parameter("4.weight")[0, 3] = broken
    with pytest.raises(NonFiniteError, match=r"NaN or Inf in model.4.weight"):
        state.check_finite({"model": model})
    masked = net()
    masked.register_buffer("mask", torch.full((3,), -float("inf")))
    state.check_finite({"model": masked})
    assert torch.isinf(state.capture({"model": masked})["model_state_dict"]["mask"]).all(), (
        "masks may be infinite"
    )


def test_a_nan_does_not_overwrite_the_last_good_checkpoint(tmp_path):
    run_, model = tracked_run(tmp_path / "a", save_every_steps=1)
    run_.track(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(NonFiniteError):
        for _ in run_.batches(Noisy(60), 10, epochs=1):
            if run_.step == 3:
                model[0].weight.grad = torch.full_like(model[0].weight, float("nan"))
                run_.tracked["optimizer"].step()
    assert steps_of(tmp_path / "a") == [1, 2]
    assert [
        path.name for path in (tmp_path / "a/checkpoints").iterdir() if "00000003" in path.name
    ] == []


def test_the_state_of_an_optimizer_keeps_its_dtype():
    model, optimizer = stepped()
    for entry in optimizer.state.values():
        entry["exp_avg"] = entry["exp_avg"].bfloat16()
    captured = copy.deepcopy(state.capture({"optimizer": optimizer}))
    fresh = torch.optim.AdamW(model.parameters(), lr=0.1)
    state.restore({"optimizer": fresh}, {"optimizer": "AdamW"}, captured, "here")
    assert {entry["exp_avg"].dtype for entry in fresh.state.values()} == {torch.bfloat16}
    assert {entry["exp_avg_sq"].dtype for entry in fresh.state.values()} == {torch.float32}
    assert list(differences(captured["optimizer_state_dict"], fresh.state_dict())) == []


def test_a_half_precision_model_keeps_full_precision_state():
    model, optimizer = stepped(model=net())
    model.bfloat16()
    captured = copy.deepcopy(state.capture({"model": model, "optimizer": optimizer}))
    again = net().bfloat16()
    fresh = torch.optim.AdamW(again.parameters(), lr=0.1)
    state.restore({"model": again, "optimizer": fresh}, {}, captured, "here")
    assert list(differences(captured, state.capture({"model": again, "optimizer": fresh}))) == []
    assert {entry["exp_avg"].dtype for entry in fresh.state.values()} == {torch.float32}


def test_another_model_is_shown_as_a_table_and_nothing_is_changed():
    model, optimizer = stepped()
    captured = state.capture({"optimizer": optimizer, "model": model})
    other = nn.Sequential(
        nn.Linear(12, 8),
        nn.BatchNorm1d(8),
        nn.Tanh(),
        nn.Dropout(0.3),
        nn.Linear(8, 1, bias=False),
        nn.Linear(1, 1),
    )
    before = copy.deepcopy(other.state_dict())
    fresh = torch.optim.AdamW(other.parameters())
    with pytest.raises(UsageError) as caught:
        state.restore({"optimizer": fresh, "model": other}, {}, captured, "step_7")
    said = str(caught.value)
    assert "step_7 is a checkpoint of another model" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["missing", "5.weight", "1x1", "-"] in rows and [
        "unexpected",
        "4.bias",
        "-",
        "1",
    ] in rows
    assert ["mis-shaped", "0.weight", "8x12", "16x12"] in rows
    assert fresh.state_dict()["state"] == {} and list(differences(before, other.state_dict())) == []


def test_another_class_of_optimizer_is_refused():
    model, optimizer = stepped(torch.optim.Adam)
    captured = state.capture({"optimizer": optimizer})
    with pytest.raises(UsageError, match="found: AdamW, expected: Adam"):
        state.restore(
            {"optimizer": torch.optim.AdamW(model.parameters())},
            {"optimizer": "Adam"},
            captured,
            "here",
        )


def test_other_parameter_groups_are_refused_in_words():
    model, optimizer = stepped()
    captured = state.capture({"optimizer": optimizer})
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias]}]
    with pytest.raises(UsageError, match="optimizer does not take the state in here"):
        state.restore(
            {"optimizer": torch.optim.AdamW(groups)}, {"optimizer": "AdamW"}, captured, "here"
        )


def restored(thing, other, tmp_path):
    state.restore(
        {"thing": other},
        {"thing": type(thing).__name__},
        saved_and_read(tmp_path, state.capture({"thing": thing})),
        "here",
    )
    return other


def test_averaged_weights_survive(tmp_path):
    model = net()
    averaged = copy.deepcopy(model)
    average = Ema(model, averaged, 0.9)
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(1.0)
        model.get_buffer("1.running_mean").fill_(5.0)
    start = averaged.get_parameter("0.weight").clone()
    average.update()
    torch.testing.assert_close(averaged.get_parameter("0.weight"), start + 0.1 * (1 - start))
    assert torch.all(averaged.get_buffer("1.running_mean") == 5.0)
    other = restored(average, Ema(net(), net(), 0.9), tmp_path)
    assert list(differences(average.state_dict(), other.state_dict())) == []
    assert not other.module.training and not any(p.requires_grad for p in other.module.parameters())


def test_the_count_of_skipped_updates_survives(tmp_path):
    guard = step.FiniteGuard("skip", 2)
    assert guard.allows(torch.tensor(1.0), 1)
    assert not guard.allows(torch.tensor(float("nan")), 2) and not guard.allows(
        torch.tensor(float("inf")), 3
    )
    other = restored(guard, step.FiniteGuard("skip", 2), tmp_path)
    with pytest.raises(NonFiniteError, match="not finite at step 4"):
        other.allows(torch.tensor(float("nan")), 4)
    guard.allows(torch.tensor(1.0), 4)
    assert guard.skipped_in_a_row == 0


def stepper_of(loss, **settings: object) -> step.Stepper:
    torch.manual_seed(0)
    model = nn.Linear(12, 1)
    job = harness.Task(
        modules=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        train_data=None,
        loss=loss,
    )
    world = World(0, 1, torch.device("cpu"), 10)
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]  # public, but not in __all__
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return step.Stepper(job, TrainSettings(**settings), world)  # type: ignore[arg-type]


@pytest.mark.parametrize("twice", ["model", "guard", "ema", "scaler"])
def test_two_objects_of_a_task_with_one_name_are_refused(twice):
    def with_scheduler(name: str) -> step.Stepper:
        stepper = stepper_of(squared, precision="fp16", ema_decay=0.9)
        stepper.schedulers[name] = torch.optim.lr_scheduler.StepLR(
            stepper.optimizers["optimizer"], 1
        )
        return stepper

    assert "scheduler" in with_scheduler("scheduler").tracked
    with pytest.raises(UsageError, match=f"several objects of the task have the name '{twice}'"):
        _ = with_scheduler(twice).tracked


def squared(model, x):
    return model(x).square().mean()


def test_the_gradient_scaler_survives(tmp_path):
    one = stepper_of(squared, precision="fp16")
    assert "scaler" in one.tracked and "scaler" not in stepper_of(squared).tracked
    for at in range(3):
        one([torch.full((4, 12), 1e4 if at == 0 else 1.0)], (1.0,), at + 1)
    other = stepper_of(squared, precision="fp16")
    assert one.scaler.state_dict() != other.scaler.state_dict()
    captured = saved_and_read(tmp_path, copy.deepcopy(state.capture(one.tracked)))
    state.restore(other.tracked, {}, captured, "here")
    assert other.scaler.state_dict() == one.scaler.state_dict()
    for stepper in (one, other):
        stepper([torch.ones(4, 12)], (1.0,), 4)
    assert list(differences(state.capture(one.tracked), state.capture(other.tracked))) == []


def test_overflows_of_the_gradient_scaler_are_skipped_but_not_counted():
    stepper = stepper_of(squared, precision="fp16", nonfinite_limit=1)
    before = copy.deepcopy(stepper.modules["model"].state_dict())
    for at in range(4):
        stepper([torch.full((4, 12), 1e4)], (1.0,), at + 1)
    assert stepper.guard.skipped_in_a_row == 0 and stepper.scaler.get_scale() < 2**16
    assert list(differences(before, stepper.modules["model"].state_dict())) == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_not_finite_stops_the_update_even_if_its_gradients_are_finite(precision):
    stepper = stepper_of(
        lambda model, x: squared(model, x) + float("nan"),
        nonfinite_limit=2,
        clip_norm=None,
        precision=precision,
    )
    before = copy.deepcopy(stepper.modules["model"].state_dict())
    for at in range(2):
        stepper([torch.ones(4, 12)], (1.0,), at + 1)
    assert list(differences(before, stepper.modules["model"].state_dict())) == []
    with pytest.raises(NonFiniteError, match="not finite at step 3"):
        stepper([torch.ones(4, 12)], (1.0,), 3)


def test_micro_batches_make_the_step_of_the_whole_batch():
    x = torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    one, many = stepper_of(squared), stepper_of(squared)
    whole = one([x], (1.0,), 1)
    split = many([x[:2], x[2:8], x[8:]], (2 / 12, 6 / 12, 4 / 12), 1)
    torch.testing.assert_close(whole["loss"], split["loss"])
    for parameter, other in zip(
        one.modules["model"].parameters(), many.modules["model"].parameters(), strict=True
    ):
        torch.testing.assert_close(parameter, other)


def test_gradients_are_clipped_to_the_norm():
    stepper = stepper_of(lambda model, x: 1000 * squared(model, x), clip_norm=0.5)
    stepper([torch.ones(4, 12)], (1.0,), 1)
    total = torch.stack(
        [there(p.grad).norm() for p in stepper.modules["model"].parameters()]
    ).norm()
    assert total.item() == pytest.approx(0.5, rel=1e-4)


def test_overrides_scale_a_scheduled_learning_rate_and_keep_its_place():
    def built(lr, milestones):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=lr / 10)
        return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

    _, old, old_schedule = built(1.0, [2, 4])
    for _ in range(3):
        old.step()
        old_schedule.step()
    captured = copy.deepcopy(state.capture({"optimizer": old, "scheduler": old_schedule}))
    _, new, schedule = built(0.5, [2, 4])
    tracked = {"optimizer": new, "scheduler": schedule}
    as_built = {name: state.as_built(thing) for name, thing in tracked.items()}
    state.restore(tracked, {}, captured, "here")
    assert new.param_groups[0]["lr"] == pytest.approx(0.1)
    said = state.apply_override(as_built, tracked)
    group = new.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (
        pytest.approx(0.05),
        0.5,
        0.05,
    )
    assert any("lr: 0.1" in line and "0.05" in line for line in said)
    assert schedule.last_epoch == 3 and schedule.base_lrs == [0.5]
    new.step()
    schedule.step()
    assert new.param_groups[0]["lr"] == pytest.approx(0.005), (
        "the next milestone comes when it is due"
    )


# --- a checkpoint without the harness -------------------------------------------------------------

TUTORIAL = """
import sys
sys.modules["harness"] = None
import torch
from torch import nn
path = sys.argv[1]
model = nn.Sequential(
    nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

checkpoint = torch.load(path, weights_only=True)
model.load_state_dict(checkpoint["model_state_dict"])
optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
epoch, loss = checkpoint["epoch"], checkpoint["loss"]

assert epoch == 2 and 0 < loss < 10, (epoch, loss)
assert optimizer.state[model[0].weight]["step"] == 12
try:
    import harness
except ImportError:
    print("restored", round(float(model[0].weight.sum()), 4))
"""


def test_the_tutorials_four_lines_read_a_checkpoint_without_the_harness(tmp_path, uninterrupted):
    (file,) = uninterrupted.glob("checkpoints/step_00000012-*.pt")
    ended = run([sys.executable, "-I", "-c", TUTORIAL, str(file)], cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [
        "restored",
        str(round(float(newest(uninterrupted)["model_state_dict"]["0.weight"].sum()), 4)),
    ]


def test_a_checkpoint_holds_what_the_documentation_says(uninterrupted):
    payload = newest(uninterrupted)
    listed = [
        line.split()[0]
        for line in (state.__doc__ or "").splitlines()
        if line[:4] == "    " and line[4:5].strip()
    ]
    names = {name.strip(",") for line in listed for name in line.split()} - {"N_state_dict"}
    assert names <= payload.keys()
    assert len(payload["rng"]) == 1 and payload["data"] | {"fingerprint": ""} == {
        "fingerprint": "",
        "size": 60,
        "global_batch_size": 10,
        "shuffle": True,
        "drop_last": True,
        "seed": 3,
        "epoch": 2,
        "sample": 0,
        "iterators": [None],
    }


# --- several ranks --------------------------------------------------------------------------------

TWO_RANKS = '''
import json, random, sys, torch, harness, numpy as np
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

class Stream(torch.utils.data.IterableDataset):
    """Another length on each rank."""
    def __init__(self, size): self.size, self.at = size, 0
    def __iter__(self):
        while self.at < self.size:
            self.at += 1
            yield torch.full((3,), float(self.at - 1))
        self.at = 0
    def state_dict(self): return {"at": self.at}
    def load_state_dict(self, state): self.at = state["at"]

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1))

out = {}
run = harness.init(sys.argv[1] + "/weights", seed=1, timeout_s=100)
plain = build().double()
model = DistributedDataParallel(build().double())
x = torch.randn(17, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
y = torch.randn(17, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
run.track(model=model)
gradients = []
seen = []
for batches in run.batches(
    torch.utils.data.TensorDataset(x, y, torch.arange(17)),
    8,
    accumulate=2,
    drop_last=False,
    epochs=1,
):
    model.zero_grad()
    for at, ((a, b, n), weight) in enumerate(zip(batches, run.weights)):
        (F.mse_loss(model(a), b) * weight).backward()
        seen += [n.tolist()] if weight else []
    gradients.append([p.grad.clone() for p in model.parameters()])
used = run.world.gather(seen)
order = torch.randperm(
    17, generator=torch.Generator().manual_seed(harness.data.plan.seed_of(1, "order", 0))
)
worst = 0.0
for step, batch in enumerate(order.split(8)):
    expected = torch.autograd.grad(F.mse_loss(plain(x[batch]), y[batch]), list(plain.parameters()))
    worst = max([worst] + [float((g - e).abs().max()) for g, e in zip(gradients[step], expected)])
out["gradient_error"] = worst
out["used"] = sorted(n for part in used for micro in part for n in micro)
out["draws"] = run.world.gather([torch.rand(1).item(), random.random(), float(np.random.rand())])

run = harness.init(sys.argv[1] + "/evaluate", seed=1, timeout_s=100)
model = DistributedDataParallel(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)))
run.track(model=model)
dataset = [torch.full((12,), float(at)) for at in range(5)]
calls, buffers = [], []
def measure(batch):
    model(batch)
    calls.append(batch[:, 0].tolist())
    buffers.append(model.module[1].running_mean.tolist())
    return {"val_loss": batch[:, 0].sum(), "one": len(batch)} | (
        {"only": 5.0} if run.rank == 1 else {}
    )
for _ in run.batches(dataset, 4, epochs=1):
    model.module[1].running_mean.fill_(run.rank)
    out["of_one"] = run.evaluate(dataset[2:3], measure, batch_size=1)
    calls.clear()
    out["metrics"] = run.evaluate(dataset, measure, batch_size=1)
    out["buffers"] = run.world.gather([buffers[-1], model.module[1].running_mean.tolist()])
out["calls"] = run.world.gather(calls)

for name, leave_at in (("whole", 99), ("left", 3), ("left", 99)):
    run = harness.init(sys.argv[1] + "/" + name, seed=1, save_every_steps=1, timeout_s=100)
    run.track(model=nn.Linear(3, 1))
    found = []
    for batch in run.batches(Stream(9 if run.rank else 13), 4, epochs=2):
        found.append(batch[:, 0].tolist())
        if run.step == leave_at:
            break
    out.setdefault("streams", []).append(run.world.gather(found))
if run.is_writer:
    print("OUT" + json.dumps(out))
'''


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    """What a program of two ranks found out; one start serves several tests."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(TWO_RANKS)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = run(
        [*launcher, "program.py", str(folder)],
        cwd=folder,
        env={"PYTHONPATH": ENVIRONMENT["PYTHONPATH"]},
        limit_s=240,
    )
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("OUT")]
    return json.loads(line.removeprefix("OUT"))


def test_two_ranks_make_the_gradient_of_the_global_batch(two_ranks):
    assert two_ranks["gradient_error"] < 1e-12
    assert two_ranks["used"] == list(range(17))


def test_each_rank_has_randomness_of_its_own(two_ranks):
    one, other = two_ranks["draws"]
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_two_ranks_evaluate_each_sample_once_and_need_not_do_so_in_step(two_ranks):
    assert two_ranks["calls"] == [[[0], [1]], [[2], [3], [4]]]
    assert two_ranks["metrics"] == {"val_loss": 2.0, "one": 1.0, "only": 3.0}
    assert two_ranks["of_one"] == {"val_loss": 2.0, "one": 1.0, "only": 5.0}, (
        "a rank without a sample takes part"
    )


def test_all_ranks_evaluate_with_the_buffers_of_the_writer_and_have_their_own_again(two_ranks):
    assert two_ranks["buffers"] == [[[0.0] * 8, [0.0] * 8], [[0.0] * 8, [1.0] * 8]]


def test_a_pass_of_streams_ends_on_all_ranks_together_and_goes_on_exactly(two_ranks):
    whole, left, rest = two_ranks["streams"]
    assert [len(found) for found in whole] == [8, 8], (
        "four shares a pass, as many as the shorter stream has"
    )
    for rank in range(2):
        assert left[rank] == whole[rank][:3] and rest[rank] == whole[rank][2:]


def test_the_loop_of_the_documentation_is_the_loop_of_the_library():
    parameters = inspect.signature(harness.Run.batches).parameters
    assert list(parameters)[1:3] == ["dataset", "global_batch_size"]
    assert {
        "accumulate",
        "epochs",
        "max_steps",
        "shuffle",
        "drop_last",
        "collate_fn",
        "num_workers",
        "order",
    } <= parameters.keys()
    assert {"remote", "seed", "save_every_s"} <= inspect.signature(harness.init).parameters.keys()


LOGGING = """
import harness, torch
run = harness.init("run", save_every_s=None, log_every_steps=1)
run.track(model=torch.nn.Linear(1, 1))
for _ in run.batches(list(range(30)), global_batch_size=6, epochs=1):
    values = {
        2: {"more": 1} if run.rank else {},
        3: {f"n{n}": n + run.rank for n in range(20)},
        4: {"nan": float("nan")},
    }
    run.log(loss=torch.tensor(0.1) * (run.rank + 1), **values.get(run.step, {}))
run.world.leave()
"""


@pytest.mark.slow
def test_what_ranks_log_is_averaged_whether_they_name_the_same_or_not(tmp_path):
    (tmp_path / "logging_.py").write_text(LOGGING)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        "logging_.py",
    ]
    done = run(command, cwd=tmp_path, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    first, second, third, fourth, _ = events(tmp_path / "run", "step")
    tenths = [float(torch.tensor(0.1) * rank) for rank in (1, 2, 3)]
    assert first["loss"] == second["loss"] == third["loss"] == fourth["loss"] == sum(tenths) / 3
    assert "more" not in second and [third[f"n{n}"] for n in range(20)] == [
        n + 1.0 for n in range(20)
    ]
    assert fourth["nan"] != fourth["nan"]
