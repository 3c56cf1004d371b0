"""The files that verbs write with --json: read whole, and checked, so that a card can rely on what it finds in them.

evaluation = read_evaluation("eval.json")
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.paths import local_path
from stocha_hf.errors import StochaError
from stocha_hf.measurement.figures import VALUES
from stocha_hf.measurement.records import AggregatedSparsity, Comparison, Evaluation
from stocha_hf.tasks.records import TaskDifference, TaskReading, TaskScore

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


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """Read what stocha-eval --data printed. Raises StochaError, as all functions here."""
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


def read_bench(path: str | Path) -> dict[str, Any]:
    """Read what stocha-bench printed of one model."""
    content = _read(path, "stocha-bench FOLDER", "dense_ms")
    check_record(content, BENCH, str(path))
    if content.get("inputs_cut") is not None:
        check_record(content, {"inputs_cut": float}, str(path))
    if min(content["dense_ms"], content["sparse_ms"]) <= 0:
        raise StochaError(f"{path} has a step of no time: expected milliseconds above 0")
    return content


def read_generation(path: str | Path) -> dict[str, Any]:
    """Read what stocha-generate printed."""
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


def read_tasks(path: str | Path) -> dict[str, Any]:
    """Read what stocha-eval --tasks printed."""
    content = _read(path, "stocha-eval FOLDER --tasks", "tasks")
    check_record(content, TASKS, str(path))
    if content.get("task_bytes") is not None:
        check_record(content, {"task_bytes": list[TaskReading]}, str(path))
    if content.get("baseline") is not None:
        check_record(content["baseline"], {"model": str, "tasks": list[TaskScore]}, f"the baseline in {path}")
    return content


def read_notes(path: str | Path) -> str:
    """Read a text in Markdown."""
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


def check_record(content: object, kind: Any, where: str) -> None:
    """Check that `content`, read from JSON, has all that `kind` has. Other keys may be there too.

    `kind` is a type, a dataclass, or a mapping of names to kinds.

    Raises:
        StochaError: something is missing, of another type, NaN or infinite. `where` names the file.
    """
    _check(content, kind, where, "")


def _check(content: object, kind: Any, where: str, path: str) -> None:
    if dataclasses.is_dataclass(kind):
        kind = typing.get_type_hints(kind)
    if isinstance(kind, Mapping):
        if not isinstance(content, dict):
            raise _refused(where, path, content, "an object")
        for key, inner in kind.items():
            if key not in content and not _may_be_none(inner):
                raise StochaError(f"{where} has no {path}{key}: expected what the command printed with --json")
            _check(content.get(key), inner, where, f"{path}{key}.")
    elif kind is object:
        return
    elif _may_be_none(kind):
        if content is not None:
            _check(content, next(part for part in typing.get_args(kind) if part is not type(None)), where, path)
    elif typing.get_origin(kind) is list:
        if not isinstance(content, list):
            raise _refused(where, path, content, "a list")
        for i, item in enumerate(content):
            _check(item, typing.get_args(kind)[0], where, f"{path}{i}.")
    elif not _is_a(content, kind):
        raise _refused(where, path, content, {str: "a text", int: "a whole number", float: "a finite number"}[kind])


def _may_be_none(kind: Any) -> bool:
    return typing.get_origin(kind) is types.UnionType and type(None) in typing.get_args(kind)


def _is_a(content: object, kind: type) -> bool:
    if isinstance(content, bool):
        return False
    if kind is float:
        return isinstance(content, int | float) and math.isfinite(content)
    return isinstance(content, kind)


def _refused(where: str, path: str, content: object, expected: str) -> StochaError:
    given = repr(content) if len(repr(content)) < 60 else type(content).__name__
    return StochaError(f"{where} has {path.rstrip('.') or 'at its top'} {given}: expected {expected}")
