"""YAML as recipes need it: no aliases, no key twice, and every error a sentence.

An alias repeats what an anchor names; ten lines of aliases of aliases stand for more values than memory holds. No
recipe needs them.
"""

from __future__ import annotations

from typing import Any

import yaml

from stocha_hf.errors import StochaError


class _Plain(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"the alias *{self.peek_event().anchor} is not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {twice} is there twice")
        return super().construct_mapping(node, deep)


def plain_yaml(text: str | bytes, what: str) -> Any:
    """The value of a YAML or JSON text. Raises StochaError, which calls the text `what`."""
    try:
        return yaml.load(text, _Plain)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).partition("\n")[0] or "nested too deeply"
        place = f", line {mark.line + 1}" if mark else ""
        raise StochaError(
            f"{what} is not YAML{place} ({reason}): expected keys, each once, and values without aliases"
        ) from None
