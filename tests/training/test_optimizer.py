from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engram_lab.errors import UserError
from engram_lab.training.optimizer import OptimizerConfig, Role, build_optimizer, lr_multiplier

ROLES: dict[str, Role] = {
    "embedding.weight": "embedding",
    "table": "table",
    "experts": "matrix",
    "square": "matrix",
    "tall": "matrix",
    "wide": "matrix",
    "norm": "vector",
}


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.embedding = nn.Embedding(17, 16)
        self.table = nn.Parameter(torch.randn(31, 16, generator=g))
        self.experts = nn.Parameter(torch.randn(3, 16, 24, generator=g) * 0.1)
        self.square = nn.Parameter(torch.randn(16, 16, generator=g) * 0.1)
        self.tall = nn.Parameter(torch.randn(24, 16, generator=g) * 0.1)
        self.wide = nn.Parameter(torch.randn(16, 24, generator=g) * 0.1)
        self.norm = nn.Parameter(torch.ones(16))
        with torch.no_grad():
            self.embedding.weight.normal_(generator=g)

    def loss(self, ids: Tensor) -> Tensor:
        x = (self.embedding(ids % 17) + self.table[ids % 31]) * self.norm
        hidden = torch.einsum("bd,edh->bh", x, self.experts) + x @ self.wide
        x = x @ self.square + hidden @ self.tall
        return x.square().mean()


def batches(n: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(0, 1000, (8,), generator=g) for _ in range(n)]


def train(net: Net, optimizer: Any, data: list[Tensor], clip: float = 1.0) -> list[float]:
    losses = []
    for ids in data:
        optimizer.zero_grad()
        loss = net.loss(ids)
        loss.backward()
        # In the order of the groups, as Lightning does: the order of the sum shows in the last bit.
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def groups_by_hand(net: Net, config: OptimizerConfig) -> list[dict[str, Any]]:
    lr = config.learning_rate
    return [
        {"params": [net.experts, net.square, net.tall, net.wide], "lr": lr, "weight_decay": 0.1},
        {"params": [net.embedding.weight, net.norm], "lr": lr, "weight_decay": 0.0},
        {"params": [net.table], "lr": 5 * lr, "weight_decay": 0.0},
    ]


def test_adamw_equals_torch_bit_for_bit() -> None:
    config = OptimizerConfig()
    ours, theirs = Net(), Net()
    optimizer = build_optimizer(ours.named_parameters(), ROLES, config)
    reference = torch.optim.AdamW(
        groups_by_hand(theirs, config), betas=config.betas, eps=config.eps, fused=True
    )
    assert train(ours, optimizer, batches(25)) == train(theirs, reference, batches(25))
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("matrices", ["adamw", "muon"])
@pytest.mark.parametrize("tables", ["adam", "sinkhorn", "adagrad"])
def test_clipping_within_the_step_equals_clipping_before_it(matrices: Any, tables: Any, fused: bool) -> None:
    """Every rule sees the clipped gradient."""
    config = OptimizerConfig(matrix_optimizer=matrices, table_optimizer=tables)
    ours, theirs = Net(), Net()
    optimizer, reference = (build_optimizer(n.named_parameters(), ROLES, config) for n in (ours, theirs))
    optimizer.gradient_scale = torch.tensor(1.0)
    for group in (*optimizer.param_groups, *reference.param_groups):
        group["fused"] = fused
    for scale, ids in zip((0.05, 0.5, 1.0, 0.02, 0.4), batches(5), strict=True):
        for net in (ours, theirs):
            net.zero_grad()
            net.loss(ids).backward()
        for gradient in (p.grad for p in theirs.parameters() if p.grad is not None):
            gradient *= scale
        optimizer.gradient_scale.fill_(scale)
        optimizer.step()
        reference.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            for key, value in optimizer.state[a].items():
                torch.testing.assert_close(value, reference.state[b][key], rtol=1e-4, atol=1e-9, msg=name)
            if matrices == "adamw":  # Muon's iteration in bfloat16 shows the last bit of its momentum
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
            a.data.copy_(b)


@pytest.mark.parametrize("matrices", ["adamw", "muon"])
@pytest.mark.parametrize("tables", ["adam", "sinkhorn", "adagrad"])
def test_rates_that_a_graph_reads_equal_those_the_host_gives(matrices: Any, tables: Any) -> None:
    config = OptimizerConfig(matrix_optimizer=matrices, table_optimizer=tables)
    ours, theirs = Net(), Net()
    optimizer, reference = (build_optimizer(n.named_parameters(), ROLES, config) for n in (ours, theirs))
    optimizer.captures = True
    optimizer.copies = {p: torch.empty_like(p, dtype=torch.bfloat16) for p in ours.parameters()}
    for number, ids in enumerate(batches(6)):
        for net, its in ((ours, optimizer), (theirs, reference)):
            for place, group in enumerate(its.param_groups):
                group["lr"] = 2.0 ** -(6 + place + max(number - 2, 0))  # the same in float32; moves from 3 on
            net.zero_grad()
            net.loss(ids).backward()
            its.clip(0.05)
            its.step()
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)
            assert torch.equal(optimizer.copies[a], a.bfloat16())
            a.data.copy_(b)  # Muon's iteration in bfloat16 shows the last bit of what it starts from


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_clipping_takes_any_precision(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    optimizer = build_optimizer(net.named_parameters(), ROLES, OptimizerConfig())
    net.loss(batches(1)[0]).backward()
    gradients = {name: p.grad.double().clone() for name, p in net.named_parameters() if p.grad is not None}
    norm = optimizer.clip(0.05).item()
    optimizer.step()
    assert norm > 0.1
    for name, p in net.named_parameters():
        expected = (1 - 0.9) * 0.05 / norm * gradients[name]
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg"].double(), expected, rtol=0.02, atol=0, msg=name
        )


