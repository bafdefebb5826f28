"""The GPU's look-up and its gradient against plain sums in float64."""

import pytest
import torch

from engram_lab.memory import resident

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or resident.kernels is None, reason="needs a CUDA device and triton"
    ),
]


@pytest.mark.parametrize(
    ("ids", "rows", "width"),
    [
        (torch.arange(600).view(3, 50, 4) % 37, 40, 16),
        ((torch.rand(100_000, generator=torch.Generator().manual_seed(0)) ** 4 * 900).int(), 1000, 16),
        (torch.zeros(70_000, dtype=torch.int64), 1, 20),  # one run over all slices
        (torch.arange(2112).div(704, rounding_mode="floor"), 3, 16),  # runs that end with a slice
        (torch.randperm(3000, generator=torch.Generator().manual_seed(0))[:640], 3000, 256),
        (torch.tensor([4]), 5, 16),
    ],
)
def test_rows_and_their_gradient(ids, rows, width):
    ids = ids.cuda()
    weight = torch.randn(rows, width, device="cuda", requires_grad=True)
    found = resident.look_up(ids, weight)
    assert torch.equal(found, weight[ids.long()])
    pull = torch.randn_like(found)
    (got,) = torch.autograd.grad(found, weight, pull)
    flat, parts = ids.flatten().long(), pull.double().view(-1, width)
    wanted = torch.zeros(rows, width, dtype=torch.float64, device="cuda").index_add(0, flat, parts)
    size = torch.zeros_like(wanted).index_add(0, flat, parts.abs())
    assert ((got - wanted).abs() <= 1e-6 * size).all()
    (again,) = torch.autograd.grad(resident.look_up(ids, weight), weight, pull)
    assert torch.equal(got, again)


def test_rows_that_lie_apart_or_across():
    records = torch.randn(50, 36, device="cuda")
    ids = torch.arange(700, device="cuda").view(7, 100) % 47
    for rows in (records[:, :16], records[:, 4:9], records.t(), records[:1].expand(50, 36)):
        weight = rows.detach().requires_grad_()
        ids_here = ids % len(rows)
        found = resident.look_up(ids_here, weight)
        assert torch.equal(found, rows[ids_here])
        (got,) = torch.autograd.grad(found.sum(), weight)
        counts = torch.bincount(ids_here.flatten(), minlength=len(rows))
        assert torch.equal(got, counts.float().unsqueeze(1).expand_as(rows))
