"""Tables a person reads: every rho a line, and the published models near their published sizes."""

from dataclasses import replace

import pytest

from engram_lab.budget import (
    BudgetConfig,
    budget_table,
    bytes_per_token,
    component_table,
    count,
    flops_per_token,
    solve,
    solve_all,
)
from engram_lab.budget.published import PUBLISHED, PUBLISHED_CELLS, published_table
from engram_lab.budget.table import human
from engram_lab.model.config import ModelConfig
from engram_lab.model.engram import EngramConfig
from engram_lab.model.experts import FeedForwardConfig
from engram_lab.model.presets import PAPER

NETWORK = ModelConfig(
    d_model=64, n_layers=4, ffn=FeedForwardConfig(experts=48, expert_hidden=32), engram=EngramConfig()
)


@pytest.mark.parametrize("mode", ["published", "strict"])
def test_one_line_a_rho_with_what_was_solved(mode):
    cells = solve_all(NETWORK, (1.0, 0.7, 0.0), BudgetConfig(mode=mode), sequence_length=128)
    lines = budget_table(cells).splitlines()
    assert len(lines[0].split()) >= 13
    for line, cell in zip(lines[1:4], cells, strict=True):
        values = line.split()
        assert values[0] == f"{cell.rho_nominal:g}"
        assert int(values[2]) == cell.experts
        assert int(values[3].replace(",", "")) == cell.slots
        assert f"{cell.total_mismatch:+.3%}" in values
    assert len({len(line.rstrip()) for line in lines[:4]}) <= 2  # columns line up
    assert any(line.startswith(mode) for line in lines[4:])
    assert "token embedding" in lines[-2]


def test_differences_say_what_they_leave_out():
    """In `published` mode totals differ by the projections, and in `strict` mode FLOPs by the router's."""

    def headings(mode):
        cells = solve_all(NETWORK, (1.0, 0.7), BudgetConfig(mode=mode), sequence_length=128)
        return [name.strip() for name in budget_table(cells).splitlines()[0].split("  ") if name]

    published, strict = headings("published"), headings("strict")
    assert "Δ total less projections" in published
    assert "Δ FLOPs" in published
    assert "Δ total" in strict
    assert "Δ FLOPs less router" in strict


def test_an_mlp_has_nothing_left_out_of_its_total():
    network = replace(NETWORK, engram=EngramConfig(module="mlp"))
    cells = solve_all(network, (1.0, 0.7), BudgetConfig(mode="published"), sequence_length=128)
    assert "less" not in budget_table(cells).splitlines()[0]
    assert abs(cells[1].total_parameters / cells[0].total_parameters - 1 - cells[1].total_mismatch) < 1e-12


def test_components_add_up():
    table = component_table(NETWORK, sequence_length=128)
    body, notes = table.split("\n\n")
    lines = {line.rsplit(maxsplit=4)[0]: line.rsplit(maxsplit=4)[1:] for line in body.splitlines()[1:]}
    values = {name: [int(value.replace(",", "")) for value in line] for name, line in lines.items()}
    everything = values.pop("all")
    assert [sum(column) for column in zip(*values.values(), strict=True)] == everything
    assert all(backward == 2 * forward for _, forward, backward, _ in values.values())
    assert everything[1] + everything[2] == flops_per_token(NETWORK, 128).training
    parameters = count(NETWORK)
    assert everything[0] == parameters.everything
    assert values["experts inactive"][0] == parameters.experts_inactive
    assert values["memory rows active"] == [parameters.rows_active, 0, 0, bytes_per_token(NETWORK.engram)]
    assert f"total {parameters.total:,}, active {parameters.active:,}" in notes


def test_tables_on_top_have_names_and_no_difference():
    cells = [
        solve(replace(NETWORK, engram=memory), BudgetConfig(), sequence_length=128)
        for memory in (None, EngramConfig(rows_per_head=512))
    ]
    lines = budget_table(cells, ("no table", "table 512")).splitlines()
    assert [line[:9] for line in lines[:3]] == ["cell     ", "no table ", "table 512"]
    assert "+0.00" not in "".join(lines[:3])
    assert any("totals differ by design" in line for line in lines[3:])
    assert not any(line.startswith("published") for line in lines[3:])


