"""Do the intervals of `scaling` cover, and does its U test keep its size? Known truths, simulated losses.

    python benchmarks/scaling_coverage.py           reduced: 200 simulations a cell
    python benchmarks/scaling_coverage.py --full    2,000 a cell (about an hour on one core)
    python benchmarks/scaling_coverage.py --full --out benchmarks/results/scaling_coverage.md

A cell fails when its count could not come, by an exact binomial test at 1e-3, from any rate within its range.
Prints a Markdown table and exits with status 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import bdtr, bdtrc

from scaling.allocation import CREDIBLE, analyse
from scaling.allocation_families import FLOOR, allocation_families
from scaling.curvefit import fit_curve
from scaling.families import Family
from scaling.joint import fit_form
from scaling.joint_law import FORMS, JointData, curve, optimum_at
from scaling.memory_families import memory_families
from scaling.observations import build
from scaling.separable import Design, quantile_f
from scaling.ushape import SIZE, directional_p

RHO = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
SDS = (0.0005, 0.001, 0.002)
OPTIMUM = 0.82
Ends = tuple[float | None, float | None]


@dataclass(frozen=True)
class Cell:
    """One row of the table: what is counted, and the range its rate has to lie in."""

    group: str
    name: str
    low: float
    high: float
    hits: Callable[[int, np.random.Generator], int]


def family(name: str) -> Family:
    return next(item for item in allocation_families() if item.name == name)


def truth(name: str, x: np.ndarray) -> np.ndarray:
    """Allocation truths of the published size: optimum at .82, losses at .4 and at 1 both .0139 above it.

    The quadratic without jump has only .0026 at 1.
    """
    base = name.removesuffix("+jump")
    if base == "log-saturating":
        both = 0.0352 * (1 + FLOOR + 0.0139) / (OPTIMUM + FLOOR)  # a + g
        mean = both * family(base).basis(np.array([OPTIMUM, math.log(0.0139)]), x)
    else:
        mean = 0.0788 * (x - OPTIMUM) ** 2
    return 1.71 + mean + (0.0113 * (x == 1.0) if name.endswith("+jump") else 0.0)


def holds(ends: Ends, value: float) -> bool:
    return (ends[0] is None or ends[0] <= value) and (ends[1] is None or value <= ends[1])


def minima(y: np.ndarray, x: np.ndarray = RHO) -> list[tuple[Family, Design, int, np.ndarray, np.ndarray]]:
    """Every family that may be chosen, on data sets y [S, n]: design, parameters, theta [S, d], RSS [S]."""
    obs = build(x=x, y=y[0])
    out = []
    for item in allocation_families():
        if len(obs.cells) >= item.parameters + 3 and not item.check_only:
            design = item.design(x, obs.root_weight, obs.blocks)
            theta, rss = design.minimum(y)
            out.append(
                (item, design, design.parameters - (0 if item.amplitude else 1), theta, np.maximum(rss, 0))
            )
    return out


def scatter(
    y: np.ndarray,
    x: np.ndarray,
    found: list[tuple[Family, Design, int, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray]:
    """Variance [S] that the U test takes and its degrees of freedom [S]: residuals of the closest family, or
    of a parabola of either sign.
    """
    n = len(x)
    powers = np.linalg.qr(np.stack([np.ones(n), x, x**2], axis=1))[0]
    rest = y - (y @ powers) @ powers.T
    rss = np.stack([*(item[4] for item in found), (rest**2).sum(1)])
    free = np.array([*(n - p for _, _, p, _, _ in found), n - 3])
    best = np.argmin(rss / free[:, None], axis=0)
    return rss[best, np.arange(len(y))] / free[best], free[best]


def directions(
    y: np.ndarray,
    x: np.ndarray,
    found: list[tuple[Family, Design, int, np.ndarray, np.ndarray]],
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """p of "never rises" [S] and of "never falls" [S], the SD taken from residuals."""
    variance, free = scatter(y, x, found)
    p = np.empty((2, len(y)))
    for dof in np.unique(free):
        rows = np.flatnonzero(free == dof)
        p[:, rows] = directional_p(y[rows], np.ones(len(x)), variance[rows], float(dof), rng, draws=499)
    return p[0], p[1]


def aicc(rss: np.ndarray, n: int, p: int) -> np.ndarray:
    return n * np.log(rss / n) + 2 * p + 2 * p * (p + 1) / (n - p - 1)


def accepts(design: Design, y: np.ndarray, rss: np.ndarray, p: int, value: float) -> np.ndarray:
    """Whether the profile interval of rho* holds `value`, for data sets y [S, n] with least RSS rss [S]."""
    dof = y.shape[1] - p
    yp = design.weighted(y)
    inner = [axis.grid for axis in design.axes[1:]]
    mesh = np.stack([part.ravel() for part in np.meshgrid(*inner, indexing="ij")], axis=-1) if inner else None
    start = np.full((len(y), len(design.axes)), value)
    if mesh is not None:
        points = np.concatenate([np.full((len(mesh), 1), value), mesh], axis=1)
        curves = design.curves(points)
        size = np.sqrt((curves * curves).sum(-1, keepdims=True))
        gain = np.maximum(yp @ (curves / np.where(size > 0, size, 1.0)).T, 0.0)
        start = points[gain.argmax(1)]
    _, held = design.at(yp, start[:, None, :])
    return held[:, 0] <= rss * (1 + quantile_f(0.95, dof) / dof)


def single(name: str, sd: float, count: int, rng: np.random.Generator) -> int:
    """Profile interval of rho* when its family is true."""
    y = truth(name, RHO) + sd * rng.standard_normal((count, len(RHO)))
    obs = build(x=RHO, y=y[0])
    design = family(name).design(RHO, obs.root_weight, obs.blocks)
    _, rss = design.minimum(y)
    return int(accepts(design, y, rss, design.parameters, OPTIMUM).sum())


def union_covers(y: np.ndarray, value: float, x: np.ndarray = RHO) -> np.ndarray:
    """Whether the union of the credible families' intervals holds `value` [S].

    It does when one credible family's does, or when they lie on both sides of it.
    """
    found = minima(y, x)
    scores = np.stack([aicc(rss, y.shape[1], p) for _, _, p, _, rss in found])
    credible = scores - scores.min(axis=0) < CREDIBLE
    holds_it, below, above = (np.zeros(len(y), dtype=bool) for _ in range(3))
    for member, (item, design, p, theta, rss) in zip(credible, found, strict=True):
        rows = np.flatnonzero(member)
        if len(rows) == 0:
            continue
        if not item.axes:
            holds_it[rows] = True
            continue
        shapeless = design.amplitude(design.weighted(y[rows]), design.curves(theta[rows])) == 0
        inside = accepts(design, y[rows], rss[rows], p, value) | shapeless
        holds_it[rows] |= inside
        below[rows] |= ~inside & (theta[rows, 0] < value)
        above[rows] |= ~inside & (theta[rows, 0] > value)
    return holds_it | (below & above)


def union(name: str, sd: float, count: int, rng: np.random.Generator) -> int:
    """Union of the credible families' intervals of rho*, whatever is true, without the help that the U test
    gives the headline.
    """
    y = truth(name, RHO) + sd * rng.standard_normal((count, len(RHO)))
    return int(union_covers(y, OPTIMUM).sum())


def end_covers(
    mean: np.ndarray, end: float, sd: float, count: int, rng: np.random.Generator, x: np.ndarray = RHO
) -> int:
    """Headline interval of rho* when the truth is monotone: how often it holds the end that is best."""
    y = mean + sd * rng.standard_normal((count, len(x)))
    found = minima(y, x)
    scores = np.stack([aicc(rss, len(x), p) for _, _, p, _, rss in found])
    credible = scores - scores.min(axis=0) < CREDIBLE
    no_rise, no_fall = directions(y, x, found, rng)
    turned = np.maximum(no_rise, no_fall) <= SIZE
    reached = (no_rise if end == 1 else no_fall) > SIZE
    for member, (item, design, p, _, rss) in zip(credible, found, strict=True):
        if not item.axes:
            reached |= member
            continue
        beyond = design.grid[:, 0] >= 1 if end == 1 else design.grid[:, 0] <= 0
        least = design.surface(design.weighted(y))[:, beyond].min(1)
        dof = len(x) - p
        reached |= member & (least <= rss * (1 + quantile_f(0.95, dof) / dof))
    return int((reached & ~turned).sum())


def headline(
    mean: np.ndarray, optimum: float, sd: float, count: int, rng: np.random.Generator, x: np.ndarray
) -> int:
    """Headline interval of rho*, the U test and the valley's bounds included."""
    hits = 0
    for _ in range(count):
        obs = build(x=x, y=mean + sd * rng.standard_normal(len(x)))
        hits += holds(analyse(obs, allocation_families()).optimum.interval, optimum)
    return hits


