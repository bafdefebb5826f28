"""The benchmarks of serving run from end to end, and their decoding equals their prefill."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def rehearse(script: str, out: Path, *options: str) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--rehearse", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())


def test_every_part_of_the_benchmark_runs(tmp_path: Path) -> None:
    parts = ("check", "sweep", "pairs", "timelines")
    result = rehearse("serving.py", tmp_path / "serving.json", "--none-every", "2", "--parts", *parts)
    tiny = result["backbones"]["tiny"]
    assert "failed" not in tiny
    assert [list(pair)[1:] for pair in tiny["pairs"]] == [
        ["none", "small", "host"],
        ["host", "small"],
        ["none", "small", "host"],
    ]
    assert set(tiny["decode_error"]) == {"none", "small", "host"}
    assert max(tiny["decode_error"].values()) < 1e-3
    for name, pairs in (("module", 2), ("look_up", 3), ("all", 2)):
        for part in ("together", "prefill", "decode"):
            loss = tiny[name][part]
            assert loss["low"] <= loss["loss_percent"] <= loss["high"] < 100
            assert loss["pairs"] == pairs
    found = sorted(
        100 * (1 - sum(pair["small"]["decode"]) / sum(pair["host"]["decode"])) for pair in tiny["pairs"]
    )
    assert tiny["look_up"]["decode"]["loss_percent"] == pytest.approx(found[1])
    assert tiny["look_up"]["decode"]["mean"] == pytest.approx(sum(found) / 3)
    assert result["table_bytes"] == result["table_rows"]["host"] * 84


def test_a_table_on_disk_is_served_cold_and_again(tmp_path: Path) -> None:
    options = ("--directory", str(tmp_path), "--kept", "1.0")
    result = rehearse("serving_disk.py", tmp_path / "disk.json", *options)
    assert result["decode_error"] < 1e-3
    assert [pair["regime"] for pair in result["pairs"]] == ["cold", "new text", "new text", "again", "again"]
    rows = [pair["rows"]["prefill"] for pair in result["pairs"]]
    assert all(row["missing"] == pytest.approx(row["rows"] * (1 - row["hit_rate"])) for row in rows)
    assert rows[0]["hit_rate"] < rows[2]["hit_rate"] < rows[3]["hit_rate"]
    summary = result["summary"]
    followed = {"the disk can follow", "the disk cannot follow"}
    assert {"new text", "again"} <= set(summary) <= {"cold", "new text", "again"} | followed
    for part in ("prefill", "decode"):
        counts = [summary[name][part]["loss"]["pairs"] for name in followed if part in summary.get(name, {})]
        assert sum(counts) == 4  # each warm text is in one of them
    for pair in result["pairs"]:
        speed = pair["disk_reads_per_second"]
        for part in ("prefill", "decode"):
            needed = pair["rows"][part]["reads"] / speed if speed else 0.0
            assert pair["bound"][part] == max(pair["small"][part], needed)


def test_generation_is_timed_on_every_tier(tmp_path: Path) -> None:
    result = rehearse("generate_tiers.py", tmp_path / "tiers.json")
    assert len(result["turns"]) == 3
    ratios = [turn["disk"] / turn["resident"] for turn in result["turns"][1:]]
    assert result["ratios"]["disk"]["median"] == pytest.approx(sum(ratios) / 2)
    assert result["turns"][0]["hits"] < 1


def test_a_part_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    # No pair is every zeroth.
    out = tmp_path / "serving.json"
    result = rehearse("serving.py", out, "--parts", "pairs", "check", "--none-every", "0")
    tiny = result["backbones"]["tiny"]
    assert set(tiny["failed"]) == {"pairs"}
    assert max(tiny["decode_error"].values()) < 1e-3
