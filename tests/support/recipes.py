"""Files as other people's training scripts leave them: plain PyTorch, spelled as in its tutorials
and in the repositories that everybody copies from. Nothing here knows of the harness."""

from __future__ import annotations

import argparse
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

FEATURES, CLASSES, SIZE, BATCH, LR = 6, 4, 240, 24, 0.05
STEPS_PER_EPOCH = SIZE // BATCH


class Net(nn.Module):
    """A backbone with BatchNorm, whose buffers belong to the state too, and a head, as in
    everything that is fine-tuned."""

    def __init__(self, width: int = 16, classes: int = CLASSES) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Linear(FEATURES, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x))


def points(size: int = SIZE, classes: int = CLASSES) -> torch.utils.data.TensorDataset:
    """Points and the class that each is of; always the same."""
    x = torch.randn(size, FEATURES, generator=torch.Generator().manual_seed(size))
    return torch.utils.data.TensorDataset(x, (x.sum(1) * 2).long().remainder(classes))


def make_optimizer(kind: str, parameters: Any, lr: float = LR) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
    return torch.optim.AdamW(parameters, lr=lr / 10)


def make_scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Stepped once an update; its state is plain numbers."""
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.9)


@dataclass
class Trained:
    """What a script holds when it saves, after `epoch` epochs."""

    model: Net
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    epoch: int
    loss: torch.Tensor

    @property
    def step(self) -> int:
        return self.epoch * STEPS_PER_EPOCH


def trained(
    optimizer: str = "sgd", epochs: int = 2, width: int = 16, classes: int = CLASSES, seed: int = 7
) -> Trained:
    """The loop of the tutorial."""
    torch.manual_seed(seed)
    model = Net(width, classes)
    chosen = make_optimizer(optimizer, model.parameters())
    scheduler = make_scheduler(chosen)
    loader = torch.utils.data.DataLoader(points(classes=classes), batch_size=BATCH, shuffle=True)
    for _ in range(epochs):
        for x, y in loader:
            chosen.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            chosen.step()
            scheduler.step()
    return Trained(model, chosen, scheduler, epochs, loss)


Save = Callable[..., None]


@dataclass(frozen=True)
class Recipe:
    """How a script writes its file, and under which key (a path of keys, with dots) what lies in
    there; None: not in there."""

    file: str
    write: Callable[[Trained, Path, Save], None]
    model: str = ""  # "": the file is the state dict itself
    optimizer: str | None = None
    scheduler: str | None = None
    epoch: bool = False
    step: bool = False
    loss: bool = False
    prefix: str = ""
    has_old_format: bool = True
    in_any_prefix: bool = False  # the prefix is the script's own, not one of PyTorch's


def tutorial_weights(done: Trained, path: Path, save: Save) -> None:
    save(done.model.state_dict(), path)


def tutorial_general_checkpoint(done: Trained, path: Path, save: Save) -> None:
    save(
        {
            "epoch": done.epoch,
            "model_state_dict": done.model.state_dict(),
            "optimizer_state_dict": done.optimizer.state_dict(),
            "loss": done.loss.item(),
        },
        path,
    )


def tutorial_with_the_loss_itself(done: Trained, path: Path, save: Save) -> None:
    """`'loss': loss`, as it stands in the tutorial: a tensor that has a gradient function."""
    save(
        {
            "epoch": done.epoch,
            "model_state_dict": done.model.state_dict(),
            "optimizer_state_dict": done.optimizer.state_dict(),
            "loss": done.loss,
        },
        path,
    )


def tutorial_data_parallel(done: Trained, path: Path, save: Save) -> None:
    model = nn.DataParallel(done.model)
    save(model.module.state_dict(), path)


def forgotten_data_parallel(done: Trained, path: Path, save: Save) -> None:
    model = nn.DataParallel(done.model)
    save(model.state_dict(), path)


def pytorch_cifar(done: Trained, path: Path, save: Save) -> None:
    net = nn.DataParallel(done.model)
    state = {
        "net": net.state_dict(),
        "acc": 87.5,
        "epoch": done.epoch,
    }
    save(state, path)


def imagenet_example(done: Trained, path: Path, save: Save) -> None:
    model, epoch = nn.DataParallel(done.model), done.epoch - 1
    save(
        {
            "epoch": epoch + 1,
            "arch": "resnet18",
            "state_dict": model.state_dict(),
            "best_acc1": torch.tensor(71.25),
            "optimizer": done.optimizer.state_dict(),
            "scheduler": done.scheduler.state_dict(),
        },
        path,
    )


def cs230(done: Trained, path: Path, save: Save) -> None:
    epoch = done.epoch - 1
    save(
        {
            "epoch": epoch + 1,
            "state_dict": done.model.state_dict(),
            "optim_dict": done.optimizer.state_dict(),
        },
        path,
    )


def model_and_optim_state(done: Trained, path: Path, save: Save) -> None:
    save({"model_state": done.model.state_dict(), "optim_state": done.optimizer.state_dict()}, path)


def torchvision_references(done: Trained, path: Path, save: Save) -> None:
    """Its train.py keeps the command line's arguments too; `vars`, so that the safe loader takes
    them."""
    checkpoint = {
        "model": done.model.state_dict(),
        "optimizer": done.optimizer.state_dict(),
        "lr_scheduler": done.scheduler.state_dict(),
        "epoch": done.epoch,
        "args": vars(argparse.Namespace(lr=LR, data_path="/datasets/points", amp=False)),
    }
    save(checkpoint, path)


def _compiled(module: nn.Module) -> nn.Module:
    """Of a module `torch.compile` makes a module, although it says: a function."""
    return cast("nn.Module", torch.compile(module))


def by_step(done: Trained, path: Path, save: Save) -> None:
    """nanoGPT's ckpt.pt: no epochs, but iterations; a compiled model."""
    model = _compiled(done.model)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": done.optimizer.state_dict(),
        "model_args": {"n_layer": 2, "bias": False},
        "iter_num": done.step,
        "best_val_loss": torch.tensor(1.5),
        "config": {"batch_size": BATCH, "dtype": "float32"},
    }
    save(checkpoint, path)


