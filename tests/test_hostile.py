"""Files, records, settings and folders that somebody else wrote: nothing in them is run."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import harness
from harness import config, slurm
from harness.checkpoint import scribe
from harness.cli import main
from harness.cli.launch import check_loop
from harness.config.settings import SlurmSettings
from harness.errors import ChangedError, UsageError
from harness.exchange import files, once, rebuild
from harness.exchange.describe import describe
from harness.report import page, timeline
from harness.store import LocalStore

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
    ["harness.exchange.export:export", "harness.tasks:os", "harness.tasks.digits:Task", "harness.tasks.digits.x:build", "sprung:build",
     "harness.tasks...sprung:build", "harness.task:find", " harness.tasks.digits:build"],
)  # fmt: skip
def test_a_name_in_a_file_is_not_called_and_not_imported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sprung.py").write_text("from harness import Task\nopen('sprung', 'w')\ndef build():\n    open('sprung', 'w')\n")
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "evil.pt"
    torch.save({"weight": torch.ones(1)}, evil)
    asked: dict[str, Any] = {"checkpoint": str(evil), "out": "sprung", "trust": True} if "export" in name else {}
    path = stored(tmp_path, name, asked)
    with pytest.raises(UsageError):
        harness.load_model(path)
    assert main(["export", path, "x.pt", "--format", "module"]) == 78
    assert not Path("sprung").exists() and "sprung" not in sys.modules


def test_a_task_of_the_users_own_is_called_as_they_name_or_confirm_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "import torch\nfrom harness import Task\ndef build():\n    m = torch.nn.Linear(1, 1, bias=False)\n    return Task(m, [], [])\n"
    (tmp_path / "confirmed_task.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    path = stored(tmp_path, "confirmed_task:build", {})
    with pytest.raises(UsageError, match="task='confirmed_task:build'"):
        harness.load_model(path)
    for given in ({"task": "confirmed_task:build"}, {"trust": True}):
        assert harness.load_model(path, **given).weight.item() == 0.0  # type: ignore[arg-type]


def test_the_tasks_of_the_package_need_no_word() -> None:
    rebuild._check_named("harness.tasks.digits:build")


def test_a_report_shows_what_records_hold_as_text() -> None:
    spent = timeline._numbers({EVIL: 3.0, "x": 2, "training": 5.0, "save": float("nan")})
    assert spent == {"other": 5.0, "training": 5.0}
    life = type("Life", (), {"attempt": 1, "went_on_from": 0, "reached": 3, "lost": 0, "launch": None, "end": {"why": EVIL}})()
    life.began = life.ended = "2026-01-01T00:00:00+00:00"
    stretch = timeline._stretch(life, [{"time": "2026-01-01T00:00:09+00:00", "spent": {EVIL: 3.0}}], is_running=False)
    assert stretch is not None and stretch.how == "failed"
    stands = type("Stands", (), {"state": EVIL, "why": EVIL, "exit_code": 1})()
    raw = timeline.Stretch(life, 0.0, 9.0, {EVIL: 3.0}, EVIL, EVIL)
    text = page.page(EVIL, timeline.Timeline(stands, 0.0, 9.0, [raw], {EVIL: 3.0}))
    assert "<script" not in text and 'http-equiv="Content-Security-Policy"' in text and "default-src 'none'" in text


PLACES = ["partition", "account", "qos", "constraint", "mem", "time", "job_name", "container", "python"]


@pytest.mark.parametrize("bad", ["a\ntouch sprung", "a\x1b[2J", "a\rb", "a\u2028b", "a\x00"])
def test_a_control_character_does_not_get_into_a_job_script(bad: str) -> None:
    plain = slurm.Job(SlurmSettings(), "job", "log", ["a=b"])
    assert slurm.script(plain)
    jobs = [slurm.Job(SlurmSettings(**{place: bad}), "job", "log", []) for place in PLACES]  # type: ignore[arg-type]
    jobs += [slurm.Job(SlurmSettings(extra=[bad]), "job", "log", []), slurm.Job(SlurmSettings(), bad, "log", [])]
    jobs += [slurm.Job(SlurmSettings(), "job", bad, []), slurm.Job(SlurmSettings(), "job", "log", ["a=b", bad])]
    for job in jobs:
        with pytest.raises(UsageError, match="control character"):
            slurm.script(job)


def test_submit_names_the_setting_and_keeps_a_percent_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "--dry-run", "--partition", "a\nb", "run.dir=r"]) == 78
    assert "slurm.partition" in capsys.readouterr().err
    assert main(["submit", "--dry-run", 'run.dir="r\\nb"']) == 78
    assert main(["submit", "--dry-run", "run.dir=100%j"]) == 0
    assert "100%%j/logs/slurm-%" in capsys.readouterr().out


def test_the_writing_process_is_this_package_wherever_it_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "harness.py").write_text("open('sprung', 'w')\n")
    (tmp_path / "blake3.py").write_text("open('sprung', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-I", scribe.__file__, str(tmp_path)], input=json.dumps(None) + "\n", text=True, capture_output=True, check=False
    )
    assert done.returncode == 0 and not done.stderr and not (tmp_path / "sprung").exists()


def test_the_writing_process_is_started_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "harness").mkdir()
    (tmp_path / "harness" / "__init__.py").write_text("open('sprung', 'w')\n")
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "own.py"
    program.write_text("import harness")
    with pytest.raises(UsageError, match="another harness"):
        check_loop([str(program)])
    started: list[Any] = []
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(real(*a, **k)) or started[-1])
    writer = scribe.Scribe()
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


def test_each_block_of_a_file_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module's pickle is looked at in several ways; the store is opened once, and asked for no range twice."""
    torch.save(torch.nn.Linear(300, 300), tmp_path / "m.pt")
    opened: list[str] = []
    asked: list[tuple[int, int]] = []
    real, read = LocalStore.open, once.Once._read
    monkeypatch.setattr(LocalStore, "open", lambda self, key: opened.append(key) or real(self, key))
    monkeypatch.setattr(once.Once, "_read", lambda self, wanted: asked.append(wanted) or read(self, wanted))
    assert "needs code" in str(describe(tmp_path / "m.pt")) and opened == ["m.pt"]
    assert len(set(bytes_of(asked))) == len(bytes_of(asked))


