"""What only quantized folders have: the entry `quantization_config`, and several tensors in the place of a weight.

read_quantization(config, "my-model").bits     # 4; None for a folder that is not quantized
matrix_shapes("layers.0.mlp.up_proj.weight", [1536, 576], quantization)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stocha_hf.errors import StochaError
from stocha_hf.quantization import METHOD, Quantization, is_matrix

FLOATS = ("BF16", "F16", "F32")


def read_quantization(config: Mapping[str, Any], where: str) -> Quantization | None:
    """The entry of a config, or None where nothing is quantized. Raises StochaError for weights of another kind."""
    entry = config.get("quantization_config")
    if not entry:
        return None
    method = entry.get("quant_method") if isinstance(entry, dict) else entry
    if method != METHOD:
        raise StochaError(
            f"{where} is quantized ({method}): expected bf16, fp16 or fp32 weights; convert the original model"
        )
    try:
        return Quantization.from_dict(entry)
    except ValueError as error:
        raise StochaError(f"the quantization_config of {where} is wrong: {error}") from error


def refuse_quantized(config: Mapping[str, Any], where: str, doing: str) -> None:
    """Raise StochaError where a config is that of a quantized folder, which `doing` would need the weights of."""
    if (found := read_quantization(config, where)) is not None:
        raise StochaError(
            f"{where} is quantized to {found.bits} bits: expected bf16, fp16 or fp32 weights for {doing}; use the "
            "model that it was made from"
        )


def matrix_shapes(name: str, shape: list[int], quantization: Quantization | None) -> list[tuple[str, list[int]]]:
    """Names and shapes of what a folder holds for a tensor of the native class."""
    module, _, part = name.rpartition(".")
    if quantization is None or part != "weight" or not is_matrix(module):
        return [(name, shape)]
    return [(f"{module}.{end}", own) for end, (_, own) in quantization.tensors(module, *shape).items()]


def dtypes(name: str, quantization: Quantization | None) -> tuple[str, ...]:
    """safetensors' names of the dtypes that a tensor of this name may have."""
    module, _, part = name.rpartition(".")
    packed = quantization.tensors(module, 1, 1) if quantization is not None and is_matrix(module) else {}
    return (packed[part][0],) if part in packed else FLOATS