def _lightning(done: Trained, hyper_parameters: Any) -> dict[str, Any]:
    return {
        "epoch": done.epoch,
        "global_step": done.step,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": {f"model.{key}": value for key, value in done.model.state_dict().items()},
        "loops": {
            "fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"completed": done.epoch}}}
        },
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {
                "best_model_path": "",
                "kth_value": torch.tensor(0.5),
            }
        },
        "optimizer_states": [done.optimizer.state_dict()],
        "lr_schedulers": [done.scheduler.state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper_parameters,
    }


def lightning(done: Trained, path: Path, save: Save) -> None:
    save(_lightning(done, {"lr": LR, "width": 16}), path)


def lightning_with_namespace(done: Trained, path: Path, save: Save) -> None:
    """`self.save_hyperparameters(args)` with what argparse gave: the safe loader refuses the whole
    file for it."""
    save(_lightning(done, argparse.Namespace(lr=LR, width=16)), path)


def hugging_face_bin(done: Trained, path: Path, save: Save) -> None:
    save({key: value.clone() for key, value in done.model.state_dict().items()}, path)


def hugging_face_safetensors(done: Trained, path: Path, save: Save) -> None:
    safetensors.torch.save_file(done.model.state_dict(), path, metadata={"format": "pt"})


def plain_safetensors(done: Trained, path: Path, save: Save) -> None:
    safetensors.torch.save_model(nn.DataParallel(done.model), str(path))


def compiled(done: Trained, path: Path, save: Save) -> None:
    save(_compiled(done.model).state_dict(), path)


def compiled_then_parallel(done: Trained, path: Path, save: Save) -> None:
    save(nn.DataParallel(_compiled(done.model)).state_dict(), path)


def parallel_then_compiled(done: Trained, path: Path, save: Save) -> None:
    save(_compiled(nn.DataParallel(done.model)).state_dict(), path)


def torch_script(done: Trained, path: Path, save: Save) -> None:
    torch.jit.script(done.model).save(str(path))


