"""Prompts: from files and data sets, put into the chat template, and as token ids; and what ends an answer.

read_prompts("prompts.txt")                  # one prompt per line
read_prompts("HuggingFaceH4/ultrachat_200k", split="train_sft")      # the column `prompt`, or `messages`
rendered(tokenizer, prompts, chat=True)      # texts that an answer follows
open_turns(tokenizer, prompts)       # texts that the rest of a prompt follows
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stocha_hf.checkpoints.paths import local_path
from stocha_hf.data import load_rows
from stocha_hf.errors import StochaError

Prompt = str | list[dict[str, Any]]  # a text, or messages
MARK = "<<here a user writes on>>"


def read_prompts(name: str, *, split: str = "train", column: str | None = None) -> list[Prompt]:
    """Return the prompts of a file or data set.

    Args:
        name: A .txt file with one prompt per line; a jsonl, json, csv or parquet file or a folder of one kind; or a
            data set of the Hub. Of these the column `prompt`, text or messages, else `messages` up to a user's last.
        split: Split of a Hub data set.
        column: Another column with prompts.

    Raises:
        StochaError: there is no such file or data set, or it has no prompts.
    """
    path = local_path(name)
    if path.suffix == ".txt" and path.is_file():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise StochaError(
                f"{name} cannot be read ({error}): expected a text file with one prompt per line"
            ) from None
        if found := [line for line in lines if line.strip()]:
            return list(found)
        raise StochaError(f"{name} is empty: expected one prompt per line")
    data = load_rows(name, split=split)
    wanted = [column] if column else ["prompt", "messages"]
    chosen = next((some for some in wanted if some in data.column_names), None)
    if chosen is None:
        raise StochaError(
            f"{name} has the columns {', '.join(data.column_names)}: expected {' or '.join(wanted)}; name another "
            "with --column"
        )
    return [
        _prompt(value, chosen != "messages", f"in the column {chosen} of row {number} of {name}")
        for number, value in enumerate(data[chosen], 1)
    ]


def _prompt(value: Any, may_be_text: bool, where: str) -> Prompt:
    if may_be_text and isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(map(_is_message, value)):
        last = max((i for i, message in enumerate(value) if message["role"] == "user"), default=None)
        if last is not None:
            return [{"role": message["role"], "content": message["content"]} for message in value[: last + 1]]
    given = repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
    raise StochaError(f"there is {given} {where}: expected a text, or messages with role and content, one of a user")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def rendered(tokenizer: Any, prompts: Sequence[Prompt], chat: bool) -> list[str]:
    """Return prompts as texts that an answer follows, each once, in order.

    Args:
        tokenizer: The model's.
        prompts: As `read_prompts` returns them.
        chat: Whether the chat template is used; messages need it.

    Raises:
        StochaError: there is no chat template, or it refuses a prompt.
    """
    if chat:
        _check_template(tokenizer, "give --plain for prompts as they are")
    texts: dict[str, None] = {}  # a set that keeps the order
    for number, prompt in enumerate(prompts, 1):
        if not chat and not isinstance(prompt, str):
            raise StochaError(f"prompt {number} is a list of messages: expected text with --plain")
        texts[_templated(tokenizer, prompt, number) if chat else str(prompt)] = None
    return list(texts)


def _check_template(tokenizer: Any, advice: str) -> None:
    if not tokenizer.chat_template:
        raise StochaError(f"the tokenizer has no chat template: expected one; {advice}")


def _templated(tokenizer: Any, prompt: Prompt, number: int) -> str:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises what it likes
        raise StochaError(
            f"the chat template refuses prompt {number} ({error}): expected messages that the model knows"
        ) from error


@dataclass(frozen=True)
class OpenTurn:
    """A user's turn that is to be written on: `text` leads to that place, `after` is what the template puts behind.

    `begun` is what the user has written, without blanks at its end: a model writes them with its next word.
    """

    text: str
    after: str
    begun: str
    before: tuple[dict[str, Any], ...] | None  # messages before; None for a text

    def prompt(self, content: str) -> Prompt:
        """Return the prompt in which the user wrote this."""
        return content if self.before is None else [*self.before, {"role": "user", "content": content}]


def open_turns(tokenizer: Any, prompts: Sequence[Prompt]) -> list[OpenTurn]:
    """Return prompts as turns of a user that are not finished.

    Raises:
        StochaError: there is no chat template, it refuses a prompt, or it does not show a user's text once.
    """
    _check_template(tokenizer, "it tells a model where a request ends; without one give whole prompts, and --plain")
    turns = []
    for number, prompt in enumerate(prompts, 1):
        begun = (prompt if isinstance(prompt, str) else str(prompt[-1]["content"])).rstrip(" ")
        turn = OpenTurn("", "", begun, None if isinstance(prompt, str) else tuple(prompt[:-1]))
        parts = _templated(tokenizer, turn.prompt(begun + MARK), number).split(MARK)
        if len(parts) != 2:
            raise StochaError(
                f"the chat template shows the user's text of prompt {number} {len(parts) - 1} times: expected once, "
                "where the model can write it on"
            )
        turns.append(replace(turn, text=parts[0], after=parts[1]))
    return turns


def token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Return token ids of texts; one that begins with the tokenizer's BOS does not get another."""
    bos = tokenizer.bos_token
    found = []
    for text in texts:
        has_bos = bool(bos) and text.startswith(bos)
        found.append(tokenizer(text, add_special_tokens=not has_bos)["input_ids"])
    return found


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: those of the model's generation config, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}
