"""What others get of a trained model: each format loads by the lines that the command prints, where
no harness is, and answers alike."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import ENVIRONMENT, kill_tree, run, start, undone, wait_until
from conftest import harness as program
from export_task import CLASSES, WIDTH, Annealed, Keyed, Net, Tied, samples, sequential
from s3_server import S3Server
from small_disks import fill
from there import there
from torch import nn

import harness
from harness import cli, state, train
from harness.checkpoint import attempts, commit, load
from harness.checkpoint.catalog import going_on_from, read_catalog
from harness.errors import DamagedError, UsageError
from harness.exchange.compare import differences
from harness.store import LocalStore

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.usefixtures("process_as_it_was"),
]
FORMATS = ("weights", "full", "module", "safetensors", "torchscript", "exported")
SHORT = (
    "train.max_steps=6",
    "train.global_batch_size=8",
    "checkpoint.every_steps=2",
    "checkpoint.every_s=null",
    "checkpoint.keep_last=9",
    "eval.every_steps=2",
    "eval.batch_size=8",
    "checkpoint.best=val_loss:max",
)
ENCODER = (
    "torch.nn.Linear(6, {0}), torch.nn.BatchNorm1d({0}), torch.nn.Tanh(), torch.nn.Dropout(0.5)"
)
MAKE = {  # what whoever follows the printed lines puts in the place of `…`
    "model": f"torch.nn.Sequential({ENCODER.format(16)}, torch.nn.Linear(16, 3))",
    "encoder": f"torch.nn.Sequential({ENCODER.format(8)})",
    "optimizer": "torch.optim.SGD(model.parameters(), lr=1.0)",
    "head": "torch.nn.Linear(8, 3)",
    "encoder_optimizer": "torch.optim.AdamW(encoder.parameters())",
    "head_optimizer": "torch.optim.SGD(head.parameters(), lr=1.0)",
}
OF_ENCODER = {
    "model": MAKE["encoder"], "encoder_optimizer": "torch.optim.AdamW(model.parameters())",
    "head_optimizer": "torch.optim.SGD(torch.nn.Linear(8, 3).parameters(), lr=1.0)",
}  # fmt: skip
INPUT = samples(48).tensors[0]


def trained(directory: Path, *settings: str, task: str = "export_task:build") -> Path:
    """A short run of one process: this one."""
    with undone(), contextlib.redirect_stdout(io.StringIO()):
        train.main([f"task.name={task}", *SHORT, *settings, f"run.dir={directory}"])
    return directory


Runs = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs by the kind of their model, each trained once; to be copied, not to be changed."""
    home = tmp_path_factory.mktemp("runs")
    made: dict[tuple[str, ...], Path] = {}

    def get(kind: str, *settings: str, task: str = "export_task:build") -> Path:
        key = (kind, *settings)
        if key not in made:
            own = (f"task.args.kind={kind}",) if task.endswith(":build") else ()
            made[key] = trained(home / f"{len(made)}-{kind}", *own, *settings, task=task)
        return made[key]

    return get


@pytest.fixture(scope="module")
def averaged(runs: Runs) -> Path:
    """The run that most of this is about: torch's own classes only, with averaged weights."""
    return runs("sequential", "train.ema_decay=0.5")


@pytest.fixture(scope="module")
def pair(runs: Runs) -> Path:
    return runs("pair", "train.ema_decay=0.5", task="export_task:build_pair")


def command(*arguments: object) -> SimpleNamespace:
    """A command of the `harness` program, in this process: exit code, what it printed, and what it
    complained of."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: str | int | None = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


def confirmed(arguments: tuple[object, ...]) -> list[str]:
    """These runs are of tasks of the tests' own, which a file may not name by itself."""
    is_code = {"module", "torchscript", "exported"} & set(arguments)
    return (
        ["--trust"]
        if is_code
        and "--trust" not in arguments
        and not any(str(a).startswith("task.name") for a in arguments)
        else []
    )


def load_model(source: object, *given: Any, **named: Any) -> Any:
    return harness.load_model(str(source), *given, trust=True, **named)


def export(*arguments: object) -> SimpleNamespace:
    answer = command("export", *arguments, *confirmed(arguments))
    assert answer.code == 0, answer.out + answer.err
    return answer


def refused(folder: Path, codes: tuple[int, ...], *arguments: object, words: str = "") -> str:
    """An export that ends in words, once, with the right code, and neither writes nor changes a
    thing."""
    before = contents(folder)
    answer = command("export", *arguments, *confirmed(arguments))
    assert answer.code in codes, f"exit code {answer.code}\n{answer.out}{answer.err}"
    errors = [line for line in answer.err.splitlines() if line.startswith("harness: error: ")]
    assert (
        len(errors) == 1 and len(errors[0]) < 400 and "Traceback" not in answer.err + answer.out
    ), answer.err
    assert re.search(words, answer.err), answer.err
    assert contents(folder) == before
    return str(answer.err)


def contents(folder: Path) -> dict[str, object]:
    """Everything in a folder, with the digests of files."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        whole = path.is_file() and not path.is_symlink()
        found[str(path)] = (
            hashlib.sha256(path.read_bytes()).hexdigest()
            if whole
            else (os.lstat(path).st_mode, os.lstat(path).st_ino)
        )
    return found


def code_in(printed: str, make: Mapping[str, str] = MAKE) -> list[str]:
    """The lines of Python among those that the command printed, with `…` filled in by whoever
    follows them."""
    found = []
    for line in printed.splitlines():
        line = re.sub(r"^(\w+) = …", lambda match: f"{match[1]} = {make[match[1]]}", line)
        with contextlib.suppress(SyntaxError):
            body = ast.parse(line).body
            if body and (
                isinstance(body[0], ast.Assign | ast.ImportFrom | ast.Import) or "(" in line
            ):
                found.append(line)
    return found


def manifests(directory: Path) -> list[Any]:
    """Of a run's checkpoints, oldest first."""
    return sorted(read_catalog(LocalStore(directory)).manifests, key=lambda manifest: manifest.step)


def payload_of(directory: Path, step: int | None = None) -> dict[str, Any]:
    """What is in the checkpoint of a step, by torch alone."""
    files = sorted(
        directory.glob("checkpoints/*.pt" if step is None else f"checkpoints/step_{step:08d}-*.pt")
    )
    return torch.load(files[-1], weights_only=True)


def same(a: object, b: object) -> bool:
    return list(differences(a, b)) == []


def answers_of(model: Callable[[torch.Tensor], Any], x: torch.Tensor = INPUT) -> Any:
    with torch.no_grad():
        return model(x)


def close(a: object, b: object) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- loaded where there is no harness, by the lines that are printed ------------------------------

READER = """
import json, os, sys
sys.modules["harness"] = None  # as if it had never been installed
for name in ("harness", "harness.exchange", "export_task"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported, so nothing is proved")
import torch
x = torch.load("input.pt")
for job in json.load(open("jobs.json")):
    print(f"--- {job['name']}", file=sys.stderr, flush=True)
    os.chdir(job["folder"])
    names = {"torch": torch, "x": x}
    try:
        exec("\\n".join(job["lines"]), names)
        answers = []
        for size in job["sizes"]:
            names["x"] = x[:size]
            with torch.no_grad():
                answers.append(eval(job["call"], names))
        kept = {name: names[name].state_dict() for name in job["keep"]} | {
            "epoch": names.get("epoch"), "loss": names.get("loss")
        }
        torch.save((None, answers, kept), job["out"])
    except Exception as error:
        torch.save((f"{type(error).__name__}: {error}", [], {}), job["out"])
"""
JOBS = [  # name, run, arguments of the export, sizes of batches, the call
    *[(format, "averaged", ("--format", format), (48, 1, 3), "model(x)") for format in FORMATS],
    *[
        (f"legacy {format}", "averaged", ("--format", format, "--legacy"), (48,), "model(x)")
        for format in ("weights", "full", "module")
    ],
    *[
        (f"averages {format}", "averaged", ("--ema", "--format", format), (48,), "model(x)")
        for format in FORMATS
        if format != "full"
    ],
    *[
        (f"pair {format}", "pair", ("--format", format), (48,), "head(encoder(x))")
        for format in ("weights", "full")
    ],
    *[
        (
            f"encoder {format}",
            "pair",
            ("--format", format, "--module", "encoder"),
            (48,),
            "model(x)",
        )
        for format in FORMATS
    ],
    ("module of a class", "net", ("--format", "module"), (48,), "model(x)"),
    *[
        (f"tied {format}", "tied", ("--format", format), (48, 3), "model(x)")
        for format in FORMATS[-2:]
    ],
    *[
        (
            f"keyed {format}",
            "keyed",
            ("--format", format),
            (1, 3, 8),
            "model(points=x, scale=x[:, 0])",
        )
        for format in ("exported",)
    ],
    *[
        (f"pairs {format}", "pairs", ("--format", format), (1, 3, 8), "model(x, x[:, 0])")
        for format in FORMATS[-2:]
    ],
    *[
        (f"mixed {format}", "mixed", ("--format", format), (1, 3, 8), "model(x, scale=x[:, 0])")
        for format in FORMATS[-2:]
    ],
    ("traced torchscript", "traced", ("--format", "torchscript"), (1, 3, 8), "model(x)"),
    ("branching torchscript", "branching", ("--format", "torchscript"), (1, 3, 8), "model(x)"),
]
ENDINGS = {"module": "pth", "safetensors": "safetensors", "torchscript": "ts", "exported": "pt2"}


