"""Saving while training goes on: what is saved is the state of the boundary, whatever the next step
does, and nothing is left behind."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from big_state import (
    OPTIMIZERS,
    STOPPED,
    Big,
    check_saved,
    clamp_in_secret,
    clamp_openly,
    points,
    trained,
    written,
)
from blake3 import blake3
from conftest import events, outliving, start, wait_until
from library_runs import newest, steps_of
from remote_lives import run_forked
from there import there
from torch import nn

import harness
from harness import state
from harness.checkpoint import load
from harness.checkpoint.catalog import read_catalog
from harness.errors import NonFiniteError, StorageError, UsageError
from harness.exchange.compare import differences
from harness.saving.writer_process import WriterProcess
from harness.state.raw_bytes import STRIDE_BYTES
from harness.state.snapshot import Snapshot, UnsupportedStateError
from harness.store import LocalStore
from harness.store.staging_buffer import (
    BLOCK_BYTES,
    PIECE_BYTES,
    StagingBuffer,
    free_memory_bytes,
    write_to,
)

pytestmark = pytest.mark.usefixtures("process_as_it_was")


EVERY = [
    (optimizer, snapshot)
    for optimizer in OPTIMIZERS
    for snapshot in ("overlapped", "checked", "at_once")
]
CASES = [
    pytest.param(*case, marks=pytest.mark.slow)
    if case[0] != "adamw" and case[1] != "overlapped"
    else case
    for case in EVERY
]


@pytest.mark.parametrize(("optimizer", "snapshot"), CASES)
def test_what_is_saved_is_the_state_of_the_boundary(tmp_path, optimizer, snapshot, capfd):
    seen = trained(tmp_path / "a", OPTIMIZERS[optimizer], snapshot=snapshot)
    check_saved(tmp_path / "a", seen, list(range(1, 9)))
    assert "training wait" not in capfd.readouterr().out


def test_an_update_waits_until_its_state_is_copied_and_no_longer(tmp_path):
    """The copy is slow here, as the memory that it goes to is used for the first time; forward and
    backward take no time at all."""
    seen = trained(tmp_path / "a", model=Big(400_000), steps=3)
    check_saved(tmp_path / "a", seen, [1, 2, 3])
    first, second, last = events(tmp_path / "a", "saved")
    assert first["blocked_s"] < first["seconds"] and second["blocked_s"] < second["seconds"]
    assert 0 < second["copy_s"] < second["seconds"] and last["step"] == 3


@pytest.mark.parametrize("clamp", [clamp_in_secret, clamp_openly])
def test_a_loop_that_changes_weights_before_its_update_is_found_out(tmp_path, clamp, capfd):
    """As some GANs do. The first save shows it, as it is copied at once and compared; so are all
    others then."""
    seen = trained(tmp_path / "a", before=clamp)
    check_saved(tmp_path / "a", seen, list(range(1, 9)))
    assert (
        capfd.readouterr().out.count(
            "saves make training wait: the state changes between two updates"
        )
        == 1
    )


FAILS = """
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, at):
        if run.step == 6:
            raise ValueError("no such sample")
        return torch.zeros(1024)

run = harness.init("a", seed=1, save_every_s=None, save_every_steps=2)
model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(3)))
optimizer = torch.optim.AdamW(model.parameters())
run.track(model=model, optimizer=optimizer)
for x in run.batches(Data(), 2, epochs=1, shuffle=False):
    loss = model(x).sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.slow
def test_what_is_saved_when_the_next_batch_cannot_be_loaded_is_committed_and_nobody_waits(tmp_path):
    """The error comes between a step's boundary, where its copy is asked for, and the next batch,
    with which it begins."""
    path = tmp_path / "program.py"
    path.write_text("import torch, harness\n" + FAILS)
    ended = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode != 0 and "no such sample" in ended.stderr
    assert steps_of(tmp_path / "a") == [2, 4, 6]
    lines = (tmp_path / "a/events/0001.jsonl").read_text().splitlines()
    assert [event["step"] for event in map(json.loads, lines) if event["event"] == "saved"] == [
        2,
        4,
        6,
    ]


