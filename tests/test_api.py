"""The public names: what `import stocha_hf` offers, typed and documented, and cheap until used."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest
from helpers import run_python

import stocha_hf

FUNCTIONS = [name for name in stocha_hf.__all__ if inspect.isroutine(getattr(stocha_hf, name))]


def test_the_names_that_type_checkers_see_are_those_at_run_time() -> None:
    tree = ast.parse(Path(str(stocha_hf.__file__)).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(typed) == set(stocha_hf.__all__) == set(dir(stocha_hf))
    for name, home in typed.items():
        assert getattr(import_module(str(home)), name) is getattr(stocha_hf, name)
    with pytest.raises(AttributeError, match="no attribute 'converted'"):
        stocha_hf.converted  # noqa: B018


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_annotated_and_say_what_they_take_return_and_raise(name: str) -> None:
    function = inspect.unwrap(getattr(stocha_hf, name))
    signature, text = inspect.signature(function), inspect.getdoc(function) or ""
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    first = text.splitlines()[0]
    assert first.endswith(".") and first[0].isupper() and not first.startswith(("The ", "A ", "This "))
    assert "Args:" in text and "Raises:" in text
    assert "Returns:" in text or signature.return_annotation in ("None", "Iterator[nn.Module]")


def test_importing_the_package_is_fast_and_free_of_torch() -> None:
    code = (
        "import sys, stocha_hf; dir(stocha_hf); print({'torch', 'transformers', 'numpy'} & set(sys.modules) or 'none')"
    )
    assert run_python(code).stdout.split() == ["none"]
