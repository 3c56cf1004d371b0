"""Requests that a model writes on: where they end, and that each follows from its beginning and number alone."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_refused, call_command, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stocha_hf.answers.answer_file import AnswerFile
from stocha_hf.answers.finishing import Finishing, _Turn, _Watch
from stocha_hf.answers.prompts import open_turns
from stocha_hf.answers.writing import Written, write_answers
from stocha_hf.errors import StochaError

pytestmark = pytest.mark.usefixtures("one_thread")
BEGINNINGS = [f"w{10 + 2 * i} w9" for i in range(5)]
PYTHON = "Complete this.\n```python\ndef "


def chat_tokenizer() -> Any:
    """Whose template ends turns with </s>, as most do."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}w4 {{ message['content'] | trim }} </s> {% endfor %}w5"
    return tokenizer


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def written(path: Path, beginnings: Any = BEGINNINGS, times: int = 4, **options: Any) -> Written:
    finish = Finishing(times=times, new=24, temperature=1.0)
    return write_answers(
        tiny_model(), chat_tokenizer(), beginnings, path, **{"new": 6, "finish": finish, "batch_size": 3} | options
    )


def contents(path: Path) -> set[tuple[str, ...]]:
    return {tuple(sorted(path.read_text().splitlines())), tuple(sorted(requests(path).read_text().splitlines()))}


def requests(path: Path) -> Path:
    return path.with_name(path.name + ".requests")


def test_requests_are_written_on_in_the_users_turn_and_answered(tmp_path: Path) -> None:
    done = written(tmp_path / "a.jsonl")
    made = rows(requests(tmp_path / "a.jsonl"))
    ended = {row["prompt"] for row in made if row["finished"]}
    assert len(made) == len({row["id"] for row in made}) == 20 and all(row["tokens"] <= 24 for row in made)
    assert (done.requests, done.unfinished) == (len(ended), sum(not row["finished"] for row in made))
    assert 0 < done.unfinished < 20 and len({row["prompt"] for row in made}) > 15
    assert all(row["prompt"].startswith(tuple(BEGINNINGS)) and "<" not in row["prompt"] for row in made)
    answers = rows(tmp_path / "a.jsonl")
    assert set(answers[0]) == {"prompt", "completion", "tokens", "finished", "id"}
    assert done.answers == len(answers) == len(ended)
    assert {row["prompt"] for row in answers} == {f"w4 {request} </s> w5" for request in ended}


def test_a_request_is_drawn_as_the_model_would_in_any_batch_and_after_a_kill(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    written(whole)
    for size in (1, 8):
        written(tmp_path / f"{size}.jsonl", batch_size=size)
        assert contents(tmp_path / f"{size}.jsonl") == contents(whole)
    for name, of_requests, of_answers in (("early", 7, 0), ("late", 20, 3)):
        path = tmp_path / f"{name}.jsonl"
        written(path)
        for file, kept in ((requests(path), of_requests), (path, of_answers)):
            lines = file.read_text().splitlines(keepends=True)
            file.write_text("".join(lines[:kept]) + "".join(lines[kept : kept + 1])[:20])
        written(path)
        assert contents(path) == contents(whole)
    assert written(whole).new == 0, "nothing is left to do"
    more = written(whole, times=6)
    assert len(rows(requests(whole))) == 30 and more.answers > written(tmp_path / "1.jsonl").answers
    written(tmp_path / "other.jsonl", seed=1)
    assert contents(tmp_path / "other.jsonl") != contents(tmp_path / "1.jsonl")


def test_equal_requests_are_answered_once_and_equal_beginnings_written_on_once(tmp_path: Path) -> None:
    finish = Finishing(times=3, new=24, temperature=0.0)
    done = written(tmp_path / "a.jsonl", [*BEGINNINGS, *BEGINNINGS], finish=finish)
    made = rows(requests(tmp_path / "a.jsonl"))
    assert len(made) == 15 and done.requests == done.answers == len({row["prompt"] for row in made if row["finished"]})


def test_a_beginning_may_be_messages_and_an_output_parquet(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "w7"}, {"role": "assistant", "content": "w8"}, {"role": "user", "content": ""}]
    done = written(tmp_path / "a.parquet", [chat], times=9)
    made = [row["prompt"] for row in rows(requests(tmp_path / "a.parquet"))]
    assert all(prompt[:2] == chat[:2] and prompt[2]["role"] == "user" for prompt in made)
    assert len({prompt[2]["content"] for prompt in made}) > 5 and done.answers > 0
    made_with = {"new": 6, "temperature": 0.8, "top_p": 1.0, "seed": 0}
    texts = [row["prompt"] for row in AnswerFile(tmp_path / "a.parquet", made_with).rows()]
    assert all(text.startswith("w4 w7 </s> w4 w8 </s> w4 ") for text in texts) and len(texts) == done.answers


