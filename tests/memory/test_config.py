from __future__ import annotations

import pytest

from engram_lab.errors import UserError
from engram_lab.memory.config import MemoryConfig


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"tier": "hots"}, "memory.tier is 'hots'; .* Did you mean 'host'?"),
        ({"rows": "float8", "tier": "host"}, "memory.rows is 'float8'; it must be one of float32, bfloat16"),
        ({"state": "bf16", "tier": "host"}, "memory.state is 'bf16'"),
        ({"depth": 0}, "memory.depth is 0"),
        ({"threads": 0}, "memory.threads is 0"),
        ({"cache_rows": -1}, "memory.cache_rows is -1"),
        ({"directory": "tables"}, "memory.directory is .tables., but memory.tier is resident"),
        ({"rows": "bfloat16"}, "memory.rows is 'bfloat16', but a resident table trains as one float32"),
        ({"initial_rows": "saved"}, "memory.initial_rows is 'saved', but a resident table trains as one"),
        ({"state": "bfloat16"}, "set memory.unique_rows to true"),
    ],
)
def test_what_is_wrong_is_named(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        MemoryConfig(**wrong)  # type: ignore[arg-type]


def test_rows_move_as_records_unless_the_table_is_one_parameter() -> None:
    assert not MemoryConfig().by_record
    assert MemoryConfig(unique_rows=True, rows="bfloat16", state="bfloat16").by_record
    assert MemoryConfig(tier="disk", directory="tables").by_record
    assert MemoryConfig(tier="sharded", state="bfloat16").by_record
