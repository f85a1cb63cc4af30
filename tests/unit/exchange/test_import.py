"""What other people's scripts have saved becomes the beginning of a run: bit for bit, said before
it is done, or refused in words."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recipe_task
import recipes
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import alone, run
from conftest import harness as program
from recipe_runs import (
    BOMB_BYTES,
    PAIR,
    TASK,
    Command,
    bounded,
    differing,
    manifest,
    newest,
    put,
    refused,
    row,
    train_on,
)  # fmt: skip
from recipes import (
    BATCH,
    RECIPES,
    SAVES,
    SIZE,
    STEPS_PER_EPOCH,
    Net,
    Trained,
    TrainedPair,
    made,
    points,
    save_new,
    save_old,
)
from s3_server import S3Server
from there import there

import harness
from harness import state
from harness.checkpoint.catalog import read_catalog
from harness.data.plan import Plan
from harness.errors import UsageError
from harness.store import LocalStore

pytestmark = pytest.mark.usefixtures("process_as_it_was")
KEEPS_ALL = [
    pytest.param(name, format, id=f"{name}, {format}")
    for name in RECIPES
    for format in SAVES
    if format == "zip" or RECIPES[name].has_old_format
]
FEW = ("tutorial general checkpoint", "imagenet")  # that are gone on from even in a hurry


def extra_of(recipe: recipes.Recipe) -> list[str]:
    """What has to be said beside the file: where the script itself did not keep how far it was."""
    where = [] if recipe.epoch or recipe.step else ["--epoch", "2"]
    return where + (["init.rename={'^model\\.': ''}"] if recipe.in_any_prefix else [])


def check_imported(directory: Path, recipe: recipes.Recipe, done: Trained) -> None:
    """The run's only checkpoint is what the script had, bit for bit."""
    payload, found = newest(directory), read_catalog(LocalStore(directory))
    assert [m.step for m in found.manifests] == [done.step]
    assert differing(payload["model_state_dict"], dict(done.model.state_dict())) == []
    if recipe.optimizer:
        assert differing(payload["optimizer_state_dict"], done.optimizer.state_dict()) == []
    else:
        assert payload["optimizer_state_dict"]["state"] == {}
    own = payload["scheduler_state_dict"]
    assert (
        differing(own, done.scheduler.state_dict()) == []
        if recipe.scheduler
        else own["last_epoch"] == done.step
    )
    assert (payload["epoch"], payload["step"], there(found.head).epoch) == (
        done.epoch,
        done.step,
        done.epoch,
    )
    assert (payload["data"]["epoch"], payload["data"]["sample"]) == (done.epoch, 0)
    assert there(found.head).loss == (done.loss.item() if recipe.loss else None)


