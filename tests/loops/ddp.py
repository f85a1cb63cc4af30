"""The shape of PyTorch's tutorial on DistributedDataParallel, made fault tolerant:
torchrun --standalone --nproc-per-node=2 ddp.py"""

import os
import time

import torch
import torch.nn.functional as F
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

import harness


class MyTrainDataset(Dataset):
    def __init__(self, size):
        self.size = size
        self.data = [(torch.rand(20), torch.rand(1)) for _ in range(size)]

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        time.sleep(float(os.environ.get("SAMPLE_S", "0")))
        return self.data[index]


def ddp_setup():
    init_process_group(backend="gloo")


class Trainer:
    def __init__(self, model, train_data, optimizer, scheduler):
        self.rank = int(os.environ["RANK"])
        self.train_data = train_data
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.model = DDP(model)
        self.run = harness.init("runs/a", save_every_steps=3).track(
            model=self.model, optimizer=optimizer, scheduler=scheduler
        )

    def _run_batch(self, source, targets):
        self.optimizer.zero_grad()
        output = self.model(source)
        loss = F.mse_loss(output, targets)
        loss.backward()
        self.optimizer.step()
        return loss

    def _run_epoch(self, epoch):
        for source, targets in self.train_data:
            loss = self._run_batch(source, targets)
        self.scheduler.step()
        print(
            f"[rank {self.rank}] epoch {epoch} | loss {loss.item():.4f} | "
            f"lr {self.scheduler.get_last_lr()[0]:.4g}",
            flush=True,
        )

    def train(self, max_epochs):
        for epoch, self.train_data in self.run.by_epoch(
            self.run.batches(self.train_data, epochs=max_epochs)
        ):
            self._run_epoch(epoch)


def load_train_objs():
    torch.manual_seed(0)
    train_set = MyTrainDataset(256)
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Dropout(0.2), torch.nn.Linear(32, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    return train_set, model, optimizer, scheduler


def prepare_dataloader(dataset, batch_size):
    return DataLoader(
        dataset, batch_size=batch_size, shuffle=False, sampler=DistributedSampler(dataset)
    )


def main(total_epochs, batch_size):
    ddp_setup()
    dataset, model, optimizer, scheduler = load_train_objs()
    train_data = prepare_dataloader(dataset, batch_size)
    trainer = Trainer(model, train_data, optimizer, scheduler)
    trainer.train(total_epochs)
    destroy_process_group()


if __name__ == "__main__":
    main(total_epochs=6, batch_size=8)
