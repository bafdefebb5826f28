"""How far a single run is, told in lines where there is no terminal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from engram_lab.recipe import Recipe
from engram_lab.training import progress
from engram_lab.training.callbacks import Progress, StepLog, StopRequest
from engram_lab.training.module import EngramModule
from engram_lab.training.progress import Lines
from engram_lab.training.run import train


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that is claimed."""
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


class Clock:
    """Time that passes when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: self.now))


class Run:
    """A run of 100 steps of 1,000 tokens, evaluated every 40, of which only the callback `lines` is real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, step: int = 0, first: bool = True) -> None:
        self.clock = Clock(monkeypatch)
        self.log = StepLog(every=1, steps=100, tokens_per_step=1000)
        self.lines = Lines(self.log, 40)
        self.trainer = SimpleNamespace(
            global_step=step, is_global_zero=first, state=SimpleNamespace(fn=TrainerFn.FITTING)
        )
        self.module = EngramModule.__new__(EngramModule)
        object.__setattr__(self.module, "evaluated", (step, {"val/loss": 2.5}))
        self.lines.setup(self._trainer, self.module, "fit")
        self.lines.on_train_start(self._trainer, self.module)

    @property
    def _trainer(self) -> Trainer:
        return cast(Trainer, self.trainer)

    def steps(self, count: int, seconds: float) -> None:
        """Take steps of so many seconds each."""
        for _ in range(count):
            self.clock.now += seconds
            self.trainer.global_step += 1
            self.log.latest = Progress(self.trainer.global_step, 100, 1000 / seconds, 3.0)
            self.lines.on_train_batch_end(self._trainer, self.module, None, None, 0)

    def evaluate(self, seconds: float) -> None:
        self.lines.on_validation_start(self._trainer, self.module)
        self.clock.now += seconds
        self.lines.on_validation_end(self._trainer, self.module)


def test_lines_come_at_the_beginning_after_evaluations_and_else_every_thirty_seconds(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(Recipe.from_dict(tiny))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "training: 24 steps, 3,072 tokens"
    assert [line.split(",")[0] for line in lines[1:]] == ["step 8 of 24", "step 16 of 24"]
    for line in lines[1:]:
        told = dict(part.rsplit(" ", 1) for part in line.split(", ") if " loss " in part)
        assert set(told) == {"training loss", "validation loss"}
        assert float(told["validation loss"]) > result.loss > 1
        assert line.endswith(" tokens/s")  # nothing is said of what is left after so short a time


def test_every_step_is_told_once_where_each_takes_thirty_seconds(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Lines, "EVERY_SECONDS", 0.0)
    train(Recipe.from_dict(tiny).override({"trainer.accumulate_grad_batches": 2}))
    told = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert told == [str(step) for step in range(1, 24)]


def test_a_resumed_run_says_from_where(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()

    def observer(progress: Progress) -> None:
        if progress.step == 7:
            stop.reason = "a test"

    with pytest.raises(KeyboardInterrupt):
        train(Recipe.from_dict(tiny), observer=observer, stop=stop)
    capsys.readouterr()
    train(Recipe.from_dict(tiny))
    assert capsys.readouterr().out.startswith("training: 24 steps, 3,072 tokens, from step 7 on\n")


def test_a_terminal_shows_a_bar_and_no_lines(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "has_bars", lambda: True)
    train(Recipe.from_dict(tiny))
    out = capsys.readouterr().out
    assert "Training" in out
    assert "step 8" not in out
    assert "training:" not in out


@pytest.mark.parametrize("settings", [{"progress_bar": False}, {}])
def test_nothing_is_told_where_it_was_switched_off(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], settings: dict[str, bool]
) -> None:
    recipe = Recipe.from_dict(tiny)
    train(recipe if settings else recipe.override({"trainer.enable_progress_bar": False}), **settings)  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""


def test_what_is_left_leaves_start_up_out_and_counts_evaluations(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch)
    run.steps(1, 60.0)  # compiles
    run.steps(39, 1.0)
    run.evaluate(20.0)
    run.steps(30, 1.0)
    assert capsys.readouterr().out.splitlines() == [
        "training: 100 steps, 100,000 tokens",
        "step 1 of 100, 1,000 tokens, training loss 3.0000, 17 tokens/s",
        "step 31 of 100, 31,000 tokens, training loss 3.0000, 1,000 tokens/s, "
        "about 1 min 9 s of training left",
        "step 40 of 100, 40,000 tokens, training loss 3.0000, validation loss 2.5000, 1,000 tokens/s, "
        "about 1 min 40 s of training and evaluation left",  # 60 steps, and evaluations at 80 and 100
        "step 70 of 100, 70,000 tokens, training loss 3.0000, 1,000 tokens/s, "
        "about 1 min 10 s of training and evaluation left",
    ]
    run.steps(10, 1.0)
    run.evaluate(20.0)
    run.steps(20, 1.0)
    run.trainer.state.fn = TrainerFn.VALIDATING
    run.evaluate(20.0)  # its loss is the run's result, which the command tells
    assert capsys.readouterr().out.splitlines() == [
        "step 80 of 100, 80,000 tokens, training loss 3.0000, validation loss 2.5000, 1,000 tokens/s, "
        "about 40 s of training and evaluation left"  # the last one at 100
    ]


def test_only_the_first_process_tells(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch, step=10, first=False)
    run.steps(30, 40.0)
    run.evaluate(1.0)
    assert capsys.readouterr().out == ""


def test_lines_reach_a_file_while_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    with file.open("w") as out:
        monkeypatch.setattr("sys.stdout", out)
        Run(monkeypatch)
        assert file.read_text() == "training: 100 steps, 100,000 tokens\n"


def test_an_old_loss_is_not_told_beside_a_new_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(monkeypatch)
    run.steps(5, 1.0)
    run.evaluate(1.0)
    run.trainer.global_step += 1  # nothing was logged of this one
    run.evaluate(1.0)
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert "training loss 3.0000" in first
    assert "tokens/s" in first
    assert second.startswith("step 6 of 100, 6,000 tokens, validation loss 2.5000")
    assert "tokens/s" not in second
