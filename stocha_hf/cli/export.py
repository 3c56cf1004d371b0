"""Export a checkpoint for llama.cpp, vLLM or PowerInfer, with the activation that it was made for.

example:
  stocha-export smollm2-relu smollm2-relu.gguf
  stocha-export smollm2-relu smollm2-relu-q8.gguf --precision q8_0
  stocha-export smollm2-sparse smollm2-sparse.gguf --activation relu --precision q4_k_m
  stocha-export smollm2-relu smollm2-vllm --format vllm
  stocha-export smollm2-relu smollm2-pi.gguf --format powerinfer --data text.parquet

llama.cpp reads no activation from a file: a Llama is SiLU there. So a ReLU model is written as an architecture that it
computes with ReLU, or is refused. FATReLU's thresholds, and activations other than relu and the model's own, have no
counterpart there: --activation says what to take instead. OUT appears complete or not at all.
"""

from __future__ import annotations

import argparse

from stocha_hf.cli import Parser, one_of, path_or_id, run, show
from stocha_hf.conversion.export import FORMATS
from stocha_hf.conversion.export_gguf import PRECISIONS
from stocha_hf.spec import BASES

IN_PLACE = ("relu", *BASES)
PREDICTORS = """
predictors of rank {rank}: recall {recall:.1%}; {predicted_sparsity:.1%} of the neurons skipped, {sparsity:.1%} zero"""


def parser() -> Parser:
    verb = Parser("stocha-export", __doc__)
    verb.add_argument("source", type=path_or_id, metavar="FOLDER", help="checkpoint folder or Hub id")
    verb.add_argument("output", type=path_or_id, metavar="OUT", help="file or folder to write, such as model.gguf")
    verb.add_argument(
        "--format",
        type=one_of(FORMATS),
        default="gguf",
        help="gguf, for llama.cpp (default); vllm, a folder; powerinfer, its GGUF with predictors of active neurons",
    )
    verb.add_argument(
        "--activation",
        type=one_of(IN_PLACE),
        help=f"in place of what FOLDER infers with, an approximation: {', '.join(IN_PLACE)}",
    )
    verb.add_argument(
        "--precision",
        type=one_of(PRECISIONS),
        help=f"of the matrices: {', '.join(PRECISIONS)}; below 8 bits by llama-quantize (default: FOLDER's)",
    )
    verb.add_argument("--data", type=path_or_id, help="text that PowerInfer's predictors are fitted on")
    verb.add_argument("--rank", type=int, help="of these predictors (default: an eighth of hidden_size)")
    verb.add_argument("--revision", help="branch, tag or commit of FOLDER on the Hub")
    verb.add_argument("--overwrite", action="store_true", help="replace OUT if it is of this format")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return verb


def main() -> None:
    run(parser(), export)


def export(args: argparse.Namespace) -> None:
    from stocha_hf.conversion.export import export as export_checkpoint

    names = ("format", "activation", "precision", "data", "rank", "revision", "overwrite")
    done = export_checkpoint(args.source, args.output, **{name: getattr(args, name) for name in names})
    text = f"{done.output}: {done.architecture}, {done.activation}, {done.precision}, {done.bytes / 1e6:.0f} MB"
    text += f"\n{done.approximation}" if done.approximation else ""
    text += PREDICTORS.format(**done.predictors) if done.predictors else ""
    show(done.to_dict(), f"{text}\nrun it with: {done.command}", args.json)


if __name__ == "__main__":
    main()
