"""`harness submit`: the script that it writes does what was asked for, and what was submitted is
what runs.

`sbatch` is a small shell script here, which keeps what it is given and prints a job's number.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import cli, config
from harness.config.schema_services import SlurmSettings
from harness.supervision import code_copy
from harness.supervision.job_script import Job, script

PACKAGE = Path(code_copy.__file__).resolve().parents[1]
TASK = "def build(**anything):\n    return anything\n"
ODD = [
    "task.args.a=two words",
    "task.args.b='it''s \"quoted\"'",
    "task.args.c=$HOME $(id) `id` $$ $1",
    "task.args.d='# no comment'",
    "task.args.e=~ !! ?[a-z]{1,2}*",
    'task.args.f="line\\nbreak\\ttab"',
    r"task.args.h='back\slash\'",
    "task.args.i=ünï…",
    "task.args.j=;&|<>()",
    "task.args.k=''",
]
Submit = Callable[..., tuple[int, str]]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that is submitted from."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str]) -> Submit:
    """`harness submit` in this process: exit code, and all that it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(["submit", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where each call of `sbatch` leaves its arguments and its script."""
    folder = tmp_path / "sbatch"
    (folder / "bin").mkdir(parents=True)
    put(
        folder,
        f'n=$(ls {folder} | wc -l)\nprintf "%s\\n" "$@" > {folder}/$n.args\n'
        f'cp "${{@: -1}}" {folder}/$n.script\necho "4242;cluster"',
    )
    monkeypatch.setenv("PATH", f"{folder}/bin{os.pathsep}{os.environ['PATH']}")
    return folder


def put(folder: Path, text: str) -> None:
    (folder / "bin" / "sbatch").write_text(f"#!/bin/bash\n{text}\n")
    (folder / "bin" / "sbatch").chmod(0o755)


def add_task(place: Path) -> str:
    """A module of the user's in `place`, by a name that nobody has imported; as task.name."""
    name = f"task_{secrets.token_hex(6)}"
    (place / f"{name}.py").write_text(TASK)
    return f"{name}:build"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


OUR_FILES = {f"harness/{name}" for name in files(PACKAGE) if name.endswith((".py", ".typed"))}


def options(text: str) -> list[str]:
    """The options of sbatch in a script, as it reads them: up to the first line that is no comment,
    and quotes are a shell's."""
    found = []
    for line in text.splitlines():
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH "):
            found += shlex.split(line.removeprefix("#SBATCH "), comments=True)
    return found


def words(text: str) -> list[str]:
    """The settings that the script's shell passes on."""
    first = text.partition("\n# The environment of your site.")[0]
    done = subprocess.run(
        ["bash", "-c", f'{first}\nprintf "%s\\0" "${{settings[@]}}"'],
        capture_output=True,
        check=True,
    )
    return done.stdout.decode().split("\0")[:-1]


def directory(text: str) -> str | None:
    """The run directory that the job is told, however it is spelled."""
    (word,) = (word for word in words(text) if word.startswith("run.dir="))
    return config.load(None, [word, "run.remote=file:///r"])[0].run.dir


def is_whole(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# --- the script ---


def test_a_dry_run_prints_the_script_and_writes_nothing(place, submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    code, said = submit("--dry-run", "run.dir=runs/a", f"run.remote=file://{tmp_path}/remote")
    assert code == 0
    assert said.startswith("#!/bin/bash\n")
    assert list(place.iterdir()) == [] and sorted(path.name for path in tmp_path.iterdir()) == [
        "project"
    ]


def test_what_is_not_set_is_not_mentioned(place, submit):
    code, said = submit("--dry-run", "run.dir=runs/a")
    assert code == 0
    is_whole(said)
    names = [option.partition("=")[0] for option in options(said)]
    assert names == [
        "--job-name",
        "--output",
        "--nodes",
        "--ntasks-per-node",
        "--requeue",
        "--open-mode",
        "--dependency",
    ]
    assert "--nproc-per-node=1 " in said


def test_every_setting_appears(place, submit):
    code, said = submit(
        "--dry-run",
        "run.dir=runs/a",
        "--nodes",
        "2",
        "--gpus-per-node",
        "8",
        "--time",
        "12:00:00",
        "--partition",
        "spot",
        "--account",
        "me",
        "--qos",
        "low",
        "slurm.cpus_per_node=96",
        "slurm.mem=64G",
        "slurm.constraint=a100&nvme",
        "slurm.job_name=my.job-1",
        "slurm.extra=['--exclusive', '--mail-type=END,FAIL', '--comment=\"two words\"']",
        "slurm.setup=['module load cuda/12', 'export A=\"b c\"']",
        "slurm.container='apptainer exec --nv image.sif'",
        "slurm.python=/opt/my python/bin/python",
        "train.global_batch_size=64",
        "run.max_failures=5",
    )
    assert code == 0, said
    is_whole(said)
    assert {
        "--nodes=2",
        "--gpus-per-node=8",
        "--time=12:00:00",
        "--partition=spot",
        "--account=me",
        "--qos=low",
        "--cpus-per-task=96",
        "--mem=64G",
        "--constraint=a100&nvme",
        "--job-name=my.job-1",
        "--exclusive",
        "--mail-type=END,FAIL",
        "--comment=two words",
        f"--output={place}/runs/a/logs/slurm-%j.out",
        "--requeue",
        "--open-mode=append",
        "--dependency=singleton",
        "--ntasks-per-node=1",
    } == set(options(said))
    assert (
        '\nmodule load cuda/12\nexport A="b c"\n'
        "harness=(apptainer exec --nv image.sif '/opt/my python/bin/python' " in said
    )
    assert "--nproc-per-node=8 " in said
    assert "After 5 without a new checkpoint" in said


def test_processes_are_those_asked_for_else_one_a_gpu_else_one(place, submit):
    for given_, procs in (
        (["--gpus-per-node", 4], 4),
        (["--gpus-per-node", 4, "--procs-per-node", 2], 2),
        (["--procs-per-node", 3], 3),
        ([], 1),
    ):
        assert f"--nproc-per-node={procs} " in submit("--dry-run", "run.dir=runs/a", *given_)[1]


def test_flags_are_words_and_not_yaml(place, submit):
    code, said = submit(
        "--dry-run",
        "run.dir=runs/a",
        "--account",
        "0123",
        "--partition",
        "on",
        "--qos",
        "1e3",
        "--time",
        "1-12",
    )
    assert code == 0, said
    assert {"--account=0123", "--partition=on", "--qos=1e3", "--time=1-12"} <= set(options(said))


def test_odd_settings_reach_the_program_as_they_were_given(place, submit):
    name = add_task(place)
    code, said = submit("--dry-run", f"task.name={name}", *ODD, "run.dir=runs/a", "train.epochs=3")
    assert code == 0, said
    is_whole(said)
    assert words(said)[:-1] == [f"task.name={name}", *ODD, "train.epochs=3"]
    assert directory(said) == f"{place}/runs/a"


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.text(
            st.characters(blacklist_characters="\0", blacklist_categories=["Cs", "Cc", "Zl", "Zp"])
        ),
        min_size=1,
        max_size=8,
    )
)
def test_any_setting_reaches_the_program_as_it_was_given(given_):
    text = script(Job(SlurmSettings(), "a", "out", given_, directory="/"))
    is_whole(text)
    assert words(text) == given_


@pytest.mark.parametrize(
    "name",
    [
        "two words",
        "it's",
        'say "x"',
        "$HOME",
        "a #1",
        "a: b",
        "back\\slash",
        "[1,2]",
        "{a}",
        "100%",
        "ünï",
        "null",
    ],
)
def test_a_directory_of_any_name_is_found_by_the_job(name, tmp_path, submit, monkeypatch):
    """The run lives below it, and its path is what the settings, the log, and the shell read."""
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.chdir(folder)
    code, said = submit("--dry-run", "run.dir=runs/a")
    assert code == 0, said
    is_whole(said)
    assert directory(said) == str(folder / "runs" / "a")
    output = [option for option in options(said) if option.startswith("--output=")]
    assert [path.replace("%%", "%") for path in output] == [
        f"--output={folder}/runs/a/logs/slurm-%j.out"
    ]


@pytest.mark.parametrize("name", ["two words", "it's", "$HOME"])
def test_a_run_of_any_name_gets_a_jobs_name_of_one_word(name, place, submit):
    code, said = submit("--dry-run", f"run.dir=runs/{name}")
    assert code == 0, said
    found = [option for option in options(said) if not option.startswith("--")]
    assert found == []
    assert directory(said) == f"{place}/runs/{name}"


def test_two_runs_do_not_wait_for_each_other_though_their_folders_have_one_name(place, submit):
    """Of all jobs with one name SLURM runs one at a time."""
    places = [
        ["run.dir=sweep1/a"],
        ["run.dir=sweep2/a"],
        ["run.dir=null", "run.remote=s3://b/sweep1/a"],
        ["run.dir=null", "run.remote=s3://b/sweep2/a"],
    ]
    texts = [submit("--dry-run", *where)[1] for where in places]
    names = [
        next(option for option in options(text) if option.startswith("--job-name="))
        for text in texts
    ]
    assert len(set(names)) == 4
    assert options(submit("--dry-run", f"run.dir={place}/sweep1/a")[1])[0] == names[0], (
        "the same run, spelled in another way"
    )


def test_every_option_stands_before_the_first_command(place, submit):
    _, said = submit(
        "--dry-run",
        "run.dir=runs/a",
        "slurm.extra=[--exclusive]",
        "slurm.setup=['#SBATCH --too-late']",
    )
    head = said.partition("\ncd ")[0]
    assert all(not line or line.startswith("#") for line in head.splitlines())
    assert said.count("\n#SBATCH") == head.count("\n#SBATCH") + 1


def test_the_script_requires_the_runs_record(place, submit):
    assert "supervise before --submitted " in submit("--dry-run", "run.dir=runs/a")[1]
    assert "--submitted" not in script(Job(SlurmSettings(), "a", "out", []))


def test_a_store_that_does_not_answer_at_the_end_is_counted_and_the_job_requeued(tmp_path):
    """Commands of SLURM are small scripts here; the job's own shell is real."""
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "squeue": "echo Unknown",
        "scontrol": f'case $1 in show) echo "JobId=7 Restarts=0 JobState=RUNNING ";;'
        f' *) echo "$*" >>{tmp_path}/scontrol;; esac',
        "srun": "exit 1",
        "harness": "case $* in *before*) exit 75;; *) exit 74;; esac",
    }
    for name, text in commands.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    job = Job(SlurmSettings(), "a", "out", ["a=b"], directory=str(tmp_path), code=str(tmp_path))
    (tmp_path / "job.sh").write_text(script(replace(job, python=str(tools / "harness"))))
    done = subprocess.run(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env={"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert (tmp_path / ".unreachable-7.after").read_text() == "\n"


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("restarts", "lines", "code"), [(0, None, 75), (1, None, 75), (2, None, 74), (9, None, 74),
                                    (9, 0, 75), (9, 1, 75), (0, 2, 74)]
)  # fmt: skip
def test_a_store_that_does_not_answer_never_requeues_a_job_for_ever(
    when, restarts, lines, code, tmp_path
):
    """Also where the failures cannot be counted, because the disk is full: `lines` is None."""
    file = tmp_path / f".unreachable-7.{when}"
    if lines is None:
        file.symlink_to("/dev/full")
    else:
        file.write_text("\n" * lines)
    text = script(Job(SlurmSettings(), "a", "out", [], code=str(tmp_path)))
    counting = text[text.index("unreachable=") : text.index("# Is there anything to train?")]
    before = f"SLURM_JOB_ID=7 code={tmp_path} restarts={restarts}; requeue() {{ exit 75; }}"
    done = subprocess.run(
        ["bash", "-c", f"{before}\n{counting}\nrequeue_unreachable {when}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, "")


# --- what is refused ---


def test_a_job_that_is_submitted_inside_another_one_inherits_nothing_of_it(
    place, submit, sbatch, monkeypatch
):
    put(sbatch, f"env >{sbatch}/env\necho 1")
    outer = {
        "SLURM_JOB_ID": "9",
        "SLURM_ARRAY_JOB_ID": "9",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_RESTART_COUNT": "4",
        "SLURM_MEM_PER_NODE": "100",
        "SLURM_EXPORT_ENV": "NONE",
        "SLURMD_NODENAME": "n1",
        "SBATCH_JOB_NAME": "another",
    }
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_JWT": "token", "SBATCH_ACCOUNT": "me"}
    for name, value in (outer | kept).items():
        monkeypatch.setenv(name, value)
    code, said = submit("run.dir=runs/a", f"task.name={add_task(place)}")
    assert code == 0, said
    lines = (sbatch / "env").read_text().splitlines()
    seen = dict(line.split("=", 1) for line in lines if line.startswith(("SLURM", "SBATCH")))
    assert seen == kept
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("SLURM_MPI_TYPE", "pmix")
    assert submit("run.dir=runs/a", f"task.name={add_task(place)}")[0] == 0
    assert "SLURM_MPI_TYPE=pmix" in (sbatch / "env").read_text(), "outside a job, it is the site's"


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--dependency=afterok:5"], "afterok:5,singleton"),
        (["--depend afterok:5", "-dafter:6"], "afterok:5,after:6,singleton"),
        (["--exclusive -d 'afterok:5:7,afterany:6'"], "afterok:5:7,afterany:6,singleton"),
        (["--dependency=singleton"], "singleton"),
        (["--deadline=12:00", "--delay-boot=5", "-D /tmp", '--comment="a -d b"'], "singleton"),
    ],
)
def test_a_dependency_of_the_users_is_joined_with_the_scripts_own(extra, expected):
    found = options(script(Job(SlurmSettings(extra=extra), "a", "out", [])))
    assert [word for word in found if "--dependency".startswith(word.partition("=")[0])] == [
        f"--dependency={expected}"
    ]
    assert not any(word.startswith("-d") for word in found)
    assert ("--exclusive" in found) == ("--exclusive" in " ".join(extra))
    assert ("--comment=a -d b" in found) == ("--comment" in " ".join(extra))


def test_alternative_dependencies_are_refused(place, submit):
    code, said = submit("--dry-run", "run.dir=a", "slurm.extra=[--dependency=afterok:5?afterok:6]")
    assert code == 78 and "found: afterok:5?afterok:6" in said and "Traceback" not in said


@pytest.mark.parametrize("before", [[], ["run.dir=a"]])
def test_what_follows_drill_is_no_option_of_it_unless_it_is_one(place, submit, before):
    (place / "my_loop.py").touch()
    rest = ["my_loop.py", "--lr", "0.1"] if before else ["run.dir=a", "my_loop.py", "--lr", "0.1"]
    code, said = submit("--dry-run", *before, "--drill", *rest)
    assert code == 0, said
    assert " drill --nproc-per-node=1  " in said and words(said)[-1].startswith("run.loop=[")
    assert words(said)[-1].endswith('"--lr", "0.1"]')
    code, said = submit("--dry-run", *before, "--drill", "--steps 9 --faults 2", *rest)
    assert code == 0 and " --steps 9 --faults 2 " in said, said


def test_a_time_that_yaml_would_make_a_number_of_is_taken_as_it_is_written(place, submit):
    code, said = submit("--dry-run", "slurm.time=half a day")
    assert code == 78 and "slurm.time" in said and "hours:minutes:seconds" in said
    (place / "c.yaml").write_text("slurm:\n  time: 12:00:00\n")
    (place / "quoted.yaml").write_text("slurm:\n  time: '12:00:00'\n")
    for arguments in (
        ["--config", "c.yaml"],
        ["--config", "quoted.yaml"],
        ["slurm.time=12:00:00"],
        ["slurm.time='12:00:00'"],
        ["--time", "12:00:00"],
        ["--config", "c.yaml", "--time", "1-0"],
    ):
        code, said = submit("--dry-run", *arguments)
        assert code == 0, said
        assert ("--time=1-0" if "1-0" in arguments else "--time=12:00:00") in options(said)


@pytest.mark.parametrize(
    "setting",
    [
        "slurm.nodes=0",
        "slurm.gpus_per_node=-1",
        "slurm.procs_per_node=0",
        "slurm.time=soon",
        "slurm.job_name='a b'",
        "slurm.extra=[exclusive]",
        'slurm.extra=["--a\\nrm -rf x"]',
        "slurm.partitoin=x",
        "run.max_failures=0",
        "task.name=no_such:build",
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_written(setting, place, submit, sbatch):
    code, said = submit("run.dir=runs/a", setting)
    assert code == 78
    assert setting.partition("=")[0].rpartition(".")[2][:5] in said and "Traceback" not in said
    assert list(place.iterdir()) == [] and files(sbatch) == {"bin/sbatch"}


def test_a_batch_that_does_not_divide_among_all_processes_is_refused_now_and_not_when_the_job_starts(  # noqa: E501
    place, submit, sbatch
):
    code, said = submit("run.dir=runs/a", "--nodes", "2", "--gpus-per-node", "5")
    assert code == 78
    assert "global_batch_size=48 on 10 rank(s)" in said
    assert list(place.iterdir()) == []
    assert (
        submit(
            "run.dir=runs/a", "--nodes", "2", "--gpus-per-node", "5", "train.global_batch_size=50"
        )[0]
        == 0
    )


def test_without_sbatch_it_says_so_and_writes_nothing(place, submit, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    code, said = submit("run.dir=runs/a")
    assert code == 78
    assert "no sbatch" in said and "login node" in said and "Traceback" not in said
    assert list(place.iterdir()) == []


def test_what_sbatch_refuses_is_said_in_its_words(place, submit, sbatch):
    put(sbatch, "echo 'sbatch: error: invalid partition specified: spto' >&2; exit 1")
    code, said = submit("run.dir=runs/a", "--partition", "spto")
    assert code == 1
    assert (
        "invalid partition specified: spto" in said
        and "job.sbatch" in said
        and "Traceback" not in said
    )


def test_an_unwritable_place_is_said_in_words(place, submit, sbatch):
    (place / "runs").write_text("in the way")
    code, said = submit("run.dir=runs/a")
    assert code in (1, 74, 78)
    assert "Traceback" not in said


# --- what is submitted ---


def test_script_code_configuration_and_record_lie_in_the_run_numbered(
    place, submit, sbatch, tmp_path
):
    (place / "c.yaml").write_text("train:\n  epochs: 3\nrun:\n  dir: elsewhere\n")
    remote = tmp_path / "remote"
    for number in ("0001", "0002"):
        (place / "c.yaml").write_text(f"train:\n  epochs: {int(number)}\nrun:\n  dir: elsewhere\n")
        code, said = submit(
            "--config", "c.yaml", "run.dir=runs/a", f"run.remote=file://{remote}", "--nodes", "2"
        )
        assert code == 0, said
        folder = place / "runs" / "a" / "submitted" / number
        text = (folder / "job.sbatch").read_text()
        is_whole(text)
        assert words(text)[:-1] == [
            "--config",
            str(folder / "config.yaml"),
            f"run.remote=file://{remote}",
        ]
        assert directory(text) == f"{place}/runs/a"
        assert (
            folder / "config.yaml"
        ).read_text() == f"train:\n  epochs: {int(number)}\nrun:\n  dir: elsewhere\n"
        assert files(folder / "code") == OUR_FILES
        assert (
            "job 4242" in said
            and f"{place}/runs/a/logs/slurm-4242.out" in said
            and "harness stop" in said
        )
    calls = sorted(path for path in sbatch.iterdir() if path.suffix == ".args")
    assert [path.read_text().split() for path in calls] == [
        ["--parsable", f"{place}/runs/a/submitted/{number}/job.sbatch"]
        for number in ("0001", "0002")
    ]
    for store in (place / "runs" / "a", remote):
        assert "submitted" in json.loads((store / "run.json").read_text())
    assert (place / "runs" / "a" / "logs").is_dir(), "SLURM does not make it"
    assert not (place / "elsewhere").exists()


def test_the_record_of_the_first_submission_stands(place, submit, sbatch):
    submit("run.dir=runs/a")
    record = place / "runs" / "a" / "run.json"
    record.write_text("{}\n")
    assert submit("run.dir=runs/a")[0] == 0
    assert record.read_text() == "{}\n"


@pytest.mark.parametrize("run", ["run.dir=null", "run.dir=scratch"])
def test_what_no_directory_of_the_runs_can_keep_lies_beside_the_working_directory(
    run, place, submit, sbatch, tmp_path
):
    extra = [] if run == "run.dir=null" else ["run.scratch=true"]
    code, said = submit(run, *extra, f"run.remote=file://{tmp_path}/runs/big")
    assert code == 0, said
    (home,) = place.glob("harness-*")
    assert home.name.startswith("harness-big" if run == "run.dir=null" else "harness-scratch")
    text = (home / "submitted" / "0001" / "job.sbatch").read_text()
    assert words(text) == [run, *extra, f"run.remote=file://{tmp_path}/runs/big"]
    assert f"--output={home}/logs/slurm-%j.out" in options(text)
    assert (tmp_path / "runs" / "big" / "run.json").exists()
    assert not (place / "None").exists()


def test_a_scratch_directory_need_not_exist_where_it_is_submitted(place, submit, sbatch, tmp_path):
    """It is another one on each node; here there may be no such disk."""
    (tmp_path / "local").write_text("no folder can be made in here")
    code, said = submit(
        "run.scratch=true", f"run.dir={tmp_path}/local/run", f"run.remote=file://{tmp_path}/remote"
    )
    assert code == 0, said
    assert (tmp_path / "remote" / "run.json").exists()


def test_the_job_begins_with_the_code_that_was_submitted_whatever_became_of_it(
    place, submit, sbatch, tmp_path
):
    """The beginning of the script, run by a shell on another place: it stops before `srun`, with
    the launch recorded."""
    name = add_task(place)
    assert submit(f"task.name={name}", "run.dir=runs/a")[0] == 0
    (place / f"{name.partition(':')[0]}.py").write_text("raise RuntimeError('edited since')")
    (place / "harness").mkdir()
    (place / "harness" / "__init__.py").write_text("raise RuntimeError('another harness')")
    text = (place / "runs" / "a" / "submitted" / "0001" / "job.sbatch").read_text()
    head, _, _ = text.partition("[ $answer -eq 75 ]")
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("HARNESS", "PYTHONPATH"))
    }
    (tmp_path / "spool.sh").write_text(
        f'{head}\necho "$port"\n'
        f"{shlex.quote(sys.executable)} -c 'import os, sys; "
        f'sys.path.insert(0, os.environ["HARNESS_CODE"]); from harness import task; '
        f'print(task.find("{name}", {{}}).__code__.co_filename)\'\nexit $answer\n'
    )
    done = subprocess.run(
        ["bash", tmp_path / "spool.sh"],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"SLURM_JOB_ID": "77"},
        cwd="/",
    )
    assert done.returncode == 75, done.stdout + done.stderr
    port, file = done.stdout.splitlines()
    assert 20000 <= int(port) < 30000
    assert file.startswith(f"{place}/runs/a/submitted/0001/code/")
    assert (place / "runs" / "a" / "launches" / "77.0.json").exists()


# --- the copy of the code ---


def copied(place: Path, submit: Submit, *arguments: str) -> set[str]:
    """What the newest copy holds beside this package."""
    code, said = submit(*arguments, "run.dir=../run")
    assert code == 0, said
    newest = max((place.parent / "run" / "submitted").iterdir())
    found = files(newest / "code")
    assert found >= OUR_FILES
    return found - OUR_FILES


def fill(place: Path, *names: str) -> None:
    for name in names:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("x = 1\n")


def git(place: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(place), *arguments], check=True, capture_output=True)


def test_of_a_folder_all_sources_are_copied_and_neither_data_nor_environments_nor_runs(
    place, submit, sbatch
):
    name = add_task(place)
    kept = {
        "pkg/model.py",
        "pkg/deep/er/loss.py",
        "configs/a.yaml",
        "setup.toml",
        "labels.csv",
        "notes.txt",
        "vocab.json",
    }
    fill(place, *kept)
    fill(
        place,
        "data.bin",
        "image.png",
        "pkg/module.so",
        ".hidden/secret.py",
        ".venv/lib/python3/a.py",
        "env/pyvenv.cfg",
        "env/lib/b.py",
    )
    fill(
        place,
        "lib/site-packages/c.py",
        "runs/old/attempts/0001.json",
        "runs/old/config.yaml",
        "runs/new/launches/1.0.json",
        "runs/new/x.py",
    )
    (place / "large.csv").write_bytes(b"0" * ((1 << 20) + 1))
    (place / "linked.py").symlink_to(place / "pkg" / "model.py")
    assert copied(place, submit, f"task.name={name}") == {f"{name.partition(':')[0]}.py", *kept}


def test_of_a_git_checkout_what_git_would_not_ignore_is_copied(place, submit, sbatch):
    name = add_task(place)
    git(place, "init", "-q")
    fill(
        place,
        "tracked.py",
        "kernel.cu",
        "new.py",
        "gone.py",
        "ignored/a.py",
        "secret.env",
        "sub/also_ignored.py",
    )
    (place / ".gitignore").write_text("ignored/\n*.env\nalso_ignored.py\n")
    (place / "weights.bin").write_bytes(b"0" * ((1 << 20) + 1))
    git(place, "add", "tracked.py", "kernel.cu", "gone.py")
    (place / "gone.py").unlink()
    expected = {f"{name.partition(':')[0]}.py", ".gitignore", "tracked.py", "kernel.cu", "new.py"}
    assert copied(place, submit, f"task.name={name}") == expected


def test_of_a_git_checkout_neither_environments_nor_runs_are_copied_though_git_does_not_ignore_them(
    place, submit, sbatch
):
    name = add_task(place)
    git(place, "init", "-q")
    fill(
        place,
        "a.py",
        "env/pyvenv.cfg",
        "env/lib/b.py",
        "runs/old/attempts/0001.json",
        "runs/old/checkpoints/step_00000001-0001.json",
    )
    fill(place, "runs/new/launches/1.0.json", "runs/new/config.yaml")
    assert copied(place, submit, f"task.name={name}") == {f"{name.partition(':')[0]}.py", "a.py"}


@pytest.mark.parametrize("checkout", [False, True])
@pytest.mark.parametrize("where", [["run.dir=runs/a"], ["run.scratch=true", "run.dir=runs/a"]])
def test_a_copy_does_not_hold_the_copies_before_it(
    checkout, where, place, submit, sbatch, tmp_path
):
    name = add_task(place)
    if checkout:
        git(place, "init", "-q")
    for _ in range(3):
        assert submit(f"task.name={name}", *where, f"run.remote=file://{tmp_path}/remote")[0] == 0
    (newest,) = place.glob("**/submitted/0003")
    assert files(newest / "code") - OUR_FILES == {f"{name.partition(':')[0]}.py"}


def test_a_task_is_copied_also_where_git_ignores_all(place, submit, sbatch):
    git(place.parent, "init", "-q")
    (place.parent / ".gitignore").write_text("*\n")
    name = add_task(place)
    assert f"{name.partition(':')[0]}.py" in copied(place, submit, f"task.name={name}")


def test_names_that_git_would_quote_are_copied(place, submit, sbatch):
    name = add_task(place)
    git(place, "init", "-q")
    fill(place, "tëst dir/a b.py", "new\nline.py")
    assert copied(place, submit, f"task.name={name}") == {
        f"{name.partition(':')[0]}.py",
        "tëst dir/a b.py",
        "new\nline.py",
    }


def test_a_name_that_is_no_utf_8_is_copied(place, submit, sbatch):
    name = add_task(place)
    git(place, "init", "-q")
    odd = os.fsdecode(b"caf\xe9.py")
    fill(place, odd)
    assert copied(place, submit, f"task.name={name}") == {f"{name.partition(':')[0]}.py", odd}


def test_a_task_that_is_installed_is_not_copied(place, submit, sbatch, monkeypatch):
    installed = place / "lib" / "site-packages"
    installed.mkdir(parents=True)
    fill(place, "mine.py")
    name = add_task(installed)
    monkeypatch.syspath_prepend(str(installed))
    assert copied(place, submit, f"task.name={name}") == set()


def test_our_own_task_takes_nothing_of_the_working_directory_with_it(place, submit, sbatch):
    fill(place, "mine.py")
    assert copied(place, submit) == set()


def test_too_many_files_are_refused_in_words(place, submit, sbatch, monkeypatch):
    name = add_task(place)
    monkeypatch.setattr(code_copy, "MOST_FILES", len(OUR_FILES) + 10)
    for number in range(10):
        (place / f"{number}.py").touch()
    code, said = submit(f"task.name={name}", "run.dir=../run")
    assert code == 78
    assert "too many files" in said and "Traceback" not in said
    assert not list((sbatch).glob("*.args"))
