"""Rotary positions, and their extension to longer contexts than were trained on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engram_lab.errors import UserError


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071): slow rotations are stretched, fast ones kept, attention sharpened a little.

    The defaults are those of the Engram paper's extension from 4,096 to 32,768 tokens.
    """

    factor: float = 10.0
    """How much the slow rotations are stretched."""
    original_length: int = 4096
    """Context length of the training before the extension, in tokens."""
    alpha: float = 1.0
    """Pairs of channels that turn fewer times than this over the original length are stretched in full."""
    beta: float = 32.0
    """Pairs that turn more often than this are left alone; between alpha and beta the two are blended."""
    sharpening: float = 0.707
    """Scores are multiplied by (0.1 * sharpening * ln(factor) + 1) squared."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise UserError(f"yarn.factor is {self.factor}, but must be at least 1, which changes nothing.")
        if self.original_length < 1:
            raise UserError(f"yarn.original_length is {self.original_length}, but must be at least 1 token.")
        if not 0 < self.alpha < self.beta:
            raise UserError(
                f"yarn.alpha is {self.alpha} and yarn.beta {self.beta}, but 0 < alpha < beta is needed; "
                "1 and 32 are usual."
            )

    @property
    def score_factor(self) -> float:
        """What attention scores are multiplied by."""
        return (0.1 * self.sharpening * math.log(self.factor) + 1) ** 2


def frequencies(
    width: int, theta: float, yarn: YarnConfig | None, device: torch.device | None = None
) -> Tensor:
    """Return the angle per position of each of the width / 2 channel pairs, float64."""
    pairs = torch.arange(width // 2, dtype=torch.float64, device=device)
    frequency = theta ** (-2 * pairs / width)
    if yarn is None:
        return frequency

    def pair_turning(times: float) -> float:
        """The (fractional) pair that turns so many times over the original length."""
        return width * math.log(yarn.original_length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_turning(yarn.beta)), 0)
    last = min(math.ceil(pair_turning(yarn.alpha)), width - 1)
    stretched = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequency * (1 - stretched) + frequency / yarn.factor * stretched


def rope_tables(positions: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine [..., width / 2] of the rotation at each of the integer `positions` [...].

    Angles are taken in float64, so that late positions are exact whatever the model's precision.
    """
    return _cos_sin(positions.to(torch.float64).unsqueeze(-1) * frequency, dtype)


@torch.library.custom_op("engram_lab::cos_sin", mutates_args=())
def _cos_sin(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine; opaque to a compiler, which would take them anew for every element it rotates."""
    return angle.cos().to(dtype), angle.sin().to(dtype)


@_cos_sin.register_fake
def _(angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty_like(angle, dtype=dtype), torch.empty_like(angle, dtype=dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [..., width] by tables that fit it; channel i is paired with channel i + width / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
