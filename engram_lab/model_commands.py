"""What the commands on a trained network do: write on, and look inside."""

from __future__ import annotations

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

    The text is taken as the beginning of a document; the continuation ends where the network ends the
    document. `memory` says where table rows are read from. Returns the exit status: 130 when interrupted,
    which is a usual way to stop it.
    """
    if length < 1:
        raise UserError(f"tokens is {length}, but must be at least 1.")
    saved = open_saved(checkpoint, device, memory)
    prompt = saved.encode(text)
    drawn = (step[0] for step in stream(saved.network, [prompt], length, sampling))
    kept = (token for token in drawn if token is not None and token != saved.network.eos_id)
    print(printable(text), end="", flush=True)
    try:
        for piece in saved.speller.stream(kept, prompt[-1]):
            print(printable(piece), end="", flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        return 130
    print(flush=True)
    return 0


def inspect(checkpoint: Path, text: str, *, out: Path | None = None, device: str | None = None) -> None:
    """Print what the memory does on `text`, and write it as a page to `out`."""
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
