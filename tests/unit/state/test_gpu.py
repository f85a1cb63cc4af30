"""On a GPU: what is saved is the state of the boundary while the GPU computes on, and a killed run
ends as if nothing had happened.

They need one GPU and are run by `scripts/test --gpu`.
"""

from __future__ import annotations

import copy
import sys
import time

import pytest
import torch
from big_state import OPTIMIZERS, Big, check_saved, clamp_in_secret, clamp_openly, points, trained
from conftest import events, harness, run
from library_runs import Custom, newest, saved_and_read
from there import there
from torch import nn

import harness as harness_package
from harness import state
from harness.exchange.compare import differences
from harness.state.gpu_copy import GpuCopy
from harness.state.snapshot import Snapshot
from harness.store.staging_buffer import StagingBuffer, write_to

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("process_as_it_was")]
BUSY = 20_000_000  # numbers in a large state


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    assert torch.cuda.is_available(), "these tests need a GPU"


def layouts() -> dict[str, torch.Tensor]:
    """Every way in which a tensor may lie in a GPU's memory."""
    whole = torch.arange(1_000_000.0, device="cuda")
    tied = torch.randn(50, 7, device="cuda")
    return {
        "x": tied,
        "y": tied,
        "head": whole[:10],
        "tail": whole[-7:],
        "columns": whole.view(1000, 1000)[:, :2],
        "empty": whole[:0],
        "scalar": torch.tensor(2.5, device="cuda"),
        "half": torch.randn(9, device="cuda").half(),
        "flags": whole[:3] > 1,
        "channels": torch.randn(2, 3, 4, 5, device="cuda").to(memory_format=torch.channels_last),
        "turned": torch.randn(4, 6, device="cuda").t(),
        "conj": torch.randn(3, dtype=torch.complex64, device="cuda").conj(),
        "b": torch.randn(99, 11, device="cuda").to(torch.bfloat16),
        "wide": whole[3:4].expand(5),
        "cpu": torch.randn(3),
    }


def test_tensors_of_every_layout_are_captured_and_come_back(tmp_path):
    value = layouts()
    captured = state.capture({"custom": Custom(value)})
    assert all(tensor.is_cpu for tensor in captured["custom_state_dict"]["value"].values())
    read = saved_and_read(tmp_path, captured)["custom_state_dict"]["value"]
    for name, tensor in value.items():
        assert torch.equal(read[name], tensor.cpu()) and read[name].dtype == tensor.dtype, name
    assert read["x"].data_ptr() == read["y"].data_ptr(), "tied tensors stay tied"
    assert read["channels"].is_contiguous(memory_format=torch.channels_last)
    assert (tmp_path / "x.pt").stat().st_size < 50_000, "a view does not drag its storage along"


@pytest.mark.parametrize("steady", [True, False])
def test_the_image_is_the_file_that_torch_would_have_written(tmp_path, steady):
    tracked, staging, gpu_copy, path = (
        {"custom": Custom(layouts())},
        StagingBuffer(),
        GpuCopy(),
        tmp_path / "x.pt",
    )
    for _ in range(2):  # the second time in memory that is pinned, and full of the first
        captured = state.captured({"step": 1}, tracked)
        addresses = {met.saved.data_ptr() for met in captured.seen.all} if steady else set()
        snapshot = Snapshot(captured.payload, addresses, captured.gpu_sources(), gpu_copy)
        snapshot.copy_rest()
        snapshot.copy_into(staging)
        snapshot.arrive()
        assert not snapshot.is_torn(compare=True)
        path.touch()
        write_to(there(staging.memory), staging.size_bytes, str(path))
        found = torch.load(path, weights_only=True)
        expected = {"step": 1} | state.capture(tracked)
        assert list(differences(found, expected)) == []
        for name, value in tracked["custom"].value.items():
            if value.is_floating_point() and name != "wide":  # one number, several times
                value.add_(1)
        assert snapshot.is_torn(compare=False) == steady
    gpu_copy.unpin()
    staging.close()


ON_GPU = OPTIMIZERS | {
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, fused=True),
    "capturable": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, capturable=True),
}


@pytest.mark.parametrize("snapshot", ["overlapped", "checked", "at_once"])
@pytest.mark.parametrize("optimizer", ON_GPU)
def test_what_is_saved_is_the_state_of_the_boundary(tmp_path, optimizer, snapshot, capfd):
    seen = trained(tmp_path / "a", ON_GPU[optimizer], snapshot=snapshot)
    check_saved(tmp_path / "a", seen, list(range(1, 9)))
    assert "training wait" not in capfd.readouterr().out


