"""Cross-entropy straight from hidden states, without ever holding all the logits."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from engram_lab.model import loss_triton as kernels
except ImportError:  # torch for CPUs comes without triton
    kernels = None  # type: ignore[assignment]

# Logits held at once. On a CPU core a slice of 8 MiB stays near the caches (256 rows of 8,192 were the
# fastest of 64 to 1,024 rows); on a GPU half a GiB keeps the products large.
_CPU_LOGITS, _GPU_LOGITS = 2**21, 2**27


def linear_cross_entropy(
    h: Tensor, weight: Tensor, targets: Tensor, *, reduction: Literal["mean", "sum", "none"] = "mean"
) -> Tensor:
    """Return the cross-entropy, in nats, of logits h weight^T against `targets`.

    Shapes: h [tokens, D], weight [V, D], targets [tokens]. Products run in the autocast precision, if one
    is on; the softmax and the sum run in float32 (float64 for float64 inputs). "mean" and "sum" compute the
    gradients on the way forward, slice by slice, which saves the second product a recomputation would need;
    "none" returns one loss a token, keeps every logit when a gradient is wanted, and is meant for
    evaluation.
    """
    device = h.device.type
    if torch.is_autocast_enabled(device):
        h = h.to(torch.get_autocast_dtype(device))
    elif h.dtype != weight.dtype:
        h = h.to(weight.dtype)
    differentiable = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    fused = h.is_cuda and kernels is not None and h.dtype == torch.bfloat16
    if fused and not (differentiable and reduction == "none"):
        total, losses, _, _ = kernels.linear_cross_entropy(h, weight, targets, differentiable)
        if reduction == "none":
            return losses
        return total / targets.numel() if reduction == "mean" else total
    rows = max(1, (_CPU_LOGITS if device == "cpu" else _GPU_LOGITS) // weight.shape[0])
    with torch.autocast(device, enabled=False):
        if reduction != "none":
            total = _SlicedCrossEntropy.apply(h, weight, targets, rows, differentiable)
            return total / targets.numel() if reduction == "mean" else total
        losses = []
        for h_part, targets_part in zip(h.split(rows), targets.split(rows), strict=True):
            logits = F.linear(h_part, weight.to(h.dtype))
            wide = torch.promote_types(logits.dtype, torch.float32)
            losses.append(F.cross_entropy(logits.to(wide), targets_part, reduction="none"))
        return torch.cat(losses)


class _SlicedCrossEntropy(torch.autograd.Function):
    """Sum of token losses; saves the finished gradients instead of logits."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, rows: int, differentiable: bool
    ) -> Tensor:
        wide = torch.promote_types(h.dtype, torch.float32)
        narrow_weight = weight.to(h.dtype)
        # Both buffers serve every slice: fresh ones of this size would be mapped and faulted in page by
        # page each time.
        buffer = h.new_empty(min(rows, h.shape[0]), weight.shape[0])
        wide_buffer = buffer if wide == h.dtype else torch.empty_like(buffer, dtype=wide)
        total = torch.zeros((), dtype=wide, device=h.device)
        grad_h = torch.empty_like(h) if differentiable else None
        grad_weight = torch.zeros_like(weight) if differentiable else None
        for h_part, target, grad_part in zip(
            h.split(rows),
            targets.unsqueeze(1).split(rows),
            (h if grad_h is None else grad_h).split(rows),
            strict=True,
        ):
            narrow = torch.mm(h_part, narrow_weight.t(), out=buffer[: len(h_part)])
            logits = narrow if wide_buffer is buffer else wide_buffer[: len(h_part)].copy_(narrow)
            chosen = logits.gather(1, target)
            highest = logits.amax(dim=1, keepdim=True)
            unnormalised = logits.sub_(highest).exp_()
            mass = unnormalised.sum(dim=1, keepdim=True)
            total += (mass.log() + highest - chosen).sum()
            if grad_weight is None:
                continue
            grad_logits = unnormalised.div_(mass).scatter_add_(1, target, torch.full_like(mass, -1.0))
            if grad_logits.dtype != h.dtype:
                grad_logits = narrow.copy_(grad_logits)
            torch.mm(grad_logits, narrow_weight, out=grad_part)
            if weight.dtype == h.dtype:
                grad_weight.addmm_(grad_logits.t(), h_part)
            else:
                grad_weight += grad_logits.t() @ h_part
        if differentiable:
            ctx.save_for_backward(grad_h, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_h, grad_weight = ctx.saved_tensors
        scale = grads[0]
        return grad_h * scale.to(grad_h.dtype), grad_weight * scale.to(grad_weight.dtype), None, None, None
