"""Table sizes for a number of rows, when every head must have a prime of its own.

The heads' primes are distinct, so at small sizes their sum moves in large steps; giving the orders different
starts makes the steps fine enough.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from engram_lab.errors import UserError
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.hashing import table_rows
from engram_lab.model.memories import memory_rows, memory_size
from engram_lab.model.primes import is_prime, next_prime

WINDOW = 64
"""How many primes the first order's start may move down from the common one; the last order makes up for
it.
"""
NEAR_START = 0.75
"""Share of the common start below which the orders' tables are not much alike any more."""


class Tolerance(NamedTuple):
    """Relative misses of the total at which the search for primes is content."""

    near: float
    """While the orders' tables are about equally large."""
    far: float
    """When only unequal tables come closer."""


def fit_memory(
    network: ModelConfig, parameters: int, total: int, tolerance: Tolerance, *, pay: bool, step: int = 1
) -> EngramConfig:
    """Return the memory of `network` sized to `parameters`, within the `tolerance` of `total` where sizes
    allow.

    Rows alone are counted, or with `pay` the module's other parameters too. The plain branch of the `mlp`
    control takes all of them for its matrices. Rows per head are a multiple of `step`. UserError where the
    parameters do not do for the smallest memory.
    """
    memory = network.engram
    assert memory is not None

    def cost(config: EngramConfig) -> int:
        rows = sum(memory_rows(config)) * config.row_dim
        if not pay and config.module != "mlp":
            return rows
        return rows + len(config.layers) * memory_size(config, network.d_model, network.streams).parameters

    sizes = {"mlp": ("mlp_hidden", 1), "product_key": ("product_keys", memory.product_top_k)}
    if memory.module not in sizes:
        rows = parameters - cost(memory) + sum(memory_rows(memory)) * memory.row_dim
        if step > 1:
            return fit_rows_in_steps(memory, round(rows / memory.row_dim), step)
        near, far = (int(share * total / memory.row_dim) for share in tolerance)
        return fit_rows(memory, round(rows / memory.row_dim), near, far)
    field, least = sizes[memory.module]

    def sized(number: int) -> EngramConfig:
        return replace(memory, **{field: number})  # type: ignore[arg-type]

    if parameters < cost(sized(least)):
        raise UserError(
            f"the memory would have {parameters} parameters, but with engram.{field} = {least} it "
            f"already has {cost(sized(least))}: lower rho."
        )
    number = bisect_left(range(parameters + 2), parameters, lo=least, key=lambda n: cost(sized(n)))
    return min((sized(max(n, least)) for n in (number - 1, number)), key=lambda m: abs(cost(m) - parameters))


def fit_rows(config: EngramConfig, rows: int, near: int, far: int) -> EngramConfig:
    """Return `config` with the `rows_per_head` whose tables together hold nearest to `rows` rows.

    Equal starts are kept when they come within `near` rows; otherwise the first order moves down and the
    last one up, until within `near` rows, or within `far` once the first is below NEAR_START. UserError
    where even the smallest primes need more rows.
    """

    def total(start: int | tuple[int, ...]) -> int:
        return sum(table_rows(replace(config, rows_per_head=start)))

    def total_from(head: tuple[int, ...], last: int) -> int:
        return total((*head, last))

    smallest = total(2)
    if rows < smallest:
        heads = len(config.layers) * config.n_heads
        raise UserError(
            f"the memory would have {rows} rows of width {config.row_dim} in all, but {heads} hash heads "
            f"with a prime number of rows each need {smallest}: lower rho, engram.heads or engram.row_dim."
        )
    common = next_prime(bisect_left(range(rows + 1), rows, lo=2, key=total))
    options: list[int | tuple[int, ...]] = [common, previous_prime(common)]
    best = min(options, key=lambda start: abs(total(start) - rows))
    first, middle = common, (common,) * (len(config.orders) - 2)
    for _ in range(WINDOW if len(config.orders) > 1 else 0):
        first = previous_prime(first)
        if abs(total(best) - rows) <= (near if first >= NEAR_START * common else far):
            break
        head = (first, *middle)
        last = next_prime(bisect_left(range(rows + 1), rows, lo=first, key=partial(total_from, head)))
        options = [best, (*head, previous_prime(last)), (*head, last)]
        best = min(options, key=lambda start: abs(total(start) - rows))
    return replace(config, rows_per_head=best)


def fit_rows_in_steps(config: EngramConfig, rows: int, step: int) -> EngramConfig:
    """Return `config` with the multiple of `step` as `rows_per_head` whose tables hold nearest to `rows`."""

    def sized(number: int) -> EngramConfig:
        return replace(config, rows_per_head=max(number, 1) * step)

    above = bisect_left(
        range(rows // step + 2), rows, lo=1, key=lambda number: sum(table_rows(sized(number)))
    )
    return min(map(sized, (above - 1, above)), key=lambda memory: abs(sum(table_rows(memory)) - rows))


def previous_prime(n: int) -> int:
    """Return the largest prime below `n`, or 2 where there is none."""
    n -= 1
    while n > 2 and not is_prime(n):
        n -= 1
    return max(n, 2)
