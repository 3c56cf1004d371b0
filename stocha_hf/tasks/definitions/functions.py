"""What the YAML files beside this one call. The harness imports it by its path."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from stocha_hf.tasks import code_runs, local_data


def human_eval(task_data: str | None = None, **metadata: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(local_data.human_eval(task_data))}


def bigbench(name: str, task_data: str | None = None, **metadata: Any) -> dict[str, Dataset]:
    return {"test": Dataset.from_list(local_data.bigbench(name, task_data))}


def graded(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """The score of the most likely choice."""
    likelihoods = [likelihood for likelihood, _ in results]
    return {"acc": doc["scores"][likelihoods.index(max(likelihoods))]}


def run_answers(answers: list[list[str]], docs: list[dict[str, Any]]) -> list[str]:
    """Of each answer what went wrong when it was run with its tests; "" where nothing did."""
    programs = [program(doc, some[0]) for some, doc in zip(answers, docs, strict=True)]
    return [trouble or "" for trouble in code_runs.run_programs(programs)]


def passed(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"pass@1": float(results[0] == "")}


def program(doc: dict[str, Any], answer: str) -> str:
    """An answer with the imports of its prompt and its tests; the prompt itself where the answer continues it."""
    code = answer.partition("```")[0]
    if f"def {doc['entry_point']}" not in code:
        code = doc["prompt"] + code
    imports = [line for line in doc["prompt"].splitlines() if line.startswith(("from ", "import "))]
    return "\n".join([*imports, code, doc["test"], f"check({doc['entry_point']})", ""])
