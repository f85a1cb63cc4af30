"""A small program with something of each kind of state, and what each release has left of it: runs
that every later release resumes.

`python tests/support/older_runs.py tests/releases/VERSION` writes those of the present code:
`stopped` and `bucket`, of runs that were stopped in their seventh step, and `killed`, of one that
was killed there, with the records of its steps. Write them once for a release.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from programs import HEAD, Lived, live
from s3_server import S3Server

RELEASES = Path(__file__).parents[1] / "releases"
RANKS, STEPS, LAST = 2, 20, 7  # LAST: the step in which it was stopped, or killed

SOURCE = """
run = init(remote=os.environ.get("REMOTE"), keep_last=1)
rank = int(os.environ.get("RANK", 0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 1)
        )
        self.warmth = 1.0
        self.register_buffer("mask", torch.ones(8), persistent=False)

    def forward(self, x):
        return self.layers(x * self.mask) * self.warmth


def seen():
    \"\"\"What this process begins with.\"\"\"
    inner = model.module
    kept = {
        "model": inner.state_dict(),
        "warmth": inner.warmth,
        "mask": inner.mask,
        "mode": inner.layers[1].training,
    }
    kept |= {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "average": average.state_dict(),
    }
    kept |= {
        "noise": noise.get_state(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }
    torch.save(
        kept | {"step": run.step - 1, "state": dict(run.state)},
        f"{os.path.basename(sys.argv[1])}.seen.{rank}.pt",
    )


torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(Net())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=40)
average = torch.optim.swa_utils.AveragedModel(model.module)
noise = torch.Generator().manual_seed(rank)
run.track(model=model, optimizer=optimizer, scheduler=scheduler, average=average, noise=noise)
run.state |= {"samples": [], "scale": np.float32(0.5)} if not run.state else {}
first = run.step + 1
numbers = torch.arange(160)
for x, y in run.batches(
    TensorDataset(numbers[:, None].expand(160, 8).contiguous() / 160, numbers), 16, epochs=2
):
    if run.step == first:
        seen()
    if run.step == 3:
        model.module.mask[0] = 0.0
        model.module.layers[1].eval()
    model.module.warmth *= 0.9
    run.state["samples"] += y.tolist()
    shift = torch.randn(1, generator=noise) + np.random.rand() + random.random()
    loss = (model(x) - y[:, None] / 160 * shift).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    average.update_parameters(model.module)
    run.log(loss=loss)
    if run.step == int(os.environ.get("STOP", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    die(run)
"""


def live_once(folder: Path, name: str, **variables: str) -> Lived:
    """Let the program live once, on the run `name` in the folder."""
    return live(folder, SOURCE, name, ranks=RANKS, env=variables, head=HEAD)


def main() -> None:
    release = Path(sys.argv[1])
    release.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder, place = Path(temporary), Path(temporary, "server")
        place.mkdir()
        server = S3Server(place).start()
        try:
            bucket = server.make_bucket("older")
            kept = live_once(
                folder, "kept", STOP=str(LAST), REMOTE=f"s3://{bucket}/run", **server.environment
            )
            stopped, killed = (
                live_once(folder, "stopped", STOP=str(LAST)),
                live_once(folder, "killed", DIE=str(LAST)),
            )
            assert kept.codes == stopped.codes == [0] * RANKS and killed.code < 0, (
                kept.text + stopped.text + killed.text
            )
            for entry in server.client().list_objects_v2(Bucket=bucket)["Contents"]:
                path = release / "bucket" / entry["Key"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    server.client().get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
                )
        finally:
            server.kill()
        for name in ("stopped", "killed"):
            shutil.copytree(folder / name, release / name)


if __name__ == "__main__":
    main()
