"""The models of arXiv 2601.07372, rebuilt and counted beside the published figures.

Table 1 gives layers, width, heads, streams, experts, memory, and totals to a digit. The rest is inferred. An
expert is 1,536 wide: total less active parameters, which is the inactive experts and one embedding, allows no
other multiple of 16. Attention is DeepSeek-V2's (heads of 128, a latent of 512, rotary width 64) and dense
layers are as wide as the experts a token uses. With the embedding's matrix counted once in the totals and not
at all in the active parameters, every figure of the table then comes out to its printed digit.

Of the sweeps' backbones only P_tot, P_act (both without embedding and head) and the experts are published,
and that the 3B one has 12 layers. Their widths are chosen to meet those, to a per cent, and test no
accounting.

Tables come in steps of half the vocabulary, since both published sizes do (35 and 112 x 64,640): what the 17
experts leave, 5.82 B, is 35.2 steps, and the nearest whole number gives the published 5.79 B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from engram_lab.budget.config import BudgetConfig
from engram_lab.budget.count import count
from engram_lab.budget.solve import Allocation, solve
from engram_lab.budget.table import align, human
from engram_lab.model.attention import AttentionConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.presets import PAPER


@dataclass(frozen=True, kw_only=True)
class PublishedModel:
    """A network and what its authors say of its size."""

    network: ModelConfig
    total: float
    active: float
    """Parameters one token uses, embedding and head left out."""
    with_embedding: bool
    """Whether the published total includes the embedding's matrix, which the head shares."""

    @property
    def counted_total(self) -> int:
        """Our count of what `total` counts."""
        parameters = count(self.network)
        return parameters.everything if self.with_embedding else parameters.total

    @property
    def counted_active(self) -> int:
        """Our count of what `active` counts."""
        return count(self.network).active


@dataclass(frozen=True, kw_only=True)
class PublishedCell:
    """A published allocation: what a share of the sparse parameters makes of a model of `PUBLISHED`."""

    model: str
    rho: float
    experts: int
    memory: float | None = None
    """Memory rows, in parameters, where they are published."""
    layers: tuple[int, ...] = (1,)
    """Blocks that read a memory; where the sweeps' sit is not published."""

    def solve(self) -> Allocation:
        """Return our solution, with rows in the published steps."""
        memory = replace(PAPER.engram, layers=self.layers)
        network = replace(PUBLISHED[self.model].network, engram=memory)
        return solve(network, BudgetConfig(rho=self.rho, rows_step=network.vocab_size // 2))


_MOE_27B = ModelConfig(
    vocab_size=129_280,
    d_model=2560,
    n_layers=30,
    attention=AttentionConfig(kind="latent", n_heads=32, head_dim=128, latent_dim=512, rope_dim=64),
    ffn=FeedForwardConfig(experts=72, top_k=6, shared_experts=2, expert_hidden=1536, leading_dense_layers=1),
    streams=4,
    tie_embeddings=True,
)
_ENGRAM_27B = replace(_MOE_27B, ffn=replace(_MOE_27B.ffn, experts=55), engram=PAPER.engram)
_ENGRAM_40B = replace(_ENGRAM_27B, engram=replace(PAPER.engram, rows_per_head=7_239_680))
_SWEEP_5_7B = replace(
    _MOE_27B,
    d_model=1280,
    n_layers=12,
    attention=replace(_MOE_27B.attention, n_heads=16),
    ffn=replace(_MOE_27B.ffn, experts=106, expert_hidden=1216),
)
_SWEEP_9_9B = replace(_SWEEP_5_7B, n_layers=18, ffn=replace(_SWEEP_5_7B.ffn, experts=99, expert_hidden=1472))
_MEMORY_3B = replace(_SWEEP_5_7B, ffn=replace(_SWEEP_5_7B.ffn, experts=54))

PUBLISHED: Mapping[str, PublishedModel] = MappingProxyType(
    {
        "Dense-4B": PublishedModel(
            network=replace(_MOE_27B, ffn=replace(_MOE_27B.ffn, experts=0)),
            total=4.1e9,
            active=3.8e9,
            with_embedding=True,
        ),
        "MoE-27B": PublishedModel(network=_MOE_27B, total=26.7e9, active=3.8e9, with_embedding=True),
        "Engram-27B": PublishedModel(network=_ENGRAM_27B, total=26.7e9, active=3.8e9, with_embedding=True),
        "Engram-40B": PublishedModel(network=_ENGRAM_40B, total=39.5e9, active=3.8e9, with_embedding=True),
        "sweep 5.7B": PublishedModel(network=_SWEEP_5_7B, total=5.7e9, active=568e6, with_embedding=False),
        "sweep 9.9B": PublishedModel(network=_SWEEP_9_9B, total=9.9e9, active=993e6, with_embedding=False),
        "memory sweep 3B": PublishedModel(
            network=_MEMORY_3B, total=3.0e9, active=568e6, with_embedding=False
        ),
    }
)
PUBLISHED_CELLS = (
    PublishedCell(model="MoE-27B", rho=0.743, experts=55, memory=5.79e9, layers=(1, 14)),
    PublishedCell(model="sweep 5.7B", rho=0.4, experts=46),
    PublishedCell(model="sweep 9.9B", rho=0.4, experts=43),
)
CONVENTIONS = (
    "Totals of the first four include the embedding's matrix once, those of the sweeps leave it out; active",
    "leaves it out everywhere. Not published, and inferred from totals: widths of experts, of attention, and",
    "the sweeps' shapes (whose agreement is therefore no test). Rows in steps of half the vocabulary.",
)


def published_table() -> str:
    """Return models and allocations with their published and computed numbers, as two aligned tables."""
    beside = ("published", "difference")
    models = [("model", "experts", "memory", "total", *beside, "active", *beside)]
    for name, model in PUBLISHED.items():
        total, active = model.counted_total, model.counted_active
        models.append(
            (
                name,
                str(model.network.ffn.experts),
                human(count(model.network).rows),
                human(total),
                human(model.total),
                f"{total / model.total - 1:+.1%}",
                human(active),
                human(model.active),
                f"{active / model.active - 1:+.1%}",
            )
        )
    cells = [("from", "rho", "experts", "published", "memory", "published")]
    for cell in PUBLISHED_CELLS:
        solved = cell.solve()
        cells.append(
            (
                cell.model,
                f"{cell.rho:g}",
                str(solved.experts),
                str(cell.experts),
                human(solved.memory_parameters),
                "-" if cell.memory is None else human(cell.memory),
            )
        )
    return "\n".join([align(models), "", align(cells), "", *CONVENTIONS])
