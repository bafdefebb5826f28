"""A training checkpoint as one file: whole or absent, and looked through before a run goes on from it."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from engram_lab.errors import UserError
from engram_lab.files import written_aside


class WholeFile(TorchCheckpointIO):
    """Lightning's plugin that writes checkpoints, beside where they go.

    Its own one writes them where temporary files go, and moves them from there: across file systems that is a
    copy to the final name, of which a kill or a full disk leaves a part.
    """

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: object = None
    ) -> None:
        """Write `checkpoint` so that `path` is whole or absent, even after a loss of power.

        Raises:
            OSError: it cannot be written; nothing of it stays.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with written_aside(path) as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch tells where it stood, and not why
                raise error.__context__ from None
            raise


def require_whole(path: Path) -> None:
    """Read all of a checkpoint against the checksums that torch wrote, which loading it does not.

    Raises:
        UserError: it cannot be read, is cut short or has changed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile as error:
        reason = f"is damaged: {error}"
    except OSError as error:
        reason = f"cannot be read: {error.strerror or error}"
    else:
        if damaged is None:
            return
        reason = f"is damaged: {damaged} has another checksum"
    raise UserError(
        f"The checkpoint {path} {reason}; put back what was saved, or remove the file to train the run anew."
    )
