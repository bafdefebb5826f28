"""A trained network together with the tokenizer it was trained with, as a run leaves them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engram_lab.errors import UserError, nearest
from engram_lab.memory.config import MemoryConfig, Tier
from engram_lab.model.checkpoint import RECORD, load
from engram_lab.model.transformer import Transformer
from engram_lab.spelling import Speller
from engram_lab.text.shards import TOKENIZER
from engram_lab.text.vocabulary import load_tokenizer, vocabulary_hash

RUNS = Path("mlruns/runs")
"""Where runs lie unless a recipe's tracking.directory says otherwise."""
_IDENTITY = re.compile("[0-9a-f]{16}")
DEVICES = ("cpu", "cuda", "mps")


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """An opened network, in evaluation mode, and its tokenizer."""

    folder: Path
    network: Transformer
    tokenizer: Tokenizer

    def encode(self, text: str) -> list[int]:
        """Return the ids of a document that begins with `text`: an end-of-text id, then those of the text.

        In training every document follows the end of another. Special tokens written out stay plain text.
        """
        return [self.network.eos_id, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    @property
    def speller(self) -> Speller:
        """Spells the network's ids."""
        return Speller(self.tokenizer)


def open_saved(checkpoint: Path, device: str | None = None, memory: Tier = "resident") -> SavedModel:
    """Open a run's directory, the `model` folder in it, or a run by its identity alone.

    Args:
        checkpoint: the identity, 16 hexadecimal digits, of a run below `RUNS`, or a folder written by
            `model.checkpoint.save` with the `tokenizer.json` beside the weights.
        device: where to compute; None takes the first GPU if there is one.
        memory: where table rows are read from; "disk" writes them into a file beside the weights, once.

    Raises:
        UserError: there is no such folder, its files do not fit together, or there is no such device.
    """
    folder = _find(checkpoint)
    chosen = _device(device)
    tokenizer = _read_tokenizer(folder)
    tables = MemoryConfig(tier=memory, directory=str(folder) if memory == "disk" else None)
    network = load(folder, tokenizer_hash=vocabulary_hash(tokenizer), device=chosen, tables=tables)
    return SavedModel(folder=folder, network=network, tokenizer=tokenizer)


def _find(checkpoint: Path) -> Path:
    if _IDENTITY.fullmatch(str(checkpoint)) and not checkpoint.exists():
        checkpoint = RUNS / checkpoint
    for folder in (checkpoint, checkpoint / "model"):
        if (folder / RECORD).is_file():
            return folder
    if (checkpoint / "recipe.yaml").is_file():
        raise UserError(
            f"the run in {str(checkpoint)!r} has not finished, so it has no weights yet: run its recipe "
            "again, which continues it."
        )
    if checkpoint.is_dir():
        raise UserError(
            f"{str(checkpoint)!r} is no checkpoint: give a run's directory, or the folder in it that holds "
            f"{RECORD}."
        )
    beside = checkpoint.parent
    others = sorted(str(path) for path in beside.iterdir() if path.is_dir()) if beside.is_dir() else []
    raise UserError(
        f"there is no checkpoint {str(checkpoint)!r}: give the directory or the 16 digits of a finished run, "
        f"which `engram-lab run RECIPE` leaves below {RUNS}.{nearest(str(checkpoint), others)}"
    )


def _read_tokenizer(folder: Path) -> Tokenizer:
    file = folder / TOKENIZER
    if not file.is_file():
        raise UserError(
            f"{str(folder)!r} holds no {TOKENIZER}: copy the one there that the network was trained with."
        )
    tokenizer = load_tokenizer(file)
    tokenizer.encode_special_tokens = True
    return tokenizer


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = name.partition(":")[0]
    if kind not in DEVICES:
        raise UserError(
            f"device is {name!r}, but must be one of {', '.join(DEVICES)}, or one of several, as in cuda:1."
            + nearest(kind, DEVICES)
        )
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"device is {name!r}, but this machine has no such device: use cpu.") from None
    return device