def test_nothing_is_changed_where_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = " ".join(["w7"] * 40)  # of 64 positions
    with pytest.raises(StochaError, match=r"beginning has 41 tokens, and the rest of its request .* may have 30"):
        written(path, [long])
    for words, advice in ((61, "a smaller --prompt-new or --new"), (62, "a shorter beginning")):  # and one of the turn
        with pytest.raises(StochaError, match=f"beginning has {words + 1} tokens.*; give {advice}"):
            written(path, [" ".join(["w7"] * words)])
    tokenizer = tiny_tokenizer()
    for template, words in ((None, "has no chat template"), ("{{ messages[0]['role'] }}", "prompt 1 0 times")):
        tokenizer.chat_template = template
        with pytest.raises(StochaError, match=words):
            write_answers(tiny_model(), tokenizer, BEGINNINGS, path, finish=Finishing())
    with pytest.raises(StochaError, match="a prompt is a list of messages: expected text"):
        write_answers(tiny_model(), tokenizer, [[{"role": "user", "content": "w5"}]], path)
    with pytest.raises(StochaError, match=r"'\(', at which requests end, is no regular expression"):
        Finishing(ends="(")
    for ends in ("", "x*", "$", "a|"):
        with pytest.raises(
            StochaError, match=f"requests end at '{re.escape(ends)}', which matches an empty text: expected"
        ):
            Finishing(ends=ends)
    assert Finishing(ends="(?!)").ends, "which is nowhere"
    assert not list(tmp_path.iterdir())
    assert written(path, [long, *BEGINNINGS]).too_long == 1
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(
        StochaError, match=r"a\.jsonl\.requests holds requests with prompt_new 24, and prompt_new is 9"
    ):
        written(path, finish=Finishing(new=9, temperature=1.0))
    requests(path).unlink()
    del before["a.jsonl.requests"]
    with pytest.raises(StochaError, match=r"a\.jsonl holds answers with new 6, and new is 7"):
        written(path, new=7)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


def test_requests_that_never_end_are_told(tmp_path: Path) -> None:
    with pytest.raises(StochaError, match=r"none of 3 requests ended within 1 tokens: .*a\.jsonl\.requests"):
        written(tmp_path / "a.jsonl", ["w12 w9"], finish=Finishing(times=3, new=1, temperature=0.0))


def turn(beginning: str, ends: str | None = None, template: str | None = None, tokenizer: Any = None) -> _Turn:
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template or "{{ messages[0]['content'] }}"
    return _Turn(tokenizer, open_turns(tokenizer, [beginning])[0], ends)


@pytest.mark.parametrize(
    ("beginning", "text", "expected"),
    [
        (
            PYTHON,
            ' f(x):\n    """Halve.\n\n    >>> f(2)\n    """\n    return x',
            ' f(x):\n    """Halve.\n\n    >>> f(2)\n    """',
        ),
        (PYTHON, " f(x):\n    '''Halve.''' # ...", " f(x):\n    '''Halve.'''"),
        (PYTHON, ' f(x):\n    """Halve.', None),
        (PYTHON, " f(x):\n\n    return x", None),
        (PYTHON, ' f(x): 0\n```\n\nor """this""":', " f(x): 0\n```"),
        (PYTHON + '"""', 'Halve."""\n', 'Halve."""'),
        ("Explain how", " it\nworks.\n \nFirst,", " it\nworks."),
        ("Explain how", " it works.\n", None),
        ("Fix this.\n", "\n```\na\n\nb\n```\n\nHere", "\n```\na\n\nb\n```"),
        ("Explain how", " this works:\n\n```\na\n```\n\nIt", " this works:\n\n```\na\n```"),
        ("Fix this.\n", "```\na\n```\nHere", "```\na\n```"),
        ("Fix this.\n", " ```\na\n\nb\n ```\n\nHere", " ```\na\n\nb\n ```"),
        ("Fix this.\n", '```\n"""a"""\n\nb', None),
    ],
)
def test_where_a_request_ends(beginning: str, text: str, expected: str | None) -> None:
    """An open block's docstring, which closes the block, or an empty line outside of blocks."""
    found = turn(beginning).ended(text)
    closing = "\n```" if expected and expected[-3:] in ('"""', "'''") else ""
    assert found == (None if expected is None else beginning.rstrip(" ") + expected + closing)