@pytest.fixture(scope="module")
def read(
    runs: Runs, averaged: Path, pair: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, SimpleNamespace]:
    """Every export of JOBS, and what a process made of it that knows nothing but torch: one for
    all, as starting one takes seconds."""
    folder, found = tmp_path_factory.mktemp("out"), {}
    jobs: list[dict[str, Any]] = []
    for name, kind, arguments, sizes, call in JOBS:
        source = {"averaged": averaged, "pair": pair}.get(kind) or runs(kind)
        format = (
            arguments[arguments.index("--format") + 1] if "--format" in arguments else "weights"
        )
        out = folder / f"{name.replace(' ', '-')}.{ENDINGS.get(format, 'pt')}"
        with undone():
            exported = command("export", source, out, *arguments, *confirmed(arguments))
        own = OF_ENCODER if "encoder" in arguments else {}
        lines = code_in(exported.out, MAKE | own)
        keep = [match[1] for line in lines if (match := re.match(r"(\w+)\.load_state_dict", line))]
        answer = folder / f"{len(jobs)}.answer"
        jobs.append(
            {
                "name": name,
                "folder": str(folder),
                "lines": lines,
                "sizes": sizes,
                "call": call,
                "keep": keep,
                "out": str(answer),
            }
        )
        found[name] = SimpleNamespace(
            file=out, run=source, printed=exported, lines=lines, answer=answer, sizes=sizes
        )
    place = tmp_path_factory.mktemp("reader")
    torch.save(INPUT, place / "input.pt")
    (place / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER],
        cwd=place,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(part.partition("\n")[::2] for part in done.stderr.split("--- ")[1:])
    for name, each in found.items():
        each.said = said[name]
        each.error, each.answers, each.kept = torch.load(each.answer, weights_only=True)
    return found


def checked(each: SimpleNamespace) -> SimpleNamespace:
    assert each.printed.code == 0, each.printed.err
    assert each.error is None, f"{each.error}, by these lines:\n{chr(10).join(each.lines)}"
    return each


def expected(model: nn.Module, each: SimpleNamespace) -> None:
    """That it answers as the harness's own model does, which Dropout and BatchNorm only let it do
    in eval mode."""
    assert not any(part.training for part in model.modules())
    for size, answer in zip(each.sizes, each.answers, strict=True):
        close(answer, answers_of(model, INPUT[:size]))


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_it_loads_by_the_printed_lines_where_no_harness_is(
    format: str, read: dict[str, SimpleNamespace]
) -> None:
    each = checked(read[format])
    model = load_model(str(each.run))
    expected(model, each)
    model.train()
    assert not torch.allclose(answers_of(model), each.answers[0]), (
        "the mode makes no difference, so nothing was proved"
    )
    assert f"wrote {each.file}" in each.printed.out and each.said == ""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["weights", "full", "module"])
def test_the_older_format_is_what_pytorch_before_1_6_wrote(
    format: str, read: dict[str, SimpleNamespace]
) -> None:
    each = checked(read[f"legacy {format}"])
    expected(load_model(str(each.run)), each)
    assert not zipfile.is_zipfile(each.file) and zipfile.is_zipfile(read[format].file)
    assert each.file.read_bytes().startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")


@pytest.mark.slow
@pytest.mark.parametrize("format", [format for format in FORMATS if format != "full"])
def test_averaged_weights_are_exported(format: str, read: dict[str, SimpleNamespace]) -> None:
    each = checked(read[f"averages {format}"])
    model = load_model(str(each.run), ema=True)
    expected(model, each)
    assert not torch.allclose(answers_of(load_model(str(each.run))), each.answers[0]), (
        "these are not the averages"
    )
    assert same(dict(model.state_dict()), payload_of(each.run)["ema_state_dict"])


def test_weights_are_the_plain_state_dict(read: dict[str, SimpleNamespace]) -> None:
    each = read["weights"]
    held = torch.load(each.file, weights_only=True)
    expected: Any = sequential().state_dict()
    assert (
        same(held, payload_of(each.run)["model_state_dict"])
        and held._metadata == expected._metadata
    )
    assert same(each.kept["model"], held)
    assert "eval()" in each.printed.out


def test_full_is_the_checkpoint_of_the_tutorial(read: dict[str, SimpleNamespace]) -> None:
    each = checked(read["full"])
    held, payload = torch.load(each.file, weights_only=True), payload_of(each.run)
    assert set(held) == {"epoch", "model_state_dict", "optimizer_state_dict", "loss"}
    assert (
        held["epoch"] == payload["epoch"] == each.kept["epoch"]
        and held["loss"] == payload["loss"] == each.kept["loss"]
    )
    assert (
        same(held["optimizer_state_dict"], payload["optimizer_state_dict"])
        and held["optimizer_state_dict"]["state"]
    )
    assert same(each.kept["optimizer"], payload["optimizer_state_dict"])


def test_the_module_comes_with_a_warning_and_needs_its_code(
    read: dict[str, SimpleNamespace],
) -> None:
    each = read["module of a class"]
    assert each.printed.code == 0 and "export_task" in each.error, each.error
    assert (
        "WARNING" in each.printed.out
        and "code" in each.printed.out
        and "--format weights" in each.printed.out
    )
    model = torch.load(each.file, weights_only=False)
    assert type(model) is Net and not any(part.training for part in model.modules())
    close(answers_of(model), answers_of(load_model(str(each.run))))


def test_safetensors_carry_where_they_come_from(read: dict[str, SimpleNamespace]) -> None:
    each = read["safetensors"]
    newest = manifests(each.run)[-1]
    with safetensors.safe_open(each.file, "pt") as opened:
        facts = opened.metadata()
    assert (
        facts["format"] == "pt"
        and facts["run"] == newest.run_id
        and facts["step"] == "6"
        and facts["epoch"] == str(newest.epoch)
    )
    assert float(facts["loss"]) == newest.loss
    assert same(
        safetensors.torch.load_file(each.file), dict(payload_of(each.run)["model_state_dict"])
    )


@pytest.mark.parametrize("format", FORMATS)
def test_one_of_several_modules_is_exported_by_its_name(
    format: str, read: dict[str, SimpleNamespace]
) -> None:
    each = checked(read[f"encoder {format}"])
    expected(load_model(str(each.run), module="encoder"), each)


@pytest.mark.parametrize("format", ["weights", "full"])
def test_several_modules_go_into_one_file(format: str, read: dict[str, SimpleNamespace]) -> None:
    each, payload = checked(read[f"pair {format}"]), payload_of(read["pair weights"].run)
    models = load_model(str(each.run))
    assert list(models) == ["encoder", "head"]
    expected(nn.Sequential(models["encoder"], models["head"]).eval(), each)
    held = torch.load(each.file, weights_only=True)
    states = {"encoder_state_dict", "head_state_dict"}
    whole = states | {"encoder_optimizer_state_dict", "head_optimizer_state_dict"}
    assert set(held) == (states if format == "weights" else whole | {"epoch", "loss"})
    assert all(same(held[key], payload[key]) for key in (states if format == "weights" else whole))


@pytest.mark.parametrize("format", ["module", "safetensors", "torchscript", "exported"])
def test_what_holds_one_module_asks_which_of_several(
    format: str, pair: Path, tmp_path: Path
) -> None:
    words = refused(tmp_path, (78,), pair, tmp_path / "x.pt2", "--format", format)
    assert "encoder, head" in words and "--module" in words
    assert "nobody" in refused(
        tmp_path, (78,), pair, tmp_path / "x.pt2", "--format", format, "--module", "nobody"
    )


# --- programs: TorchScript and torch.export -------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["keyed exported", "pairs exported", "mixed exported", "tied exported"]
)
def test_a_program_of_torch_export_takes_batches_of_any_size(
    name: str, read: dict[str, SimpleNamespace]
) -> None:
    """And arguments by position and by keyword, and returns dicts and tuples."""
    each = checked(read[name])
    model = load_model(str(each.run))
    calls = {
        "keyed": lambda x: model(points=x, scale=x[:, 0]),
        "pairs": lambda x: model(x, x[:, 0]),
        "tied": model,
    }
    calls["mixed"] = lambda x: model(x, scale=x[:, 0])
    assert len(each.answers) == len(each.sizes)
    for size, answer in zip(each.sizes, each.answers, strict=True):
        close(answer, answers_of(calls[name.split()[0]], INPUT[:size]))
    assert "several sizes" in each.printed.out and "deprecated" not in each.printed.out


