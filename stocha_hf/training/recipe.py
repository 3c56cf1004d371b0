"""A recipe's YAML and its command line as dataclasses: every value is checked as on the command line.

trl's parser takes what YAML says as it is, so that a list may become a learning rate. Here each key of the file is
parsed like `--key value`, and an error is one sentence about that key.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

from trl import TrlParser

from stocha_hf.errors import StochaError
from stocha_hf.training.plain_yaml import plain_yaml

LARGEST = 2**20  # bytes of a recipe; those of this repository have 2,000
EXPECTED = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


def read_recipe(kinds: Sequence[Any], argv: list[str], config: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """An instance of each of the dataclasses `kinds`.

    Args:
        kinds: dataclasses, whose fields are the keys.
        argv: `--config FILE` (YAML) and `--key value` words; these win over the file.
        config: keys in place of the file.

    Raises:
        StochaError: for what cannot be read, for unknown keys and values of another type, and ValueErrors of the
            dataclasses.
    """
    argv, config = list(argv), dict(config or {})
    while (word := next((word for word in argv if word.partition("=")[0] == "--config"), None)) is not None:
        at = argv.index(word)
        value = word.partition("=")[2] or (argv.pop(at + 1) if len(argv) > at + 1 else "")
        argv.remove(word)
        config |= read_file(value)
    _set_environment(config.pop("env", {}))
    hints = {key: hint for kind in kinds for key, hint in get_type_hints(kind).items()}
    parser: Any = _Parser(list(kinds), add_help=False, allow_abbrev=False)
    words = parser.words_of(config, hints)
    return parser.parse_args_into_dataclasses([*words, *argv], look_for_args_file=False)


def read_file(name: str) -> dict[str, Any]:
    """The keys and values of a recipe's YAML file. Raises StochaError."""
    path = Path(os.path.expanduser(name))  # Path.expanduser raises where there is no such user
    try:
        if not path.is_file():
            raise StochaError(f"the recipe {name or '(none)'} is not a file: expected --config and a YAML file")
        if path.stat().st_size > LARGEST:
            raise StochaError(f"the recipe {name} has {path.stat().st_size} bytes: expected at most {LARGEST}")
        config = plain_yaml(path.read_bytes(), f"the recipe {name}")
    except OSError as error:
        raise StochaError(f"the recipe {name} cannot be read ({error.strerror}): expected a YAML file") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise StochaError(f"the recipe {name} holds no keys: expected lines such as learning_rate: 1.0e-4")
    return config


def _set_environment(variables: Any) -> None:
    if not isinstance(variables, dict) or any(isinstance(value, dict | list) for value in variables.values()):
        raise StochaError(f"env is {variables!r}: expected names of environment variables and their values")
    for key, value in variables.items():
        os.environ[str(key)] = str(value)


class _Parser(TrlParser):
    """trl's, with errors of one sentence."""

    def error(self, message: str) -> NoReturn:
        raise StochaError(message.partition("\n")[0])

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            return super().parse_args_into_dataclasses(*args, **kwargs)
        except StochaError:
            raise
        except (ValueError, TypeError, KeyError, OSError) as error:  # the dataclasses' own checks
            raise StochaError(str(error).partition("\n")[0]) from None

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        convert: Any = self._registry_get("type", action.type, action.type)
        try:
            return convert(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            expected = EXPECTED.get(getattr(convert, "__name__", ""), "another kind of value")
            raise StochaError(f"{action.dest} is {text!r}: expected {expected}") from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise StochaError(f"{action.dest} is {value!r}: expected one of {', '.join(map(str, action.choices))}")

    def words_of(self, config: dict[str, Any], hints: dict[str, Any]) -> list[str]:
        """The command line that gives the keys of a recipe.

        None, and lists and mappings where the dataclasses take them (`hints`: their annotations), become defaults.
        """
        actions = {action.dest: action for action in reversed(self._actions)}
        if unknown := [key for key in config if key not in actions]:
            raise StochaError(f"the recipe has the key {unknown[0]!r}: expected a key of training, of trl or of peft")
        words: list[str] = []
        for key, value in config.items():
            action, types = actions[key], {get_origin(hint) or hint for hint in get_args(hints[key]) or [hints[key]]}
            if isinstance(value, list) and action.nargs == "+":
                words += [f"--{key}", *map(str, value)]
            elif value is None:
                if action.default is not None and type(None) not in types:
                    raise StochaError(f"{key} is empty: expected a value, or no such key")
                action.default = None
            elif isinstance(value, dict | list):
                if type(value) not in types:
                    raise StochaError(f"{key} is {value!r}: expected one value")
                action.default = value
            else:
                words.append(f"--{key}={value}")
        return words
