"""The machine and the software that a run goes on with: recorded, compared, said, and refused if so
told."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import events
from programs import live

from harness import cli
from harness.checkpoint import attempts
from harness.checkpoint import format as fmt
from harness.checkpoint.catalog import read_catalog
from harness.distributed import torchrun
from harness.errors import EXIT_USAGE, UsageError
from harness.selfcheck import data_checks
from harness.selfcheck.environment import hardware, imported, software, string_hashing
from harness.store import LocalStore
from harness.supervision.machine_record import (
    DISTRIBUTIONS,
    HASHING,
    NOT_EXACT,
    RANDOM,
    Difference,
    changes,
    describe,
    differences,
    recorded,
)

HERE = {
    "torch": "2.1",
    "cpu": "A",
    "threads": 1,
    "NCCL_ALGO": None,
    DISTRIBUTIONS: {"pandas": "1.0", "timm": "1.0"},
}

PROGRAM = """
run = init(environment=os.environ.get("INSIST", "warn"))
torch.set_num_threads(int(os.environ.get("THREADS", 1)))
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=2):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    die(run)
"""


def test_what_differs_is_named_with_both_values_and_what_cannot_be_compared_is_not():
    now = HERE | {
        "torch": "2.2",
        "threads": 2,
        "NCCL_ALGO": "Ring",
        "new": 1,
        DISTRIBUTIONS: {"pandas": "2.0", "wandb": "1.0"},
    }
    found = differences(HERE, now)
    assert found == [
        Difference("torch", "2.1", "2.2"),
        Difference("threads", 1, 2),
        Difference("NCCL_ALGO", None, "Ring"),
        Difference("pandas", "1.0", "2.0", is_exact=True),
    ]
    assert describe(found) == (
        f"torch: 2.1 -> 2.2, threads: 1 -> 2, NCCL_ALGO: not set -> Ring ({NOT_EXACT}); "
        "other versions of what the program imports: pandas: 1.0 -> 2.0"
    )
    assert NOT_EXACT not in describe(found[-1:]), (
        "another version of something else need not change anything"
    )
    assert differences(HERE, HERE) == []


@pytest.mark.parametrize(("set_to", "found"), [(None, "0"), ("7", "7"), ("random", "random")])
def test_launch_gives_its_ranks_one_order_of_a_set_of_strings(monkeypatch, set_to, found):
    seen = []
    monkeypatch.setattr(torchrun, "run_workers", lambda _: seen.append(dict(os.environ)))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("PYTHONHASHSEED", None)
    os.environ |= {"PYTHONHASHSEED": set_to} if set_to else {}
    torchrun.run(["--nproc-per-node=1", "program.py"])
    assert seen[0]["PYTHONHASHSEED"] == found


@pytest.mark.parametrize(("seed", "found"), [("0", "PYTHONHASHSEED=0"), ("7", "PYTHONHASHSEED=7"),
    ("random", "random"), ("", "random")])  # fmt: skip
def test_what_strings_are_hashed_with_is_told_as_the_process_was_started(seed, found):
    source = inspect.getsource(string_hashing).replace("@functools.cache\n", "")
    program = "import os, sys\nfrom pathlib import Path\nos.environ['PYTHONHASHSEED'] = '3'\n"
    program += f"RANDOM = 'random'\n{source}\nprint(string_hashing())"
    env = os.environ | {"PYTHONHASHSEED": seed}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == f"{found}\n", done.stderr


def test_another_order_of_sets_is_said_and_is_a_cause_of_other_samples(monkeypatch):
    was, now = ({HASHING: seed} for seed in ("PYTHONHASHSEED=0", RANDOM))
    assert differences(was, was) == differences(now, now) == []
    found = differences(was, now)
    assert describe(found) == (
        "string hashing: PYTHONHASHSEED=0 -> random (sets of strings have another order)"
    )
    for hashing, is_said in ((RANDOM, True), ("PYTHONHASHSEED=0", False)):
        monkeypatch.setattr(data_checks, "string_hashing", lambda hashing=hashing: hashing)
        with pytest.raises(UsageError) as raised:
            data_checks.check_data({"fingerprint": "a"}, {"fingerprint": "b"}, ())
        assert ("sorted(set(text))" in str(raised.value)) == is_said
        with pytest.raises(UsageError) as raised:
            data_checks.check_data({"seed": 1}, {"seed": 2}, ())
        assert "sorted(set(text))" not in str(raised.value)


def test_what_is_recorded_is_what_results_depend_on():
    device = torch.device("cpu")
    found = hardware(device) | software(device)
    assert found["torch"] == torch.__version__ and found["threads"] == torch.get_num_threads()
    assert found["cpu instructions"] == torch.backends.cpu.get_cpu_capability()
    assert {
        "cpu",
        "device",
        "numpy",
        "python",
        "deterministic",
        "OMP_NUM_THREADS",
        "NCCL_ALGO",
        "NCCL_PROTO",
    } <= found.keys()
    assert json.loads(json.dumps(found)) == found


def test_only_what_was_imported_is_named_by_its_distribution():
    import blake3  # noqa: F401

    found = imported(
        {
            "blake3": ["blake3"],
            "torch": ["torch"],
            "nobody_imports_this": ["pytest"],
            "sys": ["no-such-distribution"],
        }
    )
    assert found.keys() == {"blake3"}


def test_a_rollback_runs_on_nothing_and_hands_on_what_its_checkpoint_was_made_on(tmp_path: Path):
    store = LocalStore(tmp_path)
    store.prepare(fmt.FOLDERS)
    attempts.claim(read_catalog(store), None, 1, more={"environment": HERE})
    record = json.loads(store.read(fmt.attempt_key(1)))
    assert record.pop("environment") == HERE
    for number, more in ((2, {"kind": "rollback"}), (3, {"environment": HERE | {"cpu": "B"}})):
        fields = record | {"attempt": number, "from": {"attempt": number - 1, "step": 10}} | more
        store.create(fmt.attempt_key(number), attempts.spell(fields), number)
    found = read_catalog(store)
    assert recorded(found, 2) == HERE
    assert changes(found, 2) == [] and changes(found, 3) == [Difference("cpu", "A", "B")]


def test_another_machine_is_said_in_the_resume_in_status_and_in_the_report(tmp_path: Path, capsys):
    killed = live(tmp_path, PROGRAM, "run", env={"DIE": "7"})
    assert killed.code == -9, killed.text
    assert live(tmp_path, PROGRAM, "same", env={"DIE": "7"}).code == -9
    same = live(tmp_path, PROGRAM, "same")
    assert same.code == 0 and "not as" not in same.text and "not recorded" not in same.text, (
        same.text
    )

    refused = live(tmp_path, PROGRAM, "run", env={"THREADS": "2", "INSIST": "refuse"})
    assert refused.code == EXIT_USAGE and "threads: found 2, expected 1" in refused.text, (
        refused.text
    )
    assert max(read_catalog(LocalStore(tmp_path / "run")).attempts) == 1, "before the claim"

    resumed = live(tmp_path, PROGRAM, "run", env={"THREADS": "2"})
    line = f"threads: 1 -> 2 ({NOT_EXACT})"
    assert (
        resumed.code == 0 and f"harness: not as step_00000006-0001 was made: {line}" in resumed.text
    ), resumed.text
    (event,) = events(tmp_path / "run", "environment")
    assert event["differs"] == [{"name": "threads", "before": 1, "now": 2, "is_exact": False}]
    for words in (["status"], ["report"]):
        cli.main([*words, str(tmp_path / "run")])
        assert f"attempt 2: {line}" in capsys.readouterr().out
    cli.main(["status", "--json", str(tmp_path / "run")])
    assert [life["differs"] for life in json.loads(capsys.readouterr().out)["attempts"]] == [
        [],
        event["differs"],
    ]


def test_a_checkpoint_of_before_is_gone_on_from_and_that_nothing_is_recorded_is_said(
    tmp_path: Path,
):
    assert live(tmp_path, PROGRAM, "run", env={"DIE": "7"}).code == -9
    path = tmp_path / "run" / fmt.attempt_key(1)
    record = json.loads(path.read_bytes())
    assert set(record.pop("environment")) > {"torch", DISTRIBUTIONS}
    path.write_bytes(attempts.spell(record))
    resumed = live(tmp_path, PROGRAM, "run", env={"INSIST": "refuse"})
    assert (
        resumed.code == 0
        and "it is not recorded which machine and software step_00000006-0001 was made on"
        in resumed.text
    )
