"""A run may begin with the table rows of another, and only with those that mean the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engram_lab.errors import UserError
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.saved_rows import INDEX, SavedRows
from engram_lab.model import hashing
from engram_lab.model.checkpoint import load
from engram_lab.recipe import Recipe, resolve, run_directory
from engram_lab.text import prepare
from engram_lab.training import preflight
from engram_lab.training.callbacks import StopRequest
from engram_lab.training.rows import TableRows
from engram_lab.training.run import train


def recipe(tiny: dict[str, Any], folder: Path, memory: dict[str, Any], **overrides: Any) -> Recipe:
    tracking = {"uri": f"sqlite:///{folder}/mlflow.db", "directory": str(folder)}
    values = {**tiny, "memory": memory, "tracking": tracking}
    return Recipe.from_dict(values).override(overrides)


def saved_by(recipe: Recipe) -> Path:
    result = train(recipe, progress_bar=False)
    return run_directory(recipe, result.identity) / "model"


@pytest.fixture
def saved(tiny: dict[str, Any], tmp_path: Path) -> Path:
    """The network of a short run, its rows in shards beside it."""
    return saved_by(recipe(tiny, tmp_path / "before", {"tier": "host"}, **{"data.tokens": 32 * 4 * 6}))


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The records [R, S] in the store of every run when its training starts."""
    found: list[Tensor] = []
    start = TableRows.on_fit_start

    def looked_at(self: TableRows, *given: Any) -> None:
        start(self, *given)
        store = self.pipeline.store
        found.append(torch.empty(store.rows, store.record_bytes, dtype=torch.uint8))
        store.read(torch.arange(store.rows), found[-1])

    monkeypatch.setattr(TableRows, "on_fit_start", looked_at)
    return found


@pytest.mark.parametrize(
    "memory", [{"tier": "host"}, {"tier": "disk", "cache_rows": 0}, {"unique_rows": True}]
)
def test_a_run_begins_with_exactly_the_rows_of_another(
    tiny: dict[str, Any], tmp_path: Path, saved: Path, begun: list[Tensor], memory: dict[str, Any]
) -> None:
    memory = {**memory, "initial_rows": str(saved)}
    again = recipe(tiny, tmp_path / "after", memory, seed=5, **{"data.tokens": 32 * 4 * 6})
    train(again, progress_bar=False)
    layout = RecordLayout(row_dim=4, rule="adam")
    rows = SavedRows(saved)
    expected = torch.cat([rows.weights(name, 0, count) for name, count in rows.tables.items()])
    fields = layout.fields(begun[0])
    assert torch.equal(fields["weight"], expected)
    assert all((values == 0).all() for kind, values in fields.items() if kind != "weight")


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_run_begins_with_the_rows_of_a_dense_table(
    tiny: dict[str, Any], tmp_path: Path, begun: list[Tensor], storage: str
) -> None:
    """Rows that trained as one parameter on the device are not rounded to what they are read in."""
    short = {"data.tokens": 32 * 4 * 6, "model.engram.row_storage": storage}
    dense = saved_by(recipe(tiny, tmp_path / "before", {}, **short))
    memory = {"tier": "host", "initial_rows": str(dense)}
    train(recipe(tiny, tmp_path / "after", memory, **short), progress_bar=False)
    expected = torch.cat([table.weight for table in load(dense).tables]).detach()
    assert torch.equal(RecordLayout(row_dim=4, rule="adam").fields(begun[0])["weight"], expected)
    assert torch.equal(expected, expected.bfloat16().float()) is False


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_stopped_run_goes_on_from_rows_that_were_given(
    tiny: dict[str, Any], tmp_path: Path, saved: Path, tier: str
) -> None:
    memory = {"tier": tier, "initial_rows": str(saved)}
    whole = train(recipe(tiny, tmp_path / "whole", memory), progress_bar=False)
    drawn = train(recipe(tiny, tmp_path / "drawn", {"tier": tier}), progress_bar=False)
    assert whole.loss != drawn.loss
    stop = StopRequest()

    def observe(progress: Any) -> None:
        if progress.step == 10:
            stop.reason = "the test"

    with pytest.raises(KeyboardInterrupt):
        train(recipe(tiny, tmp_path / "run", memory), observer=observe, stop=stop, progress_bar=False)
    again = train(recipe(tiny, tmp_path / "run", memory), progress_bar=False)
    assert (again.loss, again.identity) == (whole.loss, whole.identity)


