"""Two networks that train each other: a GAN that draws handwritten digits, the 8x8 images that come with scikit-learn.

It makes its steps itself, so the harness's own way of making one does not apply: `train.clip_norm` and `train.nonfinite` are not
looked at, and `train.precision` only by evaluations. `train.ema_decay` and `train.compile` work.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.data import Dataset

from harness.errors import UsageError
from harness.task import Task
from harness.tasks.digits import load_split

NOISE = 32  # what a sample is made of: so many standard normal numbers
SAMPLES = 512  # that an evaluation draws
GRID, GAP, SCALE = 8, 1, 6  # a picture: 8x8 samples with a margin of one pixel, each pixel as a square of 6x6


class Images(Dataset[torch.Tensor]):
    """Images (1, 8, 8) from -1 to 1, as they are."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def generator(width: int) -> nn.Module:
    """From (N, 32) noise to (N, 1, 8, 8) images."""
    return nn.Sequential(
        nn.Linear(NOISE, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(),
        nn.Linear(width, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip


def discriminator(width: int) -> nn.Module:
    """From (N, 1, 8, 8) images to (N, 1) logits: how real they look.

    Spectral norms keep it from winning, and so the generator from drawing one digit only. Nothing in it mixes samples: real
    and drawn ones go in together.
    """
    return nn.Sequential(
        nn.Flatten(), spectral_norm(nn.Linear(64, width)), nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(width, width)), nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(width, 1)),
    )  # fmt: skip


def step(run: Any, batch: torch.Tensor, picture_every_steps: int | None) -> dict[str, torch.Tensor]:
    """One update of the discriminator, then one of the generator, on images (N, 1, 8, 8); returns the losses.

    Each wrapped module has one forward and one backward pass a step, which is what DistributedDataParallel counts on: the
    generator learns through the plain discriminator, whose own gradients are switched off meanwhile.
    """
    if not isinstance(batch, torch.Tensor):
        raise UsageError("this task takes each batch whole", f"found: {len(batch)} micro-batches", "Leave out train.micro_batch_size.")
    draw, judge, weight = run.tracked["generator"], run.tracked["discriminator"], run.weights[0]
    drawn = draw(torch.randn(len(batch), NOISE, device=batch.device))

    real_logits, drawn_logits = judge(torch.cat([batch, drawn.detach()])).chunk(2)
    judge_loss = F.softplus(-real_logits).mean() + F.softplus(drawn_logits).mean()
    _update(run.tracked["discriminator_optimizer"], judge_loss * weight)

    bare = plain(judge).requires_grad_(False)
    draw_loss = F.softplus(-bare(drawn)).mean()
    _update(run.tracked["generator_optimizer"], draw_loss * weight)
    bare.requires_grad_(True)

    if run.due(picture_every_steps) and run.is_writer:
        run.keep(f"samples/step_{run.step:08d}.png", picture(plain(draw)))
    return {"loss": judge_loss + draw_loss, "discriminator_loss": judge_loss, "generator_loss": draw_loss}


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def plain(module: Any) -> Any:
    """What is inside the shells of torch.compile and DistributedDataParallel."""
    module = getattr(module, "_orig_mod", module)
    return getattr(module, "module", module)


def fixed_noise(count: int, module: nn.Module) -> torch.Tensor:
    """The same (count, 32) numbers each time, where the module is; no generator of the training is asked for them."""
    return torch.randn(count, NOISE, generator=torch.Generator().manual_seed(0)).to(next(module.parameters()).device)


def evaluate(modules: dict[str, nn.Module], batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over a batch (N, 1, 8, 8) of held-out images, compared with 512 drawn ones that are made of the same noise each time.

    `val_coverage` is the mean distance from an image to the nearest drawn one. It is 2.4 if those are real images of the training
    data, and 2.7 after the default training; 3.1 if half of the digits are never drawn, 3.2 if ten blurred ones are (the mean of each
    kind), 5.7 if it is always the same one, 6.6 before training. `val_loss` is the discriminator's loss: if it is much above that of
    the training, the discriminator knows the training images by heart.
    """
    drawn = modules["generator"](fixed_noise(SAMPLES, modules["generator"])).float()
    judge = modules["discriminator"]
    distances = torch.cdist(batch.flatten(1), drawn.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
    loss = F.softplus(-judge(batch)).sum() + F.softplus(judge(drawn)).mean() * len(batch)
    return {"val_coverage": distances.min(1).values.sum(), "val_loss": loss}


def picture(generator: nn.Module) -> bytes:
    """A PNG of 8x8 samples, of the same noise each time. The training is not disturbed: no generator, no buffer, no mode changes."""
    from PIL import Image  # the only user of Pillow, imported late

    training = generator.training
    with torch.no_grad():
        samples = generator.eval()(fixed_noise(GRID**2, generator)).float().cpu()
    generator.train(training)
    tiles = F.pad(((samples + 1) * 127.5).round().clamp(0, 255), (GAP,) * 4, value=48)
    side = GRID * tiles.shape[-1]
    pixels = tiles.byte().view(GRID, GRID, *tiles.shape[-2:]).transpose(1, 2).reshape(side, side)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).resize((side * SCALE, side * SCALE), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def build(width: int = 256, generator_lr: float = 1e-3, discriminator_lr: float = 2e-3, picture_every_steps: int | None = 200) -> Task:
    """Samples look like digits after about 1,000 steps. A picture of some is kept with the run every so many steps and at the end."""
    train_data, eval_data = load_split()
    modules = {"generator": generator(width), "discriminator": discriminator(width)}
    rates = {"generator": generator_lr, "discriminator": discriminator_lr}
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(module.parameters(), lr=rates[name], betas=(0.0, 0.99)) for name, module in modules.items()
    }
    return Task(
        modules=modules, optimizers=optimizers, train_data=Images(train_data.images), eval_data=Images(eval_data.images),
        step=functools.partial(step, picture_every_steps=picture_every_steps), evaluate=evaluate,
    )  # fmt: skip
