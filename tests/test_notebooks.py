"""The notebooks run from the first cell to the last, as plain Python in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_warm

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = run_warm(f"import tempfile\ntempfile.tempdir = {str(tmp_path)!r}\n{code}")
    assert done.returncode == 0, done.stderr
    sparse = next(line for line in done.stdout.splitlines() if line.startswith("sparse"))
    assert sparse.endswith(("79%", "80%", "81%")), done.stdout
