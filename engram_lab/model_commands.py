"""What the commands on a trained network do: write on, and look inside."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from engram_lab.analysis.inspection import inspect as examine
from engram_lab.analysis.page import to_html
from engram_lab.analysis.terminal import show
from engram_lab.errors import UserError
from engram_lab.memory.config import Tier
from engram_lab.memory.hot_rows import HotRows, hottest
from engram_lab.memory.room import GIB, available_memory
from engram_lab.model.generation import Sampling, stream
from engram_lab.model.transformer import Transformer
from engram_lab.saved_model import SavedModel, open_saved
from engram_lab.spelling import printable


@dataclass(frozen=True, kw_only=True)
class HotRowsOption:
    """Which rows to keep on the GPU: of each table so many, those that a text reads most."""

    rows: int
    """At least 1."""
    text: Path


def generate(
    checkpoint: Path,
    text: str,
    *,
    length: int,
    sampling: Sampling,
    device: str | None = None,
    memory: Tier = "resident",
    hot: HotRowsOption | None = None,
) -> int:
    """Print `text` and up to `length` tokens, at least 1, that the network continues it with, as they come.

    The text is taken as the beginning of a document. A blank at its end is taken to be the one before the
    next word, which vocabularies make part of that word, so that none is doubled. The continuation ends
    where the network ends the document. `memory` says where table rows are read from, `hot` which of them
    are kept on the GPU. Returns the exit status: 130 when interrupted, which is a usual way to stop it.
    """
    if hot is not None and memory != "host":
        raise UserError(
            f"--hot-rows keeps rows of host memory on the GPU, but --memory is {memory}: add --memory host."
        )
    saved = open_saved(checkpoint, device, memory)
    if hot is not None:
        where = saved.network.embedding.weight.device
        if where.type != "cuda":
            raise UserError(
                f"--hot-rows keeps rows on the GPU, but the network computes on {where}: leave it out."
            )
        share = keep_hot_rows(saved, hot)
        print(
            f"{hot.rows:,} rows of each table on the GPU serve {share:.1%} of the reads of {hot.text}",
            file=sys.stderr,
        )
    prompt = saved.encode(text.rstrip(" "))
    _require_room(saved.network, len(prompt), length)
    if (warning := _too_long(saved.folder, len(prompt), length)) is not None:
        print(warning, file=sys.stderr)
    drawn = (step[0] for step in stream(saved.network, [prompt], length, sampling))
    kept = (token for token in drawn if token is not None and token != saved.network.eos_id)
    bold, normal = ("\033[1m", "\033[0m") if Console().is_terminal else ("", "")
    print(f"{bold}{printable(text)}{normal}", end="", flush=True)
    begins = len(prompt) == 1  # there is no word before to be set apart from
    pieces = saved.speller.stream(kept, None if begins else prompt[-1])
    blank = " " if text.endswith(" ") else ""
    try:
        for piece in pieces:
            print(printable(piece.removeprefix(blank)), end="", flush=True)
            blank = ""
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    print(flush=True)
    return 0


def _require_room(network: Transformer, given: int, new: int) -> None:
    """Refuse `new` tokens where there is no memory for what every block keeps of each: keys and values."""
    attention, d_model = network.config.attention, network.config.d_model
    if attention.kind == "latent":
        numbers = attention.latent_width(d_model) + attention.rope_width(d_model)
    else:
        numbers = 2 * attention.kv_heads * attention.head_width(d_model)
    weight = network.embedding.weight
    number_bytes = 2 if weight.is_cuda else weight.element_size()  # a GPU works in bfloat16
    each = network.config.n_layers * numbers * number_bytes
    available = _available(weight.device)
    if (given + new) * each > available:
        raise UserError(
            f"--tokens is {new:,}, whose keys and values need {(given + new) * each / GIB:,.1f} GiB of "
            f"memory, but {available / GIB:,.1f} GiB are available; ask for fewer than {available // each:,}."
        )


def _available(device: torch.device) -> int:
    """Return the bytes that may still be taken where the network computes; elsewhere than on Linux, all."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        return available_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _too_long(model: Path, given: int, new: int) -> str | None:
    """Return a warning where `given` and `new` tokens are more than `model` was trained on at once.

    A window of training is T tokens that are read and the one that follows the last of them.
    """
    recipe = model.parent / "recipe.yaml"
    if not recipe.is_file():  # a model folder that was copied alone does not tell
        return None
    data = yaml.safe_load(recipe.read_text(encoding="utf-8")).get("data", {})
    trained = data.get("sequence_length")
    if trained is None or given + new <= trained + 1:
        return None
    return (
        f"warning: the network was trained on {trained:,} tokens at a time, and this asks for up to "
        f"{given + new:,}, the text's {given:,} among them: how it writes beyond {trained:,} is untried"
    )


@torch.no_grad()
def keep_hot_rows(saved: SavedModel, hot: HotRowsOption) -> float:
    """Keep the rows that `hot.text` reads most beside the network, and return their share of its reads.

    UserError for a text that cannot be read.
    """
    try:
        text = hot.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UserError(f"--hot-text is {str(hot.text)!r}, which cannot be read: {reason}.") from error
    network = saved.network
    assert network.hash is not None
    ids = torch.tensor([saved.encode(text)], device=network.embedding.weight.device)
    addresses = network.hash(ids)  # [M, 1, T, H]
    kept = 0
    tables: Iterable[Any] = network.tables
    for table, mine in zip(tables, addresses, strict=True):
        table.hot = HotRows.load(table.store, hottest([mine], hot.rows), table.device)
        kept += int((table.hot.find(mine.flatten().long()) >= 0).sum())
    return kept / addresses.numel()


def inspect(checkpoint: Path, text: str, *, out: Path | None = None, device: str | None = None) -> None:
    """Print what the memory does on `text`, and write it as a page to `out`."""
    if out is not None:
        _check_writable(out)
    saved = open_saved(checkpoint, device)
    ids = torch.tensor(saved.encode(text), device=saved.network.embedding.weight.device)
    inspection = examine(saved.network, saved.speller, ids)
    console = Console(highlight=False)
    show(inspection, console)
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(to_html(inspection, str(checkpoint)), encoding="utf-8")
        except OSError as error:
            raise UserError(f"out = {str(out)!r} cannot be written: {error.strerror}.") from error
        console.print(f"page: {out.resolve()}", soft_wrap=True)


def _check_writable(out: Path) -> None:
    """Refuse a file that cannot be written before minutes are spent on what it would hold."""
    if out.is_dir():
        raise UserError(f"out = {str(out)!r} cannot be written: it is a folder.")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(out if out.exists() else folder, os.W_OK):
        raise UserError(f"out = {str(out)!r} cannot be written: {str(folder)!r} takes no new files.")
