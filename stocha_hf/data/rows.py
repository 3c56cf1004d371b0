"""The rows of a Hub data set (streaming or not), or of local parquet, jsonl, json, csv or txt files.

Which of trl's formats a data set has is read off its columns: `input_ids` (token ids, whose rows are used as they are
with packing off and dataset_kwargs {"skip_prepare_dataset": true}), `messages` (chat), `prompt` and `completion`, or a
text column. Files of stocha-answers have `finished` beside a prompt and its completion. Packing and masking are trl's,
as is tokenizing, but of answers; this module finds the data and says in one sentence what is wrong with it. A row
whose text is null is left out: null never becomes a word.

    load_data("HuggingFaceFW/fineweb-edu", split="train", streaming=True)
    load_data("books.parquet", text_column="body")
    load_mixture({"answers.jsonl": 0.7, "code.parquet": 0.3}, seed=0)
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocha_hf.data.files import explain, first_line, local_files
from stocha_hf.data.row_text import plain_text, text_of
from stocha_hf.errors import StochaError
from stocha_hf.rules import is_number

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

READY_COLUMNS = (["input_ids"], ["messages"], ["completion", "finished", "prompt"], ["completion", "prompt"])
HTTP = ("httpx", "httpcore", "requests", "aiohttp")  # whose messages may hold headers or signed addresses


def load_data(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Open a data set and keep its training columns: `input_ids`, `messages`, `prompt` and `completion`, or `text`.

    With `prompt` and `completion` it keeps `finished`, which files of stocha-answers have.

    Args:
        name: A local file, a folder of files of one kind, or a Hub data set.
        config: Configuration of a Hub data set.
        split: Split of a Hub data set.
        text_column: The column that becomes `text` where there is no other training column.
        streaming: Read rows as they are asked for.

    Returns:
        The data set, without rows in which one of these columns is null.

    Raises:
        StochaError: there is no such data set, it cannot be read, it has no such column, or it is empty. Of a stream,
            a row may raise it when it is read.
    """
    found = local_files(name)
    with reading(name, found and found[1]):
        data = _open(name, config, split, streaming, found)
        first = next(iter(data), None)
    if first is None:
        raise StochaError(f"{name} (split {split}) is empty: expected at least one row of text")
    columns = next((wanted for wanted in READY_COLUMNS if set(wanted) <= set(first)), ["text"])
    if columns == ["text"] and text_column not in first:
        raise StochaError(
            f"{name} has the columns {', '.join(first)}: expected the text column {text_column!r}, messages, or "
            "prompt and completion; name it with dataset_text_column"
        )
    if columns == ["text"] and text_column != "text":
        data = (data.remove_columns("text") if "text" in first else data).rename_column(text_column, "text")
        first["text"] = first[text_column]
    with reading(name, found and found[1]):
        return _usable(name, data.select_columns(columns), first, partial(_is_usable, columns, name, text_column))


def check_text(name: str | Path) -> None:
    """Open a data set of text as `load_data` does, before long work that reads it later: raises StochaError."""
    plain_text(next(iter(load_data(str(name), streaming=local_files(str(name)) is None))))


def load_mixture(shares: Mapping[str, float], seed: int, **options: Any) -> Dataset | IterableDataset:
    """Open several data sets as one, whose rows are drawn from each with the share that it is given.

    A share of the text that a model was trained on before (replay; Ibrahim et al., arXiv 2403.08763) keeps what it
    learned there. Text may be mixed with prompts and completions: it becomes the completion of an empty prompt. An
    epoch ends when every row of every data set was drawn; rows of small ones come again until then.

    Args:
        shares: The share of rows of each data set, by a name as in `load_data`; any positive numbers.
        seed: Of the draws.
        **options: Of `load_data`, for each of them.

    Returns:
        The mixed rows.

    Raises:
        StochaError: a share is not a positive number, the data sets have different training columns, or texts and
            messages in them, or one of them cannot be read.
    """
    if not shares or not all(is_number(share) and 0 < share < math.inf for share in shares.values()):
        raise StochaError(f"datasets is {dict(shares)!r}: expected data sets, each with a share above 0")
    parts = {name: load_data(name, **options) for name in shares}
    rows = {name: next(iter(part)) for name, part in parts.items()}
    columns = {name: sorted(row) for name, row in rows.items()}
    first = next(iter(columns))
    other = next((name for name in columns if columns[name] != columns[first]), None)
    if other and all(isinstance(row.get("text", row.get("completion")), str) for row in rows.values()):
        wanted = sorted(set().union(*columns.values()) - {"text"})
        parts = {name: _with_columns(part, wanted) for name, part in parts.items()}
    elif other:
        raise StochaError(
            f"datasets mixes {first} ({', '.join(columns[first])}) with {other} ({', '.join(columns[other])}): "
            "expected data sets with the same training columns, or text alone"
        )
    for name, column in () if other else ((name, column) for name in rows for column in columns[first]):
        if isinstance(rows[name][column], str) != isinstance(rows[first][column], str):
            raise StochaError(
                f"datasets mixes text with messages in the column {column} of {first} and {name}: "
                "expected one of the two"
            )
    from datasets import Value, interleave_datasets

    for column in () if other else columns[first]:  # parquet's large strings and JSON's do not mix
        if isinstance(rows[first][column], str):
            parts = {name: part.cast_column(column, Value("string")) for name, part in parts.items()}
    total = math.fsum(shares.values())
    odds = [share / total for share in shares.values()]
    return interleave_datasets([*parts.values()], odds, seed=seed, stopping_strategy="all_exhausted")


