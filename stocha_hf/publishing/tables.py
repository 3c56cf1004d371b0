"""The measured part of a model card, from the files that the verbs write with --json, never typed.

A folder keeps these files and their pictures in measurements/. Each holds the hash of the weights that it tells of,
and nothing is said of a folder whose weights have another one.

    measured = Measured.read(folder, evaluation="eval.json", rows={"swapped": "swapped.json"}, bench="bench.json")
    measured.section()   # Markdown
    measured.metadata()  # for ModelCardData: model-index and the hash
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.errors import StochaError

FOLDER = "measurements"
HASH_KEY = "stocha_weights"  # in the card's metadata
COMPARABLE = ("data", "length", "dtype", "tokens")  # what rows of one table must share
EVAL = ("stocha-eval", "perplexity")  # the command that prints such a file, and a key it has
EVALUATED = (
    "Perplexity and zeros: {tokens:,} tokens of {data} in windows of {length}, {dtype}, on {hardware} (`{command}`). "
    "The layers have {least:.0%} to {most:.0%} zeros; {never:.1%} of the neurons never fired, and of those that "
    "fired, {again:.0%} had fired at the token before."
)
COMPARED = (
    "Against the model before: KL divergence {kl:.3f} nats a token, the same most likely token at "
    "{top1_agreement:.0%} of the tokens."
)
DECODED = (
    "Decoding: {dtype}, batch {batch}, {new_tokens} tokens after {prompt}, dense and sparse in turn in one run, on "
    "{hardware}, whose memory read {read_gbps:.0f} GB/s meanwhile (`{command}`)."
)
DIVERSITY = (
    "{samples} samples of each of {count} prompts, {new} tokens at most, {dtype} (`{command}`). Log-likelihood: of "
    "the samples' tokens under this model without noise. `stocha`: the most likely token at every step, with the "
    "activation's noise alone."
)


@dataclass(frozen=True)
class Measured:
    """What was measured of the model in `folder`: contents of files of stocha-eval, -bench and -generate."""

    folder: Path
    weights: str
    evaluation: dict[str, Any]
    rows: dict[str, dict[str, Any]]  # label: another evaluation, for the same table
    bench: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None

    @classmethod
    def read(
        cls,
        folder: Path,
        evaluation: str,
        rows: dict[str, str] | None = None,
        bench: str | None = None,
        generation: str | None = None,
    ) -> Measured:
        """Raises StochaError for files of another kind, of other weights, or that cannot be compared."""
        weights = weights_hash(folder)
        own = _read(evaluation, *EVAL)
        others = {label: _read(path, *EVAL) for label, path in (rows or {}).items()}
        for label, row in others.items():
            _check_comparable(label, row, own)
        decoded = None if bench is None else _read(bench, "stocha-bench FOLDER", "dense_ms")
        generated = None if generation is None else _read(generation, "stocha-generate FOLDER", "runs")
        for path, content in ((evaluation, own), (bench, decoded), (generation, generated)):
            if content is not None:
                check_weights(str(path), content, weights, folder)
        return cls(folder, weights, own, others, decoded, generated)

    def metadata(self) -> dict[str, Any]:
        from huggingface_hub import EvalResult

        data = Path(self.evaluation["data"]).name
        shared: Any = {"task_type": "text-generation", "dataset_type": data, "dataset_name": data}
        window = f"{self.evaluation['length']} tokens a window"
        values = {
            f"perplexity, {window}": ("perplexity", self.evaluation["perplexity"]),
            "zeros in the FFN's hidden vector": ("sparsity", self.evaluation["sparsity"]["mean"]),
        }
        results = [
            EvalResult(**shared, metric_name=name, metric_type=kind, metric_value=round(value, 4))
            for name, (kind, value) in values.items()
        ]
        return {"model_name": self.folder.name, "eval_results": results, HASH_KEY: self.weights}

    def section(self) -> str:
        """Markdown: a table of before, other rows and this model; how it was measured; pictures; diversity."""
        parts = ["## Measured", self._table(), self._told()]
        if self.generation is not None:
            parts += [_diversity(self.generation)]
        return "\n\n".join(parts)

    def write(self) -> None:
        """Leave the files and their pictures in the folder's measurements/."""
        from stocha_hf.measurement.figures import plot_evaluation, plot_generation

        target = self.folder / FOLDER
        target.mkdir(exist_ok=True)
        files: dict[str, Any] = {"evaluation": self.evaluation, "rows": self.rows or None}
        files |= {"bench": self.bench and [self.bench], "generation": self.generation}
        for name, content in files.items():
            if content is not None:
                (target / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        plot_evaluation(self.evaluation, target / "zeros.png")
        if self.generation is not None and _is_drawn(self.generation):
            plot_generation(self.generation, target / "diversity.png")

    def _table(self) -> str:
        before, bench = self.evaluation.get("baseline"), self.bench
        speeds = {} if bench is None else {"dense": bench["dense_ms"], "sparse": bench["sparse_ms"]}
        lines = ["| | activation | perplexity | zeros in the FFN | decoding |", "| --- | --- | --- | --- | --- |"]
        if before is not None:
            lines.append(_row(f"before: {before['model']}", before, _speed(bench, speeds.get("dense"))))
        lines += [_row(label, row, "") for label, row in self.rows.items()]
        faster = f", {bench['speedup']:.1f}x" if bench else ""
        lines.append(_row("**this model**", self.evaluation, _speed(bench, speeds.get("sparse")) + faster))
        return "\n".join(lines)

    def _told(self) -> str:
        own, zeros = self.evaluation, self.evaluation["sparsity"]["per_layer"]
        shares = {"least": min(zeros), "most": max(zeros)}
        shares |= {"never": own["never_active"]["mean"], "again": own["reuse"]["mean"]}
        parts = [EVALUATED.format(**own | shares | {"data": Path(own["data"]).name})]
        if "kl" in own:
            parts.append(COMPARED.format(**own))
        if self.bench is not None:
            parts.append(DECODED.format(**self.bench))
        return "\n\n".join([*parts, f"![Zeros by layer]({FOLDER}/zeros.png)"])


def check_weights(path: str, content: dict[str, Any], weights: str, folder: Path) -> None:
    """Raise StochaError where measurements are of other weights than a folder's."""
    if content.get("weights") != weights:
        told = str(content.get("weights"))[:12]
        raise StochaError(
            f"{path} was measured on weights {told}, but {folder} has {weights[:12]}: expected measurements of this "
            f"folder; measure it again and run stocha-card {folder}"
        )


def check_measurements(folder: Path, card_hash: str | None) -> None:
    """Raise StochaError where a card, or a file in measurements/, tells of other weights than the folder's."""
    files = [
        path for name in ("evaluation", "bench", "generation") if (path := folder / FOLDER / f"{name}.json").exists()
    ]
    if card_hash is None and not files:
        return
    weights = weights_hash(folder)
    if card_hash is not None:
        check_weights(str(folder / "README.md"), {"weights": card_hash}, weights, folder)
    for path in files:
        content = json.loads(path.read_text())
        check_weights(str(path), content[0] if isinstance(content, list) else content, weights, folder)


def _read(path: str, kind: str, key: str) -> dict[str, Any]:
    """A JSON file's object, of a list its only one, that has `key`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StochaError(f"{path} cannot be read ({error}): expected what {kind} --json printed") from None
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if not isinstance(content, dict) or key not in content:
        raise StochaError(f"{path} has no {key}: expected what {kind} --json printed")
    return content


def _check_comparable(label: str, row: dict[str, Any], own: dict[str, Any]) -> None:
    for key in COMPARABLE:
        if row[key] != own[key]:
            raise StochaError(
                f"the row {label!r} has {key} {row[key]!r} and the model itself {own[key]!r}: expected both measured "
                "alike; run stocha-eval again with the same options"
            )


def _row(label: str, row: dict[str, Any], speed: str) -> str:
    zeros = f"{row['sparsity']['mean']:.1%}"
    return f"| {label} | {row['activation']} | {row['perplexity']:.2f} | {zeros} | {speed} |"


def _speed(bench: dict[str, Any] | None, milliseconds: float | None) -> str:
    return f"{bench['batch'] * 1e3 / milliseconds:.1f} tokens/s" if bench and milliseconds else ""


def _is_drawn(generation: dict[str, Any]) -> bool:
    return all(run["self_bleu"] is not None for run in generation["runs"])


def _diversity(generation: dict[str, Any]) -> str:
    from stocha_hf.measurement.figures import VALUES

    lines = [
        "### Diversity of samples",
        DIVERSITY.format(**generation, count=len(generation["prompts"])),
        "| decoding | log-likelihood a token | distinct 2-grams | self-BLEU |\n| --- | --- | --- | --- |",
    ]
    for run in generation["runs"]:
        key = VALUES[run["decoding"]]
        name = run["decoding"] + (", p" if key == "p" else "") + (f" {run[key]:g}" if key else "")
        bleu = "" if run["self_bleu"] is None else f"{run['self_bleu']:.1f}"
        lines[-1] += f"\n| {name} | {run['log_likelihood']:.3f} | {run['distinct_2']:.3f} | {bleu} |"
    if _is_drawn(generation):
        lines.append(f"![Diversity against likelihood]({FOLDER}/diversity.png)")
    return "\n\n".join(lines)
