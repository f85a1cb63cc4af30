"""Files, records, settings and folders that somebody else wrote: nothing in them is run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import unicodedata
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run
from s3_server import S3Server
from safetensors.torch import save_file

import harness
from harness import config
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import read_catalog
from harness.cli import main, supervise
from harness.config.schema_services import NotifySettings, SlurmSettings
from harness.config.user_program import check_loop
from harness.errors import ChangedError, HarnessError, UsageError
from harness.exchange import files, rebuild, single_read
from harness.exchange.describe import describe
from harness.monitoring import trackers
from harness.report import page, timeline
from harness.saving import writer_process
from harness.saving.save_policy import kill_history
from harness.store import LocalStore, open_store
from harness.supervision import job_script
from harness.supervision.notify import notify
from harness.supervision.restart_policy import Failure, Outcome

EVIL = '"><script>alert(1)</script>'


def stored(tmp_path: Path, name: str, args: dict[str, Any]) -> str:
    """A file that names this as the task that its model is of."""
    settings = config.load(None, [])[1]
    settings["task"] = {"name": name, "args": args}
    path = tmp_path / "theirs.pt"
    torch.save({"config": settings, "model_state_dict": {"weight": torch.zeros(1, 1)}}, path)
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "harness.exchange.exporting:export",
        "harness.tasks:os",
        "harness.tasks.digits:Task",
        "harness.tasks.digits.x:build",
        "sprung:build",
        "harness.tasks...sprung:build",
        "harness.task:find",
        " harness.tasks.digits:build",
    ],
)
def test_a_name_in_a_file_is_not_called_and_not_imported(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sprung.py").write_text(
        "from harness import Task\nopen('sprung', 'w')\ndef build():\n    open('sprung', 'w')\n"
    )
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "evil.pt"
    torch.save({"weight": torch.ones(1)}, evil)
    asked: dict[str, Any] = (
        {"checkpoint": str(evil), "out": "sprung", "trust": True} if "export" in name else {}
    )
    path = stored(tmp_path, name, asked)
    with pytest.raises(UsageError):
        harness.load_model(path)
    assert main(["export", path, "x.pt", "--format", "module"]) == 78
    assert not Path("sprung").exists() and "sprung" not in sys.modules


def test_a_task_of_the_users_own_is_called_as_they_name_or_confirm_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "import torch\nfrom harness import Task\ndef build():\n"
        "    m = torch.nn.Linear(1, 1, bias=False)\n    return Task(m, [], [])\n"
    )
    (tmp_path / "confirmed_task.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    path = stored(tmp_path, "confirmed_task:build", {})
    with pytest.raises(UsageError, match="task='confirmed_task:build'"):
        harness.load_model(path)
    for given in ({"task": "confirmed_task:build"}, {"trust": True}):
        assert harness.load_model(path, **given).weight.item() == 0.0


def test_the_tasks_of_the_package_need_no_word() -> None:
    rebuild._check_named("harness.tasks.digits:build")


def test_a_report_shows_what_records_hold_as_text() -> None:
    spent = timeline._numbers({EVIL: 3.0, "x": 2, "training": 5.0, "save": float("nan")})
    assert spent == {"other": 5.0, "training": 5.0}
    life = type(
        "Life",
        (),
        {
            "attempt": 1,
            "went_on_from": 0,
            "reached": 3,
            "lost": 0,
            "launch": None,
            "end": {"why": EVIL},
        },
    )()
    life.began = life.ended = "2026-01-01T00:00:00+00:00"
    stretch = timeline._span(
        life, [{"time": "2026-01-01T00:00:09+00:00", "spent": {EVIL: 3.0}}], is_running=False
    )
    assert stretch is not None and stretch.how == "failed"
    stands = type("Stands", (), {"state": EVIL, "why": EVIL, "exit_code": 1})()
    raw = timeline.AttemptSpan(life, 0.0, 9.0, {EVIL: 3.0}, EVIL, EVIL)
    text = page.page(EVIL, timeline.Timeline(stands, 0.0, 9.0, [raw], {EVIL: 3.0}))
    assert (
        "<script" not in text
        and 'http-equiv="Content-Security-Policy"' in text
        and "default-src 'none'" in text
    )


PLACES = [
    "partition",
    "account",
    "qos",
    "constraint",
    "mem",
    "time",
    "job_name",
    "container",
    "python",
]


@pytest.mark.parametrize("bad", ["a\ntouch sprung", "a\x1b[2J", "a\rb", "a\u2028b", "a\x00"])
def test_a_control_character_does_not_get_into_a_job_script(bad: str) -> None:
    plain = job_script.Job(SlurmSettings(), "job", "log", ["a=b"])
    assert job_script.script(plain)
    jobs = [
        job_script.Job(SlurmSettings(**{place: bad}), "job", "log", [])  # type: ignore[arg-type]
        for place in PLACES
    ]
    jobs += [
        job_script.Job(SlurmSettings(extra=[bad]), "job", "log", []),
        job_script.Job(SlurmSettings(), bad, "log", []),
    ]
    jobs += [
        job_script.Job(SlurmSettings(), "job", bad, []),
        job_script.Job(SlurmSettings(), "job", "log", ["a=b", bad]),
    ]
    for job in jobs:
        with pytest.raises(UsageError, match="control character"):
            job_script.script(job)


def test_submit_names_the_setting_and_keeps_a_percent_sign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--dry-run", "--partition", "a\nb", "run.dir=r"]) == 78
    assert "slurm.partition" in capsys.readouterr().err
    assert main(["submit", "--dry-run", 'run.dir="r\\nb"']) == 78
    assert main(["submit", "--dry-run", "run.dir=100%j"]) == 0
    assert "100%%j/logs/slurm-%" in capsys.readouterr().out


def test_the_writing_process_is_this_package_wherever_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "harness.py").write_text("open('sprung', 'w')\n")
    (tmp_path / "blake3.py").write_text("open('sprung', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-I", writer_process.__file__, str(tmp_path)],
        input=json.dumps(None) + "\n",
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr and not (tmp_path / "sprung").exists()


def test_the_writing_process_is_started_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "__init__.py").write_text("open('sprung', 'w')\n")
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "own.py"
    program.write_text("import harness")
    with pytest.raises(UsageError, match="another harness"):
        check_loop([str(program)])
    started: list[Any] = []
    real = subprocess.Popen

    def popen(*arguments: Any, **options: Any) -> Any:
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    writer = writer_process.WriterProcess()
    process = writer._alive(SimpleNamespace(fd=1))  # type: ignore[arg-type]
    writer.close()
    assert process.returncode == 0 and not (tmp_path / "sprung").exists()


def test_a_folder_without_init_does_not_shadow_the_package(tmp_path: Path) -> None:
    (tmp_path / "harness" / "tasks").mkdir(parents=True)
    (tmp_path / "harness" / "tasks" / "digits.py").write_text("open('sprung', 'w')\n")
    code = "import harness.task as t; t.find('harness.tasks.digits:build', {})"
    root = str(Path(harness.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": root, "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "own.py").touch()
    assert check_loop([str(tmp_path / "own.py")])
    assert not (tmp_path / "sprung").exists()


def test_an_editable_install_is_found_beside_a_folder_of_that_name(tmp_path: Path) -> None:
    """The tests' environment has one: a finder of setuptools' would come after such a folder, a
    plain path does not."""
    (tmp_path / "harness").mkdir()
    done = run(
        [sys.executable, "-c", "import harness; print(harness.__file__)"],
        cwd=tmp_path,
        env={"PYTHONPATH": ""},
    )
    assert done.stdout.strip() == harness.__file__, done.stdout + done.stderr


def test_a_package_of_that_name_in_the_working_directory_is_named_before_anything_starts(
    tmp_path: Path,
) -> None:
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "__init__.py").write_text("open('sprung', 'w')\n")
    (tmp_path / "own.py").write_text("import harness\n")
    environment = {"PYTHONPATH": str(Path(harness.__file__).parents[1]), "PATH": "/usr/bin"}
    for words in (["task.name=mine:build"], ["own.py"]):
        code = (
            "import sys; sys.path.remove(''); from harness import cli; "
            f"sys.exit(cli.main(['launch', 'run.dir=run', *{words!r}]))"
        )
        done = run([sys.executable, "-c", code], cwd=tmp_path, env=environment)
        assert done.returncode == 78, done.stderr
        assert str(tmp_path / "harness") in done.stderr and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert not (tmp_path / "run").exists() and not (tmp_path / "sprung").exists()


def test_each_block_of_a_file_is_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module's pickle is looked at in several ways; the store is opened once, and asked for no
    range twice."""
    torch.save(torch.nn.Linear(300, 300), tmp_path / "m.pt")
    opened: list[str] = []
    asked: list[tuple[int, int]] = []
    real, read = LocalStore.open, single_read.SingleRead._read

    def opens(self: LocalStore, key: str) -> Any:
        opened.append(key)
        return real(self, key)

    def reads(self: single_read.SingleRead, wanted: tuple[int, int]) -> Any:
        asked.append(wanted)
        return read(self, wanted)

    monkeypatch.setattr(LocalStore, "open", opens)
    monkeypatch.setattr(single_read.SingleRead, "_read", reads)
    assert "needs code" in str(describe(tmp_path / "m.pt")) and opened == ["m.pt"]
    assert len(set(bytes_of(asked))) == len(bytes_of(asked))


