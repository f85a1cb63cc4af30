"""A loop over an iterable dataset that knows where it stands, on several ranks, made fault
tolerant."""

import os
import random
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, IterableDataset

import harness


class Records(IterableDataset):
    """Every world_size-th record of a long file, shuffled in a buffer."""

    def __init__(self, size, rank, world_size, buffer_size=16):
        self.size, self.rank, self.world_size, self.buffer_size = (
            size,
            rank,
            world_size,
            buffer_size,
        )
        self.at, self.buffer = rank, []

    def __iter__(self):
        while self.at < self.size or self.buffer:
            while self.at < self.size and len(self.buffer) < self.buffer_size:
                self.buffer.append(self.at)
                self.at += self.world_size
            record = self.buffer.pop(random.randrange(len(self.buffer)))
            time.sleep(float(os.environ.get("SAMPLE_S", "0")))
            generator = torch.Generator().manual_seed(record)
            yield torch.randn(12, generator=generator), torch.randn(1, generator=generator)
        self.at, self.buffer = self.rank, []

    def state_dict(self):
        return {"at": self.at, "buffer": list(self.buffer)}

    def load_state_dict(self, state):
        self.at, self.buffer = state["at"], list(state["buffer"])


run = harness.init("runs/a", save_every_steps=3)
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)
random.seed(rank)
model = DDP(nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Dropout(0.1), nn.Linear(24, 1)))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = DataLoader(Records(200, rank, world_size), batch_size=4, drop_last=True)
run.track(model=model, optimizer=optimizer)
for epoch, loader in run.by_epoch(run.batches(loader, epochs=3)):
    for x, y in loader:
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"[rank {rank}] epoch {epoch}: loss {loss.item():.4f}", flush=True)
dist.destroy_process_group()
