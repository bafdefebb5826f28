"""Names, types and units of the columns of a table of runs. One row is one finished (or failed) training run.

Only `loss` and the column a law is fitted against are needed; everything else is optional and is used where
it is present. `ALIASES` lists other spellings that are recognised without being told; any other name is
mapped by the caller (`columns={"rho": "my name"}`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

NULLS = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "-", "--", "–", "—"})
"""Texts that stand for no value, in lower case and without spaces around."""
STATUSES = ("finished", "failed", "interrupted", "running")
"""What a run can be; only finished ones are fitted, and an interrupted one can still be continued."""
STATUS_WORDS: dict[str, str] = {
    "finished": "finished",
    "complete": "finished",
    "completed": "finished",
    "done": "finished",
    "success": "finished",
    "failed": "failed",
    "crashed": "failed",
    "error": "failed",
    "interrupted": "interrupted",
    "killed": "interrupted",
    "running": "running",
    "scheduled": "running",
    "pending": "running",
}
"""What stores of runs call these states, in lower case."""
NO_CONTROL = frozenset({"false", "no", "0"})
"""Texts in column `control` that say that a run is none, besides `NULLS`."""

CEILING = 1e40
"""Largest count, size or compute that is believed: only a broken table goes beyond, and powers overflow."""
MOST_LOSS = 1e9
"""Largest size of a loss that is believed, in any unit."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column: what it is called, what it holds and which values are possible."""

    name: str
    kind: type
    """`str`, `int` or `float`."""
    unit: str
    doc: str
    lower: float | None = None
    """Smallest possible value, inclusive unless `exclusive`."""
    upper: float | None = None
    exclusive: bool = False
    """Whether `lower` itself is forbidden."""
    aliases: tuple[str, ...] = ()
    """Other spellings, compared without case, spaces, dashes and underscores."""


def _positive(name: str, kind: type, unit: str, doc: str, *aliases: str) -> Column:
    return Column(
        name=name, kind=kind, unit=unit, doc=doc, lower=0.0, exclusive=True, upper=CEILING, aliases=aliases
    )


def _count(name: str, doc: str, *aliases: str) -> Column:
    return Column(name=name, kind=int, unit="count", doc=doc, lower=0.0, upper=CEILING, aliases=aliases)


