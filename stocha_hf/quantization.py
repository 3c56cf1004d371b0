"""What a quantized folder may say of its matrices, without importing torch: their bits, layout, names and shapes.

A matrix of a quantized folder is two tensors in the place of one, `codes` and `scale`. Their rows are what a decode
step reads whole, so that file, memory and kernel share one layout and one copy: a neuron of gate_proj and up_proj, a
neuron of down_proj too (hence stored transposed), an output of any other projection, a token of the embedding. Of
projections that cut their inputs, `laid_out` says what a row is. A group is 32 neighbours in a row.

    weight = code * scale                  8 bits: int8, -127 to 127; scale float16
    weight = (code - zero) * scale         4 bits: 0 to 15; byte j of a group holds code j below, code j + 16 above

8-bit codes of the embedding and of lm_head are two planes, each like codes of 4 bits: those of the high halves of
code + 128, then those of the low halves. So a decode step can read half of lm_head, and the rest where it matters.

A group of 4 bits has one word of 16 bits, kept as int16. Its low 7 bits are zero, in eighths; the 9 above are scale:
5 bits of exponent, from 2^-24 on, and 4 of mantissa. So a zero for each group costs no bits: 4.5 a weight.

quantization_stocha.py, which ships with quantized folders, holds a copy of everything between the two marked lines.

    Quantization(bits=4).tensors("model.layers.0.mlp.down_proj", outputs=576, inputs=1536)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

QUANTIZATION_FILE = Path(__file__).with_name("quantization_stocha.py")

# --- copied into quantization_stocha.py from here ---

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


OUTPUTS = "outputs"  # what rows of projections that cut their inputs may be asked to be


def is_bits(bits: Any) -> bool:
    """Return whether a conversion takes these bits: those of codes, or a mean of bits a weight between them."""
    return type(bits) in (int, float) and (bits in BITS or BITS[0] < bits < BITS[1])
