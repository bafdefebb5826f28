"""Every control is one override, as docs/memories.md has it: it trains, and differs where it should."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from engram_lab.budget import count
from engram_lab.model.transformer import Transformer
from engram_lab.recipe import ResolvedRun, resolve
from engram_lab.recipe_file import read_recipe
from engram_lab.text import TokenCorpus, prepare
from engram_lab.training.module import EngramModule

PAGE = (Path(__file__).parents[1] / "docs" / "memories.md").read_text()
TABLE = re.search(r"## Controls\n.*?\n\| question .*?\n\n", PAGE, re.DOTALL)
assert TABLE is not None
LINES = dict(re.findall(r"^\| (?!question)(.+?) \| `(--\S+?)` \|$", TABLE[0], re.MULTILINE))
STEPS = 6


@dataclass
class Trained:
    """A control, or the specified module, after a few steps."""

    run: ResolvedRun
    net: Transformer
    before: dict[str, Tensor]
    losses: list[float]
    rates: dict[str, float]
    rules: dict[str, str]
    ids: Tensor

    def moved(self, name: str) -> bool:
        return not torch.equal(self.net.state_dict()[name], self.before[name])

    @property
    def addresses(self) -> Tensor:
        assert self.net.hash is not None
        found: Tensor = self.net.hash(self.ids)
        return found


def train(file: Path, *overrides: str) -> Trained:
    recipe = read_recipe(file, list(overrides))
    corpus: TokenCorpus = prepare(recipe.text)
    run = resolve(recipe, corpus)
    module = EngramModule(run.network, recipe.optimizer, corpus, total_steps=STEPS, seed=0)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    groups = {group["name"]: group for group in optimizer.param_groups}
    rates = {name: group["initial_lr"] for name, group in groups.items()}
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    batch = torch.from_numpy(corpus.train[: 4 * 33].astype("int64")).view(4, 33)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = module.net.loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    rules = {name: group["rule"] for name, group in groups.items()}
    return Trained(run, module.net, before, losses, rates, rules, batch[:, :-1])


@pytest.fixture(scope="module")
def file(documents: Path, tiny_values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = {
        "source": str(documents),
        "vocab_size": 400,
        "validation_fraction": 0.2,
        "cache_dir": str(tmp_path_factory.getbasetemp() / "text-cache"),
    }
    path = tmp_path_factory.mktemp("controls") / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tiny_values, "text": text}))
    return path


@pytest.fixture(scope="module")
def plain(file: Path) -> Trained:
    return train(file)


def same_but(field: str, value: Any) -> Callable[[Trained, Trained], None]:
    """The memory's configuration differs in that field, and in the network's size not at all."""

    def check(control: Trained, plain: Trained) -> None:
        assert plain.run.network.engram is not None
        expected = replace(plain.run.network, engram=replace(plain.run.network.engram, **{field: value}))
        assert control.run.network == expected

    return check


def frozen(control: Trained, plain: Trained) -> None:
    same_but("frozen_table", True)(control, plain)
    assert plain.moved("tables.0.weight")
    assert not control.moved("tables.0.weight")
    assert control.moved("blocks.1.engram.value.weight")
    assert "tables" not in control.rates


def equal_rows(control: Trained, plain: Trained) -> None:
    same_but("addresses", "constant")(control, plain)
    assert len(torch.unique(control.addresses)) == plain.addresses.shape[-1]


def shuffled(control: Trained, plain: Trained) -> None:
    """One token over and over reads one row a head, whatever its place; shuffled, it reads many."""
    same_but("addresses", "shuffled")(control, plain)
    again = torch.full((1, 20), 300)
    assert plain.net.hash is not None
    assert control.net.hash is not None
    assert len(torch.unique(plain.net.hash(again)[0, 0, 2:, 0])) == 1
    assert len(torch.unique(control.net.hash(again)[0, 0, 2:, 0])) > 5


def branch(control: Trained, plain: Trained) -> None:
    ours, theirs = count(control.run.network), count(plain.run.network)
    assert ours.rows == 0
    memory = theirs.rows  # `published` mode: projections are on top of the memory's budget
    assert ours.memory_projections == pytest.approx(memory, rel=0.02)
    assert control.moved("blocks.1.engram.up.weight")


def added(control: Trained, plain: Trained) -> None:
    assert control.run.network.ffn.experts == 12 > plain.run.network.ffn.experts
    assert count(control.run.network).total > count(plain.run.network).total


def no_gate(control: Trained, plain: Trained) -> None:
    assert any("gate" in name or "key" in name for name in plain.before if "engram" in name)
    assert not any("gate" in name or "key" in name for name in control.before if "engram" in name)


def no_root(control: Trained, plain: Trained) -> None:
    """The same weights, another gate: the first loss differs already."""
    same_but("gate", "plain")(control, plain)
    assert control.before.keys() == plain.before.keys()
    assert control.losses[0] != plain.losses[0]


def no_convolution(control: Trained, plain: Trained) -> None:
    assert any("conv" in name for name in plain.before)
    assert not any("conv" in name for name in control.before)


def raw_ids(control: Trained, plain: Trained) -> None:
    same_but("canonical", False)(control, plain)
    vocabulary = control.run.network.vocab_size
    assert torch.equal(control.before["hash.canonical"], torch.arange(vocabulary, dtype=torch.int32))
    assert int(plain.before["hash.canonical"].max()) + 1 < vocabulary


def one_rate(control: Trained, plain: Trained) -> None:
    assert control.run.network == plain.run.network
    assert plain.rates["tables"] == 5 * plain.rates["matrices"]
    assert control.rates["tables"] == control.rates["matrices"] == plain.rates["matrices"]


def other_rule(control: Trained, plain: Trained) -> None:
    assert control.run.network == plain.run.network
    assert (plain.rules["tables"], control.rules["tables"]) == ("adamw", "sinkhorn")


def placement(control: Trained, plain: Trained) -> None:
    def blocks(trained: Trained) -> set[str]:
        return {
            name.split(".")[1] for name in trained.before if name.startswith("blocks") and "engram" in name
        }

    assert (blocks(control), blocks(plain)) == ({"0"}, {"1"})


CHECKS: dict[str, Callable[[Trained, Trained], None]] = {
    "frozen random table": frozen,
    "all rows equal": equal_rows,
    "shuffled addresses": shuffled,
    "parameter-matched MLP branch": branch,
    "added parameters": added,
    "no gate": no_gate,
    "no signed root in the gate": no_root,
    "no convolution": no_convolution,
    "no canonical ids": raw_ids,
    "no multiple of the learning rate for the table": one_rate,
    "another rule for the table": other_rule,
    "layer placement": placement,
}


def test_the_page_lists_the_controls_that_are_tested() -> None:
    assert {question.split(":")[0] for question in LINES} == set(CHECKS)
    assert TABLE is not None
    assert len(TABLE[0].split("|---|---|")[1].strip().splitlines()) == len(CHECKS)


@pytest.mark.parametrize("question", LINES)
def test_a_control_is_one_override_that_trains_and_differs(question: str, file: Path, plain: Trained) -> None:
    control = train(file, LINES[question])
    assert control.losses[-1] < control.losses[0] - 0.1
    assert control.run.identity != plain.run.identity
    assert control.losses != plain.losses
    CHECKS[question.split(":")[0]](control, plain)


@pytest.mark.parametrize("question", LINES)
def test_a_control_in_a_study_is_the_same_line(question: str, file: Path, plain: Trained) -> None:
    field, _, value = LINES[question].removeprefix("--").partition("=")
    recipe = read_recipe(file, []).override({field: yaml.safe_load(value)})
    assert recipe == read_recipe(file, [LINES[question]])
