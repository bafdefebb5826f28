"""The Lightning logger of the platform: MLflow, without a call to the store in a training step."""

from __future__ import annotations

import logging
import time
from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from engram_lab.tracking import names
from engram_lab.tracking.client import client, one_sentence, resolve
from engram_lab.tracking.record import write_params
from engram_lab.tracking.writer import MetricWriter, Point

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)


class BufferedMLFlowLogger(Logger):
    """Writes the metrics of a run that `open_run` opened.

    The status of the run is not this logger's business (Lightning finalises loggers after every fit,
    validate and test): wrap the training in `engram_lab.tracking.running`. Points go out at 500 waiting,
    after 5 s and at `finalize`; `save`, which Lightning calls every few steps, writes nothing. Only rank
    zero writes.

    Args:
        uri: address of the store.
        run_id: MLflow id of the run; other ranks may pass "".
        flush_points: how many points start a write.
        flush_seconds: how long a point waits at most.
    """

    def __init__(self, uri: str, run_id: str, *, flush_points: int = 500, flush_seconds: float = 5.0) -> None:
        super().__init__()
        self._uri = resolve(uri)
        self._run_id = run_id
        self._names: dict[str, str] = {}
        self._writer = MetricWriter(
            self._send,
            f"run {run_id} of {self._uri}",
            flush_points=flush_points,
            flush_seconds=flush_seconds,
        )

    @property
    def name(self) -> str:
        """The word "mlflow": the experiment's name is not a folder of checkpoints."""
        return "mlflow"

    @property
    def version(self) -> str:
        """MLflow id of the run."""
        return self._run_id

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """MLflow's client, for what has no method here; it does not see points that still wait."""
        return client(self._uri)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take the values of one step. Infinities and NaN are kept; names get the letters that MLflow allows.

        Raises UserError when earlier values could not be written for two minutes.
        """
        now = int(time.time() * 1000)
        self._writer.add([Point(self._name(key), float(metrics[key]), now, step or 0) for key in metrics])

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write parameters once: MLflow never changes one, so a resumed run only adds those it lacks.

        The whole configuration, uncut, belongs in an artifact (`RunRecord.log_text`).
        """
        flat = _flatten_dict(_convert_params(params))
        with one_sentence(self._uri):
            changed = write_params(self._uri, self._run_id, flat)
        if changed:
            log.warning("the resumed run keeps its first values of the parameters %s", ", ".join(changed))

    @rank_zero_only
    def flush(self) -> None:
        """Write what waits, before a checkpoint that a killed run continues from; what is refused stays."""
        self._writer.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits. Raises UserError when the store does not take it for two minutes.

        After a failure, which is what the user must hear of, one attempt is made and a loss is only logged.
        """
        if status == "success":
            self._writer.close()
        else:
            self._writer.leave()

    def _name(self, key: str) -> str:
        if key in self._names:
            return self._names[key]
        name = self._names[key] = names.metric_name(key)
        if name != key:
            log.warning(
                "metric %r is stored as %r: MLflow allows letters, digits, _ - . / and space", key, name
            )
        return name

    def _send(self, points: list[Point]) -> None:
        from mlflow.entities import Metric

        client(self._uri).log_batch(self._run_id, metrics=[Metric(*point) for point in points])
