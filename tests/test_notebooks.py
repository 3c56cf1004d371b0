"""The notebooks run from the first cell to the last, as plain Python in a fresh process.

That for Colab takes its model and text from the Hub; here from a folder and a file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import run_warm, tiny_model, tiny_tokenizer

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    tiny_model(max_position_embeddings=1024).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": " ".join(f"w{(7 * i + i * j) % 60}" for j in range(400))} for i in range(96)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"MODEL": str(tmp_path / "model"), "DATA": str(tmp_path / "text.jsonl"), "TOKENS": "16384"}
    before = f"import os, tempfile\ntempfile.tempdir = {str(tmp_path)!r}\nos.environ.update({given!r})\n"
    done = run_warm(before + code)
    assert done.returncode == 0, done.stderr
    sparse = next(line for line in done.stdout.splitlines() if line.startswith("sparse"))
    assert sparse.endswith(("79%", "80%", "81%")), done.stdout
