"""Seconds that whole reports and one small fit take, start-up included, on made-up studies.

    OMP_NUM_THREADS=1 python benchmarks/scaling_report.py [--repeats 3]

For studies of one and four budgets: the fits alone (every family, joint law, memory law), then the report
(fits, trials, pictures, page, files), taking turns in one process. For Chinchilla's law, 240 runs: the
report. Then `scaling fit allocation` on ten runs, each time in a fresh process. Processor time, so that
neighbours on the machine count less; best of the repeats.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
from scaling_speed import table

from scaling import fit_allocations, fit_joint, fit_memory
from scaling.report import write_report

SHARES = (0.0, 0.2, 0.4, 0.55, 0.7, 0.8, 0.88, 0.94, 0.98, 1.0)
SEEDS = 2
STARTS = 10


def study(budgets: int) -> pl.DataFrame:
    """Return two seeds of ten shares at each budget, and of seven table sizes, with an SD of .001 nats."""
    noise = np.random.default_rng(0)
    rows: list[dict[str, object]] = []
    for budget in 1e18 * 4.0 ** np.arange(budgets):
        for rho in SHARES:
            loss = 3.4 - 0.06 * np.log(0.06 + rho) - 0.03 * np.log1p((1 - rho) / 0.1)
            rows += [
                {"sweep": "allocation", "budget": budget, "rho": rho, "slots": 0.0, "loss": loss}
            ] * SEEDS
    for slots in np.geomspace(2**14, 2**21, 7):
        loss = 3.5 - 0.015 * np.log(slots)
        rows += [{"sweep": "memory", "budget": 1e18, "rho": 0.8, "slots": slots, "loss": loss}] * SEEDS
    frame = pl.DataFrame(rows).with_columns(seed=pl.int_range(pl.len()) % SEEDS)
    return frame.with_columns(loss=pl.col("loss") + 0.001 * noise.standard_normal(frame.height))


def fits(frame: pl.DataFrame, budgets: int) -> None:
    """Fit what the report fits, and no more."""
    fit_allocations(frame)
    if budgets > 1:
        fit_joint(frame)
    fit_memory(frame)


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def start_up(runs: Path) -> list[float]:
    """Return the processor times of `scaling fit allocation` in processes of their own, sorted."""
    command = [str(Path(sys.executable).parent / "scaling"), "fit", "allocation", str(runs)]
    times = []
    for _ in range(STARTS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return sorted(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = range(parser.parse_args().repeats)
    print(f"{os.cpu_count()} cores, processor seconds, best of {len(repeats)}")
    with tempfile.TemporaryDirectory() as folder:
        ten = study(1).filter(pl.col("seed") == 0, pl.col("sweep") == "allocation")
        ten.select("rho", "loss").write_csv(Path(folder) / "ten.csv")
        times = start_up(Path(folder) / "ten.csv")
        print(f"fit of ten runs by the command, start-up included: {times[0]:.2f} s, median {times[5]:.2f} s")
        for budgets in (1, 4):
            frame = study(budgets)
            alone, whole = [], []
            for _ in repeats:
                alone.append(seconds(lambda f=frame, n=budgets: fits(f, n)))
                whole.append(seconds(lambda f=frame: write_report(f, folder)))
            print(
                f"{budgets} budgets and memory, {frame.height} runs: fits {min(alone):.2f} s,"
                f" report {min(whole):.2f} s, ratio {min(whole) / min(alone):.1f}"
            )
        laws = pl.DataFrame(table())
        whole = [seconds(lambda: write_report(laws, folder)) for _ in repeats]
        print(f"standard laws, {laws.height} runs: report {min(whole):.2f} s")


if __name__ == "__main__":
    main()
