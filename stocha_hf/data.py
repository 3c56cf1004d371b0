"""Text to train and measure on: a Hub data set (streaming or not), or local parquet, jsonl, json, csv or txt files.

Which of trl's formats a data set has is read off its columns: `input_ids` (token ids, whose rows are used as they are
with packing off and dataset_kwargs {"skip_prepare_dataset": true}), `messages` (chat), `prompt` and `completion`, or a
text column. Tokenizing, packing and masking are trl's; this module finds the data and says in one sentence what is
wrong with it. A row whose text is null is left out: null never becomes a word.

    load_data("HuggingFaceFW/fineweb-edu", split="train", streaming=True)
    load_data("books.parquet", text_column="body")
    load_mixture({"answers.jsonl": 0.7, "code.parquet": 0.3}, seed=0)
    text_windows("books.parquet", Path("smollm2"), length=1024)
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

from stocha_hf.data_files import explain, first_line, local_files
from stocha_hf.errors import StochaError
from stocha_hf.spec import is_number

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset

STREAMED = 4000  # rows: some millions of tokens of ordinary text, from shards in random order
READY_COLUMNS = (["input_ids"], ["messages"], ["completion", "prompt"])
HTTP = ("httpx", "httpcore", "requests", "aiohttp")  # whose messages may hold headers or signed addresses
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


def load_data(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """Open a data set and keep its training columns: `input_ids`, `messages`, `prompt` and `completion`, or `text`.

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
    with _reading(name, found and found[1]):
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
    with _reading(name, found and found[1]):
        return _usable(name, data.select_columns(columns), first, partial(_is_usable, columns, name, text_column))


def load_mixture(shares: Mapping[str, float], seed: int, **options: Any) -> Dataset | IterableDataset:
    """Open several data sets as one, whose rows are drawn from each with the share that it is given.

    A share of the text that a model was trained on before (replay; Ibrahim et al., arXiv 2403.08763) keeps what it
    learned there. An epoch ends when every row of every data set was drawn; rows of small ones come again until then.

    Args:
        shares: The share of rows of each data set, by a name as in `load_data`; any positive numbers.
        seed: Of the draws.
        **options: Of `load_data`, for each of them.

    Returns:
        The mixed rows.

    Raises:
        StochaError: a share is not a positive number, the data sets have different training columns, or one of them
            cannot be read.
    """
    if not shares or not all(is_number(share) and 0 < share < math.inf for share in shares.values()):
        raise StochaError(f"datasets is {dict(shares)!r}: expected data sets, each with a share above 0")
    parts = {name: load_data(name, **options) for name in shares}
    columns = {name: sorted(next(iter(part))) for name, part in parts.items()}
    first = next(iter(columns))
    if other := next((name for name in columns if columns[name] != columns[first]), None):
        raise StochaError(
            f"datasets mixes {first} ({', '.join(columns[first])}) with {other} ({', '.join(columns[other])}): "
            "expected data sets with the same training columns"
        )
    from datasets import Value, interleave_datasets

    if columns[first] == ["text"]:  # parquet's large strings and JSON's do not mix
        parts = {name: part.cast_column("text", Value("string")) for name, part in parts.items()}
    total = math.fsum(shares.values())
    odds = [share / total for share in shares.values()]
    return interleave_datasets([*parts.values()], odds, seed=seed, stopping_strategy="all_exhausted")


def load_rows(name: str, *, split: str = "train") -> Dataset:
    """Open a data set with all its columns; `name` and `split` as in `load_data`.

    Raises:
        StochaError: there is no such data set, it cannot be read, or it is empty.
    """
    found = local_files(name)
    with _reading(name, found and found[1]):
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
def _reading(name: str, files: list[Path] | None) -> Iterator[None]:
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
    if all(_is_plain(data, column) for column in data.column_names):
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
        for column in columns:
            given = text_column if column == "text" else column
            _text_of(row[column], column, f"in the column {given} of row {index + 1} of {name}")
    return all(row[column] is not None for column in columns)


def load_tokenizer(folder: str | Path) -> Any:
    """Load the tokenizer of a checkpoint folder; no code of the folder is run.

    Raises:
        StochaError: it has none, or a broken one.
    """
    from transformers import AutoTokenizer

    if not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise StochaError(f"{folder} has no tokenizer: expected one of {', '.join(TOKENIZER_FILES)} in it")
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # the tokenizers library raises no other kind
        raise StochaError(
            f"the tokenizer of {folder} cannot be read ({first_line(error)}): expected whole tokenizer files; copy "
            "them again from the model that it was made from"
        ) from error


