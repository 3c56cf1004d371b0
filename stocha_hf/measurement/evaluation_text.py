"""What stocha-eval found, in lines of text: a model's figures, its tasks, and how far it is from a baseline.

evaluation_text(json.load(open("eval.json")))    # what the command prints without --json
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from stocha_hf.measurement.figures import evaluated


def evaluation_text(figures: dict[str, Any]) -> str:
    """Return the lines of what stocha-eval prints with --json."""
    lines = [line for row in evaluated(figures) for line in _model_lines(row)]
    lines += _answer_lines(figures)
    lines += [line for row in evaluated(figures) for line in _task_lines(row)]
    for row in figures.get("task_differences", []):
        lines.append(
            f"{row['task']}, {row['metric']}: {row['difference']:+.1%} from the second to the first (95%: "
            f"{row['low']:+.1%} to {row['high']:+.1%}); better at {row['won']}, worse at {row['lost']} of "
            f"{row['questions']}"
        )
    if "kl" in figures:
        lines.append(
            f"from the second to the first: KL {figures['kl']:.4f}, same top token {figures['top1_agreement']:.1%}"
        )
    return "\n".join(lines)


def _model_lines(row: dict[str, Any]) -> Iterator[str]:
    if "perplexity" not in row:
        return
    zeros, unused = row["sparsity"]["per_layer"], row["aggregated_sparsity"]
    yield (
        f"{row['model']} ({row['activation']}): perplexity {row['perplexity']:.3f} on {row['tokens']} tokens; "
        f"zeros {row['sparsity']['mean']:.1%}, by layer {min(zeros):.1%} to {max(zeros):.1%}; never active "
        f"{row['never_active']['mean']:.2%}; active at the token before as well {row['reuse']['mean']:.1%}; "
        f"active at none of {unused['tokens'][-1]} tokens {unused['mean'][-1]:.1%}"
    )
    if bytes_read := row.get("bytes_read"):
        yield f"  a decode step reads {bytes_read['share']:.1%} of its blocks' bytes"
        if cut := row.get("inputs_cut"):
            yield f"  projections' inputs are cut {cut}"
        yield from _fallback_lines(row)
    for point in row.get("cett", []):
        yield f"  truncated at CETT {point['cett']:g}: {_point_text(point)}"
    if point := row.get("ppl_sparsity"):
        yield f"  PPL-{point['percent']:g}%: {_point_text(point)}, at CETT {point['cett']:.3f}"


def _answer_lines(row: dict[str, Any]) -> Iterator[str]:
    if not (found := row.get("answers")):
        return
    of = f"{found['tokens']} tokens of {found['rows']} answers"
    yield f"{row['model']}: perplexity {found['perplexity']:.3f} on {of}"
    yield f"  a decode step reads {found['bytes_read']['share']:.1%} of its blocks' bytes"
    yield from _fallback_lines(found)
    if found["kl"] is not None:
        yield (
            f"  from the second to the first: KL {found['kl']:.4f}, same top token {found['top1_agreement']:.1%}; "
            f"perplexity of the second {found['baseline_perplexity']:.3f}"
        )


def _task_lines(row: dict[str, Any]) -> Iterator[str]:
    for score in row.get("tasks", []):
        error = "" if score["stderr"] is None else f" +- {score['stderr']:.1%}"
        yield f"{row['model']}: {score['task']}, {score['metric']} {score['score']:.1%}{error} of {score['questions']}"
    for reading in row.get("task_bytes", []):
        share = reading["bytes_read"]["share"]
        per = "a token takes" if reading.get("drafts") else "a decode step reads"
        yield f"{row['model']}: {reading['task']}, {per} {share:.1%} of its blocks' bytes"
        yield from _fallback_lines(reading)
        yield from _draft_lines(reading)


def _fallback_lines(row: dict[str, Any]) -> Iterator[str]:
    if found := row.get("fallback"):
        earlier = f", with the tokens before it, {found['tokens']} in all" if found["tokens"] > 1 else ""
        yield (
            f"  {found['share']:.1%} of {found['steps']} steps, whose most likely token had a probability below "
            f"{found['below']:g}, were computed again without cuts{earlier}; one with cuts reads "
            f"{found['cut_share']:.1%}"
        )


def _draft_lines(row: dict[str, Any]) -> Iterator[str]:
    if found := row.get("drafts"):
        offered = [
            f"{found['drafted']} were drafted, each for {found['cut_share']:.1%} of the bytes",
            f"{found.get('copied', 0)} copied from the text",
        ]
        some = [text for text in offered if not text.startswith("0 ")]
        told = f"{', '.join(some)}, and {found['accepted']} of them stood" if some else "none were drafted"
        yield f"  {found['steps']} tokens: {told}; {found['verifications']} steps without cuts checked them"


def _point_text(point: dict[str, Any]) -> str:
    return f"zeros {point['sparsity']['mean']:.1%}, perplexity {point['perplexity']:.3f}"
