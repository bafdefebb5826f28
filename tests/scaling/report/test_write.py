"""The whole report on made-up studies: what is in the folder, and that its words follow the evidence."""

from __future__ import annotations

import filecmp
import json
import re
from pathlib import Path

import polars as pl
import pytest
from made_up_runs import allocation_rows, memory_rows, study, unfinished_rows

from scaling.cli import main
from scaling.errors import ScalingError
from scaling.report import write_report

FILES = {"report.html", "report.md", "fits.json", "context.json", "runs.csv", "runs.parquet", "figures"}
CONTEXT = {
    "code_version": "1a2b3c",
    "machine": "two cores",
    "mismatches": [{"rho": 0.5, "total": 1e-4}, {"rho": 0.7, "total": None}],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    rows = study(allocation_rows("u"), memory_rows(), unfinished_rows())
    return write_report(rows, folder, context=CONTEXT).parent


def words(folder: Path) -> str:
    text = (folder / "report.md").read_text().replace("\\", "")
    return text[: text.index("## Data and method")]


def summary(folder: Path) -> str:
    text = words(folder)
    end = text.find("## Loss against")
    return text if end < 0 else text[:end]


def report(tmp_path: Path, frame: pl.DataFrame) -> Path:
    return write_report(frame, tmp_path / "out").parent


def test_the_folder_holds_the_page_its_pictures_the_runs_and_the_fits(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == FILES
    html = (whole / "report.html").read_text()
    pictures = sorted(path.stem for path in (whole / "figures").iterdir())
    assert len(pictures) == html.count("<svg") >= 6
    assert re.findall(r"!\[[^\]]*\]\(figures/([^)]+)\.svg\)", (whole / "report.md").read_text())
    assert pl.read_parquet(whole / "runs.parquet").height == pl.read_csv(whole / "runs.csv").height == 36


def test_the_same_runs_give_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    rows = study(allocation_rows("u"), memory_rows(), unfinished_rows())
    again = write_report(rows, tmp_path, context=CONTEXT).parent
    names = [str(path.relative_to(whole)) for path in sorted(whole.rglob("*")) if path.is_file()]
    same, different, odd = filecmp.cmpfiles(whole, again, names, shallow=False)
    assert (different, odd) == ([], [])
    assert len(same) == len(names)


def test_the_page_needs_nothing_from_elsewhere(whole: Path) -> None:
    html = (whole / "report.html").read_text()
    assert not re.search(r'(?:src|href|srcset|action)="(?!#)', html)
    assert not re.search(r"url\((?!#)|@import|<script|<link|<img|<iframe", html)


def test_a_run_without_a_result_is_shown_with_its_reason_and_is_in_no_fit(whole: Path) -> None:
    html = (whole / "report.html").read_text()
    assert "32 finished runs, 1 failed run, 2 interrupted runs, 1 run not finished" in html
    assert "4 runs of the study are in no fit" in html
    assert "2 runs were interrupted and can be resumed by the same command." in html
    assert "1 failed, 2 interrupted" in html
    assert html.count("<td>stopped before it finished</td>") == 4  # two runs, each in two tables
    assert "loss became NaN at step 31" in html
    assert "had not finished when the runs were read" in html
    fits = json.loads((whole / "fits.json").read_text())
    assert fits["allocation"][0]["n"] == 18
    assert fits["runs"] == {"all": 36, "fitted": 32, "controls": 0, "failed": 1, "interrupted": 2}


def test_the_context_is_shown(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    assert "| Training | By which code? | 1a2b3c |" in text
    assert "### Mismatches" in text
    assert "| rho | total |" in text


def test_a_real_u_is_called_so_and_its_best_share_has_an_interval(whole: Path) -> None:
    said = summary(whole)
    assert "U-shaped" in said
    assert "p < 0.001" in said
    assert re.search(r"the best share is ρ\* = 0\.6\d\d, 95 % interval \[0\.\d+, 0\.\d+\]", said)
    assert "Pure MoE (ρ = 1) loses to the best share" in words(whole)


def test_no_best_share_and_no_u_where_the_truth_is_flat(tmp_path: Path) -> None:
    text = summary(report(tmp_path, study(allocation_rows("flat", rng=3))))
    assert "no dependence of loss on ρ" in text
    assert "No best share is named" in text
    assert "the best share is" not in text
    assert "U-shaped" not in text


def test_three_shares_decide_nothing_and_the_page_says_so(tmp_path: Path) -> None:
    text = summary(report(tmp_path, study(allocation_rows("u", shares=(0.0, 0.6, 1.0)))))
    assert "undetermined at this scale" in text
    assert "too few" in text
    assert "U-shaped" not in text


def test_a_straight_line_in_log_memory_is_not_called_a_power_law(whole: Path) -> None:
    said = summary(whole)
    assert "a straight line in the logarithm of memory is not excluded" in said
    assert "follows a power law" not in said


def test_a_study_without_a_finished_run_still_gets_its_page(tmp_path: Path) -> None:
    folder = report(tmp_path, study(unfinished_rows()))
    assert "No run has finished" in words(folder)
    assert "loss became NaN at step 31" in (folder / "report.html").read_text()


def test_a_memory_sweep_alone_and_a_table_without_optional_columns(tmp_path: Path) -> None:
    frame = study(memory_rows()).select("slots", "loss")
    text = words(report(tmp_path, frame))
    assert "Loss against memory" in text
    assert "Loss against share" not in text


def test_a_table_of_shares_alone_is_not_taken_for_a_memory_law(tmp_path: Path) -> None:
    frame = study(allocation_rows("u")).select("rho", "slots", "loss")
    text = words(report(tmp_path, frame))
    assert "Loss against share" in text
    assert "Loss against memory" not in text


def test_controls_are_compared_pairwise_and_not_fitted(tmp_path: Path) -> None:
    ordinary = allocation_rows("u", sd=0.0)
    control = [
        {**row, "control": "frozen", "run": f"c{n}", "loss": float(str(row["loss"])) + 0.02}
        for n, row in enumerate(ordinary[4:10])
    ]
    folder = report(tmp_path, study(ordinary, control))
    text = (folder / "report.md").read_text().replace("\\", "")
    assert re.search(r"\| frozen \| 6 \| 3\.\d+ \| 6 \| 0\.0200 \| \[0\.0200, 0\.0200\] \|", text)
    assert json.loads((folder / "fits.json").read_text())["allocation"][0]["n"] == 18


def test_each_budget_gets_its_own_picture_and_sentence_and_old_pictures_go(tmp_path: Path) -> None:
    folder = report(tmp_path, study(allocation_rows("u", budgets=(1e15, 4e15))))
    said = summary(folder)
    assert "C = 1e15" in said
    assert "C = 4e15" in said
    assert (folder / "figures" / "share-2.svg").is_file()
    report(tmp_path, study(allocation_rows("u", shares=(0.0, 0.6, 1.0))))
    assert not (folder / "figures" / "share-2.svg").exists()


def test_a_table_without_losses_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="'loss'"):
        report(tmp_path, pl.DataFrame({"rho": [0.0, 0.5, 1.0]}))


def test_equal_losses_are_no_evidence_of_a_shape(tmp_path: Path) -> None:
    same = [{**row, "loss": 3.0} for row in allocation_rows("u", shares=(0.0, 0.6, 1.0))]
    text = summary(report(tmp_path, study(same)))
    assert "No best share is named" in text
    assert "U-shaped" not in text


def test_more_memory_that_hurts_is_said_to_hurt(tmp_path: Path) -> None:
    worse = [{**row, "loss": 7.0 - float(str(row["loss"]))} for row in memory_rows()]
    assert "ten times the memory raises loss by 0.03" in summary(report(tmp_path, study(worse)))


def test_a_study_of_controls_alone_is_not_said_to_have_no_finished_run(tmp_path: Path) -> None:
    rows = [{**row, "control": "frozen"} for row in allocation_rows("u", shares=(0.2, 0.6))]
    assert "Every finished run is a control" in summary(report(tmp_path, study(rows)))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"loss": 3.0, "tokens": 1e6}], "'rho'"),
        ([{"loss": 3.0, "rho": 0.5, "status": "finishd"}], "Did you mean 'finished'?"),
    ],
)
def test_a_table_that_is_no_sweep_or_has_another_status_is_refused(
    tmp_path: Path, rows: list[dict[str, object]], sentence: str
) -> None:
    with pytest.raises(ScalingError, match=re.escape(sentence)):
        report(tmp_path, study(rows))
    assert not (tmp_path / "out").exists()


