"""Which text a run reads, how it is cut into tokens, and where the result is kept."""

from __future__ import annotations

from dataclasses import dataclass

from engram_lab.errors import UserError

SOTU = "sotu"
"""The name of the corpus that comes with the package; a file of that name is reached as "./sotu"."""

SMALLEST_VOCABULARY = 257
"""256 bytes and the end-of-text token: what a byte-level vocabulary cannot do without."""


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Documents in, token shards out: everything that decides which token follows which.

    Raises:
        UserError: a value outside its range; nothing is read yet.
    """

    source: str | tuple[str, ...] = SOTU
    """"sotu" (the State of the Union addresses, in the package), or one or several files or folders: .txt
    (one document a file, or several with <|endoftext|> between them), .jsonl, .jsonl.gz, .jsonl.xz,
    .jsonl.zst (one a line) or .parquet (one a row). Or one folder of finished shards, taken from `cache_dir`
    here or on another machine: it is opened as it is, and the text itself is not needed."""
    tokenizer: str | None = None
    """Path of a tokenizer.json. None trains a byte-level BPE on the training documents."""
    vocab_size: int | None = None
    """How many ids, the end-of-text token included. None: 8,192 for sotu (whose 2 M tokens could not train
    more embeddings), else 16,384, or fewer where the documents do not hold so many repeated pairs. With
    `tokenizer` it is only checked."""
    validation_fraction: float = 0.05
    """Share of the documents held out, chosen by the hash of their text; 0 for text that is measured and not
    trained on."""
    cache_dir: str = ".cache/engram_lab/text"
    """Where finished shards are kept; they are found again by content, wherever the sources lie."""

    def __post_init__(self) -> None:
        if not self.source or not all(self.sources):
            raise UserError(f"source = {self.source!r}: name at least one file or folder, or {SOTU!r}.")
        if self.vocab_size is not None and self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(
                f"vocab_size = {self.vocab_size}: a byte-level vocabulary has at least {SMALLEST_VOCABULARY} "
                "ids (256 bytes and the end-of-text token)."
            )
        if not 0.0 <= self.validation_fraction < 1.0:
            raise UserError(
                f"validation_fraction = {self.validation_fraction!r}: it is a share of the documents, "
                "0 or more and below 1, such as 0.05."
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """`source` as a tuple, whichever way it was written."""
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)

    @property
    def target_vocab_size(self) -> int:
        """The size a trained vocabulary aims at."""
        if self.vocab_size is not None:
            return self.vocab_size
        return 8192 if self.sources == (SOTU,) else 16384
