"""The command line: what works, and what a mistake gets: a sentence, status 2, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from engram_lab.cli import main
from engram_lab.errors import UserError
from engram_lab.listing import _failed
from engram_lab.recipe import Recipe
from engram_lab.studies.queue import QueuedCell, StudyQueue

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.fixture
def file(tiny: dict[str, Any], in_tmp_path: Path) -> Path:
    path = in_tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must fail with one sentence; returns it."""
    before = set(Path.cwd().glob("mlruns/runs/*/*.yaml"))
    assert main([str(a) for a in arguments]) == 2
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("error: ")
    assert set(Path.cwd().glob("mlruns/runs/*/*.yaml")) == before, "something was half-written"
    return lines[0]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("--model.d_modle=3", "'model.d_modle'. Did you mean 'model.d_model'?"),
        ("--model.engram.row_dims=3", "'model.engram.row_dims'. Did you mean 'model.engram.row_dim'?"),
        ("--trainer.device=3", "'trainer.device'. Did you mean 'trainer.devices'?"),
        ("--budget.rho=1.2", "budget.rho is 1.2"),
        ("--budget.total_parameters=10", "budget.total_parameters is 10"),
        ("--model.engram.rows_per_head=1", "rows_per_head is 1"),
        ("--workers=2", "trains one model"),
        ("--workers=0", "--workers is 0, but must be at least 1."),
        ("--workers=many", "--workers is many, but must be a whole number."),
        ("--workers", "argument --workers: expected one argument"),
        ("--worker=2", "engram-lab run takes no '--worker'. Did you mean '--workers'?"),
        ("--dry", "engram-lab run takes no '--dry'. Did you mean '--dry-run'?"),
        ("--dryrun", "Did you mean '--dry-run'?"),
        ("--device=2", "engram-lab run takes no '--device'. Did you mean '--devices'?"),
        ("--modle.d_model=32", "unknown recipe field 'modle.d_model'. Did you mean 'model.d_model'?"),
        ("--data.tokens=100_000_000", "data.repeat"),
        ("--text.source=nothing.txt", "nothing.txt"),
        ("--trainer.accelerator=tpu", "accelerator"),
        ("--trainer.max_steps=3", "data.tokens"),
        (
            "--trainer.devices=0",
            "trainer.devices is 0; it must be auto or a number above 0. Did you mean 1?",
        ),
        ("--trainer.devices=-2", "trainer.devices is -2; it must be auto or a number above 0."),
        (
            "--trainer.devices=[0,3]",
            "trainer.devices is [0, 3]; it must be auto or a number above 0. Did you mean 2?",
        ),
        ("--trainer.devices=atuo", "Did you mean 'auto'?"),
        ("--trainer.strategy=dpp", "trainer.strategy is 'dpp'; it must be one of auto, ddp, "),
        (
            "--trainer.strategy=fspd",
            "a variant like ddp_spawn, or a class as {class_path: ...}. Did you mean 'fsdp'?",
        ),
        ("--tracking.uri=mlruns", "tracking uri is 'mlruns'"),
        ("--model.d_model=wide", "model.d_model is 'wide'; it must be an integer."),
        ("--model.engram.gate=nune", "'plain', 'none'. Did you mean 'none'?"),
        ("--model.engram.layers=[a]", "model.engram.layers is ['a']; it must be a list of integers."),
        ("--model.attention=7", "model.attention is 7; it must be a section with fields."),
        ("--seed=1.5", "seed is 1.5; it must be an integer."),
        ("--study.budgets=[1]", "study.budgets is [1]; it must be a mapping of names to mappings of fields."),
    ],
)
def test_a_wrong_field_is_named_with_what_is_right(
    file: Path, capsys: pytest.CaptureFixture[str], override: str, sentence: str
) -> None:
    assert sentence in refused(capsys, "run", file, override)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("study staus", "'staus'; it must be one of status, extend. Did you mean 'status'?"),
        ("stuy status quickstart", "Did you mean 'study'?"),
        ("report quickstart --diretory=mlruns", "report takes no '--diretory'. Did you mean '--directory'?"),
        ("generate a b --token 20", "engram-lab generate takes no '--token'. Did you mean '--tokens'?"),
        ("generate a --token=20 b", "Did you mean '--tokens'?"),
        ("generate a b --top 3", "generate takes no '--top'. Did you mean '--top-k' or '--top-p'?"),
        ("inspect a --tex words", "engram-lab inspect takes no '--tex'. Did you mean '--text'?"),
        ("--versio", "engram-lab takes no '--versio'. Did you mean '--version'?"),
        ("generate a b --memory hst", "--memory is 'hst'; it must be one of resident, host, disk. Did you"),
        ("generate a b --tokens many", "--tokens is many, but must be a whole number."),
        (
            "generate a b --length 50",
            "generate takes no '--length'. Its options are --tokens, --temperature,",
        ),
        ("generate a b c", "generate takes no 'c'. See engram-lab generate --help."),
        ("budget a --comp", "engram-lab budget takes no '--comp'. Did you mean '--components'?"),
        ("budget --publ", "engram-lab budget takes no '--publ'. Did you mean '--published'?"),
        ("doctor all", "doctor takes no 'all'"),
        ("doctor --all", "doctor takes no '--all'. See engram-lab doctor --help."),
        ("study status", "study status --help"),
        ("", "required: COMMAND"),
    ],
)
def test_a_wrong_word_is_told_with_the_nearest(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, sentence: str
) -> None:
    assert sentence in refused(capsys, *words.split())


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("RANK", "x", 0), ("LOCAL_RANK", "", 0), ("NODE_RANK", "-1", 0), ("WORLD_SIZE", "two", 1)],
)
@pytest.mark.parametrize("words", ["run tiny.yaml --dry-run", "budget tiny.yaml", "runs"])
def test_processes_numbered_by_no_number_are_refused(
    file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: str,
    name: str,
    value: str,
    least: int,
) -> None:
    monkeypatch.setenv(name, value)
    said = f"error: the environment variable {name} is {value!r}; it must be a whole number from {least} on"
    assert refused(capsys, *words.split()).startswith(said)


