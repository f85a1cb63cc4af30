"""A small GPT, trained on the bytes of the source files of the Python standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from harness.errors import UsageError
from harness.task import Task
from harness.tasks.digits import warmup_cosine

VOCABULARY = 256
HELD_OUT = 0.05  # fraction of the bytes, at the end, that is held out


class Windows(Dataset[torch.Tensor]):
    """Windows of block_size + 1 bytes as int64, at a stride of block_size."""

    def __init__(self, text: np.ndarray[Any, np.dtype[np.uint8]], block_size: int) -> None:
        self.text, self.block_size = text, block_size
        self.fingerprint = hashlib.blake2b(text.tobytes(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.block_size

    def __getitem__(self, index: int) -> torch.Tensor:
        at = index * self.block_size
        return torch.from_numpy(self.text[at : at + self.block_size + 1].astype(np.int64))


def standard_library() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return the concatenated sources of the standard library's top-level modules, sorted by name.

    Raises:
        UsageError: This Python installation has no source files.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py"))
    if not files:
        raise UsageError(
            "the Python standard library has no source files here",
            f"searched: {folder}/*.py",
            "Install Python with its sources.",
        )
    return np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each with a residual connection."""

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.feed = nn.Sequential(
            nn.Linear(channels, 4 * channels),
            nn.GELU(),
            nn.Linear(4 * channels, channels),
            nn.Dropout(dropout),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (N, T, C) to (N, T, C)."""
        n, t, c = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .view(n, t, 3, self.heads, c // self.heads)
            .permute(2, 0, 3, 1, 4)
        )
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + F.dropout(
            self.project(attended.transpose(1, 2).reshape(n, t, c)), self.dropout, self.training
        )
        x = x + self.feed(self.norm2(x))
        return x


class Gpt(nn.Module):
    """A GPT over bytes; the embedding is tied to the output layer.

    Args:
        layers: Number of blocks.
        channels: Width of the model.
        heads: Number of attention heads.
        block_size: Length of the longest sequence.
        dropout: Dropout probability.
    """

    def __init__(
        self, layers: int, channels: int, heads: int, block_size: int, dropout: float
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, channels)
        self.place = nn.Embedding(block_size, channels)
        self.blocks = nn.ModuleList(Block(channels, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(channels), nn.Linear(channels, VOCABULARY, bias=False)
        self.dropout = nn.Dropout(dropout)
        for embedding in (self.embed, self.place):
            nn.init.normal_(embedding.weight, std=0.02)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Map bytes (N, T) to logits (N, T, 256) for the next byte."""
        x = self.dropout(
            self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        )
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy per byte of a batch (N, T + 1), in nats."""
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def evaluate(model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the sum over a batch of each window's mean cross-entropy per byte, in nats."""
    return {"val_loss": loss(model, batch) * len(batch)}


def build(
    layers: int = 4,
    channels: int = 128,
    heads: int = 4,
    block_size: int = 128,
    dropout: float = 0.1,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    warmup_steps: int = 50,
    decay_steps: int = 2000,
    eval_windows: int = 256,
) -> Task:
    """Build the task; by default, the GPT has about 0.8 million parameters.

    Args:
        layers: Number of blocks.
        channels: Width of the model.
        heads: Number of attention heads.
        block_size: Bytes that the model sees at once.
        dropout: Dropout probability.
        lr: Peak learning rate of AdamW.
        weight_decay: Weight decay of AdamW.
        warmup_steps: Steps of linear warm-up.
        decay_steps: Step at which the learning rate has reached its minimum.
        eval_windows: The most held-out windows in one evaluation.
    """
    text = standard_library()
    split = int(len(text) * (1 - HELD_OUT))
    model = Gpt(layers, channels, heads, block_size, dropout)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_cosine(warmup_steps, decay_steps)
    )
    return Task(
        modules=model,
        optimizers=optimizer,
        schedulers=scheduler,
        loss=loss,
        evaluate=evaluate,
        train_data=Windows(text[:split], block_size),
        eval_data=Windows(text[split : split + eval_windows * block_size + 1], block_size),
    )
