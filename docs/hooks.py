"""mkdocs hook: put what the package says of itself into pages, so that they cannot grow stale.

COMMANDS becomes every command's --help, MODULES the first sentence of every module's docstring. mkdocs.yml names this
file.
"""

from __future__ import annotations

import ast
import io
import os
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

COMMANDS, MODULES = "<!-- commands -->", "<!-- modules -->"
VERBS = sorted(path.stem for path in Path("stocha_hf/cli").glob("*.py") if not path.stem.startswith("_"))


def on_page_markdown(markdown: str, **_: Any) -> str:
    for marker, text in {COMMANDS: commands, MODULES: modules}.items():
        if marker in markdown:
            markdown = markdown.replace(marker, text())
    return markdown


def modules() -> str:
    paths = [path for path in sorted(Path("stocha_hf").rglob("*.py")) if path.name != "__init__.py"]
    return "| module | purpose |\n| --- | --- |\n" + "".join(f"| `{path}` | {purpose(path)} |\n" for path in paths)


def purpose(path: Path) -> str:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(docstring.partition("\n\n")[0].split()).replace("|", "\\|")


def commands() -> str:
    return "\n".join(map(section, VERBS))


def section(verb: str) -> str:
    return f"## stocha-{verb}\n\n```text\n{help_text(verb)}```\n"


def help_text(verb: str) -> str:
    printed = io.StringIO()
    call = mock.patch.object(sys, "argv", [f"stocha-{verb}", "--help"])
    with call, mock.patch.dict(os.environ, COLUMNS="100"), redirect_stdout(printed), suppress(SystemExit):
        import_module(f"stocha_hf.cli.{verb}").main()
    return printed.getvalue()
