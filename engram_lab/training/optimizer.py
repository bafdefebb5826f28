"""The optimizer of a run: one torch.optim.Optimizer with its own rule for matrices, vectors and tables.

Lightning's automatic optimisation takes exactly one optimizer, and so do gradient clipping and LambdaLR; the
parameter groups of `CompositeOptimizer` carry what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from engram_lab.errors import UserError, nearest
from engram_lab.memory.adagrad import row_adagrad_step
from engram_lab.memory.sinkhorn import MOMENTUM as SINKHORN_MOMENTUM
from engram_lab.memory.sinkhorn import sinkhorn_step
from engram_lab.model.graphs import captured
from engram_lab.training.muon import muon_step
from engram_lab.training.schedule import wsd_multiplier

try:
    from engram_lab.training import adamw_triton as kernels
except ImportError:  # torch for CPUs comes without triton
    kernels = None  # type: ignore[assignment]

Role = Literal["matrix", "vector", "embedding", "table"]
GROUP_OF_ROLE: Mapping[Role, str] = {
    "matrix": "matrices",
    "vector": "vectors",
    "embedding": "vectors",
    "table": "tables",
}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How parameters are updated and how the learning rate moves; the same for every cell of a study.

    Attributes:
        learning_rate: base rate of matrices, vectors and embeddings. 3e-3 is the rate at which a width-256
            model of this family shows the allocation effect; both matrix rules take steps of the same size.
        matrix_optimizer: "adamw", or "muon" for matrices and expert stacks (all else stays on AdamW).
        weight_decay: decoupled, on matrices only: embeddings, vectors and tables are never decayed.
        betas: Adam's averages of the gradient and of its square.
        eps: Adam's addition to the denominator.
        muon_momentum: averaging of the gradient in Muon.
        table_optimizer: "adam"; "sinkhorn" for DeepSeek-V4.1's momentum with balanced rows and columns,
            which keeps one number a parameter where Adam keeps two (memory/sinkhorn.py); or "adagrad",
            which keeps one number a row (memory/adagrad.py).
        table_lr_multiplier: tables learn at this multiple of the base rate: the published setting for Adam
            and the balanced momentum, since a row is touched far less often than a matrix.
        warmup_fraction: share of the steps spent warming up, when `warmup_steps` is None.
        warmup_steps: warm-up in steps; overrides `warmup_fraction`.
        decay_fraction: share of the steps, at the end, spent decaying.
        final_lr_fraction: multiplier that the decay leads to.
        gradient_clip: largest norm of the gradient over all parameters, tables included wherever their rows
            live; a larger one is scaled down before the step. 0 clips nothing.

    Raises:
        UserError: a value outside its range.
    """

    learning_rate: float = 3e-3
    matrix_optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    muon_momentum: float = 0.95
    table_optimizer: Literal["adam", "adagrad", "sinkhorn"] = "adam"
    table_lr_multiplier: float = 5.0
    warmup_fraction: float = 0.02
    warmup_steps: int | None = None
    decay_fraction: float = 0.2
    final_lr_fraction: float = 0.1
    gradient_clip: float = 1.0

    def __post_init__(self) -> None:
        for field, rules in (
            ("matrix_optimizer", ("adamw", "muon")),
            ("table_optimizer", ("adam", "adagrad", "sinkhorn")),
        ):
            if (rule := getattr(self, field)) not in rules:
                *others, last = map(repr, rules)
                raise UserError(
                    f"optimizer.{field} is {rule!r}; it must be {', '.join(others)} or {last}."
                    + nearest(str(rule), rules)
                )
        if len(self.betas) != 2:
            raise UserError(f"optimizer.betas is {self.betas!r}; it must be two numbers, say (0.9, 0.95).")
        share = "between 0 and 1"
        ranges: dict[str, tuple[float, bool, str]] = {
            "learning_rate": (self.learning_rate, self.learning_rate > 0, "above 0"),
            "weight_decay": (self.weight_decay, self.weight_decay >= 0, "0 or more"),
            "betas[0]": (self.betas[0], 0 <= self.betas[0] < 1, "at least 0 and below 1"),
            "betas[1]": (self.betas[1], 0 <= self.betas[1] < 1, "at least 0 and below 1"),
            "eps": (self.eps, self.eps > 0, "above 0"),
            "muon_momentum": (self.muon_momentum, 0 <= self.muon_momentum < 1, "at least 0 and below 1"),
            "table_lr_multiplier": (self.table_lr_multiplier, self.table_lr_multiplier >= 0, "0 or more"),
            "warmup_fraction": (self.warmup_fraction, 0 <= self.warmup_fraction <= 1, share),
            "warmup_steps": (self.warmup_steps or 0, (self.warmup_steps or 0) >= 0, "0 or more"),
            "decay_fraction": (self.decay_fraction, 0 <= self.decay_fraction <= 1, share),
            "final_lr_fraction": (self.final_lr_fraction, 0 <= self.final_lr_fraction <= 1, share),
            "gradient_clip": (self.gradient_clip, self.gradient_clip >= 0, "0 or more"),
        }
        for field, (value, holds, allowed) in ranges.items():
            if not holds:
                raise UserError(f"optimizer.{field} is {value!r}; it must be {allowed}.")
        if self.warmup_steps is None and self.warmup_fraction + self.decay_fraction > 1:
            raise UserError(
                f"optimizer.warmup_fraction {self.warmup_fraction} and optimizer.decay_fraction "
                f"{self.decay_fraction} add up to more than the whole run; their sum must be at most 1."
            )


