"""Files, records, settings and folders that somebody else wrote: nothing in them is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import harness
from harness import config, slurm
from harness.checkpoint import scribe
from harness.cli import main
from harness.cli.launch import check_loop
from harness.config.settings import SlurmSettings
from harness.errors import StorageError, UsageError
from harness.exchange import once, rebuild
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
    real = LocalStore.open
    monkeypatch.setattr(LocalStore, "open", lambda self, key: opened.append(key) or real(self, key))
    assert "needs code" in str(describe(tmp_path / "m.pt")) and opened == ["m.pt"]
    source = (tmp_path / "m.pt").open("rb")
    whole = once.Once(source, "m.pt")
    whole.view().read(10)
    with (tmp_path / "m.pt").open("ab") as file:
        file.write(b"x")
    with pytest.raises(StorageError, match="changed while it was read"):
        whole.block(1)
