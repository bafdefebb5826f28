"""Made-up studies with a known truth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl

SHARES = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
BASE = {
    "study": "made-up",
    "control": "",
    "status": "finished",
    "reason": None,
    "total_parameters": 3e6,
    "active_parameters": 1e6,
    "sparse_parameters": 2e6,
    "top_k": 6.0,
}


def smooth(shape: str, rho: float) -> float:
    """Loss without noise: "u", "flat", "falling" or "rising"."""
    experts = -0.06 * np.log((6 + 100 * rho) / 106)
    memory = -0.03 * np.log1p((1 - rho) / 0.05)
    return 3.4 + {"u": experts + memory, "flat": 0.0, "falling": experts, "rising": memory}[shape]


def allocation_rows(
    shape: str,
    *,
    budgets: Sequence[float] = (1e15,),
    shares: Sequence[float] = SHARES,
    seeds: int = 2,
    sd: float = 0.001,
    rng: int = 0,
) -> list[dict[str, object]]:
    noise = np.random.default_rng(rng)
    return [
        {
            **BASE,
            "run": f"a-{budget:.0e}-{rho:.3f}-{seed}",
            "sweep": "allocation",
            "budget": budget * (1 + 0.001 * rho),
            "rho": rho,
            "slots": float(round(65536 * (1 - rho))),
            "experts": 6.0 + round(100 * rho),
            "tokens": budget / 6e6,
            "seed": seed,
            "loss": smooth(shape, rho) - 0.05 * number + sd * noise.standard_normal(),
        }
        for number, budget in enumerate(budgets)
        for rho in shares
        for seed in range(seeds)
    ]


def memory_rows(
    *, sizes: int = 7, seeds: int = 2, sd: float = 0.001, rng: int = 1
) -> list[dict[str, object]]:
    noise = np.random.default_rng(rng)
    return [
        {
            **BASE,
            "run": f"m-{size:.0f}-{seed}",
            "sweep": "memory",
            "budget": 1e15,
            "rho": 0.6,
            "slots": float(round(size)),
            "experts": 66.0,
            "tokens": 1e15 / 6e6,
            "seed": seed,
            "loss": 3.5 - 0.015 * np.log(size / 1024) + sd * noise.standard_normal(),
        }
        for size in np.geomspace(1024, 131072, sizes)
        for seed in range(seeds)
    ]


def unfinished_rows() -> list[dict[str, object]]:
    first = {**allocation_rows("u")[0], "loss": None}
    return [
        {**first, "run": "bad", "status": "failed", "reason": "loss became NaN at step 31", "seed": 8},
        {**first, "run": "late", "status": "running", "seed": 9},
        *(
            {**first, "run": f"cut-{seed}", "status": "interrupted", "loss": 1.0, "seed": seed}
            for seed in (10, 11)
        ),
    ]


def study(*parts: list[dict[str, object]]) -> pl.DataFrame:
    return pl.DataFrame([row for part in parts for row in part], infer_schema_length=None)
