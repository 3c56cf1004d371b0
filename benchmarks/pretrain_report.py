"""The tables and pictures of docs/experiments/pretraining.md, from the results file alone.

    python benchmarks/pretrain_report.py            # rewrites the tables between the page's markers
    python benchmarks/pretrain_report.py --pictures # and draws docs/images/pretraining-*.png (matplotlib)

A loss is the mean over documentation and code of the mean loss of a token, in nats. `test` texts are reported, `tune`
texts chose the learning rates. Comparisons are between runs of one seed, which share first weights and order of text.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/pretrain_h100.jsonl"
NOISE = ROOT / "benchmarks/results/pretrain_noise.jsonl"
PAGE = ROOT / "docs/experiments/pretraining.md"
IMAGES = ROOT / "docs/images"
SEEDS = ("", "-s1", "-s2")
MAIN = {
    "SiLU": "silu",
    "Swi+FT, alpha 0.05": "swi-05",
    "Swi+FT, alpha 0.1": "swi-10",
    "Swi+FT, alpha 0.2": "swi-20",
    "StochA+FT, p 0.7, alpha 0.05": "stocha70-05",
    "StochA+FT, p 0.7, alpha 0.1": "stocha70-10",
    "StochA+FT, p 0.7, alpha 0.2": "stocha70-20",
    "R+, p 0.5, alpha 0.05": "stocha50-05-rplus",
    "R+, p 0.5, alpha 0.2": "stocha50-20-rplus",
    "R+, p 0.7, alpha 0.2": "stocha70-20-rplus",
    "ReLU": "relu",
}
AGAIN = {"ReLU": "relu", "StochA p 0.7 to the end": "stocha70-whole"}  # seed 1, trained once more: NAME-again
VARIANTS = {
    "ReLU": "relu",
    "StochA+FT, p 0.5": "stocha50-05",
    "the same, positive side ReLU (R+)": "stocha50-05-rplus",
    "the mean of StochA in place of noise, p 0.5": "mean50-05",
    "p from 0.7 to 0 over 80%, then ReLU": "annealed",
    "ReLU^2": "relu2",
}
SIZES = {"33.6M, 100M tokens": "1e-3", "136M, 66M tokens": "135m-1e-3"}  # seed 0
Rows = dict[str, dict[str, Any]]


def rows() -> Rows:
    return {row["name"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def loss(row: dict[str, Any], half: str = "test", mode: str | None = None) -> float:
    texts = [row[f"{kind}-{half}"] for kind in ("docs", "code")]
    return statistics.mean(math.log((text[mode] if mode else text)["perplexity"]) for text in texts)


def zeros(row: dict[str, Any]) -> float:
    return statistics.mean(row[f"{kind}-test"]["zeros"] for kind in ("docs", "code"))


def dead(row: dict[str, Any]) -> float:
    return row["docs-test"]["dead"]


def table(heads: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    return "\n".join("| " + " | ".join(line) + " |" for line in [heads, ["---"] * len(heads), *lines])


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"


def change(difference: float) -> str:
    """A difference of losses as one of perplexities."""
    told = f"{100 * math.expm1(difference):+.1f}%"
    return "0.0%" if told in ("+0.0%", "-0.0%") else told


def end_loss(row: dict[str, Any]) -> float:
    """On the last 2.5% of the training text, which no step before had seen."""
    last = row["curve"][-1][0]
    return statistics.mean(value for step, value, _ in row["curve"] if step > 0.975 * last)


def main_table(all_rows: Rows) -> str:
    lines = []
    for label, name in MAIN.items():
        found = {seed: all_rows[f"{name}-1e-3{seed}"] for seed in SEEDS if f"{name}-1e-3{seed}" in all_rows}
        base = {seed: all_rows[f"relu-1e-3{seed}"] for seed in found}
        against = [loss(row) - loss(base[seed]) for seed, row in found.items()]
        trained = [end_loss(row) - end_loss(base[seed]) for seed, row in found.items()]
        error = f" +- {100 * statistics.stdev(against) / len(against) ** 0.5:.1f}" if len(against) > 2 else ""
        mean = f"**{change(statistics.mean(against))}**{error} ({', '.join(map(change, against))})"
        lines.append(
            [
                label,
                f"{statistics.mean(map(loss, found.values())):.4f}",
                ", ".join(f"{perplexity(found.values(), kind):.2f}" for kind in ("docs", "code")),
                "" if name == "relu" else mean,
                "" if name == "relu" else change(statistics.mean(trained)),
                percent(statistics.mean(map(zeros, found.values()))),
                percent(statistics.mean(map(dead, found.values()))),
            ]
        )
    heads = ("trained with", "loss", "perplexity: docs, code", "perplexity against ReLU's (each seed)")
    heads += ("at the end of training", "zeros", "dead")  # type: ignore[assignment]
    return table(heads, lines)


def perplexity(found: Iterable[dict[str, Any]], kind: str) -> float:
    return statistics.mean(row[f"{kind}-test"]["perplexity"] for row in found)


def sweep_table(all_rows: Rows) -> str:
    """Seed 0: loss and zeros by p and alpha; SiLU before the switch is p = 1."""

    def cell(name: str) -> str:
        row = all_rows.get(name)
        return "not run" if row is None else f"{loss(row):.4f} at {percent(zeros(row))}"

    kinds = {"0.3": "stocha30", "0.5": "stocha50", "0.7": "stocha70", "1 (Swi+FT)": "swi"}
    lines = [[p, *(cell(f"{kind}-{alpha}-1e-3") for alpha in ("05", "10", "20"))] for p, kind in kinds.items()]
    return table(("p", "alpha 0.05", "alpha 0.1", "alpha 0.2"), lines)


def variants_table(all_rows: Rows) -> str:
    relu = loss(all_rows["relu-1e-3"])
    lines = []
    for label, name in VARIANTS.items():
        row = all_rows[f"{name}-1e-3"]
        against = "" if name == "relu" else change(loss(row) - relu)
        lines.append([label, f"{loss(row):.4f}", against, percent(zeros(row)), percent(dead(row))])
    return table(("trained with", "loss", "perplexity against ReLU's", "zeros", "dead"), lines)


def rates_table(all_rows: Rows) -> str:
    """On the texts for choosing."""
    rates = ("5e-4", "1e-3", "2e-3")
    kinds = {
        "SiLU": "silu",
        "ReLU": "relu",
        "StochA+FT, p 0.5, alpha 0.05": "stocha50-05",
        "StochA+FT, p 0.5, alpha 0.2": "stocha50-20",
        "Swi+FT, alpha 0.2": "swi-20",
    }

    def cell(name: str) -> str:
        row = all_rows.get(name)
        if row is None:
            return "not run"
        return f"{loss(row, 'tune'):.4f}" + ("" if name.startswith("silu") else f" at {percent(zeros(row))}")

    return table(
        ("loss on the texts for choosing", *rates),
        [[label, *(cell(f"{name}-{rate}") for rate in rates)] for label, name in kinds.items()],
    )


def held_table(all_rows: Rows) -> str:
    """Seed 1, from the same checkpoints at 80% of training."""
    names = {
        "ReLU to the end": "relu-1e-3-s1",
        "ReLU, then thresholds to 90%": "relu-held90-1e-3-s1",
        "StochA p 0.7, then ReLU": "stocha70-20-1e-3-s1",
        "StochA p 0.7, then thresholds to 90%": "stocha70-held90-1e-3-s1",
        "ReLU, L1 to 90%": "relu-l1-1e-3-s1",
        "StochA p 0.7, then ReLU, L1 to 90%": "stocha70-l1-1e-3-s1",
    }
    return table(
        ("trained with, seed 1", "loss", "zeros", "dead"),
        [
            [label, f"{loss(row):.4f}", percent(zeros(row)), percent(dead(row))]
            for label, name in names.items()
            if (row := all_rows.get(name))
        ],
    )


def again_table(all_rows: Rows) -> str:
    """The same run, seed and data, on two machines."""
    lines = []
    for label, name in AGAIN.items():
        for row in (all_rows[f"{name}-1e-3-s1"], all_rows[f"{name.removesuffix('-whole')}-again-1e-3-s1"]):
            machine = f"{row['machine']}, {row['device']}"
            lines.append([label, machine, f"{loss(row):.4f}", f"{end_loss(row):.4f}", percent(zeros(row))])
    return table(("trained with, seed 1", "machine", "loss", "at the end of training", "zeros"), lines)


def noise_table(all_rows: Rows) -> str:
    """By the likelihood of the samples under the other model, the highest first."""
    found = sorted(noise_rows(), key=lambda row: -row["log_likelihood_judge"])
    heads = (
        "decoding",
        "log-likelihood",
        "under the model itself",
        "distinct-1",
        "distinct-2",
        "distinct-3",
        "self-BLEU",
    )
    keys = ("log_likelihood_judge", "log_likelihood_own", "distinct_1", "distinct_2", "distinct_3")
    return table(
        heads,
        [[decoding(row), *(f"{row[key]:.3f}" for key in keys), f"{row['self_bleu']:.1f}"] for row in found],
    )


def noise_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in NOISE.read_text().splitlines()]


def decoding(row: dict[str, Any]) -> str:
    if not row["way"]:
        return "greedy"
    (name, value), *_ = row["way"].items()
    return f"StochA, p = {value:g}" if name == "p" else f"temperature {value:g}"


def swapped_table(all_rows: Rows) -> str:
    """Seed 1: what a model is worth under other activations than it was trained with."""
    silu, whole, tuned = (all_rows[f"{name}-1e-3-s1"] for name in ("silu", "stocha70-whole", "stocha70-20"))
    lines = [
        ["SiLU", "SiLU", f"{loss(silu):.4f}"],
        ["SiLU", "ReLU", f"{loss(silu, mode='relu'):.4f}"],
        ["StochA p 0.7 to the end", "SiLU", f"{loss(whole):.4f}"],
        ["StochA p 0.7 to the end", "mean of StochA", f"{loss(whole, mode='mean'):.4f}"],
        ["StochA p 0.7 to the end", "ReLU", f"{loss(whole, mode='relu'):.4f}"],
        ["StochA p 0.7 for 80%, then ReLU", "ReLU", f"{loss(tuned):.4f}"],
    ]
    return table(("trained with, seed 1", "evaluated with", "loss"), lines)


def probes_table(all_rows: Rows) -> str:
    names = {
        "ReLU, 1e-3, seed 1": "relu-1e-3-s1",
        "StochA p 0.7, 1e-3, seed 1": "stocha70-05-1e-3-s1",
        "SiLU, 1e-3, seed 1": "silu-1e-3-s1",
        "ReLU, 2e-3": "relu-2e-3",
        "StochA p 0.5, 2e-3": "stocha50-05-2e-3",
        "SiLU, 2e-3": "silu-2e-3",
    }
    lines = []
    for label, name in names.items():
        probes = [all_rows[name]["probes"][index] for index in (0, 2, 8)]  # the last one before any switch
        told = [percent(probe["dead"]) for probe in probes]
        last = probes[-1]
        told += [percent(last["negative_gates"]), percent(last["gradient_at_negative_gates"])]
        lines.append([label, *told, percent(last["gradient_to_dead_neurons"], 2)])
    heads = (
        "trained with",
        "dead at 10%",
        "at 30%",
        "at 90%",
        "gates below 0",
        "their gradient",
        "gradient to the dead",
    )
    return table(heads, lines)


def sizes_table(all_rows: Rows) -> str:
    """Seed 0, learning rate 1e-3, for both sizes."""
    lines = []
    for size, ending in SIZES.items():
        base = all_rows[f"relu-{ending}"]
        for label, name in {"ReLU": "relu", "StochA+FT, p 0.7, alpha 0.2": "stocha70-20"}.items():
            row = all_rows[f"{name}-{ending}"]
            told = [f"{perplexity([row], kind):.2f}" for kind in ("docs", "code")]
            against = ["", ""]
            if row is not base:
                against = [change(loss(row) - loss(base)), change(end_loss(row) - end_loss(base))]
            told = [size, label, f"{loss(row):.4f}", ", ".join(told), *against]
            lines.append([*told, percent(zeros(row)), percent(dead(row))])
    heads = ("parameters", "trained with", "loss", "perplexity: docs, code", "perplexity against ReLU's")
    return table((*heads, "at the end of training", "zeros", "dead"), lines)


TABLES: dict[str, Callable[[Rows], str]] = {
    "main": main_table,
    "sizes": sizes_table,
    "sweep": sweep_table,
    "variants": variants_table,
    "rates": rates_table,
    "held": held_table,
    "swapped": swapped_table,
    "again": again_table,
    "noise": noise_table,
    "probes": probes_table,
}


def filled(page: str, all_rows: Rows) -> str:
    """The page with its tables as the results have them."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not block.search(page):
            raise SystemExit(f"{PAGE} has no place for the table {name!r}: expected <!-- {name} --> and <!-- end -->")
        content = make(all_rows)
        page = block.sub(lambda found, content=content: f"{found[1]}\n{content}\n\n{found[2]}", page)  # type: ignore
    return page


