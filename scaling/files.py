"""From a file to a frame as it stands there: CSV by any separator, JSON records, Parquet, packed or not."""

from __future__ import annotations

import csv
import gzip
import io
import json
import shutil
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import polars as pl

from scaling.errors import ScalingError
from scaling.schema import NULLS

RUNS, RUNS_AS_TEXT, CONTEXT = "runs.parquet", "runs.csv", "context.json"
"""What a report's folder keeps of its runs, twice, and of what they do not say."""
CONFIGURATIONS = "configurations"
"""The folder in it that holds what made each run, `<run>.yaml`, where a study wrote the report."""
SEPARATORS = (",", ";", "\t", "|")
_SPELLINGS = sorted({spelt for null in NULLS for spelt in (null, null.upper(), null.title(), "N/a", "NaN")})


def load(path: Path) -> pl.DataFrame:
    """Read a table; the columns have the names and types that the file gives them.

    `.csv`, `.tsv`, `.txt` (the separator is found in the header), `.json` (records, or a mapping of columns),
    `.jsonl`, `.parquet` and `.pq`; all but Parquet may be packed by gzip. The folder of a report stands for
    the runs it was made from. Raises `ScalingError`.
    """
    if (path / RUNS).is_file():
        path = path / RUNS
    if not path.is_file():
        what = f"is a folder without {RUNS}" if path.is_dir() else "does not exist"
        raise ScalingError(f"File {str(path)!r} {what}; a CSV, JSON or Parquet file is needed.")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if packed else suffixes)[-1:] or [""]
    readers: dict[str, Callable[[io.BytesIO], pl.DataFrame]] = {
        ".csv": _delimited,
        ".tsv": _delimited,
        ".txt": _delimited,
        ".json": _json,
        ".jsonl": pl.read_ndjson,
        ".ndjson": pl.read_ndjson,
        ".parquet": pl.read_parquet,
        ".pq": pl.read_parquet,
    }
    if kind[0] not in readers:
        known = ", ".join(readers)
        raise ScalingError(f"File {path.name!r} ends in {path.suffix!r}; {known} can be read.")
    try:
        content = path.read_bytes()
        if packed:
            content = gzip.decompress(content)
        return readers[kind[0]](io.BytesIO(content))
    except (pl.exceptions.PolarsError, OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise ScalingError(
            f"File {path.name!r} cannot be read as {kind[0][1:].upper()}: {why.strip().rstrip('.:')}."
        ) from error


def report_of(table: str) -> Path:
    """Return the folder of the report that `table` names, by itself or by one of its two files of runs.

    Any other table stands for itself.
    """
    path = Path(table)
    return path.parent if path.name in (RUNS, RUNS_AS_TEXT) and path.is_file() else path


def context_of(folder: Path) -> dict[str, object]:
    """Return what was known beside the runs of the report in `folder`; nothing where there is none.

    Raises `ScalingError` when the file is damaged.
    """
    file = folder / CONTEXT
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ScalingError(f"File {str(file)!r} cannot be read as JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ScalingError(f"File {str(file)!r} holds a {type(found).__name__}; a mapping is needed.")
    return found


def check_replaceable(folder: Path, table: str) -> None:
    """Raise `ScalingError` where a report of `table` would replace one in `folder` that holds more."""
    source = report_of(table)
    lost = ["context"] if context_of(folder) and not context_of(source) else []
    if _configurations(folder) and not _configurations(source):
        lost.append(CONFIGURATIONS)
    if lost:
        raise ScalingError(
            f"--out is {str(folder)!r}, which holds a report with {' and '.join(lost)} that {table!r} "
            "does not have; name another folder, or remove that report first."
        )


def copy_configurations(source: Path, folder: Path, runs: Iterable[object]) -> None:
    """Let the report in `folder` keep what the one in `source` knows of how `runs` were made."""
    found = _configurations(source)
    if not found or source.resolve() == folder.resolve():
        return
    kept = folder / CONFIGURATIONS
    kept.mkdir(exist_ok=True)
    for old in _configurations(folder):
        old.unlink()
    names = {f"{run}.yaml" for run in runs}
    for file in found:
        if file.name in names:
            shutil.copyfile(file, kept / file.name)


def _configurations(folder: Path) -> list[Path]:
    return sorted((folder / CONFIGURATIONS).glob("*.yaml"))


def _delimited(file: io.BytesIO) -> pl.DataFrame:
    """Read delimited text: UTF-8 with or without a byte order mark, or UTF-16 with one."""
    content = file.getvalue()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        content = content.decode("utf-16").encode()
    content = content.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in content:
        raise ValueError("it is binary, not text")
    if not content.strip():
        raise ValueError("it is empty")
    header = next(iter(content.lstrip().splitlines())).decode("utf-8", errors="replace")
    separator = max(SEPARATORS, key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=separator))]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"column {twice[0]!r} occurs {names.count(twice[0])} times; names must differ")
    if all(map(_number, names)):
        raise ValueError(
            f"its first line, {header.strip()[:60]!r}, holds numbers; names of columns are needed"
        )
    try:
        frame = pl.read_csv(content, separator=separator, infer_schema_length=None, null_values=_SPELLINGS)
    except pl.exceptions.ComputeError as error:
        if "could not parse" not in str(error):
            raise
        # a whole number beyond 128 bits: as text, which `frame.read` turns into numbers
        frame = pl.read_csv(content, separator=separator, infer_schema=False, null_values=_SPELLINGS)
    return frame.rename(lambda name: name.strip())


def _json(file: io.BytesIO) -> pl.DataFrame:
    """Read a list of records, or a mapping of columns to lists or to mappings by row (pandas' default)."""
    held = json.load(file)
    if isinstance(held, list) and held and all(isinstance(record, dict) for record in held):
        return pl.from_dicts(held, infer_schema_length=None, strict=False)
    if isinstance(held, dict) and held:
        columns = {
            name: list(column.values()) if isinstance(column, dict) else column
            for name, column in held.items()
        }
        lengths = {len(column) if isinstance(column, list) else -1 for column in columns.values()}
        if len(lengths) == 1 and -1 not in lengths:
            return pl.DataFrame(columns, strict=False)
    raise ValueError("a list of records, one for each run, is needed")


def _number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