def bytes_of(ranges: list[tuple[int, int]]) -> list[int]:
    return [
        at
        for start, end in ranges
        for at in range(start // single_read.BLOCK_BYTES, -(-end // single_read.BLOCK_BYTES))
    ]


def test_what_is_loaded_is_fetched_once_too_and_never_opened_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"layer{n}.weight": torch.full((50, 50), float(n)) for n in range(30)}
    paths = [tmp_path / name for name in ("new.pt", "old.pt", "m.safetensors")]
    torch.save(state, paths[0])
    torch.save(state, paths[1], _use_new_zipfile_serialization=False)
    save_file(state, paths[2])
    for path in paths:
        asked: list[tuple[int, int]] = []
        found = files.find(path)
        assert found.once is not None
        first, read = found.once.kept_bytes, found.once._read
        monkeypatch.setattr(
            found.once,
            "_read",
            lambda wanted, asked=asked, read=read: asked.append(wanted) or read(wanted),
        )
        path.unlink()
        path.write_bytes(b"another file")
        loaded = files.read(found)
        assert all(torch.equal(loaded.value[name], tensor) for name, tensor in state.items())
        assert first + sum(end - start for start, end in asked) == found.size_bytes, (
            "each byte once"
        )


def test_a_file_that_changes_meanwhile_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"weight": torch.zeros(300, 300)}, path)
    for look in (files.outline, files.read):
        found = files.find(path)
        with path.open("ab") as file:
            file.write(b"x" * 100)
        with pytest.raises(ChangedError, match="changed while it was read"):
            look(found) if look is files.read else found.once.span(  # type: ignore[union-attr]
                100_000, 200_000
            )
    assert ChangedError("x").exit_code == 1


