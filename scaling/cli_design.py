"""The commands `scaling design ...`: what a sweep will be able to say, before it is run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

from scaling.cli_tables import runs, show, table_arguments, whole
from scaling.errors import ScalingError


def add_design(design: argparse.ArgumentParser) -> None:
    """Add the plans that can be made."""
    plans = design.add_subparsers(required=True, metavar="PLAN")
    sweep = plans.add_parser("sweep", help="the cheapest sweep whose interval of rho* is narrow enough")
    sweep.add_argument("--width", type=float, required=True, help="wanted width of the interval of rho*")
    sweep.add_argument(
        "--counts", type=whole_numbers, metavar="N,N", help="numbers of rho to try (8,10,12,16)"
    )
    sweep.add_argument("--seeds", type=whole_numbers, metavar="N,N", help="numbers of seeds to try (1,2,3,5)")
    power = plans.add_parser("power", help="what one planned sweep can be expected to say")
    power.add_argument("--rho", type=numbers, required=True, metavar="R,R", help="the shares to be run")
    power.add_argument("--seeds", type=int, metavar="N", help="runs at each share (1)")
    forecast = plans.add_parser("forecast", help="half-width of rho* at ten times the largest budget")
    forecast.add_argument("--budgets", type=numbers, required=True, metavar="C,C", help="training FLOPs")
    forecast.add_argument("--rho", type=numbers, required=True, metavar="R,R", help="the shares to be run")
    forecast.add_argument("--seeds", type=int, metavar="N", help="runs at each share and budget (1)")
    forecast.add_argument("--at", type=float, metavar="C", help="FLOPs to forecast at")
    for plan, run in ((sweep, _sweep), (power, _power), (forecast, _forecast)):
        plan.add_argument("--sd", type=float, help="SD of the loss between seeds, nats (0.003)")
        plan.add_argument("--optimum", type=float, metavar="RHO", help="the best share assumed (0.8)")
        plan.add_argument("--m0", type=float, help="share of memory at which its return has halved (0.1)")
        plan.add_argument("--gain", type=float, metavar="A", help="loss per logarithm of experts (0.04)")
        plan.add_argument("--like", metavar="FILE", help="take the truth from the fit of this table of runs")
        plan.add_argument("--json", action="store_true", help="print JSON")
        plan.set_defaults(run=run)
    following = plans.add_parser("next", help="the runs that would sharpen rho* most")
    table_arguments(following)
    following.add_argument("--count", type=whole, default=1, metavar="N", help="at how many shares (1)")
    following.add_argument(
        "--rho", type=numbers, metavar="R,R", help="shares that can be run (those of whole experts)"
    )
    following.add_argument("--json", action="store_true", help="print JSON")
    following.add_argument(
        "--budget", type=float, metavar="FLOPS", help="which budget, where there are several"
    )
    following.set_defaults(run=_next)


def numbers(text: str) -> tuple[float, ...]:
    """Read "0.1,0.5"; the name is what argparse calls it in its error."""
    found = tuple(float(part) for part in text.split(","))
    if not all(0 <= number < math.inf for number in found):
        raise argparse.ArgumentTypeError(f"{text} holds a number that is below 0 or not finite")
    return found


def whole_numbers(text: str) -> tuple[int, ...]:
    """Read "8,12"."""
    return tuple(int(part) for part in text.split(","))


def _sweep(given: argparse.Namespace) -> None:
    from scaling.design import plan_allocation

    plan = plan_allocation(given.width, **_planned(given, "counts", "seeds", "sd")).to_dict()
    lines = [_power_line(power) for power in plan["tried"]]
    chosen = plan["chosen"]
    if chosen is None:
        lines.append(f"None reaches a width of {given.width:g}; allow more with --counts and --seeds.")
    else:
        shares = ", ".join(f"{rho:g}" for rho in chosen["rho"])
        lines.append(f"The last is enough: rho = {shares}.")
    show(given, plan, lines)


def _power(given: argparse.Namespace) -> None:
    from scaling.design import sweep_power

    power = sweep_power(given.rho, **_planned(given, "seeds", "sd")).to_dict()
    show(given, {"kind": "power", **power}, [_power_line(power)])


def _forecast(given: argparse.Namespace) -> None:
    from scaling.design import forecast_half_width

    if min(given.budgets) <= 0:
        raise ScalingError(f"--budgets holds {min(given.budgets):g}; training FLOPs must be positive.")
    half = forecast_half_width(given.budgets, given.rho, **_planned(given, "seeds", "sd", "at"))
    at = given.at or 10 * max(given.budgets)
    said = f"At C = {at:g} FLOPs rho* will be known to +-{half:.3g}."
    show(given, {"kind": "forecast", "budget": at, "half_width": half}, [said])


def _next(given: argparse.Namespace) -> None:
    from scaling.allocation import fit_allocation
    from scaling.sequential import next_runs

    fit = fit_allocation(runs(given), budget=given.budget)
    cells = [run.to_dict() for run in next_runs(fit, given.count, given.rho)]
    lines = [
        f"rho = {c['rho']:g}, seed {c['seed']}: SD of rho* {c['sd_ratio']:.2f} of what it is now"
        for c in cells
    ]
    show(given, {"kind": "next", "cells": cells}, lines)


def _planned(given: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the keywords of a plan that were given, and the truth it is tried on."""
    from scaling.design import Truth

    chosen = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    stated = {"optimum": given.optimum, "m0": given.m0, "a": given.gain}
    stated = {name: value for name, value in stated.items() if value is not None}
    if given.like is None:
        return {**chosen, "truth": Truth(**stated)}
    if stated:
        raise ScalingError("--like takes the whole truth from a fit; leave out --optimum, --m0 and --gain.")
    from scaling.allocation import fit_allocation

    return {**chosen, "truth": Truth.from_fit(fit_allocation(given.like))}


def _power_line(power: Mapping[str, Any]) -> str:
    width = power["median_width"]
    wide = "is unbounded" if width is None else f"has median width {width:.3f}"
    return (
        f"{len(power['rho'])} rho x {power['seeds']} seeds = {power['runs']} runs: interval of rho* {wide}"
        f" (bounded in {100 * power['bounded']:.0f} %), a U is shown in {100 * power['u_power']:.0f} %"
    )