def memory(what: str, alpha: float, sd: float, count: int, rng: np.random.Generator) -> int:
    """Profile interval of alpha, or of the loss at ten times the largest memory, when Box-Cox is true."""
    sizes = np.geomspace(2.6e5, 2.6e5 * 10**2.5, 8)
    box_cox = next(f for f in memory_families(sizes) if f.name == "box-cox")

    def mean(x: np.ndarray) -> np.ndarray:
        unit = np.exp(np.log(sizes).mean())
        u = np.log(x / unit)
        return 1.75 - 0.012 * (u if alpha == 0 else -np.expm1(-alpha * u) / alpha)

    far = np.array([10 * sizes[-1]])
    hits = 0
    for _ in range(count):
        obs = build(x=sizes, y=mean(sizes) + sd * rng.standard_normal(len(sizes)))
        fit = fit_curve(box_cox, obs)
        if what == "alpha":
            hits += holds(fit.intervals["alpha"], alpha)
        else:
            low, high = fit.band(far, "mean" if what == "mean" else "new")
            target = mean(far)[0] + (0.0 if what == "mean" else sd * rng.standard_normal())
            hits += bool(low[0] <= target <= high[0])
    return hits


def joint_truth() -> tuple[JointData, np.ndarray]:
    budget = np.array([1e18, 4e18, 1.6e19, 6.4e19])
    rho = np.array([0.3, 0.55, 0.7, 0.8, 0.88, 0.94, 0.98, 1.0])
    data = JointData(
        rho=np.tile(rho, 4),
        loss=np.zeros(32),
        root_weight=np.ones(32),
        known=False,
        group=np.repeat(np.arange(4), 8),
        budget=budget,
        ratio=np.full(4, 1 / FLOOR),
        blocks=np.zeros((32, 0)),
    )
    theta = np.array([3.0, 2.8, 2.6, 2.4, 0.044, 0.0085, math.log(0.06), -0.03, 0.03])
    return data, theta