@pytest.mark.parametrize("name", ["pairs", "mixed", "tied", "traced", "branching"])
def test_torchscript_is_scripted_or_else_traced_and_said_to_be_old(
    name: str, read: dict[str, SimpleNamespace]
) -> None:
    each = checked(read[f"{name} torchscript"])
    model = load_model(str(each.run))
    calls = {"pairs": lambda x: model(x, x[:, 0]), "mixed": lambda x: model(x, scale=x[:, 0])}
    for size, answer in zip(each.sizes, each.answers, strict=True):
        close(answer, answers_of(calls.get(name, model), INPUT[:size]))
    assert "TorchScript is deprecated" in each.printed.out and "exported" in each.printed.out
    assert ("traced" if name in ("mixed", "traced") else "scripted;") in each.printed.out
    back = torch.jit.load(each.file)
    assert not any(part.training for part in back.modules())


def test_a_scripted_branch_is_kept_on_both_sides(read: dict[str, SimpleNamespace]) -> None:
    each = read["branching torchscript"]
    model, back = load_model(str(each.run)), torch.jit.load(each.file)
    x = INPUT[:4].abs()
    for side in (x, -x):
        close(answers_of(back, side), answers_of(model, side))
    assert not torch.allclose(answers_of(model, x), answers_of(model, -x))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sizing", "leaning"])
def test_a_trace_that_answers_another_batch_wrongly_is_not_kept(
    kind: str, runs: Runs, tmp_path: Path
) -> None:
    words = refused(tmp_path, (1, 78), runs(kind), tmp_path / "x.ts", "--format", "torchscript")
    assert "answer" in words


@pytest.mark.parametrize("format", ["torchscript", "exported"])
def test_a_model_that_is_random_cannot_be_checked_and_is_not_kept(
    format: str, runs: Runs, tmp_path: Path
) -> None:
    assert "does not answer as the module does" in refused(
        tmp_path, (1,), runs("random"), tmp_path / "x.pt2", "--format", format
    )


@pytest.mark.slow
def test_a_program_for_one_size_of_batch_says_so(runs: Runs, tmp_path: Path) -> None:
    for format in ("torchscript", "exported"):
        assert (
            "exactly 8" in export(runs("fixed"), tmp_path / f"{format}.pt2", "--format", format).out
        )
    model = load_model(str(runs("fixed")))
    close(
        answers_of(torch.jit.load(tmp_path / "torchscript.pt2"), INPUT[:8]),
        answers_of(model, INPUT[:8]),
    )
    close(
        answers_of(torch.export.load(tmp_path / "exported.pt2").module(), INPUT[:8]),
        answers_of(model, INPUT[:8]),
    )


@pytest.mark.slow
def test_few_held_out_samples_do_not_make_the_batch_size_fixed_unsaid(
    runs: Runs, tmp_path: Path
) -> None:
    told = export(
        runs("net", "task.args.held_out=5"), tmp_path / "x.pt2", "--format", "exported"
    ).out
    loaded = torch.export.load(tmp_path / "x.pt2").module()
    model = load_model(str(runs("net", "task.args.held_out=5")))
    if "several sizes" in told:
        for size in (1, 3, 8):
            close(answers_of(loaded, INPUT[:size]), answers_of(model, INPUT[:size]))
    else:
        assert "exactly 5" in told
        close(answers_of(loaded, INPUT[:5]), answers_of(model, INPUT[:5]))


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("hopeless", "torchscript"),
        ("counting", "torchscript"),
        ("counting", "exported"),
        ("keyed", "torchscript"),
        ("starred", "torchscript"),
        ("tuples", "exported"),
    ],
)
def test_what_cannot_be_a_program_is_refused_in_words(
    kind: str, format: str, runs: Runs, tmp_path: Path
) -> None:
    refused(tmp_path, (1, 78), runs(kind), tmp_path / "x.pt2", "--format", format)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["branching", pytest.param("hopeless", marks=pytest.mark.slow)])
def test_torch_export_refuses_in_a_few_lines(kind: str, runs: Runs, tmp_path: Path) -> None:
    """In a process of its own: torch writes pages to the standard error that it found when it was
    imported."""
    done = run(
        program(
            "export", str(runs(kind)), str(tmp_path / "x.pt2"), "--format", "exported", "--trust"
        ),
        cwd=tmp_path,
    )
    assert done.returncode == 78 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert len(done.stderr.splitlines()) <= 5 and done.stderr.startswith("harness: error: "), (
        done.stderr
    )
    assert "cannot be exported" in done.stderr and "https://docs.pytorch.org" in done.stderr


def test_a_module_that_cannot_be_pickled_is_refused_in_words(runs: Runs, tmp_path: Path) -> None:
    assert "cannot be pickled" in refused(
        tmp_path, (78,), runs("locked"), tmp_path / "x.pt", "--format", "module"
    )
    assert export(runs("locked"), tmp_path / "y.pt").code == 0


CPP = (
    r"""
#include <torch/script.h>
#include <fstream>
#include <iomanip>
#include <iostream>
int main(int count, char** given) {  // INPUT ROWS COLUMNS FILE…
    const int64_t rows = std::stoll(given[2]), columns = std::stoll(given[3]);
    std::vector<float> numbers(rows * columns);
    std::ifstream(given[1], std::ios::binary)"""
    r""".read(reinterpret_cast<char*>(numbers.data()), numbers.size() * sizeof(float));
    torch::NoGradGuard no_grad;
    for (int at = 4; at < count; at++) {
        torch::jit::Module model = torch::jit::load(given[at]);
        const at::Tensor answer = model"""
    r""".forward({torch::from_blob(numbers.data(), {rows, columns})}).toTensor().contiguous();
        std::cout << std::setprecision(9) << model.is_training();
        for (int64_t i = 0; i < answer.numel(); i++) std::cout"""
    r""" << ' ' << answer.data_ptr<float>()[i];
        std::cout << '\n';
    }
}
"""
)


