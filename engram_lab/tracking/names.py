"""Names that tracking writes and readers look for."""

from __future__ import annotations

import re

# What a run is: the parent of a study, one cell of it, or a model trained on its own.
KIND = "kind"
STUDY = "study"
TRIAL = "trial"
SINGLE = "single"

# The column `run` of a table of runs and what `open_run` finds a run by: the content hash of its recipe.
RUN = "run"
IDENTITY = "identity"
REASON = "reason"
OWNER = "owner"
OPENINGS = "openings"
CODE_VERSION = "code_version"
MACHINE = "machine"

PARENT = "mlflow.parentRunId"
RUN_NAME = "mlflow.runName"
GIT_COMMIT = "mlflow.source.git.commit"

FINAL_LOSS = "final/loss"

# MLflow's limits on what it stores.
LONGEST_NAME = 250
LONGEST_TAG = 5000
LONGEST_PARAM = 6000
LARGEST_PARAMS = 100  # in one call


def metric_name(name: str) -> str:
    """Return `name` as MLflow takes it: letters, digits, _ - . / and space, at most 250 of them.

    Any other character becomes "_". A name that is fine comes back as it is.
    """
    cleaned = re.sub(r"[^A-Za-z0-9_./ -]", "_", name)
    pieces = [
        piece.replace("..", "__") if set(piece) <= {"."} else piece for piece in cleaned.split("/") if piece
    ]
    name = "/".join("_" if piece == "." else piece for piece in pieces)
    if name.startswith(".."):  # MLflow takes it for a way out of its folder
        name = "__" + name[2:]
    return name[:LONGEST_NAME].rstrip("/") or "_"
