"""Markdown tables from the result files: ``python -m bench.tables --write FILE ...`` renews those of documents."""

import argparse
import csv
import itertools
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from bench import FAMILIES
from bench.interleave import OURS, PRODUCTS

RESULTS = Path(__file__).parent / "results"
PTB = ("ptb_lstm", "ptb_lstm_active", "ptb_transformer", "ptb_lstm_4_epochs")  # settings; JSON by `fastvae evaluate`
SPEED = RESULTS / "training.csv"  # written by `python -m bench.training`
CONTROLLED = RESULTS / "sst2_controlled.json"  # written by `python -m bench.controlled`

Row = dict[str, str]
_TITLES = {
    "gaussian": "Sampling + KL",
    "full_gaussian": "Full covariance",
    "importance": "Importance-weighted bound",
    "likelihood": "Likelihood",
    "categorical": "Gumbel-softmax + KL",
    "corruption": "Corrupted inputs",
    "mixture": "Mixture prior",
    "cross_entropy": "Linear + cross-entropy",
    "lstm": "LSTM",
    "gru": "GRU",
    "generation": "Generation",
    "sparse": "Sparse coding",
    "posterior": "Aggregated posterior",
    "vae": "Whole VAE",
}
_SEQUENCES = ("cross_entropy", "lstm", "gru", "generation")


def read(folder: Path = RESULTS) -> list[Row]:
    """Read the rows of all families measured in `folder`."""
    rows: list[Row] = []
    for family in FAMILIES:
        path = folder / f"{family}.csv"
        if path.exists():
            with path.open(newline="") as file:
                rows += csv.DictReader(file)
    return rows


