"""`show` and `diff` on anybody's files: what is in them, and whether two are equal; and no more is
read than the question needs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import recipes
import safetensors.torch
import torch
from recipe_runs import (
    TASK,
    Command,
    bounded,
    differing,
    put,
    refused,
    row,
    train_on,
)  # fmt: skip
from recipes import RECIPES, SAVES, Trained, TrainedPair, made, save_new, save_old
from s3_server import S3Server

import harness
from harness import state

pytestmark = pytest.mark.usefixtures("process_as_it_was")
BIG_BYTES = 50 << 20
FORMATS = ("zip", "old", "safetensors")
PARAMETERS = 6 * 16 + 16 + 16 + 16 + 16 * 16 + 16 + 4 * 16 + 4


def big(folder: Path, format: str, changed: bool = False) -> Path:
    """A file of 50 MB: two layers, and an optimizer where the format can hold one."""
    side = int((BIG_BYTES / 4 / 2) ** 0.5)
    weights = {
        "first.weight": torch.zeros(side, side),
        "second.weight": torch.ones(side, side),
        "bias": torch.zeros(3),
    }
    if changed:
        weights["second.weight"][1, 2] = 3.0
    path = folder / f"big{'-changed' if changed else ''}.{format}"
    if format == "safetensors":
        safetensors.torch.save_file(weights, path)
    else:
        SAVES[format]({"state_dict": weights, "epoch": 3}, path)
    assert path.stat().st_size > 0.9 * BIG_BYTES
    return path


# What is shown


def test_every_kind_of_file_is_shown(tmp_path: Path, done: Trained, command: Command) -> None:
    for name, recipe in RECIPES.items():
        for format in SAVES if recipe.has_old_format else ("zip",):
            file = made(name, tmp_path, done, SAVES[format])
            answer = command("show", file)
            assert answer.code == 0, f"{name}, {format}: {answer.err}"
            what = f"{name}, {format}:\n{answer.out}"
            assert file.name in answer.out, what
            assert row(answer.out, "head.weight", "float32", "4x16"), what
            assert row(answer.out, "backbone.1.num_batches_tracked", "int64"), what
            assert "warning" not in answer.err.lower(), answer.err
            if recipe.optimizer:
                assert "SGD" in answer.out, what
            for key in filter(None, (recipe.model, recipe.optimizer, recipe.scheduler)):
                assert key.split(".")[0] in answer.out, what
            if recipe.epoch:
                assert row(answer.out, "epoch", "2"), what
            if recipe.step:
                assert row(answer.out, "20"), what
            if recipe.loss:
                assert (
                    row(answer.out, "loss", str(done.loss.item())[:4])
                    or name == "tutorial with the loss itself"
                ), what


def test_the_number_of_parameters_and_their_size_are_said(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    for name in ("tutorial weights", "imagenet", "hugging face safetensors", "torchscript"):
        text = command("show", made(name, tmp_path, done)).out
        trainable = sum(parameter.numel() for parameter in done.model.parameters())
        whole = sum(value.numel() for value in done.model.state_dict().values())
        assert trainable == PARAMETERS
        assert any(str(count) in text.replace(",", "") for count in (trainable, whole)), text


def test_parts_of_several_models_are_told_apart(
    tmp_path: Path, pair: TrainedPair, command: Command
) -> None:
    recipes.gan(pair, tmp_path / "gan.pth")
    text = command("show", tmp_path / "gan.pth").out
    assert all(key in text for key in ("netG", "netD", "optG", "optD")) and "Adam" in text
    recipes.tutorial_several_models(pair, tmp_path / "both.tar")
    text = command("show", tmp_path / "both.tar").out
    assert all(
        f"{key}_state_dict" in text for key in ("modelA", "modelB", "optimizerA", "optimizerB")
    )


def test_a_checkpoint_of_a_run_is_shown_as_before(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    assert command("import", made("imagenet", tmp_path, done), tmp_path / "run", *TASK).code == 0
    file = next((tmp_path / "run/checkpoints").glob("*.pt"))
    for place in (tmp_path / "run", file, file.with_suffix(".json")):
        text = command("show", place).out
        assert (
            row(text, "model_state_dict.head.weight", "4x16")
            and row(text, "step", "20")
            and "lineage" in text
        )


def test_what_export_writes_is_shown(tmp_path: Path, done: Trained, command: Command) -> None:
    assert command("import", made("imagenet", tmp_path, done), tmp_path / "run", *TASK).code == 0
    cases = [(name, options) for name in ("weights", "full") for options in ((), ("--legacy",))]
    cases += [(name, ()) for name in ("safetensors", "torchscript", "exported")]
    for number, (format, options) in enumerate(cases):
        # The only format whose own loader looks at the name.
        out = tmp_path / (f"out{number}" if format != "exported" else "out.pt2")
        answer = command("export", tmp_path / "run", out, "--format", format, "--trust", *options)
        assert answer.code == 0, answer.err
        answer = command("show", out)
        assert answer.code == 0, answer.err
        assert row(answer.out, "head.weight", "4x16"), f"{format} {options}:\n{answer.out}"
    assert "step" in command("show", tmp_path / "out4").out, (
        "safetensors keeps where it came from as metadata"
    )


def test_metadata_of_safetensors_is_shown(tmp_path: Path, command: Command) -> None:
    safetensors.torch.save_file(
        {"a": torch.zeros(2)},
        tmp_path / "a.safetensors",
        metadata={"format": "pt", "licence": "apache-2.0"},
    )
    text = command("show", tmp_path / "a.safetensors").out
    assert row(text, "licence", "apache-2.0"), text


def test_odd_tensors_are_shown(tmp_path: Path, command: Command) -> None:
    odd = {
        "half": torch.zeros(2, dtype=torch.float16),
        "brain": torch.zeros(2, dtype=torch.bfloat16),
        "truth": torch.zeros(2, dtype=torch.bool),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 7),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "turned": torch.zeros(3, 4).t(),
        "part": torch.zeros(100)[:3],
        "eight": torch.zeros(2, dtype=torch.float8_e4m3fn),
    }
    endless = torch.zeros(1).expand(10**9, 1000)
    for format, save in SAVES.items():
        if format == "old":
            # PyTorch's own safe loader does not read these back from its old format.
            odd.pop("eight")
        save(odd, tmp_path / format)
        answer = command("show", tmp_path / format)
        assert answer.code == 0, answer.err
        for name, tensor in odd.items():
            shape = "x".join(map(str, tensor.shape)) or "scalar"
            assert row(answer.out, name, str(tensor.dtype).removeprefix("torch."), shape), (
                answer.out
            )
        assert command("diff", tmp_path / format, tmp_path / format).code == 0
        save({**odd, "endless": endless}, tmp_path / format)
        for line in (("show", tmp_path / format), ("diff", tmp_path / format, tmp_path / format)):
            answer = bounded(command, *line)
            if not (answer.code == 0 and row(answer.out, "endless")):
                refused(answer, None)


@pytest.mark.parametrize("kind", ["sparse", "sparse csr", "meta", "quantized", "nested"])
def test_tensors_that_are_not_plain_are_shown_and_compared_or_refused_in_words(
    kind: str, tmp_path: Path, command: Command
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and things of the past
        odd = {
            "sparse": lambda: torch.eye(3).to_sparse(),
            "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
            "meta": lambda: torch.zeros(3, 3, device="meta"),
            "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3, 3), 0.1, 0, torch.qint8),
            "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
        }[kind]()
        torch.save({"odd": odd, "plain": torch.zeros(2)}, tmp_path / "a.pt")
        torch.save({"odd": odd, "plain": torch.ones(2)}, tmp_path / "b.pt")
    shown = command("show", tmp_path / "a.pt")
    if shown.code:
        refused(shown, None)
    else:
        assert row(shown.out, "odd", "3x3") and row(shown.out, "plain", "2"), shown.out
    for other, expected in (("a.pt", 0), ("b.pt", 1)):
        answer = command("diff", tmp_path / "a.pt", tmp_path / other)
        if answer.err:
            refused(answer, None)
        else:
            assert answer.code == expected and (not expected or row(answer.out, "plain")), (
                answer.out
            )


def test_names_of_tensors_cannot_write_to_the_terminal(tmp_path: Path, command: Command) -> None:
    """A file from the internet: names with colours, a carriage return, a title for the window."""
    evil = "head\x1b[2J\x1b]0;owned\x07.weight\rmodel"
    torch.save({evil: torch.zeros(2)}, tmp_path / "a.pt")
    safetensors.torch.save_file(
        {evil: torch.zeros(2)}, tmp_path / "a.safetensors", metadata={"x\x1b[31m": "y\x1b[31m"}
    )
    for name in ("a.pt", "a.safetensors"):
        answer = command("show", tmp_path / name)
        assert "\x1b" not in answer.out + answer.err and "\r" not in answer.out, repr(answer.out)


@pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)
def test_what_needs_pickle_is_named_and_nothing_is_executed(
    save: recipes.Save, tmp_path: Path, done: Trained, command: Command
) -> None:
    """It is shown nevertheless: tensors need no class of anybody's."""
    recipes.trap(done, tmp_path / "trap.pt", tmp_path / "sprung", save)
    recipes.entire_model(done, tmp_path / "whole.pt", save)
    recipes.lightning_with_namespace(done, tmp_path / "lightning.ckpt", save)
    for name, wanted in (
        ("trap.pt", "mkdir"),
        ("whole.pt", "recipes.Net"),
        ("lightning.ckpt", "argparse.Namespace"),
    ):
        shown = command("show", tmp_path / name)
        assert shown.code == 0 and wanted in shown.out and row(shown.out, "head.weight", "4x16"), (
            shown.out + shown.err
        )
        answer = command("diff", tmp_path / name, tmp_path / name)
        refused(answer, None, (78,))
        assert wanted in answer.err, answer.err
        assert not (tmp_path / "sprung").exists(), "it was executed"


