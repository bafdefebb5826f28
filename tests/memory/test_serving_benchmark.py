"""The benchmark of serving runs from end to end, and its decoding equals its prefill."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("options", [[], ["--ahead", "--prefill-hash", "device"]], ids=["usual", "ahead"])
def test_rehearsal(tmp_path: Path, options: list[str]) -> None:
    out = tmp_path / "serving.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "serving.py"), "--rehearse", "--out", str(out)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    tiny = result["backbones"]["tiny"]
    assert len(tiny["pairs"]) == 3
    assert max(tiny["decode_error"].values()) < 1e-3
    for name in ("module", "look_up", "all"):
        for part in ("together", "prefill", "decode"):
            loss = tiny[name][part]
            assert loss["low"] <= loss["loss_percent"] <= loss["high"] < 100
    assert tiny["all"]["decode"]["loss_percent"] == pytest.approx(
        sum(100 * (1 - p["none"]["decode"] / p["host"]["decode"]) for p in tiny["pairs"]) / 3
    )
    assert result["table_bytes"] == result["table_rows"]["host"] * 84
