"""Text and a tokenizer for models that begin with random weights: documents and source code, parts of both held out.

A model of 30M parameters cannot spare half of them for a vocabulary of 50,000 words, so the tokenizer is made here:
byte level BPE on a fifth of the training text. Held out are the documents of a file of their own and whole packages of
code. Each goes, document by document in turn, into two files: `tune` is for choosing (learning rates), `test` for
reporting.

    python benchmarks/pretrain_text.py text --docs docs-train.parquet --held-out-docs docs-val.parquet \
        --code lib/python3.11/site-packages lib/jvm/lib/src.zip --held-out-code networkx mypy java.net.http jdk.jshell

It writes text/train.parquet, docs-tune, docs-test, code-tune, code-test and text/tokenizer/. Files of code are taken
once each by content. A package is a file's first folder, in a .zip archive as in a folder.
"""

from __future__ import annotations

import argparse
import random
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

SUFFIXES = (".py", ".java")
SHORTEST = 400  # characters of a file of code: below, most are empty or say their licence only
END = "<|endoftext|>"
SAMPLED = 5  # the tokenizer is trained on every fifth document


def code_files(source: Path) -> Iterator[tuple[str, str]]:
    """(package, text) of each file of code in a folder or a .zip archive, in the order of their names."""
    if source.suffix == ".zip":
        with zipfile.ZipFile(source) as archive:
            for name in sorted(name for name in archive.namelist() if name.endswith(SUFFIXES)):
                yield name.split("/")[0], archive.read(name).decode("utf-8", errors="replace")
        return
    for path in sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file()):
        yield path.relative_to(source).parts[0], path.read_text(encoding="utf-8", errors="replace")


def code(sources: Iterable[Path], held_out: set[str], most: int) -> tuple[list[str], list[str]]:
    """(training, held-out) texts in random order: each content once, `most` characters of a source for training."""
    seen: set[str] = set()
    kept: tuple[list[str], list[str]] = ([], [])
    for source in sources:
        files, taken = list(code_files(source)), 0
        random.Random(0).shuffle(files)
        for package, text in files:
            if len(text) < SHORTEST or text in seen:
                continue
            seen.add(text)
            out = package in held_out
            if out or taken < most:
                kept[out].append(text)
                taken += 0 if out else len(text)
    return kept


def write(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path, compression="zstd")
    print(f"{path.name}: {len(texts)} documents, {sum(map(len, texts)) / 1e6:.1f}M characters", flush=True)


def write_held_out(folder: Path, kind: str, texts: list[str], most: int) -> None:
    """Texts in turn to KIND-tune and KIND-test, `most` characters to each."""
    for name, half in (("tune", texts[::2]), ("test", texts[1::2])):
        chosen, total = [], 0
        for text in half:
            if total < most:
                chosen.append(text)
                total += len(text)
        write(folder / f"{kind}-{name}.parquet", chosen)


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(tqdm(texts, desc="Training the tokenizer", disable=None), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--docs", type=Path, required=True, help=".parquet with a column `text`")
    parser.add_argument("--held-out-docs", type=Path, required=True, help="the same, never trained on")
    parser.add_argument("--code", type=Path, nargs="+", required=True, help="folders and .zip archives")
    parser.add_argument("--held-out-code", nargs="+", default=[], help="names of packages, never trained on")
    parser.add_argument("--most-code", type=float, default=1e12, help="characters of each source at most")
    parser.add_argument("--most-held-out", type=float, default=1e6, help="characters of each held-out file at most")
    parser.add_argument("--vocabulary", type=int, default=12288)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    docs, held_out_docs = (
        pq.read_table(path, columns=["text"])["text"].to_pylist() for path in (args.docs, args.held_out_docs)
    )
    training, held_out = code(args.code, set(args.held_out_code), args.most_code)
    write_held_out(args.output, "docs", held_out_docs, args.most_held_out)
    write_held_out(args.output, "code", held_out, args.most_held_out)
    write(args.output / "train.parquet", docs + training)
    train_tokenizer((docs + training)[::SAMPLED], args.vocabulary).save_pretrained(args.output / "tokenizer")


if __name__ == "__main__":
    main()