def joint(what: str, sd: float, count: int, rng: np.random.Generator) -> int:
    """Profile interval of the drift difference or of rho* at ten times the largest budget."""
    data, theta = joint_truth()
    form = FORMS[1]
    mean = curve(form, data, theta[None])[0][0]
    top, bottom = (optimum_at(form, data, c) for c in (data.budget[-1], data.budget[0]))
    far = optimum_at(form, data, data.budget[-1] * 10)

    def function(at: np.ndarray) -> np.ndarray:
        return top(at) - bottom(at) if what == "drift" else far(at)

    value = float(function(theta[None])[0])
    hits = 0
    for _ in range(count):
        noisy = JointData(**{**data.__dict__, "loss": mean + sd * rng.standard_normal(32)})
        hits += holds(fit_form(form, noisy, parameters=False).interval_of(function), value)
    return hits


MONOTONE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "flat": lambda x: np.full_like(x, 1.71),
    "falling line": lambda x: 1.74 - 0.03 * x,
    "falling, saturating": lambda x: 1.71 + 0.05 * np.exp(-6 * x),
    "falling, logarithm": lambda x: 1.71 - 0.02 * np.log((x + FLOOR) / (1 + FLOOR)),
    "rising, steep at 1": lambda x: 1.71 - 0.004 * np.log1p((1 - x) / 0.03),
    "rising, cubic": lambda x: 1.71 + 0.04 * x**3,
    "falling, flat from .5": lambda x: 1.71 + 0.08 * np.maximum(0.5 - x, 0) ** 2,
}
KINKED = 0.7


def kinked(x: np.ndarray) -> np.ndarray:
    return 1.71 + 0.047 * np.abs(x - KINKED)


SEVEN = np.array([0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0])


def hill(x: np.ndarray) -> np.ndarray:
    return 1.71 - 0.08 * (x - 0.5) ** 2


def u_verdicts(mean: np.ndarray, sd: float, count: int, rng: np.random.Generator, x: np.ndarray = RHO) -> int:
    """How often both directions are rejected."""
    y = mean + sd * rng.standard_normal((count, len(x)))
    return int((np.maximum(*directions(y, x, minima(y, x), rng)) <= SIZE).sum())


