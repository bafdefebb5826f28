from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engram_lab.errors import UserError
from engram_lab.training.data import DataConfig, EngramDataModule, never_empty


def corpus(train: int = 10_000, validation: int = 1_000) -> Any:
    return SimpleNamespace(
        train=np.arange(train, dtype=np.uint16), validation=np.arange(validation, dtype=np.uint16)
    )


def module(config: DataConfig, *, rank: int = 0, world: int = 1, accumulate: int = 1, seed: int = 0) -> Any:
    data = EngramDataModule(config, corpus(), None, seed=seed)
    data.trainer = SimpleNamespace(
        world_size=world, global_rank=rank, accumulate_grad_batches=accumulate, global_step=0
    )  # type: ignore[assignment]
    return data


CONFIG = DataConfig(sequence_length=10, batch_size=8, tokens=8_000)


def batches(data: Any) -> list[torch.Tensor]:
    return [batch["ids"] for batch in data.train_dataloader()]


def test_no_token_is_read_twice_and_targets_are_the_next_tokens() -> None:
    data = module(CONFIG)
    seen = torch.cat([b.flatten() for b in batches(data)])
    assert len(seen) == 8_000 == len(seen.unique())
    for batch in data.train_dataloader():
        assert torch.equal(batch["targets"], batch["ids"] + 1)


def test_order_depends_on_the_seed_alone() -> None:
    first, again, other = (batches(module(CONFIG, seed=s)) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize(("world", "accumulate"), [(2, 1), (4, 1), (1, 4), (2, 2)])
def test_devices_and_micro_batches_cut_the_same_global_batches(world: int, accumulate: int) -> None:
    whole = batches(module(CONFIG))
    ranks = [batches(module(CONFIG, rank=r, world=world, accumulate=accumulate)) for r in range(world)]
    for step, batch in enumerate(whole):
        micro = range(step * accumulate, (step + 1) * accumulate)
        pieces = torch.cat([ranks[r][m] for m in micro for r in range(world)])
        assert torch.equal(pieces, batch)


def test_loader_continues_behind_what_was_trained_on() -> None:
    data = module(CONFIG, accumulate=2)
    whole = batches(data)
    data.trainer.global_step = 5
    state = data.train_dataloader().state_dict()
    loader = data.train_dataloader()
    loader.load_state_dict(state)
    assert len(loader) == len(whole) == 200
    rest = [batch["ids"] for batch in loader]
    assert len(rest) == 190
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[10:], strict=True))


def test_more_tokens_than_the_corpus_is_an_error_that_says_how_many_there_are() -> None:
    with pytest.raises(UserError, match=r"holds 10,000 training tokens.*9,920.*data\.repeat"):
        EngramDataModule(DataConfig(sequence_length=10, batch_size=8, tokens=20_000), corpus(), None, seed=0)


def test_repetition_goes_over_the_corpus_once_more_in_another_order() -> None:
    config = DataConfig(sequence_length=10, batch_size=9, tokens=19_980, repeat=True)
    starts = EngramDataModule(config, corpus(), None, seed=0).training_starts()
    first, second = starts[:999], starts[999:1998]
    assert set(first) == set(second)
    assert not np.array_equal(first, second)


def test_validation_windows_are_spread_evenly_and_never_overlap() -> None:
    config = DataConfig(sequence_length=10, batch_size=8, tokens=8_000, validation_tokens=330)
    starts = EngramDataModule(config, corpus(), None, seed=0).validation_starts()
    assert len(starts) == 32
    gaps = np.diff(starts)
    assert gaps.min() >= 10
    assert gaps.max() - gaps.min() <= 10
    assert starts[-1] + 10 < 1_000


def test_a_window_longer_than_the_corpus_is_refused() -> None:
    with pytest.raises(UserError, match="longer than the corpus"):
        EngramDataModule(
            DataConfig(sequence_length=2_000, batch_size=1, tokens=2_000), corpus(), None, seed=0
        )


def test_a_rank_without_windows_computes_one_that_counts_for_nothing() -> None:
    shapes = {"ids": (4, 5), "addresses": (2, 4, 5, 3)}
    full = {name: torch.ones(shape) for name, shape in shapes.items()}
    assert never_empty(full) is full
    empty = {"ids": full["ids"][:0], "addresses": full["addresses"][:, :0]}
    one = never_empty(empty)
    assert {name: tuple(values.shape) for name, values in one.items()} == {
        "ids": (1, 5),
        "addresses": (2, 1, 5, 3),
    }
    assert not any(values.any() for values in one.values())
