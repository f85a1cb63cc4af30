"""Threads of the run call no operator of torch first: a loader worker that is forked meanwhile
would wait for ever for the lock under which a first call registers its clean-up."""

from __future__ import annotations

import json
from pathlib import Path

import programs
import pytest

# The operators that each thread calls, in the order of their first calls.
PROGRAM = """
from torch.profiler import ProfilerActivity, profile
from torch._C._profiler import _ExperimentalConfig

width = WIDTH
model = nn.Sequential(
    nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, width), nn.Linear(width, 1)
)
optimizer = torch.optim.AdamW(model.parameters())
everything = _ExperimentalConfig(profile_all_threads=True)
with profile(activities=[ProfilerActivity.CPU], experimental_config=everything) as watched:
    run = init(remote="file://" + sys.argv[1] + "-remote")
    run.track(model=model, optimizer=optimizer)
    for x, y in run.batches(points(64), 8, epochs=1):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
first, threads = {}, set()
for event in sorted(watched.events(), key=lambda event: event.time_range.start):
    first.setdefault(event.name, event.thread)
    threads.add(event.thread)
trains = first["aten::linear"]
late = [name for name, thread in first.items() if thread != trains]
import json
print(json.dumps({"late": late, "threads": len(threads)}), file=open(sys.argv[1] + ".json", "w"))
"""


@pytest.mark.parametrize("width", [4, 1600])  # copied whole at the boundary; copied in background
def test_only_the_training_thread_calls_an_operator_first(tmp_path: Path, width: int):
    lived = programs.live(tmp_path, PROGRAM.replace("WIDTH", str(width)), "whole")
    assert lived.code == 0, lived.text
    seen = json.loads((tmp_path / "whole.json").read_text())
    assert seen["threads"] > 1, "no operator of another thread was seen"
    assert seen["late"] == []


PATCHED = """
class Fused(nn.LayerNorm):
    def __init__(self, size, eps=1e-5):  # takes no device
        super().__init__(size, eps)

BEFORE
model = nn.Linear(8, 1)
run = init()
run.track(model=model)
for x, y in run.batches(points(48), 8, epochs=1):
    pass
"""


@pytest.mark.parametrize(
    "before",
    [
        "nn.LayerNorm = Fused",
        "torch.nn.modules.normalization.LayerNorm = Fused",
        "import harness.saving.save_job as job; job.LayerNorm = Fused",
        "from torch.utils.serialization import config; config.load.mmap = True",
        "import harness.store.staging_buffer as s; s.free_memory_bytes = lambda: 1000",
    ],
)
def test_what_a_program_has_patched_does_not_end_it(tmp_path: Path, before: str):
    lived = programs.live(tmp_path, PATCHED.replace("BEFORE", before), "whole")
    assert lived.code == 0, lived.text
    assert "finished at step 6" in lived.text
