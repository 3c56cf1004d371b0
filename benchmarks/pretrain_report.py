"""The tables of docs/experiments/pretraining.md, from the results files alone; benchmarks/pretrain_pictures.py draws.

    python benchmarks/pretrain_report.py            # rewrites the tables between the page's markers

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
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/pretrain_h100.jsonl"
NOISE = ROOT / "benchmarks/results/pretrain_noise.jsonl"
TASKS = ROOT / "benchmarks/results/pretrain_tasks.jsonl"
PAGE = ROOT / "docs/experiments/pretraining.md"
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
SIZES = {  # seed 0
    "33.6M, 1e-3": "1e-3",
    "136M, 1e-3": "135m-1e-3",
    "136M, 5e-4": "135m-5e-4",
}
LONG = "135m-300m"  # 136M parameters, 300M tokens: the ending of these runs' names
LARGER = {"SiLU": "silu", "Swi+FT, alpha 0.2": "swi-20", "StochA+FT, p 0.7, alpha 0.2": "stocha70-20", "ReLU": "relu"}
EARLIER = "135m-5e-4"  # the first models that were asked tasks, of 66M tokens
REFERENCE = "SmolLM2-135M-Instruct"
GROUPS = {"agreement": "agreement", "code": "code, ", "BIG-bench": "bigbench:"}  # and how names of their tasks begin
HELD_OUT = {"documentation": "docs", "code": "code"}
PASS = 3441  # steps in which the long runs see the text once
FIRST, THIRD = "training text seen for the first time, noise on", "training text seen for the third time, ReLU on"
TRAINED = {FIRST: (2440, 3440), THIRD: (8080, 9080)}  # steps of the long runs, (after, to); one was cut off after 9080
# Seed 3 is on another text, with another tokenizer: its runs are compared with each other alone, so SEEDS lacks it.
ANEW, ANEW_BASE = f"{LONG}-s3", "stocha70-20"  # ReLU was not run there; 3,431 steps see that text once
ANEW_TRAINED = {FIRST: (2420, 3420), THIRD: (8140, 9140)}
Rows = dict[str, dict[str, Any]]


def rows() -> Rows:
    """By name; of a run that was cut off there is an error, and a curve."""
    return {row["name"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def by_seed(all_rows: Rows, name: str) -> Rows:
    """The runs of a name that there are, by the ending of their seed."""
    return {seed: all_rows[f"{name}{seed}"] for seed in SEEDS if f"{name}{seed}" in all_rows}


def scored(runs: Rows) -> Rows:
    return {seed: row for seed, row in runs.items() if "error" not in row}


def loss(row: dict[str, Any], half: str = "test", mode: str | None = None) -> float:
    return statistics.mean(loss_on(row, f"{kind}-{half}", mode) for kind in HELD_OUT.values())


def loss_on(row: dict[str, Any], text: str, mode: str | None = None) -> float:
    return math.log((row[text][mode] if mode else row[text])["perplexity"])


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
    return training_loss(row, after=0.975 * last, to=last)


def training_loss(row: dict[str, Any], after: float, to: float) -> float:
    return statistics.mean(value for step, value, _ in row["curve"] if after < step <= to)


def changes(differences: list[float]) -> str:
    """Their mean, its standard error, and each."""
    error = f" +- {100 * standard_error(differences):.1f}" if len(differences) > 2 else ""
    each = f" ({', '.join(map(change, differences))})" if len(differences) > 1 else ""
    return f"**{change(statistics.mean(differences))}**{error}{each}"


def standard_error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


def main_table(all_rows: Rows) -> str:
    lines = []
    for label, name in MAIN.items():
        found = by_seed(all_rows, f"{name}-1e-3")
        base = {seed: all_rows[f"relu-1e-3{seed}"] for seed in found}
        against = [loss(row) - loss(base[seed]) for seed, row in found.items()]
        trained = [end_loss(row) - end_loss(base[seed]) for seed, row in found.items()]
        lines.append(
            [
                label,
                f"{statistics.mean(map(loss, found.values())):.4f}",
                ", ".join(f"{perplexity(found.values(), kind):.2f}" for kind in ("docs", "code")),
                "" if name == "relu" else changes(against),
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


def long_table(all_rows: Rows, ending: str = LONG) -> str:
    """The long runs, each seed's figures side by side."""
    lines = []
    for label, name in LARGER.items():
        found = scored(by_seed(all_rows, f"{name}-{ending}"))
        told = [[f"{perplexity([row], kind):.2f}" for row in found.values()] for kind in HELD_OUT.values()]
        told += [[percent(value(row)) for row in found.values()] for value in (zeros, dead)]
        if found:
            lines.append([label, *map(", ".join, told)])
    heads = ("trained with", *(f"perplexity: {label}" for label in HELD_OUT), "zeros", "dead")
    return table(heads, lines)


