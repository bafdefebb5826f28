from __future__ import annotations

import itertools

import pytest
import torch

from engram_lab.errors import UserError
from engram_lab.memory.layout import RecordLayout
from engram_lab.memory.resident import round_rows, stored_bytes

ROWS_ONLY = [
    {"weights": weights, "rule": None} for weights in ("float32", "bfloat16", "float8", "float8_row")
]
TRAINED = [
    {"weights": weights, "rule": rule, "state": state}
    for weights, rule, state in itertools.product(
        ("float32", "bfloat16"), ("adam", "adagrad", "sinkhorn"), ("float32", "bfloat16")
    )
]


def layouts() -> list[RecordLayout]:
    return [
        RecordLayout(row_dim=row_dim, alignment=alignment, **kind)
        for kind in ROWS_ONLY + TRAINED
        for row_dim, alignment in ((1, 4), (7, 16), (33, 64), (64, 16))
    ]


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_fields_are_views_that_share_no_byte(layout: RecordLayout) -> None:
    """Filling each field with ones, through its bytes, changes exactly its own bytes, once each."""
    records = torch.zeros(5, layout.record_bytes, dtype=torch.uint8)
    total = 0
    for field in layout.fields(records).values():
        before = records.clone()
        field.view(torch.uint8).fill_(255)
        changed = records != before
        assert (before[changed] == 0).all()
        assert changed.sum() == field.numel() * field.element_size()
        total += int(changed.sum())
    assert (records == 255).sum() == total
    assert layout.record_bytes % layout.alignment == 0
    # Nothing but alignment is wasted.
    assert layout.record_bytes - total // 5 < layout.alignment + 4


@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_encode_then_decode_is_the_rounding_of_the_resident_table(layout: RecordLayout) -> None:
    weights = torch.randn(6, layout.row_dim, generator=torch.Generator().manual_seed(1)) * 0.02
    weights[0] = 0
    records = torch.full((6, layout.record_bytes), 255, dtype=torch.uint8)
    layout.encode(weights, records)
    stored = weights if layout.weights == "float32" else round_rows(weights, layout.weights)
    assert torch.equal(layout.decode(records), stored)
    state = {k: v for k, v in layout.fields(records).items() if k not in ("weight", "codes", "scales")}
    assert all((field.float() == 0).all() for field in state.values())


def test_bytes_of_known_layouts() -> None:
    """Memory per row as stated in the documentation, without alignment."""
    bytes_of = lambda **kind: RecordLayout(row_dim=64, alignment=4, **kind).record_bytes  # noqa: E731
    assert bytes_of(weights="float32", rule="adam") == 3 * 256 + 4
    assert bytes_of(weights="bfloat16", rule="adam", state="bfloat16") == 3 * 128 + 4
    assert bytes_of(weights="bfloat16", rule="adagrad") == 128 + 4
    assert bytes_of(weights="float32", rule="sinkhorn") == 2 * 256 + 4
    for weights in ("float32", "bfloat16", "float8"):
        assert bytes_of(weights=weights, rule=None) == -(-stored_bytes(64, weights) // 4) * 4


def test_every_value_is_part_of_the_description() -> None:
    descriptions = [layout.describe() for layout in layouts()]
    assert all(a != b for a, b in itertools.combinations(descriptions, 2))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"row_dim": 0}, "row_dim is 0"),
        ({"weights": "bfloat"}, "bfloat16"),
        ({"rule": "adamw"}, "'adam'"),
        ({"state": "float8"}, "one of float32, bfloat16"),
        ({"alignment": 24}, "power of two"),
        ({"alignment": 2}, "power of two"),
        ({"weights": "float8", "rule": "adam"}, "cannot be trained"),
    ],
)
def test_wrong_values_are_named(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        RecordLayout(**{"row_dim": 8, **wrong})  # type: ignore[arg-type]