GENERAL: dict[str, Any] = {"optimizer": "optimizer_state_dict", "epoch": True, "loss": True}

RECIPES = {
    "tutorial weights": Recipe("model_weights.pth", tutorial_weights),
    "tutorial general checkpoint": Recipe(
        "checkpoint.tar", tutorial_general_checkpoint, "model_state_dict", **GENERAL
    ),
    "tutorial with the loss itself": Recipe(
        "model.pt", tutorial_with_the_loss_itself, "model_state_dict", **GENERAL
    ),
    "tutorial data parallel": Recipe("model.pth", tutorial_data_parallel),
    "forgotten data parallel": Recipe("model.pth", forgotten_data_parallel, prefix="module."),
    "pytorch-cifar t7": Recipe("ckpt.t7", pytorch_cifar, "net", epoch=True, prefix="module."),
    "pytorch-cifar": Recipe("ckpt.pth", pytorch_cifar, "net", epoch=True, prefix="module."),
    "imagenet": Recipe(
        "model_best.pth.tar",
        imagenet_example,
        "state_dict",
        "optimizer",
        "scheduler",
        epoch=True,
        prefix="module.",
    ),
    "cs230": Recipe("last.pth.tar", cs230, "state_dict", "optim_dict", epoch=True),
    "model_state and optim_state": Recipe(
        "checkpoint", model_and_optim_state, "model_state", "optim_state"
    ),
    "torchvision": Recipe(
        "model_2.pth", torchvision_references, "model", "optimizer", "lr_scheduler", epoch=True
    ),
    "nanogpt": Recipe("ckpt.pt", by_step, "model", "optimizer", step=True, prefix="_orig_mod."),
    "lightning": Recipe(
        "epoch=2-step=20.ckpt",
        lightning,
        "state_dict",
        "optimizer_states.0",
        "lr_schedulers.0",
        epoch=True,
        step=True,
        prefix="model.",
        in_any_prefix=True,
    ),
    "hugging face bin": Recipe("pytorch_model.bin", hugging_face_bin),
    "hugging face safetensors": Recipe(
        "model.safetensors", hugging_face_safetensors, has_old_format=False
    ),
    "safetensors of data parallel": Recipe(
        "model.safetensors", plain_safetensors, prefix="module.", has_old_format=False
    ),
    "compiled": Recipe("model.pt", compiled, prefix="_orig_mod."),
    "compiled, then parallel": Recipe(
        "model.pt", compiled_then_parallel, prefix="module._orig_mod."
    ),
    "parallel, then compiled": Recipe(
        "model.pt", parallel_then_compiled, prefix="_orig_mod.module."
    ),
    "torchscript": Recipe("model_scripted.pt", torch_script, has_old_format=False),
}


def save_new(value: Any, path: Path) -> None:
    torch.save(value, path)


def save_old(value: Any, path: Path) -> None:
    """As PyTorch before 1.6 did."""
    torch.save(value, path, _use_new_zipfile_serialization=False)


SAVES: dict[str, Save] = {"zip": save_new, "old": save_old}


def made(name: str, folder: Path, done: Trained, save: Save = save_new) -> Path:
    """The file of a recipe."""
    path = folder / RECIPES[name].file
    RECIPES[name].write(done, path, save)
    return path


# Two modules with an optimizer each.


@dataclass
class TrainedPair:
    """A generator and a discriminator, or what else comes in twos."""

    first: nn.Module
    second: nn.Module
    first_optimizer: torch.optim.Optimizer
    second_optimizer: torch.optim.Optimizer
    epoch: int


def pair_modules(width: int = 8) -> tuple[nn.Module, nn.Module]:
    """They differ in shape, so that one cannot be taken for the other."""
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, FEATURES)), nn.Sequential(
        nn.Linear(FEATURES, width), nn.LeakyReLU(), nn.Linear(width, 1)
    )


