"""Values in a model card: whatever they hold, they stay text, and their own place.

A card's values come from config.json, a source's metadata, recipes and files of measurements, which others wrote: a
line break would begin a heading, a pipe another cell, a tag HTML, three backticks would end a fence.

    text("a | b <img>")      # a \\| b &lt;img&gt;
    code("stocha-eval `x`")  # ``stocha-eval `x` ``
    fence(yaml, "yaml")
"""

from __future__ import annotations

import re

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_SPECIAL = re.compile(r"([\\`*\[\]|])|(?<!\w)_|_(?!\w)")


def text(value: object) -> str:
    """Return `value` as one line of Markdown that shows it as it is, in a paragraph or in a table's cell."""
    escaped = _SPECIAL.sub(lambda found: f"\\{found[0]}", _line(value))
    return "".join(_ENTITIES.get(char, char) for char in escaped)


def code(value: object) -> str:
    """Return `value` as a span of code: between more backticks than it has in a row."""
    line = _line(value)
    if not line:
        return ""
    ticks = "`" * (_longest_run(line) + 1)
    space = " " if "`" in (line[0], line[-1]) else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fence(body: str, language: str) -> str:
    """Return `body` as a block of code."""
    ticks = "`" * max(3, _longest_run(body) + 1)
    return f"{ticks}{language}\n{body.rstrip()}\n{ticks}"


def _line(value: object) -> str:
    """`value` on one line, without control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())


def _longest_run(body: str) -> int:
    return max(map(len, re.findall("`+", body)), default=0)
