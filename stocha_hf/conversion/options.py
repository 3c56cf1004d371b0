"""Options of a conversion that say nothing without another one, or contradict it: refused before anything is read.

`convert` asks each function for what it was given of one kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stocha_hf.conversion.input_cuts import Calibration
from stocha_hf.conversion.refit_work import Refit
from stocha_hf.cuts import LEARNED
from stocha_hf.errors import StochaError
from stocha_hf.quantization import MATRICES, OUTPUTS, is_bits
from stocha_hf.spec import StochaConfig


def calibration_options(inputs: float | None, refit: str | None, given: dict[str, Any]) -> Calibration | None:
    """Return the options of input cuts, or None where none are asked for."""
    if inputs is None:
        if used := [key for key, value in given.items() if value]:
            name = {"data": "calibrate", "tokens": "calibrate_tokens"}.get(used[0], f"inputs_{used[0]}")
            raise StochaError(f"{name} was given without inputs: expected the share of inputs to cut, such as 0.4")
        return None
    if refit is not None:
        raise StochaError(
            f"inputs {inputs:g} was given with refit: expected one of them; convert the refitted folder again for the "
            "other"
        )
    return Calibration(inputs, **given)


def refit_options(data: str | None, tokens: int | None, target_sparsity: float | None, on_disk: bool) -> Refit | None:
    """Return the options of a refit, or None where none is asked for."""
    if data is not None:
        return Refit(data, tokens, target_sparsity, on_disk)
    if target_sparsity is not None or tokens is not None or on_disk:
        raise StochaError(
            "target_sparsity, refit_tokens or refit_on_disk was given without refit: expected the data to refit on"
        )
    return None


def refit_activation(changes: dict[str, Any]) -> dict[str, Any]:
    """Return the changes of the entry where a refit is asked for."""
    changes = {"activation": "relu"} | changes
    if changes.keys() - {"activation"} or changes["activation"] != "relu":
        given = ", ".join(f"{key} {value}" for key, value in changes.items())
        raise StochaError(
            f"refit was given with {given}: expected activation relu and no other field, since the refit chooses the "
            "thresholds; convert the result again for another training activation"
        )
    return changes


def check_fields(changes: dict[str, Any]) -> None:
    """Raise StochaError for changes that no `stocha` entry can have."""
    try:
        StochaConfig.from_dict(changes)
    except ValueError as error:
        raise StochaError(str(error)) from error


def check_bits(
    bits: float | None, in_8_bits: Sequence[str] | None, refit: Refit | None, allotment: str | None
) -> None:
    """Raise StochaError for bits that weights cannot have, and beside what quantized weights cannot have."""
    if bits is not None and not is_bits(bits):
        raise StochaError(f"bits is {bits!r}: expected 4 or 8, or a mean of bits between them")
    if bits is not None and refit is not None:
        raise StochaError("bits was given with refit: expected one of them; refit first, then quantize the result")
    if bits is not None and allotment == LEARNED:
        raise StochaError(
            f"bits {bits} was given with inputs_allotment {LEARNED}: expected one of them; cut first, then quantize "
            "the result"
        )
    if in_8_bits is not None and (bits in (None, 8) or not set(in_8_bits) <= set(MATRICES)):
        raise StochaError(
            f"in_8_bits {' '.join(in_8_bits)} was given with bits {bits}: expected bits below 8, and names among "
            f"{', '.join(MATRICES)}"
        )


def check_rows(rows: str | None, bits: float | None) -> None:
    """Raise StochaError for rows that are not OUTPUTS, or are those of no bits."""
    if rows is not None and (rows != OUTPUTS or bits is None):
        raise StochaError(f"rows {rows!r} was given with bits {bits}: expected {OUTPUTS!r}, with bits")
