from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.catch_up import nodes_for
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.training.optimizer import OptimizerConfig, build_optimizer
from engram_lab.training.schedule import wsd_multiplier

STEPS = 500


def rates(step: int) -> float:
    """Warm-up, stable, decay."""
    return 0.015 * wsd_multiplier(step - 1, STEPS, 40, 150, 0.1)


def make(rule: str = "adam", row_dim: int = 16, **given: Any) -> RowOptimizer:
    formats = {name: given.pop(name) for name in ("weights", "state") if name in given}
    layout = RecordLayout(row_dim=row_dim, rule=rule, **formats)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95, "rates": rates, "seed": 7}
    return RowOptimizer(layout, **{**settings, **given})


def start(optimizer: RowOptimizer, weights: Tensor) -> Tensor:
    records = torch.empty(len(weights), optimizer.layout.record_bytes, dtype=torch.uint8)
    optimizer.fresh(weights, records)
    return records


def reads(rows: int, seed: int = 0) -> Callable[[int], Tensor]:
    """Rows read at a step: the first in every one, the last ones once in a run or never."""
    odds = torch.logspace(0, -3.3, rows, dtype=torch.float64)

    def at(step: int) -> Tensor:
        draw = torch.rand(rows, generator=torch.Generator().manual_seed(1000 * seed + step))
        return (draw < odds).nonzero()[:, 0]

    return at


def gradients_at(step: int, count: int, row_dim: int = 16, size: float = 1.0) -> Tensor:
    return size * torch.randn(count, row_dim, generator=torch.Generator().manual_seed(step))


