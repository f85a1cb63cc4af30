"""Settings: where they come from, what is refused, what is kept, and what may change between two
attempts."""

from __future__ import annotations

import dataclasses
import inspect
import os
from pathlib import Path

import pytest
import torch
import yaml
from conftest import REPO, alone
from remote_lives import run_forked

import harness
from harness import cli, config, train
from harness.config import changes, settings_page, stored_form, table
from harness.config.names import RESOLVED
from harness.config.stored import restored
from harness.errors import EXIT_USAGE, UsageError


def problems_of(file: str | None, overrides: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        config.load(file, overrides)
    assert caught.value.exit_code == EXIT_USAGE == 78
    return str(caught.value)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_give_way_to_the_file_and_the_file_to_the_command_line(tmp_path):
    file = written(tmp_path / "a.yaml", "train:\n  epochs: 7\n  seed: 8\n  clip_norm: null\n")
    settings, stored = config.load(file, ["train.seed=9"])
    assert (settings.train.global_batch_size, settings.train.epochs, settings.train.seed) == (
        48,
        7,
        9,
    )
    assert settings.train.clip_norm is None
    assert stored["train"] == dataclasses.asdict(settings.train)
    assert config.load(None, [])[0] == config.Config()


def test_values_keep_the_type_of_their_setting():
    settings, _ = config.load(
        None,
        [
            "checkpoint.every_s=5",
            "train.max_steps=null",
            "resume.accept=[config,data]",
            "task.args.lr=1e-4",
            "run.dir=007",
        ],
    )
    assert settings.checkpoint.every_s == 5
    assert settings.train.max_steps is None
    assert settings.resume.accept == ["config", "data"] and isinstance(settings.resume.accept, list)
    assert settings.task.args == {"lr": 1e-4} and isinstance(settings.task.args, dict)
    assert isinstance(settings.run.dir, str)


def test_settings_cannot_be_changed_once_loaded():
    settings, _ = config.load(None, [])
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.train.epochs = 1  # type: ignore[misc]


def test_every_problem_is_listed_at_once(tmp_path):
    file = written(tmp_path / "a.yaml", "train:\n  epochz: 3\n  seed: many\nrunn:\n  dir: x\n")
    said = problems_of(
        file,
        [
            "train.global_batch_sise=4",
            "checkpoint.keep_last=few",
            "nonsense",
            "=3",
            "tain.compile=yes",
        ],
    )
    for expected in (
        "8 problem(s)",
        "train.epochz: unknown setting",
        "Did you mean train.epochs?",
        "train.seed='many'",
        "runn.dir: unknown setting",
        "Did you mean run.dir?",
        "train.global_batch_sise: unknown",
        "Did you mean train.global_batch_size?",
        "checkpoint.keep_last='few'",
        "'nonsense': expected key=value",
        "'=3': expected key=value",
        "Did you mean train.compile?",
        str(file),
        "command line",
    ):
        assert expected in said


def test_every_impossible_value_is_listed_with_what_is_allowed():
    impossible = [
        "train.epochs=0",
        "train.max_steps=-1",
        "train.global_batch_size=0",
        "train.micro_batch_size=0",
        "train.seed=-1",
        "train.precision=fp8",
        "train.clip_norm=0",
        "train.ema_decay=1",
        "train.nonfinite=retry",
        "train.nonfinite_limit=0",
        "data.num_workers=-1",
        "eval.every_steps=0",
        "eval.batch_size=0",
        "checkpoint.every_s=0",
        "checkpoint.every_steps=0",
        "checkpoint.keep_last=0",
        "checkpoint.keep_every_steps=0",
        "checkpoint.keep_best=-1",
        "checkpoint.best=val_acc",
        "log.every_steps=0",
        "resume.accept=[all]",
        "run.timeout_s=0",
        "run.dir=s3://bucket/a",
        "task.name=no_callable",
        "checkpoint.memory=0",
        "store.keep={last: 0}",
    ]
    said = problems_of(None, impossible)
    assert f"{len(impossible)} problem(s)" in said
    for text in impossible:
        (line,) = [
            line
            for line in said.splitlines()
            if line.strip().startswith(text.partition("=")[0] + "=")
        ]
        assert "allowed is" in line


@pytest.mark.parametrize(
    ("setting", "allowed"),
    [
        ("train.precision=fp8", "fp32, bf16 or fp16"),
        ("run.remote=s3://user:secret@b/a", "credentials come from the environment"),
        ("run.dir=''", "a local directory"),
    ],
)
def test_an_impossible_value_is_refused_in_words(setting, allowed):
    assert allowed in problems_of(None, [setting])


@pytest.mark.parametrize(
    "setting",
    [
        "train.epochs=2.5",
        "train.epochs=true",
        "train.epochs=null",
        "train.compile=3.5",
        "train.seed=[1]",
        "task.args=3",
        "resume.accept=data",
    ],
)
def test_a_wrong_type_is_refused(setting):
    name, _, value = setting.partition("=")
    said = problems_of(None, [setting])
    assert "1 problem(s)" in said and name in said and value in said.lower().replace("none", "null")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [1\n", "cannot be read as YAML"),
        ("- a\n- b\n", "expected names and values"),
        ("just words\n", "just words: unknown setting"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "cannot be read as YAML"),
        ("train:\n  epochs: ${nowhere.at.all}\n", "train.epochs"),
    ],
)
def test_an_unreadable_file_is_refused_in_words(tmp_path, text, expected):
    said = problems_of(written(tmp_path / "broken.yaml", text), ["train.seed=-"])
    assert expected in said and "broken.yaml" in said
    assert "2 problem(s)" in said, "the command line is checked all the same"


