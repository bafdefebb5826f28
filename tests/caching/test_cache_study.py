"""The command: files that fit each other, and sentences for what cannot be measured."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from caching_texts import some_text
from rich.console import Console
from saved_networks import save_run

from engram_lab.caching import command
from engram_lab.caching.study import CacheConfig, Speeds, study_caches, to_plain, to_rows
from engram_lab.cli import main
from engram_lab.errors import UserError
from engram_lab.recipe import Recipe
from engram_lab.text import TextConfig, TokenCorpus, prepare

QUICK = ["--orders", "2", "3", "--rows-per-head", "5000", "--tokens", "40000", "--vocab-size", "300"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one run on ten documents leaves."""
    folder = tmp_path_factory.mktemp("curve")
    generator = np.random.default_rng(0)
    words = np.array([f"w{number} " for number in range(200)])
    texts = ["".join(words[np.minimum(generator.zipf(1.3, 3000), 200) - 1]) for _ in range(10)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    arguments = [str(folder / "text.jsonl"), *QUICK, "--cache-dir", str(folder / "cache")]
    assert main(["cache-curve", *arguments, "--out", str(folder / "out")]) == 0
    return folder


@pytest.mark.parametrize(
    ("out", "there", "reason"),
    [
        ("file", "file", "Not a directory"),
        ("file/below", "{here}/file", "Not a directory"),
        ("nowhere", "nowhere", "No such file or directory"),
        ("taken", "taken/figures", "Not a directory"),
        ("/proc/below", "/proc", ""),  # takes no files, not even root's
    ],
    ids=["file", "below file", "broken link", "figures", "closed"],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    there: str,
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    for file in ("file", "taken/figures"):
        Path(file).touch()
    Path("nowhere").symlink_to("gone")
    monkeypatch.setattr(command, "_text", lambda _: pytest.fail("the text was read"))
    assert main(["cache-curve", "text.txt", "--out", out]) == 2
    place = there.format(here=Path.cwd())
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out is {out!r}, but {place!r} takes no new files: {reason}")
    assert error.endswith("; choose another folder.\n")


def test_the_files_say_the_same(written: Path) -> None:
    out = written / "out"
    study = json.loads((out / "cache-curve.json").read_text())
    rows = list(csv.DictReader((out / "cache-curve.csv").open()))
    assert [order["order"] for order in study["orders"]] == [2, 3]
    table = study["orders"][1]["table"]
    mine = [row for row in rows if row["order"] == "3" and row["table"] == "hashed"]
    assert [int(row["cached_rows"]) for row in mine] == table["sizes"]
    assert [float(row["static_hit_rate"]) for row in mine] == pytest.approx(table["static"], abs=1e-6)
    assert study["orders"][1]["table_rows"] == 5003


def test_the_page_needs_nothing_beside_it_and_its_pictures_are_svg(written: Path) -> None:
    page = (written / "out" / "cache-curve.html").read_text()
    assert "src=" not in page
    assert "<script" not in page
    assert page.count("<svg") == 6
    for file in (written / "out" / "figures").iterdir():
        assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_hit_rates_above_the_share_seen_before_are_explained_where_they_stand(
    written: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (shards,) = (path for path in (written / "cache").iterdir() if path.is_dir())
    out = written / "small"
    few = ["--orders", "5", "--rows-per-head", "50", "--tokens", "40000", "--out", str(out)]
    assert main(["cache-curve", str(shards), *few]) == 0
    (order,) = json.loads((out / "cache-curve.json").read_text())["orders"]
    seen = order["ngrams"]["seen"]
    assert max(order["table"]["static"]) > seen  # rows are shared
    assert max(order["ngrams"]["static"]) == pytest.approx(seen)
    assert max(order["ngrams"]["lru"]) > seen  # the cache by recency goes on learning
    page = " ".join((out / "cache-curve.html").read_text().split())
    assert "may lie above the share of n-grams seen before, since a new n-gram hits" in page
    assert "bounds the cache kept by frequency" in page
    assert "Hit rates may lie above it" in " ".join(capsys.readouterr().out.split())


def test_token_shards_and_recipes_are_read_too(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards,) = (path for path in (written / "cache").iterdir() if path.is_dir())
    again = [str(shards), *QUICK[:-2], "--out", str(written / "again")]
    assert main(["cache-curve", *again]) == 0
    first, second = (
        json.loads((written / name / "cache-curve.json").read_text())["orders"] for name in ("out", "again")
    )
    assert first == second
    assert main(["cache-curve", str(shards), *QUICK]) == 2
    assert "is cut into tokens" in capsys.readouterr().err


def test_all_of_the_text_is_measured(tmp_path: Path) -> None:
    """One document; and of shards that were made to be trained on, both sides."""

    def tokens(*arguments: str) -> int:
        out = tmp_path / "out"
        options = ["--orders", "2", "--rows-per-head", "500", "--out", str(out)]
        assert main(["cache-curve", *arguments, *options]) == 0
        return int(json.loads((out / "cache-curve.json").read_text())["tokens"])

    text = " ".join(str(number % 97) for number in range(4000))
    one, cache = tmp_path / "one.txt", tmp_path / "cache"
    one.write_text(text)
    options = ["--vocab-size", "300", "--cache-dir", str(cache)]
    measured = tokens(str(one), *options)
    (shards,) = (path for path in cache.iterdir() if path.is_dir())
    assert measured == len(TokenCorpus(shards).tokenizer().encode(text).ids) + 1  # the end of the document
    two = tmp_path / "two.txt"
    two.write_text(text + "<|endoftext|>" + text[::-1])
    corpus = prepare(TextConfig(source=str(two), vocab_size=300, cache_dir=str(cache)))
    both = len(corpus.train) + len(corpus.validation)
    assert len(corpus.validation) > 0
    assert tokens(str(corpus.path)) == both
    assert tokens(str(corpus.path), "--tokens", str(both - 1)) == both - 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["no-such-file.jsonl"], "no such file"),
        (["sotu", "--orders", "2", "17"], "--orders is 17, but must be at least 1 and at most 16."),
        (["sotu", "--sample", "1.5"], "--sample is 1.5, but must be above 0 and at most 1."),
        (["sotu", "--sequences", "0"], "--sequences is 0, but must be at least 1."),
        (["sotu", "--rows-per-head", "1"], "--rows-per-head is 1, but must be at least 2"),
        (["sotu", "--rows-per-head", str(2**31)], "and at most 2147483647."),
        (["sotu", "--vocab-size", "256"], "--vocab-size is 256, but must be at least 257."),
        (["sotu", "--tokens", "0"], "--tokens is 0, but must be at least 1."),
        (["sotu", "--tokens", "63", "--sequences", "2"], "--tokens is 63, but must be at least 64 where"),
        (["sotu", "--row-bytes", "0"], "--row-bytes is 0, but must be at least 1."),
        (["sotu", "--device-bandwidth", "-1"], "--device-bandwidth is -1, but must be above 0."),
        (["sotu", "--host-bandwidth", "inf"], "--host-bandwidth is inf, but must be a finite number."),
        (["sotu", "--disk-reads", "-1"], "--disk-reads is -1, but must be above 0."),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache-curve", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"orders": (3, 2)}, "ascending"),
        ({"orders": (2, 17)}, "longer than 16"),
        ({"rows_per_head": 1}, "at least 2"),
        ({"sequences": 0}, "at least 1"),
        ({"sample": 1.5}, "at most 1"),
        ({"disk_reads": -1.0}, "above 0"),
    ],
)
def test_a_configuration_refuses_what_the_command_line_does(config: dict[str, Any], sentence: str) -> None:
    kind: Any = Speeds if "disk_reads" in config else CacheConfig
    with pytest.raises(UserError, match=sentence):
        kind(**config)


