"""Responses of models to the harness's requests, kept in a file as they come, so that a killed run goes on.

The folder that --results names has:

    responses.jsonl    each response, as it came
    questions.jsonl    of each model and question its values, the answer and what came of it
    figures.json       what the command prints with --json

A line of responses.jsonl is one response. Its key is a hash of the model's weights and settings and of all that was
asked, so that a file can hold those of several models and tasks, and a changed model or prompt asks anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.paths import local_path
from stocha_hf.errors import StochaError


def identity(weights: str, model: Any, mode: str | None) -> str:
    """Return a name of a model for its responses: another one for other weights, settings, or another dtype."""
    settings = hashlib.sha256(model.config.to_json_string(use_diff=False).encode()).hexdigest()[:16]
    return f"{weights} {settings} {model.dtype} {mode or ''}"


def check_folder(folder: str) -> None:
    """Make the folder of results, if it is not there. Raises StochaError where it cannot be written."""
    path = local_path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except OSError as error:
        raise StochaError(f"--results {folder} cannot be written ({error.strerror}): expected a folder") from None


def write_questions(folder: str, answers: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """Write questions.jsonl: of each model its answers."""
    rows = ({"model": model} | row for model, some in answers.items() for row in some)
    (local_path(folder) / "questions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


def write_figures(folder: str, figures: Mapping[str, Any]) -> None:
    """Write figures.json."""
    (local_path(folder) / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


class Kept:
    """Responses by request. Without a path they are held for as long as the object lives."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.about: dict[str, dict[str, Any]] = {} if path is None or not path.exists() else dict(_read(path))
        self.found: dict[str, Any] = {key: about.pop("response") for key, about in self.about.items()}

    def key(self, model: str, kind: str, args: Iterable[Any]) -> str:
        """Return the key of a request: `model` says whose answer it is."""
        return hashlib.sha256(json.dumps([model, kind, *args], sort_keys=True, default=str).encode()).hexdigest()

    def add(self, rows: Iterable[tuple[str, dict[str, Any], Any]]) -> None:
        """Keep responses: of each its key, what to say about it (its task, its steps), and itself."""
        lines = []
        for key, about, response in rows:
            self.found[key], self.about[key] = response, about
            lines.append(json.dumps(about | {"key": key, "response": response}) + "\n")
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def _read(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """The lines of a file by their keys; a last line that was cut off when a run was killed is removed from it."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            yield row["key"], {"response": row["response"]} | row
        except (ValueError, KeyError, TypeError):
            raise StochaError(
                f"line {number} of {path} is not a response that stocha-eval kept: expected a file of its own; name "
                "another one with --results, or move this one away"
            ) from None