@pytest.mark.parametrize("module", ["cli", "launcher"])
def test_nothing_reads_the_number_of_a_process_before_it_was_looked_at(file: Path, module: str) -> None:
    """Lightning reads it while it is imported."""
    command = [sys.executable, "-m", f"engram_lab.{module}", "run", "tiny.yaml"]
    ended = subprocess.run(command, env={**os.environ, "RANK": "x"}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1, ended.stderr


def test_a_recipe_that_is_not_there(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean" in refused(capsys, "run", "tiny.yml")


def test_a_wrong_shape_in_the_file_is_told_like_one_on_the_command_line(
    file: Path, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(yaml.safe_dump({**tiny, "kind": "study", "study": {"rho": [1], "budgets": {"a": 3}}}))
    assert "study.budgets is {'a': 3}; it must be a mapping of names" in refused(capsys, "run", file)


def test_a_recipe_that_is_no_yaml(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text("kind: [train\nname: x: y")
    assert "is no YAML (line" in refused(capsys, "run", "bad.yaml")
    Path("list.yaml").write_text("- 1")
    assert "a recipe is a mapping" in refused(capsys, "run", "list.yaml")


def test_a_table_no_machine_holds(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["--budget.rho=null", "--model.engram.rows_per_head=90000000000"]
    assert "lower model.engram.rows_per_head" in refused(capsys, "run", file, *huge)


def test_a_file_where_the_folder_should_be(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").write_text("")
    assert "cannot be made" in refused(capsys, "run", file, "--tracking.directory=taken")


def test_an_empty_recipe_and_a_port_that_is_none(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.yaml").write_text("")
    assert "is empty" in refused(capsys, "run", "empty.yaml")
    assert "--port is 99999, but must be at least 1 and at most 65535." in refused(
        capsys, "ui", "--port", "99999"
    )


def test_an_empty_corpus_and_a_binary_one(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty.txt").write_text("")
    assert "'empty.txt': the corpus holds 0" in refused(capsys, "run", file, "--text.source=empty.txt")
    Path("binary.txt").write_bytes(bytes(range(256)) * 40)
    assert "binary.txt" in refused(capsys, "run", file, "--text.source=binary.txt")


def test_a_damaged_shard(file: Path, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    cache = Path("cache")
    assert main(["run", str(file), "--dry-run", f"--text.cache_dir={cache}"]) == 0
    (shard,) = cache.rglob("train.npy")
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(bytes(data))
    capsys.readouterr()
    assert "train.npy" in refused(capsys, "run", file, "--dry-run", f"--text.cache_dir={cache}")


def test_a_locked_store(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engram_lab.tracking.store._BUSY_SECONDS", 0.2)
    Path("store").mkdir()
    holder = sqlite3.connect("store/mlflow.db", isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    assert "lock" in refused(capsys, "run", file, "--tracking.uri=sqlite:///store/mlflow.db")


def test_a_store_that_is_something_else(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes.db").write_text("no database at all, but long enough to look at" * 40)
    assert "notes.db" in refused(capsys, "run", file, "--tracking.uri=sqlite:///notes.db")
    assert Path("notes.db").read_text().startswith("no database")


def test_unknown_studies_are_named_with_the_known(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = in_tmp_path / "mlruns" / "studies" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    for command in (["study", "status"], ["report"]):
        told = refused(capsys, *command, "quickstrat")
        assert "Did you mean 'quickstart'?" in told
        assert "`engram-lab runs` lists the models trained on their own" in told


def test_every_run_is_listed_with_its_state(
    tiny: dict[str, Any], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "there are no runs in 'mlruns'" in refused(capsys, "runs")
    for place, (identity, seed) in enumerate({"c0ffee": 3, "abba": 0, "deed": 1}.items()):
        folder = Path("mlruns") / "runs" / identity
        (folder / "checkpoints").mkdir(parents=True)
        recipe = yaml.safe_dump(Recipe.from_dict({**tiny, "seed": seed}).to_dict())
        (folder / "recipe.yaml").write_text(recipe)
        os.utime(folder / "recipe.yaml", (place, place))
    Path("mlruns/runs/c0ffee/result.json").write_text('{"loss": 3.21}')
    for step in (9, 12):
        Path(f"mlruns/runs/abba/checkpoints/step={step}.ckpt").touch()
    assert main(["runs"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["c0ffee", "tiny", "rho", "0.5", "seed", "3", "finished", "3.2100"],
        ["abba", "tiny", "rho", "0.5", "seed", "0", "unfinished,", "saved", "at", "step", "12"],
        ["deed", "tiny", "rho", "0.5", "seed", "1", "unfinished"],
    ]


@pytest.mark.parametrize("content", [b"", b'{"loss": 3.', b"\xff\0", b"[]", b"{}", b'{"loss": null}'])
def test_a_run_with_a_damaged_result_is_listed_so_beside_the_others(
    tiny: dict[str, Any], in_tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    results = {"abba": content, "c0ffee": b'{"loss": 3.21}'}
    for place, (identity, result) in enumerate(results.items()):
        folder = Path("mlruns") / "runs" / identity
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(Recipe.from_dict(tiny).to_dict()))
        os.utime(folder / "recipe.yaml", (place, place))
        (folder / "result.json").write_bytes(result)
    assert main(["runs"]) == 0
    damaged, whole = (" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:])
    assert damaged == "abba tiny rho 0.5 seed 0 damaged: result.json cannot be read"
    assert whole == "c0ffee tiny rho 0.5 seed 0 finished 3.2100"


def test_a_long_row_is_one_line_where_a_program_reads_it(
    tiny: dict[str, Any],
    in_tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = Path("mlruns") / "runs" / "abba"
    (folder / "checkpoints").mkdir(parents=True)
    recipe = Recipe.from_dict({**tiny, "name": "a-name-of-" + "many-" * 20 + "words"})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    (folder / "checkpoints" / "step=12.ckpt").touch()
    assert main(["runs"]) == 0
    _, line = capsys.readouterr().out.splitlines()
    assert line.split()[0] == "abba"
    assert line.rstrip().endswith("saved at step 12")


def test_cells_are_listed_as_their_study_names_them_and_a_trained_one_as_running(
    tiny: dict[str, Any], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells of a memory sweep differ in nothing that a recipe's rho and seed would show."""
    cells = {"abba": "table 0 seed 1", "deed": "table 2048 seed 1"}
    for identity in cells:
        folder = Path("mlruns") / "runs" / identity
        folder.mkdir(parents=True)
        recipe = Recipe.from_dict({**tiny, "budget": {"rho": None}, "seed": 1})
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
        (folder / "lock").touch()
    study = Path("mlruns/studies/tiny")
    study.mkdir(parents=True)
    job = {"cells": {identity: {"label": label} for identity, label in cells.items()}}
    (study / "job.json").write_text(json.dumps(job))
    with FileLock("mlruns/runs/deed/lock"):
        assert main(["runs"]) == 0
    listed = sorted(capsys.readouterr().out.splitlines()[1:])
    assert "tiny  table 0 seed 1     unfinished" in listed[0]
    assert "tiny  table 2048 seed 1  running" in listed[1]


def test_cells_that_were_begun_and_stopped_are_listed_as_interrupted(
    tiny: dict[str, Any], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether their worker gave them back or was killed."""
    folder = Path("mlruns/studies/small")
    folder.mkdir(parents=True)
    study = {**tiny, "kind": "study", "name": "small", "budget": {}, "study": {"rho": [0, 0.5, 1]}}
    study["tracking"] = {"directory": "mlruns"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(study))
    queue = StudyQueue(folder, "small")
    cells = {"stopped": 12, "killed": 9, "running": 9, "early": None, "new": None}
    place = {"rho": 0.5, "rows_per_head": 0, "seed": 0, "budget": 0, "control": 0}
    queue.enqueue(QueuedCell(identity=f"id-{name}", label=name, place=place) for name in cells)
    lost, worker = queue.new_worker(), queue.new_worker()
    claims = [queue.claim(lost if name == "killed" else worker) for name in ("stopped", "killed", "running")]
    assert claims[0] is not None
    queue.give_back(claims[0][0])
    lost.release()
    for name, step in cells.items():
        checkpoints = Path(f"mlruns/runs/id-{name}/checkpoints")
        checkpoints.mkdir(parents=True)
        if step is not None:
            (checkpoints / f"step={step}.ckpt").touch()
    assert main(["study", "status", "small"]) == 0
    *lines, total = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert lines == [
        ["stopped", "interrupted", "id-stopped", "saved", "at", "step", "12"],
        ["killed", "interrupted", "id-killed", "saved", "at", "step", "9"],
        ["running", "running", "id-running"],
        ["early", "waiting", "id-early"],
        ["new", "waiting", "id-new"],
    ]
    assert " ".join(total) == "2 interrupted, 1 running, 2 waiting"


def test_a_run_that_failed_before_its_first_step_is_listed_with_the_reason(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise UserError("no room for [the] tables.")

    monkeypatch.setattr("engram_lab.training.run.fit", broken)
    assert main(["run", str(file)]) == 2
    capsys.readouterr()
    assert main(["runs"]) == 0
    assert (
        capsys.readouterr()
        .out.splitlines()[1]
        .rstrip()
        .endswith("failed: UserError: no room for [the] tables.")
    )


@pytest.mark.parametrize("content", [b"no database", b""])
def test_a_damaged_store_tells_of_no_failures_and_stays_as_it_is(tmp_path: Path, content: bytes) -> None:
    store = tmp_path / "broken.db"
    store.write_bytes(content)
    assert _failed(f"sqlite:///{store}", "tiny") == {}
    assert store.read_bytes() == content


def test_dry_run_prints_every_cell_and_trains_none(
    file: Path, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    study = {**tiny, "kind": "study", "budget": {}, "study": {"rho": [0, 0.5, 1]}}
    file.write_text(yaml.safe_dump(study))
    assert main(["run", str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line[:4].strip() in ("0", "0.5", "1")] == [
        "0",
        "0.5",
        "1",
    ]
    assert "3 run(s)" in printed
    assert not Path("mlruns").exists()


def test_a_budget_needs_no_text_and_takes_overrides(
    file: Path, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    study = {**tiny, "kind": "study", "budget": {}}
    study |= {"study": {"rho": [0, 1], "rows_per_head": [64], "seeds": [0, 1]}}
    file.write_text(yaml.safe_dump(study))
    nowhere = ["--text.source=not/there.txt", "--text.cache_dir=cache"]
    assert main(["budget", str(file), *nowhere, "--model.ffn.experts=16", "--components"]) == 0
    printed = capsys.readouterr().out
    assert not Path("cache").exists()
    lines = [line.split() for line in printed.splitlines()]
    cells = {line[0]: line[2] for line in lines if len(line) > 12 and line[0] in ("0", "1")}
    assert cells == {"0": "2", "1": "16"}
    (table,) = [line for line in lines if line[:2] == ["table", "64"] and len(line) > 12]
    assert "%" not in table[8]
    assert "memory sweep" in printed
    assert sum(line[:3] == ["memory", "rows", "inactive"] for line in lines) == 4
    assert "6 run(s)" in printed  # the network without a table is the one at rho 1


def test_a_budget_uses_the_vocabulary_there_is(
    file: Path, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from engram_lab.text import TextConfig, look_ahead, prepare

    text = TextConfig(**{**tiny["text"], "vocab_size": None})
    assert look_ahead(TextConfig(cache_dir="none")).vocab_size == 8192
    corpus = prepare(text)
    assert look_ahead(text).vocab_size == corpus.vocab_size < 16384
    given = TextConfig(source="not/there.txt", tokenizer=str(corpus.path / "tokenizer.json"))
    assert look_ahead(given).vocab_size == corpus.vocab_size
    assert "tokenizer" in refused(capsys, "budget", file, "--text.tokenizer=none.json")


def test_the_published_models_are_printed_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["budget", "--published"]) == 0
    printed = capsys.readouterr().out
    assert "Engram-27B" in printed
    page = (RECIPES.parent / "docs" / "memories.md").read_text()
    assert printed.strip() in page
    assert "the recipe comes first" in refused(capsys, "budget", "--components")
    assert "--published takes no recipe" in refused(capsys, "budget", "recipe.yaml", "--published")


def test_print_config_prints_a_recipe_that_can_be_run(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--model.engram.row_dim=8", "--print_config"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["engram"]["row_dim"] == 8
    assert printed["model"]["ffn"]["experts"] == 12


def test_help_of_a_recipe_lists_its_fields(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(file), "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    for field in ("--model.d_model", "--budget.rho", "--trainer.devices", "--optimizer.learning_rate"):
        assert field in printed


def test_help_is_quick() -> None:
    """The help must not pay for torch: its import alone takes seconds."""
    code = "import sys, engram_lab.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'lightning', 'mlflow', 'optuna'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda f: f.stem)
def test_every_recipe_starts(recipe: Path, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "source" in yaml.safe_load(recipe.read_text()).get("text", {}):  # a text that does not come with us
        arguments = ["budget", str(recipe)]
    else:
        arguments = ["run", str(recipe), "--dry-run", "--text.cache_dir", str(cache_of_default_corpus())]
    assert main(arguments) == 0
    assert "tokens in all" in capsys.readouterr().out


def cache_of_default_corpus() -> Path:
    """Shared by the tests of one session, and with the repository's own cache when that is there."""
    return Path(__file__).parents[1] / ".cache" / "engram_lab" / "text"


def test_more_validation_than_training_text_is_warned_of(
    tiny: dict[str, Any], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two documents one is held out, by the hash of its text: here always the one of a's."""
    said = {}
    for longer in "ab":
        texts = [f"{letter} " * (3000 if letter == longer else 300) for letter in "ab"]
        source = in_tmp_path / f"{longer}.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        text = {"source": str(source), "cache_dir": str(in_tmp_path / "cache")}
        recipe = in_tmp_path / f"{longer}.yaml"
        recipe.write_text(yaml.safe_dump({**tiny, "text": text, "data": {**tiny["data"], "repeat": True}}))
        main(["run", str(recipe), "--dry-run"])
        printed = capsys.readouterr().out.splitlines()
        said[longer] = [line for line in printed if line.startswith("warning: validation")]
    (warning,) = said["a"]
    assert "validation takes 6,001 of the text's 6,303 tokens and leaves 302 for training" in warning
    assert said["b"] == []


@pytest.mark.slow
def test_lightning_run_trains_from_another_directory(file: Path, in_tmp_path: Path) -> None:
    elsewhere = in_tmp_path / "elsewhere"
    elsewhere.mkdir()
    command = Path(sys.executable).with_name("lightning")
    done = subprocess.run(
        [command, "run", str(file), "--accelerator=cpu", "--devices=1"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    assert list((in_tmp_path / "mlruns" / "runs").glob("*/model/model.safetensors"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_commands_end_with_the_signals_status(
    file: Path, in_tmp_path: Path, number: signal.Signals, status: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "engram_lab.cli", "run", str(file), "--data.tokens=12800"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    runs = in_tmp_path / "mlruns" / "runs"
    while process.poll() is None and not list(runs.glob("*/checkpoints/*.ckpt")):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert "Traceback" not in errors
    assert "continues where this stopped" in errors
