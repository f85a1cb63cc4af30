"""Generate the job script of `harness submit` as text.

The folder `slurm/` of the repository holds the scripts that this module generates for three sets of
values. Users may read, copy and edit them.
"""

from __future__ import annotations

import contextlib
import shlex
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

from harness.config.schema_services import SlurmSettings
from harness.errors import UsageError

# Variables by which a process inside a job reaches the cluster. All others named SLURM_… belong to
# that job.
REACHES = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT")
# Options of sbatch, which precede those of the script.
OVERRIDES = ("SBATCH_ARRAY_INX", "SBATCH_JOB_NAME", "SBATCH_NO_REQUEUE", "SBATCH_OPEN_MODE")

TEMPLATE = r"""#!/bin/bash
{options}
#SBATCH --ntasks-per-node=1       # one launcher per node; it starts the training processes
#SBATCH --requeue                 # SLURM requeues the job after preemption or a node failure
#SBATCH --open-mode=append        # one log for all restarts of the job
#SBATCH --dependency={dependency}    # one job of this name at a time: two would compete for a run
#
# Train one run to its end, however often this job is preempted or fails. Submit it once.
#
#   preemption, SIGTERM     All ranks finish the same step, save and exit. The job is requeued and
#                           resumes from that step.
#   near the time limit     The same, run.margin_s seconds before the limit; no --signal is needed.
#   a crash, a lost node    The job is requeued and resumes from the newest checkpoint.
#   repeated crashes        After {most} without a new checkpoint in between, the job fails. The end
#                           of its log shows the error.
#   finished                The job ends and is not requeued. The same holds for `scancel` and
#                           `harness stop RUN`.

# The program and its settings.
cd {directory} || exit 78
code={code}
settings=({settings})

# The environment of your site.
{setup}
harness=({python} "$code/harness/__main__.py")

# The task is imported from this directory too.
export HARNESS_CODE=$code
# Errors only: the last rank to exit warns at length that the other ranks are gone.
export TORCH_CPP_LOG_LEVEL=${{TORCH_CPP_LOG_LEVEL:-ERROR}}
# srun does not inherit --cpus-per-task.
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# SLURM's description of this job; of a job array, that of this task alone. SLURM_ARRAY_JOB_ID and
# SLURM_RESTART_COUNT may have been inherited from a job in which this one was submitted.
describe() {{
    timeout 60 scontrol show job -o "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID "
}}
restarts=${{SLURM_RESTART_COUNT:-0}}
[[ $(describe) =~ \ Restarts=([0-9]+) ]] && restarts=${{BASH_REMATCH[1]}}
# The ID of this start of the job.
export HARNESS_LAUNCH=$SLURM_JOB_ID.$restarts
# SLURM sets SLURM_JOB_END_TIME itself from version 23.02 on.
end=$(timeout 30 squeue -h -j "$SLURM_JOB_ID" -o "%A %e" | sed -n "s/^$SLURM_JOB_ID //p")
if [[ $end = 20* ]]; then SLURM_JOB_END_TIME=$(date -d "$end" +%s); export SLURM_JOB_END_TIME; fi
# A different rendezvous port for each job on a node, and for each start of a job.
port=$((20000 + (7 * SLURM_JOB_ID + restarts) % 10000))

# Requeue this job, which also ends this start of it. Only while this start is running: a requeue
# would bring back a job that was cancelled, and SLURM may have requeued the job itself.
requeue() {{
    local pause state id
    for pause in 0 5 15 30 60 60; do
        sleep $pause
        state=$(describe) || continue
        [[ $state == *" Restarts=$restarts "* ]] || exit $answer
        # The ID of one task of a job array is that of the whole array.
        id=$SLURM_JOB_ID
        [[ $state =~ \ ArrayJobId=([0-9]+)\ ArrayTaskId=([0-9]+)\  ]] &&
            id=${{BASH_REMATCH[1]}}_${{BASH_REMATCH[2]}}
        case $state in
            *" JobState=RUNNING "* | *" JobState=COMPLETING Reason=TimeLimit "*)
                timeout 60 scontrol requeue "$id" && exit 0 ;;
            *) exit $answer ;;
        esac
    done
    # If jobs may not requeue themselves here, submit this script several times. Because of
    # --dependency=singleton the jobs run one after another, and each resumes the run. Those that
    # start after the run has finished exit at once.
    echo "harness: this job cannot be requeued; submit it again to continue" >&2
    exit $answer
}}

# Count the failures to reach the store in a file here, because the store cannot record them. If
# this folder cannot be written either, the restarts of the job are counted: it must not be requeued
# for ever. `sync` detects what a file server reports late.
unreachable=$code/.unreachable-$SLURM_JOB_ID
requeue_unreachable() {{
    local count=$((restarts + 1))
    {{ echo >>"$unreachable.$1" && sync "$unreachable.$1"; }} 2>/dev/null &&
        count=$(wc -l <"$unreachable.$1")
    [ "${{count:-{most}}}" -ge {most} ] || requeue
    exit 74
}}

# Is there anything to train? Exit code 75 means yes. Otherwise the run has finished, keeps
# crashing, or lies on another disk.
"${{harness[@]}}" supervise before{submitted} "${{settings[@]}}"
answer=$?
[ $answer -ne 74 ] || requeue_unreachable before
[ $answer -eq 75 ] || exit $answer
rm -f "$unreachable.before"

# At a preemption SLURM signals the job steps. It signals this shell only to end the job, and then
# the ranks have little time left to save, so the trap must only set a variable. Never signal srun:
# it would kill the ranks at once.
stopped=
trap 'stopped=--stopped' TERM INT USR1 USR2

# --export: the job may have been submitted with --export=NONE, and srun would do the same.
srun --export=ALL --kill-on-bad-exit=1 --cpu-bind=none "${{harness[@]}}" launch \
    --nnodes="$SLURM_NNODES" --nproc-per-node={procs} --rdzv-backend=c10d \
    --rdzv-endpoint="$(hostname):$port" --rdzv-id="$HARNESS_LAUNCH" "${{settings[@]}}" &
step=$!
while :; do
    wait $step
    status=$?
    # A trapped signal ends `wait` although srun is still running.
    [ $status -gt 128 ] && kill -0 $step 2>/dev/null || break
done

# Decide from the run's own records whether this was a failure; the exit code does not tell. After
# a preemption nothing counts as a failure. At the time limit it does, unless there is a new
# checkpoint.
job=$(describe)
[[ $job == *" PreemptTime=2"* ]] && stopped=--stopped
[[ $job == *" Reason=TimeLimit "* ]] && stopped=
"${{harness[@]}}" supervise after --code $status $stopped "${{settings[@]}}"
answer=$?
[ $answer -ne 74 ] || requeue_unreachable after
[ $answer -eq 75 ] || exit $answer
rm -f "$unreachable.after"
requeue    # must be last
"""


