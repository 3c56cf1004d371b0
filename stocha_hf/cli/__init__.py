"""The command line: one small file per verb, each a parser and a `main`. This one holds what they share.

A user's mistake is one sentence on stderr and exit status 2. A kind of mistake is refused in one place: an option's
`type=` is one of the functions below (`whole_number(1)`, `probability`, `path_or_id`, ...), so that what an option
accepts stands beside its name, and is checked before anything is read. Heavy imports happen inside a verb's function,
so --help answers at once.

    verb = Parser("stocha-eval", __doc__)
    verb.add_argument("--length", type=whole_number(2), default=1024)
    run(verb, evaluate)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeVar

from stocha_hf.checkpoints.names import check_hub_id
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.errors import StochaError

DTYPES = ("bfloat16", "float16", "float32")
T = TypeVar("T")
_NO_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")


class Parser(argparse.ArgumentParser):
    """argparse with a verb's docstring as help, and errors of one sentence."""

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
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)  # "--k: is 0: expected" from `checked`
        self.exit(2, f"{self.prog}: {one_line(message)}; see {self.prog} --help\n")


def run(parser: Parser, command: Callable[[argparse.Namespace], None]) -> None:
    """Parse the command line and run `command`, turning StochaErrors into a sentence and exit status 2."""
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its warnings about retries hold signed addresses
    try:
        command(args)
    except StochaError as error:
        fail(parser.prog, str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        fail(parser.prog, "there is not enough memory for this: expected a smaller model, batch or shape")


def fail(prog: str, sentence: str) -> NoReturn:
    """Print one sentence on stderr and exit with status 2."""
    print(f"{prog}: {one_line(sentence)}", file=sys.stderr)
    sys.exit(2)


def one_line(text: str) -> str:
    """`text` with line breaks and other control characters as escapes: names that users give may hold any."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def show(figures: Any, text: str, as_json: bool) -> None:
    """Print `figures` as JSON, or else `text`. Raises StochaError for NaN and infinity, which JSON cannot hold."""
    try:
        print(json.dumps(figures, allow_nan=False) if as_json else text)
    except ValueError:
        raise StochaError("a figure is NaN or infinite, which JSON cannot hold: check the model's weights") from None


# Types of options: each turns the text that was given into a value, or says what it expected.


def checked(parse: Callable[[str], T], accepts: Callable[[T], bool], expected: str) -> Callable[[str], T]:
    """An option's type: `parse` the text, and refuse whatever it cannot read or `accepts` denies."""

    def convert(text: str) -> T:
        try:
            value = parse(text)
            accepted = accepts(value)
        except ValueError:
            accepted = False
        if not accepted:
            raise _refusal(text, expected)
        return value

    return convert


def _refusal(text: str, expected: str) -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"is {text if text.strip() else repr(text)}: expected {expected}")


def whole_number(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a count between `least` and `most`."""
    expected = f"a whole number of at least {least}" if most == 2**31 - 1 else f"a whole number from {least} to {most}"
    return checked(int, lambda count: least <= count <= most, expected)


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """The type of a choice. argparse's own `choices` would list them all in --help's first lines."""
    return checked(str, lambda text: text in names, f"one of {', '.join(names)}")


probability = checked(float, lambda p: 0 <= p <= 1, "a probability between 0 and 1")
positive_number = checked(float, lambda number: 0 < number < math.inf, "a number above 0")
number_from_0 = checked(float, lambda number: 0 <= number < math.inf, "a number of 0 or more")
share = checked(float, lambda share: 0 < share < 1, "a share between 0 and 1")
share_below_1 = checked(float, lambda share: 0 <= share < 1, "a share from 0 to below 1")
dtype_name = one_of(DTYPES)


def path_or_id(text: str) -> str:
    """The type of a local path or Hub id: any text that can be one."""
    try:
        local_path(text)
    except StochaError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def hub_id(text: str) -> str:
    """The type of a Hub repo's id."""
    try:
        check_hub_id(text, "it")
    except StochaError:
        raise _refusal(text, "a Hub id such as org/name") from None
    return text
