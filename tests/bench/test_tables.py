import csv
import json
from pathlib import Path

import pytest

from bench import figure, tables
from bench.__main__ import renewed

PEERS = {
    "fastvae": ("1.25", "1.0", "2.0"),
    "eager": ("5.0", "4.0", "12.34"),
    "torch.compile": ("2.5", "2.0", "7.0"),
    "third": ("3.75", "3.0", "7.0"),
    "fourth": ("1.0", "0.8", "7.0"),
}
MACHINE = {
    "cpu": "A processor", "isa": "avx2", "threads": "2", "fastvae": "1", "torch": "2", "triton": "3", "python": "4",
    "date": "today",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"family": "lstm", "case": "a case", "direction": direction, "contender": name, "median_ms": median,
         "quartile1_ms": "0.5", "quartile3_ms": "1234.5", "times_ours": ratio, "share_of_limit": "0.25",
         "peak_mib": peak, "rounds": "9", **MACHINE}
        for direction in ("forward", "forward+backward") for name, (median, ratio, peak) in PEERS.items()
    ]  # fmt: skip
    with (tmp_path / "lstm.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return tmp_path


def test_sparse_summary_takes_the_better_of_a_peers_forms(folder: Path) -> None:
    rows = tables.read(folder)
    names = {"fastvae": "fastvae", "eager": "eager", "torch.compile": "eager, residual form", "third": "SPAMS LARS"}
    shown = [
        row | {"family": "sparse", "contender": names[row["contender"]]} for row in rows if row["contender"] in names
    ]
    hidden = [row | {"case": "a case, gap 0.01"} for row in shown]
    lines = tables.sparse_summary([row for row in [*shown, *hidden] if row["direction"] == "forward"]).splitlines()
    assert lines[0] == "| float32 | ours | SPAMS | SPAMS CD | scikit-learn, float64 | eager | `torch.compile` |"
    assert lines[2:] == ["| a case | 1.25 ms | 3.00x |  |  | 2.00x |  |"]


def test_summary_shows_training_against_each_peer(folder: Path) -> None:
    _, _, row, _, machine = tables.sequence_summary(tables.read(folder)).splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["LSTM: a case", "1.25 ms", "4.00x", "2.00x", "0.80x (fourth)", "2 MiB, 12.3 MiB"]
    assert "A processor (avx2), 2 threads" in machine


def test_training_is_told_apart_by_what_is_trained(folder: Path) -> None:
    rows = tables.read(folder)
    others = [row | {"family": "gaussian"} for row in rows]
    assert tables.sequence_summary([*rows, *others]) == tables.sequence_summary(rows)
    assert "Sampling + KL: a case" in tables.training_summary([*rows, *others])
    assert "LSTM" not in tables.training_summary([*rows, *others])


def test_inference_summary_holds_generation_and_scoring(folder: Path) -> None:
    rows = [row for row in tables.read(folder) if row["direction"] == "forward"]
    written = [row | {"family": "generation", "case": "greedy"} for row in rows]
    scored = [row | {"case": "scoring, 100 samples"} for row in rows]
    sparse = [row | {"family": "sparse", "case": "1,000 samples"} for row in rows]
    _, _, *lines = tables.inference_summary([*rows, *written, *scored, *sparse]).splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| Generation: greedy", "| LSTM: scoring, 100 samples"]


def test_report_and_figure_hold_every_contender(folder: Path) -> None:
    rows = tables.read(folder)
    report = tables.report(rows)
    for name in PEERS:
        assert report.count(f"| {name} |") == 2
    assert "0.5 - 1234 ms" in report
    assert "| 25 % |" in report
    figure.draw(rows, folder / "ratios.png")
    assert (folder / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_is_renewed_between_its_markers() -> None:
    begin, end = "<!-- x: begin -->", "<!-- x: end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert tables.replace(text, "x", "new") == f"before\n{begin}\nnew\n{end}\nafter\n"
    for wrong in ("no markers", begin, f"{end} {begin}", text + text, text.replace("x:", "y:")):
        with pytest.raises(ValueError, match="once each"):
            tables.replace(wrong, "x", "new")


def test_a_document_has_the_tables_that_it_marks(folder: Path) -> None:
    text = "`<!-- name: begin -->` within a line\n<!-- {0}: begin -->\nold\n<!-- {0}: end -->\n"
    assert tables.marked(text.format("vae")) == ["vae"]
    assert tables.renewed(text.format("vae"), folder) == text.format("vae").replace("old", "")  # none measured
    table = tables.sequence_summary(tables.read(folder))
    assert tables.renewed(text.format("sequences"), folder) == text.format("sequences").replace("old", table)
    with pytest.raises(ValueError, match="unknown"):
        tables.renewed("<!-- unknown: begin -->\n<!-- unknown: end -->\n", folder)


def test_cases_measured_anew_take_the_place_of_the_old() -> None:
    old = [{"case": c, "direction": d, "contender": n} for c in "ab" for d in ("forward", "both") for n in "xyz"]
    new = [{"case": c, "direction": "both", "contender": n} for c in "ca" for n in "xw"]
    rows = [(row["case"], row["direction"], row["contender"]) for row in renewed(old, new)]
    kept = [("b", d, n) for d in ("forward", "both") for n in "xyz"]
    anew = [[(c, "both", n) for n in "xw"] for c in "ac"]
    assert rows == [*(("a", "forward", n) for n in "xyz"), *anew[0], *kept, *anew[1]]


def test_products_alone_are_told_and_no_peer(folder: Path) -> None:
    rows = [row | {"family": "vae"} for row in tables.read(folder)]
    alone = rows[0] | {"contender": "its products alone", "median_ms": "0.45", "times_ours": "0.45"}
    text = tables.vae_summary([*rows[:1], alone, *rows[1:]])
    assert "alone, timed in turns with the rest, take 0.45 ms, 45 % of ours." in text
    assert "(fourth)" in text, "the best other is a peer"
    figure.draw([*rows[:1], alone, *rows[1:]], folder / "ratios.png")


def test_penn_treebank_is_read_from_the_evaluations_there_are(tmp_path: Path) -> None:
    path = tmp_path / "ptb_transformer.json"
    figures = {"neg_elbo": 110.126, "nll": 104.0, "kl": 6.126, "iw_nll": 108.5, "iw_samples": 100, "ppl": 120.04}
    path.write_text(json.dumps(figures | {"active_units": 7, "latent_dim": 32}))
    _, _, row = tables.penn_treebank(tmp_path).splitlines()
    assert row == "| `ptb_transformer` | 110.13 | 104.00 | 6.13 | 108.50 (100 samples) | 120.0 | 7 of 32 |"


def test_controlled_generation_is_read_from_its_result(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    figures = {"sentences": 1000, "perplexity": 81.6, "distinct_1": 0.1234, "distinct_2": 0.5}
    judges = {judge: {"test_short": share} for judge, share in (("cnn", 0.84), ("linear", 0.8123))}
    generated = figures | {"temperature": 0.7, "accuracy": 0.8768, "accuracy_linear": 0.8}
    pair = {"negative": "dull .", "positive": "a | b ."}
    result = {"generated": [generated], "classifiers": judges, "real": figures, "same_z": [pair]}
    path.write_text(json.dumps(result))
    lines = tables.controlled(path).splitlines()
    assert lines[2] == "| 1,000 generated, temperature 0.7 | 87.7 % | 80.0 % | 82 | 0.123 | 0.500 |"
    assert lines[3] == "| 1,000 real, of the test set | 84.0 % | 81.2 % | 82 | 0.123 | 0.500 |"
    assert lines[-3:] == ["| the same z, negative | the same z, positive |", "|---|---|", "| dull . | a \\| b . |"]