DRILL = r"""#!/bin/bash
{options}
#SBATCH --ntasks=1
#
# Drill a program: train it without and with faults, and compare the results. The run itself is not
# touched. This is one job on one node, which is not requeued. The verdict is at the end of the
# job's log, and the job's exit code is that of `harness drill`.

cd {directory} || exit 78
code={code}
settings=({settings})

# The environment of your site.
{setup}

# The task is imported from this directory too.
export HARNESS_CODE=$code
exec {python} "$code/harness/__main__.py" drill --nproc-per-node={procs} {drill} "${{settings[@]}}"
"""


@dataclass(frozen=True)
class Job:
    """The values of a job script.

    `slurm.setup`, `directory`, `code` and `python` are shell text, which is inserted unchanged.
    `settings` are plain words, which are quoted for the shell.
    """

    slurm: SlurmSettings
    job_name: str
    output: str
    settings: list[str]
    directory: str = '"$SLURM_SUBMIT_DIR"'
    code: str = '"$SLURM_SUBMIT_DIR"'
    python: str = "python"
    most_failures: int = 3
    is_submitted: bool = False
    # Options of `harness drill` if the job is a drill, else None.
    drill: tuple[str, ...] | None = None


def procs_per_node(slurm: SlurmSettings) -> int:
    """Return the number of training processes per node.

    It is `slurm.procs_per_node` if that is set, else one process per GPU, and one without GPUs.
    """
    return slurm.procs_per_node or slurm.gpus_per_node or 1


