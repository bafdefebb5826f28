"""One opened run: what is written to it and how it ends."""

from __future__ import annotations

import logging
import numbers
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_lab.errors import UserError
from engram_lab.tracking import names
from engram_lab.tracking.client import client, one_sentence

if TYPE_CHECKING:
    from engram_lab.tracking.logger import BufferedMLFlowLogger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """A run that `open_run` opened.

    Every method raises UserError when the store refuses, but for those that mark a run which an error ends:
    that error is what the user must hear of.

    Args:
        uri: absolute address of the store.
        run_id: MLflow's id of the run.
    """

    uri: str
    run_id: str

    def logger(self, *, flush_points: int = 500, flush_seconds: float = 5.0) -> BufferedMLFlowLogger:
        """Return a Lightning logger that writes this run's metrics in the background."""
        from engram_lab.tracking.logger import BufferedMLFlowLogger

        return BufferedMLFlowLogger(
            self.uri, self.run_id, flush_points=flush_points, flush_seconds=flush_seconds
        )

    def log_values(self, values: Mapping[str, float], step: int = 0) -> None:
        """Write metrics now, in one call. Infinities and NaN are kept."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(names.metric_name(key), float(value), now, step) for key, value in values.items()]
        with one_sentence(self.uri):
            client(self.uri).log_batch(self.run_id, metrics=points)

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a file, or a whole folder under its name, below `folder` in the run's artifacts.

        What was kept under that name before is overwritten.
        """
        path = Path(path).resolve()
        if not path.exists():
            raise UserError(f"The file {str(path)!r} does not exist; there is nothing to keep with the run.")
        with one_sentence(self.uri):
            client(self.uri).log_artifact(self.run_id, str(path), folder)

    def log_text(self, text: str, name: str) -> None:
        """Keep `text` as the artifact `name`, the resolved configuration for example."""
        with one_sentence(self.uri):
            client(self.uri).log_text(self.run_id, text, name)

    def tag(self, tags: Mapping[str, object]) -> None:
        """Write tags: text as it is, numbers as their repr; None removes one."""
        with one_sentence(self.uri):
            write_tags(self.uri, self.run_id, tags)

    def log_params(self, values: Mapping[str, Any]) -> None:
        """Write the parameters that the run lacks, nested ones by dotted names; None is left out.

        A run that is opened again keeps the values it has: MLflow never changes one.
        """
        with one_sentence(self.uri):
            write_params(self.uri, self.run_id, _dotted(values))

    def finish(self, loss: float | None = None) -> None:
        """Mark the run finished, with its final validation loss in nats a token if it has one."""
        if loss is not None:
            self.log_values({names.FINAL_LOSS: loss})
        self.end("FINISHED", None)

    def fail(self, reason: str) -> None:
        """Mark the run failed, and why, if the store takes it."""
        self.leave("FAILED", reason)

    def interrupt(self, reason: str) -> None:
        """Mark the run killed, if the store takes it: somebody stopped it, and opening it continues it."""
        self.leave("KILLED", reason)

    def leave(self, status: str, reason: str | None) -> None:
        """Do what `end` does; a refusal is logged and hides nothing: the run says RUNNING until `reap`."""
        try:
            self.end(status, reason)
        except UserError as refused:
            log.error("how run %s ended was not recorded: %s", self.run_id, refused)

    def end(self, status: str, reason: str | None) -> None:
        """Write MLflow's status of a run that is over, and why it has it where there is something to say."""
        with one_sentence(self.uri):
            write_tags(self.uri, self.run_id, {names.REASON: reason})
            client(self.uri).set_terminated(self.run_id, status)


def write_tags(uri: str, run_id: str, tags: Mapping[str, object]) -> None:
    """Write tags of a run in one call, and remove those that are None."""
    from mlflow.entities import RunTag

    store = client(uri)
    written = [RunTag(key, tag_text(value)) for key, value in tags.items() if value is not None]
    if written:
        store.log_batch(run_id, tags=written)
    if absent := [key for key, value in tags.items() if value is None]:
        present = store.get_run(run_id).data.tags
        for key in absent:
            if key in present:
                store.delete_tag(run_id, key)


def write_params(uri: str, run_id: str, values: Mapping[str, object]) -> list[str]:
    """Write those parameters that a run lacks, cut at 6,000 letters; return those it keeps another value of.

    One call takes a hundred, which is more than a recipe usually has.
    """
    from mlflow.entities import Param

    store = client(uri)
    known = store.get_run(run_id).data.params
    texts = {names.metric_name(key): str(value)[: names.LONGEST_PARAM] for key, value in values.items()}
    lacking = [Param(key, text) for key, text in texts.items() if key not in known]
    for first in range(0, len(lacking), names.LARGEST_PARAMS):
        store.log_batch(run_id, params=lacking[first : first + names.LARGEST_PARAMS])
    return sorted(key for key, text in texts.items() if known.get(key, text) != text)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _dotted(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def tag_text(value: object) -> str:
    """Return a tag's text: text as it is (cut at 5,000), numbers as their repr, NumPy's like Python's."""
    if isinstance(value, bool | str):
        return str(value)[: names.LONGEST_TAG]
    if isinstance(value, numbers.Integral):
        return repr(int(value))
    if isinstance(value, numbers.Real):
        return repr(float(value))
    raise TypeError(f"a tag holds text or a number, not {type(value).__name__}: {value!r}")
