"""Files of measurements: read and checked whole, tied to the weights that they tell of, and kept with a checkpoint.

The verbs write them with --json. A folder keeps them and their pictures in measurements/. Each holds the hash of the
weights that it tells of, and nothing is said of a folder whose weights have another one.

    measured = Measurements.read(folder, "eval.json", rows={"swapped": "swapped.json"}, bench="bench.json")
    with measured.staged() as install:  # everything is drawn and written beside
        install()                       # and takes its place
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.errors import StochaError
from stocha_hf.measurement.figures import VALUES
from stocha_hf.measurement.records import (
    AggregatedSparsity,
    Comparison,
    Evaluation,
    TaskDifference,
    TaskReading,
    TaskScore,
    check_record,
)

FOLDER = "measurements"
HASH_KEY = "stocha_weights"  # in the card's metadata
COMPARABLE = ("data", "length", "dtype", "tokens")  # what rows of one table must share
HOW = {"command": str, "hardware": str}
EVALUATION = {"model": str, "data": str, "length": int, "dtype": str} | HOW
BENCH = HOW | {
    **{"dtype": str, "batch": int, "new_tokens": int, "prompt": int, "dense_ms": float, "sparse_ms": float},
    **{"speedup": float, "read_gbps": float},
}
RUN = {"decoding": str, "log_likelihood": float, "distinct_2": float, "self_bleu": float | None}
TASKS = {
    "tasks": list[TaskScore],
    "task_differences": list[TaskDifference] | None,
    "limit": int | None,
    "dtype": str,
} | HOW
GENERATION = {"samples": int, "new": int, "dtype": str, "prompts": list[str], "runs": list[object]} | HOW


@dataclass(frozen=True)
class Measurements:
    """What was measured of the model in `folder`: contents of files of stocha-eval, -bench and -generate."""

    folder: Path
    weights: str
    evaluation: dict[str, Any]
    rows: dict[str, dict[str, Any]]  # label: another evaluation, for the same table
    bench: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None
    row_benches: dict[str, dict[str, Any]] = field(default_factory=dict)  # label of a row: its file of stocha-bench

    notes: str | None = None  # Markdown, of what no file of a verb tells

    @classmethod
    def read(
        cls,
        folder: Path,
        evaluation: str | Path,
        rows: Mapping[str, str | Path] | None = None,
        bench: str | Path | None = None,
        generation: str | Path | None = None,
        tasks: str | Path | None = None,
        row_benches: Mapping[str, str | Path] | None = None,
        notes: str | Path | None = None,
    ) -> Measurements:
        """Read and check all files. Raises StochaError for malformed ones, of other weights, or not comparable."""
        weights = weights_hash(folder)
        own = _evaluation(evaluation)
        others = {label: _evaluation(path) for label, path in (rows or {}).items()}
        for label, row in others.items():
            _check_comparable(label, row, own)
        decoded = None if bench is None else _bench(bench)
        benches = {label: _bench(path) for label, path in (row_benches or {}).items()}
        for label, one in benches.items():
            _check_row_bench(label, one, others)
        generated = None if generation is None else _generation(generation)
        done = None if tasks is None else _tasks(tasks)
        for path, content in ((evaluation, own), (bench, decoded), (generation, generated), (tasks, done)):
            if content is not None:
                check_weights(str(path), content, weights, folder)
        return cls(
            folder, weights, own, others, decoded, generated, done, benches, None if notes is None else _notes(notes)
        )

    @property
    def is_drawn(self) -> bool:
        """Whether there is a picture of the samples' diversity."""
        return self.generation is not None and all(run["self_bleu"] is not None for run in self.generation["runs"])

    @contextmanager
    def staged(self) -> Iterator[Callable[[], None]]:
        """Write the files and their pictures beside measurements/, and yield a function that moves them there."""
        from stocha_hf.measurement.figures import plot_evaluation, plot_generation

        files: dict[str, Any] = {"evaluation": self.evaluation, "rows": self.rows or None}
        files |= {"bench": self.bench and [self.bench], "row_benches": self.row_benches or None}
        files |= {"generation": self.generation, "tasks": self.tasks}
        try:
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=f".{FOLDER}-") as name:
                beside, target = Path(name), self.folder / FOLDER
                for stem, content in files.items():
                    if content is not None:
                        (beside / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
                if self.notes is not None:
                    (beside / "notes.md").write_text(self.notes, encoding="utf-8")
                plot_evaluation(self.evaluation, beside / "zeros.png")
                if self.generation is not None and self.is_drawn:
                    plot_generation(self.generation, beside / "diversity.png")

                def install() -> None:
                    target.mkdir(exist_ok=True)
                    for path in beside.iterdir():
                        os.replace(path, target / path.name)

                yield install
        except OSError as error:
            raise StochaError(
                f"{self.folder / FOLDER} cannot be written ({error.strerror}): free space, or make it writable"
            ) from error


def check_weights(path: str, content: dict[str, Any], weights: str, folder: Path) -> None:
    """Raise StochaError where measurements are of other weights than a folder's."""
    if content.get("weights") != weights:
        measured = str(content.get("weights"))[:12]
        raise StochaError(
            f"{path} was measured on weights {measured}, but {folder} has {weights[:12]}: expected measurements of "
            f"this folder; measure it again and run stocha-card {folder}"
        )


def check_measurements(folder: Path, card_hash: str | None) -> None:
    """Raise StochaError where a card, or a file in measurements/, is malformed or tells of other weights."""
    readers = {"evaluation": _evaluation, "bench": _bench, "generation": _generation, "tasks": _tasks}
    files = {path: read for name, read in readers.items() if (path := folder / FOLDER / f"{name}.json").exists()}
    if card_hash is None and not files:
        return
    weights = weights_hash(folder)
    if card_hash is not None:
        check_weights(str(folder / "README.md"), {"weights": card_hash}, weights, folder)
    for path, read in files.items():
        check_weights(str(path), read(path), weights, folder)


def _evaluation(path: str | Path) -> dict[str, Any]:
    content = _read(path, "stocha-eval", "perplexity")
    for part in (content, content.get("baseline")):
        if part is not None:
            where = str(path) if part is content else f"the baseline in {path}"
            check_record(part, Evaluation, where)
            check_record(part, {"model": str}, where)
            if not part["sparsity"]["per_layer"]:
                raise StochaError(f"{where} has sparsity of no layer: expected what stocha-eval --json printed")
            _check_aggregated(part["aggregated_sparsity"], where)
    check_record(content, EVALUATION, str(path))
    if "kl" in content:
        check_record(content, Comparison, str(path))
    return content


def _check_aggregated(content: dict[str, Any], where: str) -> None:
    lengths = {len(content[key]) for key in ("tokens", "mean", "independent")}
    if len(lengths) > 1:
        keys = ", ".join(AggregatedSparsity.__dataclass_fields__)
        raise StochaError(f"{where} has aggregated_sparsity of different lengths: expected as many in {keys}")


def _bench(path: str | Path) -> dict[str, Any]:
    content = _read(path, "stocha-bench FOLDER", "dense_ms")
    check_record(content, BENCH, str(path))
    if content.get("inputs_cut") is not None:
        check_record(content, {"inputs_cut": float}, str(path))
    if min(content["dense_ms"], content["sparse_ms"]) <= 0:
        raise StochaError(f"{path} has a step of no time: expected milliseconds above 0")
    return content


def _check_row_bench(label: str, bench: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    if label not in rows:
        raise StochaError(
            f"a file of stocha-bench was given for the row {label!r}: expected the label of a row of the table"
        )
    if bench.get("weights") != rows[label].get("weights"):
        raise StochaError(
            f"the row {label!r} has weights {str(rows[label].get('weights'))[:12]} and its file of stocha-bench "
            f"{str(bench.get('weights'))[:12]}: expected both measured on one folder"
        )


def _generation(path: str | Path) -> dict[str, Any]:
    content = _read(path, "stocha-generate FOLDER", "runs")
    check_record(content, GENERATION, str(path))
    for i, run in enumerate(content["runs"]):
        where = f"run {i} in {path}"
        check_record(run, RUN, where)
        if run["decoding"] not in VALUES:
            raise StochaError(f"{where} has decoding {run['decoding']!r}: expected one of {', '.join(VALUES)}")
        if key := VALUES[run["decoding"]]:
            check_record(run, {key: float}, where)
    return content


def _tasks(path: str | Path) -> dict[str, Any]:
    content = _read(path, "stocha-eval FOLDER --tasks", "tasks")
    check_record(content, TASKS, str(path))
    if content.get("task_bytes") is not None:
        check_record(content, {"task_bytes": list[TaskReading]}, str(path))
    if content.get("baseline") is not None:
        check_record(content["baseline"], {"model": str, "tasks": list[TaskScore]}, f"the baseline in {path}")
    return content


def _notes(path: str | Path) -> str:
    try:
        return local_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StochaError(f"{path} cannot be read ({reason}): expected a text in Markdown") from None


def _read(path: str | Path, kind: str, key: str) -> dict[str, Any]:
    """A JSON file's object, of a list its only one, that has `key`."""
    try:
        content = json.loads(local_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, StochaError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise StochaError(f"{path} cannot be read ({reason}): expected what {kind} --json printed") from None
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
