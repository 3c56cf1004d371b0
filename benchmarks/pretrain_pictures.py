"""The pictures of docs/experiments/pretraining.md: docs/images/pretraining-*.png, from the results files alone.

python benchmarks/pretrain_pictures.py          # needs matplotlib
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import matplotlib
from pretrain_report import (
    ANEW,
    LARGER,
    LONG,
    MAIN,
    PASS,
    ROOT,
    SEEDS,
    Rows,
    by_seed,
    label_of,
    loss,
    noise_rows,
    percent,
    rows,
    zeros,
)

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = ROOT / "docs/images"
SKIPPED, GROUP = 25, 10  # logged values of the long runs: without the first 500 steps, means of 200 steps
OPTIONS: dict[str, Any] = {"dpi": 90, "bbox_inches": "tight"}


def losses(all_rows: Rows) -> None:
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
    figure.savefig(IMAGES / "pretraining-loss.png", **OPTIONS)


def switch(all_rows: Rows) -> None:
    """Training losses above SiLU's on the same tokens: the small model, and the larger one on the text made anew."""
    figure, both = plt.subplots(1, 2, figsize=(10, 3.6))
    runs = {
        "34M, seed 1": ("1e-3-s1", 300, {"xlabel": "step of 3060", "ylim": (-0.08, 0.21)}),
        "136M, seed 3": (ANEW, 500, {"xlabel": "step of 9156", "ylim": (-0.03, 0.08)}),
    }
    for axes, (title, (ending, skipped, options)) in zip(both, runs.items(), strict=True):
        base = {step: value for step, value, _ in all_rows[f"silu-{ending}"]["curve"]}
        for name, colour in {"relu": "tab:blue", "stocha70-20": "tab:orange", "swi-20": "tab:green"}.items():
            curve = all_rows.get(f"{name}-{ending}", {}).get("curve", [])
            points = [(step, value - base[step]) for step, value, _ in curve if step > skipped]
            if points:
                axes.plot(*zip(*points, strict=True), label=label_of(name), color=colour, linewidth=1)
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(title=title, ylabel="training loss above SiLU's, nats", **options)
        axes.legend(fontsize=8, loc="upper center" if title.startswith("34M") else "upper left")
    figure.tight_layout()
    figure.savefig(IMAGES / "pretraining-switch.png", **OPTIONS)


def longer(all_rows: Rows) -> None:
    """The long runs: training losses below ReLU's on the same tokens, and dead neurons by layer at the end."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    base = {seed: row["curve"] for seed, row in by_seed(all_rows, f"relu-{LONG}").items()}
    colours = dict(zip(LARGER.values(), ("tab:green", "tab:orange", "tab:blue", "tab:red"), strict=True))
    for label, name in LARGER.items():
        for seed, row in by_seed(all_rows, f"{name}-{LONG}").items():
            told = {"label": label if not seed else None, "color": colours[name], "linewidth": 1}
            if "dead_per_layer" in row.get("docs-test", {}) and name != "silu":
                right.plot([100 * share for share in row["docs-test"]["dead_per_layer"]], ".-", **told)
            pairs = list(zip(row["curve"], base[seed], strict=False))
            groups = [pairs[at : at + GROUP] for at in range(SKIPPED, len(pairs) - GROUP + 1, GROUP)]
            ends = [group[-1][0][0] for group in groups]
            gains = [statistics.mean(one[1] - other[1] for one, other in group) for group in groups]
            if name != "relu":
                left.plot(ends, gains, **told)
    for step in (PASS, 2 * PASS):
        left.axvline(step, color="grey", linewidth=0.5, linestyle=":")
    left.axhline(0, color="grey", linewidth=0.5)
    left.set(xlabel="step of 9156; dotted: the text begins again", ylabel="training loss less ReLU's, nats")
    left.legend(fontsize=8)
    right.set(xlabel="layer", ylabel="dead neurons at the end, %")
    right.legend(fontsize=8)
    figure.savefig(IMAGES / "pretraining-long.png", **OPTIONS)


def dead(all_rows: Rows) -> None:
    """Dead neurons on the way, and zeros by layer at the end."""
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
    figure.savefig(IMAGES / "pretraining-dead.png", **OPTIONS)


def noise(all_rows: Rows) -> None:
    figure, both = plt.subplots(1, 2, figsize=(9, 3.4))
    for axes, key, label in zip(both, ("distinct_2", "self_bleu"), ("distinct-2", "self-BLEU"), strict=True):
        for name, kind in {"noise of the activation": "p", "temperature": "temperature"}.items():
            found = sorted((r for r in noise_rows() if not r["way"] or kind in r["way"]), key=lambda r: r[key])
            axes.plot([r["log_likelihood_judge"] for r in found], [r[key] for r in found], ".-", label=name)
        axes.set(xlabel="log-likelihood of the samples, nats a token", ylabel=label)
        axes.legend(fontsize=8)
    figure.savefig(IMAGES / "pretraining-noise.png", **OPTIONS)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    IMAGES.mkdir(exist_ok=True)
    for draw in (losses, longer, switch, dead, noise):
        draw(rows())


if __name__ == "__main__":
    main()
