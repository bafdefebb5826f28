"""A network as a folder: `model.safetensors` with the weights and `model.json` with everything else.

The rows of its tables are among the weights, or lie beside them in shards (memory/saved_rows.py).

A memory is worth something only to the tokenizer, canonical map and hash it was trained with: with another,
every row would be read for the wrong n-gram and nothing would crash. The JSON file records all three, and a
digest of everything else that an address depends on; loading refuses what differs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from engram_lab.errors import UserError
from engram_lab.files import make_durable, share_as_folder
from engram_lab.memory.config import MemoryConfig
from engram_lab.memory.export import remove_rows
from engram_lab.memory.saved_rows import INDEX, DenseRows, GivenRows, SavedRows, checked
from engram_lab.memory.serving import serving_table
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.hashing import ADDRESS_FIELDS, HASH_VERSION, table_rows
from engram_lab.model.transformer import Transformer
from engram_lab.plain import from_plain, to_plain

WEIGHTS, RECORD = "model.safetensors", "model.json"
FORMAT = 3
READABLE = (1, 2, 3)
"""Format 1 had no digest of addresses, 2 no checksum of weights: such networks are loaded on trust."""
DAMAGED = "put a whole copy back, or remove the run's folder and train it again"
ROWS_AT_ONCE = 1 << 18
"""Rows read from shards at once."""


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """What `model.json` holds."""

    format: int
    """Version of this layout."""
    network: ModelConfig
    eos_id: int
    tokenizer_hash: str
    """Hash of the tokenizer the ids come from, as the token shards record it."""
    canonical_hash: str | None
    """SHA-256 of the map from token ids to the ids that are hashed, int32; None without a memory."""
    hash_version: int
    """Version of the address function."""
    address_digest: str | None = None
    """SHA-256 of all that decides which row is read for an n-gram; None without a memory."""
    rows_digest: str | None = None
    """SHA-256 of the index of the shards with the tables' rows; None where rows are among the weights."""
    weights_checksum: int | None = None
    """CRC-32 of the file of weights."""

    def digest(self) -> str | None:
        """Return what `address_digest` must be for the other fields."""
        memory = self.network.engram
        if memory is None:
            return None
        parts = {
            "hash_version": self.hash_version,
            "tokenizer": self.tokenizer_hash,
            "canonical_hash": self.canonical_hash,
            "vocab_size": self.network.vocab_size,
            "eos_id": self.eos_id,
            "engram": {name: to_plain(getattr(memory, name)) for name in ADDRESS_FIELDS},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def canonical_hash(canonical: np.ndarray) -> str:
    """Return the hash by which a map of canonical ids is known."""
    return hashlib.sha256(canonical.astype("<i4").tobytes()).hexdigest()


def save(
    network: Transformer,
    folder: str | os.PathLike[str],
    *,
    tokenizer_hash: str,
    rows: Callable[[Path], None] | None = None,
) -> None:
    """Write `network` into `folder`, made if missing; each file appears whole or not at all.

    For tables that are no parameters of it, `rows` exports (memory/export.py) their rows to the folder it is
    given, by the names and in the numbers of `table_sizes`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rows is not None:
            rows(folder)
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in network.state_dict().items()}
        if network.config.tie_embeddings:
            del tensors["head.weight"]
        save_file(tensors, folder / f".{WEIGHTS}.part")
        share_as_folder(folder / f".{WEIGHTS}.part")
        record = CheckpointRecord(
            format=FORMAT,
            network=network.config,
            eos_id=network.eos_id,
            tokenizer_hash=tokenizer_hash,
            canonical_hash=None
            if network.hash is None
            else canonical_hash(network.hash.canonical.cpu().numpy()),
            hash_version=HASH_VERSION,
            rows_digest=None if rows is None else SavedRows(folder).digest,
            weights_checksum=checked(folder / f".{WEIGHTS}.part")[1],
        )
        record = replace(record, address_digest=record.digest())
        (folder / f".{RECORD}.part").write_text(json.dumps(to_plain(record), indent=2) + "\n")
        for name in (WEIGHTS, RECORD):
            make_durable(folder / f".{name}.part")  # checkpoints are removed once this is there
            os.replace(folder / f".{name}.part", folder / name)
        make_durable(folder)
        if rows is None:
            remove_rows(folder)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"The checkpoint {folder} cannot be written: {reason}; mend that, or make room there."
        ) from error


def table_sizes(config: EngramConfig) -> dict[str, int]:
    """Return the number of rows of each memory's table, by the name its weights have in a network."""
    return {f"tables.{memory}.weight": rows for memory, rows in enumerate(table_rows(config))}


def read_record(folder: str | os.PathLike[str]) -> CheckpointRecord:
    """Read what `folder` says about its network, without the weights."""
    path = Path(folder) / RECORD
    try:
        plain = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} is no checkpoint: it holds no {RECORD}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(plain, dict) or plain.get("format") not in READABLE:
        found = plain.get("format") if isinstance(plain, dict) else None
        formats = ", ".join(map(str, READABLE[:-1])) + f" and {READABLE[-1]}"
        raise UserError(
            f"{path} has checkpoint format {found!r}, but this version reads formats {formats} only."
        )
    try:
        return from_plain(CheckpointRecord, plain, RECORD)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except TypeError as error:  # a field that is missing
        raise UserError(f"{path} is damaged: {error}.") from error


