"""What ranks tell each other beside the step: which rows they need, where their files are.

All of it goes over a group of its own on the CPU, from one thread, in the order in which the step's thread
asked for it. So it is the same order on all ranks, and sizes are known before the step needs them.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from engram_lab.errors import UserError

Value = TypeVar("Value")
POLL_SECONDS = 5e-4


def total(part: Tensor) -> Tensor:
    """Add up a tensor over the ranks, in place and between two operations of the step."""
    dist.all_reduce(part)
    return part


class Peers:
    """The ranks of the run. All of them make one at the same time, once their process group is there.

    Args:
        device: where this rank computes.

    Attributes:
        rank: number of this one.
        ranks: how many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")
        # A new thread would pin memory for the first GPU, which is another rank's.
        starting = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gather", initializer=starting)
        self._closing = threading.Event()
        self._left = False

    def submit(self, call: Callable[..., Value], *given: Any) -> Future[Value]:
        """Run `call` on the thread where `exchange` may be used, behind what was submitted before."""
        return self._thread.submit(call, *given)

    def exchange(self, data: Tensor, counts: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Send the first counts[0] of `data` [n, ...], on the CPU, to rank 0, the next to rank 1, ...

        Collective, and for submitted calls only. Returns what the ranks sent to this one, in their order, and
        how many each.

        Raises:
            UserError: another rank is gone.
            CancelledError: this one was closed meanwhile.
        """
        sizes = torch.empty(self.ranks, dtype=torch.int64)
        self._all_to_all(sizes, torch.tensor(counts), [1] * self.ranks, [1] * self.ranks)
        arriving: list[int] = sizes.tolist()
        received = data.new_empty((sum(arriving), *data.shape[1:]))
        self._all_to_all(received, data, arriving, list(counts))
        return received, arriving

    def gather(self, value: Value) -> list[Value]:
        """Return the `value`, plain, of every rank. Collective: none returns before all gave theirs."""
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        received, counts = self.submit(
            self.exchange, data.repeat(self.ranks), [len(data)] * self.ranks
        ).result()
        return [json.loads(part.numpy().tobytes()) for part in received.split(counts)]

    def close(self) -> None:
        """End the thread; it waits for no rank any more."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)
        if self._left:
            # The group's destructor would wait for the operation that was left, and this process for it,
            # while the others wait for this process to end.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))

    def _all_to_all(self, received: Tensor, data: Tensor, arriving: list[int], leaving: list[int]) -> None:
        try:
            work = dist.all_to_all_single(received, data, arriving, leaving, group=self._group, async_op=True)
            while not work.is_completed():
                if self._closing.wait(POLL_SECONDS):
                    self._left = True
                    raise CancelledError
            work.wait()
        except RuntimeError as error:
            raise UserError(
                "Another process of this run has ended or does not answer; what it wrote says why."
            ) from error