def lr_multiplier(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Return the function of the step that `torch.optim.lr_scheduler.LambdaLR` wants.

    Raises UserError when a warm-up given in steps leaves too few of them for the decay.
    """
    decay = round(config.decay_fraction * total_steps)
    if config.warmup_steps is None:
        warmup = min(round(config.warmup_fraction * total_steps), total_steps - decay)
    else:
        warmup = config.warmup_steps
    if warmup + decay > total_steps:
        raise UserError(
            f"optimizer.warmup_steps is {warmup} and {decay} steps decay, but the run has {total_steps} "
            f"steps; warmup_steps must be at most {total_steps - decay}."
        )
    return lambda step: wsd_multiplier(step, total_steps, warmup, decay, config.final_lr_fraction)


class CompositeOptimizer(torch.optim.Optimizer):
    """AdamW for most groups, Muon, Sinkhorn and Adagrad for those that ask for them, behind one optimizer.

    A group holds `name`, `rule` ("adamw", "muon", "sinkhorn" or "adagrad"), `lr`, `weight_decay`, `betas`,
    `eps`, `momentum` and `fused`. Adam's pass is fused where torch has such a kernel (CPU, CUDA) and batched
    by foreach elsewhere; what a graph captures takes large tensors through `adamw_triton`.

    Attributes:
        captures: launch the whole update as one CUDA graph from the second step on; gradients must then stay
            where they are.
        gradient_scale: a number on the parameters' device, set by `clip`, that multiplies all gradients
            before they are used; None leaves them. `grad` holds them with or without it afterwards.
        copies: by parameter, tensors of its shape that every step makes equal to it, in their own dtype.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(list(groups), {})
        self.captures = False
        self.gradient_scale: Tensor | None = None
        self.copies: dict[Tensor, Tensor] = {}
        self._rates: list[Tensor] = []  # of the groups, where a graph reads them
        self._written: list[float] = []  # what they hold
        self._replay: Callable[[], None] | None = None

    def release(self) -> None:
        """Let go of what was captured and of the copies; steps that follow are launched."""
        self.captures, self._replay = False, None
        self.copies.clear()

    @torch.no_grad()
    def clip(self, limit: float, elsewhere: Tensor | None = None, own: Tensor | None = None) -> Tensor:
        """Return the norm of all gradients, and let `step` scale them down to `limit` if it is larger.

        `elsewhere` is the norm of gradients that are held by others, who are to use `gradient_scale` too;
        `own` that of the parameters' gradients, where it is known.
        """
        if own is None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            own = get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = own.full_tensor() if isinstance(own, DTensor) else own
        if elsewhere is not None:
            norm = torch.stack([norm, elsewhere]).norm()
        if self.gradient_scale is None:
            self.gradient_scale = torch.empty_like(norm, dtype=torch.float32)  # as fused kernels want it
        self.gradient_scale.copy_((limit / (norm + 1e-6)).clamp(max=1.0))  # as torch's clip_grad_norm_ does
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what `closure` returns, which is called first, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rates = [group["lr"] for group in self.param_groups]
        if not self.captures:
            self._update(rates)
            return loss
        if not self._rates:
            device = self.param_groups[0]["params"][0].device
            self._rates = [torch.tensor(rate, device=device) for rate in rates]
            self._written = rates
            self._update(self._rates)  # makes the state, and loads what the graph launches
            return loss
        for here, rate, written in zip(self._rates, rates, self._written, strict=True):
            if rate != written:
                here.fill_(rate)
        self._written = rates
        if self._replay is None:
            self._replay = captured(lambda: self._update(self._rates), self._rates[0].device, warm_up=0)
        self._replay()
        return loss

    def _update(self, rates: Sequence[float | Tensor]) -> None:
        copied: set[Tensor] = set()
        for group, rate in zip(self.param_groups, rates, strict=True):
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if self.gradient_scale is not None and not _scales(group):
                torch._foreach_mul_([p.grad for p in parameters], self.gradient_scale)
            if group["rule"] == "muon":
                self._muon(group, parameters, rate)
            elif group["rule"] == "sinkhorn":
                self._sinkhorn(group, parameters, rate)
            elif group["rule"] == "adagrad":
                self._adagrad(group, parameters, rate)
            else:
                copied.update(self._adamw(group, parameters, rate))
        left = [p for p in self.copies if p not in copied]
        if left:
            torch._foreach_copy_([self.copies[p] for p in left], left)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor], rate: float | Tensor) -> None:
        muon_step(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            self._momenta(parameters),
            lr=rate,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
        )

    def _sinkhorn(self, group: dict[str, Any], parameters: list[Tensor], rate: float | Tensor) -> None:
        sinkhorn_step(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            self._momenta(parameters),
            lr=rate,
            momentum=group["momentum"],
        )

    def _adagrad(self, group: dict[str, Any], parameters: list[Tensor], rate: float | Tensor) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["sum_sq"] = p.new_zeros((len(p), 1), dtype=torch.float32)
        row_adagrad_step(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [self.state[p]["sum_sq"] for p in parameters],
            lr=rate,
            eps=group["eps"],
        )

    def _momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        return [self.state[p]["momentum"] for p in parameters]

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor], rate: float | Tensor) -> list[Tensor]:
        """Return the parameters that have been copied too."""
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if not state:
                # A fused kernel reads the step on the parameter's device; the others count on the host.
                state["step"] = torch.zeros((), device=p.device if group["fused"] else "cpu")
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = torch.zeros_like(p)
        scale = self.gradient_scale if _scales(group) else None
        large: list[Tensor] = []
        if kernels is not None and scale is not None and isinstance(rate, Tensor):
            large = [p for p in parameters if kernels.fits(p)]
            self._adamw_large(group, large, rate, scale)
            parameters = [p for p in parameters if not kernels.fits(p)]
            states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=not group["fused"],
            fused=group["fused"],
            grad_scale=None if scale is None else scale.reciprocal(),  # the kernel divides by it
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=rate,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        return large

    def _adamw_large(
        self, group: dict[str, Any], parameters: list[Tensor], rate: Tensor, scale: Tensor
    ) -> None:
        if parameters:
            torch._foreach_add_([self.state[p]["step"] for p in parameters], 1)
        for p in parameters:
            kernels.update(
                p,
                self.state[p],
                rate=rate,
                scale=scale,
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                narrow=self.copies.get(p),
            )


