"""Minimal pairs are what they say, and a model's score in them is that of its likelihoods."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import tiny_model
from helpers.vocabularies import byte_level_tokenizer

from stocha_hf.models import load_model

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import minimal_pairs
from minimal_pairs import TASKS, pairs


@pytest.mark.parametrize("task", TASKS)
def test_each_alternative_is_right_as_often_as_wrong(task: str) -> None:
    found = pairs(task, 200)
    assert len(set(found)) == 200
    for first, second in zip(found[::2], found[1::2], strict=True):
        gained, lost = Counter(first.right), Counter(first.wrong)
        assert gained - lost == Counter(second.wrong) - Counter(second.right)
        assert lost - gained == Counter(second.right) - Counter(second.wrong)


@pytest.mark.parametrize(
    ("between", "same"), [("phrase", True), ("clause", True), ("phrase", False), ("clause", False)]
)
def test_the_other_noun_has_the_number_that_the_task_says(between: str, same: bool) -> None:
    task = f"agreement, a {between} between" if same else f"agreement, a {between} of the other number"
    plurals = {minimal_pairs.plural(noun) for noun in minimal_pairs.NOUNS}
    for pair in pairs(task, 100):
        subject, other = re.findall(r"[Tt]he (\w+)", pair.right)[:2]
        assert (subject in plurals) == ((other in plurals) == same)
        verb = next(a for a, b in zip(pair.right.split(), pair.wrong.split(), strict=True) if a != b)
        assert (verb in {plural for _, plural, _ in minimal_pairs.PREDICATES}) == (subject in plurals)


@pytest.mark.parametrize("task", ["code, brackets", "code, indentation"])
def test_of_two_pieces_of_code_the_wrong_one_is_none(task: str) -> None:
    for pair in pairs(task, 100):
        ast.parse(pair.right)
        with pytest.raises(SyntaxError):
            ast.parse(pair.wrong)


def test_the_names_are_those_of_the_arguments() -> None:
    for pair in pairs("code, names", 100):
        used = []
        for text in (pair.right, pair.wrong):
            function = ast.parse(text).body[0]
            known = {argument.arg for argument in function.args.args} | {"item", "print"}  # type: ignore[attr-defined]
            used.append({node.id for node in ast.walk(function) if isinstance(node, ast.Name)} <= known)
        assert used == [True, False]


def test_a_score_is_that_of_the_likelihoods_and_a_line_is_not_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra tasks is not installed")
    import pretrain_tasks

    tokenizer, results = byte_level_tokenizer(), tmp_path / "tasks.jsonl"
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=1.0)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(pretrain_tasks, "TASKS", ["agreement", "code, names"])
    command = ["pretrain_tasks.py", str(tmp_path / "tiny"), "--pairs", "12", "--bigbench", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    pretrain_tasks.main()
    lines = results.read_text()
    pretrain_tasks.main()
    assert results.read_text() == lines

    @torch.no_grad()
    def likelihood(text: str) -> float:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]])
        logs = load_model(str(tmp_path / "tiny"))(ids[None]).logits[0, :-1].log_softmax(-1)
        return logs.gather(1, ids[1:, None]).sum().item()

    for row in map(json.loads, lines.splitlines()):
        right = [likelihood(pair.right) > likelihood(pair.wrong) for pair in pairs(row["task"], 12)]
        assert [digit == "1" for digit in row["right"]] == right and 0 < sum(right) < 12
        assert row["score"] == pytest.approx(sum(right) / 12, abs=1e-4) and row["questions"] == 12
