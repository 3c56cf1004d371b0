"""The text of a row: of a text column, of chat messages, or of a prompt and its completion.

A value that is not text is refused in one sentence which says where it stands.

    plain_text({"messages": [{"role": "user", "content": "hi"}]})      # "hi"
"""

from __future__ import annotations

from typing import Any

from stocha_hf.errors import StochaError


def plain_text(row: dict[str, Any]) -> str:
    """A row's text: its prompt and completion in one, or messages with empty lines between."""
    if "input_ids" in row:
        raise StochaError("the data set holds token ids: expected text, which the model's own tokenizer reads")
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return str(row["prompt"] + row["completion"])
    columns = [column for column in ("messages", "prompt", "completion", "text") if column in row]
    return "\n\n".join(text for column in columns if (text := text_of(row[column], column, f"in the column {column}")))


def pair_ids(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, with what the tokenizer puts before a text, and of what a model wrote behind it.

    They are read apart, as they were in decoding: in one text, a token could be of both.
    """
    return tokenizer(prompt)["input_ids"], tokenizer(completion, add_special_tokens=False)["input_ids"]


def text_of(value: Any, column: str, where: str) -> str:
    """The text in a column: a string, or messages. `where` says in an error which value it is."""
    if value is None or (isinstance(value, str) and column != "messages"):
        return value or ""
    if not isinstance(value, list) or column == "text":
        expected = "a list of messages" if column == "messages" else "text"
        raise StochaError(f"there is {_shown(value)} {where}: expected {expected}")
    return "\n\n".join(_content_of(message, where) for message in value)


def _content_of(message: Any, where: str) -> str:
    """The text of a chat message, whose content is a string, null, or a list of parts of which some are text."""
    if not isinstance(message, dict) or "content" not in message:
        raise StochaError(f"there is the message {_shown(message)} {where}: expected an object with role and content")
    content = message["content"]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(text for part in content if isinstance(text := part.get("text"), str))
    if content is not None and not isinstance(content, str):
        raise StochaError(f"a message has the content {_shown(content)} {where}: expected text")
    return content or ""


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