def draw(all_rows: Rows) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    options: dict[str, Any] = {"dpi": 90, "bbox_inches": "tight"}
    figure, axes = plt.subplots(figsize=(7.5, 3.2))
    labels = []
    for at, (label, name) in enumerate(reversed(MAIN.items())):
        found = [all_rows[key] for seed in SEEDS if (key := f"{name}-1e-3{seed}") in all_rows]
        axes.plot(list(map(loss, found)), [at] * len(found), "o", markersize=5)
        axes.plot([statistics.mean(map(loss, found))], [at], "k|", markersize=14)
        labels.append(f"{label}, {percent(statistics.mean(map(zeros, found)), 0)} zeros")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="loss on held-out text, nats; a dot a seed, a bar their mean")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(IMAGES / "pretraining-loss.png", **options)

    figure, axes = plt.subplots(figsize=(7.5, 3.6))
    base = {step: value for step, value, _ in all_rows["silu-1e-3-s1"]["curve"]}
    for label, name in {
        "ReLU": "relu",
        "StochA+FT, p 0.7, alpha 0.2": "stocha70-20",
        "Swi+FT, alpha 0.2": "swi-20",
    }.items():
        curve = [(step, value - base[step]) for step, value, _ in all_rows[f"{name}-1e-3-s1"]["curve"] if step > 300]
        axes.plot(*zip(*curve, strict=True), label=label, linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(xlabel="step of 3060", ylabel="training loss above SiLU's, nats", ylim=(-0.08, 0.21))
    axes.legend(fontsize=8, loc="upper center")
    figure.savefig(IMAGES / "pretraining-switch.png", **options)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    runs = {
        "ReLU, 1e-3": "relu-1e-3-s1",
        "StochA p 0.7, 1e-3": "stocha70-05-1e-3-s1",
        "ReLU, 2e-3": "relu-2e-3",
        "StochA p 0.5, 2e-3": "stocha50-05-2e-3",
        "SiLU, 2e-3": "silu-2e-3",
    }
    for label, name in runs.items():
        probes = all_rows[name]["probes"]
        left.plot([probe["step"] for probe in probes], [100 * probe["dead"] for probe in probes], ".-", label=label)
    left.set(xlabel="step", ylabel="dead neurons under ReLU, %")
    left.legend(fontsize=8, loc="center right")
    layers: dict[str, str] = {"ReLU": "relu-1e-3-s1", "StochA+FT, alpha 0.2": "stocha70-20-1e-3-s1"}
    for label, name in (layers | {"Swi+FT, alpha 0.2": "swi-20-1e-3-s1"}).items():
        right.plot([100 * share for share in all_rows[name]["docs-test"]["zeros_per_layer"]], ".-", label=label)
    right.set(xlabel="layer", ylabel="zeros, %")
    right.legend(fontsize=8)
    figure.savefig(IMAGES / "pretraining-dead.png", **options)

    figure, both = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, key, label in zip(both, ("distinct_2", "self_bleu"), ("distinct-2", "self-BLEU"), strict=True):
        for name, kind in {"noise of the activation": "p", "temperature": "temperature"}.items():
            found = sorted((r for r in noise_rows() if not r["way"] or kind in r["way"]), key=lambda r: r[key])
            axes.plot([r["log_likelihood_judge"] for r in found], [r[key] for r in found], ".-", label=name)
        axes.set(xlabel="log-likelihood of the samples, nats a token", ylabel=label)
        axes.legend(fontsize=8)
    figure.savefig(IMAGES / "pretraining-noise.png", **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true", help="draw them too")
    args = parser.parse_args()
    all_rows = rows()
    PAGE.write_text(filled(PAGE.read_text(), all_rows))
    if args.pictures:
        IMAGES.mkdir(exist_ok=True)
        draw(all_rows)


if __name__ == "__main__":
    main()
