"""What a model can do, as scores of tasks; and how much better or worse than another model, question by question.

Two models that are asked the same questions err on many of the same ones, so that the difference of their scores is
known better than either score: its standard error is that of the differences by question (Miller, arXiv 2411.00640).

    found = evaluate_tasks(model, tokenizer, ["humaneval", "bigbench:strategyqa"], run_code=True)
    found.scores                       # [TaskScore(task="humaneval", metric="pass@1", score=0.543, ...), ...]
    compare_tasks(found, of_baseline)  # [TaskDifference(task="humaneval", difference=-0.02, low=-0.06, ...), ...]
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress
from stocha_hf.tasks.records import TaskDifference, TaskReading, TaskScore

CONFIDENCE = 1.96  # standard errors to each side of a 95% interval
CHOSEN = "shuffled"  # how `limit` chooses questions; figures say it, as others were asked before 0.2
BOOTSTRAPS = 1000  # for the metrics of the harness that have no formula for their standard error
Question = tuple[str, str, int]  # a task, a metric, the question's number


@dataclass(frozen=True)
class TaskResults:
    """Scores, what they were made of (each question's value, the model's answers), and what its decode steps read."""

    scores: list[TaskScore]
    questions: dict[Question, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    readings: list[TaskReading] = field(default_factory=list)

    def to_dict(self) -> list[dict[str, Any]]:
        """Return the scores."""
        return [score.to_dict() for score in self.scores]


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str] | Mapping[str, dict[str, Any]],
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    run_code: bool = False,
    task_data: str | None = None,
    kept: str | Path | None = None,
    name: str = "",
    lossless: bool = False,
) -> TaskResults:
    """Measure a model's scores in tasks, with lm-evaluation-harness.

    Args:
        model: A CausalLM of `load_model`, on the device and in the dtype that it is to run in.
        tokenizer: Its tokenizer.
        tasks: `humaneval`, `bigbench:NAME`, or names of the harness, whose questions come from the Hub; or what
            `load_tasks` made of them.
        limit: Ask only so many questions of a task, the same of every model: the first ones of a fixed shuffle.
        batch_size: Texts at a time; None takes what suits the device. Half as many where memory does not suffice.
        run_code: Allow tasks that run the code that the model writes.
        task_data: A folder or file with questions, as stocha_hf.tasks.local_data says.
        kept: A .jsonl file that responses are added to as they come, and taken from if they are in it.
        name: Whose responses they are, in that file: a hash of the weights, say.
        lossless: Write answers as the model does without its input cuts, one at a time, from drafts: of the cuts, if
            there are any, and of what the text repeats.

    Returns:
        The scores, in the order of the tasks.

    Raises:
        StochaError: there is no such task, its questions are nowhere, it runs code, lm-eval is missing, the model's
            likelihoods are not finite, or `lossless` is asked of a task that samples.
    """
    from stocha_hf.tasks.catalogue import CHATS, check_names, load_tasks

    check_names([*tasks], run_code)
    chat = bool(tokenizer.chat_template)
    loaded = tasks if isinstance(tasks, Mapping) else load_tasks(tasks, chat, task_data)

    import lm_eval.api.task
    from lm_eval.evaluator import evaluate

    from stocha_hf.tasks.harness import HarnessModel
    from stocha_hf.tasks.kept import Kept

    lm_eval.api.task.tqdm = Progress  # its own bar also shows where nobody looks
    lm = HarnessModel(model, tokenizer, Kept(None if kept is None else Path(kept)), name, batch_size, lossless)
    results = TaskResults([])
    for task, parts in loaded.items():
        found = evaluate(
            lm,
            parts,
            samples=None if limit is None else choose(parts["tasks"], limit),
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=chat and task in CHATS,
            confirm_run_unsafe_code=run_code,
        )
        some = gathered(found)
        results.scores.extend(some.scores)
        results.questions.update(some.questions)
        results.answers.extend(some.answers)
        if (reading := lm.reading(task)) is not None:
            results.readings.append(reading)
    return results


def gathered(found: Any) -> TaskResults:
    """Return what the harness's `evaluate` returned as this package's results."""
    results = TaskResults(_scores(found))
    for task, samples in found["samples"].items():
        for sample in samples:
            values = {_label(metric, sample["filter"]): sample[metric] for metric in sample["metrics"]}
            numbers = {
                metric: float(value) for metric, value in values.items() if isinstance(value, bool | int | float)
            }
            results.questions.update({(task, metric, sample["doc_id"]): value for metric, value in numbers.items()})
            about = {"task": task, "question": sample["doc_id"], **numbers}
            results.answers.append(about | {"answer": sample["resps"], "outcome": sample["filtered_resps"]})
    return results


def compare_tasks(model: TaskResults, baseline: TaskResults) -> list[TaskDifference]:
    """Compare two models' scores question by question.

    Args:
        model: What `evaluate_tasks` found of it.
        baseline: The same of another model, asked the same questions.

    Returns:
        A difference for each task and metric that has a value for each question.

    Raises:
        StochaError: they were not asked the same questions.
    """
    if model.questions.keys() != baseline.questions.keys():
        raise StochaError("the two models were asked different questions: expected the same tasks and limit for both")
    differences = []
    for task, metric in dict.fromkeys((task, metric) for task, metric, _ in model.questions):
        pairs = [
            (value, baseline.questions[question])
            for question, value in model.questions.items()
            if question[:2] == (task, metric)
        ]
        found = [value - other for value, other in pairs]
        mean, error = fmean(found), stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
        differences.append(
            TaskDifference(
                task,
                metric,
                difference=mean,
                stderr=error,
                low=mean - CONFIDENCE * error,
                high=mean + CONFIDENCE * error,
                questions=len(found),
                won=sum(difference > 0 for difference in found),
                lost=sum(difference < 0 for difference in found),
            )
        )
    return differences


def choose(tasks: dict[str, Any], limit: int) -> dict[str, list[int]]:
    """Return the numbers of `limit` questions of each task: the first of a shuffle that its name and size decide.

    Evenly spaced ones may all be of one kind, where kinds take turns. More questions include fewer. They are in order,
    as the harness counts them.
    """
    return {name: sorted(_shuffled(name, len(task.eval_docs))[:limit]) for name, task in tasks.items()}


def _shuffled(name: str, count: int) -> list[int]:
    numbers = list(range(count))
    random.Random(f"{name} {count}").shuffle(numbers)
    return numbers


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """The harness's figures: {"acc,none": 0.5, "acc_stderr,none": 0.1, ...} of each task and group."""
    scores = []
    sizes = {task: len({sample["doc_id"] for sample in samples}) for task, samples in found["samples"].items()}
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = figures.get(f"{metric}_stderr,{filtered}")
                error = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
                questions = sizes.get(task) or sum(
                    sizes.get(part, 0) for part in found["group_subtasks"].get(task, [])
                )
                scores.append(TaskScore(task, _label(metric, filtered), float(value), error, questions))
    return scores


def _label(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric}, {filtered}"