def test_given_rows_are_part_of_the_run_by_what_they_are(
    tiny: dict[str, Any], tmp_path: Path, saved: Path
) -> None:
    corpus = prepare(Recipe.from_dict(tiny).text)

    def identity(**memory: Any) -> str:
        return resolve(recipe(tiny, tmp_path, {"tier": "host", **memory}), corpus).identity

    other = saved_by(recipe(tiny, tmp_path / "other", {"tier": "host"}, **{"data.tokens": 32 * 4 * 7}))
    copy = shutil.copytree(saved, tmp_path / "copy")
    assert identity(initial_rows=None) == identity()
    assert identity(initial_rows=str(copy)) == identity(initial_rows=str(saved)) != identity()
    assert identity(initial_rows=str(other)) != identity(initial_rows=str(saved))


def _other_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "HASH_VERSION", hashing.HASH_VERSION + 1)


def _other_index(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / INDEX).write_text(json.dumps(json.loads((folder / INDEX).read_text())))


@pytest.mark.parametrize(
    ("change", "overrides", "says"),
    [
        (
            lambda folder, _: shutil.rmtree(folder),
            {},
            "memory.initial_rows cannot be used: there is no folder '.*'; name the `model` folder",
        ),
        (
            lambda folder, _: (folder / INDEX).unlink(),
            {},
            "memory.initial_rows cannot be used: .* holds no exported table rows: there is no rows.index",
        ),
        (
            lambda folder, _: [file.unlink() for file in folder.iterdir()],
            {},
            "memory.initial_rows cannot be used: .* is no checkpoint: it holds no model.json",
        ),
        (
            lambda folder, _: shutil.move(shutil.move(folder, folder.parent / "x"), folder / "model"),
            {},
            "is a run's folder; name '.*/model'",
        ),
        (lambda folder, _: (folder / "model.json").unlink(), {}, "is no checkpoint: it holds no model.json"),
        (
            None,
            {"budget.rho": 0.4},
            r"memory.initial_rows needs .* as in that network. The table rows in .* are "
            r"tables\.0\.weight \[.*, 4\], but the network's",
        ),
        (None, {"model.engram.row_dim": 8, "budget.rho": None}, r"but the network's are .*, 8\]"),
        (None, {"model.engram.hash_seed": 3}, "trained for other n-grams; the tokenizer and model.engram's"),
        (None, {"model.engram.canonical": False}, "trained for other n-grams"),
        (_other_hash, {}, "trained with hash version 1, but this is version 2"),
        (_other_index, {}, "whose table rows are not those of the network saved there"),
        (None, {"budget.rho": 1.0}, "the network reads no table by n-gram; leave it out"),
    ],
)
def test_rows_that_do_not_fit_are_refused_before_the_run(
    tiny: dict[str, Any],
    tmp_path: Path,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], object] | None,
    overrides: dict[str, Any],
    says: str,
) -> None:
    if change is not None:
        change(saved, monkeypatch)
    wrong = recipe(tiny, tmp_path / "after", {"tier": "host", "initial_rows": str(saved)}, **overrides)
    with pytest.raises(UserError, match=says) as caught:
        train(wrong, progress_bar=False)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "after" / "runs").exists()


def test_a_network_without_a_table_has_no_rows_to_begin_with(tiny: dict[str, Any], tmp_path: Path) -> None:
    short = {"data.tokens": 32 * 4 * 6}
    experts = saved_by(recipe(tiny, tmp_path / "before", {}, **short, **{"budget.rho": 1.0}))
    wrong = recipe(tiny, tmp_path / "after", {"tier": "host", "initial_rows": str(experts)})
    with pytest.raises(UserError, match=r"cannot be used: '.*/model' holds a network that reads no table by"):
        train(wrong, progress_bar=False)


def test_the_tokenizer_must_be_the_one_the_rows_were_trained_with(
    tiny: dict[str, Any], tmp_path: Path, saved: Path
) -> None:
    text = tiny["text"] | {"source": str(tmp_path / "half.jsonl")}
    lines = Path(tiny["text"]["source"]).read_text().splitlines(keepends=True)
    (tmp_path / "half.jsonl").write_text("".join(lines[:20]))
    wrong = recipe({**tiny, "text": text}, tmp_path / "after", {"tier": "host", "initial_rows": str(saved)})
    with pytest.raises(UserError, match="trained for other n-grams"):
        train(wrong, progress_bar=False)
