"""A run's directory as training leaves it, with a small network that was never trained."""

import dataclasses
from pathlib import Path

import torch
from tokenizers import Tokenizer

from engram_lab.model.attention import AttentionConfig
from engram_lab.model.checkpoint import save
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.initialise import initialise
from engram_lab.model.transformer import Transformer
from engram_lab.text.vocabulary import end_of_text_id, size_of, train_tokenizer, vocabulary_hash

TWO_HEADS = AttentionConfig(n_heads=2)


def save_run(
    directory: Path, *, memory: bool = True, attention: AttentionConfig = TWO_HEADS
) -> tuple[Transformer, Tokenizer]:
    """Write `directory`/model with network and tokenizer."""
    tokenizer = train_tokenizer(["the cat sat on the mat – 東京 🙂, the cat"] * 3, 300)
    config = ModelConfig(
        vocab_size=size_of(tokenizer),
        d_model=16,
        n_layers=2,
        attention=attention,
        ffn=FeedForwardConfig(experts=4, top_k=2, expert_hidden=8),
        engram=EngramConfig(layers=(1,), heads=2, row_dim=4, rows_per_head=31),
    )
    if not memory:
        config = dataclasses.replace(config, engram=None)
    network = Transformer(
        config, canonical=torch.arange(config.vocab_size, dtype=torch.int32), eos_id=end_of_text_id(tokenizer)
    )
    initialise(network, 0)
    with torch.no_grad():
        network.head.weight.mul_(20)
        for table in network.tables:
            table.weight.mul_(20)
    save(network, directory / "model", tokenizer_hash=vocabulary_hash(tokenizer))
    tokenizer.save(str(directory / "model" / "tokenizer.json"))
    return network.eval(), tokenizer