def test_a_tiny_table_of_unequal_heads_is_warned_of():
    small = replace(NETWORK, engram=EngramConfig(heads=8, row_dim=64))
    tables = {
        rho: budget_table([solve(small, BudgetConfig(rho=rho, mode="strict"), sequence_length=128)])
        for rho in (0.8, 0.0)
    }
    memory = solve(small, BudgetConfig(rho=0.8, mode="strict")).network.engram
    least, most = memory.rows_by_order
    assert least < 0.75 * most
    assert f"warning: at rho 0.8 heads have from {least} to {most} rows" in tables[0.8]
    assert "warning" not in tables[0.0]


def test_cells_that_strict_mode_cannot_hold_are_warned_of():
    def warning(**memory):
        network = replace(NETWORK, streams=4, engram=EngramConfig(heads=4, **memory))
        cells = solve_all(network, (1.0, 0.8, 0.0), BudgetConfig(mode="strict"), sequence_length=128)
        return [line for line in budget_table(cells).splitlines() if line.startswith("warning")]

    assert warning() == []
    (line,) = warning(module="per_layer")  # one set of parameters works on four streams
    assert line.startswith("warning: at rho 0.8, 0 no size of the memory (per_layer)")
    (line,) = warning(module="mlp")
    assert "(mlp)" in line


def test_numbers_for_people():
    assert [human(n) for n in (0, 999, 1_283_000, 5_792_338_560)] == ["0", "999", "1.283 M", "5.792 B"]


def printed(number, digits):
    """`number` in billions as a paper prints it."""
    return f"{number / 1e9:.{digits}f}"


@pytest.mark.parametrize("name", ["Dense-4B", "MoE-27B", "Engram-27B", "Engram-40B"])
def test_the_large_models_have_every_published_digit(name):
    model = PUBLISHED[name]
    assert printed(model.counted_total, 1) == printed(model.total, 1)
    assert printed(model.counted_active, 1) == printed(model.active, 1)


@pytest.mark.parametrize("name", ["sweep 5.7B", "sweep 9.9B", "memory sweep 3B"])
def test_the_sweeps_backbones_have_their_published_sizes(name):
    """Their shapes were not published, so that they agree to a per cent rather than to the digit."""
    model = PUBLISHED[name]
    assert printed(model.counted_total, 1) == printed(model.total, 1)
    assert model.counted_active == pytest.approx(model.active, rel=1e-2)
    assert model.counted_total == count(model.network).total


def test_one_expert_width_alone_fits_the_published_difference_of_total_and_active():
    """Total less active is the inactive experts and the embedding: to half a printed digit each, 1,536."""
    network = PUBLISHED["MoE-27B"].network
    per_unit = 29 * (72 - 6) * 3 * network.d_model
    inactive = 26.7e9 - 3.8e9 - network.vocab_size * network.d_model
    fitting = [w for w in range(16, 4096, 16) if abs(w * per_unit - inactive) <= 0.1e9]
    assert fitting == [network.ffn.expert_hidden] == [1536]


@pytest.mark.parametrize("cell", PUBLISHED_CELLS, ids=lambda cell: f"{cell.model} {cell.rho:g}")
def test_published_allocations_come_out_of_the_solver(cell):
    solved = cell.solve()
    assert solved.experts == cell.experts
    if cell.memory is not None:
        assert printed(solved.memory_parameters, 2) == printed(cell.memory, 2)


def test_the_published_memory_is_the_nearest_multiple_of_half_the_vocabulary():
    """The solved tables are those of the preset, to the row; without the step they would be 0.4 % larger."""
    moe = replace(PUBLISHED["MoE-27B"].network, engram=PAPER.engram)
    step = moe.vocab_size // 2
    assert 2_262_400 % step == 7_239_680 % step == 0
    cell = solve(moe, BudgetConfig(rho=0.743, rows_step=step), sequence_length=4096)
    assert cell.network == PUBLISHED["Engram-27B"].network
    assert cell.memory_parameters == 5_792_338_560
    exact = solve(moe, BudgetConfig(rho=0.743), sequence_length=4096)
    assert exact.memory_parameters == pytest.approx(5.817e9, rel=1e-4)
    assert abs(exact.total_mismatch) < 1e-5


def test_the_published_table_names_every_model_and_allocation():
    table = published_table()
    assert all(name in table for name in PUBLISHED)
    assert "5.79 B" in table
    assert {"55", "46", "43"} <= set(table.split())
