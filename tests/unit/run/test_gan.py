"""Two networks with two optimizers, killed and resumed; and the files that a run's own code keeps
with it."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparing import differing, losses
from conftest import REPO, events, kill_tree, run, start, torchrun, wait_until
from conftest import harness as harness_command
from fault_proxy import FaultProxy
from PIL import Image
from remote_runs import Home, command  # noqa: F401 - a fixture
from s3_server import S3Server
from small_task import Noisy
from there import there
from torch import nn

import harness
from harness.checkpoint import attempts, load
from harness.checkpoint.catalog import read_catalog
from harness.errors import SupersededError, UsageError
from harness.monitoring import kept_files
from harness.store import LocalStore
from harness.tasks import gan
from harness.tasks.digits import load_split

pytestmark = pytest.mark.usefixtures("process_as_it_was")
CONFIG = str(REPO / "configs/gan.yaml")
STEPS = 80
SHORT = (
    "--config",
    CONFIG,
    f"train.max_steps={STEPS}",
    "task.args.picture_every_steps=25",
    "log.every_steps=1",
    "eval.every_steps=30",
    "checkpoint.every_steps=7",
    "checkpoint.every_s=null",
)
TRACKED = ("generator", "discriminator", "generator_optimizer", "discriminator_optimizer")


def pictures(directory: Path) -> dict[str, bytes]:
    """The samples that a run has kept, by name."""
    return {file.name: file.read_bytes() for file in sorted(directory.glob("files/samples/*"))}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_killed_gan_goes_on_to_the_same_networks_and_pictures(ranks: int, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run(torchrun(ranks, *SHORT, f"run.dir={whole}"))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "log").open("w") as log:
        process = start(torchrun(ranks, *SHORT, f"run.dir={killed}"), output=log)
    try:
        wait_until(
            lambda: len(events(killed, "step")) >= 15 or process.poll() is not None,
            "15 steps",
            every_s=0.002,
        )
    finally:
        kill_tree(process.pid)
        process.wait()
    reached = len(events(killed, "step"))
    assert 15 <= reached < STEPS and f"step_{STEPS:08d}.png" not in pictures(killed), (
        tmp_path / "log"
    ).read_text()
    again = run(torchrun(ranks, *SHORT, f"run.dir={killed}"))
    assert again.returncode == 0, again.stderr
    assert differing(whole, killed) == []
    assert losses(killed) == losses(whole)
    store = LocalStore(killed)
    payload = load.load(store, there(read_catalog(store).head))
    assert {f"{name}_state_dict" for name in TRACKED} <= set(payload)
    assert all(payload[f"{name}_optimizer_state_dict"]["state"] for name in TRACKED[:2])
    assert list(pictures(whole)) == [f"step_{step:08d}.png" for step in (25, 50, 75, 80)]
    assert pictures(killed) == pictures(whole)


def test_a_picture_is_a_grid_of_samples_and_drawing_it_disturbs_nothing() -> None:
    torch.manual_seed(0)
    network = gan.generator(32)
    network(torch.randn(16, gan.NOISE))
    before, state = (
        torch.random.get_rng_state(),
        {name: tensor.clone() for name, tensor in network.state_dict().items()},
    )
    first = gan.picture(network)
    assert all(part.training for part in network.modules())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert gan.picture(network) == first
    image = Image.open(io.BytesIO(first))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (480, 480))
    tiles = {
        image.crop((x, y, x + 60, y + 60)).tobytes()
        for x in range(0, 480, 60)
        for y in range(0, 480, 60)
    }
    assert len(tiles) == 64, "each sample is another one"


class Always(nn.Module):
    """Draws the same images, whatever the noise."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        self.images, self.unused = images, nn.Parameter(torch.zeros(()))

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return self.images[torch.arange(len(noise)) % len(self.images)]


# What the default training stays below, and nothing does that draws too few kinds of digits.
BOUND = 2.9


