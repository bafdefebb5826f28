import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from engram_lab.errors import UserError
from engram_lab.model.experts import Experts, FeedForwardConfig, SwiGLU, feed_forward, sequence_imbalance
from engram_lab.model.grouped import grouped_matmul, load


def build(**settings) -> Experts:
    torch.manual_seed(0)
    config = FeedForwardConfig(**{"experts": 7, "top_k": 3, "expert_hidden": 5, **settings})
    layer = Experts(6, config, config.shared_width(0)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def reference(layer: Experts, x: torch.Tensor, kind: str) -> torch.Tensor:
    """One token and one expert at a time."""
    rows = []
    for token in x:
        logits = layer.router.weight @ token
        scores = logits.sigmoid() if kind == "sigmoid" else logits.softmax(0)
        chosen = sorted(range(len(scores)), key=lambda e: -(scores[e] + layer.router.bias[e]).item())
        chosen = chosen[: layer.router.top_k]
        mass = sum(scores[e] for e in chosen)
        out = 0
        for e in chosen:
            gate, up = (token @ layer.gate_up[e]).chunk(2)
            out = out + scores[e] / mass * ((F.silu(gate) * up) @ layer.out[e])
        gate, up = (layer.shared.gate_up.weight @ token).chunk(2)
        rows.append(out + layer.shared.out.weight @ (F.silu(gate) * up))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_values_and_gradients_equal_a_plain_loop(kind):
    layer = build(router=kind)
    layer.router.bias.normal_()
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    y, expected = layer(x), reference(twin, x_twin.flatten(0, 1), kind).view(2, 9, 6)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    pull = torch.randn_like(y)
    (y * pull).sum().backward()
    (expected * pull).sum().backward()
    torch.testing.assert_close(x.grad, x_twin.grad, rtol=1e-10, atol=1e-10)
    for (name, parameter), other in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_grouped_matmul_handles_idle_experts(counts, seed):
    torch.manual_seed(seed)
    x = torch.randn(sum(counts), 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), 4, 3, dtype=torch.float64, requires_grad=True)
    y = grouped_matmul(x, weight, torch.tensor(counts))
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    expected = torch.einsum("ni,nio->no", x, weight[owner])
    torch.testing.assert_close(y, expected)
    got = torch.autograd.grad(y.square().sum(), (x, weight))
    wanted = torch.autograd.grad(expected.square().sum(), (x, weight))
    torch.testing.assert_close(got, wanted)


def test_compiled_experts_are_not_compiled_anew_for_another_load():
    layer = build()
    compilations = CompileCounter()
    compiled = torch.compile(layer.forward, backend=compilations, dynamic=False)
    known = []
    for seed in range(4):
        x = torch.randn(2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(x), layer(x))
        known.append(compilations.frame_count)
    assert known[0] > 0
    assert known == known[:1] * 4


def test_no_token_is_dropped_when_all_choose_the_same_experts():
    layer = build()
    layer.router.bias[:3] = 100.0
    x = torch.randn(1, 50, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), reference(layer, x[0], "sigmoid").unsqueeze(0))
    assert layer.router.counts.tolist() == [50, 50, 50, 0, 0, 0, 0]


def test_bias_changes_the_choice_but_not_the_weights():
    layer = build(top_k=7)
    x = torch.randn(4, 6, dtype=torch.float64)
    before = layer(x)
    layer.router.bias.normal_()
    torch.testing.assert_close(layer(x), before)


def test_bias_moves_against_the_load_and_balances_it():
    layer = build(bias_step=0.02)
    x = torch.randn(1, 400, 6, dtype=torch.float64) + 1.0
    layer(x)
    counts = layer.router.counts.clone()
    assert counts.sum() == 400 * 3
    layer.router.update_bias()
    excess = counts - counts.double().mean()
    assert torch.equal(layer.router.bias.sign(), -excess.sign())
    torch.testing.assert_close(layer.router.bias.abs(), torch.where(excess == 0, 0.0, 0.02).double())
    assert layer.router.counts.sum() == 0
    for _ in range(200):
        layer(x)
        last = layer.router.counts.clone()
        layer.router.update_bias()
    assert last.max() < 0.7 * counts.max()


