"""A ReLU checkpoint as a file for PowerInfer: its variant of GGUF, with a predictor of active neurons for each layer.

PowerInfer's converter writes GGUF with the magic PWRI, the architecture `llama`, which runs ReLU there, W_down
transposed as `ffn_down_t`, predictors as `fc1` and `fc2`, and their threshold as `powerinfer.sparse_threshold`. The
same is written here. Its kernels compute with float16; its own `quantize` makes Q4_0 of that. It has no biases, no
head width of its own and no scaled rotary frequencies but linear ones: such models are refused. It has no tied
embeddings: a tied matrix is written twice.

    write_powerinfer(source, "text.parquet", None, Path("model.powerinfer.gguf")).predictors["recall"]
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.architecture import Sizes
from stocha_hf.checkpoints.staging import scratch_folder
from stocha_hf.conversion.export_gguf import MAGICS, general, write_file
from stocha_hf.conversion.export_metadata import Plan, plan_metadata
from stocha_hf.conversion.source import Source
from stocha_hf.errors import StochaError
from stocha_hf.spec import StochaConfig

PRECISION = "f16"
FITS = ("llama", "mistral")
CUTS = ("gpt-2", None)  # how its byte-level BPE cuts a text; None: SentencePiece's, which is not cut


def write_powerinfer(source: Source, data: str, rank: int | None, output: Path) -> tuple[dict[str, Any], str | None]:
    """Write the file; returns what was measured of its predictors, and how its tokens can differ, if they can.

    Raises StochaError for a model, tokenizer or text that does not fit, with nothing written.
    """
    from stocha_hf.checkpoints.tensors import Tensors
    from stocha_hf.conversion.export_predictors import THRESHOLD, fit_predictors
    from stocha_hf.conversion.export_tensors import FileTensor, tensors_of
    from stocha_hf.conversion.export_vocabulary import vocabulary
    from stocha_hf.data import load_tokenizer

    plan = plan_powerinfer(source)
    told = general(source, "relu") | plan.values | {"powerinfer.sparse_threshold": THRESHOLD}
    words = vocabulary(load_tokenizer(source.folder), plan.sizes.vocab, source.id)
    relu = StochaConfig(activation="relu").resolve(source.architecture.act)
    predictors = fit_predictors(source, source.config | {"stocha": relu.to_dict()}, data, rank)
    tensors = Tensors(source.folder)
    found = list(tensors_of(plan, tensors, PRECISION))
    if not any(tensor.name == "output.weight" for tensor in found):
        embedding = next(tensor for tensor in found if tensor.name == "token_embd.weight")
        found.append(replace(embedding, name="output.weight"))
    for index, matrices in enumerate(predictors.layers):
        for name, matrix in zip(("fc1", "fc2"), matrices, strict=True):
            read = lambda matrix=matrix: matrix  # noqa: E731
            found.append(FileTensor(f"blk.{index}.{name}.weight", list(matrix.shape), PRECISION, read))
    with scratch_folder(output) as work:
        written = work / "model.gguf"
        write_file(written, plan.architecture, told | words, found, PRECISION)
        with written.open("r+b") as file:
            file.write(MAGICS[1])
        written.replace(output)
    cut = words.get("tokenizer.ggml.pre")
    differs = None if cut in CUTS else f"PowerInfer cuts a text as GPT-2 does, and this tokenizer as {cut}: its tokens"
    return predictors.told, differs and f"{differs} can differ, at numbers for one"


def plan_powerinfer(source: Source) -> Plan:
    """The file's plan, without its predictors. Raises StochaError for a model that PowerInfer does not compute."""
    sizes = Sizes.of(source.config, source.id)
    plan = plan_metadata(source.config, source.architecture.act, source.id)
    biased = next((name for name in plan.names if name.endswith(".bias")), None)
    scaling = plan.values.get("llama.rope.scaling.type", "llama3" if plan.factors is not None else None)
    for wrong, reason in (
        (sizes.model_type not in FITS, f"is a {sizes.model_type}"),
        (biased is not None, f"has {biased}"),
        (sizes.head_dim * sizes.heads != sizes.hidden, f"has heads of {sizes.head_dim} entries"),
        (scaling not in (None, "linear"), f"has rotary frequencies scaled by {scaling}"),
    ):
        if wrong:
            raise StochaError(
                f"PowerInfer computes a plain Llama with ReLU, and {source.id} {reason}: expected a "
                f"{' or '.join(FITS)} without biases and with heads as wide as their share of hidden_size; run this "
                "model with transformers"
            )
    return replace(plan, names={name: _transposed(theirs) for name, theirs in plan.names.items()})


def _transposed(name: str) -> str:
    return name.replace(".ffn_down.", ".ffn_down_t.")
