"""Table rows in a store, as a run sees them: opened when training starts, served, saved and counted.

The run does not ask where rows live: this callback builds the store of the recipe's tier, lets the
pipeline serve it, saves the rows that changed with every checkpoint, and logs what their travel costs.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import Progress as Bar
from torch import Tensor, nn

from engram_lab.errors import UserError
from engram_lab.memory.config import MemoryConfig
from engram_lab.memory.disk import DiskStore
from engram_lab.memory.export import export_rows
from engram_lab.memory.far import FarTable
from engram_lab.memory.host import HostStore
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.peers import Peers, total
from engram_lab.memory.pipeline import RowPipeline
from engram_lab.memory.row_checkpoint import Manifest, RowCheckpoints
from engram_lab.memory.row_optimizer import RowOptimizer
from engram_lab.memory.service import RowService
from engram_lab.memory.shard import Shard
from engram_lab.memory.sharded import ShardedPipeline
from engram_lab.memory.sinkhorn import MOMENTUM
from engram_lab.memory.stores import DeviceStore, Initial, RowStore
from engram_lab.model.checkpoint import given_rows, table_sizes
from engram_lab.model.engram import EngramConfig
from engram_lab.model.hashing import table_rows
from engram_lab.model.initialise import initial_rows
from engram_lab.recipe import ResolvedRun
from engram_lab.training.optimizer import OptimizerConfig, lr_multiplier

STATE = "table_rows"
WORTH_A_BAR = 1 << 30  # bytes of records


def record_layout(config: MemoryConfig, engram: EngramConfig, optimizer: OptimizerConfig) -> RecordLayout:
    """What belongs to a row of a run."""
    return RecordLayout(
        row_dim=engram.row_dim,
        weights=config.rows,
        rule=None if engram.frozen_table else optimizer.table_optimizer,
        state=config.state,
    )


def moves_records(run: ResolvedRun) -> bool:
    """Whether the run has table rows that move as records."""
    engram = run.network.engram
    return engram is not None and engram.n_heads > 0 and run.recipe.memory.by_record


class TableRows(Callback):
    """The rows of all memories of one run.

    Args:
        config: tier and formats.
        engram: which memories there are.
        optimizer: rule and rates of the tables.
        total_steps: optimizer steps of the run.
        seed: fixes the initial rows and the random rounding.
        directory: the run's folder.
        identity: the run's identity, by which its files are known.
        every: optimizer steps between log lines.
    """

    def __init__(
        self,
        config: MemoryConfig,
        engram: EngramConfig,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        seed: int,
        directory: Path,
        identity: str,
        every: int,
    ) -> None:
        self.config, self.engram, self.optimizer = config, engram, optimizer
        self.total_steps, self.seed, self.identity, self.every = total_steps, seed, identity, every
        self.file = Path(config.directory or directory) / f"{identity}.table"
        self.first_row = [0, *itertools.accumulate(table_rows(engram))]  # and, last, the number of rows
        self.layout = record_layout(config, engram, optimizer)
        self.tables = nn.ModuleList(FarTable(memory) for memory in range(len(engram.layers)))
        self.checkpoints = RowCheckpoints(directory / "rows", self.layout, identity)
        self._given: Initial | None = None
        if config.initial_folder is not None:
            self._given = given_rows(config.initial_folder).initial(self.layout, table_sizes(engram))
        self._pipeline: RowService | None = None
        self._shows = False
        self._manifests: list[Manifest] = []
        self._hits = self._reads = 0  # of the disk's store, at the last log line

    @property
    def pipeline(self) -> RowService:
        """The rows' travel; there once training has started."""
        assert self._pipeline is not None
        return self._pipeline

    @property
    def announce(self) -> Callable[[int, list[Tensor]], None]:
        """Takes the addresses of coming steps."""
        return self.pipeline.announce

    def reading(self, batch: dict[str, Any]) -> Tensor:
        """Return what the memories read in an announced micro-batch, [M, B, T, H * U]."""
        if batch["micro_batch"] == 0:
            self.pipeline.begin(batch["step"])
        return self.pipeline.reading(batch["micro_batch"])

    def populated(self, memory: int) -> float:
        """Share of a memory's rows that training has read; called by all ranks."""
        first, last = self.first_row[memory : memory + 2]
        return sum(self.pipeline.of_all_ranks(self.pipeline.touched.share(first, last)))

    @cached_property
    def rates(self) -> Callable[[int], float]:
        """The tables' learning rate at an optimizer step, from 1 on."""
        base = self.optimizer.learning_rate * self.optimizer.table_lr_multiplier
        multiplier = lr_multiplier(self.optimizer, self.total_steps)
        return lambda step: base * multiplier(step - 1)

    def initial(self, first: int, count: int, out: Tensor) -> None:
        """Write the records of rows `first` to `first + count` as they are before training."""
        if self._given is not None:
            self._given(first, count, out)
            return
        for memory, start in enumerate(self.first_row[:-1]):
            low, high = max(first, start), min(first + count, self.first_row[memory + 1])
            if low < high:
                weights = torch.empty(high - low, self.engram.row_dim)
                initial_rows(self.seed, memory, low - start, weights)
                self.layout.encode(weights, out[low - first : high - first])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note which rows belong to the checkpoint; the store is opened later."""
        if STATE not in checkpoint:
            raise UserError(
                "the run's checkpoint was written with memory.tier resident, whose table trains as one dense "
                "parameter; go on with that, or delete the run's folder to train it anew."
            )
        self._manifests = checkpoint[STATE]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the store, bring it to where the run stands, and begin to serve it."""
        device = trainer.strategy.root_device
        # In this order: what fails on one rank then does so where the others come to know of it.
        peers = Peers(device) if trainer.world_size > 1 else None
        store = self._open(device, peers)
        optimizer = None
        if self.layout.rule is not None:
            optimizer = RowOptimizer(
                self.layout,
                betas=self.optimizer.betas,
                eps=self.optimizer.eps,
                momentum=MOMENTUM,
                rates=self.rates,
                seed=self.seed,
                first_row=self.first_row[:-1],
                total=total if peers is not None else lambda part: part,
            )
        options: dict[str, Any] = {
            "device": device,
            "storage": self.engram.row_storage,
            "committed": max((m["step"] for m in self._manifests), default=0),
            "threads": self.config.threads,
        }
        owns = None
        if peers is not None:
            assert isinstance(store, Shard)
            owns = store.owns
            self._pipeline = ShardedPipeline(
                store, peers, self.layout, optimizer, self.first_row[:-1], **options
            )
        else:
            self._pipeline = RowPipeline(store, self.layout, optimizer, self.first_row[:-1], **options)
        self._shows = trainer.progress_bar_callback is not None and trainer.is_global_zero
        with self._progress(
            f"table rows, {self.first_row[-1] * self.layout.record_bytes / 2**30:.0f} GiB"
        ) as progress:
            touched = self.checkpoints.restore(self._manifests, store, self.initial, owns, progress)
        self._pipeline.touched.mark(touched)
        self._pipeline.touched.take_recent()
        for table in self.tables:
            assert isinstance(table, FarTable)
            table.connect(self._pipeline)

    def _open(self, device: torch.device, peers: Peers | None) -> RowStore:
        rows, size, threads = self.first_row[-1], self.layout.record_bytes, self.config.threads
        if peers is not None:
            assert self.config.tier == "sharded", self.config.tier  # preflight allows no other
            return Shard(rows, size, device, rank=peers.rank, ranks=peers.ranks)
        if self.config.tier in ("resident", "sharded"):
            return DeviceStore(rows, size, device)
        if self.config.tier == "host":
            return HostStore(rows, size, threads=threads)
        cache = self.config.cache_rows
        return DiskStore(self.file, self.layout, rows, self.identity, cache_rows=cache, threads=threads)

    @contextmanager
    def _progress(self, what: str) -> Iterator[Callable[[int, int], None] | None]:
        """Show how far filling or writing the table is, where that takes long and the run shows progress."""
        rows = self.first_row[-1]
        if rows * self.layout.record_bytes < WORTH_A_BAR or not self._shows:
            yield None
            return
        with Bar() as bar:
            task = bar.add_task(f"{rows:,} {what}")
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the rows that changed since the last checkpoint under its step.

        Every rank saves its own. The checkpoint, which the first rank writes, lists the files of all, and it
        has that list only when all of them are on the disk.
        """
        self.pipeline.flush()
        recent, rank = self.pipeline.touched.take_recent(), trainer.global_rank
        manifest = self.checkpoints.save(trainer.global_step, self.pipeline.store, recent, rank)
        self._manifests = checkpoint[STATE] = self.pipeline.of_all_ranks(manifest)

    def committed(self) -> None:
        """Delete the files of rows that the checkpoint just put in place needs no more."""
        self.checkpoints.committed(self._manifests, self.pipeline.store)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the rows' travel cost a step, at every `every`-th optimizer step and at the last.

        All of it is of the steps since the last line. The disk's share of hits is of its rows read meanwhile,
        those of steps gathered ahead, of evaluations and of checkpoints among them.
        """
        step = trainer.global_step
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.logger is None or not stepped or (step % self.every and step != self.total_steps):
            return
        e = self.pipeline.take_economy()
        numbers = {
            "rows/unique": e.unique / e.steps,
            "rows/unique_share": e.unique / e.reads,
            "rows/repeated_share": e.repeated / e.unique,
            "rows/bytes_moved": e.bytes_moved / e.steps,
            "rows/wait_seconds": e.waited / e.steps,
            "train/lr_tables": self.rates(step),
        }
        store = self.pipeline.store
        if isinstance(store, DiskStore):
            hits, reads = store.hits - self._hits, store.reads - self._reads
            self._hits, self._reads = self._hits + hits, self._reads + reads
            if reads:  # none, where all steps of the line had been gathered before it
                # The thread that gathers may count a step between the two looks.
                numbers["rows/cache_hit_share"] = min(1.0, hits / reads)
        trainer.logger.log_metrics(numbers, step=step)

    def export(self, folder: Path) -> None:
        """Write the trained rows to a saved network's folder, as they are read or trained.

        Called by all ranks: the first writes, the others hand out their rows.
        """
        read_as = self.engram.row_storage
        with self.pipeline.whole() as store:
            if store is None:
                return
            with self._progress("rows to write") as progress:
                export_rows(
                    store,
                    folder,
                    table_sizes(self.engram),
                    self.pipeline.weights,
                    row_dim=self.engram.row_dim,
                    storage=self.config.rows if read_as == "float32" else read_as,
                    progress=progress,
                )

    def discard(self) -> None:
        """Delete what a finished run needs no more: the rows of its checkpoints, and the table's file."""
        self.close()
        shutil.rmtree(self.checkpoints.directory, ignore_errors=True)
        for file in self.file.parent.glob(f"{self.file.name}*"):  # with its logs, of an earlier tier too
            file.unlink()

    def close(self) -> None:
        """Let updates under way land, and end threads, memory and files."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
