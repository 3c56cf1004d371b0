"""Rules that an entry of config.json keeps, and the one sentence that refuses what breaks one; no torch.

modeling_stocha.py, which ships with every checkpoint, holds a copy of what is between the two marked lines.

    require(0 <= p <= 1, "p", p, "a probability between 0 and 1")
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

# --- copied into modeling_stocha.py from here ---

Rules = Iterator[tuple[str, bool, str]]  # a key, whether its value is right, and what was expected


def check_keys(cls: Any, where: str, entry: Any) -> None:
    """Raise ValueError where an entry as JSON holds it is not a mapping, or has a key that is not a field."""
    require(isinstance(entry, dict), where, entry, "a mapping")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in entry if key not in known)
    require(not unknown, where, unknown, f"no other keys than {', '.join(sorted(known))}")


def is_number(value: object) -> bool:
    """Return whether a value is an ordinary number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023


def are_numbers(values: object, least: float) -> bool:
    """Whether this is a list of one or more numbers, each `least` or more."""
    return isinstance(values, list) and bool(values) and all(is_number(x) and x >= least for x in values)


def require(ok: bool, key: str, given: object, expected: str) -> None:
    """Raise ValueError in one sentence unless ok."""
    if not ok:
        raise ValueError(f"{key} is {repr(given)[:200]}: expected {expected}")


def require_all(entry: Any, prefix: str, rules: Rules) -> None:
    for key, fits, expected in rules:  # one by one: a rule may rely on those before it
        require(fits, prefix + key, getattr(entry, key), expected)


# --- to here ---