def test_no_tensor_is_read_to_show_a_large_file(tmp_path: Path) -> None:
    """A sparse file of 8 GB whose tensors nobody has written."""
    path = tmp_path / "large.pt"
    header = json.dumps(
        {
            f"w{n}": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [n << 22, (n + 1) << 22]}
            for n in range(2000)
        }
    ).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (2000 << 22))
    found = files.find(path)
    assert len(files.outline(found).value) == 2000 and found.once is not None
    assert found.once.kept_bytes < len(header) + (1 << 20), "some 140 kB of 8 GB"


def test_bytes_that_have_come_are_not_asked_for_again_when_the_next_question_gets_no_answer(
    tmp_path: Path,
) -> None:
    good, bad = both(tmp_path)
    with WickedServer(good, bad, 99, tells=True, drops=4) as server:
        describe(server.url)
        assert server.drops == 0
        blocks = bytes_of(server.ranges)
        assert len(blocks) == len(set(blocks)) > 0


def test_what_is_kept_of_a_file_that_is_shown_is_little(tmp_path: Path) -> None:
    """Of a file of 300 tensors the pickle and the directory; before PyTorch 2.7, 4 kB more of each
    tensor."""
    torch.save({f"layer{n}.weight": torch.zeros(64, 300) for n in range(300)}, tmp_path / "new.pt")
    with (
        zipfile.ZipFile(tmp_path / "new.pt") as new,
        zipfile.ZipFile(tmp_path / "old.pt", "w") as old,
    ):
        for record in new.infolist():
            if not record.filename.endswith((".format_version", ".storage_alignment")):
                old.writestr(record, new.read(record))
    for name, most in (
        ("new.pt", 200_000),
        ("old.pt", 200_000 + 2 * 300 * single_read.BLOCK_BYTES),
    ):
        found = files.find(tmp_path / name)
        files.outline(found)
        assert found.once is not None and found.once.kept_bytes < most < found.size_bytes