def texts_table(
    all_rows: Rows, ending: str = LONG, base: str = "relu", trained: dict[str, tuple[int, int]] = TRAINED
) -> str:
    """What each schedule gains over `base` on each text; on training text also what a run gained that was cut off."""
    found = {label: by_seed(all_rows, f"{name}-{ending}") for label, name in LARGER.items()}
    bases = found.pop(label_of(base))
    runs = {label: seeds for label, seeds in found.items() if seeds}
    lines = []

    def add(label: str, value: Callable[[dict[str, Any]], float], columns: Iterable[Rows]) -> None:
        gains = [[value(row) - value(bases[seed]) for seed, row in seeds.items()] for seeds in columns]
        lines.append([label, *(changes(gain) if gain else "" for gain in gains)])

    for half in ("test", "tune"):
        for label, kind in HELD_OUT.items():
            add(f"{label}, {half}", partial(loss_on, text=f"{kind}-{half}"), map(scored, runs.values()))
        add(f"**both, {half}**", partial(loss, half=half), map(scored, runs.values()))
    for label, (after, to) in trained.items():
        add(label, partial(training_loss, after=after, to=to), runs.values())
    return table((f"perplexity against {short(base)}'s", *runs), lines)


def label_of(kind: str) -> str:
    return next(label for label, name in LARGER.items() if name == kind)


def short(kind: str) -> str:
    """Without p and alpha."""
    return label_of(kind).partition(",")[0]


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
        "ReLU^2": "relu2",
        "the mean of StochA, p 0.5, alpha 0.05": "mean50-05",
        "p from 0.7 to 0, then ReLU": "annealed",
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
    found = {label: [all_rows[name]["probes"][index] for index in (0, 2, 8)] for label, name in names.items()}
    return looked_at(("10%", "30%", "90%"), found)


def long_probes_table(all_rows: Rows) -> str:
    """The long runs' first seed: every fifth of training with noise."""
    found = {label: all_rows[f"{name}-{LONG}"].get("probes", [])[:3] for label, name in LARGER.items()}
    return looked_at(("20%", "40%", "60%"), {label: probes for label, probes in found.items() if probes})


def looked_at(times: Iterable[str], found: dict[str, list[dict[str, Any]]]) -> str:
    """Checkpoints of training before any switch; the shares of the gates and of the gradient are the last one's."""
    lines = []
    for label, probes in found.items():
        last = probes[-1]
        told = [percent(probe["dead"]) for probe in probes]
        told += [percent(last["negative_gates"]), percent(last["gradient_at_negative_gates"])]
        lines.append([label, *told, percent(last["gradient_to_dead_neurons"], 2)])
    heads = (*(f"dead at {time}" for time in times), "gates below 0", "their gradient", "gradient to the dead")
    return table(("trained with", *heads), lines)


def sizes_table(all_rows: Rows) -> str:
    lines = []
    for size, ending in SIZES.items():
        base = all_rows.get(f"relu-{ending}")
        for label, name in LARGER.items():
            row = all_rows.get(f"{name}-{ending}")
            if row is None or base is None:
                continue
            told = [f"{perplexity([row], kind):.2f}" for kind in ("docs", "code")]
            against = ["", ""]
            if row is not base:
                against = [change(loss(row) - loss(base)), change(end_loss(row) - end_loss(base))]
            told = [size, label, f"{loss(row):.4f}", ", ".join(told), *against]
            lines.append([*told, percent(zeros(row)), percent(dead(row))])
    heads = ("parameters, rate", "trained with", "loss", "perplexity: docs, code", "perplexity against ReLU's")
    return table((*heads, "at the end of training", "zeros", "dead"), lines)


Asked = dict[str, dict[str, dict[str, Any]]]  # by model, by task