BROKEN = {
    "missing": lambda done, path: None,
    "empty": lambda done, path: path.touch(),
    "web page": lambda done, path: recipes.web_page(path),
    "text": lambda done, path: path.write_text("hello"),
    "real tar": recipes.real_tar,
    "folder": lambda done, path: path.mkdir(),
    "cut short": lambda done, path: path.write_bytes(
        made("imagenet", path.parent, done).read_bytes()[:5000]
    ),
    "old and cut short": lambda done, path: path.write_bytes(
        made("imagenet", path.parent, done, save_old).read_bytes()[:3000]
    ),
    "bare pickle": recipes.bare_pickle,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_cannot_be_shown_is_refused_in_words(
    kind: str, tmp_path: Path, done: Trained, command: Command
) -> None:
    file, good = tmp_path / "file.pt", made("tutorial weights", tmp_path, done)
    BROKEN[kind](done, file)
    for line in (("show", file), ("diff", file, good), ("diff", good, file)):
        answer = command(*line)
        refused(answer, None)
        assert "file.pt" in answer.err, answer.err


@pytest.mark.slow
def test_bombs_are_refused_without_taking_memory(
    bombs: dict[str, Path], tmp_path: Path, done: Trained, command: Command
) -> None:
    command("show", made("imagenet", tmp_path, done))
    for format, save in SAVES.items():
        save({"weight": torch.zeros(1000)}, tmp_path / f"{format}.pt")
        recipes.with_claim(tmp_path / f"{format}.pt", tmp_path / f"{format}-claim.pt", 2**50)
    recipes.with_old_count(tmp_path / "old.pt", tmp_path / "count.pt", 2**50)
    recipes.safetensors_with(tmp_path / "length.safetensors", b"{}", b"", 2**60)
    claims = [tmp_path / name for name in ("zip-claim.pt", "old-claim.pt", "length.safetensors")]
    for file in (bombs["pickle"], bombs["storage"], *claims):
        for line in (("show", file), ("diff", file, file)):
            refused(bounded(command, *line), None)
    # The old format's counts stand before the data, which `show` does not read; but nothing may
    # come of them either.
    assert bounded(command, "show", tmp_path / "count.pt").code in (0, 1, 78)
    refused(bounded(command, "diff", tmp_path / "count.pt", tmp_path / "count.pt"), None)


def test_a_large_file_is_shown_without_its_tensors_being_read(
    tmp_path: Path, command: Command
) -> None:
    command("show", big(tmp_path, "zip"))
    for format in FORMATS:
        answer = bounded(command, "show", big(tmp_path, format), limit=BIG_BYTES // 4)
        assert answer.code == 0 and row(answer.out, "first.weight"), answer.out + answer.err


# Over the network


class Counter:
    """What comes from a server, byte for byte, with a count of it. Nothing is interpreted: these
    are the bytes on the wire."""

    def __init__(self, host: str, port: int) -> None:
        self.upstream, self.received = (host, port), 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, server = self._listener.accept()[0], socket.create_connection(self.upstream)
                self._open += [client, server]
                threading.Thread(
                    target=self._pass, args=(client, server, False), daemon=True
                ).start()
                threading.Thread(
                    target=self._pass, args=(server, client, True), daemon=True
                ).start()

    def _pass(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.received += len(data) if counts else 0
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def counted(
    bucket: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[S3Server, str, Counter]]:
    """A bucket that this process reaches only through a counter."""
    server, place = bucket
    counter = Counter(server.host, server.port)
    for variable, value in (server.environment | {"AWS_ENDPOINT_URL": counter.url}).items():
        monkeypatch.setenv(variable, value)
    yield server, place, counter
    counter.close()


@pytest.mark.parametrize(
    "format", ["zip", *(pytest.param(format, marks=pytest.mark.slow) for format in FORMATS[1:])]
)
def test_a_large_file_in_a_bucket_is_shown_for_a_small_part_of_its_bytes(
    format: str, tmp_path: Path, command: Command, counted: tuple[S3Server, str, Counter]
) -> None:
    server, place, counter = counted
    file = big(tmp_path, format)
    url = put(server, place, file)
    counter.received = 0
    answer = command("show", url)
    assert answer.code == 0 and row(answer.out, "second.weight"), answer.out + answer.err
    assert 0 < counter.received < 1 << 20, f"{counter.received:,} bytes came over the network"
    here = command("show", file).out
    assert answer.out.replace(url, "") == here.replace(str(file), "")
    assert os.path.basename(url) in answer.out


@pytest.mark.slow
def test_small_files_of_all_kinds_are_shown_from_a_bucket(
    tmp_path: Path, done: Trained, command: Command, counted: tuple[S3Server, str, Counter]
) -> None:
    server, place, _ = counted
    for name in ("imagenet", "hugging face safetensors", "torchscript"):
        file = made(name, tmp_path, done)
        url = put(server, place, file)
        answer = command("show", url)
        assert answer.code == 0 and row(answer.out, "head.weight", "4x16"), answer.err
        assert command("diff", url, file).code == 0
    missing = command("show", f"s3://{place}/zoo/none.pt")
    refused(missing, None, (1, 74, 78))
    refused(command("show", "s3://no-such-bucket-here/none.pt"), None, (1, 74, 78))


def test_a_file_is_read_once_to_be_compared(
    tmp_path: Path, command: Command, counted: tuple[S3Server, str, Counter]
) -> None:
    server, place, counter = counted
    one, other = big(tmp_path, "zip"), big(tmp_path, "safetensors")
    url = put(server, place, one)
    counter.received = 0
    answer = command("diff", url, other, "--weights")
    assert answer.code == 0, answer.out + answer.err
    assert counter.received < 1.2 * one.stat().st_size, (
        f"{counter.received:,} bytes came over the network"
    )


# What differs


def test_the_same_weights_in_any_two_formats_are_equal(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    files = []
    for number, (name, recipe) in enumerate(RECIPES.items()):
        if not recipe.in_any_prefix:
            (tmp_path / str(number)).mkdir()
            files.append(
                made(
                    name,
                    tmp_path / str(number),
                    done,
                    save_old if recipe.has_old_format and number % 2 else save_new,
                )
            )
    for file in files[1:]:
        answer = command("diff", files[0], file, "--weights")
        assert answer.code == 0, f"{file}:\n{answer.out}{answer.err}"
    assert command("import", files[0], tmp_path / "run", *TASK).code == 0
    for line in ((files[0], tmp_path / "run"), (tmp_path / "run", files[-1])):
        assert command("diff", *line, "--weights").code == 0


def test_without_weights_everything_counts(tmp_path: Path, done: Trained, command: Command) -> None:
    general, later = made("tutorial general checkpoint", tmp_path, done), tmp_path / "later.pt"
    content = torch.load(general, weights_only=True)
    torch.save(content | {"epoch": 3}, later)
    assert command("diff", general, general).code == 0
    answer = command("diff", general, later)
    assert answer.code == 1 and row(answer.out, "epoch", "2", "3"), answer.out
    assert command("diff", general, later, "--weights").code == 0
    content["optimizer_state_dict"]["state"][0]["momentum_buffer"][0, 0] += 1
    torch.save(content, later)
    answer = command("diff", general, later)
    assert answer.code == 1 and row(answer.out, "momentum_buffer"), answer.out
    assert command("diff", general, later, "--weights").code == 0
    assert command("diff", general, made("tutorial weights", tmp_path, done)).code == 1


def test_one_bit_is_a_difference_and_it_is_named(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    weights = {key: value.clone() for key, value in done.model.state_dict().items()}
    torch.save(weights, tmp_path / "a.pt")
    weights["backbone.3.weight"].view(torch.int32)[2, 3] ^= 1
    safetensors.torch.save_file(weights, tmp_path / "b.safetensors")
    for options in ((), ("--weights",)):
        answer = command("diff", tmp_path / "a.pt", tmp_path / "b.safetensors", *options)
        assert answer.code == 1 and row(answer.out, "backbone.3.weight"), answer.out
        assert not row(answer.out, "head.weight"), answer.out
    torch.save({**weights, "head.bias": torch.full((4,), float("nan"))}, tmp_path / "nan.pt")
    assert command("diff", tmp_path / "nan.pt", tmp_path / "nan.pt").code == 0, (
        "NaN is equal to itself here"
    )
    torch.save({"a": torch.tensor([0.0])}, tmp_path / "zero.pt")
    torch.save({"a": torch.tensor([-0.0])}, tmp_path / "minus.pt")
    assert command("diff", tmp_path / "zero.pt", tmp_path / "minus.pt").code == 1


def test_dtype_shape_and_names_are_differences(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    weights = dict(done.model.state_dict())
    torch.save(weights, tmp_path / "a.pt")
    for name, other in (
        (
            "half",
            {
                key: value.half() if value.is_floating_point() else value
                for key, value in weights.items()
            },
        ),
        ("shape", {**weights, "head.bias": torch.zeros(5)}),
        ("less", {key: value for key, value in weights.items() if key != "head.bias"}),
        ("more", {**weights, "neck.bias": torch.zeros(5)}),
    ):
        torch.save(other, tmp_path / f"{name}.pt")
        for line in (
            (tmp_path / "a.pt", tmp_path / f"{name}.pt"),
            (tmp_path / f"{name}.pt", tmp_path / "a.pt"),
        ):
            for options in ((), ("--weights",)):
                answer = command("diff", *line, *options)
                assert answer.code == 1 and re.search(r"(head|neck)\.bias", answer.out), (
                    f"{name}:\n{answer.out}"
                )


def test_runs_and_files_are_compared_by_their_modules(
    tmp_path: Path, pair: TrainedPair, done: Trained, command: Command
) -> None:
    task = (
        "task.name=recipe_task:build_pair",
        *TASK[1:],
        "task.args.modules='modelA,modelB'",
        "task.args.optimizers='optimizerA,optimizerB'",
    )
    recipes.tutorial_several_models(pair, tmp_path / "both.tar")
    assert command("import", tmp_path / "both.tar", tmp_path / "run", *task).code == 0
    assert command("diff", tmp_path / "run", tmp_path / "both.tar", "--weights").code == 0
    other = recipes.trained_pair(seed=4)
    recipes.tutorial_several_models(other, tmp_path / "other.tar")
    answer = command("diff", tmp_path / "run", tmp_path / "other.tar", "--weights")
    assert answer.code == 1 and "modelA" in answer.out and "modelB" in answer.out, answer.out


def test_two_runs_are_compared_as_before(tmp_path: Path, done: Trained, command: Command) -> None:
    file = made("imagenet", tmp_path, done)
    for name in ("a", "b"):
        assert command("import", file, tmp_path / name, *TASK).code == 0
    assert command("diff", tmp_path / "a", tmp_path / "b").code == 0
    train_on(tmp_path / "b", "train.max_steps=21")
    answer = command("diff", tmp_path / "a", tmp_path / "b")
    assert answer.code == 1 and "step" in answer.out
    assert command("diff", tmp_path / "a", tmp_path / "b", "--weights").code == 1
    assert (
        command("diff", tmp_path / "a", tmp_path / "b/checkpoints/step_00000020-0001.pt").code == 0
    )


# In Python


def test_the_library_describes_and_compares(
    tmp_path: Path, done: Trained, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    imagenet, weights = made("imagenet", tmp_path, done), made("tutorial weights", tmp_path, done)
    before = state.rng_state()
    shown = command("show", imagenet).out
    assert str(harness.describe(imagenet)).strip() == shown.strip()
    assert harness.compare(imagenet, imagenet).count == 0
    assert harness.compare(imagenet, weights).count > 0
    assert harness.compare(str(imagenet), str(weights), weights_only=True).count == 0
    assert (
        str(harness.compare(imagenet, weights)).strip()
        == command("diff", imagenet, weights).out.strip()
    )
    assert differing(state.rng_state(), before) == []
    with pytest.raises(harness.HarnessError):
        harness.describe(tmp_path / "none.pt")
    with pytest.raises(harness.HarnessError):
        harness.compare(imagenet, tmp_path / "none.pt")
    assert capsys.readouterr().out == "", "a library does not print"


def test_nothing_beside_a_file_is_touched(tmp_path: Path, done: Trained, command: Command) -> None:
    """No index, no cache, no time of change: the file may be on a disk that cannot be written
    to."""
    file = made("imagenet", tmp_path, done)
    file.chmod(0o444)
    before: Any = (sorted(os.listdir(tmp_path)), file.stat().st_mtime_ns, file.read_bytes())
    assert command("show", file).code == 0 and command("diff", file, file).code == 0
    assert (sorted(os.listdir(tmp_path)), file.stat().st_mtime_ns, file.read_bytes()) == before


def test_lists_that_look_like_checkpoints_are_still_shown(
    tmp_path: Path, done: Trained, command: Command
) -> None:
    """Nothing in it has a name, so it cannot be imported; but what it is can be said."""
    recipes.parameters_without_names(done, tmp_path / "list.pt")
    answer = command("show", tmp_path / "list.pt")
    assert "Traceback" not in answer.err and (answer.code == 0 or "name" in answer.err), answer.err
    json.dumps(answer.out)