@pytest.mark.parametrize("clamp", [clamp_in_secret, clamp_openly])
def test_a_loop_that_changes_weights_before_its_update_is_found_out(tmp_path, clamp, capfd):
    seen = trained(tmp_path / "a", before=clamp)
    check_saved(tmp_path / "a", seen, list(range(1, 9)))
    assert (
        capfd.readouterr().out.count(
            "saves make training wait: the state changes between two updates"
        )
        == 1
    )


def test_the_update_waits_on_the_gpu_and_the_training_thread_does_not(tmp_path):
    """The state takes much longer to copy than the step to compute. Steps are asked for ahead of
    the GPU, saves among them."""
    job = harness_package.init(
        tmp_path / "a", seed=1, save_every_s=None, save_every_steps=4, keep_last=99
    )
    model = Big(BUSY).to(job.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    job.track(model=model, optimizer=optimizer)
    seen, took = {}, []
    for (x,) in job.batches(points(8 * 12), global_batch_size=8, epochs=1):
        if (job.step - 1) % 4 == 0:
            seen[job.step - 1] = copy.deepcopy(
                {name: value.cpu() for name, value in model.state_dict().items()}
            )
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        began_at = time.perf_counter()
        optimizer.step()
        took.append(time.perf_counter() - began_at)
    saved = {event["step"]: event for event in events(tmp_path / "a", "saved")}
    assert sorted(saved) == [4, 8, 12]
    assert all(event["copy_s"] > 0.005 for event in saved.values())
    for step in (4, 8):
        name = f"step_{step:08d}-0001.pt"
        found = torch.load(tmp_path / "a/checkpoints" / name, weights_only=True)["model_state_dict"]
        assert list(differences(found, seen[step])) == []


def test_memory_that_cannot_be_pinned_is_copied_to_all_the_same(tmp_path, monkeypatch):
    """The kernel or the driver refuses; and the error that CUDA then keeps in store is not the next
    one's who computes."""

    class Refusing:
        @staticmethod
        def cudaHostRegister(  # noqa: N802 - its name
            address: int, size_bytes: int, flags: int
        ) -> int:
            # An address where there is nothing.
            return int(vars(torch.cuda)["_cudart"].cudaHostRegister(1, size_bytes, flags))

        @staticmethod
        def cudaHostUnregister(address: int) -> int:  # noqa: N802
            raise AssertionError("it was not registered")

    torch.cuda.cudart()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Refusing)
    seen = trained(tmp_path / "a", snapshot="at_once")
    check_saved(tmp_path / "a", seen, list(range(1, 9)))


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    def spoil(model: nn.Module) -> None:
        assert isinstance(model, Big)
        with torch.no_grad():
            model.out.bias.fill_(float("nan"))

    with pytest.raises(harness_package.HarnessError, match="parameters are not finite"):
        trained(tmp_path / "a", before=spoil)


def test_state_of_the_users_on_a_gpu_is_kept(tmp_path):
    job = harness_package.init(tmp_path / "a", seed=1, save_every_s=None)
    model = nn.Linear(16, 1).to(job.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job.track(model=model, optimizer=optimizer)
    for (x,) in job.batches(points(16), global_batch_size=8, epochs=1):
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()
        job.state["mean"] = x.mean(0)
    assert torch.equal(newest(tmp_path / "a")["state"]["mean"], x.mean(0).cpu())


TASK = (
    "task.name=small_task:build",
    "train.deterministic=true",
    "train.epochs=8",
    "log.every_steps=1",
    "checkpoint.every_steps=3",
)
KINDS = {
    "fp32": (),
    "fp16": ("train.precision=fp16",),
    "bf16": ("train.precision=bf16",),
    "accumulated": ("train.global_batch_size=32", "train.micro_batch_size=8"),
    "memory": ("checkpoint.memory=true", "checkpoint.every_steps=20"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path, kind):
    """The program, drilled; dropout draws from the GPU's generator."""
    done = run(
        harness("drill", "--faults", "5", *TASK, *KINDS[kind], "task.args.sleep_s=0.02"),
        cwd=tmp_path,
        limit_s=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_checkpoint_of_a_gpu_opens_where_there_is_none(tmp_path):
    seen = trained(tmp_path / "a", steps=2)
    path = tmp_path / "a/checkpoints/step_00000002-0001.pt"
    code = (
        "import sys, torch; assert not torch.cuda.is_available(); "
        "print(torch.load(sys.argv[1], weights_only=True)['step'])"
    )
    done = run([sys.executable, "-c", code, str(path)], env={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and done.stdout == f"{max(seen)}\n", done.stderr
    done = run(harness("verify", str(tmp_path / "a")))
    assert done.returncode == 0, done.stdout + done.stderr
