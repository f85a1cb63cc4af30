"""A small program with something of each kind of state, and what each release has left of it: runs
that every later release resumes.

`python tests/support/older_runs.py tests/releases/VERSION` writes those of the present code:
`stopped` and `bucket`, of runs that were stopped in their seventh step, `killed`, of one that was
killed there, with the records of its steps, and `sharded`, of one of a sharded model that was
stopped there. Write them once for a release.
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


# Each rank has for itself: generators, running means, a value of the model and one of the run.
SHARDED = """
from torch.distributed.fsdp import fully_shard
from programs import whole_digest

run = init(keep_last=1)
rank = int(os.environ.get("RANK", 0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(8, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.Linear(5, 1)
        )
        self.warmth = 1.0

    def forward(self, x):
        return self.layers(x) * self.warmth


def seen():
    return {
        "step": run.step - 1,
        "whole": whole_digest(
            {key: of for key, of in model.state_dict().items() if "running" not in key},
            optimizer.state_dict()["state"],
        ),
        "means": model.layers[1].running_mean.clone(),
        "warmth": model.warmth,
        "noise": noise.get_state(),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1],
        "python": random.getstate()[1],
        "state": dict(run.state),
    }


torch.manual_seed(0)
model = Net()
fully_shard(model.layers[0])
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
noise = torch.Generator().manual_seed(rank)
run.track(model=model, optimizer=optimizer, noise=noise)
run.state.setdefault("samples", [])
first = run.step + 1
numbers = torch.arange(96)
for x, y in run.batches(
    TensorDataset(numbers[:, None].expand(96, 8).contiguous() / 96, numbers), 12, epochs=2
):
    if run.step == first:
        torch.save(seen(), f"{os.path.basename(sys.argv[1])}.seen.{rank}.pt")
    model.warmth *= 0.9 + 0.01 * rank
    run.state["samples"] += y.tolist()
    shift = torch.randn(1, generator=noise) + np.random.rand() + random.random()
    loss = (model(x) - y[:, None] / 96 * shift).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)
    if run.step == int(os.environ.get("STOP", 0)):
        os.kill(os.getpid(), signal.SIGTERM)
    die(run)
torch.save(seen(), f"{os.path.basename(sys.argv[1])}.last.{rank}.pt")
"""


def live_once(
    folder: Path, name: str, source: str = SOURCE, ranks: int = RANKS, /, **variables: str
) -> Lived:
    """Let the program live once, on the run `name` in the folder."""
    return live(folder, source, name, ranks=ranks, env=variables, head=HEAD)


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
            sharded = live_once(folder, "sharded", SHARDED, STOP=str(LAST))
            for lived in (kept, stopped, sharded):
                assert lived.codes == [0] * RANKS, lived.text
            assert killed.code < 0, killed.text
            for entry in server.client().list_objects_v2(Bucket=bucket)["Contents"]:
                path = release / "bucket" / entry["Key"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    server.client().get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
                )
        finally:
            server.kill()
        for name in ("stopped", "killed", "sharded"):
            shutil.copytree(folder / name, release / name)


if __name__ == "__main__":
    main()
