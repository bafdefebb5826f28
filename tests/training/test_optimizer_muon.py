from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engram_lab.training.muon import muon_step, orthogonalise
from engram_lab.training.optimizer import OptimizerConfig, build_optimizer

SHAPES = [(16, 16), (24, 16), (16, 24), (16, 24), (48, 8)]


def run(parameters: list[Tensor], gradients: list[list[Tensor]], **settings: float) -> list[Tensor]:
    momenta = [torch.zeros_like(p) for p in parameters]
    for step in gradients:
        muon_step(parameters, step, momenta, **settings)  # type: ignore[arg-type]
    return parameters


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equals_torch_muon_on_matrices() -> None:
    ours = [random(shape, i) for i, shape in enumerate(SHAPES)]
    theirs = [torch.nn.Parameter(p.clone()) for p in ours]
    gradients = [[random(shape, 100 * t + i) for i, shape in enumerate(SHAPES)] for t in range(4)]
    start = [p.clone() for p in ours]
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in gradients:
        for p, g in zip(theirs, step, strict=True):
            p.grad = g.clone()
        reference.step()
    run(ours, gradients, lr=0.02, weight_decay=0.1, momentum=0.95)
    for a, b, origin in zip(ours, theirs, start, strict=True):
        moved = (b - origin).norm()
        # Both round to bfloat16 (eps 2^-8) at other places; a wrong rule is off by its whole step.
        assert (a - b).norm() / moved < 0.02


def test_an_expert_stack_is_its_experts_one_by_one() -> None:
    stack = random((5, 24, 16), 1)
    gradients = [random((5, 24, 16), 10 + t) for t in range(3)]
    alone = [stack[e].clone() for e in range(5)]
    run([stack], [[g] for g in gradients], lr=0.02, weight_decay=0.1, momentum=0.9)
    run(alone, [list(g) for g in gradients], lr=0.02, weight_decay=0.1, momentum=0.9)
    torch.testing.assert_close(stack, torch.stack(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(16, 24), (3, 24, 16)])
@pytest.mark.parametrize("rate", [0.0137, torch.tensor(0.0137)])
def test_what_is_orthogonal_is_scaled_in_float32(shape: tuple[int, ...], rate: float | Tensor) -> None:
    gradient = random(shape, 7)
    wide = gradient if shape[-1] == 24 else gradient.mT
    expected = -0.0137 * 0.2 * 24**0.5 * orthogonalise(wide.reshape(-1, 16, 24)).float().view(wide.shape)
    (moved,) = run([torch.zeros(shape)], [[gradient]], lr=rate, weight_decay=0.0, momentum=0.0)  # type: ignore[arg-type]
    torch.testing.assert_close(moved if shape[-1] == 24 else moved.mT, expected, rtol=1e-6, atol=0)


def test_singular_values_go_to_one_and_directions_stay() -> None:
    matrix = random((1, 32, 64), 3)
    result = orthogonalise(matrix)[0].float()
    assert torch.linalg.svdvals(result).sub(1).abs().max() < 0.35
    u, _, v = torch.linalg.svd(matrix[0], full_matrices=False)
    inner = u.T @ result @ v.T
    assert inner.diagonal().min() > 0.6
    assert (inner - inner.diagonal().diag()).abs().max() < 0.05


def test_zero_gradient_of_an_unused_expert_moves_nothing() -> None:
    stack = random((2, 8, 16), 1)
    before = stack.clone()
    gradient = random((2, 8, 16), 2)
    gradient[1] = 0
    run([stack], [[gradient]], lr=0.02, weight_decay=0.0, momentum=0.95)
    assert torch.equal(stack[1], before[1])
    assert not torch.equal(stack[0], before[0])
    assert stack.isfinite().all()


def test_step_size_matches_adamw() -> None:
    """The adjusted step has the root mean square 0.2 lr that AdamW's typically has, whatever the shape."""
    for shape in [(64, 64), (64, 256), (256, 64)]:
        parameter = torch.zeros(shape)
        run([parameter], [[random(shape, 5)]], lr=1.0, weight_decay=0.0, momentum=0.95)
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.2)


def test_other_shapes_are_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="Muon takes matrices"):
        build_optimizer([("w", parameter)], {"w": "matrix"}, OptimizerConfig(matrix_optimizer="muon"))
