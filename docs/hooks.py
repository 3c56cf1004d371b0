"""mkdocs hook: put every command's --help where a page says COMMANDS, so that the reference cannot grow stale.

Reads the parsers themselves; mkdocs.yml names this file.
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

COMMANDS = "<!-- commands -->"
VERBS = sorted(path.stem for path in Path("stocha_hf/cli").glob("*.py") if not path.stem.startswith("_"))


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(COMMANDS, "\n".join(map(section, VERBS))) if COMMANDS in markdown else markdown


def section(verb: str) -> str:
    return f"## stocha-{verb}\n\n```text\n{help_text(verb)}```\n"


def help_text(verb: str) -> str:
    printed = io.StringIO()
    call = mock.patch.object(sys, "argv", [f"stocha-{verb}", "--help"])
    with call, mock.patch.dict(os.environ, COLUMNS="100"), redirect_stdout(printed), suppress(SystemExit):
        import_module(f"stocha_hf.cli.{verb}").main()
    return printed.getvalue()
