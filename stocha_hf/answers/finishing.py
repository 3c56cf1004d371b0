"""Requests that a model writes itself, from their beginnings, so that nobody has to find prompts.

A chat model that has read its template up to a user's turn writes what a user would (Xu et al., Magpie, arXiv
2406.08464). Here the turn has a beginning, which decides what kind of request it is, and the model writes it on until
it ends the turn. A small model goes on and answers itself there, so a request ends earlier: with its first paragraph,
or, where the beginning leaves a block of code open, with a docstring, so that it asks for a function it does not have.

    texts = ["Explain how", "Complete this.\\n```python\\ndef"]
    beginnings = Beginnings(model, tokenizer, texts, Finishing(times=100), 512)
    with (file := RequestFile(Path("answers.jsonl.requests"), {})):
        beginnings.write(file)
    prompts, unfinished = beginnings.ended(file)
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stocha_hf.answers.answer_file import RowFile, draw_key, row_id
from stocha_hf.answers.batches import continue_prompts
from stocha_hf.answers.choosing import Choice
from stocha_hf.answers.prompts import OpenTurn, Prompt, end_tokens, open_turns
from stocha_hf.answers.room import fitting_prompts, rows_at_once
from stocha_hf.errors import StochaError
from stocha_hf.progress import Progress

DOCSTRING = re.compile(r"""("{3}|'{3})[\s\S]*?\1""")
PARAGRAPH = re.compile(r"[^:\s][ \t]*\n[ \t]*\n|^ {0,3}`{3,}[ \t]*\n", re.MULTILINE)  # ends, or a block of code does
FENCE = re.compile(r"^ {0,3}(`{3,})", re.MULTILINE)
BLANK = re.compile(r"\n[ \t]*\n")
MARKS = ('"""', "'''", "```")  # without one of these, or a blank line, no docstring, block or paragraph ends
PART = "\ufffd"  # what a token becomes that is a part of a character


@dataclass(frozen=True)
class Finishing:
    """How a model writes requests on.

    Args:
        times: Requests of each beginning.
        new: Tokens that one is written on by at most. One that has not ended then is dropped.
        temperature: That its tokens are drawn at.
        ends: A regular expression: a request ends with its first match, if the model does not end it before. None ends
            one where a docstring closes in a block of code that the beginning leaves open, and elsewhere with the
            first paragraph or block of code: at an empty line outside of code, which does not follow a colon, or
            behind the block. A block that is open where a request ends is closed.

    Raises:
        StochaError: `ends` matches an empty text or is no regular expression.
    """

    times: int = 1
    new: int = 256
    temperature: float = 0.8
    ends: str | None = None

    def __post_init__(self) -> None:
        if self.ends is None:
            return
        try:
            takes_nothing = re.search(self.ends, "") is not None
        except re.error as error:
            raise StochaError(
                f"{self.ends!r}, at which requests end, is no regular expression ({error}): expected one such as "
                r"\n\n"
            ) from None
        if takes_nothing:
            raise StochaError(
                f"requests end at {self.ends!r}, which matches an empty text: expected a regular expression "
                r"that takes a character at least, such as \n\n"
            )

    def made(self) -> dict[str, Any]:
        """Return what decides the requests beside their beginnings; more of them can be written later."""
        return {f"prompt_{name}": value for name, value in asdict(self).items() if name != "times"}


class RequestFile(RowFile):
    """Requests on disk: {"prompt": ..., "tokens": 87, "finished": true, "id": ...}, those too that did not end."""

    holds = "requests"


class Beginnings:
    """Beginnings of requests, texts or messages, that a model writes on, and answers with so many tokens at most.

    Raises StochaError where there is no chat template that they can stand in, or the model has too few positions.
    """

    def __init__(self, model: Any, tokenizer: Any, prompts: Sequence[Prompt], how: Finishing, answer: int) -> None:
        self.model, self.how = model, how
        self.turns = {turn.text: _Turn(tokenizer, turn, how.ends) for turn in open_turns(tokenizer, prompts)}
        words = ("beginning", "the rest of its request and an answer", "--prompt-new or --new")
        self.fitting = fitting_prompts(model, tokenizer, list(self.turns), how.new + answer, words, least=2)
        self.too_long = len(self.turns) - len(self.fitting)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        between = {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}  # texts
        self.ends = end_tokens(model, tokenizer).union(between, *(turn.first for turn in self.turns.values()))
        self.special = self.ends | special

    def write(self, file: RequestFile, *, top_p: float = 1.0, batch_size: int | None = None, seed: int = 0) -> None:
        """Write those requests that the file lacks."""
        missing = [(text, number) for text, number in self._wanted() if row_id(text, number) not in file.ids]
        turns = [self.turns[text] for text, _ in missing]
        found = continue_prompts(
            self.model,
            [self.fitting[text] for text, _ in missing],
            new=self.how.new,
            ends=self.special,
            rows=batch_size or rows_at_once(self.model, max(map(len, self.fitting.values())) + self.how.new),
            choice=Choice(self.how.temperature, top_p),
            keys=[draw_key(text, f"request {seed} {number}") for text, number in missing],
            stop=_Watch(turns),
        )
        begun, count = time.monotonic(), 0
        with Progress(total=len(missing), desc="Writing requests", unit="request") as bar:
            for i, tokens in found:
                request, ended = turns[i].read(tokens, self.ends, self.special)
                prompt = turns[i].prompt(request)
                file.add({"prompt": prompt, "tokens": len(tokens), "finished": ended, "id": row_id(*missing[i])})
                count += len(tokens)
                bar.set_postfix_str(f"{count / (time.monotonic() - begun):,.0f} tokens/s", refresh=False)
                bar.update()

    def ended(self, file: RequestFile) -> tuple[list[Prompt], int]:
        """Return the file's requests of these beginnings that ended, and how many did not."""
        wanted = {row_id(text, number) for text, number in self._wanted()}
        rows = [row for row in file.rows() if row["id"] in wanted]
        prompts = [row["prompt"] for row in rows if row["finished"]]
        if not prompts:
            raise StochaError(
                f"none of {len(rows)} requests ended within {self.how.new} tokens: expected a chat model, which ends "
                f"its turns; see {file.path.name}, and give a greater --prompt-new or other beginnings"
            )
        return prompts, len(rows) - len(prompts)

    def _wanted(self) -> list[tuple[str, int]]:
        return [(text, number) for number in range(self.how.times) for text in self.fitting]