def test_coverage_tells_real_digits_from_an_untrained_and_from_collapsed_generators() -> None:
    real, held_out = load_split()
    images, classes = real.images * 2 - 1, range(10)
    judge = gan.discriminator(32).eval()

    @torch.no_grad()
    def coverage(network: nn.Module) -> float:
        batch = held_out.images * 2 - 1
        return float(
            gan.evaluate({"generator": network.eval(), "discriminator": judge}, batch)[
                "val_coverage"
            ]
        ) / len(batch)

    assert coverage(Always(images[:512])) < 2.5
    assert coverage(gan.generator(256)) > 5
    assert coverage(Always(images[:1])) > 5
    assert coverage(Always(images.mean(0, keepdim=True))) > 4
    assert coverage(Always(torch.stack([images[real.labels == label][0] for label in classes]))) > 4
    assert (
        coverage(Always(torch.stack([images[real.labels == label].mean(0) for label in classes])))
        > BOUND
    )
    assert coverage(Always(images[real.labels < 5][:512])) > BOUND, (
        "five of the ten digits are missing"
    )


@pytest.mark.slow
def test_the_default_training_draws_all_kinds_of_digits(tmp_path: Path) -> None:
    directory = tmp_path / "gan"
    done = run(
        harness_command(
            "launch", "--nproc-per-node", "2", "--config", CONFIG, f"run.dir={directory}"
        ),
        limit_s=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [event["val_coverage"] for event in events(directory, "evaluated")]
    assert found[-1] < BOUND and min(found) < BOUND - 0.1, found
    assert len(pictures(directory)) == len(found)


def test_micro_batches_are_refused_in_words() -> None:
    job = gan.build()
    with pytest.raises(UsageError, match="takes each batch whole"):
        there(job.step)(None, [torch.zeros(4, 1, 8, 8)] * 2)


def loop(
    directory: Path | None, each: Callable[[Any, int], object], steps: int = 6, **options: Any
) -> Any:
    """Train for some steps, and call `each(run, step)` in every one."""
    own = harness.init(
        directory, **({"seed": 3, "save_every_s": None, "save_every_steps": 1} | options)
    )
    model = nn.Linear(12, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    own.track(model=model, optimizer=optimizer)
    for x, y in own.batches(Noisy(10 * steps), global_batch_size=10, epochs=1):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        each(own, own.step)
    return own


@pytest.fixture
def home(bucket: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch) -> Home:
    found = Home(*bucket)
    for name, value in found.env().items():
        monkeypatch.setenv(name, value)
    return found


def test_a_kept_file_is_in_the_directory_at_once_and_the_newest_data_counts(tmp_path: Path) -> None:
    left = tmp_path / "files" / "samples" / "a.png.tmp-0000-0123abcd"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of a killed command")
    os.utime(left, (0, 0))

    def each(own: Any, step: int) -> None:
        own.keep("samples/a.png", b"step %d" % step)
        assert (tmp_path / "files/samples/a.png").read_bytes() == b"step %d" % step

    loop(tmp_path, each)
    assert [file.name for file in left.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("how", ["checked each time", "frozen for a while"])
def test_a_superseded_process_replaces_no_file_of_its_successor(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two saves, which would notice."""
    if how == "checked each time":
        monkeypatch.setattr(kept_files, "FENCE_S", 0.0)
    store = LocalStore(tmp_path)

    def each(own: Any, step: int) -> None:
        own.keep("table.json", b"%d" % step)
        if step == 3:
            successor = attempts.claim(read_catalog(store), None, 1)
            kept_files.write_file(store, "files/table.json", b"the successor's", successor)
            time.sleep(kept_files.FENCE_S)

    with pytest.raises(SupersededError, match="attempt 2"):
        loop(tmp_path, each, save_every_steps=None)
    assert store.read("files/table.json") == b"the successor's"


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/../../x", "", ".", "a//b", "a/", "a\0b", "a.png.tmp-0001-0123abcd"]
)
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be kept"):
        loop(tmp_path / "run", lambda own, step: own.keep(name, b"data"))
    assert not (tmp_path / "x").exists() and not (tmp_path / "run" / "files").exists()


def test_files_are_kept_inside_the_loop_only_and_are_bytes(tmp_path: Path) -> None:
    early = harness.init(tmp_path / "early")
    with pytest.raises(UsageError, match="outside the loop"):
        early.keep("a", b"")
    with pytest.raises(UsageError, match="outside the loop"):
        loop(tmp_path / "late", lambda own, step: None).keep("a", b"")
    with pytest.raises(UsageError, match="takes bytes"):
        loop(tmp_path / "text", lambda own, step: own.keep("a", "text"))


def test_a_file_that_cannot_be_written_does_not_stop_the_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "files").write_bytes(b"in the way of the folder")
    assert loop(
        tmp_path, lambda own, step: own.keep("samples/a.png", b"data") if step == 2 else None
    ).finished
    assert [(event["file"], event["store"]) for event in events(tmp_path, "not_kept")] == [
        ("files/samples/a.png", str(tmp_path))
    ]
    assert capfd.readouterr().err.count("files/samples/a.png is not in") == 1


@pytest.mark.parametrize("with_directory", [True, False])
def test_kept_files_are_in_the_bucket_after_the_run(
    with_directory: bool,
    home: Home,
    tmp_path: Path,
    command: Callable[..., tuple[int, str]],  # noqa: F811
) -> None:
    directory = tmp_path if with_directory else None

    def each(own: Any, step: int) -> None:
        own.keep("table.json", json.dumps({"step": step}).encode())
        own.keep(f"samples/step_{step}.bin", bytes([step]) * 1000)

    loop(directory, each, remote=home.url)
    for step in range(1, 7):
        assert home.read(f"files/samples/step_{step}.bin") == bytes([step]) * 1000
    assert json.loads(home.read("files/table.json")) == {"step": 6}
    kept = {key for key in home.keys() if key.startswith("files/")}  # noqa: SIM118 - no dict
    for place in (home.url, str(tmp_path))[: 1 + with_directory]:
        assert command(home.env(), "verify", place)[0] == 0
        assert command(home.env(), "prune", "--yes", "--keep-last", "1", place)[0] == 0
        code, text = command(home.env(), "ls", place)
        assert code == 0 and "files" not in text.replace(place, ""), text
    assert {key for key in home.keys() if key.startswith("files/")} == kept and len(kept) == 7  # noqa: SIM118


def test_a_remote_that_is_a_directory_gets_the_folders_too(tmp_path: Path) -> None:
    loop(
        tmp_path / "here",
        lambda own, step: own.keep("samples/deeper/a.png", b"%d" % step),
        remote=f"file://{tmp_path}/there",
    )
    for place in ("here", "there"):
        assert (tmp_path / place / "files/samples/deeper/a.png").read_bytes() == b"6"


def test_files_that_are_kept_in_an_outage_arrive_afterwards(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_files, "MOST_KEPT_BYTES", 1000)
    with FaultProxy(home.server.host, home.server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)

        def each(own: Any, step: int) -> None:
            if step == 2:
                proxy.down()
                own.keep("too_old.bin", bytes(600))
            if step == 3:
                wait_until(lambda: events(tmp_path, "retry"), "a request that failed")
                own.keep("a.bin", bytes(600))
                own.keep("b.txt", b"old")
            if step == 5:
                own.keep("b.txt", b"new")
                assert not any(key.startswith("files/") for key in home.keys())  # noqa: SIM118
            if step == 6:
                proxy.up()

        assert loop(tmp_path, each, remote=home.url).finished
    assert home.read("files/a.bin") == bytes(600) and home.read("files/b.txt") == b"new"
    assert [event["file"] for event in events(tmp_path, "not_kept")] == ["files/too_old.bin"]
    assert (tmp_path / "files/too_old.bin").read_bytes() == bytes(600), (
        "in the directory it is all the same"
    )
    assert home.steps()[-1] == 6