COLUMNS: tuple[Column, ...] = (
    Column(name="study", kind=str, unit="", doc="Name of the study the run belongs to."),
    Column(
        name="run", kind=str, unit="", doc="Identity of the run; unique within a study.", aliases=("run id",)
    ),
    Column(
        name="sweep",
        kind=str,
        unit="",
        doc='Which sweep the run serves: "allocation", "memory", or "allocation+memory".',
    ),
    Column(
        name="control",
        kind=str,
        unit="",
        doc='Empty for an ordinary run, else the name of the control ("frozen", ...).',
    ),
    Column(
        name="status",
        kind=str,
        unit="",
        doc='"finished", "failed", "interrupted" or "running"; only finished runs are fitted.',
    ),
    Column(name="reason", kind=str, unit="", doc="Why a run failed or was interrupted."),
    _positive(
        "budget",
        float,
        "FLOPs",
        "Training compute C.",
        "c",
        "flops",
        "flop",
        "compute",
        "training flops",
        "training flop",
        "train flops",
        "total flops",
        "total compute",
        "training compute",
        "iso flop",
        "isoflop",
    ),
    Column(
        name="rho",
        kind=float,
        unit="share",
        doc="Realised share of the sparse parameters given to routed experts, 0 to 1.",
        lower=0.0,
        upper=1.0,
        aliases=(
            "ρ",
            "allocation",
            "allocation ratio",
            "expert share",
            "moe share",
            "rho realised",
            "rho realized",
        ),
    ),
    Column(
        name="rho_nominal",
        kind=float,
        unit="share",
        doc="Share asked for, before experts were made whole.",
        lower=0.0,
        upper=1.0,
    ),
    _count(
        "slots",
        "Rows of memory over all tables; 0 for a run without memory.",
        "embedding slots",
        "memory slots",
        "num slots",
        "n slots",
        "number of slots",
        "rows",
        "m",
    ),
    _count(
        "memory_parameters",
        "Parameters in memory tables; 0 for a run without memory.",
        "memory",
        "memory params",
        "memory size",
    ),
    _positive(
        "total_parameters",
        float,
        "parameters",
        "All parameters without token embedding and head; N of the classic laws.",
        "n",
        "params",
        "parameters",
        "n params",
        "num params",
        "model size",
        "p tot",
        "ptot",
        "size",
        "total params",
        "model params",
        "model parameters",
        "num parameters",
        "n parameters",
        "number of parameters",
        "non embedding parameters",
        "non embedding params",
    ),
    _positive(
        "active_parameters",
        float,
        "parameters",
        "Parameters used for one token.",
        "p act",
        "pact",
        "active params",
        "activated parameters",
        "activated params",
    ),
    Column(
        name="sparse_parameters",
        kind=float,
        unit="parameters",
        doc="total_parameters - active_parameters: the budget that rho divides.",
        lower=0.0,
        aliases=("p sparse", "psparse", "sparse params"),
    ),
    _positive(
        "experts",
        float,
        "count",
        "Routed experts of the run.",
        "e",
        "num experts",
        "n experts",
        "expert count",
        "number of experts",
    ),
    _positive(
        "top_k",
        float,
        "count",
        "Routed experts active for one token.",
        "k",
        "active experts",
        "experts per token",
    ),
    _positive(
        "tokens",
        float,
        "tokens",
        "Training tokens D.",
        "d",
        "training tokens",
        "train tokens",
        "n tokens",
        "num tokens",
        "number of tokens",
        "total tokens",
        "tokens seen",
        "data",
        "dataset size",
    ),
    Column(name="seed", kind=int, unit="", doc="Random seed; equal seeds at different rho are paired runs."),
    Column(
        name="loss",
        kind=float,
        unit="nats/token",
        doc="Final validation loss. Laws fitted to log loss need it positive.",
        lower=-MOST_LOSS,
        upper=MOST_LOSS,
        aliases=(
            "l",
            "final loss",
            "val loss",
            "validation loss",
            "eval loss",
            "test loss",
            "final val loss",
            "final validation loss",
            "final eval loss",
            "cross entropy",
            "cross entropy loss",
            "loss nats",
        ),
    ),
    _positive(
        "loss_sd", float, "nats/token", "Known standard deviation of `loss` between seeds.", "sd", "loss std"
    ),
    Column(
        name="seconds",
        kind=float,
        unit="s",
        doc="Wall time of training over all openings; compilation, evaluations and checkpoints included.",
        lower=0.0,
        upper=CEILING,
        aliases=("wall seconds", "training seconds", "train seconds"),
    ),
    _positive("weight", float, "", "Relative weight of the row (precision weight).", "weights"),
    Column(name="cluster", kind=str, unit="", doc="Rows of one cluster are not independent; see `collapse`."),
    _positive(
        "vocabulary", float, "count", "Vocabulary size V.", "v", "vocab", "vocab size", "vocabulary size"
    ),
    _positive(
        "vocabulary_parameters",
        float,
        "parameters",
        "Parameters of token embedding and head, N_v.",
        "n v",
        "vocab params",
        "vocab parameters",
    ),
    _positive(
        "over_training",
        float,
        "ratio",
        "Token multiplier M = D / N.",
        "token multiplier",
        "tokens per parameter",
    ),
)

BY_NAME: dict[str, Column] = {column.name: column for column in COLUMNS}
NAMES: tuple[str, ...] = tuple(BY_NAME)


_UNITS = frozenset(
    {"nats", "natspertoken", "nat", "flop", "flops", "parameters", "params", "tokens", "count"}
)
"""Units that change no number, so that a name may carry them in brackets."""


def squash(name: str) -> str:
    """Lower case without spaces, dashes, underscores, dots, slashes and a harmless unit in brackets."""
    inside = re.fullmatch(r"(.*\S)\s*[(\[]([^()\[\]]*)[)\]]\s*", name)
    if inside and _bare(inside[2]) in _UNITS:
        name = inside[1]
    return _bare(name)


def _bare(name: str) -> str:
    return "".join(character for character in name.lower() if character not in " \t-_./:")


ALIASES: dict[str, str] = {
    squash(alias): column.name for column in COLUMNS for alias in (column.name, *column.aliases)
}