def trained_pair(epochs: int = 1, seed: int = 3) -> TrainedPair:
    torch.manual_seed(seed)
    first, second = pair_modules()
    optimizers = [
        torch.optim.Adam(module.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for module in (first, second)
    ]
    for _ in range(epochs * STEPS_PER_EPOCH):
        for module, optimizer in zip((first, second), optimizers, strict=True):
            optimizer.zero_grad()
            module(torch.randn(BATCH, 3 if module is first else FEATURES)).pow(2).mean().backward()
            optimizer.step()
    return TrainedPair(first, second, optimizers[0], optimizers[1], epochs)


def tutorial_several_models(done: TrainedPair, path: Path, save: Save = save_new) -> None:
    save(
        {
            "modelA_state_dict": done.first.state_dict(),
            "modelB_state_dict": done.second.state_dict(),
            "optimizerA_state_dict": done.first_optimizer.state_dict(),
            "optimizerB_state_dict": done.second_optimizer.state_dict(),
        },
        path,
    )


def gan(done: TrainedPair, path: Path, save: Save = save_new) -> None:
    save(
        {
            "netG": done.first.state_dict(),
            "netD": done.second.state_dict(),
            "optG": done.first_optimizer.state_dict(),
            "optD": done.second_optimizer.state_dict(),
            "epoch": done.epoch,
        },
        path,
    )


# Files that need more than tensors and numbers, and files that nobody should load.


def entire_model(done: Trained, path: Path, save: Save = save_new) -> None:
    save(done.model, path)


def parameters_without_names(done: Trained, path: Path, save: Save = save_new) -> None:
    save(list(done.model.parameters()), path)


class MakesFolder:
    """Whoever unpickles it makes a folder; it stands for everything worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def trap(done: Trained, path: Path, folder: Path, save: Save = save_new) -> None:
    """A general checkpoint with something in it that acts when it is loaded."""
    save(
        {
            "model_state_dict": done.model.state_dict(),
            "epoch": done.epoch,
            "extra": MakesFolder(folder),
        },
        path,
    )


class Scripted(nn.Module):
    """TorchScript has a `__setstate__` too, which is called when the file is loaded, and an
    operation that makes files."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.path, self.made = path, torch.zeros(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, str, bool]:
        return self.weight, self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, str, bool]) -> None:
        self.weight = state[0]  # type: ignore[assignment]
        self.path, self.training = state[1], state[2]
        self.made = torch.from_file(self.path, True, 10)


def torch_script_trap(path: Path, file: Path) -> None:
    torch.jit.script(Scripted(str(file))).save(str(path))


def call_pickle(
    path: Path, module: str, name: str, arguments: tuple[Any, ...], protocol: int = 2
) -> None:
    """A file of torch's, by hand, whose pickle calls a function with arguments; the result lies
    beside a tensor's name."""
    made = pickle.dumps(arguments, 2)[2:-1]
    function = (
        f"c{module}\n{name}\n".encode() if protocol < 4 else _text(module) + _text(name) + b"\x93"
    )
    called = (
        b"\x80"
        + bytes([protocol])
        + b"}"
        + _text("model")
        + b"}"
        + _text("weight")
        + function
        + made
        + b"Rss."
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", called)
        archive.writestr("archive/version", "3\n")


def _text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word.encode())) + word.encode()


def bare_pickle(done: Trained, path: Path) -> None:
    """`pickle.dump`, without torch.save."""
    path.write_bytes(
        pickle.dumps(
            {"state_dict": {key: value.numpy() for key, value in done.model.state_dict().items()}}
        )
    )


def real_tar(done: Trained, path: Path) -> None:
    """What `.tar` would mean if it meant it."""
    inner = path.with_suffix(".inner")
    torch.save(done.model.state_dict(), inner)
    with tarfile.open(path, "w") as archive:
        archive.add(inner, "model.pth")
    inner.unlink()


def repacked(
    source: Path, path: Path, change: Callable[[str, bytes], bytes], deflated: bool = False
) -> None:
    """A zip file with every record passed through `change`."""
    kind = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", kind) as new:
        for record in old.infolist():
            new.writestr(
                zipfile.ZipInfo(record.filename), change(record.filename, old.read(record)), kind
            )


