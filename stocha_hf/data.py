"""Training text: a Hub dataset (streaming or not), or local parquet, jsonl, json, csv or txt, as a datasets.Dataset.

Which of trl's formats a data set has is read off its columns: `input_ids` (token ids, whose rows are used as they are
with packing off and dataset_kwargs {"skip_prepare_dataset": true}), `messages` (chat), `prompt` and `completion`, or a
text column. Tokenizing, packing and masking are trl's; this module finds the data and says in one sentence what is
wrong with it.

    load_data("HuggingFaceFW/fineweb-edu", split="train", streaming=True)
    load_data("books.parquet", text_column="body")
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocha_hf.errors import StochaError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".txt": "text"}
STREAMED = 4000  # rows: some millions of tokens of ordinary text, from shards in random order
READY_COLUMNS = ({"input_ids"}, {"messages"}, {"prompt", "completion"})


def load_data(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
) -> Dataset | IterableDataset:
    """The data set's training columns: `input_ids`, `messages`, `prompt` and `completion`, or `text`.

    `name` is a local file, a folder of files of one kind, or a Hub data set. Raises StochaError where there is none,
    none of its columns is text, or it is empty.
    """
    try:
        with _reading(name):
            data = _open(name, config, split, streaming)
            first = next(iter(data))
    except StopIteration:  # datasets itself raises it for an empty JSON file
        raise StochaError(f"{name} (split {split}) is empty: expected at least one row of text") from None
    columns = next((wanted for wanted in READY_COLUMNS if wanted <= set(first)), None)
    if columns is None:
        if not isinstance(first.get(text_column), str):
            raise StochaError(
                f"{name} has the columns {', '.join(first)}: expected the text column {text_column!r}, messages, or "
                "prompt and completion; name it with dataset_text_column"
            )
        data = data if text_column == "text" else data.rename_column(text_column, "text")
        columns = {"text"}
    return data.select_columns(sorted(columns))


def _open(name: str, config: str | None, split: str, streaming: bool) -> Any:
    if find_spec("datasets") is None:
        raise StochaError(
            f"reading {name} needs the package datasets, which is not installed: run pip install 'stocha_hf[train]'"
        )
    from datasets import disable_progress_bars, load_dataset

    if not sys.stderr.isatty():
        disable_progress_bars()
    path = Path(name).expanduser()
    if not path.exists() and (path.suffix in BUILDERS or name.startswith((".", "/", "~"))):
        raise StochaError(f"the data file {name} does not exist: expected a local file or the id of a Hub data set")
    if path.exists():
        files = sorted(map(str, path.iterdir())) if path.is_dir() else [str(path)]
        builder = BUILDERS.get(Path(files[0]).suffix) if files else None
        files = [file for file in files if BUILDERS.get(Path(file).suffix) == builder]
        if builder is None:
            raise StochaError(f"{name} holds no text: expected {', '.join(BUILDERS)} files")
        # one row a paragraph would lose the order of a text file's lines
        extra: dict[str, Any] = {"sample_by": "document"} if builder == "text" else {}
        return load_dataset(builder, data_files={split: files}, split=split, streaming=streaming, **extra)
    return load_dataset(name, config, split=split, streaming=streaming)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """One sentence for whatever a broken file or connection leads datasets, pyarrow and httpx to raise; a stream is
    opened without being read, so that it may be raised at any row.
    """
    try:
        yield
    except (StochaError, StopIteration):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise StochaError(
            f"the data set {name} cannot be read ({reason}): expected a local file or a Hub data set"
        ) from None


def calibration_windows(name: str, tokenizer_folder: Path, tokens: int, length: int, seed: int) -> torch.Tensor:
    """About `tokens` token ids of a data set's text, [windows, length], fewer where it has fewer.

    Rows come in random order, and no row gives more than four windows or its share, so that the text is as varied as
    the data set. A Hub data set is streamed, STREAMED rows of it at most: some are terabytes. Each window begins with
    what the tokenizer puts before a text (a BOS token or nothing).
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    data: Any = load_data(name, streaming=not Path(name).expanduser().exists())
    if not hasattr(data, "__len__"):
        with _reading(name):
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


def text_windows(name: str, tokenizer_folder: Path, length: int, most: int | None = None) -> torch.Tensor:
    """A data set's text in order, cut into windows of token ids [windows, length]; `most`: evenly spaced ones of them.

    Raises StochaError where there is less than one window of text.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = torch.tensor([token for row in load_data(name) for token in tokenizer(_plain_text(row))["input_ids"]])
    windows = ids[: len(ids) // length * length].view(-1, length)
    if len(windows) == 0:
        raise StochaError(f"{name} has {len(ids)} tokens: expected at least one window of {length}")
    step = max(len(windows) // most, 1) if most else 1
    return windows[::step][:most]


def _plain_text(row: dict[str, Any]) -> str:
    if "messages" in row:
        return "\n\n".join(str(message["content"]) for message in row["messages"])
    return "\n\n".join(str(row[column]) for column in ("prompt", "completion", "text") if column in row)
