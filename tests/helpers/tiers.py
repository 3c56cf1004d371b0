"""Which of a test's parameters the fast tests run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_is_fast(values: Iterable[Any]) -> list[Any]:
    """The values of a parametrized test, all but the first of them marked slow."""
    first, *others = values
    rows = [value if isinstance(value, tuple) else (value,) for value in others]
    return [first, *(pytest.param(*row, marks=pytest.mark.slow) for row in rows)]