@pytest.mark.slow
def test_torchscript_runs_in_cpp(read: dict[str, SimpleNamespace], tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        assert "CI" not in os.environ, "needs g++"
        pytest.skip("needs g++")
    home = Path(torch.__file__).parent
    (tmp_path / "main.cpp").write_text(CPP)
    flags = [
        f"-I{home}/include",
        f"-I{home}/include/torch/csrc/api/include",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
    ]
    libraries = [
        f"-L{home}/lib",
        f"-Wl,-rpath,{home}/lib",
        "-Wl,--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
    ]
    line = [compiler, "-std=c++20", "-w", *flags, "main.cpp", "-o", "main", *libraries]
    made = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert made.returncode == 0, made.stderr
    names = ("torchscript", "averages torchscript", "traced torchscript", "branching torchscript")
    x = INPUT[:8].contiguous()
    (tmp_path / "input").write_bytes(x.numpy().tobytes())
    files = [str(checked(read[name]).file) for name in names]
    done = subprocess.run(
        [str(tmp_path / "main"), "input", *map(str, x.shape), *files],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for name, printed in zip(names, done.stdout.splitlines(), strict=True):
        training, *numbers = printed.split()
        model = load_model(str(read[name].run), ema=name.startswith("averages"))
        close(
            torch.tensor([float(number) for number in numbers]).view(8, CLASSES),
            answers_of(model, x),
        )
        assert training == "0"


# --- which checkpoint, from where, and to where ---------------------------------------------------


def test_any_checkpoint_of_a_run_can_be_chosen(averaged: Path, tmp_path: Path) -> None:
    """The best is the one with the greatest val_loss, which is the first: so it is not the
    newest."""
    found = {manifest.step: manifest for manifest in manifests(averaged)}
    best = max(found.values(), key=lambda manifest: manifest.metrics["val_loss"])
    assert sorted(found) == [2, 4, 6] and best.step != 6
    for which, step in (("newest", 6), ("best", best.step), ("2", 2), ("4", 4)):
        export(averaged, tmp_path / which, "--which", which)
        held = torch.load(tmp_path / which, weights_only=True)
        assert same(held, payload_of(averaged, step)["model_state_dict"])
        assert same(dict(load_model(str(averaged), which).state_dict()), held)
    for ending in ("pt", "json"):
        export(averaged / f"checkpoints/step_00000004-0001.{ending}", tmp_path / ending)
        assert same(
            torch.load(tmp_path / ending, weights_only=True),
            payload_of(averaged, 4)["model_state_dict"],
        )
    assert not same(
        payload_of(averaged, 4)["model_state_dict"], payload_of(averaged, 6)["model_state_dict"]
    )
    out = tmp_path / "x"
    assert "6, 4, 2" in refused(tmp_path, (78,), averaged, out, "--which", "3")
    assert "newest" in refused(tmp_path, (78,), averaged, out, "--which", "first")
    refused(tmp_path, (78,), averaged / "checkpoints/step_00000004-0001.pt", out, "--which", "best")
    export(tmp_path / "best", tmp_path / "again")
    refused(tmp_path, (78,), tmp_path / "best", out, "--which", "best")


def test_the_library_writes_what_the_command_writes(averaged: Path, tmp_path: Path) -> None:
    words = harness.export(averaged, tmp_path / "a.pt")
    assert (
        words.replace("a.pt", "b.pt") in export(str(averaged), tmp_path / "b.pt").out
        and "model.eval()" in words
    )
    assert same(
        torch.load(tmp_path / "a.pt", weights_only=True),
        torch.load(tmp_path / "b.pt", weights_only=True),
    )
    with pytest.raises(UsageError, match="is there already"):
        harness.export(str(averaged), str(tmp_path / "a.pt"))
    harness.export(str(averaged), str(tmp_path / "a.pt"), "safetensors", which=2, overwrite=True)
    assert same(
        safetensors.torch.load_file(tmp_path / "a.pt"),
        dict(payload_of(averaged, 2)["model_state_dict"]),
    )
    with pytest.raises(UsageError, match="there is no format 'onnx'"):
        harness.export(str(averaged), str(tmp_path / "c.pt"), "onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"], (
        "something temporary was left"
    )


def test_what_is_there_is_replaced_only_by_force_and_only_by_something_whole(
    averaged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "x.pt"
    out.write_text("precious")
    assert "--force" in refused(tmp_path, (78,), averaged, out)
    refused(tmp_path, (78,), averaged, out, "--force", "--which", "5")
    refused(
        tmp_path, (78,), averaged, out, "--force", "--format", "torchscript", "--module", "nobody"
    )
    assert out.read_text() == "precious"
    export(averaged, out, "--force")
    assert same(torch.load(out, weights_only=True), payload_of(averaged)["model_state_dict"])
    assert list(tmp_path.iterdir()) == [out]


def test_a_link_a_pipe_and_a_directory_are_not_replaced_unasked(
    averaged: Path, tmp_path: Path
) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to folder").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")
    for name in ("target", "link", "dangling", "folder", "to folder", "pipe"):
        refused(tmp_path, (78,), averaged, tmp_path / name)
    for name in ("folder", "to folder", "pipe"):
        refused(tmp_path, (78,), averaged, tmp_path / name, "--force")


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("missing/x.pt", "no folder"),
        ("", "directory|file"),
        ("file.txt/x.pt", "no folder"),
        ("s3://bucket", ""),
        ("s3://", ""),
        ("nix://a/b", "nix"),
    ],
)
def test_a_place_that_is_none_is_refused(
    out: str, words: str, averaged: Path, tmp_path: Path
) -> None:
    (tmp_path / "file.txt").write_text("x")
    refused(tmp_path, (78,), averaged, out, words=words)


@pytest.mark.parametrize("name", ['it\'s a "model" \\n.pt', "modèle ☃.pt", "OUT.pt", "a b.pt"])
def test_the_printed_lines_are_right_for_odd_names(
    name: str, averaged: Path, tmp_path: Path
) -> None:
    names: dict[str, Any] = {"torch": torch}
    exec("\n".join(code_in(export(averaged, tmp_path / name).out)), names)
    assert same(dict(names["model"].state_dict()), payload_of(averaged)["model_state_dict"])


def test_a_checkpoint_of_a_run_is_not_overwritten(averaged: Path, tmp_path: Path) -> None:
    shutil.copytree(averaged, tmp_path / "run")
    for file in sorted((tmp_path / "run/checkpoints").iterdir()):
        refused(tmp_path, (78,), averaged, file)
        refused(tmp_path, (78,), averaged, file, "--force")


