"""``python -m bench [FAMILY ...]``: check, time and tabulate; writes CSV, Markdown and a picture to bench/results."""

import argparse
import csv
import importlib
import itertools
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import FAMILIES, figure, interleave, machine, tables


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)} [all]")
    parser.add_argument("--seconds", type=float, default=6.0, help="timing of each case [6]")
    parser.add_argument("--threads", type=int, default=2, help="of every contender [2]")
    parser.add_argument("--out", type=Path, default=tables.RESULTS, help="folder of the results [bench/results]")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it matches [all]; others stay")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - set(FAMILIES):
        parser.error(f"unknown family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")
    if os.getloadavg()[0] > 0.5:
        print(f"warning: this machine is busy (load {os.getloadavg()[0]:.1f}): the times will be too", file=sys.stderr)

    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for family in arguments.families or FAMILIES:
        rows, path = run_family(family, arguments.seconds, arguments.only), arguments.out / f"{family}.csv"
        if not rows:
            print(f"{family}: no case matches {arguments.only!r}", file=sys.stderr)
            continue
        if arguments.only and path.exists():
            with path.open(newline="") as file:
                rows = renewed(list(csv.DictReader(file)), rows)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    rows = tables.read(arguments.out)
    (arguments.out / "README.md").write_text(tables.report(rows))
    figure.draw(rows, arguments.out / "ratios.png")
    print(f"written to {arguments.out}")
    return 0


def renewed(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the rows of cases measured anew in the place of their old ones, and those of new cases at the end."""

    def case(row: dict[str, Any]) -> tuple[str, str]:
        return row["case"], row["direction"]

    measured = {key: list(group) for key, group in itertools.groupby(new, case)}
    rows = []
    for key, group in itertools.groupby(old, case):
        rows += measured.pop(key, list(group))
    return rows + [row for group in measured.values() for row in group]


def run_family(family: str, seconds: float, only: str = "") -> list[dict[str, Any]]:
    """Run the cases of one family whose names match, telling each as it is done."""
    here = machine.describe() | {"sgemm_gflops": round(machine.flop_rate() / 1e9, 1)}
    rows = []
    for case in importlib.import_module(f"bench.{family}").cases():
        if not re.search(only, case.name):
            continue
        torch.compiler.reset()  # else Dynamo counts the cases of one function as its recompilations, and gives up
        start = time.perf_counter()
        copy_rate = machine.copy_rate(case.bytes)
        results = interleave.run(case, seconds=seconds, flop_rate=1e9 * here["sgemm_gflops"], copy_rate=copy_rate)
        rows += [row | here | {"copy_gb_s": round(copy_rate / 1e9, 1)} for row in results]
        shown = ", ".join(f"{r['contender']} {r['median_ms']:g} ms ({r['times_ours']:.2f}x)" for r in results)
        print(f"{family}: {case.name}, {case.direction}: {shown} [{time.perf_counter() - start:.0f} s]", flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
