"""A checkpoint as a GGUF file, written a tensor at a time: memory is that of one tensor.

export_metadata.py says what the file is to hold, export_vocabulary.py and export_tensors.py bring it, the package
gguf writes it. F32, F16, BF16 and Q8_0 are made here; the other precisions by llama.cpp's own `llama-quantize`, from a
file that lies beside the output meanwhile. The output appears whole or not at all.

    write_gguf(source, "relu", "bf16", Path("model.gguf"))
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stocha_hf.checkpoints.staging import scratch_folder
from stocha_hf.conversion.export_metadata import plan_metadata
from stocha_hf.conversion.source import Source
from stocha_hf.errors import StochaError
from stocha_hf.spec import __version__

if TYPE_CHECKING:
    from stocha_hf.conversion.export_tensors import FileTensor

OWN = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}  # and gguf's names
BY_LLAMA_CPP = ("q6_k", "q5_k_m", "q4_k_m", "q4_0")
PRECISIONS = (*OWN, *BY_LLAMA_CPP)
QUANTIZER = "llama-quantize"
MAGICS = (b"GGUF", b"PWRI")  # the latter PowerInfer's
_STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def check_gguf_output(output: Path, precision: str | None, overwrite: bool) -> None:
    """Raise StochaError where `output` cannot be a new GGUF file of this precision."""
    if output.suffix.lower() != ".gguf":
        raise StochaError(f"{output} is not the name of a GGUF file: expected one that ends in .gguf")
    if find_spec("gguf") is None:
        raise StochaError("GGUF needs the package gguf, which is not installed: run pip install 'stocha_hf[gguf]'")
    if precision is not None and precision not in PRECISIONS:
        raise StochaError(f"precision is {precision!r}: expected one of {', '.join(PRECISIONS)}")
    if precision in BY_LLAMA_CPP and shutil.which(QUANTIZER) is None:
        raise StochaError(
            f"precision {precision} is made by llama.cpp's {QUANTIZER}, which is not on PATH: install llama.cpp, or "
            f"choose one of {', '.join(OWN)}"
        )
    if not output.exists() and not output.is_symlink():
        ancestor = next(parent for parent in output.absolute().parents if parent.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise StochaError(f"cannot write {output} in {ancestor}: expected a folder with write permission")
    elif not overwrite:
        raise StochaError(f"{output} exists: expected a new file; choose another one or pass --overwrite")
    elif not _is_gguf(output):
        raise StochaError(f"{output} is not a GGUF file: expected one to overwrite; choose another output")


def write_gguf(source: Source, activation: str, precision: str | None, output: Path) -> tuple[str, str]:
    """Write the file; returns its architecture and its precision (given None, that of the source's embedding).

    Raises StochaError for a model or tokenizer that llama.cpp does not compute alike, with nothing written.
    """
    from stocha_hf.checkpoints.tensors import Tensors
    from stocha_hf.conversion.export_tensors import tensors_of
    from stocha_hf.conversion.export_vocabulary import vocabulary
    from stocha_hf.data import load_tokenizer

    plan = plan_metadata(source.config, activation, source.id)
    told = general(source, activation) | plan.values
    told |= vocabulary(load_tokenizer(source.folder), plan.sizes.vocab, source.id)
    tensors = Tensors(source.folder)
    stored = _STORED[str(tensors.read(tensors.ending("embed_tokens.weight")).dtype).removeprefix("torch.")]
    precision = precision or stored
    with scratch_folder(output) as work:
        written = work / "model.gguf"
        own = precision if precision in OWN else stored
        write_file(written, plan.architecture, told, list(tensors_of(plan, tensors, own)), own)
        if precision in BY_LLAMA_CPP:
            written = _quantized(written, precision)
        written.replace(output)
    return plan.architecture, precision


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return not path.is_symlink() and file.read(4) in MAGICS
    except OSError:
        return False


def general(source: Source, activation: str) -> dict[str, Any]:
    """Metadata of where a file comes from and what it computes."""
    languages = source.metadata.get("language")
    told = {
        "general.name": source.id,
        "general.license": source.metadata.get("license"),
        "general.languages": [languages] if isinstance(languages, str) else languages,
        "stocha.activation": activation,
        "stocha.version": __version__,
    }
    return {key: value for key, value in told.items() if value}


def write_file(path: Path, architecture: str, told: dict[str, Any], found: list[FileTensor], precision: str) -> None:
    """Write a GGUF file of these metadata and tensors, one tensor in memory at a time."""
    import numpy as np
    from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType

    from stocha_hf.progress import Progress

    writer = GGUFWriter(path, architecture)
    writer.add_file_type(int(LlamaFileType[OWN[precision]]))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    for key, value in told.items():
        _add(writer, key, value)
    for tensor in found:
        kind = GGMLQuantizationType[tensor.type.upper()]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in Progress(found, desc="Exporting", unit="tensor"):
            writer.write_tensor_data(tensor.packed())
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _quantized(path: Path, precision: str) -> Path:
    """A file of this precision beside `path`, by llama.cpp's program. Raises StochaError where it fails."""
    output = path.with_name("quantized.gguf")
    done = subprocess.run(
        [QUANTIZER, path, output, precision.upper(), str(os.cpu_count() or 1)], capture_output=True, text=True
    )
    if done.returncode or not _is_gguf(output):
        said = (done.stderr.strip() or done.stdout.strip() or f"status {done.returncode}").splitlines()[-1]
        raise StochaError(f"{QUANTIZER} failed ({said}): check that it belongs to a recent llama.cpp")
    return output