def test_a_reports_folder_alone_gives_it_again(whole: Path, tmp_path: Path) -> None:
    assert main(["report", str(whole), "--out", str(tmp_path)]) == 0
    names = [str(path.relative_to(whole)) for path in sorted(whole.rglob("*")) if path.is_file()]
    same, different, odd = filecmp.cmpfiles(whole, tmp_path, names, shallow=False)
    assert (different, odd, sorted(same)) == ([], [], sorted(names))
    assert "two cores" in (tmp_path / "report.md").read_text()


def with_memory(rows: list[dict[str, object]], **numbers: float) -> list[dict[str, object]]:
    health = {f"memory/layer1/{name}": number for name, number in numbers.items()}
    return [{**row, **(health if row["rho"] != 1.0 else dict.fromkeys(health))} for row in rows]


def test_memories_at_work_are_said_to_be(tmp_path: Path) -> None:
    rows = allocation_rows("u", shares=(0.0, 0.5, 1.0))
    rows = with_memory(rows, gate_mean=0.4, gate_p90=0.75, contribution_ratio=0.125)
    text = (report(tmp_path, study(rows)) / "report.md").read_text().replace("\\", "")
    assert "Of 4 runs with memory, every memory is inside this range." in text
    assert "| 0.5 | 32.8k | 1 | 2 | 0.4 | 0.75 | 0.125 |" in text
    assert "The memory is ill" not in text
    assert "| 1 | 0 | 1 |" not in text  # no memory, no line