class Wicked(BaseHTTPRequestHandler):
    """Serves one file for the first answers that hold bytes, and another, of the same length, for
    all later ones."""

    server: WickedServer

    def _body(self) -> bytes:
        return (
            self.server.good
            if len(self.server.ranges) < self.server.turns_after
            else self.server.bad
        )

    def _is_dropped(self) -> bool:
        """Whether this question for what the file is gets no answer."""
        dropped = bool(self.server.ranges and self.server.drops)
        self.server.drops -= dropped
        return dropped

    def do_HEAD(self) -> None:
        if self._is_dropped():
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self._body())))
        self.send_header("Accept-Ranges", "bytes")
        if self.server.tells:
            self.send_header("ETag", f'"{hash(self._body())}"')
        self.end_headers()

    def do_GET(self) -> None:
        body, asked = self._body(), self.headers.get("Range", "")
        if not asked and self._is_dropped():
            return
        start, _, last = asked.removeprefix("bytes=").partition("-")
        part = body[int(start) : int(last) + 1] if asked else body
        self.server.ranges.append((int(start or 0), int(start or 0) + len(part)))
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(body)}")
        if self.server.tells:
            self.send_header("ETag", f'"{hash(body)}"')
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *ignored: object) -> None:
        """Nobody reads it."""


