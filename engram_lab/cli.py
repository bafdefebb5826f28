"""The command line: thin doors to the rooms; heavy imports happen behind the door that is opened."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from engram_lab.arguments import CommandParser, real, whole
from engram_lab.errors import UserError
from engram_lab.processes import check_processes, process_rank

DEFAULT_URI = "sqlite:///mlruns/mlflow.db"
LARGEST_SEED = 2**63 - 1
"""The last that torch takes."""
MOST_ROWS = 2**31 - 1
"""A cache study numbers rows in 32 bits."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `engram-lab`; returns the exit status.

    That is 2 for a user's mistake, 130 after Ctrl-C and 143 after SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["run"] and len(arguments) > 1 and arguments[1] not in ("-h", "--help"):
            from engram_lab.launcher import launch

            return launch(arguments[1:])
        if arguments[:1] == ["budget"] and arguments[1:] not in ([], ["-h"], ["--help"]):
            check_processes()
            from engram_lab.commands import budget

            budget(arguments[1:])
            return 0
        parsed = _parser().parse_args(arguments)
        check_processes()
        return int(parsed.call(parsed) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        from engram_lab.tracking.signals import stopped_by

        print("\ninterrupted; the same command continues where this stopped", file=sys.stderr)
        return 128 + stopped_by(stop)
    except BrokenPipeError:
        sys.stderr.close()
        return 1


def run_recipe(arguments: Sequence[str]) -> int:
    """Run the recipe file `arguments[0]` with the overrides that follow, as LightningCLI spells them."""
    from engram_lab.commands import run

    try:
        with _first_process_speaks():
            return run(Path(arguments[0]), list(arguments[1:]))
    except OSError as error:
        # Whatever file it was: those that matter most have sentences of their own.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"A file of the run cannot be written: {error.strerror}; make room, then the same command goes "
            "on from the last checkpoint."
        ) from error


