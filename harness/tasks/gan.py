"""A GAN that generates handwritten digits, trained on the 8x8 images that come with scikit-learn.

The task has its own `step` function, which replaces the optimizer step of the harness. Therefore
`train.clip_norm` and `train.nonfinite` are ignored, and `train.precision` applies only to
evaluations. `train.ema_decay` and `train.compile` work.
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

NOISE = 32  # standard normal numbers from which one sample is generated
SAMPLES = 512  # samples that an evaluation generates
# A picture has 8x8 samples, each with a margin of one pixel; each pixel is enlarged to 6x6.
GRID, GAP, SCALE = 8, 1, 6


class Images(Dataset[torch.Tensor]):
    """Images (1, 8, 8) with values from -1 to 1, not augmented."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def generator(width: int) -> nn.Module:
    """Return a network that maps (N, 32) noise to (N, 1, 8, 8) images."""
    return nn.Sequential(
        nn.Linear(NOISE, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, 64),
        nn.Tanh(),
        nn.Unflatten(1, (1, 8, 8)),
    )


def discriminator(width: int) -> nn.Module:
    """Return a network that maps (N, 1, 8, 8) images to (N, 1) logits of being real.

    Spectral norms keep the discriminator from becoming too strong, and thereby the generator from
    generating one digit only. No layer mixes samples, because real and generated ones are passed in
    one batch.
    """
    return nn.Sequential(
        nn.Flatten(),
        spectral_norm(nn.Linear(64, width)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(width, width)),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Linear(width, 1)),
    )


def step(run: Any, batch: torch.Tensor, picture_every_steps: int | None) -> dict[str, torch.Tensor]:
    """Update the discriminator, then the generator, on images (N, 1, 8, 8); return the losses.

    Each wrapped module has one forward and one backward pass per step, as DistributedDataParallel
    expects. Therefore the loss of the generator is computed with the unwrapped discriminator, whose
    parameters require no gradients meanwhile.

    Raises:
        UsageError: The batch is a list of micro-batches.
    """
    if not isinstance(batch, torch.Tensor):
        raise UsageError(
            "this task takes each batch whole",
            f"found: {len(batch)} micro-batches",
            "Leave out train.micro_batch_size.",
        )
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
    return {
        "loss": judge_loss + draw_loss,
        "discriminator_loss": judge_loss,
        "generator_loss": draw_loss,
    }


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def plain(module: Any) -> Any:
    """Return the module inside the wrappers of torch.compile and DistributedDataParallel."""
    module = getattr(module, "_orig_mod", module)
    return getattr(module, "module", module)


def fixed_noise(count: int, module: nn.Module) -> torch.Tensor:
    """Return noise (count, 32) that is the same in each call, on the device of the module.

    The random number generators of the training are not used.
    """
    return torch.randn(count, NOISE, generator=torch.Generator().manual_seed(0)).to(
        next(module.parameters()).device
    )


def evaluate(modules: dict[str, nn.Module], batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return sums over a batch (N, 1, 8, 8) of held-out images.

    The images are compared with 512 generated samples, from the same noise in each call.

    `val_coverage` is the distance from an image to the nearest sample. Its mean is 2.4 if the
    samples are real images of the training data, 2.7 after the default training, 3.1 if half of the
    digits are never generated, 3.2 if the samples are ten blurred images (the mean of each digit),
    5.7 if all samples are the same image, and 6.6 before training. `val_loss` is the
    discriminator's loss. If it is much higher than in the training, the discriminator has memorised
    the training images.
    """
    drawn = modules["generator"](fixed_noise(SAMPLES, modules["generator"])).float()
    judge = modules["discriminator"]
    distances = torch.cdist(
        batch.flatten(1), drawn.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    )
    loss = F.softplus(-judge(batch)).sum() + F.softplus(judge(drawn)).mean() * len(batch)
    return {"val_coverage": distances.min(1).values.sum(), "val_loss": loss}


def picture(generator: nn.Module) -> bytes:
    """Return a PNG of 8x8 samples, from the same noise in each call.

    The training is not affected: the random number generators, the buffers and the mode of the
    module are the same afterwards.
    """
    from PIL import Image  # no other function uses Pillow, which is optional

    training = generator.training
    with torch.no_grad():
        samples = generator.eval()(fixed_noise(GRID**2, generator)).float().cpu()
    generator.train(training)
    tiles = F.pad(((samples + 1) * 127.5).round().clamp(0, 255), (GAP,) * 4, value=48)
    side = GRID * tiles.shape[-1]
    pixels = tiles.byte().view(GRID, GRID, *tiles.shape[-2:]).transpose(1, 2).reshape(side, side)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).resize(
        (side * SCALE, side * SCALE), Image.Resampling.NEAREST
    ).save(file, "PNG")
    return file.getvalue()


def build(
    width: int = 256,
    generator_lr: float = 1e-3,
    discriminator_lr: float = 2e-3,
    picture_every_steps: int | None = 200,
) -> Task:
    """Build the task; samples look like digits after about 1,000 steps.

    Args:
        width: Width of the hidden layers of both networks.
        generator_lr: Learning rate of the generator.
        discriminator_lr: Learning rate of the discriminator.
        picture_every_steps: Steps between two pictures of samples, which are stored with the run.
            The last step stores one, too; None: only that one.
    """
    train_data, eval_data = load_split()
    modules = {"generator": generator(width), "discriminator": discriminator(width)}
    rates = {"generator": generator_lr, "discriminator": discriminator_lr}
    optimizers = {
        f"{name}_optimizer": torch.optim.Adam(
            module.parameters(), lr=rates[name], betas=(0.0, 0.99)
        )
        for name, module in modules.items()
    }
    return Task(
        modules=modules,
        optimizers=optimizers,
        train_data=Images(train_data.images),
        eval_data=Images(eval_data.images),
        step=functools.partial(step, picture_every_steps=picture_every_steps),
        evaluate=evaluate,
    )
