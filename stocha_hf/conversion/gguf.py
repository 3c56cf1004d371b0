"""Reading a .gguf file, or all parts of a split one, as an ordinary checkpoint.

The header is checked first (gguf_header.py), its metadata become a config.json (gguf_config.py), and its tensors
are compared with what that config asks for. Then one tensor after the other is dequantized by llama.cpp's own package
gguf, and written: memory is that of one tensor. The tokenizer is the one inside the file (gguf_tokenizer.py). It needs
torch, and the extra `stocha_hf[gguf]`.

    model = check_gguf(Path("model-00001-of-00003.gguf"))
    metadata = dequantize(model, folder, "bfloat16")
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.architecture import check_tensors
from stocha_hf.checkpoints.casting import write_tensors
from stocha_hf.checkpoints.companions import dump
from stocha_hf.checkpoints.inspection import CONFIG, SINGLE
from stocha_hf.checkpoints.metadata import plain_metadata
from stocha_hf.conversion.gguf_config import config_of, with_scaled_rope
from stocha_hf.conversion.gguf_header import GgufTensor, read_gguf_header
from stocha_hf.conversion.gguf_tokenizer import write_tokenizer
from stocha_hf.errors import StochaError

ROPE_FACTORS = "rope_freqs.weight"
PARTS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
GEMMA_PARTS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class GgufModel:
    """A checked GGUF model: its first file, metadata, config.json, and its tensors by their names in transformers."""

    path: Path
    metadata: dict[str, Any]
    config: dict[str, Any]
    tensors: dict[str, GgufTensor]


def check_gguf(path: Path) -> GgufModel:
    """Read and check the headers of a .gguf file and of its other parts. Raises StochaError."""
    if not path.is_file():
        raise StochaError(f"{path} does not exist: expected a .gguf file, a folder or a Hub id such as org/name")
    if find_spec("gguf") is None:
        raise StochaError(f"{path} needs the package gguf, which is not installed: run pip install 'stocha_hf[gguf]'")
    first, metadata, found = _all_parts(path)
    for name, tensor in found.items():
        _check_extent(tensor, name)
    shapes = {name: tensor.shape for name, tensor in found.items()}
    config = config_of(metadata, shapes, str(first))
    factors = found.pop(ROPE_FACTORS, None)
    tensors = {_renamed(name, config["model_type"], first): tensor for name, tensor in found.items()}
    check_tensors({name: tensor.shape for name, tensor in tensors.items()}, config, str(first))
    scales = None if factors is None else _read(factors).flatten().tolist()
    config = with_scaled_rope(config, metadata, scales, str(first))
    return GgufModel(first, metadata, config, tensors)


def _all_parts(path: Path) -> tuple[Path, dict[str, Any], dict[str, GgufTensor]]:
    """The first file of a model, its metadata, and the tensors of all its files."""
    header = read_gguf_header(path)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return path, header.metadata, header.tensors
    name = _PART.fullmatch(path.name)
    if name is None or not isinstance(count, int) or count != int(name[3]):
        raise StochaError(f"{path} is one of {count} parts: expected a name such as model-00001-of-{count:05}.gguf")
    files = [path.with_name(f"{name[1]}-{index:05}-of-{name[3]}{name[4]}") for index in range(1, count + 1)]
    tensors: dict[str, GgufTensor] = {}
    metadata: dict[str, Any] = {}
    for index, file in enumerate(files):
        if not file.is_file():
            raise StochaError(f"{file} is missing: expected all {count} parts of the model in one folder")
        header = read_gguf_header(file)
        if (header.metadata.get("split.no"), header.metadata.get("split.count")) != (index, count):
            raise StochaError(f"{file} is not part {index + 1} of {count}: expected the parts of one model")
        if twice := header.tensors.keys() & tensors.keys():
            raise StochaError(f"tensor {min(twice)} is in {file} and in an earlier part: expected it once")
        metadata = metadata or header.metadata
        tensors |= header.tensors
    return files[0], metadata, tensors


def _renamed(name: str, model_type: str, path: Path) -> str:
    """A tensor's name in transformers."""
    parts = LAYER_PARTS | (GEMMA_PARTS if model_type.startswith("gemma") else {})
    if (match := _NAME.fullmatch(name)) and match[2] in (PARTS if match[1] is None else parts):
        layer, part, end = match.groups()
        return f"{PARTS[part]}.{end}" if layer is None else f"model.layers.{int(layer)}.{parts[part]}.{end}"
    raise StochaError(f"{path} has a tensor {name}, which a {model_type} model does not have: convert the safetensors")


