"""Runs that live in a bucket: what is in it, how one is started, and one that was trained without
interruption."""

from __future__ import annotations

import functools
import io
import json
import secrets
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from conftest import run, torchrun
from fault_proxy import FaultProxy
from s3_server import S3Server

from harness.checkpoint import format as fmt
from harness.checkpoint.format import CHECKPOINT_NAME
from harness.cli import main
from harness.exchange.compare import differences

STEPS, EVERY = 40, 5
TASK = (
    "task.name=small_task:build",
    "train.epochs=8",
    "log.every_steps=1",
    f"checkpoint.every_steps={EVERY}",
    "checkpoint.every_s=null",
    "checkpoint.best=val_loss:min",
    "eval.every_steps=10",
    "resume.accept=[config]",
)


@dataclass(frozen=True)
class Home:
    """One run's prefix in a bucket, as a plain client sees it: without the proxy, and without the
    harness's stores."""

    server: S3Server
    bucket: str
    name: str = "run"

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}/{self.name}"

    @functools.cached_property
    def client(self) -> Any:
        return self.server.client()

    def env(self, through: FaultProxy | None = None) -> dict[str, str]:
        return self.server.environment | ({"AWS_ENDPOINT_URL": through.url} if through else {})

    def keys(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=f"{self.name}/"
        )
        return [
            item["Key"][len(self.name) + 1 :] for page in pages for item in page.get("Contents", [])
        ]

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=self.bucket, Key=f"{self.name}/{key}")["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"{self.name}/{key}", Body=data)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=f"{self.name}/{key}")

    def manifests(self) -> list[dict[str, Any]]:
        """All, oldest first, by (attempt, step)."""
        matches = {key: CHECKPOINT_NAME.match(key) for key in self.keys()}
        found = [
            json.loads(self.read(key))
            for key, match in matches.items()
            if match and match["kind"] == "json" and not match["aside"]
        ]
        return sorted(found, key=lambda manifest: (manifest["attempt"], manifest["step"]))

    def steps(self) -> list[int]:
        return [manifest["step"] for manifest in self.manifests()]

    def head(self) -> tuple[int, int]:
        """(attempt, step) of the newest by its name, (0, 0) if there is none."""
        matches = [
            match
            for key in self.keys()
            if (match := CHECKPOINT_NAME.match(key))
            and match["kind"] == "json"
            and not match["aside"]
        ]
        return max(
            ((int(match["attempt"]), int(match["step"])) for match in matches), default=(0, 0)
        )

    def attempts(self) -> dict[int, dict[str, Any]]:
        matches = {
            key: match
            for key in self.keys()
            if (match := fmt.ATTEMPT_NAME.match(key)) and not match["end"]
        }
        return {int(match["attempt"]): json.loads(self.read(key)) for key, match in matches.items()}

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """From the segments, in the order of attempts."""
        lines = [
            line
            for key in sorted(self.keys())
            if key.startswith("events/") and key.endswith(".jsonl")
            for line in self.read(key).splitlines()
        ]
        return [event for event in map(json.loads, lines) if kind is None or event["event"] == kind]

    def data(self, manifest: dict[str, Any]) -> bytes:
        """A checkpoint's bytes; whole, by its manifest."""
        file = manifest["files"][0]
        data = self.read(f"checkpoints/{file['name']}")
        assert (
            len(data) == file["size_bytes"]
            and f"blake3:{blake3(data).hexdigest()}" == file["digest"]
        ), f"{file['name']} is torn"
        return data

    def newest(self) -> dict[str, Any]:
        """What is in the newest checkpoint, but for the settings, which name the directory."""
        payload = torch.load(io.BytesIO(self.data(self.manifests()[-1])), weights_only=True)
        payload.pop("config")
        return payload

    def check_none_is_torn(self) -> None:
        for manifest in self.manifests():
            self.data(manifest)

    def branch(self, step: int = STEPS) -> Home:
        """A copy in a prefix of its own, as if the run had been killed right after it saved this
        step."""
        other = Home(self.server, self.bucket, f"branch-{secrets.token_hex(4)}")
        for key in self.keys():
            match = CHECKPOINT_NAME.match(key)
            if key in ("config.yaml", "attempts/0001.json") or (
                match and int(match["step"]) <= step
            ):
                source = {"Bucket": self.bucket, "Key": f"{self.name}/{key}"}
                self.client.copy_object(
                    Bucket=self.bucket, Key=f"{other.name}/{key}", CopySource=source
                )
        return other


def differing(a: Home, b: Home) -> list[tuple[str, ...]]:
    """What differs between the newest checkpoints of two runs, tensor for tensor."""
    assert a.manifests()[-1]["final"] and b.manifests()[-1]["final"], "not finished"
    return list(differences(a.newest(), b.newest()))


def losses(home: Home) -> dict[int, float]:
    """The loss of each step; one that was done again must have given the same."""
    found: dict[int, float] = {}
    for event in home.events("step"):
        assert found.setdefault(event["step"], event["loss"]) == event["loss"], (
            f"step {event['step']} came out differently when done again"
        )
    return found


def fetched_bytes(proxy: FaultProxy, contains: str = ".pt") -> int:
    """How many bytes of such objects were asked for."""
    total = 0
    for request in proxy.requests:
        if request.method == "GET" and contains in request.path:
            assert request.headers.get("range"), f"all of {request.path} was asked for"
            first, _, last = request.headers["range"].removeprefix("bytes=").partition("-")
            total += int(last) - int(first) + 1
    return total


@dataclass
class Trained:
    """A run of two ranks that nothing disturbed, with all its checkpoints, in a directory and in a
    bucket."""

    home: Home
    directory: Path
    output: str
    losses: dict[int, float] = field(default_factory=dict)

    def branch(self, step: int, directory: Path) -> Home:
        """A copy of both, as if the run had been killed right after it saved this step; the
        directory remembers the copy's bucket."""
        home = self.home.branch(step)
        shutil.copytree(self.directory, directory)
        for file in (directory / "checkpoints").iterdir():
            if int(file.name[5:13]) > step:
                file.unlink()
        (directory / "attempts" / "0001.end.json").unlink()
        record = directory / "attempts" / "0001.json"
        record.write_text(json.dumps(json.loads(record.read_text()) | {"remote": home.url}))
        return home


_TRAINED: dict[int, Trained] = {}


@pytest.fixture
def trained(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Made once for all modules; to be copied (`branch`), not to be changed."""
    if s3_server.port not in _TRAINED:
        home = Home(s3_server, s3_server.make_bucket(f"trained-{secrets.token_hex(4)}"), "whole")
        directory = tmp_path_factory.mktemp("trained") / "run"
        # also what is overtaken before it was uploaded
        every = ("checkpoint.keep_last=50", f"store.keep.every_steps={EVERY}")
        settings = (*TASK, f"run.dir={directory}", f"run.remote={home.url}", *every)
        done = run(torchrun(2, *settings), env=home.env())
        assert done.returncode == 0, done.stdout + done.stderr
        _TRAINED[s3_server.port] = Trained(home, directory, done.stdout + done.stderr, losses(home))
    return _TRAINED[s3_server.port]


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """A command of the `harness` program in this process (starting one takes seconds): its exit
    code, and what it printed."""

    def execute(env: dict[str, str], *arguments: str) -> tuple[int, str]:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        code = main(list(arguments))
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return execute


def ended(process: subprocess.Popen[str], limit_s: float = 240) -> tuple[int, str]:
    """Wait for a process; its exit code and output."""
    out, err = process.communicate(timeout=limit_s)
    return process.returncode, out + (err or "")
