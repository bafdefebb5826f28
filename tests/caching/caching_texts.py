"""Texts that are small enough to be checked by hand."""

import numpy as np

from engram_lab.caching.stream import Text
from engram_lab.model.engram import EngramConfig

EOS = 3


def some_text(boundary: str = "reset_at_eos", length: int = 900) -> Text:
    ids = np.random.default_rng(1).integers(0, 12, length).astype(np.uint16)
    canonical = np.array([0, 1, 2, 3, 1, 1, 4, 5, 2, 6, 7, 8], dtype=np.int32)
    return Text(ids=ids, canonical=canonical, eos_id=EOS, engram=EngramConfig(boundary=boundary))
