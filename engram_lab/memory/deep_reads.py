"""Many reads of one file under way at once, around the page cache, from one thread or two.

Linux's asynchronous reads (`man 2 io_submit`) keep a disk busy without a thread for each read, in one
compiled call: no thread of Python wakes beside a network that is being launched.
Seccomp rules that forbid io_uring usually allow these calls.

Shapes: n records, S bytes of one record, K requests.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types

from engram_lab.memory.disk_copy import BLOCK, ENDED, system_error
from engram_lab.memory.row_copy import copy_bytes

DEPTH = 512
"""Reads that one call has under way at once: disks want many."""
AT_ONCE = 2
"""Calls inside at once, at most: while the last reads of one end, those of another keep the disk busy."""
AGAIN, INTERRUPTED = errno.EAGAIN, errno.EINTR
REQUEST, EVENT = 8, 4  # 8-byte words of Linux's iocb and io_event


class _Calls(NamedTuple):
    """Numbers of the system's calls."""

    setup: int
    destroy: int
    events: int
    submit: int


_CALLS = {"x86_64": _Calls(206, 207, 208, 209), "aarch64": _Calls(0, 1, 4, 2)}
_syscall: Any = types.ExternalFunction("syscall", types.int64(*[types.int64] * 6))


class DeepReads:
    """Reads records of S bytes; `AT_ONCE` calls at a time are inside, others wait.

    Where the system has one queue to spare, one call is.

    Args:
        record_bytes: S.
        depth: K, reads that one call has under way at once.

    Raises:
        OSError: a system without asynchronous reads, or with none to spare (/proc/sys/fs/aio-max-nr).
    """

    def __init__(self, record_bytes: int, depth: int = DEPTH) -> None:
        calls = _CALLS.get(platform.machine())
        if calls is None:
            raise OSError(errno.ENOSYS, f"no asynchronous reads on {platform.machine()}")
        self._calls, self._S = calls, record_bytes
        self._queues: SimpleQueue[_Queue] = SimpleQueue()
        self._queues.put(_Queue(calls, record_bytes, depth))
        self._at_once = 1
        with suppress(OSError):
            while self._at_once < AT_ONCE:
                self._queues.put(_Queue(calls, record_bytes, depth))
                self._at_once += 1

    def read(self, file: int, start: int, ids: np.ndarray, out: int, places: np.ndarray) -> int:
        """Read records `ids` [n], ascending, of a file opened with O_DIRECT.

        Its records begin at byte `start`. Record i goes to `places[i]` of the records at address `out`.
        Returns 0, the system's error number, or ENDED where the file ends too early; nothing is under way any
        more then.
        """
        queue = self._queues.get()
        try:
            return int(
                _read(
                    queue.context.value,
                    self._calls.submit,
                    self._calls.events,
                    file,
                    start,
                    ids,
                    out,
                    places,
                    self._S,
                    (queue.room.ctypes.data + BLOCK - 1) // BLOCK * BLOCK,
                    queue.space,
                    queue.requests,
                    queue.events,
                    queue.waiting,
                    queue.free,
                    queue.first,
                    queue.last,
                )
            )
        finally:
            self._queues.put(queue)

    def close(self) -> None:
        """Give the system's queues back, once those inside have left; a later read returns EINVAL."""
        queues = [self._queues.get() for _ in range(self._at_once)]
        for queue in queues:
            queue.destroy()
            self._queues.put(queue)


class _Queue:
    """One of the system's queues of up to K reads, and memory for them.

    Raises:
        OSError: the system has none to spare.
    """

    def __init__(self, calls: _Calls, record_bytes: int, depth: int) -> None:
        self._calls, self._libc = calls, ctypes.CDLL(None, use_errno=True)
        self.context = ctypes.c_ulong(0)
        if self._libc.syscall(calls.setup, depth, ctypes.byref(self.context)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.space = -(-(record_bytes - 1) // BLOCK) * BLOCK + BLOCK  # blocks that one record may touch
        self.room = np.empty(depth * self.space + BLOCK, dtype=np.uint8)
        self.requests = np.zeros((depth, REQUEST), dtype=np.int64)
        self.events = np.zeros((depth, EVENT), dtype=np.int64)
        self.waiting, self.free, self.first, self.last = np.zeros((4, depth), dtype=np.int64)

    def destroy(self) -> None:
        """Give the queue back."""
        self._libc.syscall(self._calls.destroy, self.context)
        self.context.value = 0  # the system may give the number away again


@njit(nogil=True, cache=True)
def _read(
    context: int,
    submit: int,
    events_of: int,
    file: int,
    start: int,
    ids: np.ndarray,
    out: int,
    places: np.ndarray,
    S: int,
    room: int,
    space: int,
    requests: np.ndarray,
    events: np.ndarray,
    waiting: np.ndarray,
    free: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
) -> int:
    """Keep all requests busy until every record has come; records of one block share a request."""
    n, depth = len(ids), len(requests)
    unused, ready, under_way = depth, 0, 0  # requests in `free`, those in `waiting`, those the system has
    asked, failed = 0, 0
    for k in range(depth):
        free[k] = k
    while (asked < n and not failed) or ready or under_way:
        while unused and asked < n and not failed:
            unused -= 1
            k = free[unused]
            a = start + ids[asked] * S
            begin, end = a // BLOCK * BLOCK, (a + S + BLOCK - 1) // BLOCK * BLOCK
            first[k] = asked
            while asked < n and start + ids[asked] * S >= begin and start + (ids[asked] + 1) * S <= end:
                asked += 1
            last[k] = asked
            request = requests[k]  # of an iocb: data, key, operation and file, buffer, bytes, offset, 0, 0
            request[0], request[1], request[2] = k, 0, np.int64(file) << 32
            request[3], request[4], request[5] = room + k * space, end - begin, begin
            waiting[ready] = requests.ctypes.data + k * REQUEST * 8
            ready += 1
        if ready:
            taken = _syscall(submit, context, ready, waiting.ctypes.data, 0, 0)
            if taken < 0:
                taken = 0
                problem = system_error()
                if problem != INTERRUPTED and (problem != AGAIN or not under_way):
                    failed, ready = problem, 0
            ready -= min(taken, ready)
            for k in range(ready):
                waiting[k] = waiting[k + taken]
            under_way += taken
        if not under_way:
            continue
        ended = _syscall(events_of, context, 1, depth, events.ctypes.data, 0)
        if ended < 0:
            problem = system_error()
            if problem != INTERRUPTED:
                return problem
            continue
        under_way -= ended
        for e in range(ended):
            k, got = events[e, 0], events[e, 2]
            if got < 0:
                failed = -got
            elif got < requests[k, 4]:
                failed = ENDED
            else:
                for i in range(first[k], last[k]):
                    source = requests[k, 3] + start + ids[i] * S - requests[k, 5]
                    copy_bytes(out + places[i] * S, source, S)
            free[unused] = k
            unused += 1
    return int(failed)
