"""Documents to token shards: read, split, train the tokenizer, encode, order."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_lab.errors import UserError
from engram_lab.text.canonical import canonical_ids
from engram_lab.text.config import TextConfig
from engram_lab.text.corpora import Document, Source
from engram_lab.text.encode import Spool
from engram_lab.text.shards import (
    CANONICAL,
    FORMAT,
    SHARDS,
    TOKENIZER,
    TRAIN,
    VALIDATION,
    CorpusRecord,
    file_sha256,
    hash_of_data,
)
from engram_lab.text.split import document_hash, split_documents
from engram_lab.text.vocabulary import (
    end_of_text_id,
    load_tokenizer,
    size_of,
    train_tokenizer,
    vocabulary_hash,
)

Progress = Callable[[str, float], None]
"""Called with the name of a stage and the share of it that is done, 0 to 1; never twice at once, but not
always from the thread that asked."""

_VOCABULARY_SAMPLE = 128_000_000
"""Bytes of training text a vocabulary is trained on, the first documents by hash: a fair sample that bounds
time and memory. More of it changes few merges."""


@dataclass(frozen=True)
class Scan:
    """One pass over the documents: what the split needs, and not the text."""

    hashes: np.ndarray
    """uint64 [documents]."""
    sizes: np.ndarray
    """UTF-8 bytes, int64 [documents]; 0 for a document of blanks only."""
    strata: list[str] | None


def build_shards(config: TextConfig, source: Source, folder: Path, progress: Progress) -> None:
    """Write the shards of a source and their record into an empty folder.

    Raises:
        UserError: input that cannot be used; the caller removes the folder.
    """
    given = None if config.tokenizer is None else load_tokenizer(Path(config.tokenizer).expanduser())
    if given is not None:
        check_vocabulary(config, size_of(given))
    before = source.stamps()
    scan = _scan(source, progress)
    try:
        train, validation = _split(scan, config.validation_fraction)
    except UserError as error:
        raise UserError(f"source = {config.source!r}: {error}") from error
    if given is None:
        enough = 1 + int(np.searchsorted(np.cumsum(scan.sizes[train]), _VOCABULARY_SAMPLE))
        texts = _texts(source, train[:enough], len(scan.sizes), progress)
        tokenizer = train_tokenizer(texts, config.target_vocab_size)
        progress("merging pairs", 1.0)
    else:
        tokenizer = given
    vocab_size, eos_id = size_of(tokenizer), end_of_text_id(tokenizer)
    check_vocabulary(config, vocab_size)
    spool = Spool(folder / "spool", np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4"))
    wanted = _mask(np.concatenate([train, validation]), len(scan.sizes))
    spool.write(reported(source.documents(), "encoding", progress), wanted, tokenizer, eos_id)
    if source.stamps() != before:
        raise UserError(f"A file of source = {config.source!r} changed while it was read; run again.")
    progress("ordering", 0.0)
    spool.copy(train, folder / TRAIN)
    spool.copy(validation, folder / VALIDATION)
    spool.remove()
    progress("canonical ids", 0.0)
    canonical = canonical_ids(tokenizer, vocab_size)
    np.save(folder / CANONICAL, canonical)
    (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    sha256 = {name: file_sha256(folder / name) for name in SHARDS}
    tokenizer_hash = vocabulary_hash(tokenizer)
    progress("canonical ids", 1.0)
    CorpusRecord(
        format=FORMAT,
        vocab_size=vocab_size,
        eos_id=eos_id,
        n_canonical=int(canonical.max()) + 1,
        train_documents=len(train),
        validation_documents=len(validation),
        dropped_documents=len(scan.sizes) - len(train) - len(validation),
        train_bytes=int(scan.sizes[train].sum()),
        validation_bytes=int(scan.sizes[validation].sum()),
        data_hash=hash_of_data(sha256, tokenizer_hash, eos_id),
        tokenizer_hash=tokenizer_hash,
        canonical_hash=hashlib.sha256(canonical.astype("<i4").tobytes()).hexdigest(),
        sha256=sha256,
    ).save(folder)


def check_vocabulary(config: TextConfig, found: int) -> None:
    """Compare the ids there are with `vocab_size`, where one was asked for.

    Raises:
        UserError: they differ.
    """
    if config.vocab_size in (None, found):
        return
    if config.tokenizer is not None:
        raise UserError(
            f"vocab_size = {config.vocab_size}: the tokenizer {config.tokenizer} has {found} ids; "
            f"write {found} or leave it out."
        )
    raise UserError(
        f"vocab_size = {config.vocab_size}: the training documents hold repeated pairs for {found} ids only; "
        f"ask for at most {found}, leave it out, or give more text."
    )


def reported(documents: Iterable[Document], stage: str, progress: Progress) -> Iterator[Document]:
    """Pass documents on and report how much of the source has been read, in steps of a hundredth."""
    progress(stage, 0.0)
    last = 0.0
    for document in documents:
        yield document
        if document.read >= last + 0.01:
            last = document.read
            progress(stage, last)
    if last < 1.0:
        progress(stage, 1.0)


def _scan(source: Source, progress: Progress) -> Scan:
    hashes, sizes, strata = array("Q"), array("q"), []
    for document in reported(source.documents(), "reading", progress):
        hashes.append(document_hash(document.text))
        sizes.append(len(document.text.encode("utf-8")) if document.text.strip() else 0)
        if document.stratum:
            strata.append(document.stratum)
    return Scan(np.array(hashes, np.uint64), np.array(sizes, np.int64), strata or None)


def _split(scan: Scan, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    kept = np.flatnonzero(scan.sizes)
    strata = None if scan.strata is None else [scan.strata[i] for i in kept]
    train, validation = split_documents(scan.hashes[kept], fraction, strata)
    return kept[train], kept[validation]


def _mask(documents: np.ndarray, count: int) -> np.ndarray:
    mask = np.zeros(count, dtype=bool)
    mask[documents] = True
    return mask


def _texts(source: Source, train: np.ndarray, count: int, progress: Progress) -> Iterator[str]:
    documents = reported(source.documents(), "counting words", progress)
    for document, wanted in zip(documents, _mask(train, count), strict=False):
        if wanted:
            yield document.text
    progress("merging pairs", 0.0)
