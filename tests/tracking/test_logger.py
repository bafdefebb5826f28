from __future__ import annotations

import math
import sqlite3
import time
from contextlib import closing
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from engram_lab.errors import UserError
from engram_lab.tracking import RunRecord, open_run, running
from engram_lab.tracking.client import client


class Module(LightningModule):
    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Linear(2, 1)
        self.fails_at = fails_at

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if index == self.fails_at:
            raise RuntimeError("out of memory")
        self.log("train/loss", float(index))
        return self.weight(batch).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", 2.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(record: RunRecord, steps: int) -> Trainer:
    return Trainer(
        max_steps=steps,
        logger=record.logger(),
        log_every_n_steps=1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


def data(n: int = 12) -> Any:
    return DataLoader(torch.ones(n, 2), batch_size=1)


def history(record: RunRecord, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client(record.uri).get_metric_history(record.run_id, key)]


def test_training_is_recorded_and_the_status_is_left_alone(uri: str) -> None:
    record = open_run(uri, "study", "cell", "n")
    run = trainer(record, 12)
    module = Module()
    run.fit(module, data(), data(2))
    run.validate(module, data(2), verbose=False)
    assert [value for _, value in history(record, "train/loss")] == list(range(12))
    assert history(record, "val/loss")[-1][1] == 2.0
    assert client(uri).get_run(record.run_id).info.status == "RUNNING"


def test_values_before_a_crash_are_kept(uri: str) -> None:
    record = open_run(uri, "study", "cell", "n")
    with pytest.raises(RuntimeError, match="out of memory"), running(record):
        trainer(record, 12).fit(Module(fails_at=7), data())
    assert len(history(record, "train/loss")) == 7
    run = client(uri).get_run(record.run_id)
    assert (run.info.status, run.data.tags["reason"]) == ("FAILED", "RuntimeError: out of memory")


def test_a_resumed_run_continues_its_curve(uri: str) -> None:
    for part in (range(5), range(4, 8)):  # step 4 is done again after the checkpoint
        record = open_run(uri, "study", "cell", "n")
        logger = record.logger()
        for step in part:
            logger.log_metrics({"train/loss": float(step + 10 * part[0])}, step=step)
        logger.finalize("success")
    steps = [step for step, _ in history(record, "train/loss")]
    assert sorted(steps) == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    last = dict(history(record, "train/loss"))  # readers keep the last value of a step
    assert [last[step] for step in range(8)] == [0, 1, 2, 3, 44, 45, 46, 47]


def test_strange_names_and_values(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    record = open_run(uri, "study", "cell", "n")
    logger = record.logger()
    for step in range(2):
        logger.log_metrics({"gate[0.9]": math.inf, "nan": math.nan, "t": torch.tensor(2.5)}, step=step)
    logger.finalize("success")
    metrics = client(uri).get_run(record.run_id).data.metrics
    assert metrics["gate_0.9_"] > 1e308
    assert math.isnan(metrics["nan"])
    assert metrics["t"] == 2.5
    assert caplog.text.count("'gate[0.9]' is stored as 'gate_0.9_'") == 1


def test_parameters_are_written_once(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    record = open_run(uri, "study", "cell", "n")
    many = {f"p{i}": i for i in range(250)}
    record.logger().log_hyperparams({"model": {"width": 64}, "text": "x" * 9000, **many})
    assert "keeps its first values" not in caplog.text
    record.logger().log_hyperparams({"model": {"width": 128}, "new": 1})
    params = client(uri).get_run(record.run_id).data.params
    assert params["model/width"] == "64"
    assert params["new"] == "1"
    assert len(params["text"]) == 6000
    assert len(params) == 253
    assert "keeps its first values of the parameters model/width" in caplog.text


def test_save_does_not_touch_the_store(uri: str) -> None:
    record = open_run(uri, "study", "cell", "n")
    logger = record.logger(flush_seconds=60)
    logger.log_metrics({"loss": 1.0}, step=0)
    logger.save()
    assert history(record, "loss") == []
    logger.finalize("success")
    assert history(record, "loss") == [(0, 1.0)]


def test_a_store_that_is_locked_for_a_while(uri: str) -> None:
    """Points wait while another program holds the file, then arrive."""
    record = open_run(uri, "study", "cell", "n")
    logger = record.logger(flush_points=1)
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        logger.log_metrics({"loss": 1.0}, step=0)
        logger.log_metrics({"loss": 0.5}, step=1)
        other.execute("ROLLBACK")
    logger.finalize("success")
    assert history(record, "loss") == [(0, 1.0), (1, 0.5)]


def test_a_failed_run_does_not_wait_for_a_store_that_refuses(
    uri: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """The error that ends the training is raised; what the store says is logged, in one line each."""
    record = open_run(uri, "study", "cell", "n")
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"))) as other:
        for table in ("metrics", "tags"):
            other.execute(f"ALTER TABLE {table} RENAME TO {table}_away")
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="out of memory"), running(record):
        trainer(record, 12).fit(Module(fails_at=7), data())
    assert time.monotonic() - started < 20
    said = [r.message for r in caplog.records if r.name.startswith("engram_lab")]
    assert [text.partition(": ")[0].replace(record.run_id, "RUN") for text in said] == [
        "metrics wait",
        f"14 metric values could not be written to run RUN of {uri}",
        "how run RUN ended was not recorded",
    ]
    assert not any("\n" in text for text in said)
    assert "Traceback" not in capfd.readouterr().err


def test_a_run_that_was_deleted_is_reported(uri: str) -> None:
    record = open_run(uri, "study", "cell", "n")
    logger = record.logger()
    logger._writer._patience = 0.1
    client(uri).delete_run(record.run_id)
    logger.log_metrics({"loss": 1.0}, step=0)
    with pytest.raises(UserError, match=f"1 metric values could not be written to run {record.run_id}"):
        logger.finalize("success")