class WickedServer(ThreadingHTTPServer):
    """Its address is `url`."""

    def __init__(
        self, good: bytes, bad: bytes, turns_after: int, *, tells: bool, drops: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", 0), Wicked)
        self.good, self.bad, self.turns_after, self.tells = good, bad, turns_after, tells
        self.drops = drops  # so many questions, after the first bytes, get no answer
        self.ranges: list[tuple[int, int]] = []
        self.url = f"http://127.0.0.1:{self.server_port}/m.pt"

    def __enter__(self) -> WickedServer:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self.shutdown()
        self.server_close()


class Sprung(torch.nn.Module):
    """Writes a file when TorchScript loads it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(10))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        self.training = state[1]
        # used, or TorchScript would leave it out
        self.weight = torch.from_file("sprung", shared=True, size=10)  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def both(tmp_path: Path) -> tuple[bytes, bytes]:
    """A pickled module, which is looked at in several ways, and TorchScript that writes a file, in
    as many bytes."""
    torch.save(torch.nn.Linear(100, 100), tmp_path / "good.pt")
    torch.jit.save(torch.jit.script(Sprung()), tmp_path / "bad.pt")
    good, bad = (tmp_path / "good.pt").read_bytes(), (tmp_path / "bad.pt").read_bytes()
    made = io.BytesIO(bad)
    with zipfile.ZipFile(made, "a") as archive:
        archive.writestr("bad/extra/pad", bytes(max(0, len(good) - len(bad) - 400)))
    bad = made.getvalue()
    return (
        (good, bad + bytes(len(good) - len(bad)))
        if len(bad) <= len(good)
        else (good + bytes(len(bad) - len(good)), bad)
    )


@pytest.mark.parametrize("tells", [True, False])
def test_a_server_that_answers_otherwise_the_nth_time_gets_nothing_run(
    tells: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = both(tmp_path)
    torch.jit.load(tmp_path / "bad.pt")
    Path("sprung").unlink()  # so it does what it is made for
    for turns_after in range(5):
        for look in (describe, files.read_any):
            with WickedServer(good, bad, turns_after, tells=tells) as server:
                with contextlib.suppress(HarnessError):
                    look(server.url)
                blocks = bytes_of(server.ranges)
                assert len(blocks) == len(set(blocks)), "each byte was asked for once"
            assert not Path("sprung").exists(), f"{look} ran it after {turns_after} answers"


def test_of_a_file_that_has_changed_nothing_is_asked_for_again(tmp_path: Path) -> None:
    """Who cannot read it as a zip file tries other ways to read it: each would get other bytes."""
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    with path.open("rb") as file:
        whole = single_read.SingleRead(file, "it")
        assert whole.span(0, 10) == bytes(10)
        path.write_bytes(b"x" * 100_001)
        for look in (
            lambda: whole.span(50_000, 50_010),
            lambda: whole.span(50_000, 50_010),
            lambda: whole.sealed(lambda _: None),
        ):
            with pytest.raises(ChangedError):
                look()
        path.write_bytes(bytes(100_000))
        os.utime(path, ns=(0, whole._known[2]))
        with pytest.raises(ChangedError):
            whole.span(50_000, 50_010)


def test_an_object_that_is_replaced_meanwhile_is_told(tmp_path: Path) -> None:
    good, bad = both(tmp_path)
    with (
        WickedServer(good, bad, 1, tells=True) as server,
        pytest.raises(ChangedError, match="changed while it was read"),
    ):
        describe(server.url)


def test_a_range_of_a_bucket_is_asked_of_the_object_that_was_found(
    bucket: tuple[S3Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    server, name = bucket
    server.lend(monkeypatch)
    store = open_store(f"s3://{name}/a", 5)
    store.write("m", bytes(300_000), 1)
    file = store.open("m")
    pieces = store.chunks("m")
    assert len(file.read(10)) == 10
    store.write("m", b"x" * 300_000, 1)
    file.seek(200_000)
    with pytest.raises(ChangedError, match="changed while it was read"):
        file.read(50)
    assert b"".join(pieces) == b"x" * 300_000, "it had not begun"


LOOP = """
import torch
import harness
run = harness.init("run", seed=1, save_every_s=None, save_every_steps=3, log_every_steps=1)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.track(model=model, optimizer=optimizer)
data = torch.utils.data.TensorDataset(torch.randn(32, 4))
for (x,) in run.batches(data, global_batch_size=4, epochs=1):
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
"""
ESCAPES = "\x1b]0;owned\x07 \x1b[2J \x9b2J \x85 \u202e \r"
LOOKS = ("status", "report", "top --once", "ls", "show", "verify", "prune")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a launch; to be copied."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "own.py").write_text(LOOP)
    done = run([sys.executable, "own.py"], cwd=folder, env={"HARNESS_LAUNCH": "1.0"})
    assert done.returncode == 0, done.stderr
    assert len(list((folder / "run").glob("checkpoints/*.json"))) == 3
    return folder / "run"


def look(directory: Path, capsys: Any, *, extra: tuple[tuple[str, ...], ...] = ()) -> str:
    """All that the commands say of a run; none of them ends in a traceback."""
    said = []
    for words in [
        *((*each.split()[:1], str(directory), *each.split()[1:]) for each in LOOKS),
        *extra,
    ]:
        assert main(list(words)) in (0, 1, 74, 75, 78), words
        answer = capsys.readouterr()
        said.append(answer.out + answer.err)
    return "\n".join(said)


def rewritten(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Every record and every event of a run, changed; manifests get the digest that belongs to
    them."""
    (directory / "launches").mkdir(exist_ok=True)
    (directory / "launches" / "1.0.json").write_text(
        json.dumps({"greatest": 0, "reached": 0, "launch": "1.0", "time": TIME})
    )
    (directory / "launches" / "1.0.end.json").write_text(
        json.dumps({"why": "failed", "error": "e", "trace": "t", "code": 1, "time": TIME})
    )
    (directory / "run.json").write_text(json.dumps({"submitted": TIME}))
    for path in [
        *directory.glob("attempts/*"),
        *directory.glob("launches/*"),
        directory / "run.json",
    ]:
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    for path in directory.glob("events/*"):
        path.write_text(
            "".join(
                json.dumps(change(json.loads(line))) + "\n"
                for line in path.read_text().splitlines()
            )
        )
    for path in directory.glob("checkpoints/*.json"):
        fields = change(
            {
                name: value
                for name, value in json.loads(path.read_text()).items()
                if name != "manifest_digest"
            }
        )
        path.write_bytes(fmt._spell(fields | {"manifest_digest": fmt._digest(fields)}))


TIME = "2026-01-01T00:00:00.000+00:00"


def poisoned(value: Any) -> Any:
    """The same with escape sequences in every text, name and key, but where a thing is told from
    another by it."""
    if isinstance(value, str):
        return value + ESCAPES
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    if isinstance(value, dict):
        return {f"{name}{ESCAPES}": poisoned(item) for name, item in value.items()}
    return value


KEPT = (
    "time",
    "submitted",
    "run_id",
    "nonce",
    "kind",
    "event",
    "remote",
    "launch",
    "lineage",
    "files",
    "final",
    "from",
    "config_digest",
)


@pytest.mark.parametrize("why", ["failed", "stopped", ESCAPES])
def test_what_a_terminal_would_obey_does_not_get_there_out_of_records(
    why: str, made: Path, tmp_path: Path, capsys: Any
) -> None:
    directory = tmp_path / f"run{ESCAPES.replace(chr(13), '')}"
    shutil.copytree(made, directory)
    for manifest in directory.glob("checkpoints/step_00000008*"):
        manifest.unlink()  # or it is finished, and no end counts
    (directory / "checkpoints" / f"stranger{ESCAPES}").touch()

    def change(record: dict[str, Any]) -> dict[str, Any]:
        new = {name: value if name in KEPT else poisoned(value) for name, value in record.items()}
        if "saved_step" in record or record.get("why") == "finished":
            new |= {
                "why": why,
                "error": ESCAPES,
                "trace": f"a\n{ESCAPES}",
                "by": ESCAPES,
                "signals": [ESCAPES],
                "step": 7,
            }
        if record.get("event") == "step":
            new |= {"event": "retry", "error": ESCAPES}
        return new | {name + ESCAPES: 1 for name in ("spent", "x")}

    rewritten(directory, change)
    html = tmp_path / "report.html"
    first = str(next(directory.glob("checkpoints/*.json")))
    said = look(
        directory,
        capsys,
        extra=(("report", str(directory), "--html", str(html)), ("diff", str(directory), first)),
    )
    assert "owned" in said, "so it was told"
    hidden = set(said + html.read_text()) - {"\n", "\t"}
    assert not [c for c in hidden if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs")]
    supervise.show(Outcome("failed", ESCAPES, 1), [Failure("attempt", ESCAPES, trace=ESCAPES)])
    with pytest.raises(HarnessError) as error:
        raise UsageError(ESCAPES, ESCAPES, ESCAPES)
    assert not {"\x1b", "\x9b", "\u202e"} & set(capsys.readouterr().err + str(error.value))


def test_whoever_is_told_of_an_end_gets_no_escapes(tmp_path: Path) -> None:
    out = tmp_path / "word"
    settings = NotifySettings(
        on=["failed"],
        command=[
            sys.executable,
            "-c",
            f"import sys; open({str(out)!r}, 'w').write(sys.stdin.read())",
        ],
    )
    notify(settings, "failed", "run", ESCAPES)
    assert (
        ESCAPES[:1] not in json.loads(out.read_text())["text"]
        and "owned" in json.loads(out.read_text())["text"]
    )


WRONG: list[Any] = [
    "x",
    [1],
    {"a": 1},
    None,
    True,
    -1,
    1.5,
    10**400,
    float("nan"),
    float("inf"),
    1e308,
    "9999-12-31T23:59:59.999+00:00",
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_record_that_holds_anything_at_all_is_no_traceback(
    wrong: Any, made: Path, tmp_path: Path, capsys: Any
) -> None:
    """Each field of each record in turn would take long: all of them, and all but those that make a
    record count."""
    for number, kept in enumerate(
        (
            ("event",),
            ("event", "time", "step"),
            ("event", "time", "why"),
            (*KEPT, "step", "attempt"),
        )
    ):
        directory = tmp_path / str(number)
        shutil.copytree(made, directory)

        def spoilt(record: dict[str, Any], kept: tuple[str, ...] = kept) -> dict[str, Any]:
            return {name: value if name in kept else wrong for name, value in record.items()}

        rewritten(directory, spoilt)
        look(
            directory,
            capsys,
            extra=(
                ("report", str(directory), "--html", str(tmp_path / "x.html")),
                ("status", str(directory), "--json"),
            ),
        )


@pytest.mark.parametrize("wrong", ["x", None, "9999-12-31T23:59:59.999+00:00", "2024-01-01"])
def test_what_a_start_reads_of_records_is_no_traceback(
    wrong: str | None, made: Path, tmp_path: Path, capsys: Any
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(made, directory)
    rewritten(directory, lambda record: record | {"time": wrong or "", "lr": 10**400})
    if wrong is None:
        for path in directory.glob("attempts/*"):
            record = json.loads(path.read_text())
            path.write_text(json.dumps({n: v for n, v in record.items() if n != "time"}))
    look(directory, capsys)
    catalog = read_catalog(LocalStore(directory))
    assert catalog.manifests and {record["kind"] for record in catalog.attempts.values()} == {
        "train"
    }
    assert kill_history(catalog).seconds == 0
    before = trackers.history(catalog, 1000)
    assert before and not any("lr" in values for values in before.values())


def test_durations_from_before_all_time_are_no_traceback(
    made: Path, tmp_path: Path, capsys: Any
) -> None:
    directory = tmp_path / "run"
    shutil.copytree(made, directory)
    rewritten(directory, lambda record: record | {"spent": {"training": 9.9e10, "save": 9.9e10}})
    html = tmp_path / "x.html"
    look(directory, capsys, extra=(("report", str(directory), "--html", str(html)),))
    assert "began 20" in html.read_text()


def test_a_record_that_is_torn_nested_or_no_record_is_passed_over(
    made: Path, tmp_path: Path, capsys: Any
) -> None:
    for number, text in enumerate(
        (b"", b"\xff\xfe", b"[" * 100_000, b"null", b"3", b'{"a"', b"9" * 5000)
    ):
        directory = tmp_path / str(number)
        shutil.copytree(made, directory)
        for path in [*directory.glob("attempts/*"), directory / "run.json"]:
            path.write_bytes(text)
        for path in directory.glob("events/*"):
            path.write_bytes(text + b"\n" + path.read_bytes() + text)
        next(directory.glob("checkpoints/*.json")).write_bytes(text)
        look(directory, capsys)
