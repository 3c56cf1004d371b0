"""What a task's name means: this package's own tasks, and all that lm-evaluation-harness has.

    humaneval              HumanEval, asked as a chat where the tokenizer has a template (definitions/humaneval.yaml)
    bigbench:NAME          a multiple-choice task of BIG-bench, `bigbench:NAME/PART` a part of it (bigbench.yaml)
    hellaswag, mmlu, ...   tasks and groups of the harness as it has them, whose questions are on the Hub

A name of the harness that runs generated code its own way is refused: only code_runs.py runs code here.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stocha_hf.data.files import first_line
from stocha_hf.errors import StochaError

DEFINITIONS = Path(__file__).parent / "definitions"
BIGBENCH = "bigbench:"
RUNS_CODE = ("humaneval",)
CHATS = ("humaneval",)  # asked with the chat template


def check_names(names: Sequence[str], run_code: bool) -> None:
    """Refuse what can be refused before a model is loaded: a missing extra, code that is not to be run."""
    if find_spec("lm_eval") is None:
        raise StochaError("tasks need the package lm-eval, which is not installed: run pip install 'stocha_hf[tasks]'")
    for name in names:
        if name in RUNS_CODE and not run_code:
            raise StochaError(
                f"{name} runs code that the model writes: give --run-code to allow it, in a process with limits of "
                "time and memory and without network, but with your permissions to read and write files"
            )
        if name.startswith(BIGBENCH) and not name.removeprefix(BIGBENCH):
            raise StochaError(f"the task {name!r} names no task of BIG-bench: expected {BIGBENCH}NAME")


def load_tasks(names: Sequence[str], chat: bool, task_data: str | None) -> dict[str, dict[str, Any]]:
    """Return of each name what the harness evaluates: {"tasks": {...}, "groups": {...}}, questions included.

    Args:
        names: As this module's docstring says.
        chat: Whether the tokenizer has a chat template.
        task_data: A folder or file with questions, as local_data.py says.

    Raises:
        StochaError: there is no such task, or its questions are nowhere.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about each default
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    own = {name: _own(name, chat) for name in names}
    manager = TaskManager(include_defaults=not all(own.values()))
    found = {}
    for name in dict.fromkeys(names):
        spec: Any = name
        if file := own[name]:
            spec = load_yaml(DEFINITIONS / file) | {"task": name}
            spec["metadata"] |= {"name": name.removeprefix(BIGBENCH), "task_data": task_data}
        else:
            _check_standard(name, manager)
        try:
            found[name] = dict(manager.load([spec]))
        except (StochaError, MemoryError):
            raise
        except Exception as error:  # whatever datasets, the Hub and a task's own code raise
            raise StochaError(
                f"the task {name} cannot be loaded ({first_line(error)}): expected its questions on the Hub, and what "
                "its page in lm-evaluation-harness asks to be installed"
            ) from error
    return found


def _own(name: str, chat: bool) -> str | None:
    """The file that defines a task of this package."""
    if name == "humaneval":
        return "humaneval.yaml" if chat else "humaneval_completion.yaml"
    return "bigbench.yaml" if name.startswith(BIGBENCH) else None


def _check_standard(name: str, manager: Any) -> None:
    entry = manager.task_index.get(name)
    if entry is None:
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        meant = f"; did you mean {' or '.join(near)}?" if near else ""
        raise StochaError(
            f"there is no task {name}: expected humaneval, {BIGBENCH}NAME, or a task of lm-evaluation-harness{meant}"
        )
    if (entry.cfg or {}).get("unsafe_code"):
        raise StochaError(
            f"{name} is a task of lm-evaluation-harness that runs code without this package's limits: expected "
            f"{', '.join(RUNS_CODE)}, or run it with lm_eval itself"
        )