@pytest.mark.parametrize("given", ["{id}", "mlruns/runs/{id}", "mlruns/runs/{id}/", "mlruns/runs/{id}/model"])
def test_a_run_is_answered_with_its_recipe(
    given: str, tiny: dict[str, Any], in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside a text, too; and the recipe that is named can be given."""
    run = "0123456789abcdef"
    recipe = Path("mlruns/runs") / run / "recipe.yaml"
    (recipe.parent / "model").mkdir(parents=True)
    recipe.write_text(yaml.safe_dump(Recipe.from_dict(tiny).to_dict()))
    assert main(["cache-curve", "sotu", given.format(id=run)]) == 2
    source = tiny["text"]["source"]
    assert capsys.readouterr().err == (
        f"error: {given.format(id=run)!r} is a run, but a text is wanted: give text files, folders of them "
        f"or sotu; the run's own, {source!r}, is measured by its recipe, {str(recipe)!r}.\n"
    )
    assert main(["cache-curve", str(recipe), "--orders", "2", "--tokens", "5000"]) == 0


def test_a_network_without_its_run_is_told_from_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_run(tmp_path)
    assert main(["cache-curve", str(tmp_path / "model")]) == 2
    assert "is a trained network, but a text is wanted: give text files" in capsys.readouterr().err


def test_orders_may_come_in_any_order(written: Path) -> None:
    (shards,) = (path for path in (written / "cache").iterdir() if path.is_dir())
    out = written / "unordered"
    few = ["--orders", "3", "2", "2", "--rows-per-head", "5000", "--tokens", "4000", "--out", str(out)]
    assert main(["cache-curve", str(shards), *few]) == 0
    orders = json.loads((out / "cache-curve.json").read_text())["orders"]
    assert [order["order"] for order in orders] == [2, 3]


def test_progress_ends_at_all_of_the_work_and_never_goes_back() -> None:
    shares: list[float] = []
    study_caches(
        "x",
        some_text(length=3000),
        CacheConfig(orders=(2, 4), rows_per_head=50),
        Speeds(),
        lambda what, share: shares.append(share),
    )
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_what_is_left_is_told_from_ten_seconds_of_work_start_up_aside(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([60.0, 69.0, 71.0, 80.0, 90.0])  # the first call after a minute of start-up
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    progress = command._Progress(Console(highlight=False))
    for share in (0.01, 0.1, 0.12, 0.21, 1.0):
        progress("reading", share)
    assert capsys.readouterr().out.splitlines() == [
        "reading: 1% of all",
        "reading: 12% of all, about 1 min 28 s left",  # 88 of 99 hundredths, at 11 in 11 s
        "reading: 100% of all",
    ]


def test_side_by_side_sequences_change_recency_but_not_frequency() -> None:
    text = some_text(length=4096)
    alone, batch = (
        study_caches("x", text, CacheConfig(orders=(2,), rows_per_head=500, sequences=n), Speeds())
        for n in (1, 8)
    )
    assert alone.orders[0].ngrams.rows == batch.orders[0].ngrams.rows
    assert alone.orders[0].ngrams.look_ups == batch.orders[0].ngrams.look_ups
    assert not np.array_equal(alone.orders[0].ngrams.lru, batch.orders[0].ngrams.lru)


def test_a_short_text_and_a_sampled_one() -> None:
    sampled = study_caches("x", some_text(), CacheConfig(orders=(2,), rows_per_head=97, sample=0.5), Speeds())
    json.dumps(to_plain(sampled), allow_nan=False)
    assert any(row["lru_hit_rate"] == "" for row in to_rows(sampled))


def test_bandwidth_between_its_ends() -> None:
    rates = np.array([0.0, 0.5, 1.0])
    assert Speeds.mixed(rates, 30.0, 10.0) == pytest.approx([10.0, 15.0, 30.0])
    assert Speeds(row_bytes=100, disk_reads=50).disk == 5000
