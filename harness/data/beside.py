"""A second source in the same loop, for semi-supervised training, say: it goes round in epochs of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.data.loading import Batches, Source
from harness.data.order import Position
from harness.data.stream import ENDLESS


@dataclass
class Together:
    """A source whose epochs count, and others beside it, by name: each micro-batch comes with one of each of them."""

    main: Source
    others: Mapping[str, Source]
    positions: dict[str, Position] = field(default_factory=dict)  # of the others, after the step that was handed out last
    is_own = False

    def steps_after(self, position: Position, epochs: int) -> int | None:
        return self.main.steps_after(position, epochs)

    def shares(self, position: Position, epochs: int) -> Batches:
        beside = {name: source.shares(self.positions.get(name, Position()), ENDLESS) for name, source in self.others.items()}
        for share, batches in self.main.shares(position, epochs):
            if not batches:  # no step
                yield share, batches
                continue
            taken = {name: next(shares) for name, shares in beside.items()}
            self.positions = {name: its.after for name, (its, _) in taken.items()}
            yield share, [(batch, {name: more[at] for name, (_, more) in taken.items()}) for at, batch in enumerate(batches)]

    def at(self) -> dict[str, list[int]]:
        """How far each of the others is, as plain data."""
        return {name: [position.epoch, position.sample] for name, position in self.positions.items()}

    def state(self) -> Any:
        states = {name: source.state() for name, source in self.others.items()}
        main = self.main.state()
        return None if main is None and not any(state is not None for state in states.values()) else {"main": main, "beside": states}

    def restore(self, state: Any) -> None:
        parts = state if state is not None else {"main": None, "beside": {}}
        self.main.restore(parts["main"])
        for name, source in self.others.items():
            source.restore(parts["beside"].get(name))