def as_saved_on_gpu(source: Path, path: Path) -> None:
    """The same file, but saying of its tensors that they were on a GPU; PyTorch writes nothing else
    that differs."""

    def moved(pickled: bytes) -> bytes:
        text = b"X\x03\x00\x00\x00cpu"
        assert text in pickled
        return pickled.replace(text, b"X\x06\x00\x00\x00cuda:0")

    if zipfile.is_zipfile(source):
        repacked(
            source, path, lambda name, data: moved(data) if name.endswith("/data.pkl") else data
        )
    else:
        path.write_bytes(moved(source.read_bytes()))


def bomb_in_pickle(path: Path, size_bytes: int) -> None:
    """A zip file like torch's, whose data.pkl is a small part of its real size."""
    _bomb(path, {"archive/version": b"3\n"}, "archive/data.pkl", size_bytes)


def bomb_in_storage(source: Path, path: Path, size_bytes: int) -> None:
    """A file of torch's in which one tensor's bytes are packed, and far more than the tensor has
    use for."""
    with zipfile.ZipFile(source) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    name = next(name for name in records if name.endswith("/data/0"))
    del records[name]
    _bomb(path, records, name, size_bytes)


def _bomb(path: Path, records: dict[str, bytes], name: str, size_bytes: int) -> None:
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for other, data in records.items():
            archive.writestr(other, data)
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(info, "w") as packed:
            for _ in range(size_bytes >> 20):
                packed.write(zeros)


def honest_but_packed(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """A file of torch's that somebody has zipped again: every record deflated, nothing wrong with
    it."""
    plain = path.with_suffix(".stored")
    torch.save(tensors, plain)
    repacked(plain, path, lambda name, data: data, deflated=True)
    plain.unlink()


def with_claim(source: Path, path: Path, numel: int) -> None:
    """The same file, but its storages claim to hold so many numbers; where the old format repeats
    that before the data, there too."""

    def claimed(pickled: bytes, real: int) -> bytes:
        short = (
            b"K" + bytes([real])
            if real < 256
            else b"M" + struct.pack("<H", real)
            if real < 65536
            else b"J" + struct.pack("<i", real)
        )
        # a number that ends a storage's description, and sizes alike
        pattern = re.compile(re.escape(short) + rb"(?=[tNq])")
        changed, count = pattern.subn(b"\x8a\x08" + struct.pack("<q", numel), pickled)
        assert count, "no claim found"
        return changed

    if zipfile.is_zipfile(source):
        largest = torch.load(source, weights_only=True)
        real = max(tensor.numel() for tensor in largest.values())
        repacked(
            source,
            path,
            lambda name, data: claimed(data, real) if name.endswith("/data.pkl") else data,
        )
    else:
        tensors = torch.load(source, weights_only=True)
        path.write_bytes(
            claimed(source.read_bytes(), max(tensor.numel() for tensor in tensors.values()))
        )


def with_old_count(source: Path, path: Path, numel: int) -> None:
    """An old-format file of one tensor, whose data is preceded by a count of numbers that is not
    true."""
    tensor = next(iter(torch.load(source, weights_only=True).values()))
    data, count = source.read_bytes(), struct.pack("<q", tensor.numel())
    where = len(data) - tensor.numel() * tensor.element_size() - 8
    assert data[where : where + 8] == count
    path.write_bytes(data[:where] + struct.pack("<q", numel) + data[where + 8 :])


def safetensors_with(
    path: Path, header: bytes, data: bytes = b"", length: int | None = None
) -> None:
    """By hand: the length of the header, the header, the data."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def web_page(path: Path) -> None:
    path.write_text(
        "<!DOCTYPE html>\n<html><head><title>Not Found</title></head>"
        "<body><p>Sign in to download.</p></body></html>\n"
    )


def lfs_pointer(path: Path) -> None:
    """What `git clone` leaves where git-lfs is not installed."""
    path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:"
        + "4d7a" * 16
        + "\nsize 438007537\n"
    )


def peak_memory_bytes() -> int:
    """The most that this process has had in memory since `forget_peak_memory`."""
    return (
        int(
            re.search(  # type: ignore[index]
                r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()
            )[1]
        )
        << 10
    )


def forget_peak_memory() -> None:
    Path("/proc/self/clear_refs").write_text("5")
