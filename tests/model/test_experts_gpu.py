"""The GPU kernels of experts, router and loss against plain float32 sums over the same bfloat16 numbers."""

import pytest
import torch
import torch.nn.functional as F

from engram_lab.model import experts, loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or experts.kernels is None, reason="needs a CUDA device and triton"
    ),
]


def off(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


SIZES = [(300, 3, 7, 64, 32), (1000, 6, 102, 256, 128), (64, 1, 300, 128, 96)]


@pytest.mark.parametrize(("N", "K", "E", "D", "H"), SIZES)
def test_routed_experts_equal_a_loop(N, K, E, D, H):
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    try:
        scores = torch.rand(N, E)
        bias = torch.randn(E) * 0.3
        chosen = experts.kernels.top_k(scores, bias, K)
        assert torch.equal(chosen, (scores + bias).topk(K, dim=-1).indices)
        plan = experts.kernels.arrange(chosen, E)
        assert torch.equal(plan[0].long(), chosen.flatten().argsort(stable=True))
        assert torch.equal(plan[0][plan[1].long()].long(), torch.arange(N * K))
        assert torch.equal(plan[2].long(), torch.bincount(chosen.flatten(), minlength=E))
        x = torch.randn(N, D).bfloat16().requires_grad_()
        gate_up = (torch.randn(E, D, 2 * H) * D**-0.5).bfloat16().float().requires_grad_()
        out = (torch.randn(E, H, D) * H**-0.5).bfloat16().float().requires_grad_()
        weights = torch.rand(N, K, requires_grad=True)
        narrow = gate_up.detach().bfloat16(), out.detach().bfloat16()
        y = experts.kernels.routed_swiglu(x, gate_up, out, *narrow, weights, *plan)
        expected = torch.zeros(N, D)
        for k in range(K):
            for e in chosen[:, k].unique().tolist():
                n = (chosen[:, k] == e).nonzero().squeeze(1)
                gate, up = (x[n].float() @ gate_up[e]).chunk(2, dim=-1)
                part = weights[n, k, None] * ((F.silu(gate) * up) @ out[e])
                expected = expected.index_add(0, n, part)
        pull = torch.randn(N, D).bfloat16()
        inputs = (x, gate_up, out, weights)
        assert off(y, expected) < 1e-2
        got = torch.autograd.grad((y * pull).sum(), inputs)
        wanted = torch.autograd.grad((expected * pull.float()).sum(), inputs)
        assert all(off(a, b) < 1e-2 for a, b in zip(got, wanted, strict=True))
        assert got[1].dtype == torch.float32
    finally:
        torch.set_default_device(None)


def test_router_logits_are_nearly_those_of_float32():
    torch.manual_seed(0)
    x = torch.randn(500, 256, device="cuda").bfloat16()
    weight = torch.randn(102, 256, device="cuda")
    assert off(experts.kernels.router_logits(x, weight), x.double() @ weight.double().t()) < 1e-5


@pytest.mark.parametrize(("V", "D"), [(1000, 64), (40_000, 128)])
def test_loss_and_its_gradients(V, D):
    torch.manual_seed(0)
    h = torch.randn(700, D, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(V, D, device="cuda") * 0.1).bfloat16().float().requires_grad_()
    targets = torch.randint(V, (700,), device="cuda")
    found = loss.linear_cross_entropy(h, weight, targets)
    expected = F.cross_entropy(h.float() @ weight.t(), targets)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    got = torch.autograd.grad(found, (h, weight))
    wanted = torch.autograd.grad(expected, (h, weight))
    assert all(off(a, b) < 1e-2 for a, b in zip(got, wanted, strict=True))
    with torch.no_grad():
        each = loss.linear_cross_entropy(h, weight, targets, reduction="none")
    torch.testing.assert_close(each.mean(), expected.detach(), rtol=1e-3, atol=1e-3)