class _Turn:
    """A user's turn that has begun: where it ends in what the model writes on."""

    def __init__(self, tokenizer: Any, turn: OpenTurn, ends: str | None) -> None:
        self.tokenizer, self.prompt, self.begun = tokenizer, turn.prompt, turn.begun
        self.last = tokenizer(turn.text, add_special_tokens=False)["input_ids"][-1:]
        self.before = tokenizer.decode(self.last)
        fences = list(FENCE.finditer(turn.begun))
        self.code = fences[-1].end() if len(fences) % 2 else None  # where a block is open
        self.fences = len(fences)
        self.line = turn.begun.rfind("\n") + 1  # where the last one begins
        self.ends = ends and re.compile(ends)
        after = turn.after.strip()
        first = tokenizer(after, add_special_tokens=False)["input_ids"][:1] if after else []
        added = [str(tokenizer.added_tokens_decoder[i]) for i in first if i in tokenizer.added_tokens_decoder]
        special = bool(added) and after.startswith(added[0])
        self.first = set(first if special else ())  # a token that ends the turn
        self.after = "" if special else after.partition("\n")[0]  # or a text

    def written(self, tokens: list[int]) -> str:
        """The text of tokens that follow those before; alone, some tokenizers would leave out its first blank."""
        whole = self.tokenizer.decode(self.last + tokens)
        return whole[len(self.before) :] if whole.startswith(self.before) else self.tokenizer.decode(tokens)

    def ended(self, text: str) -> str | None:
        """The request, where it ends in this text before the model ends the turn."""
        whole = self.begun + text
        ends = [len(self.begun) + text.index(self.after)] if self.after and self.after in text else []
        ends += [next(found, len(whole) + 1) for found in self._ends(whole)]
        first = min(ends)
        return _closed(whole[:first]) if first <= len(whole) else None

    def _ends(self, whole: str) -> Iterator[Iterator[int]]:
        """Of each rule the places where a request may end."""

        def places(rule: re.Pattern[str], begin: int) -> Iterator[int]:
            found = (match.end() for match in rule.finditer(whole, begin))
            return (end for end in found if whole[len(self.begun) : end].strip())

        if self.ends:
            yield places(self.ends, self.code or 0)
            return
        yield (end for end in places(PARAGRAPH, self.line) if _fences(whole[:end]) % 2 == 0)
        if self.code:
            yield (end for end in places(DOCSTRING, self.code) if _fences(whole[:end]) == self.fences)

    def read(self, tokens: list[int], ends: set[int], special: set[int]) -> tuple[str, bool]:
        """The request that the model wrote, and whether it ended."""
        text = self.written(tokens[:-1] if tokens[-1] in special else tokens)
        request = self.ended(text)
        return (_closed(self.begun + text), tokens[-1] in ends) if request is None else (request, True)


def _fences(text: str) -> int:
    return len(FENCE.findall(text))


def _closed(text: str) -> str:
    """A request with its last block of code closed."""
    fences, text = FENCE.findall(text), text.rstrip()
    return f"{text}\n{fences[-1]}" if len(fences) % 2 else text


class _Watch:
    """Tells of a row that its request has ended, by its number and tokens.

    It is asked of thousands of rows while a GPU waits, so a token becomes text once in all rows, and rules are tried
    only where the lines that are new have what ends one.
    """

    def __init__(self, turns: list[_Turn]) -> None:
        self.turns = turns
        self.texts: dict[int, str] = {}  # of tokens
        self.seen: dict[int, tuple[int, str]] = {}

    def __call__(self, number: int, tokens: list[int]) -> bool:
        turn = self.turns[number]
        count, before = self.seen.get(number, (0, ""))
        if count >= len(tokens):  # the row was begun again
            count, before = 0, ""
        new = tokens[count:]
        for token in set(new).difference(self.texts):
            self.texts[token] = turn.written([token])
        text = before + "".join(map(self.texts.__getitem__, new))
        if PART in text:
            text = turn.written(tokens)
        self.seen[number] = len(tokens), text
        lines = text[max(before.rfind("\n"), 0) :]
        may_end = any(mark in lines for mark in MARKS) or BLANK.search(lines)
        if not (may_end or turn.ends or (turn.after and turn.after in text)) or turn.ended(text) is None:
            return False
        whole = turn.written(tokens)
        return whole == text or turn.ended(whole) is not None
