"""The GPU kernels of experts, router and loss against plain float32 sums over the same bfloat16 numbers."""

import pytest
import torch
import torch.nn.functional as F

from engram_lab.errors import UserError
from engram_lab.model import experts, loss

if experts.kernels is not None:
    from engram_lab.model.router_triton import TILE, route

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or experts.kernels is None, reason="needs a CUDA device and triton"
    ),
]


def off(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


SIZES = [
    (300, 3, 7, 64, 32),
    (1000, 6, 102, 256, 128),
    (64, 1, 300, 128, 96),
    (500, 4, 1000, 64, 64),
    (700, 2, 5, 512, 128),  # wide enough for large blocks
    (300, 2, 9, 512, 96),
]


def parts(N, K, E, D, H, softmax):
    """Random tokens, router, bias and experts on the GPU, with a bias that changes many choices."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, device="cuda", generator=generator) * scale

    x = draw(N, D).bfloat16()
    gate_up, out = (draw(E, a, b, scale=a**-0.5).bfloat16().float() for a, b in ((D, 2 * H), (H, D)))
    return x, draw(E, D, scale=D**-0.5), draw(E, scale=0.3 / (E if softmax else 1)), gate_up, out


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize(("peaks", "push"), [(1, 1), (4, 1), (4, 10)])
def test_weights_are_of_the_scores_however_large_the_bias(peaks, push, softmax):
    x, weight, bias, _, _ = parts(64, 4, 200, 64, 32, True)
    weight, bias = peaks * weight, bias / bias.std() * push
    found = route(x, weight, bias, 4, softmax)
    logits = x.double() @ weight.double().t()
    scores = (logits.softmax(-1) if softmax else logits.sigmoid()).gather(1, found.chosen.long())
    assert off(found.weights, scores / scores.sum(dim=1, keepdim=True)) < 1e-4


@pytest.mark.parametrize("K", [1, 3])
def test_scores_that_vanish_beside_a_bias_still_make_weights(K):
    x, weight = torch.ones(5, 64, device="cuda").bfloat16(), torch.full((20, 64), -0.5, device="cuda")
    bias = torch.zeros(20, device="cuda").index_fill_(0, torch.arange(K, device="cuda"), 9.0)
    found = route(x, weight, bias, K, False)
    torch.testing.assert_close(found.weights, torch.full((5, K), 1 / K, device="cuda"))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("N", "K", "E", "D", "H"), SIZES)
def test_choices_and_their_order(N, K, E, D, H, softmax):
    x, weight, bias, _, _ = parts(N, K, E, D, H, softmax)
    found = route(x, weight, bias, K, softmax)
    logits = x.double() @ weight.double().t()
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    chosen = found.chosen.long()
    best = (scores + bias).topk(K, dim=-1)
    torch.testing.assert_close((scores + bias).gather(1, chosen), best.values, rtol=1e-4, atol=1e-6)
    assert (chosen == best.indices).float().mean() > 0.999
    weights = scores.gather(1, chosen)
    assert off(found.weights, weights / weights.sum(dim=1, keepdim=True)) < 1e-4
    flat, rows = chosen.flatten(), torch.arange(N * K, device="cuda")
    assert torch.equal(found.order.long(), flat.argsort(stable=True))
    assert torch.equal(found.order[found.places.long()].long(), rows)
    assert torch.equal(found.loads.long(), torch.bincount(flat, minlength=E))
    assert torch.equal(found.ends.long(), found.loads.long().cumsum(0))
    listed = [
        (e, row)
        for e, first, end, _ in found.tiles.tolist()
        if e >= 0
        for row in range(first, min(first + TILE, end))
    ]
    assert listed == list(zip(flat.sort().values.tolist(), rows.tolist(), strict=True))


def test_of_equal_scores_the_first_experts_are_chosen_and_broken_numbers_stay_in_range():
    x, weight, bias, _, _ = parts(200, 4, 20, 64, 32, False)
    assert torch.equal(
        route(x, weight * 0, bias * 0, 4, False).chosen[7].long(), torch.arange(4, device="cuda")
    )
    x[3], x[4] = float("nan"), float("inf")
    found = route(x, weight, bias, 4, False)
    assert found.weights[3].isnan().all()
    assert found.chosen.min() >= 0
    assert found.chosen.max() < 20
    assert torch.equal(found.order.sort().values.long(), torch.arange(800, device="cuda"))


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize(("N", "K", "E", "D", "H"), SIZES)
def test_routed_experts_equal_a_loop(N, K, E, D, H, softmax):
    x, weight, bias, gate_up, out = parts(N, K, E, D, H, softmax)
    more = torch.randn(N, D, device="cuda").bfloat16()
    inputs = x, weight, gate_up, out, more = tuple(
        t.requires_grad_() for t in (x, weight, gate_up, out, more)
    )

    def routed():
        return experts.kernels.routed_experts(x, weight, bias, gate_up, out, K, softmax=softmax, more=more)

    y, loads, chosen = routed()
    assert torch.equal(loads.long(), torch.bincount(chosen.flatten(), minlength=E))
    logits = x.float() @ weight.t()
    scores = logits.softmax(-1) if softmax else logits.sigmoid()
    weights = scores.gather(1, chosen.long())
    weights = weights / weights.sum(dim=1, keepdim=True)
    expected = more.float()
    for k in range(K):
        for e in chosen[:, k].unique().tolist():
            n = (chosen[:, k] == e).nonzero().squeeze(1)
            gate, up = (x[n].float() @ gate_up[e]).chunk(2, dim=-1)
            expected = expected.index_add(0, n, weights[n, k, None] * ((F.silu(gate) * up) @ out[e]))
    pull = torch.randn(N, D, device="cuda").bfloat16()
    assert off(y, expected) < 1e-2
    got = torch.autograd.grad((y * pull).sum(), inputs)
    wanted = torch.autograd.grad((expected * pull.float()).sum(), inputs)
    assert [g.dtype for g in got] == [torch.bfloat16, *3 * [torch.float32], torch.bfloat16]
    for a, b in zip(got, wanted, strict=True):  # one choice weighs 1 whatever the router says
        assert off(a, b) < 1e-2 if b.norm() > 1e-3 else a.norm() < 1e-3
    again = torch.autograd.grad((routed()[0] * pull).sum(), inputs)
    others = tuple(-2 * matrix.detach().bfloat16() for matrix in (gate_up, out))
    halves = [-0.5 * copy for copy in others]
    of_copies = experts.kernels.routed_experts(x, weight, bias, *halves, K, softmax=softmax, narrow=others)[0]
    directly = experts.kernels.routed_experts(
        x, weight, bias, *(copy.float() for copy in others), K, softmax=softmax
    )[0]
    assert torch.equal(of_copies, directly)  # the copies are read, whatever the matrices hold
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@torch.no_grad()
def test_matrices_of_more_than_2_to_the_31_values_are_found():
    E, D, H = 1024, 1024, 2048
    x, weight = torch.randn(200, D, device="cuda").bfloat16(), torch.randn(E, D, device="cuda") * D**-0.5
    bias = torch.zeros(E, device="cuda").index_fill_(0, torch.tensor(E - 1, device="cuda"), 9.0)
    gate_up = torch.zeros(E, D, 2 * H, device="cuda", dtype=torch.bfloat16)
    out = torch.zeros(E, H, D, device="cuda", dtype=torch.bfloat16)
    gate_up[-1].normal_(std=D**-0.5)
    out[-1].normal_(std=H**-0.5)
    y, loads, _ = experts.kernels.routed_experts(x, weight, bias, gate_up, out, 1, softmax=False)
    assert loads[-1] == 200
    gate, up = (x.float() @ gate_up[-1].float()).chunk(2, dim=-1)
    assert off(y, (F.silu(gate) * up) @ out[-1].float()) < 1e-2


def test_more_tokens_than_places_fit_32_bits_are_refused():
    _, weight, bias, gate_up, out = parts(1, 2, 4, 64, 32, False)
    x = torch.zeros(1, 64, device="cuda", dtype=torch.bfloat16).expand(2**24, 64)
    with pytest.raises(UserError, match=r"16,777,216 tokens pass .* at most 16,777,215 of them can"):
        experts.kernels.routed_experts(x, weight, bias, gate_up, out, 2, softmax=False)


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
