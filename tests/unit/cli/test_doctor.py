"""`harness doctor` and the check at the start of an attempt: what will go wrong is said before it
does."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
from conftest import harness, run
from fsspec.implementations.memory import MemoryFileSystem
from remote_lives import run_forked
from s3_server import S3Server

from harness import cli
from harness.cli import doctor
from harness.errors import RefusedError
from harness.store import open_store, probe


class Careless(MemoryFileSystem):
    """A file system that overwrites what is to be created."""

    protocol = "careless"

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: object) -> None:
        super().pipe_file(path, value, mode="overwrite", **kwargs)


fsspec.register_implementation("careless", Careless, clobber=True)


def keys(server: S3Server, bucket: str) -> list[str]:
    return [
        entry["Key"] for entry in server.client().list_objects_v2(Bucket=bucket).get("Contents", [])
    ]


def test_everything_in_order_is_said_line_by_line_and_leaves_nothing_behind(
    bucket: tuple[S3Server, str], tmp_path: Path
) -> None:
    server, name = bucket
    done = run_forked(
        harness("doctor", str(tmp_path / "a"), f"s3://{name}/a", "--size-mb", "30"),
        env=server.environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for said in (
        "create exclusively",
        "upload in parts",
        "clock",
        "free",
        "a checkpoint takes about",
        "read back",
    ):
        assert said in done.stdout
    assert all(line.startswith("ok") for line in done.stdout.splitlines())
    assert keys(server, name) == [] and list(tmp_path.iterdir()) == []


def test_what_is_wrong_with_a_bucket_is_said_with_what_to_do(
    bucket: tuple[S3Server, str], tmp_path: Path
) -> None:
    server, name = bucket
    for url, environment, said in (
        (f"s3://{name}-not-there/a", {}, "Create the bucket"),
        (f"s3://{name}/a", {"AWS_SECRET_ACCESS_KEY": "0" * 40}, "Check AWS_ACCESS_KEY_ID"),
    ):
        done = run_forked(harness("doctor", url), env=server.environment | environment)
        assert done.returncode == 78 and "FAIL" in done.stdout and said in done.stdout, done.stdout
        assert "Traceback" not in done.stdout + done.stderr


def test_a_disk_without_room_for_the_checkpoints_is_a_failure(tmp_path: Path) -> None:
    done = run_forked(harness("doctor", str(tmp_path / "a"), "--size-mb", "1000000000"))
    assert done.returncode == 78 and "keep fewer (checkpoint.keep_last)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_does_not_create_exclusively_is_refused_before_an_attempt_is_claimed() -> None:
    store = open_store("careless://place/a")
    with pytest.raises(RefusedError, match="does not create exclusively"):
        probe.check(store)
    assert store.entries(probe.FOLDER) == []


def test_ranks_that_differ_are_named_with_what_differs() -> None:
    same, other = {"torch": "2.13", "Python": "3.11"}, {"torch": "2.12", "Python": "3.11"}
    findings = list(doctor._compare([same, same, other]))
    assert [finding.code for finding in findings] == [78, 0]
    assert "rank 2 has 2.12" in findings[0].text and "rank 0 has 2.13" in findings[0].text


def test_under_torchrun_the_ranks_are_compared(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "harness",
        "doctor",
    ]
    done = run([*command, str(tmp_path / "a"), "--size-mb", "1"])
    assert done.returncode == 0, done.stderr
    assert (
        "2 ranks agree on settings" in done.stdout
        and "2 ranks agree on the run directory" in done.stdout
    )
    assert done.stdout.count("create exclusively") == 1, "only one rank tries things out"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["nan", "inf", "-1"])
def test_a_size_that_is_none_is_refused(size, tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "a"), "--size-mb", size]) == 78
    assert f"found: {size}" in capsys.readouterr().err
