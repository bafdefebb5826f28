"""The command `scaling`, run as a user runs it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import scaling
from scaling.cli import KINDS, main

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "polars", "scipy", "matplotlib", "mlflow", "torch", "lightning", "optuna")


def alone(code: str) -> str:
    """The last line of what a fresh interpreter prints."""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return ended.stdout.splitlines()[-1]


Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """Run the command in this process; return what it printed."""

    def run(*arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rho = np.repeat([0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0], 2)
    noise = 0.001 * np.random.default_rng(0).standard_normal(len(rho))
    loss = 3.0 - 0.06 * np.log(0.06 + rho) - 0.03 * np.log1p((1 - rho) / 0.05) + noise
    frame = pl.DataFrame({"study": "one", "share": rho, "loss": loss, "seed": np.tile([0, 1], 9)})
    frame = frame.with_columns(
        size=10.0 ** (7 + pl.int_range(18) % 4), amount=10.0 ** (7 + pl.int_range(18) % 5), two=pl.col("seed")
    )
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    frame.write_csv(path)
    return path


def test_help_lists_every_law_and_imports_nothing_heavy(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys; from scaling.cli import main\n"
        "try: main(['fit', '--help'])\n"
        f"finally: print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert alone(code) == "[]"
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help"])
    text = capsys.readouterr().out
    assert all(f"    {law}" in text for law in KINDS)


def test_a_fit_imports_neither_plots_nor_stores_nor_training(table: Path) -> None:
    code = (
        "import sys; from scaling.cli import main\n"
        f"main(['fit', 'allocation', {str(table)!r}, '--map', 'rho=share'])\n"
        "print([m for m in ('matplotlib', 'mlflow', 'torch', 'lightning', 'optuna') if m in sys.modules])"
    )
    assert alone(code) == "[]"


def test_a_small_fit_imports_nothing_that_takes_longer_than_it(table: Path) -> None:
    code = (
        "import sys; from scaling.cli import main\n"
        f"main(['fit', 'allocation', {str(table)!r}, '--map', 'rho=share'])\n"
        "print([m for m in ('scipy', 'sqlite3', 'scaling.joint', 'scaling.design') if m in sys.modules])"
    )
    assert alone(code) == "[]"


def test_json_is_the_result_of_the_function(table: Path, said: Said) -> None:
    found = json.loads(said("fit", "allocation", table, "--map", "rho=share", "--json"))
    fit = scaling.fit_allocation(table, columns={"rho": "share"})
    assert found["optimum"]["rho"] == fit.optimum.rho
    assert found["optimum"]["interval"] == list(fit.optimum.interval)
    assert {"name", "k", "rss", "aicc", "rho", "interval", "status"} <= set(found["models"][0])
    assert {"verdict", "p_value", "method"} <= set(found["u_shape"])


def test_without_json_a_person_reads_words_and_a_table(table: Path, said: Said) -> None:
    text = said("fit", "allocation", table, "--map", "rho=share")
    assert "U-shaped" in text
    assert "95 % interval of ρ*" in text
    assert max(map(len, text.splitlines())) < 130


def test_options_reach_the_fit(table: Path, said: Said) -> None:
    arguments = ("fit", "allocation", table, "--map", "rho=share", "--json", "--confidence", "0.8")
    found = json.loads(said(*arguments, "--error", "huber"))
    assert found["optimum"]["confidence"] == 0.8
    assert "huber" in found["held"]["error"]


@pytest.mark.parametrize("law", ["allocation", "chinchilla"])
def test_a_person_is_told_the_confidence_that_was_asked_for(table: Path, said: Said, law: str) -> None:
    names = ["--map", "rho=share", "--map", "total_parameters=size", "--map", "tokens=amount"]
    options = ["--draws", "20"] if law == "chinchilla" else []
    text = said("fit", law, table, *names, "--confidence", "0.8", *options)
    assert "80 % interval" in text
    assert "95 %" not in text


@pytest.mark.parametrize("law", KINDS)
def test_every_option_is_a_keyword_of_its_function_and_every_keyword_an_option(law: str) -> None:
    function, _, options = KINDS[law]
    keywords = set(inspect.signature(getattr(scaling, function)).parameters) - {"source", "columns"}
    assert {option.name for option in options} == keywords


SEVERAL = ("--map", "rho=share", "--map", "budget=amount")
LAW = ("--map", "total_parameters=size", "--map", "tokens=amount")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", "allocation", "none.csv"], "none.csv"),
        (["fit", "memory", "TABLE"], "'slots'"),
        (["fit", "allocation", "TABLE", "--map", "rho=shar"], "Did you mean 'share'?"),
        (["fit", "allocation", "TABLE", "--map", "rho"], "COLUMN=NAME"),
        (["fit", "allocation", "TABLE", "--map", "rho=share", "--confidence", "2"], "--confidence is 2"),
        (["fit", "allocation", "TABLE"], "If so, name it with --map rho=share."),
        (["fit", "gadre", "TABLE"], "name it with --map tokens=NAME."),
        (["fit", "allocation", "TABLE", "--map", "rhoo=share"], "--map rhoo=share names 'rhoo'"),
        (["fit", "allocation", "TABLE", "--map", "rho=share", "--budget", "1"], "--budget 1 was asked for"),
        (["fit", "allocation", "TABLE", *SEVERAL], "choose with --budget 1e+11"),
        (["fit", "allocation", "TABLE", "--map", "rho=share", "--noise", "known"], "--noise 'known' needs"),
        (["fit", "chinchilla", "TABLE", *LAW, "--drop-largest", "99"], "--drop-largest is 99"),
        (["fit", "chinchilla", "TABLE", *LAW, "--delta", "0"], "--delta is 0"),
        (["design", "power", "--rho", "0.1,0.3,0.5,0.7,1", "--sd", "0"], "--sd is 0.0 and --seeds is 1"),
        (["fit", "isoflop", "TABLE", *SEVERAL, "--column", "sized"], "Column 'sized' is missing"),
        (["design", "next", "TABLE", "--map", "rho=share", "--count", "0"], "--count is 0"),
        (["design", "next", "TABLE", "--map", "rho=share", "--rho", "2"], "--rho must be shares"),
        (["design", "power", "--rho", "0.1,0.3,0.5,0.7,1", "--gain", "-1"], "--gain is -1.0"),
        (["design", "forecast", "--budgets", "0,1", "--rho", "0.1,0.5,0.7,0.8,1"], "--budgets holds 0"),
        (["report", "TABLE", "--map", "rho=share", "--out", ""], "--out is empty"),
        (["fit", "allocation", "TABLE", "--map", "rho=share", "--cluster", "clas"], "has 'study', 'rho'"),
        (["report", "TABLE", "--map", "rho=share", "--map", "study=two", "--out", "x"], "--study 0"),
        (["fit", "allocation", "TABLE", "--map", "rho=share", "--study", "on"], "Did you mean 'one'?"),
        (["report", "sqlite:///none.db", "--study", "a", "--out", "x"], "no SQLite store"),
        (["report", "TABLE", "--map", "rho=share", "--out", "TABLE/x"], "cannot be written"),
        (["design", "power", "--rho", "0.5,1"], "at least 5 distinct values"),
        (["design", "sweep", "--width", "0.1", "--like", "a.csv", "--m0", "0.1"], "leave out --optimum"),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_2(
    table: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    given = [argument.replace("TABLE", str(table)) for argument in arguments]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert "columns=" not in error
    assert not re.search(r"(?<!-)\b(budget|noise|draws|confidence)(=| is )", error)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["fit", "alocation", "a.csv"], "Did you mean 'allocation'?"),
        (["fit", "allocation", "a.csv", "--budgt", "3"], "takes no '--budgt'. Did you mean '--budget'?"),
        (["fit", "allocation", "a.csv", "--conf", "0.8"], "no '--conf'. Did you mean '--confidence'?"),
        (["report", "a.csv", "--o=b"], "scaling report takes no '--o'. Did you mean '--out'?"),
        (["--hel"], "scaling takes no '--hel'. Did you mean '--help'?"),
        (["design", "power", "--s", "2"], "takes no '--s'. Did you mean '--seeds' or '--sd'?"),
        (["fit", "allocation", "a.csv", "--noise", "knwon"], "Did you mean 'known'?"),
        (["fit", "memory"], "required"),
        (["design", "power", "--rho", "a,b"], "invalid numbers value: 'a,b'"),
        (["design", "power", "--rho", "0.1,nan"], "not finite"),
        (["fit", "allocation", "a.csv", "--seed", "-1"], "--seed: -1 is below 0"),
        (["fit", "chinchilla", "a.csv", "--draws", "-1"], "--draws: -1 is below 0"),
    ],
)
def test_an_unknown_law_or_a_missing_table_is_refused_by_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: scaling")
    assert error.count("\n") == 1
    assert sentence in error


def test_the_installed_command_ends_with_status_2_and_without_a_traceback() -> None:
    command = [str(Path(sys.executable).parent / "scaling"), "fit", "memory", "none.csv"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_a_report_is_written_where_it_was_asked_for(table: Path, tmp_path: Path, said: Said) -> None:
    out = tmp_path / "deep" / "report"
    names = ("--map", "rho=share", "--study", "one", "--title", "A title")
    assert said("report", table, *names, "--out", out) == f"{out / 'report.html'}\n"
    assert "<h1>A title</h1>" in (out / "report.html").read_text()


def test_a_report_takes_what_a_study_kept_beside_it_along_and_is_not_replaced_by_one_without(
    table: Path, tmp_path: Path, said: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    named = tmp_path / "named.csv"
    pl.read_csv(table).with_columns(run=pl.format("r{}", pl.int_range(18)), rho="share").write_csv(named)
    for _ in range(2):  # what holds nothing more may be written anew
        said("report", named, "--out", first)
    (first / "context.json").write_text('{"data": "a text"}')
    kept = first / "configurations"
    kept.mkdir()
    for run in ("r0", "r17", "of-another-study"):
        (kept / f"{run}.yaml").write_text(f"name: {run}")
    (first / "other.csv").write_bytes(named.read_bytes())
    for whole in (first, first / "runs.csv", first / "runs.parquet"):
        for out in (second, second, first):
            said("report", whole, "--out", out)
        assert json.loads((second / "context.json").read_text()) == {"data": "a text"}
    assert main(["report", str(first / "other.csv"), "--out", str(second)]) == 2  # a table of its own
    capsys.readouterr()
    assert {file.name: file.read_text() for file in (second / "configurations").iterdir()} == {
        "r0.yaml": "name: r0",
        "r17.yaml": "name: r17",
    }
    assert len(list(kept.iterdir())) == 3
    page = (second / "report.html").read_bytes()
    assert main(["report", str(named), "--out", str(second)]) == 2
    error = capsys.readouterr().err
    assert "with context and configurations that" in error
    assert error.count("\n") == 1
    assert (second / "report.html").read_bytes() == page


def test_the_columns_are_listed_with_their_units(said: Said) -> None:
    assert "FLOPs" in said("columns")


def test_a_plan_is_printed_and_its_cells_are_in_the_json(said: Said) -> None:
    plan = ("design", "sweep", "--width", "0.5", "--sd", "0.002", "--counts", "8", "--seeds", "1,2")
    found = json.loads(said(*plan, "--json"))
    assert found["kind"] == "design"
    assert len(found["cells"]) == found["chosen"]["runs"]
    assert {"rho", "seed"} <= set(found["cells"][0])
    assert "The last is enough: rho = " in said(*plan)


def test_a_plan_that_cannot_be_reached_says_so(said: Said) -> None:
    text = said("design", "sweep", "--width", "0.001", "--counts", "8", "--seeds", "1")
    assert "None reaches a width of 0.001" in text


def test_power_and_forecast_take_lists(said: Said) -> None:
    shares = "0.1,0.3,0.5,0.7,0.8,0.9,1"
    assert json.loads(said("design", "power", "--rho", shares, "--json"))["runs"] == 7
    half = json.loads(said("design", "forecast", "--budgets", "1e18,4e18,1.6e19", "--rho", shares, "--json"))
    assert half["budget"] == 1.6e20
    assert 0 < half["half_width"] < 1


def test_the_next_runs_are_new_seeds_of_shares_in_reach(table: Path, said: Said) -> None:
    names = ("design", "next", table, "--map", "rho=share", "--count", "3", "--rho", "0.2,0.8,0.9")
    cells = json.loads(said(*names, "--json"))["cells"]
    assert len({(cell["rho"], cell["seed"]) for cell in cells}) == 3
    assert {cell["rho"] for cell in cells} <= {0.2, 0.8, 0.9}
    assert min(cell["seed"] for cell in cells) == 2
    assert "SD of rho*" in said(*names)