def lazily(
    optimizer: RowOptimizer, records: Tensor, at: Callable[[int], Tensor], size: float, steps: int = STEPS
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Train `records` on the rows read; yield (step, rows read, their weights before)."""
    for step in range(1, steps + 1):
        ids = at(step)
        buffer = records[ids]
        opened = optimizer.open(buffer, step)
        gradients = gradients_at(step, len(ids), optimizer.layout.row_dim, size)
        optimizer.update(buffer, ids, gradients, step)
        records[ids] = buffer
        yield step, ids, opened


@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.9, 0.999), (0.0, 0.95), (0.95, 0.95)])
@pytest.mark.parametrize(
    "size", [1.0, 1e-6, 1e-8]
)  # eps is 1e-8: nothing, a hundredth, all of the denominator
def test_lazy_adam_is_dense_adam(betas: tuple[float, float], size: float) -> None:
    rows = 120
    weights = 0.1 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    optimizer, at = make(betas=betas), reads(rows)
    records = start(optimizer, weights)

    dense = torch.nn.Parameter(weights.double())  # the truth, without float32's own error
    adam = torch.optim.Adam([dense], lr=1.0, betas=betas, eps=1e-8)
    first, missed = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.long)
    longest = 0
    for step, ids, opened in lazily(optimizer, records, at, size):
        assert (opened - dense[ids]).abs().max() < 1e-6, step  # every reader on the way
        longest = max(longest, int(missed[ids].max()))
        missed += 1
        missed[ids] = 0
        first[ids[first[ids] == 0]] = step
        adam.param_groups[0]["lr"] = rates(step)
        dense.grad = torch.zeros_like(dense)
        dense.grad[ids] = gradients_at(step, len(ids), size=size).double()
        adam.step()
        if step in (3, 50, 351, STEPS):
            assert (optimizer.weights(records, step) - dense).abs().max() < 1e-6, step
    assert first.max() > 400  # rows first read late
    assert (first == 0).any()  # and never
    assert longest > 200


def test_short_and_long_gaps_meet() -> None:
    """Sums term by term and by quadrature agree with brute force where one takes over from the other."""
    optimizer, nodes = make(), nodes_for((0.9, 0.95))
    assert nodes == 8
    for gap in (1, 2 * nodes, 2 * nodes + 1, 300):
        records = start(optimizer, torch.zeros(50, 16))
        optimizer.update(records, torch.arange(50), gradients_at(1, 50, size=1e-7), 1)
        fields = {name: field.double() for name, field in optimizer.layout.fields(records).items()}
        w, m, v = fields["weight"], fields["exp_avg"], fields["exp_avg_sq"]
        for j in range(2, gap + 2):
            m, v = 0.9 * m, 0.95 * v
            w = w - rates(j) / (1 - 0.9**j) * m / ((v / (1 - 0.95**j)).sqrt() + 1e-8)
        torch.testing.assert_close(optimizer.weights(records, gap + 1).double(), w, rtol=3e-6, atol=1e-9)


@pytest.mark.parametrize("betas", [(0.98, 0.95), (0.9747, 0.95), (0.999, 0.999)])
def test_betas_whose_catch_up_does_not_end_get_a_sentence(betas: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"optimizer.betas is .*beta1 well below"):
        make(betas=betas)


RULES = [("adam", "exp_avg_sq"), ("adagrad", "sum_sq"), ("sinkhorn", "momentum")]
FORMATS = [("float32", "float32"), ("bfloat16", "bfloat16")]


@pytest.mark.parametrize(("rule", "state"), RULES)
@pytest.mark.parametrize(("weights", "kept"), FORMATS)
def test_padding_changes_nothing_and_stays_zero(rule: Any, state: str, weights: Any, kept: Any) -> None:
    optimizer = make(rule, weights=weights, state=kept, first_row=(0, 30))
    values = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    bare, ids = start(optimizer, values), torch.arange(40)
    padded = torch.cat([bare, torch.zeros(13, bare.shape[1], dtype=torch.uint8)])
    some = torch.cat([ids, torch.zeros(13, dtype=torch.int64)])
    for step in (1, 2, 30):
        gradients = gradients_at(step, 40)
        optimizer.update(bare, ids, gradients, step)
        optimizer.update(padded, some, torch.cat([gradients, torch.zeros(13, 16)]), step)
        assert torch.equal(padded[:40], bare)
        fields = optimizer.layout.fields(padded[40:])
        assert not fields["weight"].any()
        assert not fields[state].any()
        assert not optimizer.open(padded, step + 1)[40:].any()


@pytest.mark.parametrize("rule", ["adam", "adagrad"])
@pytest.mark.parametrize(("weights", "state"), FORMATS)
def test_bits_do_not_depend_on_threads(rule: Any, weights: Any, state: Any) -> None:
    optimizer = make(rule, weights=weights, state=state)
    values = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    alone, ids = start(optimizer, values), torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    shared = alone.clone()
    with ThreadPoolExecutor(4) as pool:
        for step in (1, 2, 70, 400):  # constants grow under the threads
            gradients = gradients_at(step, 1000)
            parts = [slice(begin, begin + 100) for begin in range(0, 1000, 100)]
            list(
                pool.map(
                    lambda at, step=step, g=gradients: optimizer.update(shared[at], ids[at], g[at], step),
                    parts,
                )
            )
            reference = make(rule, weights=weights, state=state)
            reference.update(alone, ids, gradients, step)
    assert torch.equal(alone, shared)


@pytest.mark.parametrize(("rule", "state"), RULES)
def test_a_scale_multiplies_the_gradients(rule: Any, state: str) -> None:
    optimizer = make(rule)
    a = start(optimizer, torch.ones(9, 16))
    b, ids, gradients = a.clone(), torch.arange(9), gradients_at(1, 9)
    optimizer.update(a, ids, gradients, 1, scale=torch.tensor(0.25))
    optimizer.update(b, ids, 0.25 * gradients, 1)
    for name, field in optimizer.layout.fields(a).items():
        torch.testing.assert_close(field, optimizer.layout.fields(b)[name])
    assert optimizer.layout.fields(a)[state].any()


@pytest.mark.parametrize("rule", ["adam", "sinkhorn"])
def test_a_step_is_not_taken_twice(rule: Any) -> None:
    optimizer = make(rule)
    records = start(optimizer, torch.ones(5, 16))
    optimizer.update(records, torch.arange(5), torch.ones(5, 16), 3)
    with pytest.raises(ValueError, match="5 records hold a later step than 2"):
        optimizer.update(records, torch.arange(5), torch.ones(5, 16), 3)
    if rule == "adam":
        with pytest.raises(ValueError, match="later step than 2"):
            optimizer.open(records, 3)


@pytest.mark.parametrize("rule", ["adam", "adagrad", "sinkhorn"])
def test_rules_on_records_are_the_rules_on_parameters(rule: Any) -> None:
    """Every row read in every step for the balanced momentum, whose rules differ otherwise."""
    rows, every = 60, rule == "sinkhorn"
    weights = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    optimizer = make(rule, first_row=(0, 25))
    records, at = start(optimizer, weights), reads(rows)
    tables = [torch.nn.Parameter(weights[:25].clone()), torch.nn.Parameter(weights[25:].clone())]
    named = [(f"tables.{i}", table) for i, table in enumerate(tables)]
    config = OptimizerConfig(table_optimizer=rule)
    dense = build_optimizer(named, dict.fromkeys(dict(named), "table"), config)
    for step, ids, _ in lazily(optimizer, records, (lambda _: torch.arange(rows)) if every else at, 1e-3, 60):
        gradient = torch.zeros(rows, 16)
        gradient[ids] = gradients_at(step, len(ids), size=1e-3)
        tables[0].grad, tables[1].grad = gradient[:25].clone(), gradient[25:].clone()
        dense.param_groups[0]["lr"] = rates(step)
        dense.step()
    trained = torch.cat([table.detach() for table in tables])
    torch.testing.assert_close(optimizer.weights(records, 60), trained, rtol=0, atol=5e-6)
    assert (trained - weights).abs().max() > 0.03
    if rule == "adagrad":
        sums = torch.cat([dense.state[table]["sum_sq"] for table in tables])
        torch.testing.assert_close(optimizer.layout.fields(records)["sum_sq"], sums, rtol=1e-6, atol=0)


def test_balanced_rows_rest_while_unread_and_their_momentum_decays() -> None:
    optimizer = make("sinkhorn")
    records, ids = start(optimizer, torch.zeros(20, 16)), torch.arange(20)
    optimizer.update(records, ids, gradients_at(1, 20), 1)
    before = optimizer.layout.fields(records)["momentum"].clone()
    moved = optimizer.weights(records, 1)
    torch.testing.assert_close(moved.square().mean(1).sqrt(), torch.full((20,), 0.18 * rates(1)))
    assert torch.equal(optimizer.weights(records, 31), moved)
    optimizer.update(records[:7], ids[:7], torch.zeros(7, 16), 31)
    after = optimizer.layout.fields(records)["momentum"]
    torch.testing.assert_close(after[:7], before[:7] * 0.95**30)
    assert torch.equal(after[7:], before[7:])


def test_a_layout_without_a_rule_cannot_be_trained() -> None:
    with pytest.raises(ValueError, match="read only"):
        RowOptimizer(
            RecordLayout(row_dim=4, rule=None),
            betas=(0.9, 0.95),
            eps=1e-8,
            momentum=0.95,
            rates=rates,
            seed=0,
        )