def test_a_missing_file_a_folder_and_bytes_are_refused_in_words(tmp_path):
    assert "no such file" in problems_of(str(tmp_path / "none.yaml"), [])
    assert "cannot be read as YAML" in problems_of(str(tmp_path), [])
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "cannot be read as YAML" in problems_of(str(tmp_path / "bytes.yaml"), [])


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert config.load(written(tmp_path / "empty.yaml", "# nothing\n"), [])[0] == config.Config()


def test_secrets_are_given_to_the_task_and_kept_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("THE_SECRET", "hunter2")
    file = written(tmp_path / "a.yaml", "task:\n  args:\n    token: ${oc.env:THE_SECRET}\n")
    settings, stored = config.load(file, ["task.args.other=x-${oc.env:THE_SECRET}"])
    assert settings.task.args == {"token": "hunter2", "other": "x-hunter2"}
    assert stored["task"]["args"] == {
        "token": "${oc.env:THE_SECRET}",
        "other": "x-${oc.env:THE_SECRET}",
    }
    assert "hunter2" not in stored_form.to_yaml(stored) and "hunter2" not in str(stored)
    assert "${oc.env:THE_SECRET}" in stored_form.to_yaml(stored)


@pytest.mark.parametrize(
    "setting", ["train.epochs=${oc.env:THE_SECRET}", "train.precision=${oc.env:THE_SECRET}"]
)
def test_secrets_do_not_reach_an_error_message(monkeypatch, setting):
    monkeypatch.setenv("THE_SECRET", "hunter2")
    assert "hunter2" not in problems_of(None, [setting])


def test_a_missing_environment_variable_is_named(monkeypatch):
    monkeypatch.delenv("NOT_THERE", raising=False)
    assert "NOT_THERE" in problems_of(None, ["task.args.token=${oc.env:NOT_THERE}"])


@pytest.mark.parametrize(
    "file", sorted((REPO / "configs").glob("*.yaml")), ids=lambda file: file.name
)
def test_the_configs_of_the_repository_load(file):
    from harness import task

    settings, _ = config.load(str(file), [])
    task.find(settings.task.name, settings.task.args)


def test_the_digits_config_is_the_defaults():
    assert config.load(str(REPO / "configs" / "digits.yaml"), [])[0] == config.Config()


def stored_of(*overrides: str) -> dict:
    return config.load(None, list(overrides))[1]


@pytest.mark.parametrize(
    "free",
    [
        "run.dir=elsewhere",
        "data.num_workers=2",
        "checkpoint.every_s=1",
        "log.every_steps=1",
        "train.epochs=99",
        "train.max_steps=5",
        "eval.batch_size=9",
    ],
)
def test_what_cannot_change_the_model_may_change(free):
    (change,) = changes.check_changes(stored_of(), stored_of(free), [], [])
    assert change.is_free and change.name == free.partition("=")[0]


