"""The tables and the StochaConfig of modeling_stocha.py, without importing torch.

Converting copies files and needs no tensor, while importing torch costs seconds and hundreds of megabytes.
modeling_stocha.py has to stay one self-contained file, so its torch-free half is not moved here but read from it:
everything above the first class that derives from a torch or transformers name, less the imports of those two.

    from stocha_hf.spec import ACTIVATIONS, ARCHITECTURES, POSITIVE_SIDES, StochaConfig, __version__
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

MODELING_FILE = Path(__file__).with_name("modeling_stocha.py")
HEAVY = ("torch", "transformers")


def _torch_free_half(path: Path) -> ModuleType:
    body: list[ast.stmt] = []
    heavy_names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        imported = _imported_from(node)
        if imported and imported[0] in HEAVY:
            heavy_names.update(imported[1])
        elif isinstance(node, ast.ClassDef) and any(_root(base) in heavy_names for base in node.bases):
            break
        else:
            body.append(node)
    module = ModuleType(f"{__name__}._{path.stem}")
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    exec(compile(ast.Module(body, type_ignores=[]), str(path), "exec"), module.__dict__)
    return module


def _imported_from(node: ast.stmt) -> tuple[str, list[str]] | None:
    """The top-level package an import statement reads, and the names it binds."""
    if isinstance(node, ast.ImportFrom):
        return str(node.module).split(".")[0], [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return node.names[0].name.split(".")[0], [alias.asname or alias.name for alias in node.names]
    return None


def _root(expression: ast.expr) -> str | None:
    """`nn` of `nn.Module`."""
    while isinstance(expression, ast.Attribute):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else None


if TYPE_CHECKING:
    from .modeling_stocha import ACTIVATIONS, ARCHITECTURES, POSITIVE_SIDES, Architecture, StochaConfig, __version__
else:
    _half = _torch_free_half(MODELING_FILE)
    ACTIVATIONS = _half.ACTIVATIONS
    ARCHITECTURES = _half.ARCHITECTURES
    POSITIVE_SIDES = _half.POSITIVE_SIDES
    Architecture = _half.Architecture
    StochaConfig = _half.StochaConfig
    __version__ = _half.__version__

__all__ = [
    "ACTIVATIONS",
    "ARCHITECTURES",
    "MODELING_FILE",
    "POSITIVE_SIDES",
    "Architecture",
    "StochaConfig",
    "__version__",
]