def test_a_stuck_gate_and_an_idle_memory_stand_at_the_head(tmp_path: Path) -> None:
    rows = with_memory(allocation_rows("u", shares=(0.5, 1.0)), gate_mean=0.4, contribution_ratio=0.125)
    rows[0] |= {"memory/layer1/gate_mean": 0.995}
    rows[1] |= {"memory/layer1/contribution_ratio": 0.0021}
    rows += [{**rows[1], "seed": 2, "run": "lost", "memory/layer1/gate_mean": float("nan")}]
    head = summary(report(tmp_path, study(rows)))
    assert "The memory is ill in 3 places" in head
    assert "seed 2, block 1: gate –" in head  # not a number
    assert "ρ = 0.5, M = 32.8k, seed 0, block 1: gate 0.995" in head
    assert "ρ = 0.5, M = 32.8k, seed 1, block 1: adds 0.21 %" in head


def test_runs_that_say_nothing_of_their_memories_have_no_section(whole: Path) -> None:
    assert "Were the memories at work?" not in (whole / "report.md").read_text()


def test_losses_while_training_are_shown_against_those_of_the_largest_share(tmp_path: Path) -> None:
    ends = {0.0: 3.5, 0.5: 3.25, 1.0: 3.375}
    rows = [
        {**row, "tokens": 3e6, "evaluations": json.dumps([[10, 5.0 + s], [30, ends[rho] + s]])}
        for row in allocation_rows("u", shares=tuple(ends))
        for rho, s in [(float(str(row["rho"])), float(str(row["seed"])))]
    ]
    odd = {**rows[0], "run": "odd", "evaluations": "[[7, 9.0]]"}
    never = {**rows[0], "run": "never", "evaluations": "[]"}
    folder = report(tmp_path, study(rows, [odd, never]))
    text = (folder / "report.md").read_text().replace("\\", "")
    assert "| ρ | runs | 1M tokens | 3M tokens |" in text
    assert "| 0.0000 | 2 | 5.5000 | 4.0000 |" in text  # means over seeds, the odd schedule left out
    assert "loss minus that of ρ = 1" in (folder / "figures" / "progress-1.svg").read_text()
    assert "changed while they trained: ρ = 0.0000 at 1M tokens, ρ = 0.5000 at 3M tokens." in text


def test_a_bar_is_called_an_interval_of_the_best_share_only_where_one_is_named(tmp_path: Path) -> None:
    for shape, named in (("u", True), ("falling", False)):
        folder = report(tmp_path / shape, study(allocation_rows(shape)))
        drawn = (folder / "figures" / "share-1.svg").read_text()
        assert ("ρ* and its 95 % interval" in drawn) == named
        assert ("what the models leave for ρ*" in drawn) == (not named)
        assert "Thin grey lines join the runs of one seed." in (folder / "report.md").read_text()


def test_a_run_taken_up_again_is_told_in_words(tmp_path: Path) -> None:
    rows = [{**row, "openings": 1 + (n in (2, 5))} for n, row in enumerate(allocation_rows("u"))]
    text = (report(tmp_path / "cut", study(rows)) / "report.md").read_text()
    assert "2 of 18 that finished, once each, and taken up again where they stood" in text
    assert "2 is one interruption" in text
    whole = [{**row, "openings": 1} for row in rows]
    text = (report(tmp_path / "whole", study(whole)) / "report.md").read_text()
    assert "None that finished: each was started once." in text
    assert "2 is one interruption" not in text