def cells() -> tuple[Cell, ...]:
    out: list[Cell] = []
    for name in ("log-saturating", "quadratic", "quadratic+jump"):
        out += [
            Cell(
                "rho*, own family",
                f"{name}, SD {sd}",
                0.93,
                0.97,
                lambda n, g, a=name, s=sd: single(a, s, n, g),
            )
            for sd in SDS
        ]
    for name in ("log-saturating", "quadratic", "quadratic+jump"):
        out += [
            Cell("rho*, union", f"{name}, SD {sd}", 0.90, 1.0, lambda n, g, a=name, s=sd: union(a, s, n, g))
            for sd in SDS
        ]
    for alpha in (0.0, 0.15):
        for what, words in (("alpha", "alpha"), ("mean", "mean loss at 10x"), ("new", "new run at 10x")):
            out.append(
                Cell(
                    "memory, Box-Cox",
                    f"{words}, alpha {alpha}, SD 0.001",
                    0.93,
                    0.97,
                    lambda n, g, w=what, a=alpha: memory(w, a, 0.001, n, g),
                )
            )
    for what, words in (("drift", "rho*(C_max) - rho*(C_min)"), ("far", "rho* at 10x compute")):
        out.append(
            Cell("joint law", f"{words}, SD 0.001", 0.93, 0.97, lambda n, g, w=what: joint(w, 0.001, n, g))
        )
    for name, mean in MONOTONE.items():
        out.append(
            Cell(
                "U test, size",
                f"{name}, SD 0.001",
                0.0,
                0.07,
                lambda n, g, m=mean: u_verdicts(m(RHO), 0.001, n, g),
            )
        )
    for name in ("flat", "falling, saturating", "rising, steep at 1"):
        out.append(
            Cell(
                "U test, size",
                f"{name}, seven points, SD 0.001",
                0.0,
                0.07,
                lambda n, g, m=MONOTONE[name]: u_verdicts(m(SEVEN), 0.001, n, g, SEVEN),
            )
        )
    out.append(
        Cell("U test, size", "hill, SD 0.001", 0.0, 0.07, lambda n, g: u_verdicts(hill(RHO), 0.001, n, g))
    )
    for name, mean in MONOTONE.items():
        if name != "flat":
            end = 1.0 if name.startswith("falling") else 0.0
            out.append(
                Cell(
                    "rho*, headline at an end",
                    f"{name}, SD 0.001",
                    0.90,
                    1.0,
                    lambda n, g, m=mean, e=end: end_covers(m(RHO), e, 0.001, n, g),
                )
            )
    twice = np.repeat(SEVEN, 2)
    for sd in SDS:
        out.append(
            Cell(
                "rho*, headline",
                f"kinked at {KINKED}, seven points twice, SD {sd}",
                0.90,
                1.0,
                lambda n, g, s=sd: headline(kinked(twice), KINKED, s, n, g, twice),
            )
        )
    for name in ("log-saturating", "quadratic", "quadratic+jump"):
        for sd in SDS:
            out.append(
                Cell(
                    "U test, power",
                    f"{name}, SD {sd}",
                    0.0,
                    1.0,
                    lambda n, g, a=name, s=sd: u_verdicts(truth(a, RHO), s, n, g),
                )
            )
    for sd in SDS:
        out.append(
            Cell(
                "U test, power",
                f"log-saturating, seven points, SD {sd}",
                0.0,
                1.0,
                lambda n, g, s=sd: u_verdicts(truth("log-saturating", SEVEN), s, n, g, SEVEN),
            )
        )
    return tuple(out)


def consistent(hits: int, count: int, cell: Cell, level: float = 1e-3) -> bool:
    """Whether the count could come from a rate in the cell's range (exact binomial tests of its two ends)."""
    too_few = cell.low > 0 and bdtr(hits, count, cell.low) < level
    too_many = cell.high < 1 and hits > 0 and bdtrc(hits - 1, count, cell.high) < level
    return not (too_few or too_many)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="2,000 simulations a cell instead of 200")
    parser.add_argument("--only", default="", help="run the groups whose name contains this")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--seed", type=int, default=20240601)
    options = parser.parse_args()
    count = 2000 if options.full else 200
    lines = [
        f"{count} simulations a cell, seed {options.seed}. `python benchmarks/scaling_coverage.py"
        f"{' --full' if options.full else ''}`",
        "",
        "| what | truth | rate | wanted | verdict |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    failed = 0
    started = time.perf_counter()
    for index, cell in enumerate(cells()):
        if options.only not in cell.group:
            continue
        hits = cell.hits(count, np.random.default_rng([options.seed, index]))
        good = consistent(hits, count, cell)
        failed += not good
        wanted = "stated" if (cell.low, cell.high) == (0.0, 1.0) else f"{cell.low:g} to {cell.high:g}"
        verdict = "" if wanted == "stated" else "ok" if good else "FAILS"
        lines.append(f"| {cell.group} | {cell.name} | {hits / count:.4f} | {wanted} | {verdict} |")
        print(lines[-1], flush=True)
        if options.out is not None:
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text("# Coverage by simulation\n\n" + "\n".join(lines) + "\n")
    print(f"\n{time.perf_counter() - started:.0f} s, {failed} cells fail")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
