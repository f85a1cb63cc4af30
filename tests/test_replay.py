"""Steps that are made again after a kill are compared with what they were; whatever a checkpoint does not hold shows there."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import harness, run
from programs import Outcome, killed_once, live

LOOP = """
run = init(on_mismatch=os.environ.get("ON_MISMATCH", "warn"))
hidden = torch.Generator().manual_seed(0)
model = nn.Linear(8, 1)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
run.track(model=model, optimizer=optimizer)
order = None if not os.environ.get("OTHER") else (lambda epoch: list(range(160))[:: -1 if os.environ["OTHER"] == "yes" else 1])
for x, y in run.batches(points(), 16, epochs=2, order=order):
    if os.environ.get("NOISY"):
        x = x + torch.randn(x.shape, generator=hidden)
    loss = (model(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    if run.step == int(os.environ.get("DIE", 0)):
        time.sleep(0.2)
    die(run)
"""
NOISY = {"NOISY": "yes"}


def told(folder: Path, kind: str) -> list[dict]:
    """The events of that kind in the run's last attempt."""
    lines = sorted((folder / "killed" / "events").glob("*.jsonl"))[-1].read_text().splitlines()
    return [event for line in lines if (event := json.loads(line))["event"] == kind]


def outcome(folder: Path, env: dict[str, str], then: dict[str, str] | None = None, **options: object) -> Outcome:
    return killed_once(folder, LOOP, env=env, then=then, die=9, **options)  # type: ignore[arg-type]


def test_equal_steps_are_said_to_be_equal(tmp_path):
    lived = outcome(tmp_path, {})
    assert lived.is_equal, lived.rows
    assert "harness: 2 recomputed steps, all equal" in lived.resumed.text
    assert "MISMATCH" not in lived.resumed.text
    (event,) = told(tmp_path, "replayed")
    assert (event["recomputed"], event["compared"], event["verdict"]) == (2, 2, "equal")
    for command in ("status", "report"):
        assert "2 recomputed steps, all equal" in run(harness(command, str(tmp_path / "killed"))).stdout
    assert not list(tmp_path.glob("*/events/*.steps")), "the last checkpoint is newer than all of them"


def test_a_generator_that_nobody_tracks_is_caught_at_the_first_step(tmp_path):
    lived = outcome(tmp_path, NOISY)
    assert lived.resumed.code == 0, "by default it is only said"
    assert lived.resumed.text.count("MISMATCH") == 1
    assert "MISMATCH: step 7 was made again, and is not what it was: loss: same samples" in lived.resumed.text
    (event,) = told(tmp_path, "mismatch")
    assert (event["step"], event["what"], event["before"], event["attempt"]) == (7, "loss", 1, 2)
    assert event["was"] != event["now"] and len(event["hosts"]) == len(event["devices"]) == 2
    assert str(event["was"]) in lived.resumed.text and str(event["now"]) in lived.resumed.text
    assert not told(tmp_path, "replayed")
    for command in ("status", "report"):
        assert "MISMATCH: step 7" in run(harness(command, str(tmp_path / "killed"))).stdout
    assert json.loads(run(harness("status", "--json", str(tmp_path / "killed"))).stdout)["replays"]["2"]["verdict"] == "mismatch"


def test_other_samples_are_told_as_such(tmp_path):
    lived = outcome(tmp_path, {"OTHER": "no"}, {"OTHER": "yes"})
    assert "MISMATCH: step 7 was made again, and is not what it was: data: other samples" in lived.resumed.text


def test_a_run_that_is_to_stop_ends_before_its_next_save_and_is_not_started_again(tmp_path):
    lived = outcome(tmp_path, NOISY | {"ON_MISMATCH": "stop"})
    assert lived.resumed.code == 78
    assert not list((tmp_path / "killed" / "checkpoints").glob("*-0002.json"))
    end = json.loads((tmp_path / "killed" / "attempts" / "0002.end.json").read_text())
    assert (end["why"], end["code"]) == ("failed", 78)
    again = live(tmp_path, LOOP, "killed", env=NOISY | {"ON_MISMATCH": "stop"})
    assert again.code == 78, "what it was is not what the attempt made that was stopped"
    insisted = live(tmp_path, LOOP, "killed", env=NOISY)
    assert insisted.code == 0


def test_all_ranks_stop(tmp_path):
    lived = outcome(tmp_path, NOISY | {"ON_MISMATCH": "stop"}, ranks=2)
    assert lived.resumed.codes == [78, 78]


def test_a_program_that_has_changed_is_expected_to_differ(tmp_path):
    live(tmp_path, LOOP, "killed", env=NOISY | {"DIE": "9"})
    lived = live(tmp_path, LOOP + "\n# changed\n", "killed", env=NOISY | {"ON_MISMATCH": "stop"})
    assert lived.code == 0
    assert "MISMATCH" not in lived.text
    assert "expected to differ: program.py has changed" in lived.text
