"""A corpus and a recipe small enough that a test can train on them in seconds."""

from __future__ import annotations

import json
import lzma
import os
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch is imported: on a busy machine, threads that wait for each other cost twentyfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# How long an example takes depends on what else the machine does: no deadline.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "sequence_length": 32,
        "batch_size": 4,
        "tokens": 32 * 4 * 24,
        "validation_tokens": 512,
        "evaluations": 2,
    },
    "model": {
        "d_model": 16,
        "n_layers": 2,
        "attention": {"n_heads": 2, "n_kv_heads": 1},
        "ffn": {"experts": 12, "top_k": 2, "shared_experts": 1, "expert_hidden": 8},
        "engram": {"layers": [1], "orders": [2, 3], "heads": 2, "row_dim": 4},
    },
    "budget": {"rho": 0.5},
    "optimizer": {"learning_rate": 0.01},
    "checkpoint_every_n_steps": 3,
    "trainer": {"accelerator": "cpu", "devices": 1, "log_every_n_steps": 1},
}


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short documents, cut from the embedded corpus."""
    packed = next(
        f for f in resources.files("engram_lab.text").joinpath("data").iterdir() if f.name.endswith(".xz")
    )
    file = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    with lzma.open(packed.open("rb"), "rt", encoding="utf-8") as lines, file.open("w") as out:
        for line, _ in zip(lines, range(40), strict=False):
            out.write(json.dumps({"text": json.loads(line)["text"][:1500]}) + "\n")
    return file


@pytest.fixture(scope="session")
def tiny_values() -> dict[str, Any]:
    """What a tiny recipe says, its text and folders left out."""
    return TINY


@pytest.fixture
def tiny(documents: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe, as plain values, that keeps everything it writes in the test's own folder."""
    cache = tmp_path_factory.getbasetemp() / "text-cache"
    return {
        **TINY,
        "text": {
            "source": str(documents),
            "vocab_size": 400,
            "validation_fraction": 0.2,
            "cache_dir": str(cache),
        },
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlruns/mlflow.db", "directory": f"{tmp_path}/mlruns"},
    }


@pytest.fixture
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in the test's own folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
