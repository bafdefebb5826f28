"""The one way from a configuration to tokens: found in the cache, or built."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from engram_lab.errors import UserError
from engram_lab.text.build import Progress, build_shards, check_vocabulary
from engram_lab.text.cache import build_once
from engram_lab.text.config import TextConfig
from engram_lab.text.corpora import Source, find_source
from engram_lab.text.shards import FORMAT, RECORD, TokenCorpus, file_sha256
from engram_lab.text.vocabulary import load_tokenizer, size_of


@dataclass(frozen=True, kw_only=True)
class UnreadText:
    """What is known of a text before it is encoded; enough to size networks."""

    vocab_size: int
    data_hash: str = ""
    """Stays empty: the text has not been read."""


def prepare(config: TextConfig, progress: Progress | None = None) -> TokenCorpus:
    """Return the token shards of a configuration, building them if nobody has.

    Shards are found by what the sources hold and by the configuration. Processes that ask at once build once;
    a build that dies leaves nothing behind that the next one would take for finished. A source that is itself
    a folder of shards is opened where it lies: what one machine has built, another uses without the text.

    Args:
        config: What to read and how.
        progress: Told the stage and the share of it that is done. None: silent.

    Raises:
        UserError: input that cannot be used, a cache that cannot be written, or shards that were damaged.
    """
    if (finished := _finished_shards(config)) is not None:
        return finished
    report = progress or (lambda stage, share: None)
    source = find_source(config.sources)
    entry = Path(config.cache_dir).expanduser() / _key(config, source)
    if not entry.exists():
        build_once(
            entry,
            build=lambda folder: build_shards(config, source, folder, report),
            waiting=lambda: report("waiting for another process that builds the same shards", 0.0),
        )
    corpus = TokenCorpus(entry)
    check_vocabulary(config, corpus.vocab_size)
    return corpus


def split_warning(corpus: TokenCorpus) -> str | None:
    """Say so where more text is held out than is left for training, which whole documents may bring about."""
    train, validation = len(corpus.train), len(corpus.validation)
    if validation <= train:
        return None
    held_out, documents = corpus.record.validation_documents, corpus.record.train_documents
    return (
        f"warning: validation takes {validation:,} of the text's {train + validation:,} tokens and leaves "
        f"{train:,} for training, as whole documents are held out ({held_out} of {held_out + documents}): "
        "give more documents (<|endoftext|> divides a .txt file) or a smaller text.validation_fraction."
    )


def look_ahead(config: TextConfig) -> UnreadText:
    """Return the size of the vocabulary that `prepare` would give, reading no document.

    A vocabulary of unstated size that nobody has trained yet is taken at the size it aims at, which the
    documents of a small corpus may not fill.

    Raises:
        UserError: a tokenizer that cannot be read, or that has another size than the one asked for.
    """
    if (finished := _finished_shards(config)) is not None:
        return UnreadText(vocab_size=finished.vocab_size)
    if config.tokenizer is not None:
        found = size_of(load_tokenizer(Path(config.tokenizer).expanduser()))
        check_vocabulary(config, found)
        return UnreadText(vocab_size=found)
    cache = Path(config.cache_dir).expanduser()
    if config.vocab_size is None and cache.is_dir():
        entry = cache / _key(config, find_source(config.sources))
        if entry.exists():
            return UnreadText(vocab_size=TokenCorpus(entry).vocab_size)
    return UnreadText(vocab_size=config.target_vocab_size)


def _finished_shards(config: TextConfig) -> TokenCorpus | None:
    """Return the shards in the folder that `source` names, or None where it names documents.

    Raises:
        UserError: shards of another format, or settings that shards already made cannot follow.
    """
    folder = Path(config.sources[0]).expanduser()
    if len(config.sources) > 1 or not (folder / RECORD).is_file():
        return None
    corpus = TokenCorpus(folder)
    made = f"the shards in {folder} are finished"
    if corpus.record.format != FORMAT:
        raise UserError(f"{made} in format {corpus.record.format}; this version reads {FORMAT}: build anew.")
    if config.tokenizer is not None:
        raise UserError(
            f"tokenizer = {config.tokenizer!r}: {made} with a tokenizer of their own; leave it out."
        )
    if config.validation_fraction != TextConfig.validation_fraction:
        raise UserError(
            f"validation_fraction = {config.validation_fraction}: {made} and split; leave it out."
        )
    if config.vocab_size not in (None, corpus.vocab_size):
        raise UserError(
            f"vocab_size = {config.vocab_size}: {made} with {corpus.vocab_size} ids; "
            "write that or leave it out."
        )
    return corpus


def _key(config: TextConfig, source: Source) -> str:
    """Return the name of the cache entry: a hash of all that decides its content."""
    parts = {
        "format": FORMAT,
        "source": source.digest(),
        "tokenizer": _tokenizer_digest(config),
        "validation_fraction": config.validation_fraction,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _tokenizer_digest(config: TextConfig) -> str:
    if config.tokenizer is None:
        return f"byte-level BPE of {config.target_vocab_size}"
    try:
        return file_sha256(Path(config.tokenizer).expanduser())
    except OSError as error:
        raise UserError(f"tokenizer = {config.tokenizer!r} cannot be read: {error.strerror}.") from error
