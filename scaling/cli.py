"""The command `scaling`: fit a law to a table of runs, plan a sweep, or write a study's report.

Nothing heavy is imported before the arguments are known to be right, and MLflow only for an address that
needs it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scaling.arguments import Parser
from scaling.cli_design import add_design
from scaling.cli_tables import runs, show, table_arguments, whole
from scaling.errors import ScalingError


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of one kind of fit; `name` is the keyword of the function that it is handed to."""

    name: str
    kind: type = str
    help: str
    choices: tuple[str, ...] | None = None


_CONFIDENCE = Option(name="confidence", kind=float, help="confidence of every interval (0.95)")
_CLUSTER = Option(name="cluster", help="column whose values are runs that are not independent")
_SEED = Option(name="seed", kind=int, help="seed of the bootstrap (0)")
_BUDGET = Option(name="budget", kind=float, help="which budget, where the table holds several (FLOPs)")
_NOISE = Option(
    name="noise",
    help="SD of a run: known from loss_sd, or from the residuals (auto)",
    choices=("auto", "residual", "known"),
)
_BLOCKS = Option(name="blocks", help="column whose values share a level; auto takes paired seeds, or none")
_ERROR = Option(
    name="error",
    help="distribution of the scatter of runs (gaussian)",
    choices=("gaussian", "student-t", "huber"),
)
_DELTA = Option(name="delta", kind=float, help="bend of the Huber loss on log loss (0.001)")
_DRAWS = Option(name="draws", kind=int, help="bootstrap draws (1000)")
_DROP = Option(name="drop_largest", kind=int, help="leave out this many of the largest losses (0)")
_BOOTSTRAP = (_DELTA, _DRAWS, _CLUSTER, _CONFIDENCE, _SEED)

KINDS: Mapping[str, tuple[str, str, tuple[Option, ...]]] = {
    "allocation": (
        "fit_allocation",
        "loss against the share rho of sparse parameters in routed experts, at one budget",
        (
            _BUDGET,
            Option(name="floor", kind=float, help="r0 = k/(E_1 - k) where experts and top_k do not tell"),
            *(_NOISE, _BLOCKS, _CLUSTER, _ERROR, _CONFIDENCE, _SEED),
        ),
    ),
    "memory": (
        "fit_memory",
        "loss against memory size, at one budget",
        (
            Option(name="size", help="column of sizes", choices=("slots", "memory_parameters")),
            *(_BUDGET, _NOISE, _BLOCKS, _CLUSTER, _ERROR, _CONFIDENCE),
        ),
    ),
    "joint": (
        "fit_joint",
        "loss against rho at several budgets, and the drift of the best share",
        (
            *(_NOISE, _BLOCKS, _CONFIDENCE),
            Option(name="forecast", kind=float, help="how far beyond the largest budget to forecast (10)"),
        ),
    ),
    "chinchilla": (
        "fit_chinchilla",
        "L = E + A N^-alpha + B D^-beta",
        (Option(name="tied", kind=bool, help="one exponent for N and D"), _DROP, *_BOOTSTRAP),
    ),
    "kaplan": ("fit_kaplan", "Kaplan's law of N and D", (_DROP, *_BOOTSTRAP)),
    "isoflop": (
        "fit_isoflop",
        "valleys of loss against size at each budget, and the power law of their bottoms",
        (Option(name="column", help="column of sizes (total_parameters)"), _CONFIDENCE),
    ),
    "clark": (
        "fit_clark",
        "Clark's law of routed models",
        (Option(name="saturate", kind=bool, help="let the gain of experts saturate (on)"), _CONFIDENCE),
    ),
    "gadre": ("fit_gadre", "Gadre's law of over-training", _BOOTSTRAP),
    "tao": ("fit_tao", "Tao's law of vocabulary size", (_CONFIDENCE,)),
}
"""Name of a law -> the function of `scaling` that fits it, what it is, and the options it takes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, or 2 after one sentence on what is wrong with the data or the options."""
    try:
        given = parser().parse_args(arguments)
    except ScalingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        given.run(given)
    except ScalingError as error:
        print(f"error: {error.in_shell(_options(given))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0


def _options(given: argparse.Namespace) -> dict[str, str]:
    """Return the command's options by the keywords of the functions that they are handed to."""
    named = {name: f"--{name.replace('_', '-')}" for name in vars(given) if name not in ("run", "table")}
    return {**named, "a": "--gain", "candidates": "--rho"}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    top = Parser(prog="scaling", description="Fit scaling laws, and say what a fit cannot say.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    fit = commands.add_parser("fit", help="fit a law to a table of runs")
    laws = fit.add_subparsers(required=True, metavar="LAW", dest="law")
    for name, (_, what, options) in KINDS.items():
        law = laws.add_parser(name, help=what, description=what)
        table_arguments(law)
        law.add_argument("--json", action="store_true", help="print the whole result as JSON")
        for option in options:
            _add(law, option)
        law.set_defaults(run=_fit)
    add_design(commands.add_parser("design", help="plan a sweep, or the next runs of one"))
    report = commands.add_parser("report", help="write a study's report into a folder")
    table_arguments(report)
    report.add_argument("--out", required=True, metavar="DIR", help="the folder; made if it is not there")
    report.add_argument("--title", help="heading of the report (the study's name)")
    report.set_defaults(run=_report)
    columns = commands.add_parser("columns", help="list the columns that a table of runs can have")
    columns.set_defaults(run=_columns)
    return top


def _add(parser: argparse.ArgumentParser, option: Option) -> None:
    flag = f"--{option.name.replace('_', '-')}"
    if option.kind is bool:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=option.help)
        return
    metavar = None if option.choices else option.kind.__name__.upper().replace("STR", "NAME")
    kind = whole if option.kind is int else option.kind
    parser.add_argument(
        flag, type=kind, choices=option.choices, default=None, metavar=metavar, help=option.help
    )


def _fit(given: argparse.Namespace) -> None:
    import scaling

    function, _, options = KINDS[given.law]
    chosen = {option.name: getattr(given, option.name) for option in options}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    result = getattr(scaling, function)(runs(given), **chosen)
    if given.json:
        show(given, result.to_dict(), ())
    else:
        from scaling.report.terminal import to_text

        print(to_text(result))


def _report(given: argparse.Namespace) -> None:
    from scaling.files import check_replaceable, context_of, copy_configurations, report_of
    from scaling.report import write_report

    if not given.out:
        raise ScalingError("--out is empty; the name of a folder is needed.")
    try:
        source, out = report_of(given.table), Path(given.out)
        check_replaceable(out, given.table)
        frame = runs(given)
        path = write_report(frame, out, title=given.title, context=context_of(source))
        copy_configurations(source, out, frame["run"] if "run" in frame.columns else ())
    except OSError as error:
        raise ScalingError(f"--out {given.out!r} cannot be written: {error.strerror or error}.") from error
    print(path)


def _columns(given: argparse.Namespace) -> None:
    from scaling.schema import COLUMNS

    for column in COLUMNS:
        kind = f"{column.kind.__name__}, {column.unit}" if column.unit else column.kind.__name__
        print(f"{column.name:<20} {kind:<20} {column.doc}")


if __name__ == "__main__":
    sys.exit(main())
