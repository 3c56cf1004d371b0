"""Tasks: likelihoods and answers as the harness defines them, code run with limits, and paired differences."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_refused, call_command, first_is_fast, tiny_model, tiny_tokenizer

from stocha_hf import StochaConfig, patch
from stocha_hf.answers.batches import continue_prompts
from stocha_hf.errors import StochaError
from stocha_hf.tasks import code_runs, local_data
from stocha_hf.tasks.catalogue import load_tasks
from stocha_hf.tasks.evaluate import TaskResults, choose, compare_tasks, evaluate_tasks
from stocha_hf.tasks.records import TaskScore

lm_eval = pytest.importorskip("lm_eval", reason="the extra tasks is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = [{"input": f"w{4 + i} w9 w{10 + i}", "target_scores": {"w5": 1, "w6": 0, "w7 w8": 0}} for i in range(12)]


@pytest.fixture
def task_data(tmp_path: Path) -> str:
    """BIG-bench with a task `toy` of two parts."""
    for part in ("first", "second"):
        (tmp_path / "data" / "toy" / part).mkdir(parents=True)
        content = {"examples": EXAMPLES, "task_prefix": "w11 ", "example_input_prefix": "w12 "}
        (tmp_path / "data" / "toy" / part / "task.json").write_text(json.dumps(content))
    return str(tmp_path / "data")


def test_the_prompt_is_the_one_that_bigbench_describes(task_data: str) -> None:
    rows = local_data.bigbench("toy", task_data)
    assert len(rows) == 24 and local_data.bigbench("toy/first", task_data) == rows[:12]
    row = rows[0]
    assert row["question"] == "w11 w12 w4 w9 w10" + "".join(f"\n  choice: {c}" for c in row["choices"]) + "\nA: "
    assert dict(zip(row["choices"], row["scores"], strict=True)) == EXAMPLES[0]["target_scores"]
    assert len({tuple(row["choices"]) for row in rows}) > 1, "the order differs from question to question"
    with pytest.raises(StochaError, match="BIG-bench's absent are not here"):
        local_data.bigbench("absent", task_data)


def test_the_most_likely_choice_counts_and_kept_responses_are_not_asked_again(
    task_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, kept = tiny_model(), tiny_tokenizer(), tmp_path / "kept.jsonl"
    patch(model, StochaConfig(activation="relu"))
    found = evaluate_tasks(
        model, tokenizer, ["bigbench:toy"], task_data=task_data, limit=8, batch_size=3, kept=kept, name="a"
    )
    expected = []
    asked = sorted(number for _, _, number in found.questions)
    for index in asked:
        row = local_data.bigbench("toy", task_data)[index]
        sums = []
        for choice in row["choices"]:
            context, whole = (tokenizer(text)["input_ids"] for text in (row["question"], row["question"] + choice))
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(logs[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
        expected.append(row["scores"][sums.index(max(sums))])
    assert [found.questions[("bigbench:toy", "acc", index)] for index in asked] == expected
    score = found.scores[0]
    assert score == TaskScore("bigbench:toy", "acc", sum(expected) / 8, score.stderr, 8)
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:-4]) + lines[-4][:30])  # killed while it wrote a line
    read = []
    forward = type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, ids, **more: read.append(len(ids)) or forward(self, ids, **more)
    )
    again = evaluate_tasks(model, tokenizer, ["bigbench:toy"], task_data=task_data, limit=8, kept=kept, name="a")
    assert again.scores == found.scores and 0 < sum(read) <= 4
    assert {json.loads(line)["key"] for line in kept.open()} == {json.loads(line)["key"] for line in lines}


def test_a_limit_draws_the_same_questions_of_every_model_and_of_every_kind(task_data: str) -> None:
    """Where two kinds of questions take turns, evenly spaced ones would be of one kind."""
    parts = load_tasks(["bigbench:toy", "bigbench:toy/first"], False, task_data)
    tasks = {name: task for part in parts.values() for name, task in part["tasks"].items()}
    some, more = choose(tasks, 8), choose(tasks, 12)
    assert some == choose(tasks, 8) and all(len(numbers) == 8 for numbers in some.values())
    assert all(set(some[name]) < set(more[name]) <= set(range(24)) for name in tasks)
    assert {number % 2 for number in some["bigbench:toy"]} == {0, 1}
    assert choose(tasks, 100)["bigbench:toy"] == list(range(24))


def test_the_harness_class_for_transformers_finds_the_same_likelihoods(task_data: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from stocha_hf.tasks.harness import HarnessModel
    from stocha_hf.tasks.kept import Kept

    model, tokenizer = tiny_model(), tiny_tokenizer()
    pairs = [("w5 w6 ", "w7"), ("w5 w6", " w8"), ("w9 w10 w11", " w12 w13 w14"), ("", "w20 w21"), ("w5", " w9 w7")]
    requests = [Instance("loglikelihood", {}, pair, 0, ("task", i, 1)) for i, pair in enumerate(pairs)]
    rolling = [Instance("loglikelihood_rolling", {}, ("w5 w6 w7 " * 40,), 0, ("task", 0, 1))]
    ours = HarnessModel(model, tokenizer, Kept(), "tiny")
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=ours.max_length)
    found, expected = (lm.loglikelihood(requests, disable_tqdm=True) for lm in (ours, theirs))
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), rel=1e-5)


def test_code_runs_with_limits_and_without_network() -> None:
    network = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        outcomes = code_runs.run_programs(
            [
                "print('x' * 100_000)\nassert 1 + 1 == 2",
                "assert False, 'wrong'",
                "bytearray(8 * 2**30)",
                network.format(port=server.getsockname()[1]),
                "import os\nassert not [name for name in os.environ if 'HF' in name or 'TOKEN' in name]",
            ]
        )
    assert outcomes[0] is None and outcomes[4] is None
    assert "wrong" in str(outcomes[1]) and "MemoryError" in str(outcomes[2]) and "Error" in str(outcomes[3])
    assert code_runs.network_guard() in (code_runs.NAMESPACE, code_runs.SOCKETS)


def test_a_program_that_does_not_end_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(code_runs, "SECONDS", 1)
    mark = tmp_path / "still-there"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    program = f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}])\ntime.sleep(60)"
    assert code_runs.run_programs([program]) == ["took longer than 1 s"]
    import time

    time.sleep(2)
    assert not mark.exists()


def test_answers_are_judged_by_their_tests() -> None:
    from stocha_hf.tasks.definitions.functions import program, run_answers

    doc = {
        "prompt": "from typing import List\n\ndef twice(x: int) -> int:\n    '''Twice x.'''\n",
        "entry_point": "twice",
        "test": "def check(f):\n    assert f(2) == 4\n",
    }
    answers = [
        "def twice(x):\n    y: List = [x]\n    return 2 * x\n```\nThat is it.",
        "    return 2 * x\n",
        "    return x\n",
    ]
    assert run_answers([[answer] for answer in answers], [doc] * 3) == ["", "", "AssertionError"]
    assert program(doc, answers[1]).count("def twice") == 1


def test_differences_are_taken_question_by_question() -> None:
    values = ([1, 1, 0, 0, 1, 1, 0, 1], [1, 0, 0, 1, 1, 0, 0, 1])
    model, other = (TaskResults([], {("t", "acc", i): float(v) for i, v in enumerate(some)}) for some in values)
    found = compare_tasks(model, other)[0]
    assert (found.difference, found.won, found.lost, found.questions) == (1 / 8, 2, 1, 8)
    spread = torch.tensor(values[0]).sub(torch.tensor(values[1])).float().std().item() / 8**0.5
    assert found.stderr == pytest.approx(spread) and found.high - found.low == pytest.approx(2 * 1.96 * spread)
    with pytest.raises(StochaError, match="different questions"):
        compare_tasks(model, TaskResults([], {("t", "acc", 0): 1.0}))


@pytest.mark.parametrize("kind", first_is_fast(["llama", "mistral", "qwen2", "gemma2", "gemma3_text"]))
def test_prompts_of_any_length_are_continued_as_if_alone(kind: str) -> None:
    model = tiny_model(kind, **({} if kind == "llama" else {"sliding_window": 6}))
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 64, (size,), generator=draw).tolist() for size in (1, 9, 2, 12)]
    for rows in (1, 3):
        found = dict(continue_prompts(model, prompts, new=10, ends={2}, rows=rows))
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt])
            alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
            assert found[i] == alone[0, len(prompt) :].tolist()


def test_the_command_tells_scores_and_differences(checkpoint, task_data: str, tmp_path: Path) -> None:
    source, other = checkpoint(), checkpoint(name="other", num_hidden_layers=1)
    options = ["--task-data", task_data, "--dtype", "float32", "--results", tmp_path / "results"]
    done = call_command("stocha-eval", source, "--tasks", "bigbench:toy", "--baseline", other, *options, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["tasks"][0]["questions"] == 24 and "chosen" not in figures and "perplexity" not in figures
    difference = figures["tasks"][0]["score"] - figures["baseline"]["tasks"][0]["score"]
    assert figures["task_differences"][0]["difference"] == pytest.approx(difference)
    assert json.loads((tmp_path / "results" / "figures.json").read_text()) == figures
    questions = [json.loads(line) for line in (tmp_path / "results" / "questions.jsonl").read_text().splitlines()]
    assert len(questions) == 48 and {row["model"] for row in questions} == {str(source), str(other)}


def test_drafts_are_refused_where_no_answer_is_written(checkpoint, task_data: str) -> None:
    options = ["--task-data", task_data, "--dtype", "float32", "--lossless"]
    done = call_command("stocha-eval", checkpoint(), "--tasks", "bigbench:toy", *options)
    assert_refused(done, "--lossless was given and bigbench:toy writes no answers: expected a task that does")


def test_questions_that_are_nowhere_are_noticed_before_a_model_is_loaded(checkpoint, task_data, monkeypatch) -> None:
    monkeypatch.setattr("stocha_hf.models.load_model", lambda *args, **options: pytest.fail("a model is loaded"))
    done = call_command("stocha-eval", checkpoint(), "--tasks", "bigbench:absent", "--task-data", task_data)
    assert_refused(done, "BIG-bench's absent are not here")