def test_a_snapshot_that_was_written_into_is_dropped_and_taken_again(tmp_path, capfd):
    """The loop begins to do so later: the version that PyTorch counts of each tensor shows it,
    whichever came first, copy or change."""
    calls = iter(range(99))
    seen = trained(
        tmp_path / "a", before=lambda model: clamp_openly(model) if next(calls) >= 4 else None
    )
    check_saved(tmp_path / "a", seen, [1, 2, 3, 5, 6, 7, 8])
    assert (
        capfd.readouterr().out.count(
            "saves make training wait: the state changes between two updates"
        )
        == 1
    )


def test_checked_finds_what_nothing_else_would(tmp_path, capfd):
    calls = iter(range(99))
    seen = trained(
        tmp_path / "a",
        before=lambda model: clamp_in_secret(model) if next(calls) >= 4 else None,
        snapshot="checked",
    )
    check_saved(tmp_path / "a", seen, list(range(1, 9)))
    assert (
        capfd.readouterr().out.count(
            "saves make training wait: the state changes between two updates"
        )
        == 1
    )


def test_an_update_that_nothing_tells_of_is_found_out(tmp_path, capfd):
    """The loop begins later to update by hand and behind PyTorch's back, as a CUDA graph does."""
    job = harness.init(tmp_path / "a", seed=1, save_every_s=None, save_every_steps=1, keep_last=99)
    model, seen = Big(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    job.track(model=model, optimizer=optimizer)
    for (x,) in job.batches(points(64), global_batch_size=8, epochs=1):
        seen[job.step - 1] = copy.deepcopy(state.capture(job.tracked))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if job.step < 4:
            optimizer.step()
        else:
            for parameter in model.parameters():
                parameter.data.sub_(there(parameter.grad), alpha=0.01)
            time.sleep(0.1)  # the copy is over when the step is
    seen[job.step] = copy.deepcopy(state.capture(job.tracked))
    saved = steps_of(tmp_path / "a")
    check_saved(tmp_path / "a", seen, saved)
    assert {1, 2, 8} <= set(saved)
    assert (
        capfd.readouterr().out.count(
            "saves make training wait: the state changes between two updates"
        )
        == 1
    )


@pytest.mark.slow
def test_what_nothing_tells_the_changes_of_is_copied_at_once(tmp_path, capfd):
    """Buffers, here more of them than are worth a copy of their own, that each forward pass
    changes."""

    class Counting(Big):
        seen: torch.Tensor

        def __init__(self) -> None:
            super().__init__(rows=100)
            self.register_buffer("seen", torch.zeros(20_000_000))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            return super().forward(x)

    seen = trained(tmp_path / "a", model=Counting(), steps=3)
    check_saved(tmp_path / "a", seen, [1, 2, 3])
    assert "nothing tells when 80.0 MB of the state change" in capfd.readouterr().out


def test_a_state_of_more_than_plain_tensors_is_saved_while_training_waits(tmp_path, capfd):
    class Sparse(nn.Module):
        def state_dict(self) -> dict:  # type: ignore[override]
            return {"graph": torch.eye(3).to_sparse()}

        def load_state_dict(self, state: dict) -> None:  # type: ignore[override]
            pass

    job = harness.init(tmp_path / "a", save_every_s=None, save_every_steps=1)
    model = nn.Linear(16, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.track(model=model, optimizer=optimizer, graph=Sparse())
    for (x,) in job.batches(points(24), global_batch_size=8, epochs=1):
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
    assert steps_of(tmp_path / "a") == [1, 2, 3]
    assert torch.equal(newest(tmp_path / "a")["graph_state_dict"]["graph"].to_dense(), torch.eye(3))
    assert (
        capfd.readouterr().out.count(
            "saves make training wait: there is more in the state than plain tensors"
        )
        == 1
    )


def test_without_memory_for_a_copy_saves_still_succeed(tmp_path):
    """An address space with room for the model, but not for another one."""
    ended = script(
        tmp_path,
        """
        if job.step == 1:
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), used + (300 << 20)))
        """,
        size=24, rows=4_000_000, options="save_every_s=None, save_every_steps=1",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "saves make training wait: there is not enough memory" in ended.stdout, ended.stdout
    assert steps_of(tmp_path / "a") == [1, 2, 3] or steps_of(tmp_path / "a") == [2, 3]


def script(folder: Path, body: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run such a script to its end."""
    return run_forked(written(folder, body, **options), cwd=folder)  # type: ignore[arg-type]


def test_when_the_writing_process_dies_the_one_that_trains_writes_itself(tmp_path):
    ended = script(tmp_path, STOPPED + "if job.step == 5: scribe().kill()")
    assert ended.returncode == 0 and "NOT SAVED" not in ended.stdout, ended.stdout + ended.stderr
    assert steps_of(tmp_path / "a") == [4, 6, 8]
    store = LocalStore(tmp_path / "a")
    for manifest in read_catalog(store).manifests:
        load.check(store, manifest)


@pytest.mark.slow
def test_a_stop_signal_that_comes_while_the_writing_process_starts_does_not_end_it(tmp_path):
    """Sent as soon as there is such a process, again and again, before its interpreter can have
    begun."""
    process = start(
        written(
            tmp_path, "time.sleep(0.05)\nif job.step == 3: print('began', flush=True)", rows=1000
        ),
        cwd=tmp_path,
    )
    children: list[psutil.Process] = []
    while not children and process.poll() is None:
        children = psutil.Process(process.pid).children()
    for _ in range(50):
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in children:
                child.send_signal(signal.SIGTERM)
        time.sleep(0.005)
    assert children and all(
        child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "NOT SAVED" not in out, out + err


@pytest.mark.slow
def test_the_writing_process_dies_with_the_one_that_trains_and_commits_nothing(tmp_path):
    process = start(written(tmp_path, STOPPED + "if job.step == 5: time.sleep(3600)"), cwd=tmp_path)
    assert any("stopped" in line for line in there(process.stdout))
    wait_until(
        lambda: list(tmp_path.glob("a/checkpoints/step_00000004-0001.pt.tmp-*")),
        "the second save has begun",
    )
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("writer_process" in " ".join(child.cmdline()) for child in children)
    process.kill()
    process.wait()
    there(process.stdout).close()
    there(process.stderr).close()
    assert outliving(children) == []
    assert steps_of(tmp_path / "a") == [2]


def test_stop_signals_do_not_reach_the_writing_process(tmp_path):
    """Terminals and some SLURM set-ups signal whole process trees, and the last save is still to be
    written then."""
    writer, staging = WriterProcess(), StagingBuffer()
    staging.reserve(1000)
    (tmp_path / "x").touch()
    writer.write_staged(staging, tmp_path / "x")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(there(writer._process).pid, number)
    assert (
        writer.write_staged(staging, tmp_path / "x") == f"blake3:{blake3(bytes(1000)).hexdigest()}"
    )
    writer.close()
    staging.close()


def test_a_save_arrives_though_the_next_update_is_long_in_coming(tmp_path):
    """The step after a save does not update before that has arrived."""
    waits = (
        "while job.step in (3, 5) and not "
        "os.path.exists(f'a/checkpoints/step_0000000{job.step - 1}-0001.json'): time.sleep(0.05)"
    )
    ended = script(tmp_path, "harness.saving.async_saver.SEALED_WITHIN_S = 1.0", before=waits)
    assert ended.returncode == 0, ended.stderr
    assert steps_of(tmp_path / "a") == [4, 6, 8]


def test_after_an_error_in_the_loop_what_was_being_saved_still_arrives(tmp_path):
    ended = script(tmp_path, 'if job.step == 5: raise ValueError("a bug")')
    assert ended.returncode == 1 and "a bug" in ended.stderr
    assert steps_of(tmp_path / "a") == [2, 4]


def test_a_save_that_is_due_by_the_clock_is_left_out_while_one_is_on_its_way_if_so_told(tmp_path):
    ended = script(
        tmp_path,
        """
        time.sleep(0.02)
        if job.step == 20:
            while scribe() is None: time.sleep(0.01)
            scribe().send_signal(signal.SIGSTOP)
        if job.step == 60:
            scribe().send_signal(signal.SIGCONT)
        """,
        size=640, options='save_every_s=0.05, when_busy="skip"',
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    skipped = events(tmp_path / "a", "skipped")
    assert len(skipped) >= 2 and steps_of(tmp_path / "a")[-1] == 80
    with pytest.raises(UsageError, match="when_busy='never', expected: wait or skip"):
        harness.init(tmp_path / "b", when_busy="never")


def test_parameters_that_are_not_finite_end_the_run_at_the_next_boundary(tmp_path):

    job = harness.init(tmp_path / "a", save_every_s=None, save_every_steps=2)
    model = Big()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    job.track(model=model, optimizer=optimizer)
    with pytest.raises(NonFiniteError, match=r"model\.table\.weight"):
        for (x,) in job.batches(points(160), global_batch_size=8, epochs=1):
            optimizer.zero_grad()
            model(x).mean().backward()
            if job.step == 4:
                there(model.table.weight.grad)[77_777, 3] = float("inf")
            optimizer.step()
    assert job.step <= 6 and steps_of(tmp_path / "a") == [2]


def test_a_frozen_parameter_that_no_optimizer_has_may_be_a_mask_of_infinities(tmp_path):
    class Masked(Big):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Parameter(torch.full((8,), -torch.inf), requires_grad=False)

    job = harness.init(tmp_path / "a", save_every_s=None, save_every_steps=2)
    model = Masked()
    mask = model.mask
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not mask], lr=0.01)
    job.track(model=model, optimizer=optimizer)
    for (x,) in job.batches(points(32), global_batch_size=8, epochs=1):
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
        state.check_finite(job.tracked)
    assert job.finished and steps_of(tmp_path / "a") == [2, 4]
    assert mask.data_ptr() in state.captured({}, job.tracked).steady
    optimizer.add_param_group({"params": [mask]})
    with pytest.raises(NonFiniteError, match=r"model\.mask"):
        state.check_finite(job.tracked)


def test_a_buffer_that_begins_where_a_parameter_does_hides_nothing_of_it(tmp_path):
    class Headed(Big):
        def __init__(self) -> None:
            super().__init__()
            self.table.register_buffer("head", self.table.weight.data[:10])

    def spoil(model: nn.Module) -> None:
        assert isinstance(model, Headed)
        with torch.no_grad():
            model.table.weight[77_777, 3] = float("nan")

    with pytest.raises(NonFiniteError, match=r"model\.table\.weight"):
        trained(tmp_path / "a", model=Headed(), before=spoil)


def held() -> set[str]:
    """Threads, processes and memory of saving that this process has."""
    threads = {f"thread {t.ident}" for t in threading.enumerate() if t.name == "saver"}
    processes = {
        f"process {p.pid}"
        for p in psutil.Process().children()
        if "saving/writer_process.py" in " ".join(p.cmdline())
    }
    return (
        threads
        | processes
        | {
            f"memory {fd}"
            for fd in os.listdir("/proc/self/fd")
            if "memfd:checkpoint" in _target(fd)
        }
    )


def test_memory_and_processes_are_given_back_when_the_loop_is_over(tmp_path):
    before = held()
    trained(tmp_path / "a", steps=2)
    assert held() - before == set()


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


# --- the file ---


def tree() -> dict:
    """Everything that may be in a checkpoint, tied and empty tensors among it."""
    tied = torch.randn(50, 7)
    return {
        "step": 3,
        "loss": 0.5,
        "none": None,
        "text": "é",
        "list": [torch.arange(5), (1, True)],
        "a": {
            "x": tied,
            "y": tied,
            "empty": torch.empty(0, 4),
            "scalar": torch.tensor(2.5),
            "half": torch.randn(9).half(),
        },
        "b": torch.randn(1000, 11).to(torch.bfloat16),
        "c": torch.randn(3, dtype=torch.complex64),
        "d": torch.randn(4, 6).t(),
        "view": torch.arange(10)[2:4].clone(),
        "flags": torch.tensor([True, False]),
    }


def snapped(payload: dict, staging: StagingBuffer, *, steady: bool) -> Snapshot:
    addresses = (
        {tensor.untyped_storage().data_ptr() for tensor in _leaves(payload)} if steady else set()
    )
    snapshot = Snapshot(payload, addresses)
    snapshot.copy_rest()
    snapshot.copy_into(staging)
    return snapshot


def _leaves(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)


@pytest.mark.parametrize("steady", [True, False])
def test_the_image_is_the_file_that_torch_would_have_written(tmp_path, steady):
    payload, staging, path = tree(), StagingBuffer(), tmp_path / "x.pt"
    for _ in range(2):  # the second time in memory that is full of the first
        snapped(payload, staging, steady=steady)
        path.touch()
        write_to(there(staging.memory), staging.size_bytes, str(path))
        found = torch.load(path, weights_only=True)
        assert list(differences(found, payload)) == []
        assert found["a"]["x"].data_ptr() == found["a"]["y"].data_ptr(), "tied tensors stay tied"
    with (tmp_path / "plain.pt").open("wb") as file:
        torch.save(payload, file)
    assert path.stat().st_size == (tmp_path / "plain.pt").stat().st_size
    with zipfile.ZipFile(path) as ours, zipfile.ZipFile(tmp_path / "plain.pt") as theirs:
        names = [
            (i.filename.partition("/")[2], i.file_size, i.header_offset) for i in ours.infolist()
        ]
        assert names == [
            (i.filename.partition("/")[2], i.file_size, i.header_offset) for i in theirs.infolist()
        ]
        assert ours.read(ours.infolist()[0]) == theirs.read(theirs.infolist()[0])
    staging.close()


def test_a_thread_that_copies_leaves_the_others_their_turns():
    """Else the training thread waits for it after each operator, for 5 ms."""
    memory = torch.arange(3000.0)
    snapshot = Snapshot({str(at): memory[at : at + 1] for at in range(3000)}, set())
    snapshot.copy_rest()
    staging, begun, turns = StagingBuffer(), threading.Event(), 0

    def save() -> None:
        begun.set()
        snapshot.copy_into(staging)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # no thread has to leave it to the others
    try:
        saving = threading.Thread(target=save)
        saving.start()
        begun.wait()
        while not snapshot.copied.is_set():
            turns += 1
            time.sleep(0)
    finally:
        sys.setswitchinterval(interval)
    saving.join()
    staging.close()
    assert turns > 30, f"{turns} turns for the other thread"


def test_a_change_while_it_is_copied_is_seen():
    for change, compare in ((lambda t: t.add_(1), False), (lambda t: t.data.add_(1), True)):
        payload, staging = tree(), StagingBuffer()
        snapshot = snapped(payload, staging, steady=True)
        assert not snapshot.is_torn(compare=True)
        change(payload["b"])
        assert snapshot.is_torn(compare=compare)
    payload = tree()
    payload["b"][0, 0] = float("nan")
    assert not snapped(payload, StagingBuffer(), steady=True).is_torn(compare=True), (
        "NaN is as good a value as any other here"
    )


# Numbers of four bytes, about the borders of what is sampled.
NUMBERS = (1, 4095, 4096, 4097, 9001, 16384, 16385, 40_000, 70_001)


@pytest.mark.parametrize("size", NUMBERS)
def test_a_whole_tensor_that_is_written_behind_pytorchs_back_is_noticed_whatever_its_size(size):
    """When it is written after the boundary and before it is copied, in one of a state that is too
    large to be copied at once."""
    payload = {f"{of}": torch.randn(of) for of in NUMBERS} | {
        "large": torch.randn(3_000_000),
        "tied": torch.randn(5),
    }
    addresses = {tensor.untyped_storage().data_ptr() for tensor in payload.values()}
    for change in (True, False):
        snapshot, staging = Snapshot(payload, addresses), StagingBuffer()
        assert not snapshot.is_small
        snapshot.distrust()
        snapshot.copy_rest()
        if change:
            payload[str(size)].data.add_(1)
        snapshot.copy_into(staging)
        seen = snapshot.is_stirred() or snapshot.is_torn(compare=True)
        assert seen == change
        staging.close()


def _moved(tensor: torch.Tensor) -> None:
    tensor.data.resize_(2 * tensor.numel())


@pytest.mark.parametrize("size", [of for of in NUMBERS if of >= 4096])
@pytest.mark.parametrize(
    "change", [lambda tensor: tensor.data.add_(1), _moved], ids=["written", "moved"]
)
def test_a_write_behind_pytorchs_back_that_comes_after_the_sampled_words_were_copied_is_noticed_before_the_update(  # noqa: E501
    size, change
):
    """The copy of a tensor that is written while it is copied may mix two states where no word was
    sampled."""
    payload = {f"{of}": torch.randn(of) for of in NUMBERS} | {"large": torch.randn(3_000_000)}
    snapshot, staging = (
        Snapshot(payload, {tensor.untyped_storage().data_ptr() for tensor in payload.values()}),
        StagingBuffer(),
    )
    snapshot.distrust()
    snapshot.copy_rest()
    snapshot.copy_into(staging)
    assert not snapshot.is_torn(compare=False)
    change(payload[str(size)])
    assert not snapshot.is_stirred()
    assert snapshot.is_torn(compare=False)
    staging.close()


def test_of_a_large_tensor_each_run_of_a_strides_length_that_is_written_is_noticed():
    payload = {"large": torch.randn(3_000_001)}
    address = payload["large"].untyped_storage().data_ptr()
    length = STRIDE_BYTES // 4
    for first in (0, 1, 12_345, 2_999_999 - length):
        snapshot, staging = Snapshot(payload, {address}), StagingBuffer()
        snapshot.distrust()
        snapshot.copy_rest()
        payload["large"].data[first : first + length + 4].add_(1)
        snapshot.copy_into(staging)
        assert snapshot.is_stirred(), first
        staging.close()


def test_what_is_no_plain_tensor_is_left_to_torch():
    for value in (torch.eye(2).to_sparse(), torch.nn.parameter.UninitializedParameter()):
        with pytest.raises(UnsupportedStateError):
            Snapshot({"step": 1, "value": value}, set())


@pytest.mark.filterwarnings("ignore:Serializing tensors on the meta device")
def test_a_tensor_without_data_stands_in_the_file_as_one(tmp_path):
    """It stands for a sharded tensor, whose parts are in other files."""
    stands = torch.empty((3, 2), dtype=torch.bfloat16, device="meta")
    snapshot, staging = (
        Snapshot({"stands": stands, "value": torch.arange(5)}, set()),
        StagingBuffer(),
    )
    snapshot.copy_rest()
    snapshot.copy_into(staging)
    (tmp_path / "file").write_bytes(b"".join(staging.chunks()))
    staging.close()
    loaded = torch.load(tmp_path / "file", weights_only=True)
    assert torch.equal(loaded["value"], torch.arange(5)) and loaded["stands"].is_meta
    assert (loaded["stands"].shape, loaded["stands"].dtype) == (stands.shape, stands.dtype)


def test_a_tensor_in_an_attribute_of_another_is_named():
    value = torch.ones(3)
    vars(value)["moment"] = torch.zeros(2)
    with pytest.raises(UnsupportedStateError, match=r"attribute 'moment'.*an entry of its own"):
        Snapshot({"value": value}, set())
    vars(value)["moment"] = [torch.zeros(2)]
    snapshot = Snapshot({"value": value}, set())
    snapshot.copy_rest()
    with pytest.raises(UnsupportedStateError, match="no tensors in attributes of tensors"):
        snapshot.copy_into(StagingBuffer())


DIRECT_FROM = 4 << 20
SIZES = (
    1,
    BLOCK_BYTES - 1,
    BLOCK_BYTES,
    BLOCK_BYTES + 1,
    DIRECT_FROM,
    DIRECT_FROM + 77,
    PIECE_BYTES,
    2 * PIECE_BYTES + 4097,
)


@pytest.mark.parametrize("where", ["disk", "memory"])
def test_every_byte_arrives_and_is_digested(tmp_path, where):
    folder = tmp_path if where == "disk" else Path("/dev/shm")
    path, staging = folder / f"poured-{os.getpid()}", StagingBuffer()
    staging.reserve(SIZES[-1])
    there(staging.memory)[:] = os.urandom(len(there(staging.memory)))
    try:
        for size_bytes in SIZES:
            path.touch()
            staging.reserve(size_bytes)
            digest = write_to(there(staging.memory), size_bytes, str(path), DIRECT_FROM)
            data = bytes(there(staging.memory)[:size_bytes])
            assert path.read_bytes() == data and digest == f"blake3:{blake3(data).hexdigest()}"
            assert b"".join(staging.chunks()) == data
            path.unlink()
    finally:
        path.unlink(missing_ok=True)
        staging.close()


def test_a_disk_that_fills_up_under_it_is_said_with_its_number(tmp_path):
    staging = StagingBuffer()
    staging.reserve(3 * PIECE_BYTES)
    path = tmp_path / "x"
    path.touch()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (PIECE_BYTES + 4096, PIECE_BYTES + 4096))
        try:
            write_to(there(staging.memory), staging.size_bytes, str(path))
        except OSError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 27, "EFBIG"


def test_memory_that_is_not_there_is_not_asked_for():
    staging = StagingBuffer()
    with pytest.raises(StorageError, match="not enough memory"):
        staging.reserve(2 * free_memory_bytes())
    assert staging.capacity_bytes == 0
    staging.reserve(10)
    staging.reserve(100_000)
    assert len(there(staging.memory)) >= 100_000


def grouped(root: Path, version: int, limits: dict[str, tuple[str, int, int]]) -> Path:
    """A machine as Linux shows it: 100 MB are free; control groups by their path, each with its
    limit, its use and what is cached in it."""
    top, names = {
        2: ("sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")),
        1: (
            "sys/fs/cgroup/memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    }[version]
    files = {"proc/meminfo": "MemTotal: 500000 kB\nMemAvailable: 97656 kB\nHugePages_Total: 0\n"}
    own = max(limits, default="", key=len)
    files["proc/self/cgroup"] = (
        f"0::{own or '/'}\n" if version == 2 else f"7:cpu,cpuacct:/x\n4:memory:{own or '/'}\n0::/\n"
    )
    for group, (most, used, cached) in limits.items():
        files |= {f"{top}{group}/{names[0]}": f"{most}\n", f"{top}{group}/{names[1]}": f"{used}\n"}
        files[f"{top}{group}/memory.stat"] = f"anon 5\n{names[2]} {cached}\nactive_file 9\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_what_the_machine_has_and_the_jobs_groups_allow(tmp_path, version):
    job = "/slurm/job_7/step_0"
    roomy, tight = ("9000000000", 10, 0), ("60000000", 50_000_000, 20_000_000)
    assert free_memory_bytes(grouped(tmp_path / "none", version, {})) == 99_999_744
    assert free_memory_bytes(grouped(tmp_path / "roomy", version, {job: roomy})) == 99_999_744
    assert free_memory_bytes(grouped(tmp_path / "own", version, {job: tight})) == 30_000_000
    assert (
        free_memory_bytes(
            grouped(tmp_path / "outer", version, {job: ("max", 1, 1), "/slurm/job_7": tight})
        )
        == 30_000_000
    )
    assert free_memory_bytes(grouped(tmp_path / "over", version, {job: ("1000", 5000, 0)})) == 0
    assert 0 < free_memory_bytes() < 1 << 60


def test_costs_are_told_with_each_save(tmp_path):
    trained(tmp_path / "a", steps=4)
    for event in events(tmp_path / "a", "saved"):
        assert event["blocked_s"] > 0 and 0 < event["copy_s"] < event["seconds"], json.dumps(event)
