"""Export: a checkpoint for a runtime other than transformers, with the activation that it was made for, or not at all.

A model whose config says `hidden_act: relu` is a valid Llama, and most tools ignore the key: llama.cpp's converter and
MLX-LM run SiLU without a word. Here the activation decides what is written. What a runtime cannot compute is refused,
unless an activation that it can compute is asked for; then the result says what that changes.

    stocha-export smollm2-relu smollm2-relu.gguf
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
from stocha_hf.conversion.export_gguf import check_gguf_output, write_gguf
from stocha_hf.conversion.source import Source, open_source
from stocha_hf.errors import StochaError

FORMATS = ("gguf",)


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    `output` is the file or folder, `bytes` its size, `architecture` what the runtime takes the model for, `activation`
    what it computes with it, `precision` that of the matrices, `approximation` what differs from the source (None:
    nothing but rounding), `command` a line that runs it.
    """

    output: str
    format: str
    architecture: str
    activation: str
    precision: str
    bytes: int
    approximation: str | None
    command: str

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
    revision: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a checkpoint for another runtime, which then computes the checkpoint's own activation.

    Args:
        source: folder or Hub id of a stocha checkpoint or of a native model.
        output: the file to write, whole or not at all.
        format: "gguf", for llama.cpp. A relu model becomes a `smallthinker` of one expert, since no other architecture
            there has a gated ReLU; one with its own activation stays what it is.
        activation: "relu" or the model's own, where the checkpoint infers with another one: an approximation.
        precision: of the matrices, one of PRECISIONS; below 8 bits it needs `llama-quantize` (default: the source's).
        revision: branch, tag or commit of a source on the Hub.
        overwrite: replace `output` if it is a file of this format.

    Returns:
        What was written.

    Raises:
        StochaError: for whatever the runtime would not compute alike, with nothing written.
    """
    output = local_path(output)
    if format not in FORMATS:
        raise StochaError(f"format is {format!r}: expected one of {', '.join(FORMATS)}")
    check_gguf_output(output, precision, overwrite)
    check_apart(output, [path for path in [local_path(source)] if path.exists()])
    with open_source(str(source), revision, "bfloat16", output) as found:
        refuse_quantized(found.config, found.id, "an export")
        chosen, approximation = _activation(found, activation)
        architecture, written = write_gguf(found, chosen, precision, output)
    command = f"llama-cli -m {output}"
    return Exported(str(output), format, architecture, chosen, written, output.stat().st_size, approximation, command)


def _activation(source: Source, asked: str | None) -> tuple[str, str | None]:
    """The activation to export with, and how it differs from what the checkpoint infers with."""
    base = source.architecture.act
    can = ("relu", base)
    if asked not in (None, *can):
        raise StochaError(f"activation is {asked!r}: expected one of {', '.join(can)}, which the runtime computes")
    if "stocha" not in source.config:
        return asked or base, None if asked in (None, base) else _instead(source, asked, base)
    entry = read_entry(source.config, source.id)
    own = str(entry.inference)
    if asked is None and own not in can:
        raise StochaError(
            f"{source.id} infers with {own}, and llama.cpp computes {' and '.join(can)}: pass --activation relu to "
            f"export it with that, after measuring it with stocha-eval {source.id} --mode relu"
        )
    if asked is None and entry.inputs is not None:
        raise StochaError(
            f"{source.id} cuts the inputs of its projections, which llama.cpp does not: pass --activation {own} to "
            "export it without the cuts"
        )
    chosen = asked or own
    changes = [_instead(source, chosen, own)] if chosen != own else []
    if entry.inputs is not None:
        changes.append(f"exported without the cuts of {source.id}'s inputs: no entry of them is left out")
    return chosen, "; ".join(changes) or None


def _instead(source: Source, chosen: str, own: str) -> str:
    return (
        f"exported with {chosen} in place of {own}: its zeros and perplexity are not those of {source.id}; measure "
        f"them with stocha-eval {source.id} --mode {chosen}"
    )
