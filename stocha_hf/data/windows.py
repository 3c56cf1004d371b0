"""Token ids of a data set's text: windows of it, in order to measure on or at random to calibrate on, and whole texts.

text_windows("books.parquet", Path("smollm2"), length=1024)
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocha_hf.data.files import first_line, local_files
from stocha_hf.data.row_text import pair_ids, plain_text
from stocha_hf.data.rows import load_data, reading
from stocha_hf.errors import StochaError

if TYPE_CHECKING:
    import torch

STREAMED = 4000  # rows: some millions of tokens of ordinary text, from shards in random order
SHORTEST = 16  # tokens of a text that is a row of its own
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


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
        if "custom code" in str(error):
            raise StochaError(
                f"the tokenizer of {folder} needs code of that folder, which is never run: expected one of "
                "transformers' own classes; save one with save_pretrained of a fast tokenizer"
            ) from error
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
    data = _varied(name, seed)
    start = _start(tokenizer)
    most = max(4 * length, 2 * tokens // len(data))
    ids: list[int] = []
    for row in _shuffled(data, seed):
        text = plain_text(row)[: 16 * most]  # a token of more than 16 characters is rare
        ids += tokenizer(text, add_special_tokens=False)["input_ids"][:most]
        if len(ids) >= tokens:
            break
    body = length - len(start)
    windows = [start + ids[at : at + body] for at in range(0, len(ids) - body + 1, body)]
    return torch.tensor(windows[: tokens // length], dtype=torch.int64).view(-1, length)


def calibration_texts(
    name: str, tokenizer_folder: str | Path, rows: int, length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw whole texts from a data set, one a row from its first token, as decoding meets them.

    Rows come in random order, as in `calibration_windows`. A text of fewer than SHORTEST tokens is left out, and of a
    long one its beginning is taken, if it has more than the prompt.

    Args:
        name: As in `load_data`.
        tokenizer_folder: Checkpoint folder with the tokenizer.
        rows: How many texts to draw.
        length: Tokens of a row.
        seed: Decides the order of rows.

    Returns:
        Token ids, int64 [rows, length], with zeros behind each text; the tokens of each text, int64 [rows]; and those
        of its prompt, int64 [rows], 0 where the data set has none. Fewer rows than asked for where it has fewer.

    Raises:
        StochaError: as `load_data` and `load_tokenizer` do.
    """
    import torch

    tokenizer = load_tokenizer(tokenizer_folder)
    start = _start(tokenizer)
    found: list[list[int]] = []
    prompts: list[int] = []
    for row in _shuffled(_varied(name, seed), seed):
        prompt: list[int] = []
        if isinstance(row.get("prompt"), str):
            prompt, ids = pair_ids(tokenizer, row["prompt"], row["completion"][: 16 * length])
        else:
            ids = tokenizer(plain_text(row)[: 16 * length], add_special_tokens=False)["input_ids"]
            ids = ids if ids[: len(start)] == start else start + ids
        ids = (prompt + ids)[:length]
        if len(ids) >= min(SHORTEST, length) and len(ids) > len(prompt):
            found.append(ids)
            prompts.append(len(prompt))
        if len(found) == rows:
            break
    padded = [ids + [0] * (length - len(ids)) for ids in found]
    sizes = torch.tensor([len(ids) for ids in found], dtype=torch.int64)
    return torch.tensor(padded, dtype=torch.int64).view(-1, length), sizes, torch.tensor(prompts, dtype=torch.int64)


def _start(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before a text, without what it puts behind one."""
    text, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(text)] == text), 0)]


def _varied(name: str, seed: int) -> Any:
    """The rows of a data set; of one on the Hub, that may be terabytes, some that are streamed."""
    data: Any = load_data(name, streaming=local_files(name) is None)
    if not hasattr(data, "__len__"):
        with reading(name, None):
            data = list(data.shuffle(seed=seed, buffer_size=1000).take(STREAMED))
    return data


def _shuffled(data: Any, seed: int) -> Iterator[dict[str, Any]]:
    import torch

    for row in torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist():
        yield data[row]


def text_windows(name: str, tokenizer_folder: str | Path, length: int, most: int | None = None) -> torch.Tensor:
    """Cut a data set's text, in order, into windows of token ids.

    Each window begins with what the tokenizer puts before a text (a BOS token or nothing): Gemma, for one, predicts
    noise without it.

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
    start = torch.tensor(_start(tokenizer), dtype=torch.int64)
    texts = (tokenizer(plain_text(row), add_special_tokens=False)["input_ids"] for row in load_data(name))
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    body = length - len(start)
    windows = ids[: len(ids) // body * body].view(-1, body)
    windows = torch.cat([start.expand(len(windows), -1), windows], 1)
    if len(windows) == 0:
        raise StochaError(f"{name} has {len(ids)} tokens: expected at least one window of {length}")
    step = max(len(windows) // most, 1) if most else 1
    return windows[::step][:most]
