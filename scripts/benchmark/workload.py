"""What is trained and saved: a GPT of the size that is asked for, with both moments of its
optimizer, in single precision."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

BYTES_A_PARAMETER = 12  # itself and two moments
CONTEXT, SEQUENCES = 64, 4096


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, 64)).transpose(1, 2)
            for part in self.mix(self.before(x)).chunk(3, -1)
        )
        x = x + self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        x = x + self.narrow(F.gelu(self.wide(self.between(x))))
        return x


class Gpt(nn.Module):
    """Returns the loss. The head shares the embedding's weights."""

    def __init__(self, size_mb: int) -> None:
        super().__init__()
        parameters = size_mb * 1_000_000 // BYTES_A_PARAMETER
        width = 768 if parameters > 50_000_000 else 256
        # as in the smallest GPT-2: 12 layers of 124 M parameters
        layers = max(1, round(0.69 * parameters / (12 * width**2)))
        self.vocabulary = max(256, (parameters - layers * 12 * width**2) // width - CONTEXT)
        self.embedding, self.position = (
            nn.Embedding(self.vocabulary, width),
            nn.Embedding(CONTEXT, width),
        )
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.blocks(
            self.embedding(tokens[:, :-1]) + self.position.weight[: tokens.shape[1] - 1]
        )
        scores = F.linear(x, self.embedding.weight)
        return F.cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten() % self.vocabulary)


@dataclass(frozen=True)
class Workload:
    """A model, its optimizer and its data."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: TensorDataset

    def forward_backward(self, tokens: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(tokens).backward()

    def settle(self) -> None:
        """A first step, so that moments and gradients are there."""
        self.forward_backward(self.dataset.tensors[0][:1])
        self.optimizer.step()

    def track(self, run: Any) -> torch.optim.Optimizer:
        """Have a harness run track it, and beside it a model of two numbers; its optimizer, the
        update by which costs nothing."""
        small = nn.Linear(1, 1)
        update = torch.optim.SGD(small.parameters(), lr=1e-5)
        run.track(model=self.model, optimizer=self.optimizer, small=small, update=update)
        return update

    def payload(self) -> dict[str, Any]:
        """What the tutorials save; the tensors are the live ones."""
        return {
            "model_state_dict": self.model.state_dict(),
            "optimizer_state_dict": self.optimizer.state_dict(),
        }


def build(size_mb: int, device: str = "cpu") -> Workload:
    model = Gpt(size_mb).to(device)
    same = torch.Generator().manual_seed(1)  # every rank is given the same data
    tokens = torch.randint(256, (SEQUENCES, CONTEXT + 1), dtype=torch.int64, generator=same)
    return Workload(
        model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), TensorDataset(tokens)
    )


def tensors(payload: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested dicts and lists."""
    if isinstance(payload, torch.Tensor):
        yield payload
    elif isinstance(payload, dict):
        for value in payload.values():
            yield from tensors(value)
    elif isinstance(payload, (list, tuple)):
        for value in payload:
            yield from tensors(value)


def copied(payload: Any) -> Any:
    """The same with every tensor copied."""
    if isinstance(payload, torch.Tensor):
        return payload.detach().clone()
    if isinstance(payload, dict):
        return {name: copied(value) for name, value in payload.items()}
    return [copied(value) for value in payload] if isinstance(payload, (list, tuple)) else payload


def copy_s(payload: Any) -> float:
    """How long one copy of the state takes into memory that is there already: the unit of what
    training is blocked.

    The quickest of several: whatever else runs makes the unit longer, and what is measured in it
    look better than it is.
    """
    pairs = [(tensor.detach(), tensor.detach().clone()) for tensor in tensors(payload)]
    took = []
    for _ in range(8):
        began_at = time.perf_counter()
        for tensor, copy in pairs:
            copy.copy_(tensor)
        took.append(time.perf_counter() - began_at)
    return min(took)
