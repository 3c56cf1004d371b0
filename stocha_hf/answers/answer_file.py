"""The file of a model's answers: rows are added as they come, and a run that was killed goes on with it.

Rows are lines of JSON. A parquet file is made of such lines, beside it, when all are there. How answers were made lies
in a file named .settings: another model or temperature cannot go on with them. There are the ids, too, of answers that
were not written as equal ones are there, so that they are not drawn again; a run that is killed draws its own again.

    with (file := AnswerFile(Path("answers.jsonl"), {"new": 512, "temperature": 0.8})):
        file.add({"prompt": "...", "completion": "...", "finished": True, "id": "5f0c..."})
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


class RowFile:
    """Lines of JSON on disk, as a context: `ids` tells which rows are there.

    Raises StochaError where it holds rows that were made otherwise than `made` says. That is checked at once; nothing
    is written before the context is entered.
    """

    holds = "answers"

    def __init__(self, path: Path, made: dict[str, Any]) -> None:
        self.path, self.lines = path, path.with_name(path.name + ".part.jsonl") if path.suffix == ".parquet" else path
        self.made, self.settings = made, path.with_name(path.name + ".settings")
        self.ids: set[str] = set()
        self.equal: list[str] = []  # of rows that were not written
        if path.exists() or self.lines.exists():
            self._check_settings()
        for row in self.rows():
            self._note(row)

    def _check_settings(self) -> None:
        """Refuse to go on with rows that were made otherwise."""
        made = json.loads(json.dumps(self.made))
        try:
            before = dict(json.loads(self.settings.read_text()))
            self.equal = [*before.pop("equal", [])]
        except (OSError, TypeError, ValueError):  # also where it is JSON of another kind
            raise StochaError(
                f"{self.path.name} is there without a readable {self.settings.name}: expected {self.holds} of this "
                "command; name another output"
            ) from None
        self.ids.update(self.equal)
        before.pop("samples", None)  # of earlier versions: more can be drawn later
        for key in made.keys() | before.keys():
            if made.get(key) != before.get(key):
                raise StochaError(
                    f"{self.path.name} holds {self.holds} with {key} {before.get(key)!r}, and {key} is "
                    f"{made.get(key)!r} now: expected the same, or another output"
                )

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that are there, in the order in which they were added."""
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
        """Whether the row is to be written."""
        self.ids.add(row["id"])
        return True

    def __enter__(self) -> RowFile:
        self._write_settings()
        self.file: IO[str] = self.lines.open("a", encoding="utf-8")
        return self

    def add(self, row: dict[str, Any]) -> None:
        """Write a row."""
        if self._note(row):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        else:
            self.equal.append(row["id"])

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self.file.close()
        self._write_settings()

    def _write_settings(self) -> None:
        held = self.made | ({"equal": self.equal} if self.equal else {})
        self.settings.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")


class AnswerFile(RowFile):
    """Answers on disk: equal texts are written once, and `finished` tells which of them ended.

    Raises StochaError where the file cannot be written, too, or has rows of an earlier version.
    """

    def __init__(self, path: Path, made: dict[str, Any]) -> None:
        check_output(path)
        self.texts: set[bytes] = set()
        self.finished: list[bool] = []
        super().__init__(path, made)

    def _note(self, row: dict[str, Any]) -> bool:
        super()._note(row)
        if "completion" not in row:
            raise StochaError(
                f"the rows of {self.path.name} do not tell a prompt from its answer: they can be read as they are, "
                "and a run cannot go on with them; name another output"
            )
        digest = hashlib.sha1(f"{row['prompt']}{row['completion']}".encode()).digest()
        if digest in self.texts:
            return False
        self.texts.add(digest)
        self.finished.append(row["finished"])
        return True

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if kind is None and self.path != self.lines:
            self._to_parquet()

    def _to_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        rows = [*{row["id"]: row for row in self.rows()}.values()]  # some twice, if a run was killed below
        beside = self.path.with_name(self.path.name + ".part")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), beside)
        os.replace(beside, self.path)
        self.lines.unlink()


def row_id(text: str, number: int | str) -> str:
    """The id of what follows a text for the first, second, ... time."""
    return hashlib.sha1(f"{number} {text}".encode()).hexdigest()


def draw_key(text: str, number: int | str) -> int:
    """The 64 bits that decide what is drawn there."""
    return int(row_id(text, number)[:16], 16)
