"""Initial weights as a function of (seed, name, place): equal in all cells of a study where shapes allow.

Every parameter has its own stream of random numbers, keyed by the seed and its name, and every block of it
a stream of its own: one expert of a stack, some rows of anything else. So a network with fewer experts, or
fewer table rows, starts with a prefix of the larger one's weights, another part of the network changes
nothing, and a block can be drawn without the blocks before it.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from engram_lab.memory.stores import DRAWN
from engram_lab.model.transformer import Transformer

_ROWS = 256
"""Rows of a block, those of tables aside."""
# Token embeddings start about as large as what a block adds to them: at 0.02 the blocks' first, random
# results drown them, and a short run ends well behind.
EMBEDDING_STD = 0.5
HEAD_STD = 0.02
TABLE_STD = 0.02


@torch.no_grad()
def initialise(network: Transformer, seed: int) -> None:
    """Draw all weights of `network` in place.

    Matrices are normal with variance 1 / inputs, those that write to the residual stream divided by sqrt(2
    layers) (GPT-2's rule); token embeddings are normal with standard deviation 0.5, the head (also as an
    embedding, where they are one) and memory tables with 0.02. Vectors, that is norms, biases and short
    convolutions, keep the constants their modules are built with.
    """
    roles = network.parameter_roles()
    depth = math.sqrt(2 * network.config.n_layers)
    for name, parameter in network.named_parameters():
        if roles[name] == "vector":
            continue
        if roles[name] == "table":
            std = TABLE_STD
        elif roles[name] == "embedding":
            std = EMBEDDING_STD if parameter is not network.head.weight else HEAD_STD
        else:
            inputs = parameter.shape[-2] if parameter.ndim == 3 else parameter.shape[-1]
            std = inputs**-0.5 / (depth if "out" in name.split(".") else 1.0)
        rows = DRAWN if roles[name] == "table" else 1 if parameter.ndim == 3 else _ROWS
        draw(parameter, f"{seed}/{name}", std, rows)


def draw(parameter: Tensor, key: str, std: float, size: int) -> None:
    """Fill `parameter` with normal values, `size` rows at once from the stream of (key, block number)."""
    for number, block in enumerate(parameter.split(size)):
        values = _block(key, number, (size, *parameter.shape[1:]))
        block.copy_(values[: len(block)].mul_(std))


def initial_rows(seed: int, memory: int, first: int, out: Tensor) -> None:
    """Write rows first, first + 1, ... of a memory's table to `out` [rows, row_dim], float32 on the CPU.

    They are what `initialise` draws for `tables.{memory}.weight`, without the rows before them. May be called
    from several threads at once.
    """
    last = first + len(out)
    for number in range(first // DRAWN, -(-last // DRAWN)):
        start = number * DRAWN
        a, b = max(first, start), min(last, start + DRAWN)
        values = _block(f"{seed}/tables.{memory}.weight", number, (DRAWN, out.shape[1]))
        torch.mul(values[a - start : b - start], TABLE_STD, out=out[a - first : b - first])


def _block(key: str, number: int, shape: tuple[int, ...]) -> Tensor:
    digest = hashlib.blake2b(f"{key}/{number}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.randn(shape, generator=generator)