def _scales(group: dict[str, Any]) -> bool:
    """Whether the group's rule scales gradients itself; shards are left to one pass for all rules."""
    fused = group["rule"] == "adamw" and group["fused"]
    return fused and not any(isinstance(p, DTensor) for p in group["params"])


def build_optimizer(
    named_parameters: Iterable[tuple[str, Parameter]], roles: Mapping[str, Role], config: OptimizerConfig
) -> CompositeOptimizer:
    """Build the optimizer of a network from its `named_parameters()` and `parameter_roles()`.

    The groups are "matrices", "vectors" (vectors and embeddings) and "tables", in this order, empty ones left
    out; parameters that want no gradient are left out too. The state carries the parameters' names.

    Raises ValueError when `roles` misses a parameter, or a matrix for Muon is neither 2-D nor a stack of 2-D.
    """
    members: dict[str, list[tuple[str, Parameter]]] = {"matrices": [], "vectors": [], "tables": []}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        if name not in roles:
            raise ValueError(f"parameter {name!r} has no role; known roles: {sorted(GROUP_OF_ROLE)}")
        members[GROUP_OF_ROLE[roles[name]]].append((name, parameter))

    table_rule = "adamw" if config.table_optimizer == "adam" else config.table_optimizer
    rules = {"matrices": config.matrix_optimizer, "vectors": "adamw", "tables": table_rule}
    if rules["matrices"] == "muon":
        if any(isinstance(parameter, DTensor) for _, parameter in members["matrices"]):
            raise UserError(
                "optimizer.matrix_optimizer is 'muon', which needs whole matrices, but the strategy shards "
                "them; it must be 'adamw' here, or the strategy 'ddp'."
            )
        for name, parameter in members["matrices"]:
            if parameter.ndim not in (2, 3):
                shape = tuple(parameter.shape)
                raise ValueError(f"Muon takes matrices and stacks of them; {name!r} is {shape}")
    groups = []
    for group, named in members.items():
        if not named:
            continue
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for _, p in named)
        groups.append(
            {
                "params": named,
                "name": group,
                "rule": rules[group],
                "lr": config.learning_rate * (config.table_lr_multiplier if group == "tables" else 1.0),
                "weight_decay": config.weight_decay if group == "matrices" else 0.0,
                "betas": config.betas,
                "eps": config.eps,
                "momentum": SINKHORN_MOMENTUM if group == "tables" else config.muon_momentum,
                "fused": fused,
            }
        )
    return CompositeOptimizer(groups)
