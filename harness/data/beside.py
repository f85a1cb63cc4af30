"""A second source in the same loop, for semi-supervised training, say: it goes round in epochs of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.data.plan import Position
from harness.data.source import Bordered, Say, Source
from harness.data.stream import ENDLESS

ORDERS = "beside_orders"


@dataclass
class CombinedSource:
    """A source whose epochs count, and others beside it, by name: each micro-batch comes with one of each of them."""

    main: Source
    others: Mapping[str, Source]
    positions: dict[str, Position] = field(default_factory=dict)  # of the others, after the step that was handed out last
    is_own = False

    def begin(self, position: Position, before: Mapping[str, Any] | None, say: Say, *, by_epoch: bool) -> None:
        self.main.begin(position, before, say, by_epoch=by_epoch)
        orders = (before or {}).get(ORDERS, {})
        for name, source in self.others.items():
            own = None if before is None else orders.get(name, {})
            source.begin(self.positions.get(name, Position()), own, say, by_epoch=False)

    def asked(self, ask: Callable[[Any], Any]) -> Any:
        return self.main.asked(ask)

    def close(self) -> None:
        for source in (self.main, *self.others.values()):
            source.close()

    def kept(self, position: Position) -> dict[str, Any]:
        """Of the others how far each of them is, and the orders of theirs that have to be kept."""
        orders = {name: source.kept(self.positions.get(name, Position())) for name, source in self.others.items()}
        kept = {name: order for name, order in orders.items() if order}
        at = {name: [its.epoch, its.sample] for name, its in self.positions.items()}
        return self.main.kept(position) | {"beside_at": at} | ({ORDERS: kept} if kept else {})

    def steps_after(self, position: Position, epochs: int) -> int | None:
        return self.main.steps_after(position, epochs)

    def shares(self, position: Position, epochs: int) -> Bordered:
        beside = {name: source.shares(self.positions.get(name, Position()), ENDLESS) for name, source in self.others.items()}
        for share, batches in self.main.shares(position, epochs):
            if not batches:  # no step
                yield share, batches
                continue
            taken: dict[str, Any] = {name: next(shares) for name, shares in beside.items()}  # of them there are no borders
            self.positions = {name: its.after for name, (its, _) in taken.items()}
            yield share, [(batch, {name: more[at] for name, (_, more) in taken.items()}) for at, batch in enumerate(batches)]

    def state(self) -> Any:
        states = {name: source.state() for name, source in self.others.items()}
        main = self.main.state()
        return None if main is None and not any(state is not None for state in states.values()) else {"main": main, "beside": states}

    def restore(self, state: Any) -> None:
        parts = state if state is not None else {"main": None, "beside": {}}
        self.main.restore(parts["main"])
        for name, source in self.others.items():
            source.restore(parts["beside"].get(name))
