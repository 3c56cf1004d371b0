"""Files of measurements (measured_files.py), tied to the weights that they tell of, and kept with a checkpoint.

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
from stocha_hf.errors import StochaError
from stocha_hf.publishing.measured_files import read_bench, read_evaluation, read_generation, read_notes, read_tasks

FOLDER = "measurements"
HASH_KEY = "stocha_weights"  # in the card's metadata
COMPARABLE = ("data", "length", "dtype", "tokens")  # what rows of one table must share


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
        own = read_evaluation(evaluation)
        others = {label: read_evaluation(path) for label, path in (rows or {}).items()}
        for label, row in others.items():
            _check_comparable(label, row, own)
        decoded = None if bench is None else read_bench(bench)
        benches = {label: read_bench(path) for label, path in (row_benches or {}).items()}
        for label, one in benches.items():
            _check_row_bench(label, one, others)
        generated = None if generation is None else read_generation(generation)
        done = None if tasks is None else read_tasks(tasks)
        for path, content in ((evaluation, own), (bench, decoded), (generation, generated), (tasks, done)):
            if content is not None:
                check_weights(str(path), content, weights, folder)
        text = None if notes is None else read_notes(notes)
        return cls(folder, weights, own, others, decoded, generated, done, benches, text)

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
    readers = {"evaluation": read_evaluation, "bench": read_bench, "generation": read_generation, "tasks": read_tasks}
    files = {path: read for name, read in readers.items() if (path := folder / FOLDER / f"{name}.json").exists()}
    if card_hash is None and not files:
        return
    weights = weights_hash(folder)
    if card_hash is not None:
        check_weights(str(folder / "README.md"), {"weights": card_hash}, weights, folder)
    for path, read in files.items():
        check_weights(str(path), read(path), weights, folder)


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


def _check_comparable(label: str, row: dict[str, Any], own: dict[str, Any]) -> None:
    for key in COMPARABLE:
        if row[key] != own[key]:
            raise StochaError(
                f"the row {label!r} has {key} {row[key]!r} and the model itself {own[key]!r}: expected both measured "
                "alike; run stocha-eval again with the same options"
            )
