"""The command line: one small file per verb, each a parser and a `main`; this one holds what they share.

Heavy imports happen inside `main`, so --help answers at once. A user's mistake is one sentence on stderr and exit
status 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from stocha_hf.errors import StochaError

DTYPES = ("bfloat16", "float16", "float32")


class Parser(argparse.ArgumentParser):
    """argparse with the docstring as help, and errors of one sentence."""

    def __init__(self, prog: str, doc: str | None) -> None:
        summary, _, rest = str(doc).partition("\n\n")
        super().__init__(
            prog,
            description=summary,
            epilog=rest,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def run(parser: Parser, command: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and run the command, turning StochaErrors into a sentence and exit status 2."""
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its warnings about retries hold signed addresses
    try:
        command(args)
    except StochaError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise StochaError(f"--dtype is {name}: expected one of {', '.join(DTYPES)}")


def show(figures: Any, text: str, as_json: bool) -> None:
    print(json.dumps(figures) if as_json else text)