def cases(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows into cases, ours first in each."""
    grouped = itertools.groupby(rows, lambda row: (row["family"], row["case"], row["direction"]))
    return [sorted(group, key=lambda row: row["contender"] != OURS) for _, group in grouped]


def training_summary(rows: list[Row]) -> str:
    """Return the README's table of training vectors and images: each peer's time and memory as a multiple of ours."""
    return _training(row for row in rows if row["family"] not in _SEQUENCES)


def sequence_summary(rows: list[Row]) -> str:
    """Return the README's table of training on sentences, likewise."""
    return _training(row for row in rows if row["family"] in _SEQUENCES)


def _training(rows: Iterable[Row]) -> str:
    shown = [row for row in rows if row["direction"] == "forward+backward"]
    return f"{_summary(shown, 'forward + backward, float32')}\n\n{_machine(shown)}"


def inference_summary(rows: list[Row]) -> str:
    """Return the README's table of scoring and generation, without gradients."""
    shown = [row for row in rows if row["family"] == "generation" or "samples" in row["case"]]
    return _summary([row for row in shown if row["family"] != "sparse"], "no gradient, float32")


def _summary(rows: list[Row], title: str) -> str:
    lines = [
        f"| {title} | ours | eager | `torch.compile` | best other | peak memory: ours, eager |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for case in cases(rows):
        by_name = {row["contender"]: row for row in case}
        ours, eager = by_name.pop(OURS), by_name.pop("eager")
        compiled = by_name.pop("torch.compile")
        by_name.pop(PRODUCTS, None)
        other = min(by_name.values(), key=lambda row: float(row["median_ms"]), default=None)
        best = f"{_ratio(other)} ({other['contender']})" if other else ""
        lines.append(
            f"| {_TITLES[ours['family']]}: {ours['case']} | {_time(ours)} | {_ratio(eager)} | {_ratio(compiled)} "
            f"| {best} | {_memory(ours)}, {_memory(eager)} |"
        )
    return "\n".join(lines)


def limits(rows: list[Row]) -> str:
    """Return the table of how near the machine's limit training and generation of sentences come."""
    shown = [row for row in rows if row["family"] in _SEQUENCES]
    names = [OURS, "eager", "torch.compile"]
    lines = [f"| of the limit | {' | '.join(names)} |", "|---|--:|--:|--:|"]
    for case in cases(shown):
        if case[0]["direction"] == "forward" and case[0]["family"] != "generation":
            continue
        share = {row["contender"]: f"{100 * float(row['share_of_limit']):.0f} %" for row in case}
        title = f"{_TITLES[case[0]['family']]}: {case[0]['case']}"
        lines.append(f"| {title} | {' | '.join(share[name] for name in names)} |")
    return "\n".join(lines) + f"\n\n{_machine(shown)}"


def vae_summary(rows: list[Row]) -> str:
    """Return the table of moving a VAE, a step and an epoch of training; nothing where they were not measured."""
    shown = [row for row in rows if row["family"] == "vae"]
    if not shown:
        return ""
    products = "".join(
        f"The matrix products of a step alone, timed in turns with the rest, take {_time(row)}, "
        f"{100 * float(row['times_ours']):.0f} % of ours.\n\n"
        for row in shown
        if row["contender"] == PRODUCTS
    )
    return f"{_summary(shown, 'training with Adam, float32')}\n\n{products}{_machine(shown)}"


def sparse_summary(rows: list[Row]) -> str:
    """Return the README's table of the sparse family, gap 1e-4: each peer's time as a multiple of ours."""
    columns = {
        "SPAMS": ("SPAMS LARS", "SPAMS"),
        "SPAMS CD": ("SPAMS CD",),
        "scikit-learn, float64": ("scikit-learn, float64",),
        "eager": ("eager", "eager, residual form"),
        "`torch.compile`": ("torch.compile",),
    }
    lines = [f"| float32 | ours | {' | '.join(columns)} |", "|---|--:|" + "--:|" * len(columns)]
    shown = (row for row in rows if row["family"] == "sparse" and ("gap" not in row["case"] or "0.0001" in row["case"]))
    for case in cases(shown):
        found = [[row for row in case if row["contender"] in names] for names in columns.values()]
        ratios = [_ratio(min(f, key=lambda row: float(row["median_ms"]))) if f else "" for f in found]
        lines.append(f"| {case[0]['case']} | {_time(case[0])} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def report(rows: list[Row]) -> str:
    """Return bench/results/README.md: every contender of every case."""
    parts = ["# Benchmark results", _HOW, f"![Time of each peer as a multiple of ours](ratios.png)\n\n{_machine(rows)}"]
    for family, group in itertools.groupby(cases(rows), lambda case: case[0]["family"]):
        lines = [
            f"## {_TITLES[family]}\n",
            "| case | contender | median | quartiles | times ours | of the limit | peak memory | rounds |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        for case in group:
            for row in case:
                first = f"{row['case']}, {row['direction']}" if row is case[0] else ""
                quartiles = f"{_number(row['quartile1_ms'])} - {_number(row['quartile3_ms'])} ms"
                lines.append(
                    f"| {first} | {row['contender']} | {_time(row)} | {quartiles} | {_ratio(row)} "
                    f"| {100 * float(row['share_of_limit']):.0f} % | {_memory(row)} | {row['rounds']} |"
                )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_HOW = """\
Written by `python -m bench`. Every contender's result is checked against float64 before it is timed; all are timed in
turns in one process, float32, with the same number of threads. "Forward" records no gradient. "Times ours" is a peer's
median over ours. "Of the limit" compares with max(FLOPs / rate of a 1024 cubed matrix product, bytes / rate of a copy
of that size), both measured in the same run: what no implementation can pass, arithmetic other than products not
counted. Peak memory is what torch's allocator held at most during one call, above its inputs."""


def _machine(rows: list[Row]) -> str:
    described = []
    for row in rows:
        text = (
            f"{row['cpu']} ({row['isa']}), {row['threads']} threads, fastvae {row['fastvae']}, torch {row['torch']}, "
            f"Triton {row['triton']}, Python {row['python']}, {row['date']}"
        )
        if text not in described:
            described.append(text)
    return "Measured on " + "; ".join(described) + "."


def _number(text: str) -> str:
    return f"{float(text):.3g}" if float(text) < 1000 else f"{float(text):.0f}"


def _time(row: Row) -> str:
    return f"{_number(row['median_ms'])} ms"


def _ratio(row: Row) -> str:
    return f"{float(row['times_ours']):.2f}x"


def _memory(row: Row) -> str:
    return f"{_number(row['peak_mib'])} MiB"


def penn_treebank(folder: Path = RESULTS) -> str:
    """Return the table of the runs on the Penn Treebank that were evaluated."""
    lines = [
        "| settings | -ELBO | NLL | KL | IW-NLL | PPL a word | active units |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name in PTB:
        if not (folder / f"{name}.json").is_file():
            continue
        result = json.loads((folder / f"{name}.json").read_text())
        lines.append(
            f"| `{name}` | {result['neg_elbo']:.2f} | {result['nll']:.2f} | {result['kl']:.2f} "
            f"| {result['iw_nll']:.2f} ({result['iw_samples']} samples) | {result['ppl']:.1f} "
            f"| {result['active_units']} of {result['latent_dim']} |"
        )
    return "\n".join(lines)


def speed_summary(path: Path = SPEED) -> str:
    """Return the table of whole training, in tokens a second; nothing where it was not measured."""
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    peers = list(dict.fromkeys(row["contender"] for row in rows if row["contender"] != OURS))
    lines = [f"| tokens a second | ours | {' | '.join(peers)} |", "|---|--:|" + "--:|" * len(peers)]
    for batch_size, group in itertools.groupby(rows, lambda row: row["batch_size"]):
        by_name = {row["contender"]: row for row in group}
        cells = [f"{int(by_name[OURS]['tokens_per_second']):,}"]
        cells += [
            f"{int(by_name[name]['tokens_per_second']):,} (ours {float(by_name[name]['ours_faster']):.2f}x)"
            for name in peers
        ]
        lines.append(f"| batch {batch_size} | {' | '.join(cells)} |")
    return "\n".join(lines) + f"\n\n{_machine(rows)}"


_MIXTURES = {  # columns of the tables of mixtures: key, head, digits
    "mutual_information": ("I(c;x)", 3),
    "bleu": ("BLEU", 2),
    "homogeneity_act": ("homogeneity: act", 3),
    "homogeneity_emotion": ("emotion", 3),
    "reverse_ppl": ("reverse PPL", 1),
    "word_kl": ("word-KL", 3),
    "neg_elbo": ("-ELBO", 2),
    "nll": ("NLL", 2),
    "kl": ("KL", 2),
    "dispersion": ("L_d", 2),
}


def mixtures(path: Path) -> str:
    """Return the table of models that `bench.mixtures` compared, of the columns that its JSON has."""
    rows = json.loads(path.read_text())
    shown = {name: column for name, column in _MIXTURES.items() if name in rows[0]}
    lines = [
        f"| model | {' | '.join(head for head, _ in shown.values())} |",
        f"|---|{'--:|' * len(shown)}",
        *(
            f"| {row['model']} | {' | '.join(f'{row[name]:z.{digits}f}' for name, (_, digits) in shown.items())} |"
            for row in rows
        ),
    ]
    return "\n".join(lines)


def mixture_seeds(folder: Path, which: str) -> str:
    """Return the table of models that `bench.mixtures` compared with several seeds, the figures of all in a cell."""
    paths = [folder / f"{which}_mixtures.json", *sorted(folder.glob(f"{which}_[0-9]_mixtures.json"))]
    first, *others = ({row["model"]: row for row in json.loads(path.read_text())} for path in paths)
    shown = ("mutual_information", "bleu", "homogeneity_act")
    lines = [f"| model | {' | '.join(_MIXTURES[name][0] for name in shown)} |", f"|---|{'--:|' * len(shown)}"]
    for model in first:
        if all(model in run for run in others):
            rows = [run[model] for run in (first, *others)]
            cells = [", ".join(f"{row[name]:z.{_MIXTURES[name][1]}f}" for row in rows) for name in shown]
            lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(lines)


def controlled(path: Path = CONTROLLED) -> str:
    """Return the README's tables of controlled generation."""
    result = json.loads(path.read_text())
    judges, real = result["classifiers"], result["real"]
    lines = [
        "| sentences | accuracy, CNN | accuracy, n-grams | PPL of an LM | distinct-1 | distinct-2 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    figures = "{perplexity:.0f} | {distinct_1:.3f} | {distinct_2:.3f} |"
    for row in result["generated"]:
        name = f"{row['sentences']:,} generated, temperature {row['temperature']:g}"
        shares = f"{100 * row['accuracy']:.1f} % | {100 * row['accuracy_linear']:.1f} %"
        lines.append(f"| {name} | {shares} | {figures.format(**row)}")
    shares = " | ".join(f"{100 * judges[judge]['test_short']:.1f} %" for judge in ("cnn", "linear"))
    lines.append(f"| {real['sentences']:,} real, of the test set | {shares} | {figures.format(**real)}")
    values = list(result["same_z"][0])
    lines += ["", "| " + " | ".join(f"the same z, {value}" for value in values) + " |", "|---|---|"]
    lines += [
        "| " + " | ".join(pair[value].replace("|", "\\|") for value in values) + " |" for pair in result["same_z"]
    ]
    return "\n".join(lines)


def renewed(text: str, folder: Path = RESULTS) -> str:
    """Put the tables of the result files between the markers of a document.

    Raises:
        ValueError: a marker has no end, comes twice, or names no table.
    """
    rows = read(folder)
    tables = {
        "bench": lambda: training_summary(rows),
        "sequences": lambda: sequence_summary(rows),
        "inference": lambda: inference_summary(rows),
        "sparse": lambda: sparse_summary(rows),
        "vae": lambda: vae_summary(rows),
        "limits": lambda: limits(rows),
        "speed": lambda: speed_summary(folder / SPEED.name),
        "ptb": lambda: penn_treebank(folder),
        "dailydialog_mixtures": lambda: mixtures(folder / "dailydialog_mixtures.json"),
        "dailydialog_seeds": lambda: mixture_seeds(folder, "dailydialog"),
        "ptb_mixtures": lambda: mixtures(folder / "ptb_mixtures.json"),
        "controlled": lambda: controlled(folder / CONTROLLED.name),
    }
    for name in marked(text):
        if name not in tables:
            raise ValueError(f"expected one of the tables {', '.join(tables)}, got <!-- {name}: begin -->")
        text = replace(text, name, tables[name]())
    return text


def marked(text: str) -> list[str]:
    """Return the names of the tables that a document has."""
    return re.findall(r"^<!-- (\w+): begin -->$", text, re.M)


def replace(text: str, name: str, table: str) -> str:
    """Put `table` between the markers ``<!-- name: begin -->`` and ``<!-- name: end -->`` of `text`.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    first, last = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in after:
        raise ValueError(f"expected {first} and then {last}, once each")
    return f"{before}{first}\n{table}\n{last}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tables", description=__doc__)
    parser.add_argument("--write", type=Path, nargs="+", metavar="FILE", help="renew the tables between their markers")
    arguments = parser.parse_args()
    for path in arguments.write or ():
        path.write_text(renewed(path.read_text()))
    if not arguments.write:
        print(
            training_summary(read()), sequence_summary(read()), inference_summary(read()), penn_treebank(), sep="\n\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