def asked() -> Asked:
    """The models of the bench that were asked all tasks, and the reference."""
    found: Asked = {}
    for row in map(json.loads, TASKS.read_text().splitlines()):
        found.setdefault(row["model"], {})[row["task"]] = row
    whole = max(map(len, found.values()))
    return {model: tasks for model, tasks in found.items() if len(tasks) == whole or model == REFERENCE}


def tasks_table(all_rows: Rows) -> str:
    """A line a task, and one for all questions of a group; the seeds side by side."""
    return asked_table(asked(), LONG, in_groups=False)


def earlier_table(all_rows: Rows) -> str:
    """The same of the models with fewer tokens, of which one seed was asked: by groups."""
    return asked_table(asked(), EARLIER, in_groups=True)


def anew_tasks_table(all_rows: Rows) -> str:
    """The same of the models of the text made anew: by groups, against StochA+FT."""
    return asked_table(asked(), ANEW, in_groups=True, base=ANEW_BASE, beside=False)


def asked_table(models: Asked, ending: str, in_groups: bool, base: str = "relu", beside: bool = True) -> str:
    """With `beside` the reference has a column."""
    kinds = {label: name for label, name in LARGER.items() if f"{name}-{ending}" in models}
    others = [name for name in kinds.values() if name != base]
    tasks: list[tuple[str, list[str]]] = []
    for group, begins in GROUPS.items():
        members = [task for task in models[f"{base}-{ending}"] if task.startswith(begins)]
        tasks += [(task, [task]) for task in members if not in_groups]
        tasks.append((f"**{group}, all**", members))
    lines = []
    for title, names in tasks:
        told = [title, *size_and_chance([models[f"{base}-{ending}"][task] for task in names])]
        for name in kinds.values():
            told.append(shares(right(models, f"{name}-{ending}{seed}", names) for seed in SEEDS))
        told += [less(models, name, ending, names, base) for name in others]
        lines.append([*told, *([shares([right(models, REFERENCE, names)])] if beside else [])])
    heads = [f"{short(name)} less {short(base)}" for name in others]
    return table(["task", "questions", "chance", *kinds, *heads, *([REFERENCE] if beside else [])], lines)


def size_and_chance(found: list[dict[str, Any]]) -> list[str]:
    questions = sum(row["questions"] for row in found)
    return [str(questions), percent(sum(row["chance"] * row["questions"] for row in found) / questions)]


def shares(seeds: Iterable[list[int]]) -> str:
    return " / ".join(percent(statistics.mean(one)) for one in seeds if one)


def right(models: Asked, model: str, tasks: list[str]) -> list[int]:
    """Of each question of some tasks whether a model is right; nothing where it was not asked."""
    held = models.get(model, {})
    return [int(digit) for task in tasks for digit in held[task]["right"]] if set(tasks) <= held.keys() else []


def less(models: Asked, name: str, ending: str, tasks: list[str], base: str = "relu") -> str:
    """The difference to `base` in points: mean and standard error of the seeds; of one seed, over its questions."""
    sides = [[right(models, f"{one}-{ending}{seed}", tasks) for one in (name, base)] for seed in SEEDS]
    seeds = [[100.0 * (a - b) for a, b in zip(*both, strict=True)] for both in sides if all(both)]
    values = seeds[0] if len(seeds) == 1 else list(map(statistics.mean, seeds))
    if not any(values):
        return "0.0"
    return f"{statistics.mean(values):+.1f} +- {standard_error(values):.1f}"


TABLES: dict[str, Callable[[Rows], str]] = {
    "main": main_table,
    "long": long_table,
    "texts": texts_table,
    "anew": partial(long_table, ending=ANEW),
    "anew-texts": partial(texts_table, ending=ANEW, base=ANEW_BASE, trained=ANEW_TRAINED),
    "anew-tasks": anew_tasks_table,
    "sizes": sizes_table,
    "tasks": tasks_table,
    "earlier": earlier_table,
    "sweep": sweep_table,
    "variants": variants_table,
    "rates": rates_table,
    "held": held_table,
    "swapped": swapped_table,
    "again": again_table,
    "noise": noise_table,
    "probes": probes_table,
    "long-probes": long_probes_table,
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


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(filled(PAGE.read_text(), rows()))


if __name__ == "__main__":
    main()
