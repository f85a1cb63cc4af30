"""Generate the job script of `harness submit` as text.

The folder `slurm/` of the repository holds the scripts that this module generates for three sets of
values. Users may read, copy and edit them.
"""

from __future__ import annotations

import shlex
import unicodedata
from dataclasses import dataclass

from harness.config.schema_services import SlurmSettings
from harness.errors import UsageError

# A shell line of more than 100 characters is split over two of the adjacent literals.
TEMPLATE = (
    r"""#!/bin/bash
{options}
#SBATCH --ntasks-per-node=1         # one launcher a node; it starts the training processes
#SBATCH --requeue                   """
    r"""# preempted, or a node lost: SLURM starts this job again by itself
#SBATCH --open-mode=append          # all lives of the job write one log
#SBATCH --dependency=singleton      """
    r"""# of all jobs with this name, one at a time: two would take a run from each other
#
# Trains one run to its end, over as many lives of this job as that takes. Submit once.
#
#   preempted, asked to stop      all ranks finish the same step, save, and leave; the job is """
    r"""queued again and resumes from that step
#   near its time limit           the same, by itself, run.margin_s seconds before; no --signal """
    r"""is needed
#   a crash, a lost node          the job is queued again and resumes from the newest checkpoint
#   {most} crashes in a row            without a new checkpoint between them: the job fails, and """
    r"""the last lines of its log say of what
#   finished                      the job ends, and is not queued again; so do `scancel` and """
    r"""`harness stop RUN`

# What is trained.
cd {directory} || exit 78
code={code}
settings=({settings})

# What the site needs.
{setup}
harness=({python} "$code/harness/__main__.py")

export HARNESS_CODE=$code                                            """
    r"""# the task is imported from there too
id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}   """
    r"""# of a job array: this task alone
id=${{id:-$SLURM_JOB_ID}}
export TORCH_CPP_LOG_LEVEL=${{TORCH_CPP_LOG_LEVEL:-ERROR}}                """
    r"""# or who leaves last complains at length that the others are gone
export HARNESS_LAUNCH=$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}        # this life of the job
end=$(timeout 30 squeue -h -j "$id" -o %e)                            """
    r"""# SLURM says it by itself from 23.02 on
if [[ $end = 20* ]]; then SLURM_JOB_END_TIME=$(date -d "$end" +%s); export SLURM_JOB_END_TIME; fi
[ -z "${{SLURM_CPUS_PER_TASK:-}}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   """
    r"""# srun does not inherit it
port=$((20000 + (7 * SLURM_JOB_ID + ${{SLURM_RESTART_COUNT:-0}}) % 10000))   """
    r"""# another one for each job on a node, and for each life

# Queues this job again, and ends it at once by that. Only if it is still running, and this life """
    r"""of it: on a job that somebody has
# cancelled it would work too, and bring it back; what SLURM itself is queueing again, or has """
    r"""started elsewhere, needs no help.
requeue() {{
    local pause state
    for pause in 0 5 15 30 60 60; do
        sleep $pause
        state=$(timeout 60 scontrol show job -o "$id") || continue
        [[ $state == *" Restarts=${{SLURM_RESTART_COUNT:-0}} "* ]] || exit $answer
        case $state in
            *" JobState=RUNNING "* | *" JobState=COMPLETING Reason=TimeLimit "*) """
    r"""timeout 60 scontrol requeue "$id" && exit 0 ;;
            *) exit $answer ;;
        esac
    done
    # Where a job may not queue itself again (or has no scontrol), submit this script several """
    r"""times: thanks to --dependency=singleton
    # they run one after another, each resumes from where the last one stopped, and those that """
    r"""find the run finished end at once.
    echo "harness: this job cannot be queued again; submit it again to go on" >&2
    exit $answer
}}

# A store that does not answer cannot count this failure either, so it is counted here.
unreachable() {{
    echo >>"$code/.unreachable-$SLURM_JOB_ID"
    [ "$(wc -l <"$code/.unreachable-$SLURM_JOB_ID")" -ge {most} ] || requeue
    exit 74
}}

# Is there anything to do? 75: yes. The run may be finished, or in a crash loop; or this disk is """
    r"""not the one that the run lives on.
"${{harness[@]}}" supervise before{submitted} "${{settings[@]}}"
answer=$?
[ $answer -ne 74 ] || unreachable
[ $answer -eq 75 ] || exit $answer
rm -f "$code/.unreachable-$SLURM_JOB_ID"

# SLURM signals the steps when it preempts, and this shell only when it ends the job: then there """
    r"""is little time, and nothing to do but
# to wait for the ranks. A trap may not do more than to set a variable. Never signal srun: it """
    r"""would kill the ranks at once.
stopped=
trap 'stopped=--stopped' TERM INT USR1 USR2

srun --kill-on-bad-exit=1 --cpu-bind=none "${{harness[@]}}" launch --nnodes="$SLURM_NNODES" """
    r"""--nproc-per-node={procs} \
    --rdzv-backend=c10d --rdzv-endpoint="$(hostname):$port" """
    r"""--rdzv-id="$HARNESS_LAUNCH" "${{settings[@]}}" &
step=$!
while :; do
    wait $step
    code=$?
    [ $code -gt 128 ] && kill -0 $step 2>/dev/null || break          # a trap ends `wait`, not srun
done

# How did it end? The run's own records tell; exit codes do not. A preemption that has begun is """
    r"""no failure, whatever it broke; to be
# overtaken by the time limit is one, as long as there is no new checkpoint.
job=$(timeout 60 scontrol show job -o "$id")
[[ $job == *" PreemptTime=2"* ]] && stopped=--stopped
[[ $job == *" Reason=TimeLimit "* ]] && stopped=
"${{harness[@]}}" supervise after --code $code $stopped "${{settings[@]}}"
answer=$?
[ $answer -ne 74 ] || unreachable
[ $answer -eq 75 ] || exit $answer
requeue         # the last thing done
"""
)


DRILL = (
    r"""#!/bin/bash
{options}
#SBATCH --ntasks=1
#
# Drills a program: it is trained undisturbed, then with faults, and both are compared. Nothing """
    r"""of it goes to the run itself. One job,
# one node; it is not queued again. The verdict stands at the end of this job's log, and its """
    r"""exit code is the drill's.

cd {directory} || exit 78
code={code}
settings=({settings})

# What the site needs.
{setup}

export HARNESS_CODE=$code                                            """
    r"""# the task is imported from there too
exec {python} "$code/harness/__main__.py" drill --nproc-per-node={procs} {drill} "${{settings[@]}}"
"""
)


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
    return (TEMPLATE if job.drill is None else DRILL).format(
        options="\n".join(lines + [f"#SBATCH {option}" for option in slurm.extra]),
        most=job.most_failures,
        directory=job.directory,
        code=job.code,
        settings=" ".join(shlex.quote(word) for word in job.settings),
        setup="\n".join(slurm.setup),
        python=prefix + job.python,
        submitted=" --submitted" if job.is_submitted else "",
        procs=procs_per_node(slurm),
        drill=shlex.join(job.drill or ()),
    )


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
