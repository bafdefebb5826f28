"""Which documents are held out: decided by a hash of each text, wherever it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from engram_lab.errors import UserError


def document_hash(text: str) -> int:
    """Return 64 bits of BLAKE2b over the text's UTF-8."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def split_documents(
    hashes: np.ndarray, fraction: float, strata: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide documents into training and validation.

    Without strata, a document is held out when its hash falls in the lowest `fraction` of all hashes: adding
    documents moves none of the others across. With strata, the documents are lined up by (stratum, hash) and
    every 1/fraction-th is held out, so that the held-out ones span the strata. Of equal texts only the first
    stays, since repeated text opens a gap between training and validation loss that is none of the model's.
    At least one document is held out and at least one is trained on, but for a `fraction` of 0, which holds
    none out.

    Args:
        hashes: uint64 [documents], `document_hash` of each.
        fraction: share held out, below 1.
        strata: the group of each document, or None.

    Returns:
        Numbers of the training documents and of the validation documents, each in the order of the hashes:
        any prefix is a fair sample of its side.

    Raises:
        UserError: fewer than two different documents, or none where none is held out.
    """
    hashes = np.asarray(hashes, dtype=np.uint64)
    _, unique = np.unique(hashes, return_index=True)  # in the order of the hashes
    count = len(unique)
    if fraction == 0:
        if count == 0:
            raise UserError("the corpus holds no text.")
        return unique, unique[:0]
    if count < 2:
        plural = "" if count == 1 else "s"
        raise UserError(
            f"the corpus holds {count} different document{plural}; whole documents are held "
            "out for validation, so give at least 2 (a .txt file is one unless <|endoftext|> divides it, "
            "a .jsonl file has one a line)."
        )
    if strata is None:
        below = int(np.searchsorted(hashes[unique], np.uint64(int(fraction * 2**64))))
        chosen = np.arange(_inside(below, count))
    else:
        line = np.lexsort((hashes[unique], np.asarray(strata)[unique]))
        held_out = _inside(round(fraction * count), count)
        chosen = line[((np.arange(held_out) + 0.5) * count / held_out).astype(np.int64)]
    is_validation = np.zeros(count, dtype=bool)
    is_validation[chosen] = True
    return unique[~is_validation], unique[is_validation]


def _inside(held_out: int, count: int) -> int:
    return min(max(held_out, 1), count - 1)
