"""Imports go one way: a unit of the package may use the units below it in ORDER, and no two modules use each other.

Read from the sources, so that imports inside functions count as well. `if TYPE_CHECKING` counts too: a type that can
only be named by looking upwards is a type in the wrong place. The one exception is stocha_hf/__init__.py, the public
names above everything, which loads what it offers when it is asked for.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parent.parent / "stocha_hf"
ORDER = [  # from the commands down; units that stand beside each other do not use each other
    {"cli"},
    {"conversion", "training"},
    {"publishing"},
    {"tasks"},
    {"measurement"},
    {"answers"},
    {"models"},
    {"data", "hub"},
    {"checkpoints"},
    {"patching", "quantization_stocha"},
    {"cuts_stocha"},
    {"modeling_stocha", "mlx_stocha", "sparse"},  # sparse: what published files of 0.1 look for
    {"decoding"},
    {"spec", "quantization", "progress"},
    {"cuts"},
    {"rules"},
    {"errors"},
]
FLOOR = {unit: floor for floor, units in enumerate(ORDER) for unit in units}


class Import(NamedTuple):
    importer: str  # module names without the leading "stocha_hf."
    imported: str
    line: int

    def __str__(self) -> str:
        return f"stocha_hf.{self.importer}, line {self.line}, imports stocha_hf.{self.imported}"


def unit(module: str) -> str:
    return module.partition(".")[0]


def sources(package: Path) -> dict[str, Path]:
    """Module name -> file; a sub-package's __init__.py has the sub-package's name, and the package's own is ''."""
    names = {path: path.relative_to(package).with_suffix("").parts for path in sorted(package.rglob("*.py"))}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


@functools.cache
def imports(package: Path) -> list[Import]:
    """Every import of the package's own modules, wherever in the file it stands."""
    return sorted(set(read(package)))


def read(package: Path) -> Iterator[Import]:
    modules = sources(package)
    for module, path in modules.items():
        own_package = path.relative_to(package).parent.parts
        for node in ast.walk(ast.parse(path.read_text())):
            for name in imported_names(node, package.name, own_package):
                while name and name not in modules:  # a class or function: the module that holds it
                    name = name.rpartition(".")[0]
                if name != module:
                    yield Import(module, name, node.lineno)  # type: ignore[attr-defined]


def imported_names(node: ast.AST, package: str, own_package: tuple[str, ...]) -> list[str]:
    """Full names after the package's, for `import`, `from`, and relative `from`."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        above = [package, *own_package][: len(own_package) + 2 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        names = [f"{base}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
        names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return [name[len(package) + 1 :] for name in names if name == package or name.startswith(f"{package}.")]


def upward(found: list[Import]) -> list[str]:
    """Imports of a unit that is not below the importer's own."""
    between = [one for one in found if one.importer and unit(one.importer) != unit(one.imported)]
    return [str(one) for one in between if not one.imported or FLOOR[unit(one.importer)] >= FLOOR[unit(one.imported)]]


def circles(found: list[Import]) -> list[str]:
    """Imports by which a module reaches itself."""
    below: dict[str, set[str]] = {}
    for one in found:
        if one.importer and one.imported:
            below.setdefault(one.importer, set()).add(one.imported)

    def reaches(start: str, goal: str) -> bool:
        seen, waiting = set(), [start]
        while waiting:
            module = waiting.pop()
            if module == goal:
                return True
            if module not in seen:
                seen.add(module)
                waiting.extend(below.get(module, ()))
        return False

    return [str(one) for one in found if one.importer and one.imported and reaches(one.imported, one.importer)]


def test_every_unit_of_the_package_has_a_floor() -> None:
    assert {unit(module) for module in sources(PACKAGE)} - {"", "__main__"} == set(FLOOR)


def test_imports_go_down() -> None:
    wrong = upward(imports(PACKAGE))
    assert not wrong, "imports that go up:\n" + "\n".join(wrong)


def test_imports_make_no_circle() -> None:
    wrong = circles(imports(PACKAGE))
    assert not wrong, "imports in a circle:\n" + "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "line", "finds"),
    [
        ("spec.py", "from stocha_hf.models import load", upward),
        ("spec.py", "def f():\n    import stocha_hf.cli.convert", upward),
        ("spec.py", "if TYPE_CHECKING:\n    from .models import Model", upward),
        ("decoding/ops.py", "from ..cli import convert", upward),
        ("training/a.py", "from stocha_hf import conversion", upward),
        ("spec.py", "import_module('stocha_hf.models')", upward),
        ("spec.py", "from stocha_hf import patch", upward),
        ("training/a.py", "from .b import thing", circles),
    ],
)
def test_both_checks_name_the_offending_import(tmp_path: Path, path: str, line: str, finds: object) -> None:
    package = tmp_path / "stocha_hf"
    files = {"conversion/c.py": "", "cli/convert.py": "", "models.py": "", "training/a.py": ""}
    for name, code in (files | {"training/b.py": "import stocha_hf.training.a", path: line}).items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(code)
        (package / name).with_name("__init__.py").touch()
    module = path.removesuffix(".py").replace("/", ".")
    assert any(text.startswith(f"stocha_hf.{module}, line ") for text in finds(imports(package)))  # type: ignore
