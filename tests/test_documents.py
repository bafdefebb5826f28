"""What the documents say of versions is what is pinned and allowed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("document", ["README.md", "docs/performance.md"])
def test_documents_name_the_pinned_torch_and_one_for_gpus_that_is_allowed(document: str) -> None:
    (pinned,) = re.findall(r"^torch==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    minor = pinned.rpartition(".")[0]
    text = " ".join((ROOT / document).read_text(encoding="utf-8").replace("\n>", " ").split())
    assert f"`requirements.lock` pins {minor}" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (allowed,) = (r for r in map(Requirement, project["dependencies"]) if r.name == "torch")
    for version in [pinned, *re.findall(r"install torch==([\d.]+)", text)]:
        assert version in allowed.specifier
