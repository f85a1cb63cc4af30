"""`init.from`: a run begins at step 0 with somebody's weights, once, on all ranks alike; what does
not fit is said, and nothing else of the file counts."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recipes
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import alone, events, kill_tree, run, start, torchrun, wait_until
from conftest import harness as program
from library_runs import Versioned
from recipe_runs import (
    PAIR,
    TASK,
    Command,
    differing,
    manifest,
    newest,
    put,
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
    save_new,
    save_old,
)
from s3_server import S3Server, free_ports

import harness
from harness import config
from harness.data.plan import Plan
from harness.errors import HarnessError, UsageError

pytestmark = pytest.mark.usefixtures("process_as_it_was")
Said = Callable[[], str]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    """What was printed since the last time."""

    def read() -> str:
        printed = capfd.readouterr()
        return printed.out + printed.err

    return read


def first_states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The weights that each rank made its first step with, in the order of starts."""
    return {
        path.name.partition("-")[0]: torch.load(path, weights_only=True)
        for path in sorted(folder.iterdir())
    }


def recording(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return f"task.args.record={folder}"


def begins(
    tmp_path: Path, source: object, *settings: str, task: tuple[str, ...] = TASK, name: str = "run"
) -> dict[str, torch.Tensor]:
    """Train two steps in this process; the weights that the first one was made with."""
    shutil.rmtree(tmp_path / "first", ignore_errors=True)
    train_on(
        tmp_path / name,
        f"init.from={source}",
        recording(tmp_path / "first"),
        "train.max_steps=2",
        *settings,
        task=task,
    )
    return first_states(tmp_path / "first")["rank0"]


def is_refused(tmp_path: Path, source: object, *settings: str) -> str:
    """In words, before anything is written."""
    with pytest.raises(UsageError) as caught:
        train_on(tmp_path / "no", f"init.from={source}", "train.max_steps=2", *settings)
    directory = tmp_path / "no"
    assert not list(directory.glob("checkpoints/*")) and not list(directory.glob("attempts/*")), (
        list(directory.rglob("*"))
    )
    assert caught.value.exit_code == 78
    return str(caught.value)


# Where the weights may come from


QUICK = (
    "tutorial weights",
    "imagenet",
    "lightning",
    "parallel, then compiled",
    "hugging face safetensors",
    "torchscript",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RECIPES],
)
def test_weights_come_from_whatever_others_have_saved(
    name: str, tmp_path: Path, done: Trained, said: Said
) -> None:
    recipe = RECIPES[name]
    file = made(
        name, tmp_path, done, save_old if recipe.has_old_format and "tutorial" in name else save_new
    )
    rename = ["init.rename={'^model\\.': ''}"] if recipe.in_any_prefix else []
    assert differing(begins(tmp_path, file, *rename), dict(done.model.state_dict())) == []
    text = said()
    assert row(text, "loaded", str(file)), text
    if recipe.prefix and not recipe.in_any_prefix:
        assert row(text, recipe.prefix.split(".")[0]), text
    payload = newest(tmp_path / "run")
    assert payload["step"] == 2 and payload["epoch"] == 0, "how far the file was counts for nothing"
    assert payload["scheduler_state_dict"]["last_epoch"] == 2
    assert payload["optimizer_state_dict"]["param_groups"][0]["lr"] == recipes.LR


def test_weights_come_from_runs_and_their_checkpoints(tmp_path: Path, said: Said) -> None:
    train_on(tmp_path / "old", "train.max_steps=8", "checkpoint.every_steps=4")
    files = {
        path.suffix: path for path in sorted((tmp_path / "old/checkpoints").glob("step_00000004*"))
    }
    states = {step: load_of(tmp_path / "old", step) for step in (4, 8)}
    for number, (source, step) in enumerate(
        [(tmp_path / "old", 8), (files[".pt"], 4), (files[".json"], 4)]
    ):
        assert differing(begins(tmp_path, source, name=f"run{number}"), states[step]) == []
        assert newest(tmp_path / f"run{number}")["step"] == 2
        assert manifest(tmp_path / f"run{number}").run_id != manifest(tmp_path / "old").run_id, (
            "a run of its own, not a fork"
        )
        assert events(tmp_path / f"run{number}")


