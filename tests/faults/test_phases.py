"""A stop that comes at any moment, to any process, loses no step: the run ends soon, leaves nobody
behind, and goes on."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from comparing import losses
from conftest import events, run, torchrun, tree, wait_until, workers_of
from fault_proxy import FaultProxy
from launches import SMALL, STEPS, after_steps, begun, check_equal, ended, launch, left_behind
from remote_runs import Home
from s3_server import S3Server

pytestmark = pytest.mark.slow

Start = Callable[..., "subprocess.Popen[str]"]
LIMIT_S = 120
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
RECEIVERS = ("rank 0", "rank 1", "ranks", "torchrun", "every", "launch")

SLOW_TASK = '''
import time
from pathlib import Path
import small_task

def build(
    folder: str,
    width: int = 32,
    sleep_s: float = 0.0,
    build_s: float = 0.0,
    evaluate_s: float = 0.0,
):
    """small_task, slow where it is told to be; it leaves word when it is built and when it is
    evaluated."""
    Path(folder, "building").touch()
    time.sleep(build_s)
    task = small_task.build(width=width, sleep_s=sleep_s)

    def evaluate(model, batch, inner=task.evaluate):
        Path(folder, "evaluating").touch()
        time.sleep(evaluate_s)
        return inner(model, batch)

    task.evaluate = evaluate
    return task
'''


def slow(folder: Path, **slowness: float) -> tuple[str, ...]:
    """Settings of a run in `folder` that is slow where it is told to be."""
    (folder / "slow_task.py").write_text(SLOW_TASK)
    arguments = (f"task.args.{name}={value}" for name, value in slowness.items())
    return (
        "task.name=slow_task:build",
        *SMALL[1:],
        f"run.dir={folder}/run",
        f"task.args.folder={folder}",
        *arguments,
    )


def receivers(process: subprocess.Popen[str], whom: str) -> list[psutil.Process]:
    """Whom a signal goes to; those that are there at this moment."""
    members = tree(process.pid)
    torchruns = [member for member in members if workers_of(member.pid)] or members[1:2]
    ranks = workers_of(torchruns[0].pid) if torchruns else []
    return {
        "rank 0": ranks[:1],
        "rank 1": ranks[1:],
        "ranks": ranks,
        "torchrun": torchruns[:1],
        "every": members,
        "launch": members[:1],
    }[whom]


def send(process: subprocess.Popen[str], whom: str, number: signal.Signals) -> None:
    for member in receivers(process, whom):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)


def check_stopped(
    process: subprocess.Popen[str],
    directory: Path,
    whom: str,
    number: signal.Signals,
    codes: tuple[int, ...] = (),
) -> None:
    """It ended in time, with nobody left; what was told to one rank or to torchrun only, launch has
    started again by itself."""
    out, err = process.communicate(timeout=LIMIT_S)
    expected = (75, *codes) if whom in ("every", "launch") else (0, *codes)
    assert process.returncode in expected, (
        f"{whom}, {number.name}: {process.returncode}\n{out}\n{err}"
    )
    assert left_behind(directory) == []
    assert "Traceback" not in out + err or -number in codes, out + err
    # by torchrun, which sends that if it is told a second time
    passed_on = {"SIGTERM"} if whom == "every" else set()
    for end in ended(directory, "attempts").values():
        assert end["why"] == "finished" or (end["why"], end["saved"]) == ("stopped", True), end
        assert (
            end["why"] == "finished"
            or {number.name} <= set(end["signals"]) <= {number.name} | passed_on
        ), end


def check_nothing_lost(directory: Path, other: Path) -> None:
    steps = [event["step"] for event in events(directory, "step")]
    assert steps == list(range(1, STEPS + 1)), "a step was lost, or done twice"
    check_equal(directory, other)


def matrix(
    name: str = "", variants: Sequence[object] = (None,), first: int = 0
) -> pytest.MarkDecorator:
    """Every second receiver, by turns over the variants and by `first` over the tests; over the
    tests of this module each receiver gets both signals."""
    cases = []
    for i, whom in enumerate(RECEIVERS):
        for j, variant in enumerate(variants):
            if (i + j + first) % 2:
                continue
            number = SIGNALS[(i // 2 + first) % 2]
            case = (whom, number, variant) if name else (whom, number)
            words = [whom, number.name] + ([f"{name} {variant}"] if name else [])
            cases.append(pytest.param(*case, id="-".join(words)))
    return pytest.mark.parametrize(("whom", "number", *([name] if name else [])), cases)


@functools.cache
def undisturbed(folder: Path, *settings: str) -> Path:
    """A run with such settings that nothing disturbed."""
    directory = folder / f"undisturbed-{abs(hash(settings))}"
    directory.mkdir()
    done = run(torchrun(2, *slow(directory), *settings), cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "run"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("undisturbed")


@pytest.mark.parametrize(
    ("delay_s", "whom", "number"),
    [
        (0.3, "launch", signal.SIGUSR1),
        (1.0, "every", signal.SIGTERM),
        (3.0, "launch", signal.SIGTERM),
        (4.0, "torchrun", signal.SIGUSR1),
        (5.0, "every", signal.SIGTERM),
        (6.0, "torchrun", signal.SIGTERM),
        (8.0, "launch", signal.SIGUSR1),
    ],
)
def test_while_it_starts(
    delay_s: float,
    whom: str,
    number: signal.Signals,
    whole: Callable[[int], Path],
    tmp_path: Path,
    started: Start,
) -> None:
    directory, settings = tmp_path / "run", (*SMALL, f"run.dir={tmp_path}/run")
    process = started(launch(2, *settings, "task.args.sleep_s=0.1"))
    time.sleep(delay_s)
    send(process, whom, number)
    if whom == "torchrun":  # it may die of it before it can listen; then it is started again
        out, err = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, out + err
        assert left_behind(directory) == []
    else:
        check_stopped(process, directory, whom, number, codes=(-number,))
        assert not any(
            "failed" in (end["why"],) for end in ended(directory, "launches").values()
        ), ended(directory, "launches")
        assert run(launch(2, *settings)).returncode == 0
    check_nothing_lost(directory, whole(2))


@matrix()
def test_while_the_task_is_built(
    whom: str,
    number: signal.Signals,
    whole: Callable[[int], Path],
    tmp_path: Path,
    started: Start,
) -> None:
    process = started(launch(2, *slow(tmp_path, build_s=3.0)), cwd=tmp_path)
    wait_until((tmp_path / "building").exists, "the task")
    send(process, whom, number)
    check_stopped(process, tmp_path / "run", whom, number)
    first, *_ = ended(tmp_path / "run", "launches").values()
    assert first["why"] == "stopped", first
    assert run(launch(2, *slow(tmp_path)), cwd=tmp_path).returncode == 0
    check_nothing_lost(tmp_path / "run", whole(2))


@matrix(first=1)
def test_in_a_step(
    whom: str,
    number: signal.Signals,
    whole: Callable[[int], Path],
    tmp_path: Path,
    started: Start,
) -> None:
    directory, settings = tmp_path / "run", (*SMALL, f"run.dir={tmp_path}/run")
    process = started(launch(2, *settings, "task.args.sleep_s=0.1"))
    after_steps(directory, 5, process)
    send(process, whom, number)
    check_stopped(process, directory, whom, number)
    if whom in ("launch", "every"):
        assert run(launch(2, *settings)).returncode == 0
    assert len(begun(directory, "attempts")) == 2
    check_nothing_lost(directory, whole(2))


@matrix()
def test_in_the_first_step(
    whom: str,
    number: signal.Signals,
    whole: Callable[[int], Path],
    tmp_path: Path,
    started: Start,
) -> None:
    directory, settings = tmp_path / "run", (*SMALL, f"run.dir={tmp_path}/run")
    process = started(launch(2, *settings, "task.args.sleep_s=0.3"))
    wait_until(lambda: events(directory, "begun"), "the attempt")
    send(process, whom, number)
    check_stopped(process, directory, whom, number)
    assert ended(directory, "attempts")["0001"]["step"] <= 3
    assert run(launch(2, *settings)).returncode == 0
    check_nothing_lost(directory, whole(2))


def temporary(directory: Path) -> list[Path]:
    """What is being written at this moment."""
    return [
        file for file in directory.glob("checkpoints/*") if file.suffix not in (".pt", ".json")
    ] + list(directory.glob("checkpoints/.*"))


@matrix("last", (False, True))
def test_in_a_save(
    whom: str, number: signal.Signals, last: bool, shelf: Path, tmp_path: Path, started: Start
) -> None:
    directory, big = tmp_path / "run", ("task.args.width=1500", "train.epochs=4")
    settings = (
        *slow(tmp_path),
        *big,
        "checkpoint.every_steps=5" if not last else "checkpoint.every_s=null",
    )
    other = undisturbed(shelf, *big)
    process = started(launch(2, *settings, "task.args.sleep_s=0.05"), cwd=tmp_path)
    wait_until(lambda: temporary(directory) or process.poll() is not None, "a save", every_s=0.002)
    send(process, whom, number)
    check_stopped(process, directory, whom, number, codes=(0,) if last else ())
    assert run(launch(2, *settings), cwd=tmp_path).returncode == 0
    assert temporary(directory) == []
    steps = [event["step"] for event in events(directory, "step")]
    assert steps == list(range(1, STEPS // 2 + 1)), "a step was lost, or done twice"
    check_equal(directory, other)


@matrix("every", (10, 100), first=1)
def test_in_an_evaluation(
    whom: str, number: signal.Signals, every: int, shelf: Path, tmp_path: Path, started: Start
) -> None:
    evaluating = f"eval.every_steps={every}"
    other = undisturbed(shelf, evaluating)
    process = started(launch(2, *slow(tmp_path, evaluate_s=1.5), evaluating), cwd=tmp_path)
    wait_until((tmp_path / "evaluating").exists, "an evaluation")
    send(process, whom, number)
    check_stopped(process, tmp_path / "run", whom, number, codes=(0,) if every == 100 else ())
    assert run(launch(2, *slow(tmp_path), evaluating), cwd=tmp_path).returncode == 0
    check_nothing_lost(tmp_path / "run", other)


@matrix("step", (10, STEPS))
def test_in_an_upload(
    whom: str,
    number: signal.Signals,
    step: int,
    whole: Callable[[int], Path],
    bucket: tuple[S3Server, str],
    tmp_path: Path,
    started: Start,
) -> None:
    home, directory = (
        Home(*bucket, f"run-{number}-{whom.replace(' ', '')}-{step}"),
        tmp_path / "run",
    )
    settings = (
        *SMALL,
        f"run.dir={directory}",
        f"run.remote={home.url}",
        "checkpoint.every_steps=10",
        "task.args.sleep_s=0.05",
    )
    with FaultProxy(home.server.host, home.server.port) as proxy:
        hold = proxy.hold("PUT", f"step_{step:08d}-0001.pt")
        process = started(launch(2, *settings), env=home.env(proxy))
        assert hold.reached.wait(60)
        send(process, whom, number)
        time.sleep(1)
        hold.release()
        check_stopped(process, directory, whom, number, codes=(0,) if step == STEPS else ())
        assert run(launch(2, *settings), env=home.env(proxy)).returncode == 0
    home.check_none_is_torn()
    assert home.manifests()[-1]["final"] and home.head()[1] == STEPS
    check_nothing_lost(directory, whole(2))


@pytest.mark.parametrize(
    ("numbers", "whom"),
    [
        (numbers, whom)
        for i, numbers in enumerate(
            ["TERM TERM", "TERM USR1 CONT", "USR1 TERM INT", "TERM TERM TERM TERM"]
        )
        for j, whom in enumerate(RECEIVERS)
        if (i + j) % 4 == 0  # each receiver once
    ],
)
def test_several_signals_are_one_stop(
    numbers: str,
    whom: str,
    whole: Callable[[int], Path],
    tmp_path: Path,
    started: Start,
) -> None:
    directory, settings = tmp_path / "run", (*SMALL, f"run.dir={tmp_path}/run")
    process = started(launch(2, *settings, "task.args.sleep_s=0.1"))
    after_steps(directory, 5, process)
    for name in numbers.split():
        send(process, whom, signal.Signals[f"SIG{name}"])
        time.sleep(0.01)
    out, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == (75 if whom in ("every", "launch") else 0), out + err
    assert left_behind(directory) == []
    end = ended(directory, "attempts")["0001"]
    assert (end["why"], end["saved"]) == ("stopped", True), json.dumps(end)
    assert run(launch(2, *settings)).returncode == 0
    assert set(losses(directory)) == set(range(1, STEPS + 1))
    check_nothing_lost(directory, whole(2))
