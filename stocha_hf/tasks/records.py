"""What tasks return: as measurement/records.py, apart from what computes them, for publishing/ needs no torch.

evaluate.evaluate_tasks -> TaskScore, TaskReading        evaluate.compare_tasks -> TaskDifference
"""

from __future__ import annotations

from dataclasses import dataclass

from stocha_hf.measurement.records import BytesRead, Drafts, Fallback, Record


@dataclass(frozen=True)
class TaskScore(Record):
    """A figure of a task: `score`, for accuracies from 0 to 1, and its standard error over `questions`.

    `stderr` is None where the harness tells none. `metric` is the harness's name, with its filter where it has one.
    """

    task: str
    metric: str
    score: float
    stderr: float | None
    questions: int


@dataclass(frozen=True)
class TaskDifference(Record):
    """How much better a model does a task than a baseline, question by question.

    `difference` is the mean over the `questions` that both were asked; `stderr` its standard error, and `low` and
    `high` the ends of its 95% interval. `won` counts questions at which the model does better, `lost` worse.
    """

    task: str
    metric: str
    difference: float
    stderr: float
    low: float
    high: float
    questions: int
    won: int
    lost: int


@dataclass(frozen=True)
class TaskReading(Record):
    """What decode steps read while a model that cuts inputs, or writes from drafts, wrote its answers to a task.

    `steps` counts the answers' tokens. `bytes_read` is of a step on average, measured on `texts` of the answers;
    `fallback` counts the steps that were computed again, None where the model has none; `drafts` what lossless
    decoding took, None where answers were written in another way.
    """

    task: str
    steps: int
    texts: int
    bytes_read: BytesRead
    fallback: Fallback | None = None
    drafts: Drafts | None = None
