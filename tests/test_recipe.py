from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from engram_lab.errors import UserError
from engram_lab.recipe import Recipe, resolve
from engram_lab.text import prepare

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


def identity(values: dict[str, Any]) -> str:
    recipe = Recipe.from_dict(values)
    return resolve(recipe, prepare(recipe.text)).identity


def test_a_recipe_survives_the_way_through_yaml(tiny: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(tiny)
    again = Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict())))
    assert again == recipe


@pytest.mark.parametrize("file", RECIPES, ids=lambda f: f.stem)
def test_every_shipped_recipe_is_valid(file: Path) -> None:
    Recipe.from_dict(yaml.safe_load(file.read_text()))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modle": {}}, r"unknown recipe field 'modle'.*'model'"),
        ({"model.d_modle": 3}, r"unknown recipe field 'model\.d_modle'.*'d_model'"),
        ({"model.engram.row_dims": 3}, r"unknown recipe field 'model\.engram\.row_dims'.*'row_dim'"),
        ({"model.d_model": "wide"}, r"model\.d_model is 'wide'; it must be an integer"),
        ({"optimizer.matrix_optimizer": "moun"}, r"'muon'"),
        ({"budget.rho": 1.5}, r"rho is 1\.5.*between 0 and 1"),
        ({"kind": "study"}, r"study"),
        ({"kind": "trian"}, r"kind is 'trian'.*'train'"),
        ({"name": "a/b"}, r"name is 'a/b'"),
        ({"data.tokens": 10}, r"data\.tokens is 10.*at least 128"),
        ({"data": 3}, r"data is 3; it must be a section"),
        ({"data": None}, r"data is None; it must be a section with fields\.$"),
        ({"model.engram": [1]}, r"model\.engram is \[1\]; it must be a section with fields, or null\.$"),
        ({"model.attention.rope_theta": "x"}, r"model\.attention\.rope_theta is 'x'; it must be a number\.$"),
        ({"checkpoint_every_n_steps": 0}, r"checkpoint_every_n_steps is 0"),
    ],
)
def test_a_mistake_gets_one_sentence(tiny: dict[str, Any], changes: dict[str, Any], sentence: str) -> None:
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        node = tiny
        for key in path:
            node[key] = dict(node[key])
            node = node[key]
        node[last] = value
    with pytest.raises(UserError, match=sentence) as caught:
        Recipe.from_dict(tiny)
    assert "\n" not in str(caught.value)


def test_identity_ignores_how_and_where_a_run_is_executed(tiny: dict[str, Any], tmp_path: Path) -> None:
    before = identity(tiny)
    tiny["tracking"] = {"uri": f"sqlite:///{tmp_path}/other.db", "directory": str(tmp_path / "other")}
    tiny["trainer"] = {"accelerator": "auto", "devices": 2, "strategy": "ddp", "log_every_n_steps": 7}
    tiny["name"] = "renamed"
    tiny["checkpoint_every_n_steps"] = 11
    tiny["data"] = {**tiny["data"], "evaluations": 0, "num_workers": 3, "tokens": tiny["data"]["tokens"] + 1}
    assert identity(tiny) == before


def test_identity_is_that_of_the_solved_network(tiny: dict[str, Any]) -> None:
    """A share that rounds to the same experts is the same run, and so is a network without memory."""
    tiny["budget"] = {"rho": 0.5}
    near = {**tiny, "budget": {"rho": 0.52}}
    assert identity(near) == identity(tiny)
    pure = {**tiny, "budget": {"rho": 1.0}}
    without = {**tiny, "budget": {}, "model": {**tiny["model"], "engram": None}}
    assert identity(pure) == identity(without) != identity(tiny)


def test_identity_says_how_rows_train_but_not_where_they_live(tiny: dict[str, Any]) -> None:
    """The balanced momentum is another rule on records: a dense run must not be taken for one of them."""
    host = {**tiny, "memory": {"tier": "host"}}
    assert identity(host) != identity(tiny)
    assert identity(host) == identity({**tiny, "memory": {"tier": "disk", "depth": 3}})
    assert identity(host) == identity({**tiny, "memory": {"unique_rows": True}})
    # No rows, no difference: the model without memory is one run whatever the tier.
    assert identity({**host, "budget": {"rho": 1.0}}) == identity({**tiny, "budget": {"rho": 1.0}})


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"optimizer": {"learning_rate": 0.02}},
        {"budget": {"rho": 0.8}},
        {"data": {"batch_size": 8, "sequence_length": 32, "tokens": 32 * 4 * 24, "validation_tokens": 512}},
        {"trainer": {"precision": "bf16-mixed"}},
    ],
)
def test_identity_changes_with_what_can_change_the_loss(tiny: dict[str, Any], change: dict[str, Any]) -> None:
    assert identity({**tiny, **change}) != identity(tiny)


def test_a_run_needs_text_held_out(tiny: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"text.validation_fraction is 0; .* above 0"):
        Recipe.from_dict({**tiny, "text": {**tiny["text"], "validation_fraction": 0.0}})


def test_identity_is_fixed() -> None:
    """Runs on disk are found by this hash: if this test fails, raise `SCHEMA_VERSION` knowingly."""
    from engram_lab.model.config import ModelConfig
    from engram_lab.recipe import _without_defaults

    assert _without_defaults(ModelConfig(d_model=64)) == {"d_model": 64, "attention": {}, "ffn": {}}


def test_override_replaces_dotted_fields(tiny: dict[str, Any]) -> None:
    recipe = Recipe.from_dict(tiny)
    changed = recipe.override({"model.engram.row_dim": 8, "seed": 3})
    assert changed.model.engram is not None
    assert (changed.model.engram.row_dim, changed.seed) == (8, 3)
    assert changed.override({"model.engram.row_dim": 4, "seed": 0}) == recipe