def _row_bytes(tensor: GgufTensor, name: str) -> int:
    """Bytes of one row. Raises StochaError for a type that is not known or does not fit the row."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
    except (ValueError, KeyError):
        values, size = 0, 0
    if not values or not tensor.shape[-1] or tensor.shape[-1] % values:
        raise StochaError(
            f"{name} in {tensor.file} has the type {tensor.type} in rows of {tensor.shape[-1]}: expected a "
            "type of ggml whose blocks fill a row; update the package gguf"
        )
    return tensor.shape[-1] // values * size


def _check_extent(tensor: GgufTensor, name: str) -> None:
    end = tensor.begin + math.prod(tensor.shape[:-1]) * _row_bytes(tensor, name)
    if end > (length := tensor.file.stat().st_size):
        raise StochaError(
            f"{tensor.file} cannot be read as GGUF ({name} ends at byte {end} of {length}): expected a whole file; "
            "download it again"
        )


def _read(tensor: GgufTensor, name: str = ROPE_FACTORS) -> Any:
    """A tensor's values, float32, of its shape."""
    import numpy as np
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.type)
    shape = (*tensor.shape[:-1], _row_bytes(tensor, name))
    data: Any = np.memmap(tensor.file, np.uint8, "r", tensor.begin, shape)
    if kind in (plain := {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}):
        data = data.view(plain[kind])
    try:
        return dequantize(data, kind).reshape(tensor.shape)
    except NotImplementedError as error:
        raise StochaError(f"{name} in {tensor.file} is of type {kind.name}, which gguf cannot dequantize") from error


def dequantize(model: GgufModel, folder: Path, dtype: str) -> dict[str, Any]:
    """Write a GGUF model's tokenizer, config and tensors into `folder` as a checkpoint; returns its Hub metadata.

    Raises StochaError for a tokenizer that cannot be read and for weights that are not finite in `dtype`.
    """
    ids = {key: model.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(
        dump({key: value for key, value in ids.items() if value is not None})
    )
    (folder / CONFIG).write_text(dump(model.config | {"dtype": dtype}), encoding="utf-8")
    write_tokenizer(model.path, model.metadata, folder)
    _write_tensors(model, folder / SINGLE, dtype)
    named = {"license": "general.license", "language": "general.languages"}
    found = {key: model.metadata[field] for key, field in named.items() if field in model.metadata}
    return plain_metadata(found, str(model.path))


def _write_tensors(model: GgufModel, path: Path, dtype: str) -> None:
    import torch

    from stocha_hf.progress import Progress

    with Progress(total=len(model.tensors), desc="Dequantizing", unit="tensor") as bar:

        def read(name: str) -> torch.Tensor:
            bar.update()
            return torch.from_numpy(_native(_read(model.tensors[name], name), name, model.config))

        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        write_tensors(path, shapes, dtype, read, str(model.path), {"format": "pt"})


def _native(values: Any, name: str, config: dict[str, Any]) -> Any:
    """A tensor as transformers has it: GGUF puts a Llama's rotary pairs side by side, and adds 1 to Gemma's norms."""
    import numpy as np

    if config["model_type"] == "llama" and (".q_proj." in name or ".k_proj." in name):
        heads = config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    if config["model_type"].startswith("gemma") and name.endswith("norm.weight"):
        values = values - 1
    return np.array(values, dtype=np.float32)  # a copy: the file is mapped read-only