# What is recognised


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param(
            *case.values,
            marks=[] if case.values[1] == "zip" or case.values[0] in FEW else pytest.mark.slow,
        )
        for case in KEEPS_ALL
    ],
)
def test_a_file_becomes_a_run_bit_for_bit(
    name: str, format: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    recipe = RECIPES[name]
    file = made(name, tmp_path, done, SAVES[format])
    before = file.read_bytes()
    answer = command("import", file, tmp_path / "run", *TASK, *extra_of(recipe))
    assert answer.code == 0, answer.out + answer.err
    check_imported(tmp_path / "run", recipe, done)
    for key, where in (
        (recipe.model, "model"),
        (recipe.optimizer, "optimizer"),
        (recipe.scheduler, "scheduler"),
    ):
        if key:
            assert row(answer.out, key.split(".")[0], where), answer.out
    if recipe.prefix and not recipe.in_any_prefix:
        assert recipe.prefix in answer.out or all(
            f"{part}." in answer.out for part in recipe.prefix.strip(".").split(".")
        ), answer.out
    if not recipe.optimizer:
        assert row(answer.out + answer.err, "optimizer", "anew"), answer.out + answer.err
    assert file.read_bytes() == before and not (tmp_path / file.name / "x").exists()


@pytest.mark.parametrize(
    ("name", "format"),
    [
        pytest.param(
            *case.values,
            marks=[] if case.values[0] in FEW and case.values[1] == "zip" else pytest.mark.slow,
        )
        for case in KEEPS_ALL
    ],
)
def test_a_run_goes_on_from_it_and_comes_out_again(
    name: str, format: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    """Whatever came in: trained for another epoch, and out again as something that plain PyTorch
    loads."""
    recipe, out = RECIPES[name], tmp_path / "out"
    out.mkdir()
    directory, settings = tmp_path / "run", [*TASK, *(s for s in extra_of(recipe) if "=" in s)]
    assert (
        command(
            "import", made(name, tmp_path, done, SAVES[format]), directory, *TASK, *extra_of(recipe)
        ).code
        == 0
    )
    train_on(directory, "train.epochs=3", task=tuple(settings))
    payload = newest(directory)
    assert payload["step"] == 3 * STEPS_PER_EPOCH and payload["epoch"] == 3
    assert math.isfinite(payload["loss"])
    moved = differing(payload["model_state_dict"], dict(done.model.state_dict()))
    assert len(moved) == len(payload["model_state_dict"]), "some of the model was not trained"

    for format_ in ("weights", "full", "safetensors"):
        answer = command("export", directory, out / format_, "--format", format_)
        assert answer.code == 0, answer.out + answer.err
    weights, full = (
        torch.load(out / "weights", weights_only=True),
        torch.load(out / "full", weights_only=True),
    )
    packed = safetensors.torch.load_file(out / "safetensors")
    for found in (weights, full["model_state_dict"], packed):
        assert differing(dict(found), dict(payload["model_state_dict"])) == []
    assert full["epoch"] == 3 and full["loss"] == payload["loss"]
    model = Net()
    model.load_state_dict(full["model_state_dict"])
    optimizer = recipes.make_optimizer("sgd", model.parameters())
    optimizer.load_state_dict(full["optimizer_state_dict"])
    assert differing(optimizer.state_dict(), payload["optimizer_state_dict"]) == []


@pytest.mark.slow
def test_a_run_goes_on_from_it_by_launch_and_torchrun(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    for name, ranks in (("torchvision", 1), ("imagenet", 2)):
        directory = tmp_path / name
        assert command("import", made(name, tmp_path, done), directory, *TASK).code == 0
        shown = run(
            program(
                "launch",
                "--nproc-per-node",
                str(ranks),
                *TASK,
                f"run.dir={directory}",
                "train.epochs=3",
            )
        )
        assert shown.returncode == 0, shown.stdout + shown.stderr
        assert "resumes from step 20" in shown.stdout and manifest(directory).step == 30
        assert command("status", directory).code == 0
        assert command("verify", directory).code == 0
        assert command("ls", directory).code == 0


def continued_by_hand(
    kind: str, file: Path, steps: range
) -> tuple[Net, torch.optim.Optimizer, Any]:
    """As the tutorial says: build, load, go on. The samples are those that the harness uses in
    these steps."""
    model = Net()
    optimizer = recipes.make_optimizer(kind, model.parameters())
    scheduler = recipes.make_scheduler(optimizer)
    checkpoint = torch.load(file, weights_only=True)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    scheduler.load_state_dict(checkpoint["lr_scheduler"])
    model.train()
    data, plan = recipes.points(), Plan(SIZE, BATCH, 1, 0, 1, seed=1)
    for step in steps:
        epoch, within = divmod(step, STEPS_PER_EPOCH)
        samples = plan.samples(epoch)[within * BATCH : (within + 1) * BATCH]
        x, y = data[torch.tensor(samples)]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    return model, optimizer, scheduler


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_it_goes_on_as_plain_pytorch_would(
    kind: str, tmp_path: Path, done: Trained, adamw: Trained, command: Command
) -> None:
    """One process, no dropout: the same operations in the same order, so the same bits; momentum,
    schedule and BatchNorm included."""
    source = done if kind == "sgd" else adamw
    file, directory, task = (
        made("torchvision", tmp_path, source),
        tmp_path / "run",
        (*TASK, f"task.args.optimizer={kind}"),
    )
    assert command("import", file, directory, *task).code == 0
    train_on(directory, "train.max_steps=35", "train.epochs=9", task=task)
    model, optimizer, scheduler = continued_by_hand(kind, file, range(20, 35))
    payload = newest(directory)
    assert payload["step"] == 35
    assert differing(dict(payload["model_state_dict"]), dict(model.state_dict())) == []
    assert differing(payload["optimizer_state_dict"], optimizer.state_dict()) == []
    assert differing(payload["scheduler_state_dict"], scheduler.state_dict()) == []


def test_a_file_without_a_schedule_goes_on_at_its_place_in_the_tasks_schedule(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    file, directory = made("tutorial general checkpoint", tmp_path, done), tmp_path / "run"
    answer = command("import", file, directory, *TASK)
    assert row(answer.out + answer.err, "scheduler", "20"), answer.out + answer.err
    train_on(directory, "train.epochs=3")
    rate = newest(directory)["optimizer_state_dict"]["param_groups"][0]["lr"]
    assert rate == pytest.approx(recipes.LR * 0.9 ** (30 // 7))


def test_averages_begin_with_the_imported_weights(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    directory, task = tmp_path / "run", (*TASK, "train.ema_decay=0.9")
    answer = command("import", made("tutorial weights", tmp_path, done), directory, *task)
    assert answer.code == 0 and "averag" in (answer.out + answer.err).lower(), (
        answer.out + answer.err
    )
    assert (
        differing(newest(directory)["ema_state_dict"], newest(directory)["model_state_dict"]) == []
    )
    train_on(directory, "train.max_steps=3", task=task)
    assert newest(directory)["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "key", ["model_ema", "state_dict_ema", pytest.param("ema", marks=pytest.mark.slow)]
)
def test_averages_in_the_file_are_taken_for_the_averages(
    key: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    """timm, torchvision's references and others keep them beside the model; torch's AveragedModel
    counts how often it averaged."""
    other = recipes.trained(seed=5, epochs=1)
    averaged = torch.optim.swa_utils.AveragedModel(other.model)
    for number, saved in enumerate((dict(other.model.state_dict()), averaged.state_dict())):
        name = "state_dict" if key.startswith("state") else "model"
        torch.save({name: done.model.state_dict(), key: saved, "epoch": 2}, tmp_path / "a.pt")
        plain, with_averages = tmp_path / f"plain{number}", tmp_path / f"averages{number}"
        assert command("import", tmp_path / "a.pt", plain, *TASK).code == 0
        answer = command("import", tmp_path / "a.pt", with_averages, *TASK, "train.ema_decay=0.9")
        assert answer.code == 0, answer.err
        for directory in (plain, with_averages):
            assert (
                differing(
                    dict(newest(directory)["model_state_dict"]), dict(done.model.state_dict())
                )
                == []
            )
        assert (
            differing(dict(newest(with_averages)["ema_state_dict"]), dict(other.model.state_dict()))
            == []
        )


def test_the_gradient_scaler_is_taken_too(tmp_path: Path, done: Trained, command: Command) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    content = {
        "model": done.model.state_dict(),
        "optimizer": done.optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "epoch": 2,
    }
    torch.save(content, tmp_path / "a.pt")
    task = (*TASK, "train.precision=fp16")
    answer = command("import", tmp_path / "a.pt", tmp_path / "run", *task)
    assert answer.code == 0 and row(answer.out, "scaler"), answer.out + answer.err
    assert newest(tmp_path / "run")["scaler_state_dict"]["scale"] == 4096.0
    # A task in full precision has no use for it.
    assert command("import", tmp_path / "a.pt", tmp_path / "without", *TASK).code == 0


def test_several_optimizers_of_lightning_go_where_they_are_sent(
    tmp_path: Path, pair: TrainedPair, command: Command
) -> None:
    content = {
        "state_dict": pair.first.state_dict(),
        "other_state_dict": pair.second.state_dict(),
        "optimizer_states": [pair.first_optimizer.state_dict(), pair.second_optimizer.state_dict()],
        "epoch": 1,
        "global_step": 20,
    }
    torch.save(content, tmp_path / "a.ckpt")
    sent = [
        "generator=state_dict",
        "discriminator=other_state_dict",
        "optimizer_g=optimizer_states[0]",
        "optimizer_d=optimizer_states[1]",
    ]
    answer = command(
        "import",
        tmp_path / "a.ckpt",
        tmp_path / "run",
        *PAIR,
        *(word for part in sent for word in ("--as", part)),
    )
    assert answer.code == 0, answer.err
    payload = newest(tmp_path / "run")
    assert differing(payload["optimizer_g_state_dict"], pair.first_optimizer.state_dict()) == []
    assert differing(payload["optimizer_d_state_dict"], pair.second_optimizer.state_dict()) == []
    sent[2:] = ["optimizer_g=optimizer_states[1]", "optimizer_d=optimizer_states[0]"]
    answer = command(
        "import",
        tmp_path / "a.ckpt",
        tmp_path / "no",
        *PAIR,
        *(word for part in sent for word in ("--as", part)),
    )
    refused(answer, tmp_path / "no")  # the shapes tell that they were exchanged


@pytest.mark.slow
def test_optimizers_of_older_versions_of_pytorch_are_taken(
    tmp_path: Path, adamw: Trained, done: Trained, command: Command
) -> None:
    """Before 1.12 Adam counted its steps in plain numbers, and none of the newer options was
    there."""
    for kind, source in (("adamw", adamw), ("sgd", done)):
        old = dict(source.optimizer.state_dict())
        newer = {
            "foreach",
            "maximize",
            "capturable",
            "differentiable",
            "fused",
            "decoupled_weight_decay",
        }
        old["param_groups"] = [
            {key: value for key, value in group.items() if key not in newer}
            for group in old["param_groups"]
        ]
        old["state"] = {
            number: {key: int(value) if key == "step" else value for key, value in state.items()}
            for number, state in old["state"].items()
        }
        save_old(
            {"model": source.model.state_dict(), "optimizer": old, "epoch": 2},
            tmp_path / f"{kind}.pt",
        )
        task = (*TASK, f"task.args.optimizer={kind}")
        answer = command("import", tmp_path / f"{kind}.pt", tmp_path / kind, *task)
        assert answer.code == 0, answer.err
        train_on(tmp_path / kind, "train.max_steps=22", task=task)
        state = newest(tmp_path / kind)["optimizer_state_dict"]["state"][0]
        assert "step" not in state or float(state["step"]) == 22


def test_an_optimizer_that_knows_the_names_of_its_parameters_is_taken(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    """Since 2.6 an optimizer may be given named_parameters(), and keeps the names."""
    named = recipes.make_optimizer("sgd", done.model.named_parameters())
    named.load_state_dict(done.optimizer.state_dict())
    assert "param_names" in named.state_dict()["param_groups"][0]
    torch.save(
        {"model": done.model.state_dict(), "optimizer": named.state_dict(), "epoch": 2},
        tmp_path / "a.pt",
    )
    answer = command("import", tmp_path / "a.pt", tmp_path / "run", *TASK)
    assert answer.code == 0, answer.err
    assert (
        differing(
            newest(tmp_path / "run")["optimizer_state_dict"]["state"],
            done.optimizer.state_dict()["state"],
        )
        == []
    )
    train_on(tmp_path / "run", "train.max_steps=21")


def test_a_schedule_of_another_kind_is_not_taken_for_the_tasks_own(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    """`load_state_dict` of a schedule takes anything: it would go on with the other one's numbers
    and say nothing."""
    optimizer = recipes.make_optimizer("sgd", done.model.parameters())
    for number, schedule in enumerate(
        (
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100),
            torch.optim.lr_scheduler.StepLR(optimizer, 500, 0.1),
        )
    ):
        content = {
            "model": done.model.state_dict(),
            "lr_scheduler": schedule.state_dict() | {"last_epoch": 20},
            "epoch": 2,
        }
        torch.save(content, tmp_path / "a.pt")
        answer = command("import", tmp_path / "a.pt", tmp_path / f"run{number}", *TASK)
        if answer.code:
            refused(answer, tmp_path / f"run{number}")
            assert "scheduler" in answer.err
            continue
        assert row(answer.out + answer.err, "scheduler"), answer.out
        own = newest(tmp_path / f"run{number}")["scheduler_state_dict"]
        assert own["last_epoch"] == 20 and "T_max" not in own


def test_weights_of_another_precision_are_cast(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in done.model.state_dict().items()
    }
    torch.save({"model": half, "epoch": 2}, tmp_path / "a.pt")
    assert command("import", tmp_path / "a.pt", tmp_path / "run", *TASK).code == 0
    expected = {
        key: value.float() if value.is_floating_point() else value for key, value in half.items()
    }
    assert differing(dict(newest(tmp_path / "run")["model_state_dict"]), expected) == []


def test_what_lies_deeper_in_a_file_is_found_or_refused_in_words(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    content = {
        "checkpoint": {"model": done.model.state_dict(), "optimizer": done.optimizer.state_dict()},
        "epoch": 2,
    }
    torch.save(content, tmp_path / "a.pt")
    for number, sent in enumerate(((), ("--as", "model=checkpoint.model"))):
        answer = command("import", tmp_path / "a.pt", tmp_path / f"run{number}", *TASK, *sent)
        if answer.code:
            refused(answer, tmp_path / f"run{number}")
            assert "checkpoint" in answer.err
        else:
            assert (
                differing(
                    dict(newest(tmp_path / f"run{number}")["model_state_dict"]),
                    dict(done.model.state_dict()),
                )
                == []
            )


def test_tensors_that_were_on_a_gpu_come_to_the_cpu(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    for format, save in SAVES.items():
        file = made("tutorial general checkpoint", tmp_path, done, save)
        recipes.as_saved_on_gpu(file, tmp_path / f"gpu-{format}.pt")
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(tmp_path / f"gpu-{format}.pt", weights_only=True)
        answer = command("import", tmp_path / f"gpu-{format}.pt", tmp_path / format, *TASK)
        assert answer.code == 0, answer.err
        check_imported(tmp_path / format, RECIPES["tutorial general checkpoint"], done)


def test_a_file_that_somebody_has_zipped_again_is_read(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    recipes.honest_but_packed(done.model.state_dict(), tmp_path / "packed.pth")
    answer = command("import", tmp_path / "packed.pth", tmp_path / "run", *TASK, "--epoch", 2)
    assert answer.code == 0, answer.err
    check_imported(tmp_path / "run", RECIPES["tutorial weights"], done)


def test_what_is_in_a_file_counts_not_what_it_is_called(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    for name, called in (
        ("hugging face safetensors", "a.pt"),
        ("tutorial weights", "b.safetensors"),
        ("tutorial weights", "model"),
        ("hugging face safetensors", "pytorch_model.bin"),
        ("torchscript", "c.ckpt"),
    ):
        made(name, tmp_path, done).rename(tmp_path / called)
        answer = command(
            "import", tmp_path / called, tmp_path / f"run-{called}", *TASK, "--epoch", 2
        )
        assert answer.code == 0, answer.err
        check_imported(tmp_path / f"run-{called}", RECIPES[name], done)


def test_a_file_may_lie_behind_a_link_or_have_an_odd_name(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    made("tutorial weights", tmp_path, done).rename(tmp_path / "my best model (final=2) ä.pth")
    (tmp_path / "latest").symlink_to(tmp_path / "my best model (final=2) ä.pth")
    for number, file in enumerate(
        ("my best model (final=2) ä.pth", "./my best model (final=2) ä.pth", tmp_path / "latest")
    ):
        answer = command("import", file, f"run {number}", *TASK, "--epoch", 2)
        assert answer.code == 0, answer.err
        check_imported(tmp_path / f"run {number}", RECIPES["tutorial weights"], done)


def test_it_is_a_run_like_any_other(tmp_path: Path, done: Trained, command: Command) -> None:
    directory = tmp_path / "run"
    assert command("import", made("torchvision", tmp_path, done), directory, *TASK).code == 0
    assert command("verify", directory).code == 0
    assert command("status", directory).code == 75, "to be continued"
    shown = command("show", directory)
    assert shown.code == 0 and "model_state_dict.head.weight" in shown.out
    listed = json.loads(command("ls", directory, "--json").out)["checkpoints"]
    assert [entry["step"] for entry in listed] == ["20"]
    assert command("import", directory, tmp_path / "fork").code == 0
    assert command("diff", directory, tmp_path / "fork").code == 0
    torch.load(next((directory / "checkpoints").glob("*.pt")), weights_only=True)


# What can be said beside the file


@pytest.mark.slow
def test_epoch_and_step_can_be_given(tmp_path: Path, done: Trained, command: Command) -> None:
    file = made("tutorial general checkpoint", tmp_path, done)
    for name, options, epoch, step, sample in (
        ("epoch", ("--epoch", 5), 5, 50, 0),
        ("step", ("--step", 34), 3, 34, 4 * BATCH),
        ("both", ("--epoch", 1, "--step", 1000), 1, 1000, 0),
        ("zero", ("--epoch", 0), 0, 0, 0),
    ):
        answer = command("import", file, tmp_path / name, *TASK, *options)
        assert answer.code == 0, answer.err
        payload = newest(tmp_path / name)
        found = (
            payload["epoch"],
            payload["step"],
            payload["data"]["epoch"],
            payload["data"]["sample"],
        )
        # A step alone, beside a file that names an epoch: which of the two says where the data
        # stands is open.
        if name != "step":
            assert found == (epoch, step, epoch, sample), name
        assert payload["step"] == step
        train_on(tmp_path / name, f"train.max_steps={step + 2}", "train.epochs=200")
        assert newest(tmp_path / name)["step"] == step + 2


@pytest.mark.parametrize(
    ("counts", "options", "words"),
    [
        ({"epoch": 1, "global_step": 15}, (), ("5 of 10 steps into epoch 1", "--epoch 2")),
        ({"epoch": 0, "global_step": 15}, (), ("5 of 10 steps into epoch 1", "goes on with 1")),
        ({"global_step": 15}, (), ("5 of 10 steps into epoch 1", "another number of steps")),
        ({}, ("--step", 15), ("5 of 10 steps into epoch 1",)),
        ({"epoch": 4, "global_step": 20}, (), ("not after 4 epoch(s)", "--epoch 2")),
        ({"epoch": 2, "global_step": 20}, (), ()),
        ({"epoch": 1, "global_step": 20}, (), ("goes on with 2",)),
        ({"epoch": 1, "global_step": 15}, ("--epoch", 1), ()),
        ({"epoch": 2}, (), ()),
    ],
)
def test_a_file_that_was_saved_in_mid_epoch_says_so(
    counts: dict[str, int],
    options: tuple[Any, ...],
    words: tuple[str, ...],
    tmp_path: Path,
    done: Trained,
    command: Command,
) -> None:
    file = tmp_path / "a.pt"
    torch.save({"state_dict": done.model.state_dict(), **counts}, file)
    answer = command("import", file, tmp_path / "run", *TASK, *options, "--dry-run")
    assert answer.code == 0, answer.err
    assert all(word in answer.out for word in words), answer.out
    is_said = "steps into" in answer.out or "not after" in answer.out
    assert is_said == any("steps into" in word or "not after" in word for word in words)


@pytest.mark.parametrize(
    "options", [("--epoch", "-1"), ("--step", "-5"), ("--epoch", "two"), ("--step", "1.5")]
)
def test_a_wrong_epoch_or_step_is_refused(
    options: tuple[str, str], tmp_path: Path, done: Trained, command: Command
) -> None:
    file = made("tutorial weights", tmp_path, done)
    answer = command("import", file, tmp_path / "run", *TASK, *options)
    assert answer.code == 78 and options[0].strip("-") in answer.err, answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "key",
    ["epoch", *(pytest.param(key, marks=pytest.mark.slow) for key in ("global_step", "loss"))],
)
def test_odd_numbers_in_a_file_are_refused_or_taken_in_a_sensible_way(
    key: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    """Whatever stands under the word: never a traceback, and never a run that begins nowhere."""
    odd = [
        math.nan,
        math.inf,
        -1,
        2.7,
        10**30,
        True,
        "2",
        None,
        torch.tensor([2, 3]),
        torch.tensor(2),
        torch.tensor(2.0),
        [2],
        {"n": 2},
    ]
    for number, value in enumerate(odd):
        torch.save({"model": done.model.state_dict(), key: value}, tmp_path / "a.pt")
        answer = command("import", tmp_path / "a.pt", tmp_path / f"run{number}", *TASK)
        if answer.code:
            refused(answer, tmp_path / f"run{number}")
        else:
            payload = newest(tmp_path / f"run{number}")
            assert 0 <= payload["step"] < 10**9 and 0 <= payload["epoch"] < 10**9, value
            assert command("show", tmp_path / f"run{number}").code == 0
        assert (
            command(
                "import",
                tmp_path / "a.pt",
                tmp_path / f"said{number}",
                *TASK,
                "--epoch",
                1,
                "--step",
                10,
            ).code
            == 0
        ), value
    assert newest(tmp_path / "said0")["step"] == 10


def test_a_file_that_does_not_say_how_far_it_was_begins_at_zero(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    for name in ("tutorial weights", "model_state and optim_state", "hugging face safetensors"):
        directory = tmp_path / name
        assert command("import", made(name, tmp_path, done), directory, *TASK).code == 0
        payload = newest(directory)
        assert (
            payload["epoch"],
            payload["step"],
            payload["data"]["epoch"],
            payload["data"]["sample"],
        ) == (0, 0, 0, 0)
        assert differing(dict(payload["model_state_dict"]), dict(done.model.state_dict())) == []
        train_on(directory, "train.max_steps=2")
        assert newest(directory)["step"] == 2


def test_dry_run_shows_the_table_and_writes_nothing(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    file = made("imagenet", tmp_path, done)
    dry = command("import", file, tmp_path / "run", *TASK, "--dry-run")
    assert dry.code == 0 and sorted(os.listdir(tmp_path)) == [file.name]
    assert (
        row(dry.out, "state_dict", "model") and row(dry.out, "optimizer") and "module." in dry.out
    )
    wet = command("import", file, tmp_path / "run", *TASK)
    assert wet.code == 0
    table = [line for line in dry.out.splitlines() if "state_dict" in line or "optimizer" in line]
    assert table and all(line in wet.out for line in table), (
        "the table is not the same when it counts"
    )
    refused(
        command("import", file, tmp_path / "other", *TASK, "task.args.width=8", "--dry-run"),
        tmp_path / "other",
    )


def test_parts_are_left_out_when_that_is_said(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    file = made("imagenet", tmp_path, done)
    answer = command(
        "import", file, tmp_path / "run", *TASK, "--without", "optimizer", "--without", "scheduler"
    )
    assert answer.code == 0, answer.err
    payload = newest(tmp_path / "run")
    assert (
        payload["optimizer_state_dict"]["state"] == {}
        and payload["scheduler_state_dict"]["last_epoch"] == 20
    )
    assert differing(dict(payload["model_state_dict"]), dict(done.model.state_dict())) == []
    nothing = command("import", file, tmp_path / "none", *TASK, "--without", "optimiser")
    refused(nothing, tmp_path / "none")
    assert "optimiser" in nothing.err


def test_a_module_is_left_out_too_and_averages_are_taken_by_the_name_that_is_said(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    other = recipes.trained(seed=6, epochs=1)
    torch.save(
        {"model": done.model.state_dict(), "polyak": other.model.state_dict(), "epoch": 2},
        tmp_path / "a.pt",
    )
    answer = command("import", tmp_path / "a.pt", tmp_path / "none", *TASK, "--without", "model")
    assert answer.code == 0, answer.err
    assert "model: not taken from the file" in " ".join(answer.out.split())
    assert (
        len(
            differing(
                dict(newest(tmp_path / "none")["model_state_dict"]), dict(done.model.state_dict())
            )
        )
        > 3
    )
    averaged = (*TASK, "train.ema_decay=0.9", "--as", "model=model")
    answer = command("import", tmp_path / "a.pt", tmp_path / "run", *averaged, "--as", "ema=polyak")
    assert answer.code == 0, answer.err
    assert (
        differing(dict(newest(tmp_path / "run")["ema_state_dict"]), dict(other.model.state_dict()))
        == []
    )
    refused(
        command("import", tmp_path / "a.pt", tmp_path / "no", *averaged, "--as", "ema=nowhere"),
        tmp_path / "no",
    )


def test_settings_may_come_from_a_file(tmp_path: Path, done: Trained, command: Command) -> None:
    (tmp_path / "a.yaml").write_text(
        "task: {name: 'recipe_task:build', args: {optimizer: sgd}}\n"
        "train: {global_batch_size: 24}\n"
    )
    file = made("imagenet", tmp_path, done)
    answer = command(
        "import",
        file,
        tmp_path / "run",
        "--config",
        tmp_path / "a.yaml",
        "checkpoint.best=val_loss:min",
    )
    assert answer.code == 0, answer.err
    check_imported(tmp_path / "run", RECIPES["imagenet"], done)


def test_several_models_go_where_their_names_say(
    tmp_path: Path, pair: TrainedPair, command: Command
) -> None:
    recipes.tutorial_several_models(pair, tmp_path / "both.tar")
    task = (
        *PAIR,
        "task.args.modules='modelA,modelB'",
        "task.args.optimizers='optimizerA,optimizerB'",
    )
    answer = command("import", tmp_path / "both.tar", tmp_path / "run", *task, "--epoch", 1)
    assert answer.code == 0, answer.err
    payload = newest(tmp_path / "run")
    assert differing(dict(payload["modelA_state_dict"]), dict(pair.first.state_dict())) == []
    assert differing(dict(payload["modelB_state_dict"]), dict(pair.second.state_dict())) == []
    assert differing(payload["optimizerA_state_dict"], pair.first_optimizer.state_dict()) == []
    assert differing(payload["optimizerB_state_dict"], pair.second_optimizer.state_dict()) == []
    train_on(tmp_path / "run", "train.epochs=2", task=task)
    out = tmp_path / "out.pt"
    assert command("export", tmp_path / "run", out, "--format", "full").code == 0
    full = torch.load(out, weights_only=True)
    assert {
        "modelA_state_dict",
        "modelB_state_dict",
        "optimizerA_state_dict",
        "optimizerB_state_dict",
        "epoch",
        "loss",
    } <= set(full)
    model = recipes.pair_modules()[0]
    model.load_state_dict(full["modelA_state_dict"])


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_parts_of_a_gan_go_where_they_are_sent(
    save: recipes.Save, tmp_path: Path, pair: TrainedPair, command: Command
) -> None:
    recipes.gan(pair, tmp_path / "gan.pth", save)
    sent = [
        "--as",
        "generator=netG",
        "--as",
        "discriminator=netD",
        "--as",
        "optimizer_g=optG",
        "--as",
        "optimizer_d=optD",
    ]
    answer = command("import", tmp_path / "gan.pth", tmp_path / "run", *PAIR, *sent)
    assert answer.code == 0, answer.err
    for part, key in (
        ("generator", "netG"),
        ("discriminator", "netD"),
        ("optimizer_g", "optG"),
        ("optimizer_d", "optD"),
    ):
        assert row(answer.out, key, part), answer.out
    payload = newest(tmp_path / "run")
    assert differing(dict(payload["generator_state_dict"]), dict(pair.first.state_dict())) == []
    assert (
        differing(dict(payload["discriminator_state_dict"]), dict(pair.second.state_dict())) == []
    )
    assert differing(payload["optimizer_d_state_dict"], pair.second_optimizer.state_dict()) == []
    assert differing(payload["optimizer_g_state_dict"], pair.first_optimizer.state_dict()) == []
    assert payload["epoch"] == 1


def test_one_of_several_modules_is_taken_for_a_task_with_one(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    """A teacher and a student in one file: which is meant has to be said, and the choice is
    shown."""
    other = recipes.trained(seed=8, epochs=1)
    torch.save(
        {"teacher": done.model.state_dict(), "student": other.model.state_dict()},
        tmp_path / "two.pt",
    )
    answer = command("import", tmp_path / "two.pt", tmp_path / "run", *TASK)
    refused(answer, tmp_path / "run")
    assert "teacher" in answer.err and "student" in answer.err and "--as" in answer.err, answer.err
    for key, model in (("teacher", done.model), ("student", other.model)):
        answer = command(
            "import", tmp_path / "two.pt", tmp_path / key, *TASK, "--as", f"model={key}"
        )
        assert answer.code == 0, answer.err
        assert (
            differing(dict(newest(tmp_path / key)["model_state_dict"]), dict(model.state_dict()))
            == []
        )


@pytest.mark.parametrize(
    "keys", [("model_state_dict", "model_weights"), ("state_dict", "net"), ("network", "params")]
)
def test_of_two_parts_that_may_be_the_model_none_is_taken_unasked(
    keys: tuple[str, str], tmp_path: Path, done: Trained, command: Command
) -> None:
    """The current weights and the best ones, say: only whoever wrote the file knows."""
    other = recipes.trained(seed=8, epochs=1)
    states = [dict(each.model.state_dict()) for each in (done, other)]
    file = tmp_path / "two.pt"
    torch.save(dict(zip(keys, states, strict=True)), file)
    answer = command("import", file, tmp_path / "run", *TASK)
    refused(answer, tmp_path / "run", (78,))
    assert all(key in answer.err for key in keys) and "--as model=" in answer.err, answer.err
    with pytest.raises(UsageError, match=rf"{keys[0]}, {keys[1]}"):
        harness.load_weights(Net(), file)
    with pytest.raises(UsageError, match=rf"{keys[0]}, {keys[1]}"):
        harness.load_model(file, into=Net())
    refused(command("export", file, tmp_path / "x", "--format", "safetensors"), tmp_path / "x")
    assert command("diff", file, file, "--weights").code == 0
    for key, weights in zip(keys, states, strict=True):
        named = command("import", file, tmp_path / key, *TASK, "--as", f"model={key}")
        assert named.code == 0, named.err
        assert differing(dict(newest(tmp_path / key)["model_state_dict"]), weights) == []
        model = Net()
        harness.load_weights(model, file, part=key)
        assert differing(dict(model.state_dict()), weights) == []
        loaded = harness.load_model(file, into=Net(), module=key)
        assert differing(dict(loaded.state_dict()), weights) == []
        out = tmp_path / f"{key}.out"
        made = command("export", file, out, "--format", "safetensors", "--module", key)
        assert made.code == 0, made.err
        assert differing(safetensors.torch.load_file(out), weights) == []
        module = tmp_path / f"{key}.module"
        made = command("export", file, module, "--format", "module", "--module", key, *TASK[:1])
        assert made.code == 0, made.err
        held = torch.load(module, weights_only=False).state_dict()
        assert differing(dict(held), weights) == []


def test_the_part_with_exactly_the_name_is_taken_and_the_other_is_named(
    tmp_path: Path, done: Trained
) -> None:
    other = recipes.trained(seed=8, epochs=1)
    file, model = tmp_path / "two.pt", Net()
    torch.save({"net": other.model.state_dict(), "model": done.model.state_dict()}, file)
    assert "taken by its key 'model', and not net" in harness.load_weights(model, file)
    assert differing(dict(model.state_dict()), dict(done.model.state_dict())) == []


def test_of_two_optimizers_averages_or_counts_none_is_taken_unasked(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    whole = {"model": done.model.state_dict(), "epoch": 2}
    state = done.optimizer.state_dict()
    for name, more, words in (
        ("optimizers", {"optim": state, "opt_state": state}, ("optim", "opt_state", "--as")),
        (
            "counts",
            {"iteration": 20, "num_updates": 5},
            ("iteration 20", "num_updates 5", "--step"),
        ),
    ):
        torch.save(whole | more, tmp_path / f"{name}.pt")
        answer = command("import", tmp_path / f"{name}.pt", tmp_path / name, *TASK)
        refused(answer, tmp_path / name, (78,))
        assert all(word in answer.err for word in words), answer.err
    weights = done.model.state_dict()
    torch.save(whole | {"ema": weights, "model_ema": weights}, tmp_path / "a.pt")
    refused(command("export", tmp_path / "a.pt", tmp_path / "x", "--ema"), tmp_path / "x", (78,))
    assert command("export", tmp_path / "a.pt", tmp_path / "x").code == 0


@pytest.mark.parametrize("sent", ["model=nowhere", "nothing=netG", "model", "=netG", "model="])
def test_a_part_that_is_sent_wrongly_is_refused(
    sent: str, tmp_path: Path, pair: TrainedPair, command: Command
) -> None:
    recipes.gan(pair, tmp_path / "gan.pth")
    answer = command("import", tmp_path / "gan.pth", tmp_path / "run", *TASK, "--as", sent)
    refused(answer, tmp_path / "run")


def test_names_are_changed_and_what_does_not_fit_left_out_when_that_is_said(
    tmp_path: Path, command: Command
) -> None:
    """Fine-tuning: another head, and a backbone that was called encoder; the rest of the task
    begins as it was built."""
    source = recipes.trained(classes=7)
    weights = {
        key.replace("backbone.", "encoder."): value
        for key, value in source.model.state_dict().items()
    }
    torch.save({"state_dict": weights, "epoch": 2}, tmp_path / "a.pt")
    rename, loose = "init.rename={'^encoder\\.': 'backbone.'}", "init.strict=false"
    for number, settings in enumerate(
        [(), (rename,), (loose, "init.rename={'^nothing': 'backbone.'}")]
    ):
        refused(
            command("import", tmp_path / "a.pt", tmp_path / f"no{number}", *TASK, *settings),
            tmp_path / f"no{number}",
        )
    answer = command("import", tmp_path / "a.pt", tmp_path / "run", *TASK, rename, loose)
    assert answer.code == 0, answer.err
    assert row(answer.out + answer.err, "head.weight"), "what was left out is not said"
    model = newest(tmp_path / "run")["model_state_dict"]
    for key, value in source.model.state_dict().items():
        if key.startswith("backbone."):
            assert differing(model[key], value) == [], key
    assert model["head.weight"].shape == (recipes.CLASSES, 16)


def test_the_library_does_the_same_and_leaves_the_generators_alone(
    tmp_path: Path, done: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    file, before = made("imagenet", tmp_path, done), state.rng_state()
    harness.import_checkpoint(file, tmp_path / "run", settings=TASK)
    check_imported(tmp_path / "run", RECIPES["imagenet"], done)
    harness.import_checkpoint(
        str(file),
        str(tmp_path / "other"),
        settings=list(TASK),
        without=("optimizer", "scheduler"),
        epoch=1,
        step=7,
    )
    assert manifest(tmp_path / "other").step == 7
    assert differing(state.rng_state(), before) == []
    with pytest.raises(UsageError) as caught:
        harness.import_checkpoint(file, tmp_path / "third", settings=(*TASK, "task.args.width=8"))
    assert "head.weight" in str(caught.value) and not (tmp_path / "third").exists()
    with pytest.raises(UsageError):
        harness.import_checkpoint(file, tmp_path / "run", settings=TASK)
    assert differing(state.rng_state(), before) == []


@pytest.mark.parametrize(
    "name",
    [
        "imagenet",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("hugging face safetensors", "torchscript")
        ),
    ],
)
def test_files_and_runs_may_be_in_a_bucket(
    name: str,
    tmp_path: Path,
    done: Trained,
    command: Command,
    bucket: tuple[S3Server, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, place = bucket
    server.lend(monkeypatch)
    file = made(name, tmp_path, done)
    url = put(server, place, file)
    answer = command(
        "import", url, tmp_path / "run", *TASK, *([] if RECIPES[name].epoch else ["--epoch", 2])
    )
    assert answer.code == 0, answer.err
    check_imported(tmp_path / "run", RECIPES[name], done)
    answer = command("import", url, f"s3://{place}/run", *TASK, "--epoch", 2)
    assert answer.code == 0, answer.err
    assert command("diff", f"s3://{place}/run", tmp_path / "run").code == 0
    assert command("verify", f"s3://{place}/run").code == 0
    again = command("import", url, f"s3://{place}/run", *TASK)
    assert again.code == 78 and "run" in again.err
    missing = command("import", f"s3://{place}/zoo/none.pt", f"s3://{place}/none", *TASK)
    assert missing.code in (1, 74, 78) and missing.err.startswith("harness: error:"), missing.err
    wrong = command("import", url, f"s3://{place}/wrong", *TASK, "task.args.width=8")
    assert wrong.code == 78
    keys = [item["Key"] for item in server.client().list_objects_v2(Bucket=place)["Contents"]]
    assert not any(key.startswith(("none", "wrong")) for key in keys), keys


def test_a_fork_is_as_before_and_takes_no_settings(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    assert command("import", made("imagenet", tmp_path, done), tmp_path / "run", *TASK).code == 0
    file = next((tmp_path / "run/checkpoints").glob("*.pt"))
    for number, source in enumerate((tmp_path / "run", file)):
        assert command("import", source, tmp_path / f"fork{number}").code == 0
        answer = command("import", source, tmp_path / f"no{number}", "train.seed=4")
        refused(answer, tmp_path / f"no{number}")
        assert "train.seed" in answer.err or "setting" in answer.err or "key=value" in answer.err
    # Out of its run: no manifest any more, but still a file with state dicts in it.
    shutil.copy(file, tmp_path / "copied.pt")
    answer = command("import", tmp_path / "copied.pt", tmp_path / "again", *TASK)
    assert answer.code == 0, answer.err
    assert (
        differing(
            newest(tmp_path / "again")["model_state_dict"],
            newest(tmp_path / "run")["model_state_dict"],
        )
        == []
    )
    assert newest(tmp_path / "again")["step"] == 20


# What is refused


def test_the_state_of_another_kind_of_optimizer_is_refused(
    tmp_path: Path, done: Trained, adamw: Trained, command: Command
) -> None:
    for source, own, names in ((done, "adamw", ("SGD", "AdamW")), (adamw, "sgd", ("Adam", "SGD"))):
        file, directory = (
            made("tutorial general checkpoint", tmp_path, source),
            tmp_path / f"run-{own}",
        )
        answer = command("import", file, directory, *TASK, f"task.args.optimizer={own}")
        refused(answer, directory, (78,))
        assert all(name in answer.err for name in names) and "--without optimizer" in answer.err, (
            answer.err
        )
        answer = command(
            "import", file, directory, *TASK, f"task.args.optimizer={own}", "--without", "optimizer"
        )
        assert answer.code == 0, answer.err
        assert newest(directory)["optimizer_state_dict"]["state"] == {}
        train_on(directory, "train.max_steps=22", task=(*TASK, f"task.args.optimizer={own}"))


def test_adams_state_does_not_make_an_adam_of_an_adamw(
    tmp_path: Path, adamw: Trained, command: Command
) -> None:
    """They keep the same things; what differs is one setting, which comes with the state."""
    adam = torch.optim.Adam(adamw.model.parameters(), lr=0.005, weight_decay=0.01)
    state = adamw.optimizer.state_dict()
    state["param_groups"] = [
        {**group, "params": group["params"]} for group in state["param_groups"]
    ]
    for group in state["param_groups"]:
        group["decoupled_weight_decay"] = adam.param_groups[0]["decoupled_weight_decay"]
    assert state["param_groups"][0]["decoupled_weight_decay"] is False
    torch.save(
        {"model": adamw.model.state_dict(), "optimizer": state, "epoch": 2}, tmp_path / "a.pt"
    )
    answer = command(
        "import", tmp_path / "a.pt", tmp_path / "run", *TASK, "task.args.optimizer=adamw"
    )
    if answer.code:
        refused(answer, tmp_path / "run", (78,))
    else:
        assert (
            newest(tmp_path / "run")["optimizer_state_dict"]["param_groups"][0][
                "decoupled_weight_decay"
            ]
            is True
        )


TWINS = ("task.name=recipe_task:build_twins", *TASK[1:])


def twins_file(
    file: Path, order: str, kind: str = "AdamW", *, groups: bool = False, **more: Any
) -> Any:
    """What a script has saved after three steps of a model of two equal layers.

    Returns the optimizer's state for each parameter, by the parameter's name."""
    torch.manual_seed(3)
    task = recipe_task.build_twins(order, "", kind, more, groups)
    model, optimizer = task.modules, task.optimizers
    for _ in range(3):
        optimizer.zero_grad()
        recipe_task.loss(model, points()[:24]).backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return {name: optimizer.state[p] for name, p in model.named_parameters() if optimizer.state[p]}


def moments_of(directory: Path, names: list[str]) -> dict[str, Any]:
    """The optimizer's state in a new run, by the parameters' names in the optimizer's order."""
    held = newest(directory)["optimizer_state_dict"]
    numbers = held["param_groups"][0]["params"]
    return {
        name: held["state"][number]
        for name, number in zip(names, numbers, strict=True)
        if number in held["state"]
    }


AB = ["first.weight", "first.bias", "second.weight", "second.bias"]
BA = AB[2:] + AB[:2]


@pytest.mark.parametrize("names", ["", "param_names", "params"])
def test_what_an_optimizer_keeps_goes_to_the_parameter_that_it_was_of(
    names: str, tmp_path: Path, command: Command
) -> None:
    """Another order of definition, and the same shapes: nothing but names can tell."""
    file = tmp_path / "a.pt"
    wanted = twins_file(file, "second,first")
    content = torch.load(file)
    (group,) = content["optimizer"]["param_groups"]
    if names:
        group[names] = [f"module.{name}" for name in BA]
    if names == "params":
        content["optimizer"]["state"] = {
            f"module.{BA[number]}": kept for number, kept in content["optimizer"]["state"].items()
        }
    torch.save(content, file)
    answer = command("import", file, tmp_path / "run", *TWINS)
    assert answer.code == 0, answer.err
    assert differing(moments_of(tmp_path / "run", AB), wanted) == []
    assert "optimizer: its parameters are matched" in answer.out
    train_on(tmp_path / "run", "train.max_steps=5", task=TWINS)


def test_names_are_matched_after_they_are_changed(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "a.pt"
    wanted = twins_file(file, "second,first")
    content = torch.load(file)
    content["model"] = {f"net.{name}": value for name, value in content["model"].items()}
    torch.save(content, file)
    rename = r"init.rename={'^net\.': ''}"
    answer = command("import", file, tmp_path / "run", *TWINS, rename)
    assert answer.code == 0, answer.err
    assert differing(moments_of(tmp_path / "run", AB), wanted) == []


def test_an_order_that_cannot_be_told_is_refused(tmp_path: Path, command: Command) -> None:
    file = tmp_path / "a.pt"
    twins_file(file, "first,second")
    task = (*TWINS, "task.args.given='second,first'")
    answer = command("import", file, tmp_path / "run", *task)
    refused(answer, tmp_path / "run", (78,))
    assert "--without optimizer" in answer.err and "cannot be told" in answer.err
    # With names it can.
    content = torch.load(file)
    content["optimizer"]["param_groups"][0]["param_names"] = AB
    torch.save(content, file)
    assert command("import", file, tmp_path / "run", *task).code == 0


def test_groups_of_other_parameters_are_refused(tmp_path: Path, command: Command) -> None:
    """As large as the task's, with the same names in all: their settings would be exchanged."""
    file = tmp_path / "a.pt"
    twins_file(file, "first,second", groups=True)
    content = torch.load(file)
    for group, names in zip(content["optimizer"]["param_groups"], (AB[2:], AB[:2]), strict=True):
        group["param_names"] = names
    torch.save(content, file)
    answer = command("import", file, tmp_path / "run", *TWINS, "task.args.groups=true")
    refused(answer, tmp_path / "run", (78,))
    assert "in other groups" in answer.err


def test_state_of_another_rank_than_its_parameter_is_refused(
    tmp_path: Path, command: Command
) -> None:
    file = tmp_path / "a.pt"
    twins_file(file, "first,second")
    content = torch.load(file)
    kept = content["optimizer"]["state"]
    kept[0], kept[1] = kept[1], kept[0]
    torch.save(content, file)
    answer = command("import", file, tmp_path / "run", *TWINS)
    refused(answer, tmp_path / "run", (78,))
    assert "of another shape: parameter(s) 0, 1" in answer.err


KINDS = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SGD", "RMSprop", "Adagrad", "Adadelta")


@pytest.mark.parametrize("kind", [*KINDS, "ASGD", "Rprop", "Adafactor"])
def test_an_optimizer_takes_the_state_of_its_own_kind_only(
    kind: str, tmp_path: Path, command: Command
) -> None:
    file = tmp_path / "a.pt"
    wanted = twins_file(file, "first,second", kind=kind)
    others = ("Adam", "Adamax", "NAdam", "RAdam") if kind in KINDS[:5] else ("Adamax",)
    for other in dict.fromkeys((kind, *others)):
        directory, task = tmp_path / other, (*TWINS, f"task.args.kind={other}")
        answer = command("import", file, directory, *task)
        if other != kind and {kind, other} != {"Adam", "AdamW"}:
            refused(answer, directory, (78,))
            assert "another kind" in answer.err and "--without optimizer" in answer.err
        elif other == kind:
            assert answer.code == 0, answer.err
            assert differing(moments_of(directory, AB), wanted) == []


def test_settings_of_an_optimizer_that_the_file_changes_are_named(
    tmp_path: Path, command: Command
) -> None:
    file = tmp_path / "a.pt"
    twins_file(file, "first,second", betas=(0.8, 0.95))
    answer = command("import", file, tmp_path / "run", *TWINS, "task.args.more={weight_decay: 0.3}")
    assert answer.code == 0, answer.err
    said = "optimizer: as in the file: betas (0.9, 0.999) -> (0.8, 0.95), weight_decay 0.3 -> 0.01"
    assert said in answer.out, answer.out
    same = command("import", file, tmp_path / "same", *TWINS, "task.args.more={betas: [0.8, 0.95]}")
    assert same.code == 0 and "as in the file" not in same.out, same.out


def test_an_optimizer_of_other_parameters_is_refused(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    """The head's parameters only, as where the backbone was frozen; and two groups where the task
    has one."""
    few = recipes.make_optimizer("sgd", done.model.head.parameters())
    groups = recipes.make_optimizer(
        "sgd",
        [{"params": done.model.backbone.parameters()}, {"params": done.model.head.parameters()}],
    )
    for name, optimizer in (("few", few), ("groups", groups)):
        torch.save(
            {"model": done.model.state_dict(), "optimizer": optimizer.state_dict()},
            tmp_path / f"{name}.pt",
        )
        answer = command("import", tmp_path / f"{name}.pt", tmp_path / name, *TASK)
        refused(answer, tmp_path / name, (78,))
        assert "optimizer" in answer.err
    # As many parameters, of other shapes: load_state_dict itself would not notice.
    wide = recipes.trained(width=32)
    torch.save(
        {"model": done.model.state_dict(), "optimizer": wide.optimizer.state_dict()},
        tmp_path / "wide.pt",
    )
    answer = command("import", tmp_path / "wide.pt", tmp_path / "wide", *TASK)
    refused(answer, tmp_path / "wide", (78,))
    assert "optimizer" in answer.err


@pytest.mark.parametrize(
    "name", ["tutorial weights", "imagenet", "hugging face safetensors", "torchscript"]
)
def test_another_architecture_is_refused_with_a_table(
    name: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    file = made(name, tmp_path, done)
    answer = command("import", file, tmp_path / "wide", *TASK, "task.args.width=20")
    refused(answer, tmp_path / "wide", (78,))
    assert row(answer.err, "head.weight", "4x20", "4x16"), answer.err
    # The default task.
    answer = command("import", file, tmp_path / "digits", "train.global_batch_size=24")
    refused(answer, tmp_path / "digits", (78,))
    for kind, key in (("missing", "0.weight"), ("unexpected", "backbone.0.weight")):
        assert row(answer.err, kind, key), answer.err


def test_a_file_that_fits_nothing_is_refused_even_if_not_strict(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    torch.save(
        {f"x.{key}": value for key, value in done.model.state_dict().items()}, tmp_path / "a.pt"
    )
    answer = command("import", tmp_path / "a.pt", tmp_path / "run", *TASK, "init.strict=false")
    refused(answer, tmp_path / "run", (78,))


UNSAFE: dict[str, tuple[Callable[[Trained, Path, recipes.Save], None], str]] = {
    "entire model": (recipes.entire_model, "recipes.Net"),
    "lightning with namespace": (recipes.lightning_with_namespace, "argparse.Namespace"),
}


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
@pytest.mark.parametrize("name", UNSAFE)
def test_what_needs_pickle_is_refused_unless_trusted(
    name: str, save: recipes.Save, tmp_path: Path, done: Trained, command: Command
) -> None:
    write, wanted = UNSAFE[name]
    write(done, tmp_path / "a.ckpt", save)
    extra = ["init.rename={'^model\\.': ''}"] if "lightning" in name else ["--epoch", "2"]
    answer = command("import", tmp_path / "a.ckpt", tmp_path / "run", *TASK, *extra)
    refused(answer, tmp_path / "run", (78,))
    assert wanted in answer.err and "--trust" in answer.err, answer.err
    answer = command("import", tmp_path / "a.ckpt", tmp_path / "run", *TASK, *extra, "--trust")
    assert answer.code == 0, answer.err
    assert "warning" in (answer.out + answer.err).lower(), answer.out + answer.err
    check_imported(
        tmp_path / "run", RECIPES["lightning" if "lightning" in name else "tutorial weights"], done
    )
    # What came in is plain now.
    torch.load(next((tmp_path / "run/checkpoints").glob("*.pt")), weights_only=True)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_pickle_that_acts_is_not_run_unless_trusted(
    save: recipes.Save, tmp_path: Path, done: Trained, command: Command
) -> None:
    sprung = tmp_path / "sprung"
    recipes.trap(done, tmp_path / "trap.pth", sprung, save)
    for line in (
        ("import", tmp_path / "trap.pth", tmp_path / "run", *TASK),
        ("import", tmp_path / "trap.pth", tmp_path / "run", *TASK, "--dry-run"),
    ):
        answer = command(*line)
        refused(answer, tmp_path / "run", (78,))
        assert "mkdir" in answer.err and "--trust" in answer.err, answer.err
        assert not sprung.exists(), "it was executed"
    answer = command("import", tmp_path / "trap.pth", tmp_path / "run", *TASK, "--trust")
    assert answer.code == 0, answer.err
    assert sprung.is_dir() and "warning" in (answer.out + answer.err).lower()


# What a pickle may call, in the hope that it is thought harmless: names with dots, helpers that
# import, helpers that load.
CALLS: list[tuple[str, str, Callable[[Path], tuple[Any, ...]]]] = [
    ("os", "mkdir", lambda sprung: (str(sprung),)),
    ("posix", "mkdir", lambda sprung: (str(sprung),)),
    ("os", "system", lambda sprung: (f"mkdir {sprung}",)),
    ("builtins", "exec", lambda sprung: (f"import os; os.mkdir({str(sprung)!r})",)),
    ("__builtin__", "eval", lambda sprung: (f"__import__('os').mkdir({str(sprung)!r})",)),
    ("torch", "os.mkdir", lambda sprung: (str(sprung),)),
    ("torch", "serialization.os.mkdir", lambda sprung: (str(sprung),)),
    ("torch.serialization", "os.mkdir", lambda sprung: (str(sprung),)),
    ("torch._utils", "sys.modules", lambda sprung: ()),
    ("torch._utils", "_import_dotted_name", lambda sprung: ("os.mkdir",)),
    ("torch.hub", "load_state_dict_from_url", lambda sprung: ("file:///etc/passwd", str(sprung))),
    ("torch", "FloatStorage.from_file", lambda sprung: (str(sprung), True, 10)),
    ("torch", "from_file", lambda sprung: (str(sprung), True, 10)),
    ("torch.storage", "UntypedStorage.from_file", lambda sprung: (str(sprung), True, 10)),
    (
        "torch.storage",
        "_load_from_bytes",
        lambda sprung: (
            b"\x80\x02cos\nmkdir\nX"
            + len(str(sprung)).to_bytes(4, "little")
            + str(sprung).encode()
            + b"\x85R.",
        ),
    ),
    ("collections", "OrderedDict.fromkeys", lambda sprung: ((str(sprung),),)),
    ("pathlib", "Path.mkdir", lambda sprung: (str(sprung),)),
    ("shutil", "copytree", lambda sprung: (str(Path(__file__).parent), str(sprung))),
    ("runpy", "run_path", lambda sprung: (str(sprung),)),
    ("harness.cli", "main", lambda sprung: (["import", str(sprung), str(sprung)],)),
]


@pytest.mark.parametrize("protocol", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_nothing_that_a_pickle_calls_is_called(
    protocol: int, tmp_path: Path, command: Command
) -> None:
    for module, name, arguments in CALLS:
        sprung = tmp_path / "sprung"
        recipes.call_pickle(tmp_path / "a.pt", module, name, arguments(sprung), protocol)
        file = tmp_path / "a.pt"
        for line in (
            ("import", file, tmp_path / "run", *TASK),
            ("show", file),
            ("diff", file, file),
        ):
            answer = command(*line)
            assert not sprung.exists(), f"{module}.{name} was called by {line[0]}"
            assert not (tmp_path / "run").exists() and "Traceback" not in answer.err
            if line[0] != "show":
                refused(answer, tmp_path / "run")
    recipes.call_pickle(tmp_path / "a.pt", "os", "mkdir", (str(sprung),), protocol)
    torch.load(tmp_path / "a.pt", weights_only=False)
    assert sprung.is_dir(), "the trap is none"


def test_torchscript_that_acts_is_not_run_unless_trusted(tmp_path: Path, command: Command) -> None:
    """It is no pickle of Python's, but code in the file all the same, which PyTorch's loader
    runs."""
    recipes.torch_script_trap(tmp_path / "a.pt", tmp_path / "sprung")
    for line in (
        ("show", tmp_path / "a.pt"),
        ("diff", tmp_path / "a.pt", tmp_path / "a.pt"),
        ("import", tmp_path / "a.pt", tmp_path / "run", *TASK),
        ("export", tmp_path / "a.pt", tmp_path / "out.pt"),
    ):
        answer = command(*line)
        assert not (tmp_path / "sprung").exists(), f"it was run by {line[0]}"
        assert "Traceback" not in answer.err
        if answer.code:
            refused(answer, tmp_path / "run")
    torch.jit.load(tmp_path / "a.pt")
    assert (tmp_path / "sprung").exists(), "the trap is none"


def test_all_classes_that_a_file_wants_are_named(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    import argparse
    import fractions

    content = {
        "model": done.model.state_dict(),
        "args": argparse.Namespace(lr=fractions.Fraction(1, 3)),
        "net": done.model,
    }
    torch.save(content, tmp_path / "a.pt")
    answer = command("import", tmp_path / "a.pt", tmp_path / "run", *TASK)
    refused(answer, tmp_path / "run", (78,))
    assert all(
        name in answer.err for name in ("argparse.Namespace", "fractions.Fraction", "recipes.Net")
    ), answer.err


def test_numbers_of_numpy_are_refused_or_read_but_never_with_a_traceback(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    """`best_acc = np.mean(…)`: the commonest reason for a file that the safe loader refuses."""
    import numpy as np

    torch.save(
        {"model": done.model.state_dict(), "best_acc": np.mean([1.0, 2.0]), "epoch": np.int64(2)},
        tmp_path / "a.pt",
    )
    answer = command("import", tmp_path / "a.pt", tmp_path / "run", *TASK)
    if answer.code:
        refused(answer, tmp_path / "run", (78,))
        assert "numpy" in answer.err and "--trust" in answer.err, answer.err
        assert command("import", tmp_path / "a.pt", tmp_path / "run", *TASK, "--trust").code == 0
    assert manifest(tmp_path / "run").step == 20


@pytest.mark.parametrize(
    "kind", ["meta", "sparse", "sparse csr", "quantized", "not finite", "number for a tensor"]
)
def test_odd_tensors_in_a_file_are_refused_in_words(
    kind: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather that nobody quantizes any more
        odd: dict[str, Any] = {
            "meta": torch.zeros(4, 16, device="meta"),
            "sparse": torch.ones(4, 16).to_sparse(),
            "sparse csr": torch.ones(4, 16).to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(torch.zeros(4, 16), 0.1, 0, torch.qint8),
            "not finite": torch.full((4, 16), math.nan),
            "number for a tensor": 3.0,
        }
    torch.save({"model": {**done.model.state_dict(), "head.weight": odd[kind]}}, tmp_path / "a.pt")
    answer = command("import", tmp_path / "a.pt", tmp_path / "run", *TASK)
    if answer.code or kind != "sparse":
        refused(answer, tmp_path / "run")
    else:
        assert (
            newest(tmp_path / "run")["model_state_dict"]["head.weight"].tolist() == [[1.0] * 16] * 4
        )


def test_a_run_is_not_imported_over(tmp_path: Path, done: Trained, command: Command) -> None:
    file, directory = made("imagenet", tmp_path, done), tmp_path / "run"
    assert command("import", file, directory, *TASK).code == 0
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    answer = command("import", file, directory, *TASK)
    refused(answer, None, (78,))
    assert str(directory) in answer.err and "run" in answer.err
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    (tmp_path / "taken").write_text("a file")
    refused(command("import", file, tmp_path / "taken", *TASK), None, (1, 74, 78))
    assert (tmp_path / "taken").read_text() == "a file"


def folder_with_a_file(done: Trained, path: Path) -> None:
    path.mkdir()
    recipes.tutorial_weights(done, path / "model.pth", save_new)


NO_CHECKPOINTS: dict[str, Callable[[Trained, Path], object]] = {
    "missing": lambda done, path: None,
    "empty": lambda done, path: path.write_bytes(b""),
    "one byte": lambda done, path: path.write_bytes(b"\x80"),
    "zeros": lambda done, path: path.write_bytes(bytes(100_000)),
    "noise": lambda done, path: path.write_bytes(random.Random(1).randbytes(50_000)),
    "text": lambda done, path: path.write_text("epoch 1 loss 0.5\nepoch 2 loss 0.4\n"),
    "json": lambda done, path: path.write_text(json.dumps({"epoch": 2, "model": [1, 2]})),
    "web page": lambda done, path: recipes.web_page(path),
    "git-lfs pointer": lambda done, path: recipes.lfs_pointer(path),
    "real tar": recipes.real_tar,
    "list of parameters": recipes.parameters_without_names,
    "one tensor": lambda done, path: torch.save(done.model.head.weight, path),
    "number": lambda done, path: torch.save(3, path),
    "empty dict": lambda done, path: torch.save({}, path),
    "no tensors": lambda done, path: torch.save(
        {"epoch": 2, "state_dict": {}, "note": "x" * 10_000}, path
    ),
    "optimizer only": lambda done, path: torch.save(done.optimizer.state_dict(), path),
    "bare pickle": recipes.bare_pickle,
    "other zip": lambda done, path: zipfile.ZipFile(path, "w").write(
        recipes.__file__, "recipes.py"
    ),
    "folder": lambda done, path: path.mkdir(),
    "folder with a file": folder_with_a_file,
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_refused_in_words(
    kind: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    file = tmp_path / "file.tar"
    NO_CHECKPOINTS[kind](done, file)
    answer = command("import", file, tmp_path / "run", *TASK)
    refused(answer, tmp_path / "run")
    assert file.name in answer.err
    words = {
        "missing": "there is n",
        "empty": "empty",
        "list of parameters": "name",
        "real tar": "tar",
        "web page": "web page",
    }
    assert words.get(kind, "") in answer.err.lower(), answer.err


@pytest.mark.slow
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    answer = run(
        program("import", str(tmp_path / "pipe.pt"), str(tmp_path / "run"), *TASK), limit_s=60
    )
    assert answer.returncode in (1, 78) and answer.stderr.startswith("harness: error:"), (
        answer.stderr
    )
    assert not (tmp_path / "run").exists()


def test_what_may_not_be_read_is_refused_in_words(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    file = made("tutorial weights", tmp_path, done)
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        copy = Path(shutil.copy(file, folder))
        for unreadable in (copy, Path(folder)):
            Path(folder).chmod(0o755)
            unreadable.chmod(0)
            os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())  # root may read everything
            try:
                answer = command("import", copy, tmp_path / "run", *TASK)
            finally:
                os.seteuid(os.getuid())
            refused(answer, tmp_path / "run", (1, 74, 78))
        Path(folder).chmod(0o755)


@pytest.mark.parametrize(
    "name",
    [
        "imagenet zip",
        "imagenet old",
        "hugging face safetensors zip",
        pytest.param("torchscript zip", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_was_cut_short_is_refused_wherever_it_ends(
    name: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    name, _, format = name.rpartition(" ")
    data = made(name, tmp_path, done, SAVES[format]).read_bytes()
    few = 8
    lengths = {
        *range(1, 12, 4),
        *(len(data) * part // few for part in range(1, few)),
        *(len(data) - less for less in (1, 2, 22, 64, 500)),
    }
    for length in sorted(length for length in lengths if 0 < length < len(data)):
        file = tmp_path / "cut.pt"
        file.write_bytes(data[:length])
        answer = command("import", file, tmp_path / "run", *TASK)
        refused(answer, tmp_path / "run")
        assert "cut.pt" in answer.err, f"{length} of {len(data)}: {answer.err}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["imagenet zip", "imagenet old", "hugging face safetensors zip"])
def test_a_file_with_a_wrong_byte_is_refused_or_read_but_never_with_a_traceback(
    name: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    """Formats without checksums cannot tell; what matters is that nothing falls over, and that a
    refusal leaves nothing behind."""
    name, _, format = name.rpartition(" ")
    data = made(name, tmp_path, done, SAVES[format]).read_bytes()
    for place, change in itertools.product(range(0, len(data), len(data) // 60), (0x01, 0xFF)):
        spoiled = bytearray(data)
        spoiled[place] ^= change
        (tmp_path / "spoiled.pt").write_bytes(spoiled)
        answer = command("import", tmp_path / "spoiled.pt", tmp_path / "run", *TASK)
        if answer.code:
            refused(answer, tmp_path / "run")
        else:
            shutil.rmtree(tmp_path / "run")


def test_a_zip_bomb_is_refused_without_taking_memory(
    bombs: dict[str, Path], tmp_path: Path, done: Trained, command: Command
) -> None:
    # What is imported late is not counted.
    command("import", made("imagenet", tmp_path, done), tmp_path / "warm", *TASK)
    for file in bombs.values():
        refused(bounded(command, "import", file, tmp_path / "run", *TASK), tmp_path / "run")


def test_a_zip_file_that_lies_about_its_sizes_takes_no_memory_either(
    bombs: dict[str, Path], tmp_path: Path, done: Trained, command: Command
) -> None:
    command("import", made("imagenet", tmp_path, done), tmp_path / "warm", *TASK)
    for name, claimed in (("pickle", 0), ("pickle", 400), ("storage", 400), ("storage", 2**31)):
        data = bombs[name].read_bytes()
        told = data.replace(BOMB_BYTES.to_bytes(4, "little"), claimed.to_bytes(4, "little"))
        assert told != data
        (tmp_path / "lie.pt").write_bytes(told)
        refused(
            bounded(command, "import", tmp_path / "lie.pt", tmp_path / "run", *TASK),
            tmp_path / "run",
        )


def nested(depth: int, width: int) -> Any:
    """Lists in lists, each holding the next one several times: small in a file, and endless for
    whoever walks through all of it."""
    inner: Any = [torch.zeros(1)]
    for _ in range(depth):
        inner = [inner] * width
    return inner


def of_itself() -> dict[str, Any]:
    circle: dict[str, Any] = {"epoch": 1}
    circle["state"] = circle
    return circle


WALKS: dict[str, Callable[[], Any]] = {
    "endless": lambda: nested(60, 2),
    "deep": lambda: nested(450, 1),
    "in a circle": of_itself,
}


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("safe", [True, False], ids=["safe", "unsafe"])
def test_a_structure_that_cannot_be_walked_through_is_survived(
    walk: str, safe: bool, tmp_path: Path, done: Trained
) -> None:
    """In a process of its own: it may not end otherwise."""
    content = {"model": done.model.state_dict(), "extra": WALKS[walk](), "epoch": 2}
    torch.save(content if safe else {**content, "path": tmp_path}, tmp_path / "a.pt")
    code = (
        "import sys\nfrom harness.cli import main\n"
        "file, run, *settings = sys.argv[1:]\n"
        "print('codes', [main(['show', file]), main(['diff', file, file]), "
        "main(['import', file, run, *settings])])"
    )
    shown = run([sys.executable, "-c", code, str(tmp_path / "a.pt"), str(tmp_path / "run"), *TASK])
    assert shown.returncode == 0 and "Traceback" not in shown.stderr, shown.stderr[-3000:]
    assert len(shown.stdout) < 1_000_000


@pytest.mark.parametrize("numel", [2**33, 2**50, 2**62])
def test_tensors_that_claim_more_than_the_file_has_are_refused(
    numel: int, tmp_path: Path, done: Trained, command: Command
) -> None:
    """The allocation alone would end the process, or the machine's patience."""
    command("import", made("imagenet", tmp_path, done), tmp_path / "warm", *TASK)
    for format, save in SAVES.items():
        save({"weight": torch.zeros(1000)}, tmp_path / f"{format}.pt")
        recipes.with_claim(tmp_path / f"{format}.pt", tmp_path / f"{format}-claim.pt", numel)
        refused(
            bounded(command, "import", tmp_path / f"{format}-claim.pt", tmp_path / "run", *TASK),
            tmp_path / "run",
        )
    recipes.with_old_count(tmp_path / "old.pt", tmp_path / "count.pt", numel)
    refused(
        bounded(command, "import", tmp_path / "count.pt", tmp_path / "run", *TASK), tmp_path / "run"
    )


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_a_tensor_that_repeats_one_number_without_end_takes_no_memory(
    save: recipes.Save, tmp_path: Path, done: Trained, command: Command
) -> None:
    """`expand` is saved as it is: a storage of one number, and a size of a trillion."""
    command("import", made("imagenet", tmp_path, done), tmp_path / "warm", *TASK)
    weights = dict(done.model.state_dict())
    save({**weights, "head.weight": torch.zeros(1, 1).expand(10**6, 10**6)}, tmp_path / "a.pt")
    refused(
        bounded(command, "import", tmp_path / "a.pt", tmp_path / "run", *TASK), tmp_path / "run"
    )
    save({**weights, "head.weight": torch.full((1, 1), 0.5).expand(4, 16)}, tmp_path / "fits.pt")
    assert command("import", tmp_path / "fits.pt", tmp_path / "run", *TASK).code == 0
    assert newest(tmp_path / "run")["model_state_dict"]["head.weight"].tolist() == [[0.5] * 16] * 4


def entry(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> bytes:
    return json.dumps(
        {"weight": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}
    ).encode()


SAFETENSORS: dict[str, tuple[bytes, bytes, int | None]] = {
    "length of 2^60": (entry(), bytes(16), 2**60),
    "length of 2^64 - 1": (entry(), bytes(16), 2**64 - 1),
    "length beyond the file": (entry(), bytes(16), 5000),
    "length of 0": (entry(), bytes(16), 0),
    "offsets beyond the file": (entry(offsets=(0, 4096), shape=(32, 32)), bytes(16), None),
    "offsets of 2^62": (entry(offsets=(0, 2**62), shape=(2**30, 2**30)), bytes(16), None),
    "shape too large for the offsets": (entry(shape=(100, 100)), bytes(16), None),
    "shape that overflows": (entry(shape=(2**32, 2**32, 2**32)), bytes(16), None),
    "shape too small for the offsets": (entry(shape=(1, 1)), bytes(16), None),
    "negative shape": (entry(shape=(-2, -2)), bytes(16), None),
    "offsets backwards": (entry(offsets=(16, 0)), bytes(16), None),
    "gap at the end": (entry(), bytes(64), None),
    "unknown dtype": (entry(dtype="F33"), bytes(16), None),
    "no json": (b"{" * 100, bytes(16), None),
    "deep json": (b'{"a":' * 20_000 + b"1" + b"}" * 20_000, bytes(16), None),
    "a list": (b"[1, 2, 3]", bytes(16), None),
    "no offsets": (b'{"weight": {"dtype": "F32"}}', bytes(16), None),
    "no text": (b"\xff\xfe" * 40, bytes(16), None),
    "no tensors": (b"{}", b"", None),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_with_a_bad_header_are_refused(
    kind: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    header, data, length = SAFETENSORS[kind]
    recipes.safetensors_with(tmp_path / "bad.safetensors", header, data, length)
    answer = bounded(command, "import", tmp_path / "bad.safetensors", tmp_path / "run", *TASK)
    refused(answer, tmp_path / "run")
    assert "bad.safetensors" in answer.err


def test_wrong_settings_are_listed_and_nothing_is_written(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    file = made("imagenet", tmp_path, done)
    answer = command(
        "import",
        file,
        tmp_path / "run",
        *TASK,
        "train.epochz=3",
        "init.rename={'(': 'x'}",
        "init.strict=perhaps",
    )
    refused(answer, tmp_path / "run", (78,))
    assert all(name in answer.err for name in ("train.epochz", "init.rename", "init.strict")), (
        answer.err
    )
    answer = command("import", file, tmp_path / "run", *TASK, "task.args.widht=4")
    refused(answer, tmp_path / "run", (78,))
    assert "widht" in answer.err
    answer = command("import", file, tmp_path / "run", "task.name=no_such_module:build")
    refused(answer, tmp_path / "run", (78,))
    answer = command("import", file, tmp_path / "run", *TASK, "train.global_batch_size=1000")
    refused(answer, tmp_path / "run", (78,))
    assert command("import").code == 78 and command("import", file).code == 78


@pytest.mark.slow
def test_it_is_killed_before_it_is_done_and_done_again(tmp_path: Path, done: Trained) -> None:
    """A checkpoint that was imported by halves does not exist; whoever imports again gets it, or a
    word about what is in the way."""
    file, directory = made("imagenet", tmp_path, done), tmp_path / "run"
    code = f"""
import os, signal, sys
from harness.store import LocalStore
from harness.cli import main
real, left = os.fsync, int(sys.argv[1])
def fsync(number):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(number)
os.fsync = fsync
sys.exit(main(["import", {str(file)!r}, {str(directory)!r}, *{TASK!r}]))
"""
    for left in (0, 1, 2, 3, 4, 6):
        shutil.rmtree(directory, ignore_errors=True)
        died = run([sys.executable, "-c", code, str(left)])
        assert died.returncode == -signal.SIGKILL, died.stdout + died.stderr
        assert read_catalog(LocalStore(directory)).manifests == [] or manifest(directory).step == 20
        again = run(program("import", str(file), str(directory), *TASK))
        if again.returncode:
            assert again.returncode == 78 and str(directory) in again.stderr, again.stderr
        else:
            check_imported(directory, RECIPES["imagenet"], done)


@pytest.mark.slow
def test_training_that_was_begun_elsewhere_is_stopped_and_goes_on_exactly(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    """An imported run is resumed as bit for bit as any other."""
    for name, stops in (("whole", ()), ("pieces", (23, 28, 41))):
        assert command("import", made("imagenet", tmp_path, done), tmp_path / name, *TASK).code == 0
        for last in (*stops, 60):
            shown = run(
                alone(
                    *TASK, f"run.dir={tmp_path / name}", "train.epochs=6", f"train.max_steps={last}"
                )
            )
            assert shown.returncode == 0, shown.stdout + shown.stderr
    whole, pieces = newest(tmp_path / "whole"), newest(tmp_path / "pieces")
    # Each end is evaluated, so the one in pieces had more chances of a best value.
    ended_differently = ("best", "config")
    assert [
        key
        for key in differing(whole, pieces)
        if not key.startswith(tuple(f".{name}" for name in ended_differently))
    ] == []


def test_old_and_new_formats_give_the_same_run(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    for name, save in (("zip", save_new), ("old", save_old)):
        assert (
            command("import", made("imagenet", tmp_path, done, save), tmp_path / name, *TASK).code
            == 0
        )
    assert command("diff", tmp_path / "zip", tmp_path / "old").code == 0


def test_what_it_says_is_words_for_people(tmp_path: Path, done: Trained, command: Command) -> None:
    answer = command("import", made("imagenet", tmp_path, done), tmp_path / "run", *TASK)
    assert answer.err == "" or not re.search(r"Warning|Traceback|site-packages", answer.err), (
        answer.err
    )
    assert "launch" in answer.out, "how to go on is not said"
