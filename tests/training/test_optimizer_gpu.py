"""The captured update, which takes large tensors through a kernel of its own, against torch's fused AdamW."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram_lab.training.optimizer import CompositeOptimizer, OptimizerConfig, Role, build_optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROLES: dict[str, Role] = {"large": "matrix", "small": "matrix", "norm": "vector", "table": "table"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator("cuda").manual_seed(0)
        for name, shape in (("large", (2, 1024, 512)), ("small", (64, 48)), ("norm", (33,))):
            self.register_parameter(
                name, nn.Parameter(torch.randn(shape, device="cuda", generator=generator))
            )
        rows = torch.randn(2**20 // 5 + 1, 5, device="cuda", generator=generator)  # no multiple of anything
        self.table = nn.Parameter(rows)
        for parameter in self.parameters():
            parameter.grad = torch.zeros_like(parameter)


def update(net: Net, optimizer: CompositeOptimizer, steps: range) -> None:
    """Take steps with gradients, clipping and rates that depend on their number only."""
    for number in steps:
        generator = torch.Generator("cuda").manual_seed(number)
        for parameter in net.parameters():
            assert parameter.grad is not None
            parameter.grad.normal_(generator=generator).mul_(10.0 ** (number % 3 - 3))
        for group, rate in zip(optimizer.param_groups, (1e-3, 2e-3, 5e-3), strict=True):
            group["lr"] = rate * (number + 1) / 8
        optimizer.clip(0.5 + number % 2 * 1e9)
        optimizer.step()


def start(net: Net, captures: bool, state: Any = None) -> CompositeOptimizer:
    optimizer = build_optimizer(net.named_parameters(), ROLES, OptimizerConfig(betas=(0.9, 0.99)))
    optimizer.captures = captures
    if state is not None:
        optimizer.load_state_dict(state)
    return optimizer


def equal(a: Tensor, b: Tensor, name: str) -> None:
    torch.testing.assert_close(
        a, b, rtol=1e-5, atol=3e-7 * b.abs().max().item(), msg=lambda m: f"{name}: {m}"
    )


def test_a_captured_update_equals_torchs_and_either_goes_on_where_the_other_stopped() -> None:
    ours, theirs = Net(), Net()
    first = {name: p.detach().clone() for name, p in ours.named_parameters()}
    captured, launched = start(ours, True), start(theirs, False)
    for steps in (range(4), range(4, 8)):
        captured.copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in ours.parameters()}
        update(ours, captured, steps)
        update(theirs, launched, steps)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            equal(a, b, name)
            assert torch.equal(captured.copies[a], a.bfloat16())
            assert (a - first[name]).abs().mean() > 1e-4  # has moved
            for key, value in captured.state[a].items():
                equal(value, launched.state[b][key], f"{name}, {key}")
        states = copy.deepcopy((captured.state_dict(), launched.state_dict()))
        captured, launched = start(ours, True, states[1]), start(theirs, False, states[0])
