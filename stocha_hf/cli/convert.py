"""Convert a Llama-class model to a stocha checkpoint: same weights, stochastic activations, loads anywhere.

example:
  stocha-convert HuggingFaceTB/SmolLM2-135M smollm2-stocha --p 0.3
  stocha-convert smollm2-stocha smollm2-relu --activation relu
  stocha-convert HuggingFaceTB/SmolLM2-135M smollm2-sparse --activation relu --refit text.parquet --target-sparsity 0.8
  stocha-convert HuggingFaceTB/SmolLM2-135M smollm2-cut --inputs 0.4 --calibrate text.parquet
  stocha-convert smollm2-cut smollm2-careful --inputs-fallback 0.5 --inputs-fallback-tokens 8
  stocha-convert runs/smollm2-135m-sparse90 smollm2-sparse90 --dtype bfloat16
  stocha-convert smollm2-sparse smollm2-sparse-4bit --bits 4 --calibrate text.parquet
  stocha-convert model.gguf model-stocha --base-model org/model --push-to-hub user/model-stocha --private

SOURCE's files are copied byte for byte (except the FFN weights with --refit, the decoder layers' with
--inputs-allotment learned, and all weights with --bits or another --dtype), and none of its code is run. OUTPUT
appears complete or not at all. If a refit or quantization was killed, run the same command again: it continues.
"""

from __future__ import annotations

import argparse

from stocha_hf.checkpoints.entry import cuts_sentence
from stocha_hf.cli import (
    DTYPES,
    Parser,
    checked,
    dtype_name,
    hub_id,
    number_from_0,
    one_of,
    path_or_id,
    probability,
    run,
    share,
    share_below_1,
    show,
    whole_number,
)
from stocha_hf.cuts import ALLOTMENTS, LEARNED, PROJECTIONS
from stocha_hf.errors import StochaError
from stocha_hf.quantization import BITS, IN_8_BITS, MATRICES, OUTPUTS, is_bits
from stocha_hf.spec import ACTIVATIONS, POSITIVE_SIDES, StochaConfig

STOCHA_FIELDS = ("activation", "p", "positive", "inference", "threshold", "k")
REFIT_OPTIONS = ("refit", "target_sparsity", "refit_tokens", "refit_on_disk")
INPUT_KINDS = ("inputs_of", "inputs_allotment", "inputs_prefill", "inputs_train")
FALLBACK_OPTIONS = ("inputs_fallback", "inputs_fallback_tokens")
INPUT_OPTIONS = ("inputs", "calibrate", "calibrate_tokens", *INPUT_KINDS, *FALLBACK_OPTIONS)
OPTIONS = ("bits", "in_8_bits", "rows", "revision", "base_model", "dtype", "overwrite", *REFIT_OPTIONS, *INPUT_OPTIONS)


def bits_of(text: str) -> float:
    """4 and 8 are codes' bits, whole numbers; what lies between is a mean."""
    bits = float(text)
    return int(bits) if bits in BITS else bits


