"""Work that a device repeats unchanged, launched as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARM_UP = 2
"""Calls before the capture: kernels are compiled and libraries choose algorithms and take their memory."""


def captured(step: Callable[[], None], device: torch.device, *, warm_up: int = WARM_UP) -> Callable[[], None]:
    """Return what does `step` again: the replay of a graph on a CUDA device, `step` itself elsewhere.

    On a CUDA device `step` is called `warm_up` times here, which must do no harm; 0 is for what has been
    done before. It reads and writes tensors that stay where they are, and never waits for the device.
    """
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Threads that gather rows may use CUDA meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        step()
    return graph.replay
