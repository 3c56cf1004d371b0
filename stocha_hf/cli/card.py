"""Write a checkpoint's model card from files of measurements: README.md, with tables, pictures and Hub metadata.

example:
  stocha-eval smollm2-sparse --data text.parquet --baseline HuggingFaceTB/SmolLM2-135M --json > eval.json
  stocha-bench smollm2-sparse --json > bench.json
  stocha-eval smollm2-sparse --tasks bigbench:strategyqa --baseline HuggingFaceTB/SmolLM2-135M --json > tasks.json
  stocha-card smollm2-sparse eval.json --bench bench.json --tasks tasks.json

The files and their pictures are copied to FOLDER/measurements, which stocha-publish uploads. Files that were measured
on other weights than FOLDER's are refused, here and when it is published. A card that is there already is kept as
README.md.orig.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stocha_hf.cli import Parser, checked, path_or_id, run, show
from stocha_hf.errors import StochaError


def _split(text: str) -> tuple[str, str]:
    label, _, path = text.rpartition("=")
    return label, path


labelled = checked(
    _split, lambda pair: all(map(str.strip, pair)), "LABEL=EVAL, as in 'swapped, untrained=swapped.json'"
)


def parser() -> Parser:
    verb = Parser("stocha-card", __doc__)
    verb.add_argument("folder", type=path_or_id, metavar="FOLDER", help="stocha checkpoint folder")
    verb.add_argument("evaluation", type=path_or_id, metavar="EVAL", help="what stocha-eval FOLDER --json printed")
    verb.add_argument(
        "--row",
        type=labelled,
        action="append",
        default=[],
        metavar="LABEL=EVAL",
        help="another evaluation for the same table",
    )
    verb.add_argument(
        "--row-bench",
        type=labelled,
        action="append",
        default=[],
        metavar="LABEL=BENCH",
        help="what stocha-bench --json printed of a row's folder",
    )
    verb.add_argument("--bench", type=path_or_id, metavar="BENCH", help="what stocha-bench FOLDER --json printed")
    verb.add_argument(
        "--generation", type=path_or_id, metavar="FILE", help="what stocha-generate FOLDER --json printed"
    )
    verb.add_argument(
        "--tasks", type=path_or_id, metavar="FILE", help="what stocha-eval FOLDER --tasks ... --json printed"
    )
    verb.add_argument(
        "--notes",
        type=path_or_id,
        metavar="FILE",
        help="Markdown to stand behind the figures, for what was not measured so: another machine's, limits, samples",
    )
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return verb


def main() -> None:
    run(parser(), card)


def card(args: argparse.Namespace) -> None:
    from stocha_hf.checkpoints.metadata import source_metadata
    from stocha_hf.measurement.plots import check_plot
    from stocha_hf.publishing.card import stocha_config, write_card
    from stocha_hf.publishing.measurements import HASH_KEY

    folder, rows, benches = Path(args.folder), dict(args.row), dict(args.row_bench)
    for option, given, kept in (("--row", args.row, rows), ("--row-bench", args.row_bench, benches)):
        if len(kept) < len(given):
            raise StochaError(f"{option} gives one LABEL twice: expected another label for each row of the table")
    stocha_config(folder)
    check_plot(folder / "zeros.png")
    options = {key: getattr(args, key) for key in ("evaluation", "bench", "generation", "tasks", "notes")}
    path = write_card(folder, rows=rows, row_benches=benches, **options)
    show({"card": str(path), "weights": source_metadata(folder)[HASH_KEY]}, f"wrote {path}", args.json)


if __name__ == "__main__":
    main()
