"""How far long work has come: a bar on a terminal; elsewhere, as in a log, a line on stderr every EVERY seconds.

It is tqdm, and is used like it. What takes less than EVERY seconds leaves nothing behind in a log.

    with Progress(total=64, desc="Refitting", unit="step") as bar:   # Refitting:  50% 32/64 [00:31<00:31,  1.03step/s]
        bar.update()
"""

from __future__ import annotations

import math
import sys
from typing import Any

from tqdm import tqdm

EVERY = 30  # seconds


class Progress(tqdm):
    """A tqdm that is gone when it is done, and writes lines where nobody watches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.in_lines = not sys.stderr.isatty()
        lines = {"delay": EVERY, "mininterval": EVERY, "maxinterval": math.inf, "miniters": 1, "ncols": 0}
        super().__init__(*args, **{"leave": False} | kwargs | (lines if self.in_lines else {}))

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # type: ignore[override] # of the stubs
        """Show how far it is, and return whether there is a bar, which an empty `msg` wipes; a line stays."""
        if not self.in_lines:
            return bool(super().display(msg, pos))
        if msg != "":
            print(self, file=self.fp, flush=True)
        return False
