"""A program with a default device of its own: what the harness makes for itself is on the CPU."""

from __future__ import annotations

import pytest
from programs import STEP, killed_once

PROGRAM = (
    """
data = points()
sampler = torch.utils.data.WeightedRandomSampler(
    torch.ones(160, device="cpu"), 160, generator=torch.Generator("cpu").manual_seed(3)
)
torch.set_default_device("meta")  # what is made on it raises an error as soon as it is read


class Drawn(Dataset):  # its samples are no rows of a tensor
    rng = random.Random(2)
    def __len__(self):
        return 160
    def __getitem__(self, at):
        x, y = data[at]
        return x + self.rng.random(), y


run = init()
model = nn.Linear(8, 1, device="cpu")
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
own = random.Random(4)
run.track(model=model, optimizer=optimizer, own=own)
for x, y in run.batches({source}, epochs=2):
    own.random()"""
    + STEP
)
SOURCES = {
    "workers and a sampler": "DataLoader(Drawn(), 16, sampler=sampler, num_workers=1)",
    "two ranks": "Drawn(), 16",
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_default_device_is_the_program_s_own_affair(source, tmp_path):
    outcome = killed_once(
        tmp_path,
        PROGRAM.replace("{source}", SOURCES[source]),
        ranks=2 if source == "two ranks" else 1,
    )
    assert "resumes from step 6" in outcome.resumed.text, outcome.whole.text
    assert outcome.is_equal, outcome.rows