def calibration_windows(name: str, tokenizer_folder: str | Path, tokens: int, length: int, seed: int) -> torch.Tensor:
    """Draw windows of token ids from a data set's text, to calibrate a refit on.

    Rows come in random order, and no row gives more than four windows or its share, so that the text is as varied as
    the data set. A Hub data set is streamed, STREAMED rows of it at most: some are terabytes. Each window begins with
    what the tokenizer puts before a text (a BOS token or nothing).

    Args:
        name: As in `load_data`.
        tokenizer_folder: Checkpoint folder with the tokenizer.
        tokens: How many token ids to draw, about.
        length: Tokens of a window.
        seed: Decides the order of rows.

    Returns:
        Token ids, int64 [windows, length]; fewer than asked for where the data set has fewer.

    Raises:
        StochaError: as `load_data` and `load_tokenizer` do.
    """
    import torch

    tokenizer = load_tokenizer(tokenizer_folder)
    data: Any = load_data(name, streaming=local_files(name) is None)
    if not hasattr(data, "__len__"):
        with _reading(name, None):
            data = list(data.shuffle(seed=seed, buffer_size=1000).take(STREAMED))
    start = tokenizer("")["input_ids"][:1]
    most = max(4 * length, 2 * tokens // len(data))
    ids: list[int] = []
    for row in torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist():
        text = _plain_text(data[row])[: 16 * most]  # a token of more than 16 characters is rare
        ids += tokenizer(text, add_special_tokens=False)["input_ids"][:most]
        if len(ids) >= tokens:
            break
    body = length - len(start)
    windows = [start + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    return torch.tensor(windows[: tokens // length], dtype=torch.int64).view(-1, length)


def text_windows(name: str, tokenizer_folder: str | Path, length: int, most: int | None = None) -> torch.Tensor:
    """Cut a data set's text, in order, into windows of token ids.

    Args:
        name: As in `load_data`.
        tokenizer_folder: Checkpoint folder with the tokenizer.
        length: Tokens of a window.
        most: Take at most so many windows, evenly spaced.

    Returns:
        Token ids, int64 [windows, length].

    Raises:
        StochaError: there is less than one window of text, or as `load_data` and `load_tokenizer` do.
    """
    import torch

    tokenizer = load_tokenizer(tokenizer_folder)
    ids = torch.tensor([token for row in load_data(name) for token in tokenizer(_plain_text(row))["input_ids"]])
    windows = ids[: len(ids) // length * length].view(-1, length)
    if len(windows) == 0:
        raise StochaError(f"{name} has {len(ids)} tokens: expected at least one window of {length}")
    step = max(len(windows) // most, 1) if most else 1
    return windows[::step][:most]


def _plain_text(row: dict[str, Any]) -> str:
    """A row's text: its messages', or its prompt's, completion's and text's, with empty lines between."""
    if "input_ids" in row:
        raise StochaError("the data set holds token ids: expected text, which the model's own tokenizer reads")
    columns = [column for column in ("messages", "prompt", "completion", "text") if column in row]
    return "\n\n".join(
        text for column in columns if (text := _text_of(row[column], column, f"in the column {column}"))
    )


def _text_of(value: Any, column: str, where: str) -> str:
    """The text in a column: a string, or messages. `where` says in an error which value it is."""
    if value is None or (isinstance(value, str) and column != "messages"):
        return value or ""
    if not isinstance(value, list) or column == "text":
        expected = "a list of messages" if column == "messages" else "text"
        raise StochaError(f"there is {_shown(value)} {where}: expected {expected}")
    return "\n\n".join(_content_of(message, where) for message in value)


def _content_of(message: Any, where: str) -> str:
    """The text of a chat message, whose content is a string, null, or a list of parts of which some are text."""
    if not isinstance(message, dict) or "content" not in message:
        raise StochaError(f"there is the message {_shown(message)} {where}: expected an object with role and content")
    content = message["content"]
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(text for part in content if isinstance(text := part.get("text"), str))
    if content is not None and not isinstance(content, str):
        raise StochaError(f"a message has the content {_shown(content)} {where}: expected text")
    return content or ""


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else f"{repr(value)[:60]}..."
