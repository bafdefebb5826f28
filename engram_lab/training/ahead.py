"""A training loader that looks ahead, so that rows of coming steps are fetched while this one computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor


class ResumableBatches(Protocol):
    """What is looked into: micro-batches whose position can be saved."""

    @property
    def first(self) -> int:
        """The micro-batch that comes first."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]: ...

    def __len__(self) -> int: ...

    def state_dict(self) -> dict[str, int]:
        """The position."""

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position."""


class AnnouncingLoader:
    """Hands out micro-batches and announces those of the next steps.

    In place of "addresses", a micro-batch has "step", its optimizer step counted from 1, and "micro_batch",
    its place within the step.

    Args:
        loader: micro-batches with "addresses" [M, B, T, H].
        announce: takes an optimizer step and the addresses of its micro-batches; called in order.
        micro_batches: A, micro-batches a step.
        depth: steps announced ahead of the one handed out.
    """

    def __init__(
        self,
        loader: ResumableBatches,
        announce: Callable[[int, list[Tensor]], None],
        *,
        micro_batches: int,
        depth: int,
    ) -> None:
        self.loader, self.announce = loader, announce
        self.micro_batches, self.depth = micro_batches, depth

    def __iter__(self) -> Iterator[dict[str, Any]]:
        waiting: deque[list[dict[str, Any]]] = deque()
        for step in self._steps():
            waiting.append(step)
            if len(waiting) > self.depth:
                yield from waiting.popleft()
        while waiting:
            yield from waiting.popleft()

    def _steps(self) -> Iterator[list[dict[str, Any]]]:
        micro_batches: list[dict[str, Any]] = []
        number = self.loader.first // self.micro_batches + 1
        for batch in self.loader:
            micro_batches.append({**batch, "step": number, "micro_batch": len(micro_batches)})
            if len(micro_batches) == self.micro_batches:
                self.announce(number, [b.pop("addresses") for b in micro_batches])
                yield micro_batches
                micro_batches, number = [], number + 1

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, int]:
        """The position of the loader, which counts what was trained on and not what was announced."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a position."""
        self.loader.load_state_dict(state)
