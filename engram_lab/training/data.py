"""From token shards to batches: ids, next-token targets and the row addresses of every memory.

The order of the training windows is a pure function of `(seed, step, rank)`, so a run that is resumed sees
the batches it would have seen, and two cells of a study with the same seed see the same text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from engram_lab.errors import UserError
from engram_lab.training.ahead import AnnouncingLoader

if TYPE_CHECKING:
    from engram_lab.model.hashing import NgramHash
    from engram_lab.text import TokenCorpus
    from engram_lab.training.rows import TableRows

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How tokens are cut into batches.

    Args:
        sequence_length: T, tokens a window. Documents are packed; windows do not overlap.
        batch_size: windows an optimizer step, over all devices and accumulated micro-batches together, so
            that the number of devices does not change what is trained.
        tokens: training tokens of the run; rounded down to whole batches.
        repeat: allow more tokens than the corpus holds, by going over it again. Off, because repeated text
            opens a gap between training and validation loss that a memory study would mistake for an
            effect.
        validation_tokens: how much of the validation text is read at each evaluation, in windows spread
            evenly over it; all of it when null.
        evaluations: evaluations during training, equally spaced; the one at the end comes on top.
        num_workers: loader processes that cut batches and compute addresses ahead of the step; 0 does it in
            the training process, which is right where all cores are busy with trials.
    """

    sequence_length: int = 256
    batch_size: int = 32
    tokens: int = 1_000_000
    repeat: bool = False
    validation_tokens: int | None = None
    evaluations: int = 4
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("sequence_length", "batch_size", "tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in ("evaluations", "num_workers"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} is {getattr(self, name)}; it must be 0 or more.")
        if self.steps < 1:
            raise UserError(
                f"data.tokens is {self.tokens:,}, less than one batch of {self.batch_size} windows of "
                f"{self.sequence_length} tokens; it must be at least {self.tokens_per_step:,}."
            )
        if self.validation_tokens is not None and self.validation_tokens < self.sequence_length:
            raise UserError(
                f"data.validation_tokens is {self.validation_tokens}; it must be at least one window, "
                f"{self.sequence_length} tokens, or null for all of the validation text."
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens one optimizer step reads."""
        return self.batch_size * self.sequence_length

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.tokens // self.tokens_per_step


class Windows(Dataset[Batch]):
    """Batches of windows over one token array, by batch number.

    Args:
        tokens: the token array, [N].
        starts: first token of each window in reading order, [windows]; batch i reads windows
            `i * batch_size` to `(i + 1) * batch_size`.
        sequence_length: T.
        batch_size: windows a batch on this device.
        offset: first window of this device inside a batch of all devices.
        stride: windows in a batch of all devices.
        hash: computes addresses [M, B, T, H]; None for a network without memory.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        *,
        sequence_length: int,
        batch_size: int,
        offset: int,
        stride: int,
        hash: NgramHash | None,
    ) -> None:
        self.tokens, self.starts, self.T = tokens, starts, sequence_length
        self.batch_size, self.offset, self.stride = batch_size, offset, stride
        self.hash = hash

    def __len__(self) -> int:
        return -(-len(self.starts) // self.stride)

    def __getitem__(self, batch: int) -> Batch:
        first = batch * self.stride + self.offset
        starts = self.starts[first : min(first + self.batch_size, (batch + 1) * self.stride)]
        text = np.empty((len(starts), self.T + 1), dtype=np.int64)
        for row, start in enumerate(starts):
            text[row] = self.tokens[start : start + self.T + 1]
        ids = np.ascontiguousarray(text[:, :-1])
        item = {"ids": torch.from_numpy(ids), "targets": torch.from_numpy(np.ascontiguousarray(text[:, 1:]))}
        if self.hash is not None:
            item["addresses"] = torch.from_numpy(self.hash.addresses(ids))
        return item


def never_empty(batch: Batch) -> Batch:
    """Return `batch`, or one window of zeros for a rank to which a small batch left none.

    What ranks do together, such as reading rows that are spread over them, takes every one of them.
    """
    if len(batch["ids"]):
        return batch
    shapes = {name: [*values.shape] for name, values in batch.items()}
    for shape in shapes.values():
        shape[shape.index(0)] = 1
    return {name: values.new_zeros(shapes[name]) for name, values in batch.items()}


class FromBatch(Sampler[int]):
    """Batch numbers from `first` on; its length is that of the whole run, as Lightning counts."""

    def __init__(self, batches: int) -> None:
        self.batches, self.first = batches, 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.batches))

    def __len__(self) -> int:
        return self.batches


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader whose position is the number of batches trained on, not fetched.

    Lightning saves and restores loaders that have `state_dict` and `load_state_dict` with its checkpoints.
    """

    def __init__(self, windows: Windows, *, batches: int, trained: Callable[[], int], **options: Any) -> None:
        super().__init__(windows, batch_size=None, sampler=FromBatch(batches), **options)
        self._trained = trained

    @property
    def first(self) -> int:
        """The batch that comes first."""
        assert isinstance(self.sampler, FromBatch)
        return self.sampler.first

    def state_dict(self) -> dict[str, int]:
        """Batches that have been trained on."""
        return {"batches": self._trained()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start behind the batches already trained on."""
        assert isinstance(self.sampler, FromBatch)
        self.sampler.first = state["batches"]


