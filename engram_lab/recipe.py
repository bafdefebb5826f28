"""A recipe defines a run or a study; resolving it fixes the network and the run's identity.

`Recipe` is the one configuration tree: the command line, a study's trial, a checkpoint and the budget all
start from it, and from any of them the run can be repeated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from engram_lab.budget import Allocation, BudgetConfig, solve
from engram_lab.errors import UserError, nearest
from engram_lab.memory.config import MemoryConfig
from engram_lab.model.config import ModelConfig
from engram_lab.model.hashing import HASH_VERSION
from engram_lab.plain import from_plain, to_plain
from engram_lab.studies.config import StudyConfig
from engram_lab.text.config import TextConfig
from engram_lab.tracking.config import TrackingConfig
from engram_lab.training.data import DataConfig
from engram_lab.training.execution import ExecutionConfig
from engram_lab.training.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from engram_lab.text import TokenCorpus, UnreadText

SCHEMA_VERSION = 2  # part of every run's identity; raise it when an old recipe would now train differently

# Trainer settings that decide where and how a run is executed, not what it computes.
EXECUTION_ONLY = frozenset(
    {
        "accelerator",
        "accumulate_grad_batches",
        "barebones",
        "benchmark",
        "callbacks",
        "default_root_dir",
        "detect_anomaly",
        "deterministic",
        "devices",
        "enable_autolog_hparams",
        "enable_checkpointing",
        "enable_model_summary",
        "enable_progress_bar",
        "inference_mode",
        "log_every_n_steps",
        "logger",
        "model_registry",
        "num_nodes",
        "num_sanity_val_steps",
        "plugins",
        "profiler",
        "strategy",
        "sync_batchnorm",
        "use_distributed_sampler",
    }
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run, or one study of many.

    Args:
        kind: `train` runs the recipe once; `study` runs the cells of `study`, each a variation of this
            recipe.
        name: what people call it; names the MLflow experiment and the report's folder.
        seed: initial weights and order of the text.
        text: which documents, which tokenizer.
        data: how tokens become batches, and how many of them are trained on.
        model: the network; with `budget.rho` set, `model.ffn.experts` is the count at rho = 1 and the
            memories' rows are solved for.
        budget: how the sparse parameters are divided.
        memory: where table rows live, and in which format they are trained.
        optimizer: rates and schedule.
        tracking: where runs are recorded.
        trainer: settings of Lightning's Trainer; steps, validation and checkpoints follow from the rest.
        execution: compilation and activation checkpointing; no part of a run's identity.
        checkpoint_every_n_steps: how much work a kill can cost.
        study: the cells of a study; null for `kind: train`.
    """

    kind: Literal["train", "study"] = "train"
    name: str = "run"
    seed: int = 0
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    checkpoint_every_n_steps: int = 200
    study: StudyConfig | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("train", "study"):
            raise UserError(
                f"kind is {self.kind!r}; it must be 'train' or 'study'."
                + nearest(self.kind, ("train", "study"))
            )
        if self.kind == "study" and self.study is None:
            raise UserError("kind is 'study', but the recipe has no `study` section that lists its cells.")
        if not self.name or any(c in self.name for c in "/\\'\"\n") or self.name.startswith("."):
            raise UserError(f"name is {self.name!r}; it must be a plain name without slashes or quotes.")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more.")
        if not self.text.validation_fraction:
            raise UserError(
                "text.validation_fraction is 0; runs are judged by text held out: it must be above 0."
            )
        if self.checkpoint_every_n_steps < 1:
            raise UserError(
                f"checkpoint_every_n_steps is {self.checkpoint_every_n_steps}; it must be at least 1."
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, ready for YAML; `from_dict` of it gives an equal recipe."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Build a recipe from plain values.

        Raises:
            UserError: an unknown field (named with the nearest known one) or a value of the wrong type or
                range.
        """
        return from_plain(cls, values, "recipe")

    def override(self, overrides: Mapping[str, Any]) -> Recipe:
        """A copy with dotted fields replaced, for example `{"model.d_model": 128}`."""
        values = self.to_dict()
        for dotted, value in overrides.items():
            *path, last = dotted.split(".")
            node = values
            for key in path:
                node = node.setdefault(key, {})
                if not isinstance(node, dict):
                    raise UserError(f"override {dotted!r} goes through {key!r}, which holds no fields.")
            node[last] = value
        return Recipe.from_dict(values)


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A recipe with its network solved and its identity fixed."""

    recipe: Recipe
    network: ModelConfig
    allocation: Allocation
    identity: str

    @property
    def tokens(self) -> int:
        """Training tokens, in whole batches."""
        return self.recipe.data.steps * self.recipe.data.tokens_per_step


def resolve(recipe: Recipe, corpus: TokenCorpus | UnreadText) -> ResolvedRun:
    """Solve the budget and compute the run's identity.

    The identity is a hash of what can change the loss: the solved network, optimizer, batch geometry,
    tokens, seed, the text's and the hash's versions, the rows that tables begin with where they are given,
    and whether table rows train as records or as one dense parameter (the balanced momentum is another rule
    there, and neither continues the other's checkpoints).
    Defaults are left out of it, so a field added later orphans no run; where a run is executed and recorded,
    which tier holds the records included, is no part of it. A text that has not been read gives
    the right network and an identity that no run has.
    """
    if recipe.model.vocab_size != corpus.vocab_size:
        recipe = replace(recipe, model=replace(recipe.model, vocab_size=corpus.vocab_size))
    allocation = solve(recipe.model, recipe.budget, sequence_length=recipe.data.sequence_length)
    data = replace(recipe.data, evaluations=DataConfig.evaluations, num_workers=DataConfig.num_workers)
    formats = {name: getattr(recipe.memory, name) for name in ("rows", "state")}
    engram = allocation.network.engram
    by_record = recipe.memory.by_record and engram is not None and engram.n_heads > 0
    content = {
        "schema": SCHEMA_VERSION,
        "hash": HASH_VERSION,
        "data_hash": corpus.data_hash,
        "seed": recipe.seed,
        "tokens": data.steps * data.tokens_per_step,
        "network": _without_defaults(allocation.network),
        "optimizer": _without_defaults(recipe.optimizer),
        "data": {k: v for k, v in _without_defaults(data).items() if k != "tokens"},
        **{f"memory.{name}": given for name, given in formats.items() if given != "float32"},
        **({"memory.by_record": True} if by_record else {}),
        **_initial_rows(recipe.memory),
        "trainer": {
            k: v for k, v in sorted(recipe.trainer.items()) if k not in EXECUTION_ONLY and v is not None
        },
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return ResolvedRun(recipe=recipe, network=allocation.network, allocation=allocation, identity=digest[:16])


def run_directory(recipe: Recipe, identity: str) -> Path:
    """Where the run of that identity lives."""
    return Path(recipe.tracking.directory) / "runs" / identity


def _initial_rows(memory: MemoryConfig) -> dict[str, str]:
    """What the identity says of rows that are given: what they are, not where they lie."""
    folder = memory.initial_folder
    if folder is None:
        return {}
    from engram_lab.model.checkpoint import RECORD, given_rows  # would cost every command half a second

    try:
        return {"memory.initial_rows": given_rows(folder).digest}
    except UserError as error:
        if not folder.is_dir():
            reason = f"there is no folder '{folder}'; name the `model` folder of a finished run."
        elif (folder / "model" / RECORD).exists():
            reason = f"'{folder}' is a run's folder; name '{folder / 'model'}'."
        else:
            reason = str(error)
        raise UserError(f"memory.initial_rows cannot be used: {reason}") from error


def _without_defaults(config: Any) -> dict[str, Any]:
    reference = type(config)()
    changed: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            # A section that is there is named even when all of it is default: it differs from an absent one.
            changed[f.name] = _without_defaults(value)
        elif value != getattr(reference, f.name):
            changed[f.name] = to_plain(value)
    return changed
