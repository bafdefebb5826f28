"""A worker process: takes cells from a study's queue and trains them until none waits.

Started by the study with `python -m engram_lab.studies.worker DIRECTORY`; imports and compiled code are
paid for once a worker, not once a cell.
"""

from __future__ import annotations

import atexit
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engram_lab.errors import UserError
from engram_lab.files import write_atomically
from engram_lab.recipe import Recipe
from engram_lab.studies.queue import StudyQueue
from engram_lab.text import prepare
from engram_lab.training.callbacks import Progress, StopRequest
from engram_lab.training.module import Diverged
from engram_lab.training.run import train

log = logging.getLogger(__name__)


def work(directory: Path) -> None:
    """Train cells of the study in `directory` until none waits or a stop is asked for."""
    job = json.loads((directory / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    queue = StudyQueue(directory, job["name"])
    me = queue.new_worker()
    stop = StopRequest()
    parent = os.getppid()
    with stop.listening():
        while stop.reason is None and (claim := queue.claim(me)) is not None:
            number, identity = claim
            cell = job["cells"][identity]
            log.info("training %s", cell["label"])
            try:
                recipe = Recipe.from_dict(cell["recipe"])
                result = train(
                    recipe,
                    corpus=prepare(recipe.text),
                    label=cell["label"],
                    tags=cell["tags"],
                    parent_run=job["parent_run"],
                    observer=_observer(directory / "progress" / f"{identity}.json", parent, stop),
                    stop=stop,
                    progress_bar=False,
                )
            except Diverged as error:
                queue.fail(number, f"diverged: {error}", retry=False)
            except KeyboardInterrupt:
                queue.give_back(number)
                return
            except UserError as error:
                queue.fail(number, str(error), retry=True)
            except Exception as error:
                log.exception("cell %s failed", cell["label"])
                queue.fail(number, f"{type(error).__name__}: {error}".splitlines()[0], retry=True)
            else:
                queue.finish(number, result.loss)
                log.info("loss %.4f after %.1f s", result.loss, result.seconds)
            _release()


def _release() -> None:
    """Give the GPU memory of the cell back, for the next one and for the workers beside this one."""
    gc.collect()  # trainer, module and callbacks refer to each other
    if torch.cuda.is_available():
        most, gib = torch.cuda.max_memory_reserved(), 2**30
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        log.info(
            "GPU memory: %.1f GiB at most, %.1f GiB kept", most / gib, torch.cuda.memory_reserved() / gib
        )


def _observer(file: Path, parent: int, stop: StopRequest) -> Callable[[Progress], None]:
    """Write the cell's progress for the study to read; stop when the study's own process is gone.

    `first` is the step from which the cell was continued: what came before was no work of this worker.
    """
    first: int | None = None

    def observe(progress: Progress) -> None:
        nonlocal first
        if os.getppid() != parent:
            stop.reason = "the end of the study's own process"
        first = progress.step if first is None else first
        steps = {"first": first, "step": progress.step, "steps": progress.steps}
        state = steps | {"speed": progress.tokens_per_second, "time": time.time()}
        write_atomically(file, json.dumps(state), durable=False)

    return observe


if __name__ == "__main__":
    atexit.register(gc.freeze)  # what is left then goes with the process; collecting it would take seconds
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    work(Path(sys.argv[1]))