@contextlib.contextmanager
def _first_process_speaks() -> Iterator[None]:
    """Drop standard output in all processes of a run but the first; what goes wrong is still told by each.

    The Trainer starts the others by repeating the command line: they would say everything again.
    """
    if process_rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        from engram_lab.tracking.version import release

        print(release())
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="engram-lab",
        description="Allocation studies for sparse language models: experts against memory.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        help="train a model or run a study, by the recipe's kind",
        usage="engram-lab run RECIPE [--field.name=value ...] [--workers N] [--dry-run] [--print_config]",
        description="`engram-lab run RECIPE --help` lists every field of a recipe.",
    )
    run.add_argument("recipe")
    run.set_defaults(call=lambda parsed: run_recipe([parsed.recipe]))

    budget = commands.add_parser(
        "budget",
        help="print how a recipe's parameters are divided at every rho, before anything is spent",
        usage="engram-lab budget RECIPE [--field.name=value ...] [--components]\n"
        "       engram-lab budget --published",
        description="Reads no document: the size of the vocabulary is enough.",
    )
    budget.add_argument("recipe")
    budget.add_argument("--components", action="store_true", help="take each network apart, too")
    budget.add_argument("--published", action="store_true", help="count the published models instead")

    runs = commands.add_parser("runs", help="list every run, in a study or on its own, and its loss")
    runs.add_argument("--directory", type=Path, default=Path("mlruns"), help="default: mlruns")
    runs.set_defaults(call=_runs)

    study = commands.add_parser("study", help="look at a study, or extend it").add_subparsers(
        required=True, metavar="COMMAND"
    )
    status = study.add_parser(
        "status", help="which cells are finished, running, interrupted, waiting, failed"
    )
    status.add_argument("study")
    status.add_argument("--directory", type=Path, default=Path("mlruns"), help="default: mlruns")
    status.set_defaults(call=_status)

    extend = study.add_parser("extend", help="add the cells that would narrow the best share's interval most")
    extend.add_argument("study")
    extend.add_argument("--count", type=whole(1), default=2, help="at how many shares; default: 2")
    extend.add_argument("--cells", nargs="+", default=[], metavar="RHO:SEED", help="add these instead")
    extend.add_argument("--directory", type=Path, default=Path("mlruns"), help="default: mlruns")
    extend.set_defaults(call=_extend)

    report = commands.add_parser("report", help="write the report of a study from what is recorded")
    report.add_argument("study")
    report.add_argument("--out", type=Path, default=Path("reports"), help="folder for the report's folder")
    report.add_argument("--directory", type=Path, default=Path("mlruns"), help="default: mlruns")
    report.set_defaults(call=_report)

    generate = commands.add_parser("generate", help="let a trained network continue a text")
    generate.add_argument(
        "checkpoint", type=Path, help="a run's directory, the model folder in it, or the run's 16 digits"
    )
    generate.add_argument("text", help="what the document begins with")
    generate.add_argument(
        "--tokens", type=whole(1), default=128, help="at most this many new ones; default: 128"
    )
    generate.add_argument(
        "--temperature", type=real(least=0), default=1.0, help="0 takes the likeliest; default: 1, as trained"
    )
    generate.add_argument("--top-k", type=whole(1), help="draw among this many likeliest tokens")
    generate.add_argument(
        "--top-p", type=real(above=0, most=1), help="draw among the likeliest with this much probability"
    )
    generate.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0, help="default: 0")
    generate.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    generate.add_argument(
        "--memory",
        choices=("resident", "host", "disk"),
        default="resident",
        help="where table rows are read from; disk writes a file beside the weights, once; default: resident",
    )
    generate.add_argument(
        "--hot-rows",
        type=whole(1),
        metavar="N",
        help="with --memory host: keep N rows of each table on the GPU",
    )
    generate.add_argument(
        "--hot-text", type=Path, metavar="FILE", help="those that this text reads most; needed by --hot-rows"
    )
    generate.set_defaults(call=_generate)

    inspect = commands.add_parser(
        "inspect", help="show what the memory does on a text: gates, LogitLens, switched off"
    )
    inspect.add_argument(
        "checkpoint", type=Path, help="a run's directory, the model folder in it, or the run's 16 digits"
    )
    inspect.add_argument("--text", required=True, help="what the document begins with")
    inspect.add_argument("--out", type=Path, help="write it as an HTML page too")
    inspect.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
    inspect.set_defaults(call=_inspect)

    caching = commands.add_parser(
        "cache-curve",
        help="how well a cache of rows would serve a text: hit rate and bandwidth against size",
        description="Measures hit rates on the second half of the text, with the cache filled by the first.",
    )
    caching.add_argument(
        "corpus", nargs="+", help="a folder of token shards, a recipe, or text files and folders (or sotu)"
    )
    caching.add_argument("--out", type=Path, default=Path("cache-curve"), help="folder; default: cache-curve")
    caching.add_argument("--orders", type=whole(1, 16), nargs="+", default=[2, 3, 4, 5], metavar="N")
    caching.add_argument(
        "--rows-per-head",
        type=whole(2, MOST_ROWS),
        help="of the limited table; default: a recipe's, or Engram-27B's 2262400",
    )
    caching.add_argument(
        "--sequences", type=whole(1), default=1, help="read side by side, as a serving batch does; default: 1"
    )
    caching.add_argument("--tokens", type=whole(1), help="only so many, from the beginning")
    caching.add_argument(
        "--sample",
        type=real(above=0, most=1),
        help="share of the rows for the LRU curve; default: all, of 200 M tokens",
    )
    caching.add_argument("--tokenizer", help="a tokenizer.json; default: trained on the text")
    caching.add_argument("--vocab-size", type=whole(257), help="of a trained tokenizer; default: 16384")
    caching.add_argument("--cache-dir", help="where token shards are kept; default: .cache/engram_lab/text")
    caching.add_argument("--row-bytes", type=whole(1), help="default: 264, V4.1's FP8 row")
    caching.add_argument(
        "--device-bandwidth", type=real(above=0), metavar="GB/S", help="default: 2900, H100 HBM3"
    )
    caching.add_argument(
        "--host-bandwidth",
        type=real(above=0),
        metavar="GB/S",
        help="default: 19.6, 16 threads gathering 256 B rows",
    )
    caching.add_argument(
        "--disk-reads", type=real(above=0), metavar="READS/S", help="default: 77000, 128 threads"
    )
    caching.set_defaults(call=_cache_curve)

    ui = commands.add_parser("ui", help="browse the runs in MLflow's pages")
    ui.add_argument("--uri", default=DEFAULT_URI, help=f"default: {DEFAULT_URI}")
    ui.add_argument(
        "--host", default="127.0.0.1", help="interface to listen on; default: 127.0.0.1, this machine alone"
    )
    ui.add_argument("--port", type=whole(1, 65535), default=5000, help="default: 5000")
    ui.set_defaults(call=_ui)

    doctor = commands.add_parser("doctor", help="check the installation, the devices and the store")
    doctor.set_defaults(call=_doctor)
    return parser


