from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_optimizer import ROLES, Net, batches, train
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.sinkhorn import balance, sinkhorn_step
from engram_lab.training.optimizer import OptimizerConfig, build_optimizer, lr_multiplier

CONFIG = OptimizerConfig(table_optimizer="sinkhorn")


def algorithm_1(
    weight: np.ndarray, gradients: list[np.ndarray], lr: float, beta=0.95, gamma=0.18, tau=1e-3, steps=11
) -> np.ndarray:
    """The report's listing, line by line, in float64; returns the weights after all gradients."""
    w, m = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    for g in gradients:
        m = beta * m + (1 - beta) * g
        u = beta * m + (1 - beta) * g
        rho = np.sqrt((u**2).sum(axis=1))
        u[rho <= tau * rho.mean()] = 0.0
        for k in range(1, steps + 1):
            axis = 1 if k % 2 else 0
            u = u / (np.sqrt((u**2).sum(axis=axis, keepdims=True)) + 1e-20)
        w -= gamma * lr * np.sqrt(w.shape[1]) * u
    return w


def reference(update: np.ndarray) -> np.ndarray:
    """The balanced update: a first step from zero with everything else scaled out."""
    return -algorithm_1(np.zeros(update.shape), [update], lr=1.0, gamma=1.0)


def table(rows: int, columns: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    """Gradients whose rows and columns differ in size as those of frequent and rare n-grams do."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(spread * rng.normal(size=(rows, 1)) + spread * rng.normal(size=(1, columns)))
    return rng.normal(size=(rows, columns)) * sizes


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 12),
    unread=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    dead_columns=st.integers(0, 2),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 999),
)
def test_balance_is_the_published_listing(
    rows: int, columns: int, unread: float, dead_columns: int, spread: float, seed: int
) -> None:
    update = table(rows, columns, seed, spread)
    update[np.random.default_rng(seed).random(rows) < unread] = 0.0
    update[:, :dead_columns] = 0.0
    ours = balance(torch.from_numpy(update))
    assert ours.isfinite().all()
    np.testing.assert_allclose(ours.numpy(), reference(update), rtol=1e-9, atol=1e-12)


def test_float32_is_enough_for_a_large_table_with_rare_rows() -> None:
    update = table(30_000, 16, seed=1, spread=2.0)
    update[np.random.default_rng(2).random(30_000) < 0.8] = 0.0
    ours = balance(torch.from_numpy(update * 1e-9).float())  # gradients of a mean loss are small
    np.testing.assert_allclose(ours.numpy(), reference(update), rtol=2e-5, atol=2e-5)


def test_rows_and_columns_are_balanced_and_nothing_but_scaled() -> None:
    update = torch.from_numpy(table(500, 16, seed=3, spread=1.5))
    update[100:200] = 0.0
    balanced = balance(update)
    active = torch.cat([balanced[:100], balanced[200:]])
    torch.testing.assert_close(active.square().mean(1), torch.ones(400, dtype=torch.float64))
    assert (active.square().mean(0) - 1).abs().max() < 0.01
    # What was done is D_r U D_c with positive scales: the logarithm of the ratio is a row plus a column term.
    ratio = (active / torch.cat([update[:100], update[200:]])).log()
    residual = ratio - ratio.mean(0) - ratio.mean(1, keepdim=True) + ratio.mean()
    assert residual.abs().max() < 1e-9


@pytest.mark.parametrize("factor", [1e-12, 3e-5, 7.0, 1e9])
def test_the_size_of_the_gradient_does_not_matter(factor: float) -> None:
    update = torch.from_numpy(table(64, 8, seed=4)).float()
    torch.testing.assert_close(balance(update * factor), balance(update), rtol=1e-5, atol=1e-6)


def test_idle_rows_stay_and_the_next_larger_move_at_full_size() -> None:
    update = torch.ones(1000, 4, dtype=torch.float64)
    update[0], update[1], update[2] = 0.0, 0.99e-3, 1.01e-3  # the mean row norm is 0.2 % below a full row's
    balanced = balance(update)
    assert (balanced[:2] == 0).all()
    torch.testing.assert_close(balanced[2:].square().mean(1), torch.ones(998, dtype=torch.float64))
    assert (balance(torch.zeros(5, 4)) == 0).all()


def test_a_broken_gradient_is_not_mistaken_for_an_idle_row() -> None:
    update = torch.ones(3, 2)
    update[1, 0] = float("nan")
    assert balance(update).isnan().any()


def test_steps_follow_the_published_listing() -> None:
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(30, 6))
    gradients = [table(30, 6, seed=t) * (rng.random((30, 1)) < 0.3) for t in range(8)]
    ours, momentum = torch.from_numpy(weight.copy()), torch.zeros(30, 6, dtype=torch.float64)
    for g in gradients:
        sinkhorn_step([ours], [torch.from_numpy(g)], [momentum], lr=0.02, momentum=0.95)
    np.testing.assert_allclose(ours.numpy(), algorithm_1(weight, gradients, lr=0.02), rtol=1e-9)


def test_an_unread_row_never_moves_and_a_row_read_once_comes_to_rest() -> None:
    g = torch.Generator().manual_seed(0)
    weight, momentum = torch.randn(50, 8, generator=g), torch.zeros(50, 8)
    start, history = weight.clone(), []
    for step in range(220):
        gradient = torch.randn(50, 8, generator=g)
        gradient[0] = 0
        if step:
            gradient[1] = 0
        sinkhorn_step([weight], [gradient], [momentum], lr=0.1, momentum=0.95)
        history.append(weight[1].clone())
    assert torch.equal(weight[0], start[0])
    moves = [not torch.equal(a, b) for a, b in pairwise(history)]
    rest = moves.index(False)
    # 0.05 * 0.95^t falls to a thousandth of the others' norm, which averages some 0.16 of a gradient's.
    assert 80 < rest < 135
    assert not any(moves[rest:])


def test_half_precision_tables_are_balanced_in_single() -> None:
    update = torch.from_numpy(table(400, 16, seed=6)).bfloat16()
    balanced = balance(update)
    assert balanced.dtype == torch.float32
    np.testing.assert_allclose(balanced.numpy(), reference(update.double().numpy()), rtol=1e-4, atol=1e-5)
    weight, momentum = torch.zeros(400, 16, dtype=torch.bfloat16), torch.zeros(400, 16, dtype=torch.bfloat16)
    sinkhorn_step([weight], [update], [momentum], lr=1.0, momentum=0.95)
    assert weight.float().square().mean().sqrt().item() == pytest.approx(0.18, rel=0.01)


def test_only_tables_are_balanced() -> None:
    optimizer = build_optimizer(Net().named_parameters(), ROLES, CONFIG)
    rules = {g["name"]: (g["rule"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert rules == {
        "matrices": ("adamw", 3e-3, 0.1),
        "vectors": ("adamw", 3e-3, 0.0),
        "tables": ("sinkhorn", 15e-3, 0.0),
    }
    ours, plain = Net(), Net()
    train(ours, build_optimizer(ours.named_parameters(), ROLES, CONFIG), batches(1))
    train(plain, build_optimizer(plain.named_parameters(), ROLES, OptimizerConfig()), batches(1))
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b) == (name != "table"), name
    moved = (ours.table - Net().table).square().mean(1).sqrt()
    read = sorted({int(i) for i in batches(1)[0] % 31})
    torch.testing.assert_close(moved[read], torch.full((len(read),), 0.18 * 15e-3), rtol=1e-4, atol=0)
    assert int((moved > 0).sum()) == len(read)


def test_training_with_balanced_tables_learns() -> None:
    net = Net()
    losses = train(net, build_optimizer(net.named_parameters(), ROLES, CONFIG), batches(60))
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])

    # The table alone: each row is to become its target.
    g = torch.Generator().manual_seed(1)
    targets, rows = torch.randn(40, 8, generator=g), torch.nn.Parameter(torch.zeros(40, 8))
    config = OptimizerConfig(table_optimizer="sinkhorn", learning_rate=0.02, decay_fraction=0.5)
    optimizer = build_optimizer([("table", rows)], {"table": "table"}, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier(config, 300))
    errors = []
    for _ in range(300):
        ids = torch.randint(0, 40, (10,), generator=g)
        optimizer.zero_grad()
        loss = (rows[ids] - targets[ids]).square().mean()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(loss.item())
    assert np.mean(errors[-10:]) < 0.02 * np.mean(errors[:10])


def test_state_dict_round_trip_is_exact() -> None:
    data, straight = batches(20), Net()

    def steps(net: Net, optimizer: Any, schedule: Any, data: list[Tensor]) -> list[float]:
        losses = []
        for ids in data:
            losses += train(net, optimizer, [ids])
            schedule.step()
        return losses

    def build(net: Net) -> tuple[Any, Any]:
        optimizer = build_optimizer(net.named_parameters(), ROLES, CONFIG)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier(CONFIG, 20))

    optimizer, schedule = build(straight)
    expected = steps(straight, optimizer, schedule, data[:9])
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    expected += steps(straight, optimizer, schedule, data[9:])

    resumed = Net(seed=99)
    resumed.load_state_dict(saved[0])
    optimizer, schedule = build(resumed)
    optimizer.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    assert steps(resumed, optimizer, schedule, data[9:]) == expected[9:]
    assert list(optimizer.state[resumed.table]) == ["momentum"]
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_lightning_clips_steps_and_schedules() -> None:
    """Automatic optimisation, norm clipping over tables too and LambdaLR give what the plain loop gives."""
    from lightning.pytorch import LightningModule, Trainer

    data, clip = batches(6), 0.05

    def both(net: Net) -> tuple[Any, Any]:
        optimizer = build_optimizer(net.named_parameters(), ROLES, CONFIG)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier(CONFIG, len(data)))

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, ids: Tensor) -> Tensor:
            return self.net.loss(ids)

        def configure_optimizers(self) -> Any:
            optimizer, schedule = both(self.net)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module, plain = Module(), Net()
    trainer = Trainer(
        max_steps=len(data),
        accelerator="cpu",
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]

    optimizer, schedule = both(plain)
    for ids in data:
        train(plain, optimizer, [ids], clip=clip)
        schedule.step()
    for (name, a), b in zip(module.net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_misspelt_rule_gets_a_sentence() -> None:
    with pytest.raises(
        UserError, match=r"table_optimizer is 'sinkhron'.*'sinkhorn'. Did you mean 'sinkhorn'"
    ):
        OptimizerConfig(table_optimizer="sinkhron")  # type: ignore[arg-type]
