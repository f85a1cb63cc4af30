"""The job scripts in `slurm/` are what `harness submit` would write. Started as a program, this
file writes them anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.config.schema_services import SlurmSettings
from harness.supervision.job_script import Job, script

FOLDER = Path(__file__).resolve().parents[3] / "slurm"
PYTHON = '"$SLURM_SUBMIT_DIR/.venv/bin/python"'
DIGITS = ["--config", "configs/digits.yaml", "run.dir=runs/digits"]
SITE = [
    "# module load cuda",
    "# export AWS_ENDPOINT_URL=https://…      (keys: in ~/.aws/credentials, not here)",
]
SCRIPTS = {
    "train.sbatch": Job(
        SlurmSettings(nodes=1, procs_per_node=2, cpus_per_node=2, time="04:00:00", setup=SITE),
        "harness-digits",
        "slurm-%j.out",
        DIGITS,
        python=PYTHON,
    ),
    "one-node.sbatch": Job(
        SlurmSettings(
            nodes=1,
            gpus_per_node=8,
            cpus_per_node=64,
            time="1-00:00:00",
            partition="spot",
            setup=SITE,
        ),
        "harness-one",
        "slurm-%j.out",
        [
            "--config",
            "configs/bytes.yaml",
            "run.dir=runs/one",
            "train.global_batch_size=64",
            "train.precision=bf16",
        ],
        python=PYTHON,
    ),
    "multi-node.sbatch": Job(
        SlurmSettings(
            nodes=4,
            gpus_per_node=8,
            cpus_per_node=64,
            time="1-00:00:00",
            partition="spot",
            extra=["--exclusive"],
            setup=SITE,
        ),
        "harness-many",
        "slurm-%j.out",
        [
            *("--config", "configs/bytes.yaml", "run.dir=runs/many", "run.remote=s3://bucket/many"),
            *("train.global_batch_size=256", "train.precision=bf16"),
        ],
        python=PYTHON,
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_is_what_submit_would_write(name: str) -> None:
    assert (FOLDER / name).read_text() == script(SCRIPTS[name]), (
        "python tests/unit/supervision/test_slurm_files.py writes it anew"
    )
    shellcheck = [
        str(Path(sys.executable).with_name("shellcheck")),
        "--severity=warning",
        str(FOLDER / name),
    ]
    checked = subprocess.run(shellcheck, check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


if __name__ == "__main__":
    for name, job in SCRIPTS.items():
        (FOLDER / name).write_text(script(job))
        print(f"written: {FOLDER / name}", file=sys.stderr)