def _runs(parsed: argparse.Namespace) -> None:
    from engram_lab.commands import list_runs

    list_runs(parsed.directory)


def _status(parsed: argparse.Namespace) -> None:
    from engram_lab.commands import status

    status(parsed.study, parsed.directory)


def _extend(parsed: argparse.Namespace) -> None:
    from engram_lab.commands import extend_study

    extend_study(parsed.study, parsed.directory, parsed.count, parsed.cells)


def _report(parsed: argparse.Namespace) -> None:
    from engram_lab.commands import report

    report(parsed.study, parsed.directory, parsed.out)


def _generate(parsed: argparse.Namespace) -> int:
    from engram_lab.model.generation import Sampling
    from engram_lab.model_commands import HotRowsOption, generate

    if (parsed.hot_rows is None) != (parsed.hot_text is None):
        raise UserError(
            "--hot-rows and --hot-text go together: how many rows, and the text they are counted on."
        )
    hot = None if parsed.hot_rows is None else HotRowsOption(rows=parsed.hot_rows, text=parsed.hot_text)
    sampling = Sampling(
        temperature=parsed.temperature, top_k=parsed.top_k, top_p=parsed.top_p, seed=parsed.seed
    )
    return generate(
        parsed.checkpoint,
        parsed.text,
        length=parsed.tokens,
        sampling=sampling,
        device=parsed.device,
        memory=parsed.memory,
        hot=hot,
    )


def _inspect(parsed: argparse.Namespace) -> None:
    from engram_lab.model_commands import inspect

    inspect(parsed.checkpoint, parsed.text, out=parsed.out, device=parsed.device)


def _cache_curve(parsed: argparse.Namespace) -> None:
    from engram_lab.caching.command import Options, cache_curve
    from engram_lab.caching.study import CacheConfig, Speeds

    speeds = {
        "row_bytes": parsed.row_bytes,
        "device": None if parsed.device_bandwidth is None else 1e9 * parsed.device_bandwidth,
        "host": None if parsed.host_bandwidth is None else 1e9 * parsed.host_bandwidth,
        "disk_reads": parsed.disk_reads,
    }
    options = Options(
        corpus=tuple(parsed.corpus),
        out=parsed.out,
        tokens=parsed.tokens,
        tokenizer=parsed.tokenizer,
        vocab_size=parsed.vocab_size,
        cache_dir=parsed.cache_dir,
    )
    config = CacheConfig(
        orders=tuple(sorted(set(parsed.orders))),
        rows_per_head=parsed.rows_per_head,
        sequences=parsed.sequences,
        sample=parsed.sample,
    )
    cache_curve(
        options, config, Speeds(**{name: value for name, value in speeds.items() if value is not None})
    )


def _ui(parsed: argparse.Namespace) -> int | None:
    from engram_lab.tracking import serve

    return serve(parsed.uri, port=parsed.port, host=parsed.host)


def _doctor(parsed: argparse.Namespace) -> int | None:
    from engram_lab.launcher import doctor

    return doctor()


if __name__ == "__main__":
    sys.exit(main())