class EngramDataModule(LightningDataModule):
    """Batches of one corpus for one run.

    Args:
        config: batch geometry.
        corpus: the opened token shards.
        hash: the n-gram hash of the network's memories, or None.
        seed: fixes the order of the windows.
        rows: is told the addresses of coming steps, where table rows live in a store.

    Raises:
        UserError: when the corpus holds fewer tokens than the run asks for, or less than one validation
            window.
    """

    def __init__(
        self,
        config: DataConfig,
        corpus: TokenCorpus,
        hash: NgramHash | None,
        *,
        seed: int,
        rows: TableRows | None = None,
    ) -> None:
        super().__init__()
        self.config, self.corpus, self.hash, self.seed, self.rows = config, corpus, hash, seed, rows
        available = (len(corpus.train) - 1) // config.sequence_length
        wanted = config.steps * config.batch_size
        if wanted > available and not config.repeat:
            raise UserError(
                f"data.tokens is {config.tokens:,}, but the corpus holds {len(corpus.train):,} training "
                f"tokens, enough for {available // config.batch_size * config.tokens_per_step:,}; ask for "
                "fewer, add text, or set data.repeat to true."
            )
        if available < 1 or len(corpus.validation) <= config.sequence_length:
            raise UserError(
                f"data.sequence_length is {config.sequence_length}, longer than the corpus "
                f"({len(corpus.train):,} training and {len(corpus.validation):,} validation tokens)."
            )

    def training_starts(self) -> np.ndarray:
        """First token of every training window of the run, in order: one permutation an epoch, [windows]."""
        T = self.config.sequence_length
        available = (len(self.corpus.train) - 1) // T
        wanted = self.config.steps * self.config.batch_size
        epochs = range(-(-wanted // available))
        order = [np.random.default_rng([self.seed, epoch]).permutation(available) for epoch in epochs]
        return np.concatenate(order)[:wanted] * T

    def validation_starts(self) -> np.ndarray:
        """First token of every validation window: evenly spread, in whole batches where there are several."""
        T, batch = self.config.sequence_length, self.config.batch_size
        available = (len(self.corpus.validation) - 1) // T
        limit = self.config.validation_tokens
        windows = available if limit is None else min(available, limit // T)
        if windows > batch:
            windows -= windows % batch
        return np.arange(windows) * available // windows * T

    def _windows(self, tokens: np.ndarray, starts: np.ndarray, micro_batches: int) -> Windows:
        trainer = self.trainer
        assert trainer is not None
        stride = self.config.batch_size // micro_batches
        share = stride // trainer.world_size
        return Windows(
            tokens,
            starts,
            sequence_length=self.config.sequence_length,
            batch_size=share,
            offset=share * trainer.global_rank,
            stride=stride,
            hash=self.hash,
        )

    def _loader_options(self) -> dict[str, Any]:
        workers = self.config.num_workers
        return {"num_workers": workers, "persistent_workers": False, "pin_memory": torch.cuda.is_available()}

    def train_dataloader(self) -> ResumableLoader | AnnouncingLoader:
        """Micro-batches {ids, targets [B, T], addresses [M, B, T, H]} of this device, or, with rows in a
        store, announced to it (training/ahead.py).
        """
        trainer = self.trainer
        assert trainer is not None
        accumulated = trainer.accumulate_grad_batches
        windows = self._windows(self.corpus.train, self.training_starts(), accumulated)
        loader = ResumableLoader(
            windows,
            batches=self.config.steps * accumulated,
            trained=lambda: trainer.global_step * accumulated,
            **self._loader_options(),
        )
        if self.rows is None:
            return loader
        return AnnouncingLoader(
            loader, self.rows.announce, micro_batches=accumulated, depth=self.rows.config.depth
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Batches of the validation windows, the same at every evaluation."""
        windows = self._windows(self.corpus.validation, self.validation_starts(), 1)
        return DataLoader(windows, batch_size=None, **self._loader_options())