def load(
    folder: str | os.PathLike[str],
    *,
    tokenizer_hash: str | None = None,
    canonical: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    tables: MemoryConfig | None = None,
) -> Transformer:
    """Read a network back, in evaluation mode, its weights exactly as saved.

    Give the `tokenizer_hash`, and the `canonical` map, of the text the network is to be used on: UserError
    if they are not those it was trained with, or if the hash has changed since. `tables` on another tier
    than "resident" are only read from there: the network gives the same, and cannot be trained.
    """
    record = read_record(folder)
    memory = record.network.engram
    far = tables is not None and tables.tier != "resident"
    if tables is not None and far and (memory is None or not memory.n_heads):
        raise UserError(
            f"memory.tier is {tables.tier!r}, but the network in {folder} reads no table by n-gram: leave it "
            "out."
        )
    if tokenizer_hash is not None and tokenizer_hash != record.tokenizer_hash:
        raise UserError(
            f"The checkpoint {folder} was trained with tokenizer {record.tokenizer_hash[:12]}, but the text "
            f"comes from {tokenizer_hash[:12]}: use the tokenizer it was trained with."
        )
    if memory is not None and record.hash_version != HASH_VERSION:
        raise UserError(
            f"The checkpoint {folder} was trained with hash version {record.hash_version}, but this is "
            f"version {HASH_VERSION}, which reads other rows: use the version it was trained with."
        )
    if record.format > 1 and record.digest() != record.address_digest:
        raise UserError(
            f"The checkpoint {folder} cannot be used: its {RECORD} was changed in a field that decides which "
            "rows are read (tokenizer, canonical map, vocabulary, eos_id, or of engram "
            f"{', '.join(ADDRESS_FIELDS)}): restore what was saved."
        )
    if memory is not None and memory.canonical and canonical is not None:
        given = canonical_hash(canonical)
        if given != record.canonical_hash:
            raise UserError(
                f"The checkpoint {folder} was trained with canonical map "
                f"{str(record.canonical_hash)[:12]}, but the text has {given[:12]}: use the tokenizer it had."
            )
    tensors = _read_weights(Path(folder), record, str(device), but="tables." if far else None)
    stored = tensors.get("hash.canonical")
    if stored is not None and canonical_hash(stored.cpu().numpy()) != record.canonical_hash:
        raise UserError(f"The checkpoint {folder} is damaged: {RECORD} names another canonical map.")
    shards = None if record.rows_digest is None else _shards(Path(folder), record)
    placed = None
    if tables is not None and memory is not None and far:
        dtype = tensors["embedding.weight"].dtype
        rows = shards or _dense(Path(folder), memory)
        placed = _far_tables(rows, memory, tables, torch.device(device), dtype)
    with torch.device(device):
        network = Transformer(record.network, canonical=stored, eos_id=record.eos_id, tables=placed)
    for name, fresh in network.state_dict().items():
        if name.startswith("hash.") and not torch.equal(fresh, tensors.get(name, fresh)):
            raise UserError(
                f"The checkpoint {folder} cannot be used: its {name} differs from what this version "
                "computes, so that rows would be read for other n-grams."
            )
    network.to(tensors["embedding.weight"].dtype)
    if shards is not None and not far:
        tensors |= _read_tables(network, shards)
    if record.network.tie_embeddings:
        tensors["head.weight"] = tensors["embedding.weight"]
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"The checkpoint {folder} is damaged: its weights do not fit the network in {RECORD}."
        ) from error
    return network.eval()


