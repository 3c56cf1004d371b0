"""The tensors of a GGUF file, one after the other: their names, shapes and types first, their values when asked.

llama.cpp's converter reorders the rows of a Llama's queries and keys, whose rotary pairs lie side by side there, adds
1 to Gemma's norms, and keeps vectors in float32; so does this. A ReLU model's feed-forward matrices get a first
dimension of one expert, and each layer a router of zeros.

    for tensor in tensors_of(plan, Tensors(folder), "bf16"): tensor.name, tensor.shape, tensor.packed()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from stocha_hf.checkpoints.architecture import expected_tensors
from stocha_hf.conversion.export_metadata import RELU, Plan
from stocha_hf.errors import StochaError

if TYPE_CHECKING:
    from stocha_hf.checkpoints.tensors import Tensors

ROPE_FACTORS = "rope_freqs.weight"
ROUTER = "blk.{}.ffn_gate_inp.weight"
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file: its name, shape, and type ("f32", "f16", "bf16" or "q8_0"); `read` reads its values."""

    name: str
    shape: list[int]
    type: str
    read: Callable[[], torch.Tensor]

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type.upper()]]
        return math.prod(self.shape) // values * size

    def packed(self) -> Any:
        """Its bytes, as a numpy array. Raises StochaError for values that are not finite in its type."""
        value = self.read().reshape(self.shape).to(TYPES.get(self.type, torch.float32)).contiguous()
        if not value.isfinite().all():
            raise StochaError(
                f"{self.name} has values that are not finite in {self.type}: expected numbers; check the weights, or "
                "choose another precision"
            )
        if self.type in TYPES:
            return value.view(torch.uint8).numpy()
        from gguf import GGMLQuantizationType, quantize

        return quantize(value.numpy(), GGMLQuantizationType[self.type.upper()])


def tensors_of(plan: Plan, tensors: Tensors, precision: str) -> Iterator[FileTensor]:
    """The tensors of a planned file, with matrices in this precision, one of TYPES or "q8_0"."""
    if plan.factors is not None:
        factors = torch.tensor(plan.factors)
        yield FileTensor(ROPE_FACTORS, [len(factors)], "f32", lambda: factors)
    for name, shape in expected_tensors(plan.sizes):
        yield _tensor(plan, name, shape, tensors, precision)
    if plan.architecture == RELU:
        for layer in range(plan.sizes.layers):
            shape = [1, plan.sizes.hidden]
            yield FileTensor(ROUTER.format(layer), shape, "f32", lambda: torch.zeros(plan.sizes.hidden))


def _tensor(plan: Plan, name: str, shape: list[int], tensors: Tensors, precision: str) -> FileTensor:
    sizes = plan.sizes
    kind = "f32" if len(shape) == 1 else "f16" if precision == "q8_0" and shape[-1] % 32 else precision
    heads = {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}.get(name.split(".")[-2])
    plus_1 = sizes.gemma and name.endswith("norm.weight")
    theirs = plan.names[name]
    transposed = "ffn_down_t." in theirs  # PowerInfer's

    def read() -> torch.Tensor:
        value = tensors.read(tensors.ending(name))
        if plan.architecture == "llama" and heads is not None:
            value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2)
        return value.float() + 1 if plus_1 else value.T if transposed else value

    shape = [1, *shape] if "_exps." in theirs else shape[::-1] if transposed else shape
    return FileTensor(theirs, shape, kind, read)