@pytest.mark.parametrize(
    "bound",
    [
        "train.seed=2",
        "train.global_batch_size=24",
        "train.precision=bf16",
        "train.clip_norm=null",
        "train.nonfinite=ignore",
        "task.args.lr=1.0",
        "task.name=a:b",
        "data.drop_last=false",
        "train.ema_decay=0.9",
        "train.micro_batch_size=4",
        "train.deterministic=true",
        "train.compile=true",
    ],
)
def test_what_changes_the_model_may_change_only_on_insistence(bound):
    name = bound.partition("=")[0]
    old, new = stored_of(), stored_of(bound)
    with pytest.raises(UsageError) as caught:
        changes.check_changes(old, new, [], [])
    assert f"{name}: " in str(caught.value) and "resume.accept=[config]" in str(caught.value)
    assert f"resume.override=[{name}]" in str(caught.value)
    assert [change.name for change in changes.check_changes(old, new, ["config"], [])] == [name]
    assert [change.name for change in changes.check_changes(old, new, [], [name])] == [name]
    with pytest.raises(UsageError):
        changes.check_changes(old, new, ["data"], ["train.other"])


def test_only_what_is_overridden_is_let_through():
    old, new = stored_of("task.args.lr=1"), stored_of("task.args.lr=2", "train.seed=5", "run.dir=x")
    with pytest.raises(UsageError) as caught:
        changes.check_changes(old, new, [], ["task.args.lr"])
    assert "train.seed: 1 -> 5" in caught.value.found
    assert "task.args.lr" not in caught.value.found and "run.dir" not in caught.value.found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"init": {"dropout": 0.1}}, {"init": {"dropout": 0.5}}),
        ({"resume": {"rate": 1}}, {"resume": {"rate": 2}}),
        ({"run": {"lr": 0.1}}, {"run": {"lr": 0.9}}),
        ({"train": {"epochs": 3, "epochs_frozen": 1}}, {"train": {"epochs": 3}}),
        ({"w": torch.ones(2)}, {"w": torch.zeros(2)}),
    ],
)
def test_the_names_in_a_programs_own_config_are_its_own(old, new):
    with pytest.raises(UsageError, match="not the one that this run was trained with"):
        changes.check_changes(old, new, [], [])
    assert changes.check_changes(old, old, [], []) == []


def test_an_interpolation_that_has_another_value_is_a_change(monkeypatch):
    line = ["task.args.lr=${oc.env:RATE}", "run.dir=${oc.env:RATE}"]
    monkeypatch.setenv("RATE", "0.5")
    old, same = stored_of(*line), stored_of(*line)
    assert "0.5" not in str(old) and changes.check_changes(old, same, [], []) == []
    assert restored(old).task.args["lr"] == "0.5" and "digests" not in stored_form.to_yaml(old)
    monkeypatch.setenv("RATE", "0.25")
    new = stored_of(*line)
    with pytest.raises(UsageError, match="has another value than before") as caught:
        changes.check_changes(old, new, [], [])
    assert "0.25" not in str(caught.value) and "run.dir" not in str(caught.value).split("Put")[0]
    without = {name: of for name, of in old.items() if name != RESOLVED}
    assert changes.check_changes(without, new, [], []) == [], "an older checkpoint"


def test_a_value_that_is_no_number_is_no_change():
    nan = {"a": float("nan"), "b": [1, {"c": float("nan")}]}
    other = {"a": float("nan"), "b": [1, {"c": float("nan")}]}
    assert changes.check_changes(nan, other, [], []) == []


@pytest.mark.parametrize(
    "value",
    [torch.device("cpu"), torch.bfloat16, torch.ones(2), 1j, "an open ${", {None: 1, 2: 3, "a": 4}],
)
def test_any_config_of_a_program_is_written_and_has_a_digest(value):
    text = stored_form.to_yaml({"lr": 0.1, "value": value})
    assert config.from_yaml(text.encode())["lr"] == 0.1
    assert len(stored_form.digest({"value": value})) == 16