def test_groups_rates_and_names() -> None:
    optimizer = build_optimizer(Net().named_parameters(), ROLES, OptimizerConfig(learning_rate=1e-2))
    seen = {g["name"]: (g["lr"], g["weight_decay"], sorted(g["param_names"])) for g in optimizer.param_groups}
    assert seen == {
        "matrices": (1e-2, 0.1, ["experts", "square", "tall", "wide"]),
        "vectors": (1e-2, 0.0, ["embedding.weight", "norm"]),
        "tables": (5e-2, 0.0, ["table"]),
    }


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_state_dict_round_trip_is_exact(rule: Any) -> None:
    config, data = OptimizerConfig(matrix_optimizer=rule), batches(20)
    straight = Net()
    schedule_of = lambda o: torch.optim.lr_scheduler.LambdaLR(o, lr_multiplier(config, 20))  # noqa: E731

    def steps(net: Net, optimizer: Any, schedule: Any, data: list[Tensor]) -> list[float]:
        losses = []
        for ids in data:
            losses += train(net, optimizer, [ids])
            schedule.step()
        return losses

    optimizer = build_optimizer(straight.named_parameters(), ROLES, config)
    schedule = schedule_of(optimizer)
    expected = steps(straight, optimizer, schedule, data[:9])
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict(), schedule.state_dict()))
    expected += steps(straight, optimizer, schedule, data[9:])

    resumed = Net(seed=99)
    resumed.load_state_dict(saved[0])
    optimizer = build_optimizer(resumed.named_parameters(), ROLES, config)
    schedule = schedule_of(optimizer)
    optimizer.load_state_dict(saved[1])
    schedule.load_state_dict(saved[2])
    assert steps(resumed, optimizer, schedule, data[9:]) == expected[9:]
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule_scales_every_group() -> None:
    config = OptimizerConfig(warmup_steps=4, decay_fraction=0.0)
    optimizer = build_optimizer(Net().named_parameters(), ROLES, config)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier(config, 10))
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([3e-3 / 4, 3e-3 / 4, 15e-3 / 4])


def test_parameters_without_gradient_stay() -> None:
    net = Net()
    net.wide.requires_grad_(False)
    optimizer = build_optimizer(net.named_parameters(), ROLES, OptimizerConfig())
    before = net.wide.clone(), net.table.clone()
    net.square.grad = torch.ones_like(net.square)
    optimizer.step()
    assert torch.equal(net.wide, before[0])
    assert torch.equal(net.table, before[1])
    assert all("wide" not in g["param_names"] for g in optimizer.param_groups)


def test_parameter_without_a_role_is_refused() -> None:
    roles = {k: v for k, v in ROLES.items() if k != "tall"}
    with pytest.raises(ValueError, match="'tall' has no role"):
        build_optimizer(Net().named_parameters(), roles, OptimizerConfig())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"matrix_optimizer": "muan"}, r"'muan'; it must be 'adamw' or 'muon'. Did you mean 'muon'"),
        ({"learning_rate": 0.0}, r"optimizer.learning_rate is 0.0; it must be above 0"),
        ({"betas": (0.9, 1.0)}, r"optimizer.betas\[1\] is 1.0"),
        ({"betas": (0.9,)}, r"must be two numbers"),
        ({"warmup_fraction": 0.6, "decay_fraction": 0.6}, r"sum must be at most 1"),
        ({"warmup_steps": -1}, r"optimizer.warmup_steps is -1"),
        ({"gradient_clip": float("nan")}, r"optimizer.gradient_clip is nan"),
    ],
)
def test_impossible_settings_get_a_sentence(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        OptimizerConfig(**fields)


def test_lightning_clips_steps_and_schedules() -> None:
    """Automatic optimisation, norm clipping over tables too and LambdaLR give what the plain loop gives."""
    from lightning.pytorch import LightningModule, Trainer

    config, data = OptimizerConfig(gradient_clip=0.05), batches(6)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, ids: Tensor) -> Tensor:
            return self.net.loss(ids)

        def configure_optimizers(self) -> Any:
            optimizer = build_optimizer(self.net.named_parameters(), ROLES, config)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier(config, len(data)))
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module, plain = Module(), Net()
    trainer = Trainer(
        max_steps=len(data),
        accelerator="cpu",
        gradient_clip_val=config.gradient_clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))  # type: ignore[arg-type]

    optimizer = build_optimizer(plain.named_parameters(), ROLES, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_multiplier(config, len(data)))
    for ids in data:
        train(plain, optimizer, [ids], clip=0.05)
        schedule.step()
    for (name, a), b in zip(module.net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name