def _with_columns(part: Any, wanted: list[str]) -> Any:
    """Rows of text, or of prompts and completions, as the latter; without `finished` it becomes null."""
    from datasets import Features, Value

    def with_columns(row: dict[str, Any]) -> dict[str, Any]:
        row = {"prompt": "", "completion": row.get("text"), "finished": None} | dict(row)  # a lazy one
        return {column: row[column] for column in wanted}

    given = [*next(iter(part))]
    types = {column: Value("bool" if column == "finished" else "string") for column in wanted}
    return part.map(with_columns, remove_columns=given, features=Features(types))


def load_rows(name: str, *, split: str = "train") -> Dataset:
    """Open a data set with all its columns; `name` and `split` as in `load_data`.

    Raises:
        StochaError: there is no such data set, it cannot be read, or it is empty.
    """
    found = local_files(name)
    with reading(name, found and found[1]):
        data = _open(name, None, split, False, found)
    if len(data) == 0:
        raise StochaError(f"{name} (split {split}) is empty: expected at least one row")
    return data


def _open(name: str, config: str | None, split: str, streaming: bool, found: tuple[str, list[Path]] | None) -> Any:
    if find_spec("datasets") is None:
        raise StochaError(
            f"reading {name} needs the package datasets, which is not installed: run pip install 'stocha_hf[train]'"
        )
    from datasets import disable_progress_bars, load_dataset
    from datasets.utils.logging import CRITICAL, set_verbosity

    set_verbosity(CRITICAL)  # it prints what it raises as well
    if not sys.stderr.isatty():
        disable_progress_bars()
    if found is None:
        return load_dataset(name, config, split=split, streaming=streaming)
    builder, files = found
    # one row a paragraph would lose the order of a text file's lines
    extra: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
    return load_dataset(builder, data_files={split: [*map(str, files)]}, split=split, streaming=streaming, **extra)


@contextmanager
def reading(name: str, files: list[Path] | None) -> Iterator[None]:
    """Turn what datasets, pyarrow, pandas and httpx raise for a broken file or connection into a sentence.

    A stream is opened without being read, so that it may be raised at any row.
    """
    try:
        yield
    except (StochaError, MemoryError):
        raise
    except StopIteration:  # datasets itself raises it for an empty JSON file
        raise StochaError(f"{name} is empty: expected at least one row of text") from None
    except Exception as error:
        if "corresponds to no data" in str(error):
            raise StochaError(f"{name} is empty: expected at least one row of text") from None
        if files is not None:
            raise StochaError(explain(files, error)) from error
        kind = type(error)
        reason = kind.__name__ if kind.__module__.startswith(HTTP) else first_line(error)
        raise StochaError(
            f"the data set {name} cannot be read from the Hub ({reason}): expected the id of a data set that you may "
            "read, or a local file"
        ) from error


def _usable(name: str, data: Any, first: dict[str, Any], keep: Callable[[dict[str, Any], int], bool]) -> Any:
    """The data's rows that `keep` is true of; it refuses a row of the wrong form, and says so with its number."""
    keep(first, 0)
    if not hasattr(data, "__len__"):
        return data.filter(keep, with_indices=True)
    if all(_is_plain(data, column) for column in data.column_names if column != "finished"):
        return data
    kept = [i for i, row in enumerate(data) if keep(row, i)]
    if not kept:
        raise StochaError(
            f"every row of {name} has null in the column {' or '.join(data.column_names)}: expected text"
        )
    if len(kept) == len(data):
        return data
    missing = len(data) - len(kept)
    logging.getLogger(__name__).warning("%s: %d of %d rows have no text and are left out", name, missing, len(data))
    return data.select(kept)


def _is_plain(data: Any, column: str) -> bool:
    """Whether all rows have the first one's form, as Arrow's type says, and none is null."""
    kinds = str(data.features[column])
    return "Json" not in kinds and "null" not in kinds and not data.data.column(column).null_count


def _is_usable(columns: list[str], name: str, text_column: str, row: dict[str, Any], index: int) -> bool:
    if "input_ids" not in columns:
        for column in (column for column in columns if column != "finished"):
            given = text_column if column == "text" else column
            text_of(row[column], column, f"in the column {given} of row {index + 1} of {name}")
    return all(row[column] is not None for column in columns if column != "finished")
