"""What the commands share: how a table of runs is named on the command line, and how results are printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from scaling.errors import ScalingError, nearest


def table_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which `runs` finds its table."""
    parser.add_argument(
        "table",
        metavar="FILE|STORE",
        help="CSV, TSV, JSON or Parquet file, a report's folder, or an MLflow address such as sqlite:///m.db",
    )
    parser.add_argument("--study", metavar="NAME", help="which study of a store or table of several")
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=NAME",
        help="the table's NAME for a documented COLUMN; may be repeated",
    )


def whole(text: str) -> int:
    """Read a whole number from 0 on."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def runs(given: argparse.Namespace) -> Any:
    """Return the table as a checked frame."""
    from scaling.frame import read

    names = _mapping(given.map)
    if not is_store(given.table):
        if given.study is not None:
            return _of_study(read(given.table, names), given.study)
        return read(given.table, names)
    from scaling.mlflow_reader import read_study, studies

    if given.study is None:
        known = ", ".join(map(repr, studies(given.table))) or "no study"
        raise ScalingError(f"--study is needed for an MLflow store; {given.table!r} has {known}.")
    return read(read_study(given.table, given.study), names)


def is_store(address: str) -> bool:
    """Say whether `address` names an MLflow store (`sqlite:///…`, `http://…`), not a file."""
    return "://" in address


def _of_study(frame: Any, study: str) -> Any:
    """Return the rows of one study of a table that holds several."""
    from scaling.frame import need

    need(frame, "study")
    kept = frame.filter(frame["study"] == study)
    if kept.is_empty():
        known = frame["study"].drop_nulls().unique().sort().to_list()
        listed = ", ".join(map(repr, known[:8]))
        raise ScalingError(f"The table has no study {study!r}; it has {listed}.{nearest(study, known)}")
    return kept


def _mapping(pairs: Sequence[str]) -> dict[str, str]:
    names = {}
    for pair in pairs:
        column, equals, name = pair.partition("=")
        if not (column and equals and name):
            raise ScalingError(f"--map {pair!r} is not COLUMN=NAME, such as rho=share.")
        names[column] = name
    return names


def show(given: argparse.Namespace, result: Mapping[str, Any], lines: Sequence[str]) -> None:
    """Print the result as JSON where it was asked for, else the lines."""
    if given.json:
        from scaling.report.plain import plain

        print(json.dumps(plain(result), indent=2, allow_nan=False))
    else:
        print("\n".join(lines))
