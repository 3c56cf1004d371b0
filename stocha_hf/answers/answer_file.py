"""The file of a model's answers: rows are added as they come, and a run that was killed goes on with it.

Rows are lines of JSON. A parquet file is made of such lines, beside it, when all are there. How answers were made lies
in a file named .settings: another model or temperature cannot go on with them.

    with AnswerFile(Path("answers.jsonl"), {"new": 512, "temperature": 0.8}) as file:
        file.add({"text": "...", "finished": True, "id": "5f0c..."})
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stocha_hf.checkpoints.paths import local_path
from stocha_hf.errors import StochaError

KINDS = (".jsonl", ".parquet")


def check_output(path: str | Path) -> None:
    """Raise StochaError for a file that answers cannot be written to: of another kind, or in no folder."""
    path = local_path(path)
    if path.suffix not in KINDS:
        raise StochaError(
            f"the output {path} is not a {' or '.join(KINDS)} file: expected a name such as answers{KINDS[0]}"
        )
    if not path.parent.is_dir():
        raise StochaError(f"the folder {path.parent} does not exist: expected one for {path.name}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StochaError(f"{path} cannot be written: expected a file, in a folder that you may write to")


class AnswerFile:
    """Answers on disk, as a context: `ids` and the texts' digests tell what is there, `finished` which texts ended.

    Raises StochaError where the file cannot be written or holds answers that were made otherwise than `made` says.
    """

    def __init__(self, path: Path, made: dict[str, Any]) -> None:
        check_output(path)
        self.path, self.lines = path, path if path.suffix == ".jsonl" else path.with_name(path.name + ".part.jsonl")
        self.ids: set[str] = set()
        self.texts: set[bytes] = set()
        self.finished: list[bool] = []
        _check_settings(path.with_name(path.name + ".settings"), made, exists=path.exists() or self.lines.exists())
        for row in self._rows():
            self._note(row)

    def _rows(self) -> Iterator[dict[str, Any]]:
        if self.path != self.lines and self.path.exists():
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(self.path).to_pylist()
        if self.lines.exists():
            content = self.lines.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):  # the last line of a run that was killed
                os.truncate(self.lines, whole)
            yield from map(json.loads, content[:whole].splitlines())

    def _note(self, row: dict[str, Any]) -> bool:
        """Whether the row's text is new."""
        self.ids.add(row["id"])
        digest = hashlib.sha1(row["text"].encode()).digest()
        if digest in self.texts:
            return False
        self.texts.add(digest)
        self.finished.append(row["finished"])
        return True

    def __enter__(self) -> AnswerFile:
        self.file: IO[str] = self.lines.open("a", encoding="utf-8")
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Write an answer, unless its text is there."""
        if self._note(row):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.file.close()
        if kind is None and self.path != self.lines:
            self._to_parquet()

    def _to_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = list(self._rows())
        beside = self.path.with_name(self.path.name + ".part")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), beside)
        os.replace(beside, self.path)
        self.lines.unlink()


def _check_settings(path: Path, made: dict[str, Any], exists: bool) -> None:
    """Keep how answers are made, or refuse to go on with answers that were made otherwise."""
    made = json.loads(json.dumps(made))
    try:
        before = json.loads(path.read_text()) if exists else None
    except (OSError, ValueError):
        raise StochaError(
            f"{path.name.removesuffix('.settings')} is there without a readable {path.name}: expected answers of this "
            "command; name another output"
        ) from None
    if before is None:
        path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        return
    for key in made.keys() | before.keys():
        if made.get(key) != before.get(key):
            raise StochaError(
                f"{path.name.removesuffix('.settings')} holds answers with {key} {before.get(key)!r}, and {key} is "
                f"{made.get(key)!r} now: expected the same, or another output"
            )
