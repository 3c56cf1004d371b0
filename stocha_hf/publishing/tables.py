"""The measured part of a model card: Markdown and Hub metadata, from checked files and never typed.

measured_section(measured)   # a table, how it was measured, pictures, diversity
measured_metadata(measured)  # for ModelCardData: model-index and the weights' hash
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stocha_hf.measurement.figures import VALUES
from stocha_hf.publishing.markdown import code, text
from stocha_hf.publishing.measurements import FOLDER, HASH_KEY, Measurements

EVALUATED = (
    "Perplexity and zeros: {tokens:,} tokens of {data} in windows of {length}, {dtype}, on {hardware} ({command}). "
    "The layers have {least:.0%} to {most:.0%} zeros; {never:.1%} of the neurons never fired, and of those that "
    "fired, {again:.0%} had fired at the token before. Bytes read: the share of the decoder blocks' bytes that a "
    "decode step reads."
)
COMPARED = (
    "Against the model before: KL divergence {kl:.3f} nats a token, the same most likely token at "
    "{top1_agreement:.0%} of the tokens."
)
CUT = "Inputs were cut {inputs_cut}, also where a window of text is read."
DOUBTED = (
    "{share:.0%} of the tokens were in doubt, and read again without cuts: their bytes are counted, and their second "
    "predictions are the ones measured."
)
DECODED = (
    "Decoding{of}: {dtype}, batch {batch}, {new_tokens} tokens after {prompt}{cut}, dense and sparse in turn in one "
    "run, on {hardware}, whose memory read {read_gbps:.0f} GB/s meanwhile ({command})."
)
SHARE_CUT = ", {:.0%} of the inputs cut"
TASKS = (
    "Tasks: {dtype}, on {hardware} ({command}). `humaneval` and `bigbench:` as stocha_hf defines them, other tasks as "
    "lm-evaluation-harness does. ± is one standard error; a difference is taken question by question, with its 95% "
    "interval."
)
READ = "In {task} {what} {share:.0%} of the bytes of the decoder blocks, on {texts:,} of the answers{how}."
DRAFTED = (
    ": the cuts drafted and the model verified without them, so the answers are those of the model without cuts, up "
    "to rounding. Of {offered:,} drafted tokens, {copied:,} of them copied from the text before, it accepted "
    "{accepted:,}"
)
COPIED = (
    ": what stood in the text before was drafted, and the model verified it without cuts, so the answers are those of "
    "the model without cuts, up to rounding. Of {copied:,} drafted tokens it accepted {accepted:,}"
)
REPEATED = ", {:.0%} of the steps computed again without cuts"
DIVERSITY = (
    "{samples} samples of each of {count} prompts, {new} tokens at most, {dtype} ({command}). Log-likelihood: of "
    "the samples' tokens under this model without noise. `stocha`: the most likely token at every step, with the "
    "activation's noise alone."
)


def measured_metadata(measured: Measurements) -> dict[str, Any]:
    """Return the results as ModelCardData takes them, and the hash of the weights that they are of."""
    from huggingface_hub import EvalResult

    own = measured.evaluation
    data = Path(own["data"]).name
    shared: Any = {"task_type": "text-generation", "dataset_type": data, "dataset_name": data}
    values = {
        f"perplexity, {own['length']} tokens a window": ("perplexity", own["perplexity"]),
        "zeros in the FFN's hidden vector": ("sparsity", own["sparsity"]["mean"]),
    }
    results = [
        EvalResult(**shared, metric_name=name, metric_type=kind, metric_value=round(value, 4))
        for name, (kind, value) in values.items()
    ]
    for score in (measured.tasks or {}).get("tasks", []):
        name, metric = f"{score['task']}, {score['questions']} questions", score["metric"]
        about: Any = {"task_type": "text-generation", "dataset_type": score["task"], "dataset_name": name}
        results.append(
            EvalResult(**about, metric_name=metric, metric_type=metric, metric_value=round(score["score"], 4))
        )
    return {"model_name": measured.folder.resolve().name, "eval_results": results, HASH_KEY: measured.weights}


def measured_section(measured: Measurements) -> str:
    """Return Markdown: a table of before, other rows and this model; how it was measured; pictures; tasks; samples."""
    parts = ["## Measured", _table(measured), *_how(measured), f"![Zeros by layer]({FOLDER}/zeros.png)"]
    if measured.tasks is not None:
        parts += _tasks(measured.tasks)
    if measured.generation is not None:
        parts += [_diversity(measured.generation)]
        if measured.is_drawn:
            parts.append(f"![Diversity against likelihood]({FOLDER}/diversity.png)")
    if measured.notes is not None:
        parts.append(measured.notes.strip())
    return "\n\n".join(parts)


def _table(measured: Measurements) -> str:
    before, bench = measured.evaluation.get("baseline"), measured.bench
    lines = ["| | activation | perplexity | zeros in the FFN | bytes read | decoding |", f"|{' --- |' * 6}"]
    if before is not None:
        lines.append(_row(text(f"before: {before['model']}"), before, _speed(bench, "dense_ms")))
    lines += [_row(text(label), row, _faster(measured.row_benches.get(label))) for label, row in measured.rows.items()]
    lines.append(_row("**this model**", measured.evaluation, _faster(bench)))
    return "\n".join(lines)


def _row(label: str, row: dict[str, Any], speed: str) -> str:
    zeros = f"{row['sparsity']['mean']:.1%}"
    read = "" if row.get("bytes_read") is None else f"{row['bytes_read']['share']:.0%}"  # not in older files
    return f"| {label} | {text(row['activation'])} | {row['perplexity']:.2f} | {zeros} | {read} | {speed} |"


def _speed(bench: dict[str, Any] | None, key: str) -> str:
    return f"{bench['batch'] * 1e3 / bench[key]:.1f} tokens/s" if bench else ""


def _faster(bench: dict[str, Any] | None) -> str:
    return f"{_speed(bench, 'sparse_ms')}, {bench['speedup']:.1f}x" if bench else ""


def _how(measured: Measurements) -> list[str]:
    own, zeros = measured.evaluation, measured.evaluation["sparsity"]["per_layer"]
    shares = {"least": min(zeros), "most": max(zeros)}
    shares |= {"never": own["never_active"]["mean"], "again": own["reuse"]["mean"]}
    parts = [EVALUATED.format(**_escaped(own) | shares | {"data": text(Path(own["data"]).name)})]
    if own.get("inputs_cut"):
        parts[0] += " " + CUT.format(inputs_cut=text(own["inputs_cut"]))
    if own.get("fallback"):  # not in older files
        parts[0] += " " + DOUBTED.format(share=own["fallback"]["share"])
    if "kl" in own:
        parts.append(COMPARED.format(**own))
    benches = {} if measured.bench is None else {"": measured.bench}
    for label, bench in (benches | measured.row_benches).items():
        share = bench.get("inputs_cut")  # not in older files
        added = {"of": f", {text(label)}" if label else "", "cut": SHARE_CUT.format(share) if share else ""}
        parts.append(DECODED.format(**_escaped(bench) | added))
    return parts


def _escaped(content: dict[str, Any]) -> dict[str, Any]:
    """A file's values, those that are text safe in Markdown, the command as code."""
    safe = {key: text(value) if isinstance(value, str) else value for key, value in content.items()}
    return safe | {"command": code(content["command"])}