def _read_weights(
    folder: Path, record: CheckpointRecord, device: str, but: str | None = None
) -> dict[str, Tensor]:
    """Return the tensors of the file of weights, those left out whose names begin with `but`."""
    _require_whole(folder, record)
    with _weights_file(folder / WEIGHTS, device) as file:
        names = [name for name in file.keys() if but is None or not name.startswith(but)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


@contextmanager
def _weights_file(path: Path, device: str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no checkpoint: it holds no {path.name}.") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; {DAMAGED}.") from error


def _require_whole(folder: Path, record: CheckpointRecord) -> None:
    """Read the file of weights once, against its checksum."""
    path = folder / WEIGHTS
    if record.weights_checksum is None or not path.exists():
        return
    try:
        checksum = checked(path)[1]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if checksum != record.weights_checksum:
        raise UserError(f"{path} is damaged: it is not what {RECORD} was saved with; {DAMAGED}.")


def given_rows(folder: Path) -> GivenRows:
    """Return the rows of a saved network's tables, from shards or from among its weights.

    Raises:
        UserError: there is no such network, or it has no table that is read by n-gram.
    """
    if (folder / INDEX).exists():
        return SavedRows(folder)
    record = read_record(folder)
    if record.rows_digest is not None:
        return SavedRows(folder)  # which says what is missing
    if record.network.engram is None or not record.network.engram.n_heads:
        raise UserError(f"'{folder}' holds a network that reads no table by n-gram.")
    _require_whole(folder, record)
    return _dense(folder, record.network.engram)


def _dense(folder: Path, memory: EngramConfig) -> DenseRows:
    return DenseRows(folder / WEIGHTS, table_sizes(memory), memory.row_dim)


def _shards(folder: Path, record: CheckpointRecord) -> SavedRows:
    """Return the tables' rows that lie beside the weights."""
    saved, memory = SavedRows(folder), record.network.engram
    if memory is None or saved.digest != record.rows_digest:
        raise UserError(
            f"The checkpoint {folder} is damaged: its table rows are not those that {RECORD} names; restore "
            "what was saved."
        )
    saved.require(table_sizes(memory), memory.row_dim)
    return saved


@torch.no_grad()
def _read_tables(network: Transformer, shards: SavedRows) -> dict[str, Tensor]:
    """Read the rows into the network's own tables, which are returned by name."""
    tables: dict[str, Tensor] = {name: network.get_parameter(name) for name in shards.tables}
    for name, table in tables.items():
        first = 0
        for part in table.split(ROWS_AT_ONCE):
            part.copy_(shards.weights(name, first, len(part)))
            first += len(part)
    return tables


def _far_tables(
    rows: GivenRows, engram: EngramConfig, memory: MemoryConfig, device: torch.device, dtype: torch.dtype
) -> nn.ModuleList:
    """Return every memory's table, its rows read from where they were saved as they are needed."""
    digest = rows.digest if memory.tier == "disk" else ""
    return nn.ModuleList(
        serving_table(
            partial(rows.weights, name),
            count,
            engram.row_dim,
            storage=engram.row_storage,
            memory=memory,
            fingerprint=f"{digest} {m}",
            device=device,
            dtype=dtype,
        )
        for m, (name, count) in enumerate(rows.tables.items())
    )