def test_a_request_ends_where_it_is_told_to_or_where_the_template_ends_turns() -> None:
    assert turn("A\n```js\nf", r"\*/").ended("/* a */ {") == "A\n```js\nf/* a */\n```"
    assert turn("Explain", r"\?").ended(" this.\n\nOr that? No.") == "Explain this.\n\nOr that?"
    old = turn("Explain", None, "[INST] {{ messages[0]['content'] }} [/INST]")
    assert old.ended(" this. [/INST] I") == "Explain this." and not old.first
    assert turn("Explain", None, "{{ messages[0]['content'] }}</s>\nw5").first == {2}


@pytest.mark.parametrize("every", [1, 3, 8])
@pytest.mark.parametrize(
    ("beginning", "text", "ends"),
    [
        (PYTHON, 'f(x):\n    """Halve.\n\n    >>> f(2)\n    """\n    return x, x + 1', None),
        (PYTHON, "f(x): 0\n```\n\nFor another one, see below.", None),
        ("Explain how", " it\nworks.\n   \nFirst, a \u00e9 \U0001f600.", None),
        ("Explain how", " a \u00e9 \U0001f600 works.\n\nIt does so, as far as is known.", None),
        ("Explain how", " it works. It is for \u00e9 alone, as far as is known.", "\u00e9"),
        ("Explain how", " it works:\n\n- first", None),
    ],
)
def test_a_row_is_stopped_as_soon_as_its_request_has_ended(
    beginning: str, text: str, ends: str | None, every: int
) -> None:
    """However its tokens, bytes here, come: one is looked at while a blank line or a character is half written."""
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    plain = Tokenizer(models.BPE(vocab=letters, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    begun = turn(beginning, ends, tokenizer=tokenizer)
    watch, ids = _Watch([begun, begun]), tokenizer(text)["input_ids"]
    for number in (1, 0):  # the second row finds the first one's tokens known
        looks = range(every, len(ids) + 1, every)
        ended = (count for count in looks if begun.ended(tokenizer.decode(ids[:count])) is not None)
        assert next((count for count in looks if watch(number, ids[:count])), None) == next(ended, None)
    again = (count for count in looks if watch(0, ids[:count]))
    assert next(again, None) == next((count for count in looks if begun.ended(tokenizer.decode(ids[:count]))), None)


def test_the_command_finishes_prompts(checkpoint, tmp_path: Path) -> None:
    source, prompts = checkpoint(), tmp_path / "prompts.txt"
    chat_tokenizer().save_pretrained(source)
    prompts.write_text("w5 w6\nw7\n")
    given = [source, prompts, tmp_path / "out.jsonl"]
    options = ["--finish-prompts", "--times", 9, "--prompt-new", 24, "--prompt-temperature", 1, "--new", 5]
    done = call_command("stocha-answers", *given, *options, "--dtype", "float32", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["requests"] == figures["answers"] > 0 and figures["requests"] + figures["unfinished"] <= 18
    done = call_command("stocha-answers", *given, *options, "--dtype", "float32")
    assert "0 of them new" in done.stdout and f"{figures['unfinished']} that did not end" in done.stdout
    assert_refused(call_command("stocha-answers", *given, "--finish-prompts", "--plain"), "--plain", "expected one")
    assert_refused(call_command("stocha-answers", *given, "--times", 2), "--times", "--finish-prompts")
    refused = call_command("stocha-answers", *given, "--finish-prompts", "--prompt-ends", "x*")
    assert_refused(refused, "'x*'", "matches an empty text: expected a regular expression")