ARGUMENTS = """
task:
  name: here:build
  args:
    lr_at: {10: 0.01, 20: 0.001}
    scale: {encoder.weight: 0.1, body: {depth: 2}}
    a.b: 1
"""


def test_the_arguments_of_a_task_keep_their_keys(tmp_path):
    (tmp_path / "a.yaml").write_text(ARGUMENTS)
    settings, stored = config.load(str(tmp_path / "a.yaml"), ["task.args.scale.body.depth=3"])
    expected = {
        "lr_at": {10: 0.01, 20: 0.001},
        "scale": {"encoder.weight": 0.1, "body": {"depth": 3}},
        "a.b": 1,
    }
    assert settings.task.args == stored["task"]["args"] == restored(stored).task.args == expected


@pytest.mark.parametrize("written", ["2024_10_01", "0123", "1e3", "off", "1_0", "0x1f", "12:30"])
def test_what_is_text_is_taken_as_it_is_written(tmp_path, written):
    (tmp_path / "a.yaml").write_text(f"run:\n  dir: {written}\n  loop: [loop.py, {written}]\n")
    for file, line in (
        (str(tmp_path / "a.yaml"), []),
        (None, [f"run.dir={written}", f"run.loop=[loop.py, {written}]"]),
        (None, [f"run={{dir: {written}, loop: [loop.py, '{written}']}}"]),
    ):
        settings, _ = config.load(file, line)
        assert settings.run.dir == written and settings.run.loop == ["loop.py", written]


def test_a_pipe_is_read_once():
    reading, writing = os.pipe()
    os.write(writing, b"run:\n  dir: 0123\n")
    os.close(writing)
    settings, _ = config.load(f"/dev/fd/{reading}", [])
    os.close(reading)
    assert settings.run.dir == "0123"


def test_what_is_quoted_or_null_is_taken_as_yaml_has_it():
    settings, _ = config.load(None, ["run.dir='0123'", "run.remote=null", "train.epochs=0x10"])
    assert (settings.run.dir, settings.run.remote, settings.train.epochs) == ("0123", None, 16)


@pytest.mark.parametrize("line", ["run.dir=???", "task.args.x=???", "task.args.x={a: '???'}"])
def test_a_value_that_is_missing_is_a_problem(line):
    with pytest.raises(UsageError, match="stands for a value that is missing"):
        config.load(None, [line])


def test_settings_that_came_or_went_are_changes():
    old, new = (
        {"train": {"old": 1}, "task": {"args": {}}},
        {"train": {"new": 2}, "task": {"args": {"lr": 1}}},
    )
    assert [str(change) for change in changes.changes(old, new)] == [
        "task.args.lr: None -> 1", "train.new: None -> 2", "train.old: 1 -> None",
    ]  # fmt: skip
    assert changes.changes(old, old) == []


def test_the_digest_tells_settings_apart_and_nothing_else():
    assert stored_form.digest(stored_of()) == stored_form.digest(stored_of("train.seed=1"))
    assert stored_form.digest(stored_of()) != stored_form.digest(stored_of("train.seed=2"))


def test_the_stored_settings_load_again(tmp_path):
    _, stored = config.load(None, ["task.args.lr=0.5", "train.max_steps=3"])
    file = written(tmp_path / "config.yaml", stored_form.to_yaml(stored))
    again, stored_again = config.load(file, [])
    assert stored_again == stored and again.task.args == {"lr": 0.5}
    assert yaml.safe_load(stored_form.to_yaml(stored)) == stored


def test_a_wrong_command_line_ends_with_78_and_without_a_traceback(tmp_path):
    ended = run_forked(alone("nonsense=1", "train.epochs=none"), cwd=tmp_path)
    assert ended.returncode == 78
    assert "2 problem(s)" in ended.stderr and "nonsense: unknown setting" in ended.stderr
    assert "Traceback" not in ended.stderr and ended.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing was started"


def test_the_page_of_settings_is_as_the_schema_has_it():
    page = (REPO / "configs/README.md").read_text()
    assert page == settings_page.markdown(), "run scripts/settings"
    assert all(f"| `{of.name}` |" in page for of in table.settings())


