"""Files as people have them: separators, marks, packing, spellings, and the words when one is wrong."""

import gzip
import json

import polars as pl
import pytest

from scaling import ScalingError, read

HEADER = ["Model Size", "Training Tokens", "Training FLOP", "loss"]
ROWS = [["1e8", "2e9", "1.2e18", "3.25"], ["2e8", "4e9", "4.8e18", "3.0"]]


def text(separator=","):
    return "\n".join(separator.join(line) for line in [HEADER, *ROWS]) + "\n"


def assert_read(frame):
    assert frame["total_parameters"].to_list() == [1e8, 2e8]
    assert frame["tokens"].to_list() == [2e9, 4e9]
    assert frame["budget"].to_list() == [1.2e18, 4.8e18]
    assert frame["loss"].to_list() == [3.25, 3.0]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".txt", ".tsv"])
def test_the_separator_is_found_whatever_the_file_is_called(tmp_path, separator, suffix):
    path = tmp_path / f"runs{suffix}"
    path.write_text(text(separator))
    assert_read(read(path))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_marks_that_spreadsheets_write_are_taken_off(tmp_path, encoding):
    path = tmp_path / "runs.csv"
    path.write_bytes(text().encode(encoding))
    assert_read(read(path))


def test_packed_files_are_read(tmp_path):
    path = tmp_path / "runs.csv.gz"
    path.write_bytes(gzip.compress(text().encode()))
    assert_read(read(path))


@pytest.mark.parametrize("shape", ["records", "lists", "by row", "lines"])
def test_json_is_read_in_every_common_shape(tmp_path, shape):
    records = [dict(zip(HEADER, map(float, row), strict=True)) for row in ROWS]
    lists = {name: [record[name] for record in records] for name in HEADER}
    by_row = {name: dict(enumerate(values)) for name, values in lists.items()}
    path = tmp_path / ("runs.jsonl" if shape == "lines" else "runs.json")
    if shape == "lines":
        path.write_text("\n".join(map(json.dumps, records)))
    else:
        path.write_text(json.dumps({"records": records, "lists": lists, "by row": by_row}[shape]))
    assert_read(read(path))


@pytest.mark.parametrize("null", ["", "NA", "N/A", "n/a", "-", "nan", "None", " null "])
def test_every_common_spelling_of_nothing_is_nothing(tmp_path, null):
    path = tmp_path / "runs.csv"
    path.write_text(f"rho,loss,seed,control\n0.1,3.0,1,{null}\n0.2,{null},{null},frozen\n")
    frame = read(path)
    assert frame["control"].to_list() == ["", "frozen"]
    assert frame["seed"].to_list() == [1, None]
    assert frame["loss"][0] == 3.0
    assert frame["loss"].fill_nan(None)[1] is None


def test_states_and_no_control_are_known_by_what_stores_call_them():
    state = ["FINISHED", "finished", "Completed", "crashed", "KILLED", "RUNNING", None]
    control = ["None", "none", "False", "frozen", "", None, "0"]
    frame = read({"loss": [1.0] * 7, "status": state, "control": control})
    assert frame["status"].to_list() == [*["finished"] * 3, "failed", "interrupted", "running", None]
    assert frame["control"].to_list() == ["", "", "", "frozen", "", "", ""]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Loss", "loss"),
        ("val_loss", "loss"),
        ("val/loss", "loss"),
        ("Loss (nats)", "loss"),
        ("Training FLOPs [FLOP]", "budget"),
        ("# Parameters", None),
        ("Tokens (B)", None),
        ("loss (bits)", None),
    ],
)
def test_a_unit_in_brackets_is_overlooked_only_where_it_changes_no_number(given, meant):
    frame = read({given: [1.0, 2.0]})
    assert frame.columns == [meant or given]


def test_of_two_spellings_that_differ_neither_is_guessed():
    with pytest.raises(ScalingError, match=r"'flops' and 'compute' can both be 'budget'"):
        read({"flops": [1.0], "compute": [2.0]})
    assert read({"flops": [1.0], "compute": [1.0]})["budget"].to_list() == [1.0]
    assert read({"val_loss": [1.0], "loss": [2.0]})["loss"].to_list() == [2.0]
    assert read({"val_loss": [1.0], "Loss": [2.0]})["loss"].to_list() == [2.0]
    assert read({"flops": [1.0], "compute": [2.0]}, {"budget": "compute"})["budget"].to_list() == [2.0]


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("3,25", "decimal comma; write '3.25'"),
        ("1,000,000", "write '1000000'"),
        ("3,251", "write '3.251' if it is a decimal one, else '3251'"),
        ("80%", "per cent"),
        ("1.5B", "suffix"),
        ("abc", "not a number"),
    ],
)
def test_a_cell_that_is_no_number_is_told_why(cell, words):
    with pytest.raises(ScalingError, match=r"^Row 2, column 'loss': ") as caught:
        read({"loss": ["3.0", cell]})
    assert words in str(caught.value)


def test_only_what_can_be_per_cents_is_taken_for_them():
    for rho, hinted in ([[10, 80], True], [[0.5, 1.2], False], [[0.5, 1.02], False], [[0.5, 2e3], False]):
        with pytest.raises(ScalingError) as caught:
            read({"rho": rho})
        assert ("divide them by 100" in str(caught.value)) == hinted


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.csv", b"", "empty"),
        ("empty.parquet", b"", "PARQUET"),
        ("binary.csv", bytes(range(256)) * 4, "binary"),
        ("latin.csv", "lo\xdf,rho\n1,\xe9\n".encode("latin-1"), "utf-8"),
        ("twice.csv", b"loss,rho,loss\n1,2,3\n", "'loss' occurs 2 times"),
        ("bare.csv", b"0.1,3.2\n0.2,3.1\n", "names of columns are needed"),
        ("ragged.csv", b"loss,rho\n1,2,3\n", "more fields"),
        ("header.csv", b"loss,rho\n", "no rows"),
        ("packed.csv.gz", b"not gzip", "gzip"),
        ("cut.csv.gz", gzip.compress(text().encode(), mtime=0)[:20], "CSV"),
        ("one.json", b'{"loss": 3}', "records"),
        ("bad.json", b"{", "JSON"),
        ("deep.json", b"[" * 100_000, "JSON"),
        ("runs.xlsx", b"PK", "can be read"),
    ],
)
def test_a_file_that_is_no_table_is_told_why_in_one_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScalingError) as caught:
        read(tmp_path / name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_called_one(tmp_path):
    with pytest.raises(ScalingError, match="is a folder"):
        read(tmp_path)


def test_numbers_of_any_size_and_type_are_read_or_refused_by_name(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("run,tokens,loss\n1,99999999999999999999999999999999999999999,3\n")
    with pytest.raises(ScalingError, match="Row 1, column 'tokens'"):
        read(path)
    with pytest.raises(ScalingError, match="'run' holds List"):
        read({"run": [[1]], "loss": [1.0]})
    names = pl.Series(["1", "2"], dtype=pl.Categorical)
    assert read(pl.DataFrame({"loss": names}))["loss"].to_list() == [1.0, 2.0]
