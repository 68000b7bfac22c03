"""A picture of the results: each peer's time as a multiple of ours."""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

from bench.interleave import OURS, PRODUCTS
from bench.tables import Row, cases


def draw(rows: list[Row], path: Path) -> None:
    """Draw the ratios of all cases as points on a logarithmic axis; right of 1 we are faster."""
    matplotlib.use("agg")
    rows = [row for row in rows if row["contender"] != PRODUCTS]
    grouped = cases(rows)[::-1]
    peers = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != OURS))
    figure, axes = plt.subplots(figsize=(13, 1.5 + 0.27 * len(grouped)), layout="constrained")
    for i, case in enumerate(grouped):
        axes.axhline(i, color="0.92", zorder=0)
        for row in case[1:]:
            peer = peers.index(row["contender"])
            axes.plot(float(row["times_ours"]), i, "osD^v"[peer % 5], color=f"C{peer}", markersize=6)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    axes.set_xlabel("time of the peer / time of fastvae (median; right of 1: fastvae is faster)")
    labels = [f"{case[0]['family']}: {case[0]['case']}, {case[0]['direction']}" for case in grouped]
    axes.set_ylim(-0.7, len(grouped) - 0.3)
    axes.set_yticks(range(len(grouped)), labels, fontsize=8)
    for peer, name in enumerate(peers):
        axes.plot([], [], "osD^v"[peer % 5], color=f"C{peer}", label=name)
    figure.legend(fontsize=8, loc="outside lower center", ncols=5, frameon=False)
    row = rows[0]
    axes.set_title(f"{row['cpu']}, {row['threads']} threads, torch {row['torch']}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