def bytes_of(ranges: list[tuple[int, int]]) -> list[int]:
    return [at for start, end in ranges for at in range(start // once.BLOCK_BYTES, -(-end // once.BLOCK_BYTES))]


def test_what_is_loaded_is_fetched_once_too_and_never_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        monkeypatch.setattr(found.once, "_read", lambda wanted, asked=asked, read=read: asked.append(wanted) or read(wanted))
        path.unlink()
        path.write_bytes(b"another file")
        loaded = files.read(found)
        assert all(torch.equal(loaded.value[name], tensor) for name, tensor in state.items())
        assert first + sum(end - start for start, end in asked) == found.size_bytes, "each byte once"


def test_a_file_that_changes_meanwhile_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"weight": torch.zeros(300, 300)}, path)
    for look in (files.outline, files.read):
        found = files.find(path)
        with path.open("ab") as file:
            file.write(b"x" * 100)
        with pytest.raises(ChangedError, match="changed while it was read"):
            look(found) if look is files.read else found.once.span(100_000, 200_000)  # type: ignore[union-attr]
    assert ChangedError("x").exit_code == 1


def test_no_tensor_is_read_to_show_a_large_file(tmp_path: Path) -> None:
    """A sparse file of 8 GB whose tensors nobody has written."""
    path = tmp_path / "large.pt"
    header = json.dumps(
        {f"w{n}": {"dtype": "F32", "shape": [1 << 20], "data_offsets": [n << 22, (n + 1) << 22]} for n in range(2000)}
    ).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + (2000 << 22))
    found = files.find(path)
    assert len(files.outline(found).value) == 2000 and found.once is not None
    assert found.once.kept_bytes < len(header) + (1 << 20), "some 140 kB of 8 GB"


def test_what_is_kept_of_a_file_that_is_shown_is_little(tmp_path: Path) -> None:
    """Of a file of 300 tensors the pickle and the directory; before PyTorch 2.7, 4 kB more of each tensor."""
    torch.save({f"layer{n}.weight": torch.zeros(64, 300) for n in range(300)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as new, zipfile.ZipFile(tmp_path / "old.pt", "w") as old:
        for record in new.infolist():
            if not record.filename.endswith((".format_version", ".storage_alignment")):
                old.writestr(record, new.read(record))
    for name, most in (("new.pt", 200_000), ("old.pt", 200_000 + 2 * 300 * once.BLOCK_BYTES)):
        found = files.find(tmp_path / name)
        files.outline(found)
        assert found.once is not None and found.once.kept_bytes < most < found.size_bytes