def load_of(directory: Path, step: int) -> dict[str, Any]:
    payload = torch.load(directory / f"checkpoints/step_{step:08d}-0001.pt", weights_only=True)
    return dict(payload["model_state_dict"])


def test_of_a_run_with_damage_the_newest_whole_checkpoint_is_taken_or_none(tmp_path: Path) -> None:
    train_on(tmp_path / "old", "train.max_steps=8", "checkpoint.every_steps=4")
    file = tmp_path / "old/checkpoints/step_00000008-0001.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    before = load_of(tmp_path / "old", 4)
    try:
        first = begins(tmp_path, tmp_path / "old")
    except Exception as error:  # noqa: BLE001
        # Refusing is right too; silently beginning with damaged or random weights is not.
        assert "step_00000008" in str(error) and "damaged" in str(error), error
    else:
        assert differing(first, before) == []


@pytest.mark.parametrize(
    "what",
    [
        "old format with prefix",
        "run",
        *(pytest.param(what, marks=pytest.mark.slow) for what in ("safetensors", "checkpoint")),
    ],
)
def test_weights_come_from_a_bucket(
    what: str,
    tmp_path: Path,
    done: Trained,
    bucket: tuple[S3Server, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, place = bucket
    server.lend(monkeypatch)
    expected = dict(done.model.state_dict())
    if what in ("run", "checkpoint"):
        train_on(tmp_path / "old", f"run.remote=s3://{place}/old", "train.max_steps=3")
        expected = dict(newest(tmp_path / "old")["model_state_dict"])
        shutil.rmtree(tmp_path / "old")
        url = f"s3://{place}/old" + (
            "/checkpoints/step_00000003-0001.pt" if what == "checkpoint" else ""
        )
    elif what == "safetensors":
        url = put(server, place, made("hugging face safetensors", tmp_path, done))
    else:
        url = put(server, place, made("forgotten data parallel", tmp_path, done, save_old))
    assert differing(begins(tmp_path, url), expected) == []
    assert newest(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_all_ranks_begin_with_the_weights(tmp_path: Path, done: Trained) -> None:
    file, first = made("imagenet", tmp_path, done), tmp_path / "first"
    shown = run(
        torchrun(
            2,
            *TASK,
            f"run.dir={tmp_path}/run",
            f"init.from={file}",
            recording(first),
            "train.max_steps=3",
        )
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    check_ranks(first, done)
    assert shown.stdout.count("loaded ") == 1, "said once, not by every rank"


def check_ranks(first: Path, done: Trained) -> None:
    states = first_states(first)
    assert sorted(states) == ["rank0", "rank1"]
    for rank, state in states.items():
        assert differing(state, dict(done.model.state_dict())) == [], rank


@pytest.mark.slow
def test_a_module_that_is_not_trained_is_the_same_on_all_ranks_too(
    tmp_path: Path, done: Trained
) -> None:
    student = recipes.trained(seed=5, epochs=1)
    torch.save(
        {"student": student.model.state_dict(), "teacher": done.model.state_dict()},
        tmp_path / "a.pt",
    )
    task = ("task.name=recipe_task:build_taught", *TASK[1:])
    settings = (
        *task,
        recording(tmp_path / "first"),
        f"init.from={tmp_path}/a.pt",
        "train.max_steps=2",
    )
    shown = run(torchrun(2, *settings, f"run.dir={tmp_path}/run"))
    assert shown.returncode == 0, shown.stdout + shown.stderr
    check_ranks(tmp_path / "first", done)


@pytest.mark.slow
def test_only_the_first_rank_needs_the_file(tmp_path: Path, done: Trained) -> None:
    """Each rank in a folder of its own, as on two machines; the relative path is there for the
    first one only."""
    (tmp_path / "node0").mkdir()
    (tmp_path / "node1").mkdir()
    file = made("imagenet", tmp_path / "node0", done)
    settings = (
        *TASK,
        f"init.from={file.name}",
        recording(tmp_path / "first"),
        "train.max_steps=3",
        f"run.dir={tmp_path}/shared",
    )
    group = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_ports(1)[0]),
    }
    processes = [
        start(
            alone(*settings),
            cwd=tmp_path / f"node{rank}",
            env=group | {"RANK": str(rank), "LOCAL_RANK": "0"},
        )
        for rank in (0, 1)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    check_ranks(tmp_path / "first", done)


def test_it_trains_on_as_plain_pytorch_would_with_these_weights(
    tmp_path: Path, done: Trained
) -> None:
    """Load, make a new optimizer and schedule, go: the same bits, in one process."""
    file = made("torchvision", tmp_path, done)
    train_on(tmp_path / "run", f"init.from={file}", "train.max_steps=12")
    model = Net()
    model.load_state_dict(torch.load(file, weights_only=True)["model"])
    optimizer = recipes.make_optimizer("sgd", model.parameters())
    scheduler = recipes.make_scheduler(optimizer)
    data, plan = recipes.points(), Plan(SIZE, BATCH, 1, 0, 1, seed=1)
    model.train()
    for step in range(12):
        epoch, within = divmod(step, STEPS_PER_EPOCH)
        x, y = data[torch.tensor(plan.samples(epoch)[within * BATCH : (within + 1) * BATCH])]
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    payload = newest(tmp_path / "run")
    assert differing(dict(payload["model_state_dict"]), dict(model.state_dict())) == []
    assert differing(payload["optimizer_state_dict"], optimizer.state_dict()) == []


def test_the_source_decides_nothing_but_the_weights(tmp_path: Path, done: Trained) -> None:
    """Another optimizer, another learning rate, averages, other random numbers: all as the new
    run's settings say."""
    file = made("imagenet", tmp_path, done)
    task = (
        *TASK,
        "task.args.optimizer=adamw",
        "task.args.lr=0.01",
        "train.ema_decay=0.5",
        "train.seed=9",
    )
    assert differing(begins(tmp_path, file, task=task), dict(done.model.state_dict())) == []
    payload = newest(tmp_path / "run")
    assert payload["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(0.001)
    # Averages begin with the loaded weights, not with those of the random start: after two steps
    # they are near them.
    for key, value in done.model.named_parameters():
        assert (payload["ema_state_dict"][key] - value).abs().max() < 0.05, key


def test_the_order_of_samples_is_that_of_a_run_without_it(tmp_path: Path, done: Trained) -> None:
    file = made("tutorial weights", tmp_path, done)
    train_on(tmp_path / "plain", "train.max_steps=2")
    begins(tmp_path, file)
    plain, warm = newest(tmp_path / "plain"), newest(tmp_path / "run")
    assert plain["data"] == warm["data"]
    assert differing(plain["rng"], warm["rng"]) == [], (
        "reading the file has moved a random generator"
    )


def test_weights_of_another_precision_are_cast_to_that_of_the_task(
    tmp_path: Path, done: Trained
) -> None:
    half = {
        key: value.half() if value.is_floating_point() else value
        for key, value in done.model.state_dict().items()
    }
    torch.save(half, tmp_path / "half.pt")
    bfloat = {
        key: value.bfloat16() if value.is_floating_point() else value
        for key, value in done.model.state_dict().items()
    }
    safetensors.torch.save_file(bfloat, tmp_path / "bfloat.safetensors")
    for file, weights in ((tmp_path / "half.pt", half), (tmp_path / "bfloat.safetensors", bfloat)):
        first = begins(tmp_path, file, name=file.stem)
        assert (
            differing(
                first,
                {
                    key: value.float() if value.is_floating_point() else value
                    for key, value in weights.items()
                },
            )
            == []
        )


# What fits, and what does not


def test_a_larger_checkpoint_is_refused_with_a_table_and_taken_if_not_strict(
    tmp_path: Path, done: Trained, said: Said
) -> None:
    weights = dict(done.model.state_dict())
    torch.save(
        {**weights, "neck.weight": torch.ones(3, 5), "neck.bias": torch.ones(3)}, tmp_path / "a.pt"
    )
    text = is_refused(tmp_path, tmp_path / "a.pt")
    assert (
        row(text, "unexpected", "neck.weight", "3x5")
        and row(text, "unexpected", "neck.bias")
        and "init.strict=false" in text
    ), text
    said()
    assert differing(begins(tmp_path, tmp_path / "a.pt", "init.strict=false"), weights) == []
    text = said()
    assert row(text, "unexpected", "neck.weight"), text


def test_a_partial_checkpoint_leaves_the_rest_as_it_was_built(
    tmp_path: Path, done: Trained, said: Said
) -> None:
    weights = {
        key: value for key, value in done.model.state_dict().items() if key.startswith("backbone.")
    }
    torch.save(weights, tmp_path / "a.pt")
    text = is_refused(tmp_path, tmp_path / "a.pt")
    assert row(text, "missing", "head.weight", "4x16") and row(text, "missing", "head.bias"), text
    train_on(tmp_path / "plain", recording(tmp_path / "built"), "train.max_steps=1")
    built = first_states(tmp_path / "built")["rank0"]
    said()
    first = begins(tmp_path, tmp_path / "a.pt", "init.strict=false")
    assert row(said(), "missing", "head.weight")
    assert differing({key: first[key] for key in weights}, weights) == []
    rest = [key for key in first if key not in weights]
    assert rest == ["head.weight", "head.bias"]
    assert differing({key: first[key] for key in rest}, {key: built[key] for key in rest}) == []


def test_a_head_of_another_shape_is_left_out(tmp_path: Path, done: Trained, said: Said) -> None:
    """The case of fine-tuning: as many tensors, but another number of classes."""
    source = recipes.trained(classes=9)
    file = made("imagenet", tmp_path, source)
    text = is_refused(tmp_path, file)
    assert row(text, "mis-shaped", "head.weight", "4x16", "9x16") and row(
        text, "mis-shaped", "head.bias"
    ), text
    said()
    first = begins(tmp_path, file, "init.strict=false")
    assert row(said(), "mis-shaped", "head.weight")
    backbone = {
        key: value
        for key, value in source.model.state_dict().items()
        if key.startswith("backbone.")
    }
    assert differing({key: first[key] for key in backbone}, backbone) == []
    assert first["head.weight"].shape == (4, 16)


def test_names_are_changed_by_regular_expressions(tmp_path: Path, done: Trained) -> None:
    weights = dict(done.model.state_dict())
    renamed = {
        key.replace("backbone.", "encoder.layers.").replace("head.", "fc."): value
        for key, value in weights.items()
    }
    torch.save(renamed, tmp_path / "a.pt")
    rename = "init.rename={'^encoder\\.layers\\.(\\d+)': 'backbone.\\1', '^fc\\.': 'head.'}"
    assert differing(begins(tmp_path, tmp_path / "a.pt", rename), weights) == []
    (tmp_path / "a.yaml").write_text(
        "init:\n  from: a.pt\n  rename:\n"
        "    '^encoder\\.layers\\.': 'backbone.'\n    '^fc\\.': 'head.'\n"
    )
    shutil.rmtree(tmp_path / "first")
    train_on(
        tmp_path / "file",
        "--config",
        str(tmp_path / "a.yaml"),
        recording(tmp_path / "first"),
        "train.max_steps=1",
    )
    assert differing(first_states(tmp_path / "first")["rank0"], weights) == []
    torch.save({f"encoder.{key}": value for key, value in weights.items()}, tmp_path / "b.pt")
    text = is_refused(tmp_path, tmp_path / "b.pt")
    hint = re.search(r"init\.rename=\{[^}]*\}", text)
    assert hint, f"there is no hint: {text}"
    shutil.rmtree(tmp_path / "first")
    assert differing(begins(tmp_path, tmp_path / "b.pt", hint[0], name="hinted"), weights) == [], (
        hint[0]
    )
    text = is_refused(tmp_path, tmp_path / "a.pt", "init.rename={'.*': 'same'}")
    assert "init.rename" in text, text


@pytest.mark.parametrize("settings", [(), ("init.strict=false",)])
def test_a_file_in_which_nothing_fits_is_refused(
    settings: tuple[str, ...], tmp_path: Path, pair: TrainedPair
) -> None:
    torch.save(pair.first.state_dict(), tmp_path / "a.pt")
    text = is_refused(tmp_path, tmp_path / "a.pt", *settings)
    assert "head.weight" in text and str(tmp_path / "a.pt") in text, text


def test_several_modules_take_what_has_their_names(tmp_path: Path, pair: TrainedPair) -> None:
    train_on(tmp_path / "old", "train.max_steps=2", task=PAIR)
    old = newest(tmp_path / "old")
    train_on(
        tmp_path / "run",
        f"init.from={tmp_path / 'old'}",
        "train.max_steps=1",
        "task.args.lr=0",
        task=(*PAIR,),
    )
    recipes.gan(pair, tmp_path / "gan.pth")
    text = is_refused_pair(tmp_path, tmp_path / "gan.pth")
    assert "netG" in text and "generator" in text, text
    new = newest(tmp_path / "run")
    for name in ("generator_state_dict", "discriminator_state_dict"):
        for key, value in old[name].items():
            assert torch.equal(new[name][key], value), (
                "the learning rate was 0: nothing may have moved"
            )
    assert new["step"] == 1


def is_refused_pair(tmp_path: Path, source: Path) -> str:
    with pytest.raises(UsageError) as caught:
        train_on(tmp_path / "no", f"init.from={source}", "train.max_steps=2", task=PAIR)
    return str(caught.value)


# What is no source


@pytest.mark.parametrize(
    "what",
    [
        "missing",
        "empty",
        "web page",
        "list of parameters",
        "entire model",
        "trap",
        "cut short",
        "own directory",
    ],
)
def test_what_cannot_be_read_is_refused_before_anything_is_written(
    what: str, tmp_path: Path, done: Trained
) -> None:
    file = tmp_path / "file.pt"
    if what == "empty":
        file.touch()
    elif what == "web page":
        recipes.web_page(file)
    elif what == "list of parameters":
        recipes.parameters_without_names(done, file)
    elif what == "entire model":
        recipes.entire_model(done, file)
    elif what == "trap":
        recipes.trap(done, file, tmp_path / "sprung")
    elif what == "cut short":
        data = made("imagenet", tmp_path, done).read_bytes()
        file.write_bytes(data[: len(data) // 2])
    source = tmp_path / "no" if what == "own directory" else file
    with pytest.raises(HarnessError) as caught:
        train_on(tmp_path / "no", f"init.from={source}", "train.max_steps=2")
    assert caught.value.exit_code in (1, 78) and source.name in str(caught.value)
    assert not list((tmp_path / "no").glob("attempts/*")) and not list(
        (tmp_path / "no").glob("checkpoints/*")
    )
    assert not (tmp_path / "sprung").exists(), "it was executed"


@pytest.mark.slow
def test_a_refusal_is_one_message_and_an_exit_code(tmp_path: Path, done: Trained) -> None:
    recipes.trap(done, tmp_path / "trap.pt", tmp_path / "sprung")
    shown = run(alone(*TASK, f"run.dir={tmp_path}/no", f"init.from={tmp_path}/trap.pt"))
    assert shown.returncode == 78 and shown.stderr.count("harness: error:") == 1, (
        shown.stdout + shown.stderr
    )
    assert (
        "Traceback" not in shown.stderr
        and "mkdir" in shown.stderr
        and not (tmp_path / "sprung").exists()
    )


def test_torchscript_that_acts_is_not_run(tmp_path: Path) -> None:
    recipes.torch_script_trap(tmp_path / "a.pt", tmp_path / "sprung")
    is_refused(tmp_path, tmp_path / "a.pt")
    assert not (tmp_path / "sprung").exists(), "it was run"


def test_wrong_settings_are_listed_with_the_others() -> None:
    with pytest.raises(UsageError) as caught:
        config.load(
            None,
            [
                "init.rename={'(unclosed': 'x'}",
                "init.strict=perhaps",
                "init.from=''",
                "train.epochz=3",
                "init.form=a.pt",
            ],
        )
    text = str(caught.value)
    for name in (
        "init.rename",
        "(unclosed",
        "init.strict='perhaps'",
        "init.from=''",
        "train.epochz",
        "init.form",
    ):
        assert name in text, text
    assert "Did you mean init.from?" in text and "5 problem(s)" in text, text
    for wrong in (
        "init.rename=[a,b]",
        "init.rename=text",
        "init.from=[a,b]",
        "init.from={a: b}",
        "init.strict=3.5",
        "init.from=s3://key:secret@b/c",
    ):
        with pytest.raises(UsageError) as caught:
            config.load(None, [wrong])
        assert "init." in str(caught.value) and "Traceback" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_settings_of_it_keep_their_names_and_values(tmp_path: Path, done: Trained) -> None:
    file = made("tutorial weights", tmp_path, done)
    begins(tmp_path, file, "init.rename={'^a\\.b': 'c'}", "init.strict=true")
    kept = newest(tmp_path / "run")["config"]["init"]
    assert (
        kept["from"] == str(file) and kept["rename"] == {"^a\\.b": "c"} and kept["strict"] is True
    ), kept
    settings, _ = config.load(None, ["init.from=null", "init.strict=false"])
    assert settings.init.strict is False and settings.init.rename == {}


# Never confused with going on


def test_a_runs_own_checkpoint_always_wins(tmp_path: Path, done: Trained, said: Said) -> None:
    file = made("tutorial weights", tmp_path, done)
    begins(tmp_path, file)
    own = dict(newest(tmp_path / "run")["model_state_dict"])
    other = recipes.trained(seed=99, epochs=1)
    (tmp_path / "other").mkdir()
    for number, source in enumerate(
        [file, made("tutorial weights", tmp_path / "other", other), tmp_path / "gone.pt"]
    ):
        said()
        shutil.copytree(tmp_path / "run", tmp_path / f"run{number}")
        shutil.rmtree(tmp_path / "first", ignore_errors=True)
        train_on(
            tmp_path / f"run{number}",
            f"init.from={source}",
            recording(tmp_path / "first"),
            "train.max_steps=4",
        )
        assert differing(first_states(tmp_path / "first")["rank0"], own) == []
        assert row(said(), "is not read: the run has a checkpoint of its own"), "it is not said"
        assert newest(tmp_path / f"run{number}")["step"] == 4
    file.unlink()
    shutil.rmtree(tmp_path / "first")
    # Nobody has to say it again.
    train_on(tmp_path / "run", recording(tmp_path / "first"), "train.max_steps=4")
    assert "is not read: the run has a checkpoint of its own" not in said()
    assert (
        differing(
            newest(tmp_path / "run")["model_state_dict"],
            newest(tmp_path / "run0")["model_state_dict"],
        )
        == []
    )


def test_a_run_that_cannot_load_its_own_checkpoints_does_not_fall_back_to_it(
    tmp_path: Path, done: Trained, said: Said
) -> None:
    file = made("tutorial weights", tmp_path, done)
    begins(tmp_path, file)
    for data in (tmp_path / "run/checkpoints").glob("*.pt"):
        data.write_bytes(data.read_bytes()[:-10])
    said()
    with pytest.raises(HarnessError) as caught:
        train_on(tmp_path / "run", f"init.from={file}", "train.max_steps=4")
    assert caught.value.exit_code == 1
    assert "loaded" not in said()


def test_a_finished_run_is_finished(tmp_path: Path, done: Trained, said: Said) -> None:
    file = made("tutorial weights", tmp_path, done)
    begins(tmp_path, file)
    before = sorted(path.name for path in (tmp_path / "run").rglob("*"))
    file.unlink()
    said()
    train_on(
        tmp_path / "run", f"init.from={file}", recording(tmp_path / "first"), "train.max_steps=2"
    )
    assert (
        "loaded" not in said()
        and sorted(path.name for path in (tmp_path / "run").rglob("*")) == before
    )


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_uninterrupted_run(
    tmp_path: Path, done: Trained, started: Callable[..., Any]
) -> None:
    """Two ranks; killed twice, the first time before there is any checkpoint; at the end the source
    is gone."""
    file = made("imagenet", tmp_path, done)
    task = (
        *TASK,
        f"init.from={file}",
        "task.args.sleep_s=0.1",
        "train.max_steps=30",
        "checkpoint.every_steps=8",
        "log.every_steps=1",
    )
    shown = run(torchrun(2, *task, f"run.dir={tmp_path}/whole"))
    assert shown.returncode == 0, shown.stdout + shown.stderr

    directory = tmp_path / "killed"
    process = started(torchrun(2, *task, f"run.dir={directory}"))
    wait_until(lambda: events(directory, "step"), "a first step")
    kill_tree(process.pid)
    process.wait()
    assert not list(directory.glob("checkpoints/*.json")), "it came to a checkpoint already"

    process = started(torchrun(2, *task, f"run.dir={directory}"))
    wait_until(lambda: len(list(directory.glob("checkpoints/*.json"))) >= 1, "a checkpoint")
    kill_tree(process.pid)
    process.wait()
    assert 0 < manifest(directory).step < 30

    file.unlink()
    shown = run(torchrun(2, *task, f"run.dir={directory}"))
    assert (
        shown.returncode == 0 and "is not read: the run has a checkpoint of its own" in shown.stdout
    ), shown.stdout + shown.stderr
    assert run(program("diff", f"{tmp_path}/whole", str(directory))).returncode == 0


@pytest.mark.slow
def test_launch_does_not_try_again_what_cannot_fit(tmp_path: Path, done: Trained) -> None:
    file = made("imagenet", tmp_path, recipes.trained(width=8))
    shown = run(
        program(
            "launch", "--nproc-per-node", "2", *TASK, f"run.dir={tmp_path}/run", f"init.from={file}"
        )
    )
    text = shown.stdout + shown.stderr
    assert shown.returncode == 78, text
    assert (
        row(text, "mis-shaped", "head.weight", "4x16", "4x8")
        and shown.stderr.count("harness: failed:") == 1
    ), text
    assert not list((tmp_path / "run").glob("attempts/*"))


@pytest.mark.slow
def test_ranks_agree_when_the_source_lets_the_first_one_down(tmp_path: Path, done: Trained) -> None:
    """A file that only breaks while it is read: no rank waits for another, all end with its
    code."""
    data = made("imagenet", tmp_path, done, SAVES["old"]).read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-200])
    shown = run(
        torchrun(2, *TASK, f"run.dir={tmp_path}/run", f"init.from={tmp_path}/cut.pt"), limit_s=120
    )
    assert shown.returncode != 0 and shown.stderr.count("harness: error:") == 1, shown.stderr
    assert "cut.pt" in shown.stderr and not list((tmp_path / "run").glob("attempts/*"))


@pytest.mark.slow
def test_it_works_with_compiled_modules_and_mixed_precision(tmp_path: Path, done: Trained) -> None:
    file = made("nanogpt", tmp_path, done)
    if os.environ.get("HARNESS_NO_COMPILER") or shutil.which("c++") is None:
        pytest.skip("torch.compile needs a compiler")
    shown = run(
        alone(
            *TASK,
            f"run.dir={tmp_path}/run",
            f"init.from={file}",
            recording(tmp_path / "first"),
            "train.compile=true",
            "train.precision=bf16",
            "train.max_steps=2",
        )
    )
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert differing(first_states(tmp_path / "first")["rank0"], dict(done.model.state_dict())) == []


@pytest.mark.slow
def test_an_exported_file_is_a_source_again(tmp_path: Path, command: Command) -> None:
    """Out of one run, into the next: every format that holds names and tensors."""
    train_on(tmp_path / "old", "train.max_steps=2")
    weights = dict(newest(tmp_path / "old")["model_state_dict"])
    for format, options in (
        ("weights", ()),
        ("full", ("--legacy",)),
        ("safetensors", ()),
        ("torchscript", ()),
    ):
        out = tmp_path / f"{format}.out"
        answer = command("export", tmp_path / "old", out, "--format", format, "--trust", *options)
        assert answer.code == 0, answer.out + answer.err
        assert differing(begins(tmp_path, out, name=f"from-{format}"), weights) == [], format


class Tied(torch.nn.Module):
    """As in language models: one matrix for what goes in and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights_are_loaded_from_what_keeps_them_once(tmp_path: Path) -> None:
    source, target = Tied(), Tied()
    safetensors.torch.save_model(source, str(tmp_path / "a.safetensors"))
    torch.save(source.state_dict(), tmp_path / "a.pt")
    for file in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        target = Tied()
        harness.load_weights(target, file)
        assert (
            torch.equal(target.embedding.weight, source.embedding.weight)
            and target.head.weight is target.embedding.weight
        )


@pytest.mark.parametrize(
    ("named", "older", "more"),
    [("", False, 0), ("body.", False, 0), ("", True, 1), ("body.", True, 1)],
)
def test_modules_with_versions_are_migrated_only_from_an_older_one(tmp_path, named, older, more):
    def versioned() -> list[Versioned]:
        return [Versioned(4, 4), Versioned(4, 1)]

    def joined(first: Versioned, second: Versioned) -> torch.nn.Module:
        return torch.nn.Sequential(first, torch.nn.Sequential(second))

    source, target = versioned(), versioned()
    whole = torch.nn.ModuleDict({"body": joined(*source)}) if named else joined(*source)
    held = whole.state_dict()
    for version in held._metadata.values() if older else ():  # type: ignore[attr-defined]
        version["version"] = 1
    torch.save(held, tmp_path / "a.pt")
    harness.load_weights(joined(*target), tmp_path / "a.pt", rename={f"^{named}": ""})
    for mine, theirs in zip(target, source, strict=True):
        assert torch.equal(mine.weight, theirs.weight)
        assert torch.equal(mine.bias, theirs.bias + more)


def test_a_module_that_keeps_its_values_is_not_migrated(tmp_path):
    source, taken, kept = Versioned(4, 4), Versioned(4, 4), Versioned(4, 2)
    before = kept.bias.clone()
    held = torch.nn.Sequential(source, Versioned(4, 1)).state_dict()
    torch.save(dict(held), tmp_path / "a.pt")  # without versions
    harness.load_weights(torch.nn.Sequential(taken, kept), tmp_path / "a.pt", strict=False)
    assert torch.equal(taken.bias, source.bias + 1) and torch.equal(kept.bias, before)


def test_the_line_in_the_record_says_where_the_weights_came_from(
    tmp_path: Path, done: Trained
) -> None:
    """Months later: what did this run begin with?"""
    file = made("imagenet", tmp_path, done)
    begins(tmp_path, file)
    assert str(file) in json.dumps(newest(tmp_path / "run")["config"])