def test_evaluation_leaves_the_load_alone():
    layer = build().eval()
    layer(torch.randn(3, 6, dtype=torch.float64))
    assert layer.router.counts.sum() == 0


def test_sequence_imbalance_is_the_published_sum():
    scores = torch.rand(3, 10, 6, dtype=torch.float64, requires_grad=True)
    chosen = scores.topk(2, dim=-1).indices
    expected = 0
    for b in range(3):
        for e in range(6):
            f = 6 / (2 * 10) * (chosen[b] == e).sum()
            p = sum(scores[b, t, e] / scores[b, t].sum() for t in range(10)) / 10
            expected = expected + f * p / 3
    got = sequence_imbalance(scores, chosen)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(value, scores)[0] for value in (got, expected)]
    torch.testing.assert_close(*grads)


def test_sequence_imbalance_runs_from_one_to_experts_over_choices():
    every_pair = torch.tensor([[[0, 1], [2, 3], [4, 5]]])
    assert sequence_imbalance(torch.ones(1, 3, 6), every_pair).item() == pytest.approx(1)
    greedy = torch.tensor([1.0, 1.0, 0, 0, 0, 0]).expand(1, 3, -1)
    assert sequence_imbalance(greedy, torch.tensor([[[0, 1]] * 3])).item() == pytest.approx(3)


def test_balance_loss_evens_the_load():
    """Without the bias, descending the imbalance alone spreads tokens that at first crowd together."""
    layer = build(balance_loss=1.0, bias_step=0.0)
    x = torch.randn(2, 200, 6, dtype=torch.float64) + 1.0
    layer(x)
    before = layer.router.counts.max().item()
    optimizer = torch.optim.SGD([layer.router.weight], lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        layer(x)
        layer.router.imbalance.backward()
        optimizer.step()
    layer.router.counts.zero_()
    layer(x)
    assert layer.router.counts.max().item() < 0.8 * before


def test_load_counts_every_choice():
    chosen = torch.tensor([[0, 2], [2, 3], [2, 0]])
    assert load(chosen, 5).tolist() == [2, 0, 3, 1, 0]


def test_widths_of_dense_and_shared_layers():
    config = FeedForwardConfig(
        experts=8, top_k=2, expert_hidden=10, leading_dense_layers=1, shared_hidden=(0, 12, 0)
    )
    dense, wide, bare = (feed_forward(6, config, layer) for layer in range(3))
    assert isinstance(dense, SwiGLU)
    assert dense.out.weight.shape == (6, 30)
    assert wide.shared.out.weight.shape == (6, 12)
    assert bare.shared is None
    assert bare(torch.zeros(2, 6)).shape == (2, 6)
    with pytest.raises(UserError, match=r"shared_hidden has 3 widths, but block 3"):
        config.shared_width(3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"experts": 4, "top_k": 5}, "top_k is 5.* experts = 4; the nearest is 4"),
        ({"experts": -1}, "experts is -1"),
        ({"expert_hidden": 0}, "expert_hidden is 0"),
        ({"router": "tanh"}, "router is 'tanh'"),
        ({"shared_hidden": (4, -1)}, "no width may be negative"),
        ({"dense_hidden": 0}, "dense_hidden is 0"),
        ({"balance_loss": -0.1}, "balance_loss is -0.1"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(UserError, match=words):
        FeedForwardConfig(**settings)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_kernel_equals_the_loop():
    torch.manual_seed(0)
    counts = torch.tensor([0, 17, 64, 3])
    x = torch.randn(84, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(4, 64, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    fast = grouped_matmul(x, weight, counts.cuda())
    slow = grouped_matmul(x.float(), weight.float(), counts.cuda())
    torch.testing.assert_close(fast.float(), slow, rtol=2e-2, atol=2e-2)
    got = torch.autograd.grad(fast.float().square().sum(), (x, weight))
    wanted = torch.autograd.grad(slow.square().sum(), (x, weight))
    torch.testing.assert_close(got, wanted, rtol=5e-2, atol=1.0)