def parser() -> Parser:
    deterministic = [name for name, row in ACTIVATIONS.items() if row.deterministic]
    verb = Parser("stocha-convert", __doc__)
    verb.add_argument(
        "source",
        type=path_or_id,
        metavar="SOURCE",
        help="Hub id, checkpoint folder or .gguf file; may already be converted",
    )
    verb.add_argument("output", type=path_or_id, metavar="OUTPUT", help="folder to write")
    verb.add_argument(
        "--activation", type=one_of(ACTIVATIONS), help=f"in train() mode: {', '.join(ACTIVATIONS)} (default: stocha)"
    )
    verb.add_argument(
        "--p", type=probability, help="probability of the base activation where the gate is negative (default: 0.3)"
    )
    verb.add_argument(
        "--positive",
        type=one_of(POSITIVE_SIDES),
        help=f"activation where the gate is positive: {', '.join(POSITIVE_SIDES)} (default: silu)",
    )
    verb.add_argument(
        "--inference",
        type=one_of(deterministic),
        help=f"in eval() mode: {', '.join(deterministic)} (default: --activation or the base)",
    )
    verb.add_argument("--threshold", type=number_from_0, help="threshold of fatrelu and shifted_relu (default: 0)")
    verb.add_argument("--k", type=whole_number(1), help="neurons that topk keeps per token")
    verb.add_argument(
        "--refit",
        type=path_or_id,
        metavar="DATA",
        help="refit the FFNs for --activation relu on this text, without training",
    )
    verb.add_argument("--target-sparsity", type=share, help="share of zeros to refit for (default: what ReLU makes)")
    verb.add_argument(
        "--refit-tokens",
        type=whole_number(1),
        help="tokens to refit on (default: 98304, or 8 per neuron of a layer if more)",
    )
    verb.add_argument("--refit-on-disk", action="store_true", help="keep the refit's streams on disk, not in memory")
    verb.add_argument(
        "--inputs",
        type=share_below_1,
        metavar="SHARE",
        help="cut this share of projections' inputs, the smallest; 0 takes cuts off",
    )
    verb.add_argument(
        "--calibrate",
        type=path_or_id,
        metavar="DATA",
        help="text that --inputs measures thresholds on, and --bits below 8 fits its rounding to",
    )
    verb.add_argument(
        "--calibrate-tokens",
        type=whole_number(1),
        help="tokens of it to use (default: 16384, or 2097152 where thresholds are learned)",
    )
    verb.add_argument(
        "--inputs-of",
        nargs="+",
        type=one_of(PROJECTIONS),
        metavar="NAME",
        help=f"what to cut: {', '.join(PROJECTIONS)} (default: all, or attention's where the FFN is sparse itself)",
    )
    verb.add_argument(
        "--inputs-allotment",
        type=one_of((*ALLOTMENTS, LEARNED)),
        help="uniform: SHARE of each projection; greedy: of each layer, output: of all layers, most where it matters "
        "least; learned: of all layers, with a threshold for each input that is folded into the weights (default: "
        "uniform)",
    )
    verb.add_argument("--inputs-prefill", action="store_true", help="cut at every token, not only in decode steps")
    verb.add_argument("--inputs-train", action="store_true", help="cut in train() mode too, at every token")
    verb.add_argument(
        "--inputs-fallback",
        type=share_below_1,
        metavar="P",
        help="compute a decode step again without cuts where its most likely token has a probability below P; also "
        "of a SOURCE that has cuts; 0: never (default: never)",
    )
    verb.add_argument(
        "--inputs-fallback-tokens",
        type=whole_number(1, 8),
        metavar="N",
        help="with a fallback: compute the last N tokens again, the step's own and those before it, so that later "
        "steps attend to keys and values without cuts; also of a SOURCE that has a fallback (default: 1)",
    )
    verb.add_argument(
        "--bits",
        type=checked(bits_of, is_bits, "4 or 8, or a mean of bits between them"),
        help="quantize the weights to 4 or 8 bits; a number between is a mean: "
        "matrices that lose most in 4 bits get 8",
    )
    verb.add_argument(
        "--in-8-bits",
        nargs="*",
        type=one_of(MATRICES),
        metavar="NAME",
        help=f"with --bits below 8, matrices that get 8 bits: {', '.join(MATRICES)} (default: {' '.join(IN_8_BITS)}; "
        "no NAME: none)",
    )
    verb.add_argument(
        "--rows",
        type=one_of((OUTPUTS,)),
        help="with --bits, a row an output also of projections that cut their inputs: for lossless decoding with both "
        "layouts in memory (default: as steps with cuts read them fastest)",
    )
    verb.add_argument("--revision", type=path_or_id, help="branch, tag or commit of a Hub SOURCE (default: main)")
    verb.add_argument("--base-model", type=hub_id, metavar="ID", help="Hub id of the model that a local SOURCE copies")
    verb.add_argument(
        "--dtype",
        type=dtype_name,
        help=f"{', '.join(DTYPES)}: what weights become (default: what they are; of a .gguf file bfloat16)",
    )
    verb.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it is a checkpoint folder")
    verb.add_argument("--push-to-hub", type=hub_id, metavar="REPO", help="publish OUTPUT to this Hub repo afterwards")
    verb.add_argument("--private", action="store_true", help="make REPO private if it is new")
    verb.add_argument("--json", action="store_true", help="print the result as JSON")
    return verb


def main() -> None:
    run(parser(), convert)


def convert(args: argparse.Namespace) -> None:
    from stocha_hf import hub
    from stocha_hf.conversion.convert import convert as convert_folder
    from stocha_hf.publishing.upload import publish

    if args.private and not args.push_to_hub:
        raise StochaError("--private was given without --push-to-hub: expected the Hub repo to make private")
    changes = {key: getattr(args, key) for key in STOCHA_FIELDS if getattr(args, key) is not None}
    if args.push_to_hub:
        hub.check_login(args.push_to_hub)
    options = {key: getattr(args, key) for key in OPTIONS}
    done = convert_folder(args.source, args.output, **options, **changes).to_dict()
    text = f"{done['output']}: {done['layers']}/{done['layers']} MLPs, {done['stocha']['activation']} in training"
    text += f", {done['stocha']['inference']} in inference"
    text += f", {done['bits']} bits" if done["bits"] else ""
    if (cuts := StochaConfig.from_dict(done["stocha"]).inputs) is not None:
        text += f"\n{cuts_sentence(cuts, loads_natively=not done['bits'])}"
    if args.refit is not None:
        zeros = done["stocha"]["history"][-1]["zeros"]
        text += f"\n{zeros:.1%} zeros in the hidden vectors, on a part of {args.refit} that was held out"
    if args.push_to_hub:
        try:
            done["published"] = publish(args.output, args.push_to_hub, private=args.private).to_dict()
        except StochaError as error:
            again = f"stocha-publish {args.output} {args.push_to_hub}{' --private' if args.private else ''}"
            raise StochaError(f"{error}; the conversion is complete, so that is: {again}") from None
        text += f"\n{done['published']['url']} at {done['published']['tag']} ({done['published']['commit']})"
    show(done, text, args.json)


if __name__ == "__main__":
    main()
