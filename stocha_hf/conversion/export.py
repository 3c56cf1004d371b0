"""Export: a checkpoint for a runtime other than transformers, with the activation that it was made for, or not at all.

A model whose config says `hidden_act: relu` is a valid Llama, and most tools ignore the key: llama.cpp's converter and
MLX-LM run SiLU without a word. Here the activation decides what is written. What a runtime cannot compute is refused,
unless an activation that it can compute is asked for; then the result says what that changes. A format is a row of
FORMATS and a module that writes it.

    stocha-export smollm2-relu smollm2-relu.gguf
    stocha-export smollm2-relu smollm2-vllm --format vllm
    stocha_hf.export("smollm2-relu", "smollm2-relu.gguf").architecture   # "smallthinker"
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.entry import read_entry
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.checkpoints.quantized import refuse_quantized
from stocha_hf.checkpoints.staging import check_apart
from stocha_hf.conversion.convert import check_data
from stocha_hf.conversion.export_gguf import check_gguf_output, write_gguf
from stocha_hf.conversion.export_powerinfer import PRECISION, write_powerinfer
from stocha_hf.conversion.export_vllm import write_vllm
from stocha_hf.conversion.output import check_output
from stocha_hf.conversion.source import Source, open_source
from stocha_hf.errors import StochaError

FORMATS = {"gguf": "llama.cpp", "vllm": "vLLM", "powerinfer": "PowerInfer"}  # and the runtime of each


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    `output` is the file or folder, `bytes` its size, `architecture` what the runtime takes the model for, `activation`
    what it computes with it, `precision` that of the matrices, `approximation` what differs from the source (None:
    nothing but rounding), `command` a line that runs it, `predictors` what was measured of PowerInfer's: rank, tokens,
    recall, predicted sparsity, sparsity.
    """

    output: str
    format: str
    architecture: str
    activation: str
    precision: str
    bytes: int
    approximation: str | None
    command: str
    predictors: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as the command's --json prints them."""
        return asdict(self)


def export(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "gguf",
    activation: str | None = None,
    precision: str | None = None,
    data: str | Path | None = None,
    rank: int | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a checkpoint for another runtime, which then computes the checkpoint's own activation.

    Args:
        source: folder or Hub id of a stocha checkpoint or of a native model.
        output: the file or folder to write, whole or not at all.
        format: "gguf", for llama.cpp: a relu model becomes a `smallthinker` of one expert, since no other architecture
            there has a gated ReLU; one with its own activation stays what it is. "vllm", a folder for its transformers
            backend. "powerinfer", a file of a relu Llama for PowerInfer, with predictors of active neurons.
        activation: "relu" or the model's own, where the checkpoint infers with another one: an approximation.
        precision: of a GGUF file's matrices, one of PRECISIONS; below 8 bits it needs `llama-quantize` (default: the
            source's).
        data: text that PowerInfer's predictors are fitted on: a file, folder or Hub data set.
        rank: of these predictors (default: an eighth of hidden_size).
        revision: branch, tag or commit of a source on the Hub.
        overwrite: replace `output` if it is of this format.

    Returns:
        What was written.

    Raises:
        StochaError: for whatever the runtime would not compute alike, with nothing written.
    """
    output = local_path(output)
    if format not in FORMATS:
        raise StochaError(f"format is {format!r}: expected one of {', '.join(FORMATS)}")
    _check_options(format, precision, data, rank)
    if format == "vllm":
        check_output(output, overwrite)
    else:
        check_gguf_output(output, precision, overwrite)
    check_apart(output, [path for path in map(local_path, (source, data or source)) if path.exists()])
    check_data(data)
    predictors = None
    with open_source(str(source), revision, "bfloat16", output) as found:
        refuse_quantized(found.config, found.id, "an export")
        chosen, approximation = _activation(found, activation, format)
        if format == "gguf":
            architecture, written = write_gguf(found, chosen, precision, output)
            command = f"llama-cli -m {output}"
        elif format == "vllm":
            architecture, command = write_vllm(found, chosen, output, overwrite)
            written = str(found.config.get("dtype") or found.config.get("torch_dtype") or "the source's")
        else:
            predictors, differs = write_powerinfer(found, str(data), rank, output)
            architecture, written, command = "llama", PRECISION, f"main -m {output}"
            approximation = "; ".join(filter(None, (approximation, differs))) or None
    files = output.rglob("*") if output.is_dir() else [output]
    size = sum(path.stat().st_size for path in files)
    return Exported(str(output), format, architecture, chosen, written, size, approximation, command, predictors)


def _check_options(format: str, precision: str | None, data: object, rank: int | None) -> None:
    """Raise StochaError for an option that the format does not take, or one that it lacks."""
    if format == "vllm" and precision is not None:
        raise StochaError(f"precision {precision} was given with format vllm: expected none; a folder keeps its own")
    if format != "powerinfer" and (data is not None or rank is not None):
        raise StochaError(f"data or rank was given with format {format}: expected format powerinfer, which fits to it")
    if format == "powerinfer" and precision not in (None, PRECISION):
        raise StochaError(
            f"precision is {precision!r}: expected {PRECISION}; PowerInfer's own quantize makes Q4_0 of it"
        )
    if format == "powerinfer" and data is None:
        raise StochaError("format powerinfer was given without data: expected text to fit its predictors on")


def _activation(source: Source, asked: str | None, format: str) -> tuple[str, str | None]:
    """The activation to export with, and how it differs from what the checkpoint infers with."""
    base, runtime = source.architecture.act, FORMATS[format]
    entry = read_entry(source.config, source.id) if "stocha" in source.config else None
    own = base if entry is None else str(entry.inference)
    can = {"gguf": ("relu", base), "vllm": tuple(dict.fromkeys(("relu", base, own))), "powerinfer": ("relu",)}[format]
    if asked not in (None, *can):
        raise StochaError(f"activation is {asked!r}: expected one of {', '.join(can)}, which {runtime} computes")
    if asked is None and own not in can:
        raise StochaError(
            f"{source.id} infers with {own}, and {runtime} computes {' and '.join(can)}: pass --activation relu to "
            f"export it with that, after measuring it with stocha-eval {source.id} --mode relu"
        )
    cuts = entry is not None and entry.inputs is not None
    if asked is None and cuts:
        raise StochaError(
            f"{source.id} cuts the inputs of its projections, which {runtime} does not: pass --activation {own} to "
            "export it without the cuts"
        )
    chosen = asked or own
    changes = [_instead(source, chosen, own)] if chosen != own else []
    if cuts:
        changes.append(f"exported without the cuts of {source.id}'s inputs: no entry of them is left out")
    return chosen, "; ".join(changes) or None


def _instead(source: Source, chosen: str, own: str) -> str:
    return (
        f"exported with {chosen} in place of {own}: its zeros and perplexity are not those of {source.id}; measure "
        f"them with stocha-eval {source.id} --mode {chosen}"
    )
