"""What the commands on a trained network do: write on, and look inside."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from rich.console import Console

from engram_lab.analysis.inspection import inspect as examine
from engram_lab.analysis.page import to_html
from engram_lab.analysis.terminal import show
from engram_lab.errors import UserError
from engram_lab.memory.config import Tier
from engram_lab.model.generation import Sampling, stream
from engram_lab.saved_model import open_saved
from engram_lab.spelling import printable


def generate(
    checkpoint: Path,
    text: str,
    *,
    length: int,
    sampling: Sampling,
    device: str | None = None,
    memory: Tier = "resident",
) -> int:
    """Print `text` and up to `length` tokens that the network continues it with, as they come.

    The text is taken as the beginning of a document. A blank at its end is taken to be the one before the
    next word, which vocabularies make part of that word, so that none is doubled. The continuation ends
    where the network ends the document. `memory` says where table rows are read from. Returns the exit
    status: 130 when interrupted, which is a usual way to stop it.
    """
    if length < 1:
        raise UserError(f"tokens is {length}, but must be at least 1.")
    saved = open_saved(checkpoint, device, memory)
    prompt = saved.encode(text.rstrip(" "))
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