def _tasks(measured: dict[str, Any]) -> list[str]:
    """A table of scores, beside the model's before and the differences where there are such."""
    before = {(row["task"], row["metric"]): row for row in (measured.get("baseline") or {}).get("tasks", [])}
    differences = {(row["task"], row["metric"]): row for row in measured.get("task_differences") or []}
    heads = ["task", "questions", "**this model**"]
    if before:
        heads += [text(f"before: {measured['baseline']['model']}"), "difference"]
    rows = [heads, ["---"] * len(heads)]
    for row in measured["tasks"]:
        key = row["task"], row["metric"]
        cells = [text(", ".join(key)), f"{row['questions']:,}", _score(row)]
        if before:
            found = differences.get(key)
            told = f"{found['difference']:+.1%} ({found['low']:+.1%} to {found['high']:+.1%})" if found else ""
            cells += [_score(before[key]) if key in before else "", told]
        rows.append(cells)
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return ["### Tasks", "\n".join(lines), TASKS.format(**_escaped(measured)), *_readings(measured)]


def _readings(measured: dict[str, Any]) -> Iterator[str]:
    """What was read while answers were written, a sentence a task."""
    for reading in measured.get("task_bytes") or []:
        drafts, fallback, how = reading.get("drafts"), reading.get("fallback"), ""
        if drafts:
            copied = drafts.get("copied", 0)  # not in older files
            how = DRAFTED if drafts["drafted"] else COPIED
            how = how.format(offered=drafts["drafted"] + copied, copied=copied, accepted=drafts["accepted"])
        elif fallback:
            how = REPEATED.format(fallback["share"])
        yield READ.format(
            task=text(reading["task"]),
            what="a token took" if drafts else "a decode step read",
            share=reading["bytes_read"]["share"],
            texts=reading["texts"],
            how=how,
        )


def _score(row: dict[str, Any]) -> str:
    return f"{row['score']:.1%}" + ("" if row["stderr"] is None else f" ± {row['stderr']:.1%}")


def _diversity(generation: dict[str, Any]) -> str:
    parts = [
        "### Diversity of samples",
        DIVERSITY.format(**_escaped(generation), count=len(generation["prompts"])),
        "| decoding | log-likelihood a token | distinct 2-grams | self-BLEU |\n| --- | --- | --- | --- |",
    ]
    for run in generation["runs"]:
        key = VALUES[run["decoding"]]
        name = run["decoding"] + (", p" if key == "p" else "") + (f" {run[key]:g}" if key else "")
        bleu = "" if run["self_bleu"] is None else f"{run['self_bleu']:.1f}"
        parts[-1] += f"\n| {name} | {run['log_likelihood']:.3f} | {run['distinct_2']:.3f} | {bleu} |"
    return "\n\n".join(parts)
