"""Runs that earlier releases have left go on: from a directory, from a bucket, and from one that
was killed with steps to recompute."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from library_runs import newest
from older_runs import LAST, RANKS, RELEASES, STEPS, live_once
from programs import Lived

from harness.exchange.compare import differences

VERSIONS = sorted(path.name for path in RELEASES.iterdir())
pytestmark = pytest.mark.usefixtures("process_as_it_was")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of the same program, begun and ended with this code."""
    folder = tmp_path_factory.mktemp("whole")
    assert live_once(folder, "run").codes == [0] * RANKS
    return newest(folder / "run")


def check(resumed: Lived, folder: Path, name: str, saved: Path, whole: dict[str, Any]) -> None:
    """The run began with exactly what the old file holds, which torch reads by itself, and ended
    with the samples of a whole one."""
    assert resumed.codes == [0] * RANKS, resumed.texts
    assert "another one than" not in resumed.text and "differ" not in resumed.text
    file = torch.load(saved, weights_only=True)
    for rank in range(RANKS):
        seen = torch.load(folder / f"{name}.seen.{rank}.pt", weights_only=False)
        own = file["own"][rank]
        assert seen["step"] == file["step"]
        for part in ("model", "optimizer", "scheduler", "average"):
            assert not list(differences(seen[part], file[f"{part}_state_dict"])), (part, rank)
        attributes = file["attributes"]["model"][""]
        assert (seen["warmth"], attributes["warmth"]["built"]) == (attributes["warmth"]["now"], 1.0)
        assert torch.equal(seen["mask"], attributes["buffer mask"]["now"]) and seen["mask"][0] == 0
        assert seen["mode"] is file["attributes"]["model"]["layers.1"]["training"]["now"] is False
        assert torch.equal(seen["torch"], file["rng"][rank]["torch"])
        assert seen["python"][1] == tuple(file["rng"][rank]["python"]["words"].tolist())
        assert (seen["numpy"][1] == file["rng"][rank]["numpy"]["key"].numpy()).all()
        assert torch.equal(seen["noise"], own["generators"]["noise"]["state"])
        ((_, samples),) = own["state"]
        assert (type(seen["state"]["scale"]).__name__, seen["state"]["samples"]) == (
            "float32",
            samples,
        )
    last = newest(folder / name)
    assert last["step"] == STEPS and last["state"]["samples"] == whole["state"]["samples"]
    assert last.keys() == whole.keys()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["stopped", "killed"])
def test_a_run_directory_of_an_earlier_release_is_resumed(version, name, whole, tmp_path):
    shutil.copytree(RELEASES / version / name, tmp_path / name)
    resumed = live_once(tmp_path, name)
    assert f"resumes from step {LAST if name == 'stopped' else 6} " in resumed.text
    (saved,) = (RELEASES / version / name / "checkpoints").glob(
        f"step_{LAST if name == 'stopped' else 6:08d}-*.pt"
    )
    check(resumed, tmp_path, name, saved, whole)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_bucket_of_an_earlier_release_is_resumed(version, whole, bucket, tmp_path):
    server, place = bucket
    for path in (RELEASES / version / "bucket").rglob("*"):
        if path.is_file():
            server.client().put_object(
                Bucket=place,
                Key=str(path.relative_to(RELEASES / version / "bucket")),
                Body=path.read_bytes(),
            )
    resumed = live_once(tmp_path, "run", REMOTE=f"s3://{place}/run", **server.environment)
    assert f"resumes from step {LAST} " in resumed.text
    (saved,) = (RELEASES / version / "bucket").rglob(f"step_{LAST:08d}-*.pt")
    check(resumed, tmp_path, "run", saved, whole)