def test_every_setting_is_in_the_help_text_of_the_programs_that_take_settings(capsys):
    for program in (train.main, lambda given: cli.main(["launch", *given])):
        with pytest.raises(SystemExit):
            program(["--help"])
        shown = capsys.readouterr().out
        assert all(f"  {of.name}={table.written(of.default)}\n" in shown for of in table.settings())


def test_every_default_is_allowed_by_its_own_rule():
    for of in table.settings():
        assert of.default is None or of.rule is None or of.rule.holds(of.default), of.name
        assert of.meaning.endswith("."), of.name


def test_arguments_of_the_library_have_the_defaults_and_the_rules_of_their_settings():
    """But for seed and best, whose defaults differ, and for what a loop must say."""
    parameters = {
        name: parameter.default
        for function in (harness.init, harness.Run.batches, harness.Run.steps)
        for name, parameter in inspect.signature(function).parameters.items()
    }
    named = [of for of in table.settings() if of.argument]
    assert {of.argument for of in named} <= parameters.keys()
    others = {"seed", "best", "epochs", "max_steps", "global_batch_size", "remote_keep"}
    for of in named:
        default = tuple(of.default) if isinstance(of.default, list) else of.default
        assert of.argument in others or parameters[of.argument] == default, of.argument
    settings, _ = config.load(
        None, ["checkpoint.every_s=5", "resume.accept=[data]", "run.scratch=true"]
    )
    given = table.arguments(settings, harness.init)
    assert (given["save_every_s"], given["accept"], given["is_scratch"]) == (5, ["data"], True)
    assert (
        given.keys()
        == {of.argument for of in named} & inspect.signature(harness.init).parameters.keys()
    )


def test_earlier_names_of_settings_are_still_read_and_the_new_ones_are_said(tmp_path, capsys):
    file = written(
        tmp_path / "a.yaml", "store:\n  keep_last: 5\n  keep_best: 1\ncheckpoint:\n  memory: true\n"
    )
    settings, stored = config.load(
        file,
        ["store.keep_last=2", "store.keep_every_steps=null", "checkpoint.memory_every_steps=7"],
    )
    assert (
        settings.store.keep == {"last": 2, "every_steps": None, "best": 1}
        and settings.checkpoint.memory == 7
    )
    assert stored["store"]["keep"] == settings.store.keep and "keep_last" not in stored["store"]
    said = capsys.readouterr().err
    assert (
        said.count("store.keep_last is an old name: see store.keep.last") == 1
        and "see checkpoint.memory=N" in said
    )
    assert config.load(None, ["checkpoint.memory_every_steps=7"])[0].checkpoint.memory is False, (
        "it was off then, too"
    )
    assert "memory_every_steps is an old name" in capsys.readouterr().err
    assert config.load(None, ["store.keep.last=4"])[0].store.keep == {"last": 4}
    assert not capsys.readouterr().err


def test_settings_that_a_checkpoint_holds_under_earlier_names_are_todays():
    earlier = {
        "store": {"wait_s": 300.0, "keep_last": None, "keep_every_steps": 10, "keep_best": None}
    }
    earlier["checkpoint"] = {"memory": True, "memory_every_steps": 4}
    found = restored(earlier)
    assert found.store.keep == {"every_steps": 10} and found.checkpoint.memory == 4
    today = {"store": {"wait_s": 300.0, "keep": {"every_steps": 10}}, "checkpoint": {"memory": 4}}
    assert changes.changes(earlier, today) == []
    plain = {
        "store": {"keep_last": None, "keep_every_steps": None, "keep_best": None},
        "checkpoint": {"memory": False, "memory_every_steps": 1},
    }
    assert changes.changes(plain, {"store": {"keep": {}}, "checkpoint": {"memory": False}}) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"best": "val_loss"},
        {"snapshot": "no"},
        {"accept": "config"},
        {"save_every_s": 0},
        {"notices": "ibm"},
    ],
)
def test_the_library_refuses_what_the_settings_refuse(wrong, tmp_path):
    with pytest.raises(UsageError, match="argument is not as expected"):
        harness.init(tmp_path / "a", **wrong)
    assert not (tmp_path / "a").exists()