@pytest.fixture
def cloud(bucket: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """A client and an empty bucket, which this process finds by its environment."""
    server, name = bucket
    server.lend(monkeypatch)
    return server.client(), name


def upload(client: Any, bucket: str, directory: Path, prefix: str) -> str:
    for file in directory.rglob("*"):
        if file.is_file():
            client.put_object(
                Bucket=bucket, Key=f"{prefix}/{file.relative_to(directory)}", Body=file.read_bytes()
            )
    return f"s3://{bucket}/{prefix}"


def keys(client: Any, bucket: str) -> list[str]:
    return [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", [])]


@pytest.mark.slow
def test_it_goes_from_and_to_a_bucket(
    cloud: tuple[Any, str], averaged: Path, tmp_path: Path
) -> None:
    client, bucket = cloud
    home = upload(client, bucket, averaged, "run")
    before = keys(client, bucket)
    weights = payload_of(averaged)["model_state_dict"]

    def held(key: str) -> Any:
        return torch.load(
            io.BytesIO(client.get_object(Bucket=bucket, Key=key)["Body"].read()), weights_only=True
        )

    printed = export(averaged, f"s3://{bucket}/out/model.pt").out
    assert same(held("out/model.pt"), weights) and 'torch.load("model.pt"' in printed
    refused(tmp_path, (78,), averaged, f"s3://{bucket}/out/model.pt", words="--force")
    export(home, f"s3://{bucket}/out/model.pt", "--which", "2", "--force")
    assert same(held("out/model.pt"), payload_of(averaged, 2)["model_state_dict"])
    export(f"{home}/checkpoints/step_00000004-0001.pt", tmp_path / "four.pt")
    assert same(
        torch.load(tmp_path / "four.pt", weights_only=True),
        payload_of(averaged, 4)["model_state_dict"],
    )
    export(f"s3://{bucket}/out/model.pt", tmp_path / "two.safetensors", "--format", "safetensors")
    assert same(
        safetensors.torch.load_file(tmp_path / "two.safetensors"),
        dict(payload_of(averaged, 2)["model_state_dict"]),
    )
    export(averaged, f"s3://{bucket}/out/model.pt2", "--format", "exported")
    data = client.get_object(Bucket=bucket, Key="out/model.pt2")["Body"].read()
    close(
        answers_of(torch.export.load(io.BytesIO(data)).module()), answers_of(load_model(averaged))
    )
    loaded = load_model(home, "best")
    assert same(dict(loaded.state_dict()), dict(load_model(averaged, "best").state_dict()))
    refused(tmp_path, (78,), averaged, "s3://no-such-bucket-here/model.pt", words="no such bucket")
    refused(tmp_path, (74, 78), f"s3://{bucket}/nothing.pt", tmp_path / "x.pt")
    assert sorted(keys(client, bucket)) == sorted(
        [*before, *(f"out/model.{ending}" for ending in ("pt", "pt2"))]
    )


def with_remote(directory: Path, remote: Path | str) -> None:
    """Let a run directory remember a store elsewhere, which is a plain directory here."""
    record = directory / "attempts" / "0001.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"remote": str(remote)}))


@pytest.fixture
def halves(averaged: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A run whose directory was left behind at step 2, and whose remote store has the rest."""
    here, remote = tmp_path / "here", tmp_path / "remote"
    shutil.copytree(averaged, here)
    shutil.copytree(averaged, remote)
    for file in (here / "checkpoints").iterdir():
        if "00000002" not in file.name:
            file.unlink()
    for file in (remote / "checkpoints").glob("*00000002*"):
        file.unlink()
    with_remote(here, remote)
    return here, remote


def test_what_is_newest_may_be_in_the_remote_store(
    halves: tuple[Path, Path], averaged: Path, tmp_path: Path
) -> None:
    here, remote = halves
    out = tmp_path / "x.pt"

    def held() -> object:
        return torch.load(out, weights_only=True)

    assert str(remote) in export(here, out).out
    assert same(held(), payload_of(averaged, 6)["model_state_dict"])
    best = load_model(here, "best").state_dict()
    assert same(dict(best), dict(load_model(averaged, "best").state_dict()))
    assert f"{here}/checkpoints" in export(here, out, "--which", "2", "--force").out
    assert same(held(), payload_of(averaged, 2)["model_state_dict"])
    assert str(harness.describe(here, 4).where).startswith(str(remote))
    assert harness.compare(here, averaged).count == 0
    assert command("import", here, tmp_path / "fork", "--dry-run").code == 0
    loaded = harness.load_weights(sequential(), here)
    assert f"{remote}/checkpoints/step_00000006" in loaded


def test_an_export_follows_a_rollback(averaged: Path, tmp_path: Path) -> None:
    here, remote, out = tmp_path / "here", tmp_path / "remote", tmp_path / "x.pt"
    shutil.copytree(averaged, here)
    shutil.copytree(averaged, remote)
    with_remote(here, remote)
    assert command("rollback", here, "2").code == 0
    export(here, out)
    assert same(torch.load(out, weights_only=True), payload_of(averaged, 2)["model_state_dict"])


def test_data_that_is_gone_from_the_directory_comes_from_the_remote_store(
    averaged: Path, tmp_path: Path
) -> None:
    here, remote, out = tmp_path / "here", tmp_path / "remote", tmp_path / "x.pt"
    shutil.copytree(averaged, here)
    shutil.copytree(averaged, remote)
    with_remote(here, remote)
    (here / "checkpoints" / "step_00000006-0001.pt").unlink()
    export(here, out)
    assert same(torch.load(out, weights_only=True), payload_of(averaged, 6)["model_state_dict"])


@pytest.mark.parametrize("remote", ["{0}/file", "nosuch://bucket/run"])
def test_without_the_remote_store_no_checkpoint_is_taken_for_the_newest(
    remote: str, halves: tuple[Path, Path], averaged: Path, tmp_path: Path
) -> None:
    """It may hold a newer one, or a rollback. One that is named by its file is taken."""
    here, _ = halves
    (tmp_path / "file").touch()
    with_remote(here, remote.format(tmp_path))
    out, file = tmp_path / "x.pt", here / "checkpoints" / "step_00000002-0001.pt"
    for line in (
        ("export", here, out),
        ("show", here),
        ("import", here, tmp_path / "fork"),
        ("diff", here, averaged),
    ):
        answer = command(*line)
        assert answer.code == 74 and f"only {here} can be read" in answer.err, answer.err
        assert f"{here}/checkpoints/NAME.pt" in answer.err
    export(file, out)
    held = torch.load(out, weights_only=True)
    assert same(held, payload_of(averaged, 2)["model_state_dict"])


@pytest.mark.parametrize("remote", ["{0}/file", "nosuch://bucket/run"])
def test_without_the_remote_store_no_run_is_said_to_be_finished(
    remote: str, averaged: Path, tmp_path: Path
) -> None:
    here = tmp_path / "here"
    shutil.copytree(averaged, here)
    (tmp_path / "file").touch()
    assert command("status", here).code == 0
    with_remote(here, remote.format(tmp_path))
    answer = command("status", here)
    assert answer.code == 74 and "cannot tell (finished by the run directory alone" in answer.out
    assert f"warning: only what is in {here}" in answer.err
    assert "step_00000006-0001" in answer.out
    assert json.loads(command("status", here, "--json").out)["state"] == "cannot tell"


# --- whole or not at all --------------------------------------------------------------------------

# What a full disk has stopped before its end.
ROOMY = ("weights", "full", "module", "safetensors", "exported")


@pytest.mark.parametrize("room_kb", [0, 1, 100, 600, 900])
def test_a_full_disk_leaves_nothing_and_is_said_in_words(
    room_kb: int, small_disk: Path, tmp_path: Path
) -> None:
    """The file takes 480 kB: with some room the temporary file is cut short, with more of it
    perhaps its copy."""
    torch.save({"weight": torch.randn(120_000)}, tmp_path / "big.pt")
    ballast = fill(small_disk)
    os.truncate(ballast, ballast.stat().st_size - 1024 * room_kb)
    for format, *more in (("weights",), ("weights", "--legacy"), ("safetensors",)):
        out = small_disk / "out.pt"
        answer = command("export", tmp_path / "big.pt", out, "--format", format, *more)
        if answer.code == 0:
            assert room_kb >= 500 and torch.equal(
                harness_weights(out)["weight"], torch.load(tmp_path / "big.pt")["weight"]
            )
            out.unlink()
        else:
            assert (
                answer.code in (1, 74, 78)
                and "Traceback" not in answer.err
                and re.search("(?i)space|full", answer.err)
            ), answer.err
        assert list(small_disk.iterdir()) == [ballast]


def harness_weights(file: Path) -> dict[str, torch.Tensor]:
    with contextlib.suppress(safetensors.SafetensorError):
        return safetensors.torch.load_file(file)
    return torch.load(file, weights_only=True)


DISK = """
import sys
from harness import cli
run, disk, *formats = sys.argv[1:]
for format in formats:
    print(
        format,
        cli.main(["export", run, f"{disk}/{format}.pt2", "--format", format, "--trust"]),
        flush=True,
    )
"""


@pytest.mark.slow
@pytest.mark.parametrize("is_full", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_full_disk_stops_no_format_other_than_in_words(
    is_full: bool, runs: Runs, small_disk: Path, tmp_path: Path
) -> None:
    """Full from the start, or too small. In a process of its own: torch's own writers can end
    one."""
    source = runs("net", "task.args.width=60000", "train.max_steps=1")
    ballast = fill(small_disk) if is_full else None
    done = run([sys.executable, "-c", DISK, str(source), str(small_disk), *FORMATS], cwd=tmp_path)
    codes = dict(line.split() for line in done.stdout.splitlines() if line.split()[0] in FORMATS)
    assert done.returncode == 0 and set(codes) == set(FORMATS), done.stdout + done.stderr
    assert set(codes.values()) <= {"1", "74", "78"} and "Traceback" not in done.stderr, (
        done.stdout + done.stderr
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("harness: error: ")]
    assert len(errors) == len(FORMATS) and len(
        re.findall("(?i)no space left|disk is full", done.stderr)
    ) >= len(FORMATS), done.stderr
    assert list(small_disk.iterdir()) == ([ballast] if ballast else [])


def sizes(folder: Path) -> list[int]:
    """Of the files in a folder that are larger than a megabyte."""
    return [path.stat().st_size for path in folder.iterdir() if path.stat().st_size > 1 << 20]


def torn(file: Path, wanted: torch.Tensor) -> bool:
    return not torch.equal(harness_weights(file)["weight"], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["weights", "safetensors"])
@pytest.mark.parametrize("force", [False, True])
def test_a_killed_export_leaves_nothing_or_all_of_it(
    format: str, force: bool, tmp_path: Path
) -> None:
    """Killed at some time after its temporary file has appeared; what was there before stays until
    something whole is in its place."""
    chance = random.Random(f"{format} {force}")
    new, old = torch.randn(20_000_000), torch.randn(1000)
    torch.save({"weight": new}, tmp_path / "source.pt")
    seen: dict[str, int] = {}
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        out = folder / "out"
        if force:
            torch.save({"weight": old}, out)
        line = [
            "export",
            str(tmp_path / "source.pt"),
            str(out),
            "--format",
            format,
            *(["--force"] if force else []),
        ]
        process = start(program(*line), cwd=tmp_path)
        before = set(folder.iterdir())

        def has_begun(
            folder: Path = folder,
            before: set[Path] = before,
            process: subprocess.Popen[str] = process,
        ) -> bool:
            return set(folder.iterdir()) != before or process.poll() is not None

        wait_until(has_begun, "a file", every_s=0.001)
        time.sleep(chance.random() * 0.8)
        process.kill()
        process.communicate()
        if not out.exists():
            assert not force
            seen["nothing"] = seen.get("nothing", 0) + 1
        elif force and not torn(out, old):
            seen["the old one"] = seen.get("the old one", 0) + 1
        else:
            assert not torn(out, new)
            seen["the new one"] = seen.get("the new one", 0) + 1
        if "the new one" not in seen:
            answer = command("export", *line[1:])
            assert answer.code == 0 and not torn(out, new), "what a killed one left is in the way"
        shutil.rmtree(folder)
    assert ("the old one" if force else "nothing") in seen, f"never killed in the middle: {seen}"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_export_leaves_no_torn_file(number: signal.Signals, tmp_path: Path) -> None:
    torch.save({"weight": torch.randn(20_000_000)}, tmp_path / "source.pt")
    out = tmp_path / "out"
    out.mkdir()
    process = start(program("export", str(tmp_path / "source.pt"), str(out / "x.pt")), cwd=tmp_path)
    try:
        wait_until(
            lambda: sizes(out) or process.poll() is not None,
            "a temporary file with something in it",
            every_s=0.001,
        )
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        kill_tree(process.pid)
    assert not (out / "x.pt").exists() or process.returncode == 0
    if number == signal.SIGINT and process.returncode:
        assert process.returncode == 130 and "Traceback" not in err and list(out.iterdir()) == []


# --- load_model -----------------------------------------------------------------------------------


def test_what_a_checkpoint_names_as_its_task_is_called_only_if_it_is_one(
    averaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(averaged, tmp_path / "theirs")
    store = LocalStore(tmp_path / "theirs")
    found = read_catalog(store)
    payload = load.load(store, there(found.head))
    attempt = attempts.claim(found, found.head, 1)
    about = commit.About(1, going_on_from(found.head), there(found.head).classes, "digest")
    for name, args in (
        ("torch.hub:load", {"repo_or_dir": "x", "model": "y"}),
        ("os:mkdir", {"path": str(tmp_path / "sprung")}),
        ("export_task:build", {"kind": "net"}),
    ):
        payload["step"], payload["config"]["task"] = (
            payload["step"] + 1,
            {"name": name, "args": args},
        )
        commit.commit(store, attempt, payload, about)
        with pytest.raises(UsageError, match=f"{name}'?, which the file names as its task"):
            harness.load_model(tmp_path / "theirs")
    assert (
        cli.main(["export", str(tmp_path / "theirs"), str(tmp_path / "x.pt"), "--format", "module"])
        == 78
    )
    assert "is not run unasked" in capsys.readouterr().err
    assert not (tmp_path / "sprung").exists() and not (tmp_path / "x.pt").exists()


def test_a_model_is_loaded_ready_for_use(averaged: Path) -> None:
    model = load_model(str(averaged))
    payload = payload_of(averaged)
    assert isinstance(model, nn.Sequential) and not any(part.training for part in model.modules())
    assert same(dict(model.state_dict()), payload["model_state_dict"])
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert torch.equal(answers_of(model), answers_of(model))
    assert same(
        dict(load_model(averaged, 2).state_dict()), payload_of(averaged, 2)["model_state_dict"]
    )
    assert same(
        dict(load_model(averaged, "2", ema=True).state_dict()),
        payload_of(averaged, 2)["ema_state_dict"],
    )
    assert same(
        dict(load_model(averaged, module="model").state_dict()), payload["model_state_dict"]
    )
    own = sequential().train()
    assert load_model(averaged, "best", into=own) is own and not own.training
    best = max(manifests(averaged), key=lambda manifest: manifest.metrics["val_loss"]).step
    assert same(dict(own.state_dict()), payload_of(averaged, best)["model_state_dict"])
    assert same(
        dict(load_model(averaged, ema=True, into=sequential()).state_dict()),
        payload["ema_state_dict"],
    )


def test_several_modules_are_loaded_by_their_names(pair: Path) -> None:
    payload = payload_of(pair)
    models = load_model(str(pair))
    assert list(models) == ["encoder", "head"] and not any(
        part.training for model in models.values() for part in model.modules()
    )
    assert all(
        same(dict(model.state_dict()), payload[f"{name}_state_dict"])
        for name, model in models.items()
    )
    for name, model in load_model(str(pair), ema=True).items():
        assert same(dict(model.state_dict()), payload[f"{name}_ema_state_dict"])
        assert not same(payload[f"{name}_ema_state_dict"], payload[f"{name}_state_dict"])
    assert same(dict(load_model(str(pair), module="head").state_dict()), payload["head_state_dict"])
    own = nn.Linear(8, CLASSES)
    assert load_model(str(pair), module="head", into=own) is own and same(
        dict(own.state_dict()), payload["head_state_dict"]
    )
    with pytest.raises(UsageError, match="'nobody'"):
        load_model(str(pair), module="nobody")


def test_a_module_without_state_is_one_of_several(runs: Runs, tmp_path: Path) -> None:
    source = runs("pair", "task.args.flatten=true", task="export_task:build_pair")
    models = load_model(str(source))
    assert list(models) == ["encoder", "head"] and isinstance(models["head"], nn.Flatten)
    assert same(dict(models["encoder"].state_dict()), payload_of(source)["encoder_state_dict"])


def test_a_module_of_the_users_own_may_be_called_an_average(runs: Runs, tmp_path: Path) -> None:
    """A mean teacher, which is not what train.ema_decay keeps."""
    source = runs("pair", "task.args.names=student,student_ema", task="export_task:build_pair")
    payload = payload_of(source)
    models = load_model(str(source))
    assert all(
        same(dict(models[name].state_dict()), payload[f"{name}_state_dict"])
        for name in ("student", "student_ema")
    )
    export(source, tmp_path / "x.pt")
    assert set(torch.load(tmp_path / "x.pt", weights_only=True)) == {
        "student_state_dict",
        "student_ema_state_dict",
    }


def test_names_that_begin_like_those_of_a_shell_are_the_models_own(
    runs: Runs, tmp_path: Path
) -> None:
    source = runs("shell")
    model = load_model(str(source))
    assert same(dict(model.state_dict()), payload_of(source)["model_state_dict"])
    for format in ("weights", "safetensors", "exported"):
        export(source, tmp_path / f"{format}.pt2", "--format", format)
    assert same(
        torch.load(tmp_path / "weights.pt2", weights_only=True),
        payload_of(source)["model_state_dict"],
    )
    assert set(safetensors.torch.load_file(tmp_path / "safetensors.pt2")) == set(model.state_dict())


def test_tied_weights_stay_tied(runs: Runs, tmp_path: Path) -> None:
    model = load_model(str(runs("tied")))
    assert model.inward.weight is model.outward.weight
    export(runs("tied"), tmp_path / "x.safetensors", "--format", "safetensors")
    held = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert set(held) == set(model.state_dict()) and torch.equal(
        held["inward.weight"], held["outward.weight"]
    )
    export(runs("tied"), tmp_path / "x.pt")
    read = torch.load(tmp_path / "x.pt", weights_only=True)
    assert read["inward.weight"].data_ptr() == read["outward.weight"].data_ptr()
    for state_dict in (held, read):
        other = Tied().eval()
        other.load_state_dict(state_dict)
        close(answers_of(other), answers_of(model))


def test_state_beside_the_tensors_goes_along_or_is_refused(runs: Runs, tmp_path: Path) -> None:
    export(runs("odd"), tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True)["_extra_state"] == {"version": 3}
    assert same(
        dict(load_model(str(runs("odd"))).state_dict()), payload_of(runs("odd"))["model_state_dict"]
    )
    assert "_extra_state" in refused(
        tmp_path, (78,), runs("odd"), tmp_path / "x.safetensors", "--format", "safetensors"
    )


def left_by_training(directory: Path) -> Annealed:
    """The model as it was at the end of a run, put together by hand from its checkpoint."""
    payload, model = payload_of(directory), Annealed()
    model.load_state_dict(payload["model_state_dict"])
    kept = payload["attributes"]["model"]
    model.tau, model.squeeze.by = kept[""]["tau"]["now"], kept["squeeze"]["by"]["now"]
    model.scale = kept[""]["buffer scale"]["now"]
    assert model.tau < 0.2 and model.squeeze.by < 0.3 and model.scale[0] < 0.1
    model.eval()
    return model


def test_what_training_changed_beside_the_weights_is_in_the_model(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = runs("annealed")
    wanted = answers_of(left_by_training(source))
    assert torch.equal(answers_of(load_model(str(source))), wanted)
    assert torch.equal(answers_of(load_model(str(source), into=Annealed())), wanted)
    copied = shutil.copy(next(source.glob("checkpoints/*6-0001.pt")), tmp_path / "copied.pt")
    assert torch.equal(answers_of(load_model(copied)), wanted)
    assert "annealed" not in capsys.readouterr().err
    for format, loads in {
        "module": lambda path: torch.load(path, weights_only=False),
        "torchscript": torch.jit.load,
        "exported": lambda path: torch.export.load(path).module(),
    }.items():
        out = tmp_path / f"{format}.pt2"
        assert "in no state dict" not in export(source, out, "--format", format).out
        close(answers_of(loads(out)), wanted)


def test_of_what_differs_by_rank_the_first_ranks_is_in_the_model(
    runs: Runs, tmp_path: Path
) -> None:
    """Whose state dict it is too."""
    payload = payload_of(runs("annealed"))
    first = {"attributes": payload.pop("attributes")}
    payload["own"] = [first, {"attributes": {"model": {"": {"tau": {"built": 1.0, "now": 9.0}}}}}]
    torch.save(payload, tmp_path / "of two ranks.pt")
    wanted = answers_of(left_by_training(runs("annealed")))
    model = load_model(tmp_path / "of two ranks.pt", into=Annealed())
    assert torch.equal(answers_of(model), wanted)


def test_a_module_that_is_built_otherwise_keeps_its_own_and_is_told(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Annealed()
    other.tau = 3.0
    model = load_model(str(runs("annealed")), into=other)
    assert model.tau == 3.0 and model.squeeze.by < 0.3
    assert "model.tau was built as 1.0 and had become 0.1" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["weights", "full", "safetensors"])
def test_a_file_of_weights_names_what_it_cannot_hold(
    format: str, runs: Runs, tmp_path: Path
) -> None:
    said = export(runs("annealed"), tmp_path / "x", "--format", format).out
    (line,) = [line for line in said.splitlines() if "not in the file" in line]
    for name in ("model", "tau = 0.1", "scale = a tensor (3,)", "squeeze.by = 0.2"):
        assert name in line
    plain = export(runs("net"), tmp_path / "plain", "--format", format).out
    assert "not in the file" not in plain


def test_loaded_weights_name_what_is_not_among_them(runs: Runs) -> None:
    assert "tau = 0.1" in harness.load_weights(Annealed(), str(runs("annealed")))
    assert "in no state dict" not in harness.load_weights(Net(), str(runs("net")))


def test_an_average_has_the_buffers_of_the_run_and_its_own_attributes(
    runs: Runs, tmp_path: Path
) -> None:
    source = runs("annealed", "train.ema_decay=0.5")
    model = load_model(str(source), ema=True)
    assert torch.equal(model.scale, left_by_training(source).scale)
    assert model.tau == 1.0  # as in every evaluation of the average
    said = export(source, tmp_path / "x", "--ema").out
    assert "scale = a tensor" in said and "tau" not in said


def own_loop(directory: Path, **options: Any) -> Path:
    """A run without a task."""
    with undone(), contextlib.redirect_stdout(io.StringIO()):
        run_ = harness.init(directory, **options)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters())
        run_.track(model=model, optimizer=optimizer)
        for x, y in run_.batches(samples(24), 8, epochs=1):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return directory


@pytest.mark.parametrize("config", [None, {"lr": 0.1, "task": "spirals"}])
def test_a_loop_of_its_own_gives_its_model_into_a_module(
    config: dict[str, Any] | None, tmp_path: Path
) -> None:
    source = own_loop(tmp_path / "run", config=config)
    weights = payload_of(source)["model_state_dict"]
    assert same(dict(load_model(str(source), into=Net()).state_dict()), weights)
    with pytest.raises(UsageError, match="into="):
        load_model(str(source))
    out = tmp_path / "out"
    out.mkdir()
    export(source, out / "weights.pt")
    assert same(torch.load(out / "weights.pt", weights_only=True), weights)
    assert "task.name" in refused(out, (78,), source, out / "x.pt2", "--format", "exported")
    export(
        source,
        out / "x.pt2",
        "--format",
        "exported",
        "task.name=export_task:build",
        "task.args.kind=net",
    )
    close(
        answers_of(torch.export.load(out / "x.pt2").module()),
        answers_of(load_model(str(source), into=Net())),
    )


def test_a_module_that_does_not_fit_is_refused_unchanged(averaged: Path) -> None:
    for other in (sequential(8), Net(), nn.Linear(2, 2)):
        before = {key: value.clone() for key, value in other.state_dict().items()}
        with pytest.raises(UsageError, match=r"mis-shaped|missing"):
            load_model(str(averaged), into=other)
        assert same(dict(other.state_dict()), before)


def test_the_callers_generators_are_not_disturbed(
    runs: Runs, averaged: Path, tmp_path: Path
) -> None:
    def drawn() -> tuple[object, ...]:
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.normal(),
            random.random(),
            random.gauss(0, 1),
        )

    begun = state.rng_state()
    wanted = drawn()
    for what in (
        lambda: load_model(str(averaged)),
        *[
            lambda format=format: harness.export(
                str(averaged), str(tmp_path / f"{format}.pt2"), format, trust=True
            )
            for format in FORMATS
        ],
        lambda: command("export", runs("random"), tmp_path / "x.ts", "--format", "torchscript"),
        lambda: command("export", runs("random"), tmp_path / "x.pt2", "--format", "exported"),
        lambda: harness.describe(str(averaged)),
        lambda: harness.compare(str(averaged), str(averaged)),
    ):
        runs("random")
        state.set_rng_state(begun)
        what()
        assert drawn() == wanted


def test_nothing_of_the_process_is_changed(averaged: Path, tmp_path: Path) -> None:
    def settings() -> tuple[object, ...]:
        return (
            torch.is_grad_enabled(),
            torch.get_default_dtype(),
            torch.get_num_threads(),
            sys.argv,
            os.getcwd(),
            signal.getsignal(signal.SIGTERM),
        )

    before = settings()
    load_model(str(averaged))
    harness.export(str(averaged), str(tmp_path / "x.pt2"), "exported", trust=True)
    assert settings() == before and not dist.is_initialized()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_refused(how: str, averaged: Path, tmp_path: Path) -> None:
    shutil.copytree(averaged, tmp_path / "run")
    file = sorted((tmp_path / "run/checkpoints").glob("*.pt"))[-1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink() if how == "gone" else file.write_bytes(data if how == "flipped" else data[:-100])
    with pytest.raises(DamagedError):
        load_model(str(tmp_path / "run"))
    for source in (tmp_path / "run", file.with_suffix(".json") if how == "gone" else file):
        refused(tmp_path, (1,), source, tmp_path / "x.pt")
    export(tmp_path / "run", tmp_path / "x.pt", "--which", "4")


# --- while training goes on -----------------------------------------------------------------------


def test_the_best_model_stays_as_it_was_while_training_goes_on(tmp_path: Path) -> None:
    """A state dict refers to the live weights: whoever keeps one without copying it has the newest
    weights in the end, not the best."""
    torch.manual_seed(0)
    scores = {1: 0.5, 2: 0.9, 3: 0.4, 4: 0.3, 5: 0.2, 6: 0.1}
    run_ = harness.init(
        tmp_path / "run",
        save_every_s=None,
        save_every_steps=1,
        best="score:max",
        keep_last=1,
        keep_best=1,
    )
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    run_.track(model=model, optimizer=optimizer)
    places = {
        name: (p.data_ptr(), p.device, p.requires_grad) for name, p in model.named_parameters()
    }
    moments: dict[int, dict[str, torch.Tensor]] = {}
    data, exported = None, tmp_path / "best.pt"
    for x, y in run_.batches(samples(48), 8, epochs=1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        moments[run_.step] = {key: value.clone() for key, value in model.state_dict().items()}
        run_.evaluate(
            samples(8), lambda batch: {"score": scores[run_.step] * len(batch[0])}, batch_size=8
        )
        if run_.step == 4:
            wait_until(
                lambda: "step_00000002" in (run_.best_checkpoint() or ""), "the best one's save"
            )
            best = Path(run_.best_checkpoint() or "")
            wait_until(best.with_suffix(".json").exists, "its manifest")
            data = best.read_bytes()
            other, mode, generators = Net(), model.training, state.rng_state()
            harness.export(str(tmp_path / "run"), str(exported), which="best")
            held = load_model(str(tmp_path / "run"), "best", into=other)
            assert model.training == mode and same(generators, state.rng_state())
            assert same(dict(model.state_dict()), moments[4]), (
                "loading the best one changed the one that is trained"
            )
    assert run_.finished and data is not None and best.read_bytes() == data
    assert not same(moments[2], moments[6])
    for found in (
        payload_of(tmp_path / "run", 2)["model_state_dict"],
        torch.load(exported, weights_only=True),
        held.state_dict(),
    ):
        assert same(dict(found), moments[2])
    assert same(
        dict(load_model(str(tmp_path / "run"), "best", into=Net()).state_dict()), moments[2]
    )
    assert same(payload_of(tmp_path / "run")["model_state_dict"], moments[6])
    now = {name: (p.data_ptr(), p.device, p.requires_grad) for name, p in model.named_parameters()}
    assert now == places, "saving, evaluating or exporting has moved the live model"


# --- other people's files -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """Files as scripts write them, of one model."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(7)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    F.cross_entropy(model(INPUT), samples(48).tensors[1]).backward()
    optimizer.step()
    weights = model.state_dict()
    whole = {
        "epoch": 3,
        "state_dict": {f"module.{k}": v for k, v in weights.items()},
        "optimizer": optimizer.state_dict(),
        "loss": 0.5,
    }
    torch.save(weights, folder / "bare.pth")
    torch.save(weights, folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(whole, folder / "wrapped.tar")
    torch.save(model, folder / "whole.pth")
    safetensors.torch.save_file(weights, folder / "bare.safetensors")
    torch.jit.save(torch.jit.script(model), folder / "script.pt")
    return folder, model.eval()


NAMES = ("bare.pth", "old.pth", "wrapped.tar", "bare.safetensors", "script.pt")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_somebody_elses_becomes_what_is_asked_for(
    name: str, foreign: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    folder, model = foreign
    weights = dict(model.state_dict())
    export(folder / name, tmp_path / "a.pt")
    export(folder / name, tmp_path / "b.safetensors", "--format", "safetensors")
    export(folder / name, tmp_path / "c.pt", "--legacy")
    for held in (
        torch.load(tmp_path / "a.pt"),
        safetensors.torch.load_file(tmp_path / "b.safetensors"),
        torch.load(tmp_path / "c.pt"),
    ):
        assert same(dict(held), weights)
    assert safetensors.safe_open(tmp_path / "b.safetensors", "pt").metadata()["format"] == "pt"
    for format in ("module", "torchscript", "exported"):
        assert "task.name" in refused(
            tmp_path, (78,), folder / name, tmp_path / "x.pt2", "--format", format
        )
    export(
        folder / name,
        tmp_path / "d.pt2",
        "--format",
        "exported",
        "task.name=export_task:build",
        "task.args.kind=net",
    )
    close(answers_of(torch.export.load(tmp_path / "d.pt2").module()), answers_of(model))


def test_the_task_of_a_file_stands_in_a_file_of_settings_too(
    foreign: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    folder, model = foreign
    (tmp_path / "my.yaml").write_text("task: {name: 'export_task:build', args: {kind: net}}\n")
    export(folder / "bare.pth", tmp_path / "x.ts", "--format", "torchscript", "--config", "my.yaml")
    close(answers_of(torch.jit.load(tmp_path / "x.ts")), answers_of(model))


def test_a_full_export_of_somebody_elses_checkpoint(
    foreign: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    folder, model = foreign
    export(folder / "wrapped.tar", tmp_path / "x.pt", "--format", "full")
    held = torch.load(tmp_path / "x.pt", weights_only=True)
    assert (held["epoch"], held["loss"]) == (3, 0.5) and same(
        dict(held["model_state_dict"]), dict(model.state_dict())
    )
    assert same(
        held["optimizer_state_dict"],
        torch.load(folder / "wrapped.tar", weights_only=True)["optimizer"],
    )
    assert "optimizer" in refused(
        tmp_path, (78,), folder / "bare.pth", tmp_path / "y.pt", "--format", "full"
    )


def test_a_pickled_module_is_opened_only_on_trust(
    foreign: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    folder, model = foreign
    for format in FORMATS:
        answer = command("export", folder / "whole.pth", tmp_path / "x.pt2", "--format", format)
        assert answer.code == 78 and "--trust" in answer.err and not contents(tmp_path)
    export(folder / "whole.pth", tmp_path / "x.pt", "--trust")
    assert same(dict(torch.load(tmp_path / "x.pt", weights_only=True)), dict(model.state_dict()))


def test_tensors_of_all_kinds_come_through(tmp_path: Path) -> None:
    base, ones = torch.arange(12.0), torch.ones(3)
    held = {
        "half": ones.bfloat16(),
        "small": ones.to(torch.float8_e4m3fn),
        "complex": ones.to(torch.complex64),
        "double": ones.double(),
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.0),
        "count": torch.tensor(7),
        "nan": torch.tensor([float("nan"), -0.0]),
        "spread": torch.ones(1, 4).expand(3, 4),
        "turned": base.view(3, 4).T,
        "part": base[2:5],
        "again": base,
        "parameter": nn.Parameter(torch.ones(2)),
    }
    torch.save(held, tmp_path / "odd.pth")
    export(tmp_path / "odd.pth", tmp_path / "a.pt")
    export(tmp_path / "odd.pth", tmp_path / "b.safetensors", "--format", "safetensors")
    for found in (
        torch.load(tmp_path / "a.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "b.safetensors"),
    ):
        assert same(
            {key: value.detach() for key, value in found.items()},
            {key: value.detach() for key, value in held.items()},
        )


def test_a_sparse_tensor_is_exported_or_refused_in_words(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2), "graph": torch.eye(3).to_sparse()}, tmp_path / "a.pth")
    export(tmp_path / "a.pth", tmp_path / "b.pth")
    assert torch.equal(
        torch.load(tmp_path / "b.pth", weights_only=True)["graph"].to_dense(), torch.eye(3)
    )
    refused(tmp_path, (78,), tmp_path / "a.pth", tmp_path / "c.pth", "--format", "safetensors")
    assert command("diff", tmp_path / "a.pth", tmp_path / "b.pth").code == 0


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ema", "--format", "full"), "their average"),
        (("--legacy", "--format", "safetensors"), "older"),
        (("--legacy", "--format", "torchscript"), "older"),
        (("--legacy", "--format", "exported"), "older"),
        (("--module", "nobody"), "'nobody'.*\n.*model"),
        (("--format", "module", "task.name=nowhere:build"), "no module nowhere"),
        (("--format", "module", "task.name=export_task:nothing"), "no callable 'nothing'"),
        (("--format", "module", "task.name=export_task:build", "task.args.colour=3"), "colour"),
        (("--format", "module", "task.nam=export_task:build"), "Did you mean task.name"),
        (("--format", "exported", "--config", "nowhere.yaml"), "no such file"),
        (("--format", "module", "task.name=export_task:build", "task.args.width=8"), "mis-shaped"),
        (("--format", "exported", "task.name=export_task:build", "task.args.kind=net"), "missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_words(
    arguments: tuple[str, ...], words: str, averaged: Path, tmp_path: Path
) -> None:
    refused(tmp_path, (78,), averaged, tmp_path / "x.pt2", *arguments, words=words)


def test_a_run_without_averages_has_none_to_export(runs: Runs, tmp_path: Path) -> None:
    assert "train.ema_decay" in refused(tmp_path, (78,), runs("net"), tmp_path / "x.pt", "--ema")
    with pytest.raises(UsageError, match="no averaged weights"):
        load_model(str(runs("net")), ema=True)


def test_files_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    (tmp_path / "text.pt").write_text("hello\n" * 100)
    torch.save(list(Net().parameters()), tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "number.pt")
    torch.save(Net().state_dict(), tmp_path / "cut.pt")
    os.truncate(tmp_path / "cut.pt", 1500)
    (tmp_path / "folder").mkdir()
    for name, code in (
        ("empty.pt", 1),
        ("text.pt", 78),
        ("list.pt", 78),
        ("number.pt", 78),
        ("cut.pt", 1),
        ("folder", 78),
        ("gone.pt", 78),
    ):
        refused(tmp_path, (code,), tmp_path / name, tmp_path / "out.pt")


@pytest.mark.parametrize("line", [("--format", "onnx"), ("--which",), ("--nonsense",), ()])
def test_a_wrong_command_line_ends_with_78(
    line: tuple[str, ...], averaged: Path, tmp_path: Path
) -> None:
    answer = command("export", averaged, *([tmp_path / "x.pt"] if line else []), *line)
    assert answer.code == 78 and "error" in answer.err and list(tmp_path.iterdir()) == []


TASK = """
import export_task

def build({arguments}):
    return export_task.build(kind="net", width={width})
"""


@pytest.mark.parametrize(
    "change",
    [
        "gone",
        "other shapes",
        *(
            pytest.param(change, marks=pytest.mark.slow)
            for change in ("other arguments", "broken", "other module")
        ),
    ],
)
def test_code_that_has_changed_since_is_told_and_the_weights_are_still_given(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out = tmp_path / "code", tmp_path / "out"
    code.mkdir()
    out.mkdir()
    monkeypatch.chdir(code)
    name = f"changing_{change.replace(' ', '_')}"
    file = code / f"{name}.py"
    file.write_text(TASK.format(arguments="depth=1", width=16))
    source = trained(tmp_path / "run", "task.args.depth=2", task=f"{name}:build")
    weights = payload_of(source)["model_state_dict"]
    del sys.modules[name]
    shutil.rmtree(code / "__pycache__", ignore_errors=True)
    if change == "gone":
        file.unlink()
    else:
        later = {
            "other shapes": ("depth=1", 8),
            "other arguments": ("layers=1", 16),
            "broken": ("depth=1", 16),
            "other module": ("depth=1", 16),
        }
        arguments, width = later[change]
        text = TASK.format(arguments=arguments, width=width)
        text = (
            text.replace("import export_task", "import export_task, nowhere_to_be_found")
            if change == "broken"
            else text
        )
        file.write_text(
            text.replace('"net"', '"tied"').replace(f", width={width}", "")
            if change == "other module"
            else text
        )
    importlib.invalidate_caches()
    wanted = {
        "gone": "there is no module",
        "other shapes": "mis-shaped",
        "other arguments": "depth",
        "broken": "nowhere_to_be_found",
        "other module": "missing",
    }
    try:
        for format in ("module", "torchscript", "exported"):
            refused(out, (78,), source, out / "x.pt2", "--format", format, words=wanted[change])
        with pytest.raises(UsageError, match=wanted[change]):
            load_model(str(source))
        for format in ("weights", "safetensors", "full"):
            export(source, out / format, "--format", format)
        assert same(torch.load(out / "weights", weights_only=True), weights)
    finally:
        sys.modules.pop(name, None)


def test_a_task_that_never_calls_the_module_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells what goes into it."""
    text = (
        "import export_task, torch\nfrom harness import Task\n\n"
        "def build():\n    job = export_task.build(kind='net')\n"
    )
    text += (
        "    return Task(modules=job.modules, optimizers=job.optimizers, "
        "train_data=job.train_data, loss=lambda m, b: m.body(b[0]).sum())\n"
    )
    (tmp_path / "silent_task.py").write_text(text)
    torch.save(Net().state_dict(), tmp_path / "bare.pth")
    for format in ("torchscript", "exported"):
        words = ("bare.pth", tmp_path / "x.pt2", "--format", format, "task.name=silent_task:build")
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        assert "does not call" in refused(tmp_path, (78,), *words)
    export("bare.pth", tmp_path / "x.pt", "--format", "module", "task.name=silent_task:build")


def test_keyword_only_models_are_loaded_like_others(runs: Runs) -> None:
    model = load_model(str(runs("keyed")))
    assert type(model) is Keyed and answers_of(lambda x: model(points=x, scale=x[:, 0]))[
        "logits"
    ].shape == (48, CLASSES)
    assert INPUT.shape[1] == WIDTH