def script(job: Job) -> str:
    """Return the text of the job script. Raises UsageError if a value has a control character."""
    slurm = job.slurm
    _check_plain(job)
    options = {
        "job-name": job.job_name,
        "output": job.output,
        "nodes": slurm.nodes,
        "gpus-per-node": slurm.gpus_per_node,
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.mem,
        "time": slurm.time,
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
    }
    lines = [
        f"#SBATCH --{name}={shlex.quote(str(value))}"
        for name, value in options.items()
        if value is not None
    ]
    prefix = f"{slurm.container} " if slurm.container else ""
    extra, dependency = (slurm.extra, "") if job.drill is not None else _dependency(slurm.extra)
    return (TEMPLATE if job.drill is None else DRILL).format(
        options="\n".join(lines + [f"#SBATCH {option}" for option in extra]),
        dependency=dependency,
        most=job.most_failures,
        directory=job.directory,
        code=job.code,
        settings=_array_items(job.settings),
        setup="\n".join(slurm.setup),
        python=prefix + job.python,
        submitted=" --submitted" if job.is_submitted else "",
        procs=procs_per_node(slurm),
        drill=shlex.join(job.drill or ()),
    )


def submitting(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for sbatch, without what describes a job around this process.

    A job inherits the environment of its sbatch, and SLURM sets only those variables anew that the
    new job has: it would be taken for a task of the other one's array.
    """
    is_in_job = "SLURM_JOB_ID" in environment
    return {
        name: value
        for name, value in environment.items()
        if name not in OVERRIDES
        and not (is_in_job and name.startswith(("SLURM_", "SLURMD_")) and name not in REACHES)
    }


def _dependency(extra: list[str]) -> tuple[list[str], str]:
    """Divide the user's options of sbatch into the others and the value of --dependency.

    Of several --dependency sbatch keeps the last one alone, so the user's are joined with the
    script's own, singleton.

    Raises UsageError if the user's are alternatives, which SLURM cannot join with another.
    """
    others, found = list[str](), list[str]()
    for option in extra:
        rest, values = list[str](), list[str]()
        with contextlib.suppress(ValueError):  # an open quote; sbatch says so itself
            rest = shlex.split(option, comments=True)
        words, rest = iter(rest), []
        for word in words:
            name, _, value = word.partition("=")
            if len(name) > 4 and "--dependency".startswith(name):
                values.append(value or next(words, ""))
            elif word.startswith("-d"):
                values.append(word[2:] or next(words, ""))
            else:
                rest.append(word)
        others += [option] if not values else [shlex.join(rest)] if rest else []
        found += [value for value in values if value != "singleton"]
    if any("?" in value for value in found):
        raise UsageError(
            "slurm.extra has a dependency that cannot be joined with --dependency=singleton",
            f"found: {','.join(found)}",
            "Separate the jobs by commas (all of them), not by question marks (any of them).",
        )
    return others, ",".join([*found, "singleton"])


def _array_items(words: list[str]) -> str:
    """Return the items of a Bash array: on one line if they are short, else one item per line."""
    items = [shlex.quote(word) for word in words]
    on_one_line = " ".join(items)
    if len(on_one_line) <= 88:
        return on_one_line
    return "\n" + "".join(f"    {item}\n" for item in items)


def _check_plain(job: Job) -> None:
    """Refuse a value with a control character, which could end a line early or hide text in it.

    Raises UsageError.
    """
    given: dict[str, object] = {f"slurm.{name}": value for name, value in vars(job.slurm).items()}
    given |= {"the job's name": job.job_name, "the path of the log": job.output} | {
        word.partition("=")[0][:40]: word for word in job.settings
    }
    given |= {
        "the working directory": job.directory,
        "the path of the code": job.code,
        "the path of Python": job.python,
    }
    for name, value in given.items():
        # slurm.setup is shell text and may have several lines.
        allowed = "\n\t" if name == "slurm.setup" else ""
        for text in value if isinstance(value, list) else [value]:
            if any(
                unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in allowed
                for c in str(text)
            ):
                raise UsageError(
                    f"{name} holds a control character",
                    f"found: {str(text)!r}",
                    "Take it out: a job script has no place for it.",
                )
