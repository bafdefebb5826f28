"""Documents to token ids: corpora, tokenizer, canonical ids, split and memory-mapped shards."""

from engram_lab.text.canonical import canonical_ids
from engram_lab.text.config import SOTU, TextConfig
from engram_lab.text.prepare import UnreadText, look_ahead, prepare, split_warning
from engram_lab.text.shards import TokenCorpus

__all__ = [
    "SOTU",
    "TextConfig",
    "TokenCorpus",
    "UnreadText",
    "canonical_ids",
    "look_ahead",
    "prepare",
    "split_warning",
]
