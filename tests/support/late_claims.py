"""A program whose claim comes late."""

from __future__ import annotations

LATE = """
run = init(keep_last=1, keep_best=0)
looked, late = sys.argv[1] + ".looked", "LATE" in os.environ


def wait(is_there):
    until = time.monotonic() + 60
    while not is_there() and time.monotonic() < until:
        time.sleep(0.02)


def newest():
    return max(name for name in os.listdir(sys.argv[1] + "/checkpoints") if name.endswith(".json"))


if late and not os.path.exists(looked):
    seen = newest()
    open(looked, "w").close()
    wait(lambda: newest() > seen)
torch.manual_seed(0)
model = nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.track(model=model, optimizer=optimizer)
for x, y in run.batches(points(), 16, epochs=8):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    if run.step == 31 and not late:
        wait(lambda: os.path.exists(looked))
    if run.step == 37 and not late:
        wait(lambda: os.path.exists(sys.argv[1] + "/attempts/0002.json"))
"""
