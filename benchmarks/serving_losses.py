"""What serving lost over the pairs of several runs together, from the file that keeps them.

    python benchmarks/serving_losses.py --backbone 8B --runs 6 7

Runs count from 1, as in results/serving.md. To be told of runs of one version only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from serving_measure import BOTH, losses

ENDS = {"module": ("none", "small"), "look-up": ("small", "host"), "both": ("none", "host")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, default=Path(__file__).parent / "results" / "serving.json")
    parser.add_argument("--backbone", default="8B")
    parser.add_argument("--runs", type=int, nargs="+", required=True)
    options = parser.parse_args()
    kept = json.loads(options.file.read_text())
    pairs = [
        pair for number in options.runs for pair in kept[number - 1]["backbones"][options.backbone]["pairs"]
    ]
    for name, ends in ENDS.items():
        for parts in (BOTH, BOTH[:1], BOTH[1:]):
            found = losses(pairs, *ends, parts)
            if found is not None:
                print(
                    f"{name}, {' and '.join(parts)}: {found['loss_percent']:.2f} % "
                    f"({found['low']:.2f} to {found['high']:.2f}), {found['pairs']} pairs"
                )


if __name__ == "__main__":
    main()
