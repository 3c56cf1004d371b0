# Copyright 2026 the stocha_hf authors. Licensed under the Apache License, Version 2.0.
"""Weights in 8 and 4 bits: ships beside modeling_stocha.py and cuts_stocha.py with quantized checkpoints.

transformers finds StochaQuantConfig and StochaQuantizer by the `quant_method` of config.json, as importing this file
registers them. The folder's `auto_map` names this file, which hands on the classes of modeling_stocha.py; so loading a
quantized folder with `trust_remote_code=True` works without stocha_hf, and folders that are not quantized do not carry
this file. What is computed here is PyTorch: a block of rows becomes floats, is multiplied, and is gone. Where
stocha_hf is installed, its runtime takes the decode steps.

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)                    # a quantized folder
    LlamaForCausalLM.from_pretrained(FOLDER, quantization_config=StochaQuantConfig(bits=4))  # quantizes in memory
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .cuts_stocha import cut_class, is_cut
from .modeling_stocha import *  # noqa: F403 - the classes that auto_map names
from .modeling_stocha import ACTIVATIONS, StochaMLP

# --- stocha_hf/quantization.py, from here ---

METHOD, FORMATS, GROUP = "stocha", (1, 2), 32
BITS = (4, 8)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MATRICES = (*PROJECTIONS, "embed_tokens", "lm_head")
IN_PLANES = ("embed_tokens", "lm_head")  # of format 2: in 8 bits, as two planes of 4
LONG_ROW = 2048  # bytes from which on memory gives rows here and there, of which 40% are left out, faster than all
MOST, LARGE = 0.6, 2**20  # a share of rows left out, and bytes of a matrix, from which on it does so with short ones
IN_8_BITS = ("v_proj", "embed_tokens", "lm_head")  # v_proj is small where heads share it, and loses most by 4 bits


@dataclass(frozen=True)
class Quantization:
    """The `quantization_config` entry of a quantized folder's config.json.

    Args:
        bits: Of the codes of the projections, 4 or 8.
        in_8_bits: Names of matrices, or ends of them such as "self_attn.v_proj", that are stored in 8 bits.
        transposed: Names of matrices, or ends of them, whose rows are inputs.
        quant_method: "stocha".
        format: The version of the format: 2, or 1, which has no planes.
        group_size: 32.

    Raises:
        ValueError: For any other value; the message names the key, what was given and what was expected.
    """

    bits: int = 4
    in_8_bits: tuple[str, ...] = IN_8_BITS
    transposed: tuple[str, ...] = ("down_proj",)
    quant_method: str = METHOD
    format: int = FORMATS[-1]
    group_size: int = GROUP

    def __post_init__(self) -> None:
        for key, allowed in (("bits", BITS), ("format", FORMATS), ("group_size", (GROUP,))):
            value = getattr(self, key)
            if type(value) is not int or value not in allowed:
                newer = "; install a newer stocha_hf" if key == "format" else ""
                raise ValueError(f"{key} is {value!r}: expected {' or '.join(map(str, allowed))}{newer}")
        if self.quant_method != METHOD:
            raise ValueError(f"quant_method is {self.quant_method!r}: expected {METHOD!r}")
        for key in ("in_8_bits", "transposed"):
            names = getattr(self, key)
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
                raise ValueError(f"{key} is {names!r}: expected a list of matrices' names such as 'v_proj'")
            object.__setattr__(self, key, tuple(names))

    @classmethod
    def from_dict(cls, entry: Any) -> Quantization:
        """Return the entry that JSON holds. Raises ValueError for whatever is not one."""
        if not isinstance(entry, dict):
            raise ValueError(f"quantization_config is {entry!r}: expected a mapping")
        known = [field.name for field in fields(cls)]
        if unknown := sorted(str(key) for key in entry if key not in known):
            raise ValueError(f"quantization_config has the keys {unknown}: expected no other than {', '.join(known)}")
        return cls(**entry)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON holds it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def bits_of(self, name: str) -> int:
        """Return the bits of a matrix's codes, given its module's name."""
        return 8 if _is_named(name, self.in_8_bits) else self.bits

    def is_transposed(self, name: str) -> bool:
        """Return whether a matrix's rows are inputs."""
        return _is_named(name, self.transposed)

    def laid_out(self, sizes: dict[str, tuple[int, int]], share: float, skips: bool) -> Quantization:
        """Return the entry with the layout in which projections that cut their inputs are read fastest.

        A kept input's row is read alone where rows are long, or few of many. Elsewhere a row is an output and all are
        read, with zeros for what is cut; so it is with down_proj, cut or not, unless the activation skips neurons.

        Args:
            sizes: Outputs and inputs of the projections that cut their inputs, by name.
            share: Of the inputs that are cut.
            skips: Whether the activation skips neurons.
        """
        rows = {name: outputs * self.bits_of(name) // 8 for name, (outputs, _) in sizes.items()}
        short = {name for name, row in rows.items() if share >= MOST and row * sizes[name][1] >= LARGE}
        long = {name for name, row in rows.items() if row >= LONG_ROW} | short
        kept = {name for name in self.transposed if skips or name != "down_proj"}
        return replace(self, transposed=tuple(sorted(kept | long)))

    def is_in_planes(self, name: str) -> bool:
        """Return whether a matrix's codes of 8 bits are two planes, of their high and their low halves."""
        named = self.format > 1 and _is_named(name, IN_PLANES)
        return named and self.bits_of(name) == 8 and not self.is_transposed(name)

    def tensors(self, name: str, outputs: int, inputs: int) -> dict[str, tuple[str, list[int]]]:
        """Return what stands for a matrix: name within the module -> safetensors' dtype, and shape."""
        rows, columns = (inputs, outputs) if self.is_transposed(name) else (outputs, inputs)
        groups, bits = -(-columns // GROUP), self.bits_of(name)
        if self.is_in_planes(name):
            return {"codes": ("U8", [2, rows, groups * GROUP // 2]), "scale": ("F16", [rows, groups])}
        if bits == 8:
            return {"codes": ("I8", [rows, groups * GROUP]), "scale": ("F16", [rows, groups])}
        return {"codes": ("U8", [rows, groups * GROUP // 2]), "scale": ("I16", [rows, groups])}


def is_matrix(name: str) -> bool:
    """Return whether a module of this name is stored quantized."""
    return name.rpartition(".")[2] in MATRICES


def _is_named(name: str, ends: tuple[str, ...]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


# --- to here ---

NAMES = ("codes", "scale")
DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "I16": torch.int16}  # by safetensors' names
ZERO_BITS, ZERO_STEPS = 7, 8  # of a word of 4 bits: its low bits are the zero, in eighths
MANTISSA, LEAST = 19, 103 << 4  # bits of a float32's mantissa that a scale lacks; the least scale, 2^-24, after these
SHARES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range that the codes may cover
FITTED = 2**17  # weights that are fitted at one time: what a processor's cache holds of them and of their codes
BLOCK = 2**20  # weights that are floats at one time in a product on a CPU
BLOCK_ON_GPU = 2**26


# Packing: matrices [rows, columns] of weights to codes and scales, and back.


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes [rows, columns], columns a multiple of 32, into bytes [rows, columns * bits / 8]."""
    if bits == 8:
        return codes.to(torch.int8)
    low, high = codes.to(torch.uint8).view(len(codes), -1, 2, GROUP // 2).unbind(2)
    return (low | high << 4).reshape(len(codes), -1)


def split(codes: torch.Tensor) -> torch.Tensor:
    """Split codes of 8 bits [rows, columns] into planes of their high and their low halves [2, rows, columns / 2]."""
    whole = codes.to(torch.int16) + 128
    return torch.stack([pack(whole >> 4, 4), pack(whole & 15, 4)])


def joined(planes: torch.Tensor) -> torch.Tensor:
    """Return the codes of 8 bits [rows, columns] of two planes."""
    packed = planes.unflatten(-1, (-1, GROUP // 2))
    high, low = torch.cat([packed & 15, packed >> 4], -1).flatten(2)
    return ((high << 4 | low).to(torch.int16) - 128).to(torch.int8)


def dequantize(
    codes: torch.Tensor, scale: torch.Tensor, bits: int, columns: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the weights [rows, columns] that packed codes, of 8 bits also in planes, and scales stand for."""
    rows, groups = scale.shape
    if bits == 8:
        codes = joined(codes) if codes.dim() == 3 else codes
        weights = decode(codes.view(rows, groups, GROUP), scale, 8)
    else:
        step, zero = levels(scale)
        packed, weights = codes.view(rows, groups, GROUP // 2), step.new_empty(rows, groups, GROUP)
        for half, target in ((packed & 15, weights[..., : GROUP // 2]), (packed >> 4, weights[..., GROUP // 2 :])):
            torch.mul(half.float().sub_(zero), step, out=target)
    return weights.flatten(1)[:, :columns].to(dtype)


def quantize(
    weight: torch.Tensor, bits: int, importance: torch.Tensor | None = None, in_planes: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize a matrix [rows, columns], each group with the scale and zero of the least squared error.

    Args:
        weight: [rows, columns], of any float dtype.
        bits: 4 or 8.
        importance: [columns], what a squared error counts in each column, such as the input's mean square.
        in_planes: Whether to split codes of 8 bits.

    Returns:
        Packed codes, and scales [rows, groups]. The last group is filled with zeros.
    """
    columns = weight.shape[1]
    counts = weight.new_ones(columns, dtype=torch.float32) if importance is None else importance.float()
    filled = -columns % GROUP
    counts = counts.clamp(min=1e-4 * counts.mean().item())  # no column's weights are free
    counts = F.pad(counts, (0, filled)).view(-1, GROUP)
    parts = []
    for block in weight.split(max(1, FITTED // columns)):
        groups = F.pad(block.float(), (0, filled)).view(len(block), -1, GROUP)
        scale = fit(groups, bits, counts)
        packed = pack(encode(groups, scale, bits).view(len(block), -1), bits)
        parts.append((split(packed) if in_planes else packed, scale))
    codes, scales = zip(*parts, strict=True)
    return torch.cat(codes, -2), torch.cat(scales)


def encode(groups: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes of weights [..., 32], as floats, given each group's scale [...]."""
    if bits == 8:
        step = scale.float()[..., None]
        return torch.where(step == 0, 0.0, groups / step).round_().clamp_(-127, 127)
    step, zero = levels(scale)
    return (groups / step).add_(zero).round_().clamp_(0, 15)


def decode(codes: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the weights of codes [..., 32] that are not packed, given each group's scale [...]."""
    if bits == 8:
        return codes * scale.float()[..., None]
    step, zero = levels(scale)
    return (codes - zero) * step


def levels(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and zero as float32 [..., 1], given 4-bit groups' words [...]."""
    words = words.int()[..., None] & 0xFFFF
    step = ((words >> ZERO_BITS) + LEAST << MANTISSA).view(torch.float32)
    return step, (words & (1 << ZERO_BITS) - 1).float() / ZERO_STEPS


def fit(groups: torch.Tensor, bits: int, importance: torch.Tensor) -> torch.Tensor:
    """Return the scales [...] of groups [..., 32] by the least weighted squared error.

    Of 4 bits, several ranges are tried, which hold 0; for each, the codes are rounded, and then the scale and zero
    are those that fit these codes best. `importance` broadcasts to the groups.
    """
    if bits == 8:
        return (groups.abs().amax(-1) / 127).half()
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
    importance = importance.expand_as(groups)
    total, mean = importance.sum(-1, keepdim=True), (importance * groups).sum(-1, keepdim=True)
    best: Any = None
    chosen: Any = None
    for share in SHARES:
        step, start = (high - low) * share / 15, low + (high - low) * (1 - share) / 2
        codes = torch.where(step == 0, 0.0, (groups - start) / step).round_().clamp_(0, 15)
        weighted = codes * importance
        first, second = weighted.sum(-1, keepdim=True), (weighted * codes).sum(-1, keepdim=True)
        fitted = (total * (weighted * groups).sum(-1, keepdim=True) - first * mean) / (total * second - first**2)
        scale = _scale(torch.where(fitted.isfinite() & (fitted > 0), fitted, step))
        zero = (first - mean / (scale + LEAST << MANTISSA).view(torch.float32)) / total * ZERO_STEPS
        zero = zero.nan_to_num_(0.0).round_().clamp_(0, (1 << ZERO_BITS) - 1).int()
        words = (scale << ZERO_BITS | zero).to(torch.int16).squeeze(-1)
        error = ((decode(encode(groups, words, 4), words, 4) - groups) ** 2 * importance).sum(-1)
        if best is None:
            best, chosen = error, words
        else:
            best, chosen = torch.minimum(best, error), torch.where(error < best, words, chosen)
    return chosen


def _scale(step: torch.Tensor) -> torch.Tensor:
    """The upper 9 bits of a word whose scale is nearest to a positive float32."""
    return ((step.view(torch.int32) + (1 << MANTISSA - 1) >> MANTISSA) - LEAST).clamp_(0, 511)


# Modules: codes and scale are buffers. What a matrix is tied to is not its own: it is read there.


class Quantized(nn.Module):
    """What QuantizedLinear and QuantizedEmbedding share: a matrix's tensors, and weights made of some rows of them."""

    _is_hf_initialized = True  # transformers fills modules that are not with random numbers
    quantized_format: int  # the first one that has this layout: 2 for planes
    bits: int
    transposed: bool
    columns: int  # weights of a row
    dtype: torch.dtype
    codes: Any
    scale: Any

    def _become(self, entry: Quantization, name: str, outputs: int, inputs: int, like: torch.Tensor) -> None:
        """Take the layout of the matrix of this name, with tensors that are not filled."""
        self.bits, self.transposed, self.dtype = entry.bits_of(name), entry.is_transposed(name), like.dtype
        self.quantized_format = 2 if entry.is_in_planes(name) else 1
        self.columns = outputs if self.transposed else inputs
        for part, (dtype, shape) in entry.tensors(name, outputs, inputs).items():
            self.register_buffer(part, torch.empty(shape, dtype=DTYPES[dtype], device=like.device))

    def fill(self, weight: torch.Tensor) -> None:
        """Quantize the native module's weight into the tensors."""
        matrix = weight.detach().t() if self.transposed else weight.detach()
        self.codes, self.scale = quantize(matrix, self.bits, in_planes=self.quantized_format == 2)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weights [last - first, columns] of rows that lie together."""
        if (runtime := _runtime()) is not None and (made := runtime.dequantize(self, first, last, dtype)) is not None:
            return made
        return self._dequantized(slice(first, last), dtype)

    def _dequantized(self, rows: Any, dtype: torch.dtype) -> torch.Tensor:
        return dequantize(self.codes[..., rows, :], self.scale[rows], self.bits, self.columns, dtype)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the weight that the native module would have."""
        weight = self.rows(0, len(self.scale), dtype)
        return weight.t() if self.transposed else weight

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move tensors, and never cast them: a cast changes what is computed in, which is x's dtype."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        own: dict[str, Any] = self._buffers
        self._buffers = {}
        super()._apply(fn, recurse)  # a bias
        self._buffers = {part: _moved(tensor, fn) for part, tensor in own.items()}
        return self

    def __getattr__(self, name: str) -> Any:
        if name in NAMES and "tied_to" in self.__dict__:
            return getattr(self.__dict__["tied_to"][0], name)
        if name == "weight":
            shape = reversed(self.shape) if self.transposed else self.shape
            nan = torch.full((), torch.nan, dtype=self.dtype, device=self.codes.device)
            return nan.expand(*shape).as_subclass(_NoWeight)
        return super().__getattr__(name)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows, and weights of a row."""
        return len(self.scale), self.columns


class _NoWeight(torch.Tensor):
    """A weight that is codes, for those who ask for its shape, dtype and device, as peft does."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        """Refuse what merging an adapter begins with."""
        raise RuntimeError(
            "this layer's weight is quantized: expected a float weight to merge an adapter into; merge first, then "
            "quantize the result"
        )


def _runtime() -> Any:
    """stocha_hf's functions for modeling_stocha.py's contract, or None."""
    return None if torch.compiler.is_compiling() else StochaMLP.runtime


def _moved(tensor: torch.Tensor, fn: Any) -> torch.Tensor:
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


class QuantizedLinear(Quantized, nn.Linear):
    """A Linear layer whose weight is codes: `codes`, `scale`, `bits`, `transposed`, `bias`."""

    def __init__(self, native: nn.Linear, entry: Quantization, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = native.in_features, native.out_features
        self._become(entry, name, self.out_features, self.in_features, native.weight)
        self.register_parameter("bias", native.bias)
        self.train(native.training)

    def tie(self, embedding: QuantizedEmbedding) -> None:
        """Read the embedding's tensors in the place of own ones."""
        for part in NAMES:
            del self._buffers[part]
        self.tied_to = (embedding,)  # in a tuple: no child
        self.bits, self.transposed, self.quantized_format = embedding.bits, False, embedding.quantized_format

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute x [..., in_features] times the weight: by the runtime where it takes x, else in PyTorch."""
        if (runtime := _runtime()) is not None and (found := runtime.quantized_linear(self, x)) is not None:
            return found
        dtype = computing_dtype(x)
        given, parts = x.to(dtype), self._blocks(x)
        y: Any
        if self.transposed:
            y = sum(given[..., first:last] @ self.rows(first, last, dtype) for first, last in parts)
        else:
            y = torch.cat([F.linear(given, self.rows(*part, dtype)).to(x.dtype) for part in parts], -1)
        return y.to(x.dtype) if self.bias is None else y.to(x.dtype) + self.bias

    def _blocks(self, x: torch.Tensor) -> Iterator[tuple[int, int]]:
        rows, size = len(self.scale), max(1, (BLOCK if x.device.type == "cpu" else BLOCK_ON_GPU) // self.columns)
        return ((first, min(first + size, rows)) for first in range(0, rows, size))


class QuantizedEmbedding(Quantized):
    """An embedding whose rows are codes, as QuantizedLinear's. `factor` is what Gemma multiplies an embedding with."""

    def __init__(self, native: nn.Embedding, entry: Quantization, name: str) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = native.num_embeddings, native.embedding_dim
        self.padding_idx, self.factor = native.padding_idx, float(getattr(native, "scalar_embed_scale", 1.0))
        self._become(entry, name, self.num_embeddings, self.embedding_dim, native.weight)
        self.train(native.training)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the vectors [..., embedding_dim] of token ids."""
        flat = tokens.reshape(-1)
        scale = F.embedding(flat, self.scale)  # first: of ids that there are none of, it says what a native one says
        found = dequantize(self.codes[..., flat, :], scale, self.bits, self.columns, self.dtype)
        if self.factor != 1:
            found = found * torch.tensor(self.factor, dtype=self.dtype)
        return found.view(*tokens.shape, self.columns)


@functools.cache
def _has_bf16_products() -> bool:
    """Whether this processor multiplies bfloat16 itself; where it does not, float32 is several times as fast."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


def computing_dtype(x: torch.Tensor) -> torch.dtype:
    """Return what a product with x is computed in."""
    if x.device.type != "cpu" or (x.dtype == torch.bfloat16 and _has_bf16_products()):
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


# What transformers calls: the entry of config.json as a config class, and the quantizer.


class StochaQuantConfig(QuantizationConfigMixin):
    """Ask for weights in 8 or 4 bits: `from_pretrained(FOLDER, quantization_config=StochaQuantConfig(bits=4))`.

    Args:
        bits: Of the projections' codes, 4 or 8.
        **entry: The other keys of Quantization: in_8_bits, transposed.

    Raises:
        ValueError: For a value that no quantized folder can have.
    """

    def __init__(self, bits: int = 4, **entry: Any) -> None:
        self.__dict__.update(Quantization.from_dict({"bits": bits, **entry}).to_dict())

    def entry(self) -> Quantization:
        """Return the entry as a Quantization."""
        return Quantization.from_dict(self.to_dict())


class StochaQuantizer(HfQuantizer):
    """Exchanges the modules of a model for quantized ones: before loading a quantized folder, after any other."""

    quantization_config: Any  # a StochaQuantConfig, of this or another copy of the file
    requires_calibration = False
    is_trainable = True  # gradients pass through, so adapters can be trained
    is_compileable = True

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self.pre_quantized:
            exchange(model, self.quantization_config.entry())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules() if is_cut(module)]
            cut = {name: (module.out_features, module.in_features) for name, module in modules}
            told = getattr(model.config, "stocha", None) or {}
            share, runs = (told.get("inputs") or {}).get("share") or 0.0, told.get("inference")
            skips = runs is None or ACTIVATIONS[runs].cut is not None
            entry = self.quantization_config.entry().laid_out(cut, share, skips)
            self.quantization_config.transposed = list(entry.transposed)
            exchange(model, entry, fill=True)
        return model

    @staticmethod
    def complete(model: Any, folder: str | os.PathLike) -> None:
        """Give a saved folder this file and those that it imports, all of one version, and let its config name it."""
        model.config.auto_map = {
            auto: f"{__name__.rpartition('.')[2]}.{name.rpartition('.')[2]}"
            for auto, name in model.config.auto_map.items()
        }
        model.config.save_pretrained(folder)
        for name in ("modeling_stocha.py", "cuts_stocha.py", os.path.basename(__file__)):
            shutil.copyfile(os.path.join(os.path.dirname(__file__), name), os.path.join(folder, name))


def exchange(model: Any, entry: Quantization, fill: bool = False) -> int:
    """Exchange a model's matrices for quantized modules, with `fill` quantized from their weights, one at a time.

    Returns the number of matrices.
    """
    found = [(name, module) for name, module in model.named_modules() if is_matrix(name)]
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    made: dict[str, Any] = {}
    for name, native in found:
        kind: Any = QuantizedEmbedding if isinstance(native, nn.Embedding) else QuantizedLinear
        module = kind(native, entry, name)
        parent, _, last = name.rpartition(".")
        if last == "lm_head" and tied:
            module.tie(next(other for other in made.values() if isinstance(other, QuantizedEmbedding)))
        elif fill:
            module.fill(native.weight)
        if is_cut(native):
            state = {key: native.__dict__[key] for key in native.state} | {
                "native_class": type(module),
                "input_major": None,
            }
            module.__dict__.update(state)
            module.__class__ = cut_class(type(module))
        setattr(model.get_submodule(parent), last, module)
        made[name] = module
    if tied:  # transformers ties parameters by name
        model._tied_weights_keys, model.all_tied_weights_keys = None, {}
    return len(made)


if METHOD not in AUTO_QUANTIZER_MAPPING:  # by another copy of this file
    register_quantization_config(METHOD)(StochaQuantConfig)
    register_quantizer(METHOD)(StochaQuantizer)
