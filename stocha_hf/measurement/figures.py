"""What measurements look like: one picture for each kind of file that a verb writes with --json.

plot_evaluation(json.load(open("eval.json")), "zeros.png")    # of stocha-eval
plot_generation(json.load(open("generate.json")), "diversity.png")    # of stocha-generate
plot_speedups(json.load(open("bench.json")), "speed.png")    # of stocha-bench --shape
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stocha_hf.measurement.plots import Picture, plot

WHOLE = (-2.0, 102.0)  # percent, with room for the points at both ends
VALUES = {"stocha": "p", "temperature": "temperature", "greedy": None}  # way of decoding: the option it takes


def plot_evaluation(figures: dict[str, Any], path: str | Path) -> None:
    """Zeros by layer, neurons unused by the first tokens, and perplexity against zeros where it was measured.

    Raises StochaError as check_plot does, as all functions here.
    """
    rows = {f"{Path(row['model']).name} ({row['activation']})": row for row in evaluated(figures)}
    zeros = {name: list(enumerate(_percent(row["sparsity"]["per_layer"]))) for name, row in rows.items()}
    unused = {}
    for name, row in rows.items():
        shares = row["aggregated_sparsity"]
        for label, key in ((name, "mean"), (f"{name}, if independent", "independent")):
            unused[label] = list(zip(shares["tokens"], _percent(shares[key]), strict=True))
    pictures = [
        Picture("Zeros in the FFN's hidden vector", zeros, "layer", "%", y_limits=WHOLE),
        Picture("Neurons that none of the first t tokens used", unused, "t", "%", log="x", y_limits=WHOLE),
    ]
    if curves := {name: _curve(row) for name, row in rows.items() if "cett" in row or "ppl_sparsity" in row}:
        pictures.append(Picture("Truncated by CETT", curves, "zeros, %", "perplexity", log="y"))
    plot(path, pictures)


def plot_generation(figures: dict[str, Any], path: str | Path) -> None:
    """Diversity against likelihood, a line for each way of decoding. Needs at least two samples a prompt."""
    lines: dict[str, dict[str, list[tuple[float, float, str]]]] = {"Distinct 2-grams": {}, "100 - self-BLEU": {}}
    for row in figures["runs"]:
        key = VALUES[row["decoding"]]
        label, value = row["decoding"] + (", by p" if key == "p" else ""), f"{row[key]:g}" if key else ""
        for title, diversity in zip(lines, (100 * row["distinct_2"], 100 - row["self_bleu"]), strict=True):
            lines[title].setdefault(label, []).append((row["log_likelihood"], diversity, value))
    x = "mean log-likelihood of a token, without noise"
    plot(path, [Picture(title, found, x, "%", levels=False) for title, found in lines.items()])


def plot_speedups(records: list[dict[str, Any]], path: str | Path) -> None:
    """How many times as fast a sparse FFN is, against its zeros; a picture for each number of tokens."""
    lines: dict[int, dict[str, list[tuple[float, float]]]] = {}
    for record in (record for record in records if "shape" in record):
        label = f"{record['shape'][0]}x{record['shape'][1]}"
        points = lines.setdefault(record["tokens"], {}).setdefault(label, [])
        points.append((100 * record["sparsity"], record["speedup"]))
    y = "times as fast as PyTorch dense"
    plot(path, [Picture(f"Sparse FFN, tokens: {tokens}", found, "zeros, %", y) for tokens, found in lines.items()])


def evaluated(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that an evaluation tells of: the first and, if there is one, the baseline."""
    return [row for row in (figures, figures.get("baseline")) if row]


def _curve(row: dict[str, Any]) -> list[tuple[float, float]]:
    """Perplexity against zeros: untruncated, and whatever was measured truncated."""
    points = [row, *row.get("cett", []), *([row["ppl_sparsity"]] if "ppl_sparsity" in row else [])]
    return [(100 * point["sparsity"]["mean"], point["perplexity"]) for point in points]


def _percent(shares: list[float]) -> list[float]:
    return [100 * share for share in shares]