def test_what_the_runs_cost_is_said_in_one_line_and_moves_no_fit(tmp_path: Path) -> None:
    plain = study(allocation_rows("u", shares=(0.0, 0.5, 1.0)), unfinished_rows())
    seconds = pl.Series([90.5, 100.0, 110.0, 150.0, None, float("nan"), *[None] * 4], dtype=pl.Float64)
    context = {"workers": "up to 2 runs at a time"}
    folders = {
        name: write_report(frame, tmp_path / name, context=context).parent
        for name, frame in (("plain", plain), ("timed", plain.with_columns(seconds=seconds)))
    }
    text = (folders["timed"] / "report.md").read_text()
    assert (
        "| What did the runs cost? | 90.5 s to 2.5 min a run, 7.51 min summed over runs (4 of 10 say it):"
        " wall time of training, compilation, evaluations and checkpoints included; up to 2 runs at a time. |"
        in text
    )
    assert (
        "| What did the runs cost? | not stated in the data |" in (folders["plain"] / "report.md").read_text()
    )
    fits = [json.loads((folder / "fits.json").read_text()) for folder in folders.values()]
    assert fits[0].pop("runs_hash") != fits[1].pop("runs_hash")
    assert fits[0] == fits[1]


def test_how_many_ran_at_a_time_is_not_made_up(tmp_path: Path) -> None:
    rows = [{**row, "seconds": 30.0} for row in allocation_rows("u", shares=(0.0, 1.0))]
    text = (report(tmp_path, study(rows)) / "report.md").read_text()
    assert "| What did the runs cost? | 30 s a run, 2 min summed over runs: wall time of training" in text
    assert "how many ran at a time, and slowed each other down, is not stated in the data." in text


def test_values_that_read_alike_are_no_span_and_a_small_mismatch_is_not_none(tmp_path: Path) -> None:
    rows = [{**row, "total_parameters": 83_710_000.0 + 100 * n} for n, row in enumerate(allocation_rows("u"))]
    text = (report(tmp_path, study(rows)) / "report.md").read_text().replace("\\", "")
    assert "83.7M to 83.7M" not in text
    assert "| total_parameters | 83.7M, 18 values; 0.002 % |" in text


def test_an_empty_column_weighs_nothing(tmp_path: Path) -> None:
    rows = [{**row, "loss_sd": None} for row in allocation_rows("u")]
    text = (report(tmp_path, study(rows)) / "report.md").read_text()
    assert "weighted by nothing: all runs alike" in text


def test_every_check_of_the_chosen_models_is_shown(whole: Path) -> None:
    text = (whole / "report.md").read_text().replace("\\", "")
    for title in ("Does the chosen formula fit?", "Runs held out and predicted", "Influence on ρ*"):
        assert f"### {title}" in text
    trials = json.loads((whole / "fits.json").read_text())["checks"]
    assert [trial["of"] for trial in trials] == ["C = 1e15 FLOPs", "memory"]
    assert all(trial["lack_of_fit"]["p_value"] > 0.05 for trial in trials)


def test_a_recipe_in_the_context_is_set_as_it_is(tmp_path: Path) -> None:
    rows = study(allocation_rows("u", shares=(0.0, 1.0)))
    context = {"recipe": "name: a\nseed: <1>\n", "code": {"code_version": "git:1a2b"}}
    folder = write_report(rows, tmp_path, context=context).parent
    assert "<pre" in (folder / "report.html").read_text()
    assert "seed: &lt;1&gt;" in (folder / "report.html").read_text()
    assert "```\nname: a\nseed: <1>\n```" in (folder / "report.md").read_text()
    assert "| code: code version | git:1a2b |" in (folder / "report.md").read_text()


def test_memory_sweeps_of_two_budgets_are_told_apart(tmp_path: Path) -> None:
    larger = [{**row, "budget": 4e15, "run": f"l{row['run']}"} for row in memory_rows(sizes=3)]
    folder = report(tmp_path, study(memory_rows(sizes=3), larger))
    text = summary(folder)
    assert "At C = 1e15 FLOPs: From 1.02k" in text
    assert "At C = 4e15 FLOPs: From 1.02k" in text
    assert [fit["budget"] for fit in json.loads((folder / "fits.json").read_text())["memory"]] == [1e15, 4e15]


def test_a_table_of_two_studies_is_refused(tmp_path: Path) -> None:
    rows = allocation_rows("u", shares=(0.0, 1.0))
    with pytest.raises(ScalingError, match="2 studies"):
        report(tmp_path, study(rows, [{**row, "study": "other"} for row in rows]))


def test_runs_of_two_versions_of_the_code_are_cautioned_against(tmp_path: Path) -> None:
    rows = allocation_rows("u", shares=(0.0, 1.0))
    mixed = [
        {**row, "code_version": f"git:{n % 2}", "data_hash": "d", "attempts": 2} for n, row in enumerate(rows)
    ]
    text = (report(tmp_path, study(mixed)) / "report.md").read_text().replace("\\", "")
    assert "The fitted runs are mixed: 2 values of code version." in text
    assert "| code version | git:0 | 2 runs |" in text
    assert "| data hash | d | 4 runs |" in text
    assert "attempts" in text
