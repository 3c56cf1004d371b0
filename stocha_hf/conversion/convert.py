"""Conversion: a source checkpoint becomes a stocha checkpoint; no tensor is decoded.

Patching changes the activation and not one weight, so the shards are copied byte for byte (copy-on-write where the
file system can) and only config.json, the modeling file and the card are written. Hence the time of `cp`, and memory
independent of the model's size. Converting a converted checkpoint changes only what is asked for. Input cuts
(input_cuts.py) and refits (refit.py) run text through the model first; a refit, and cuts whose thresholds are learned,
then write other weights.

With another `dtype` the weights are cast on the way, a tensor at a time (casting.py), with `bits` they are quantized
(quantize.py).

    stocha-convert org/model model-stocha --p 0.3
    stocha_hf.convert("org/model", "model-stocha", p=0.3).stocha["inference"]   # "silu"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.casting import DTYPES, with_dtype
from stocha_hf.checkpoints.entry import began_random, checked_entry, read_entry, with_entry
from stocha_hf.checkpoints.inspection import is_weight
from stocha_hf.checkpoints.names import check_hub_id
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.checkpoints.quantized import refuse_quantized
from stocha_hf.checkpoints.staging import check_apart
from stocha_hf.conversion.input_cuts import Calibration, FallbackOptions, check_uncut, with_cuts
from stocha_hf.conversion.options import (
    calibration_options,
    check_bits,
    check_fields,
    check_rows,
    refit_activation,
    refit_options,
)
from stocha_hf.conversion.output import check_output, write_checkpoint
from stocha_hf.conversion.refit_work import Refit, refit_folder
from stocha_hf.conversion.source import Source, open_source
from stocha_hf.cuts import LEARNED
from stocha_hf.errors import StochaError
from stocha_hf.quantization import BITS, is_bits
from stocha_hf.spec import __version__

GGUF_DTYPE = "bfloat16"  # of a .gguf file, unless another is asked for
Changed = tuple[dict[str, Any], Callable[[Path], None] | None]  # config.json, and what overwrites copied tensors


@dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    `layers` is the number of converted feed-forward layers, `source` the id and revision of the original model,
    `stocha` the new entry of config.json, `files` the names in the folder `output`, `bits` those of quantized
    weights, or their mean.
    """

    layers: int
    output: str
    source: dict[str, str | None]
    stocha: dict[str, Any]
    files: list[str]
    bits: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as the command's --json prints them."""
        return asdict(self)


def convert(
    source: str | Path,
    output: str | Path,
    *,
    activation: str | None = None,
    p: float | None = None,
    positive: str | None = None,
    inference: str | None = None,
    threshold: float | list[float] | None = None,
    k: int | None = None,
    refit: str | None = None,
    target_sparsity: float | None = None,
    refit_tokens: int | None = None,
    refit_on_disk: bool = False,
    inputs: float | None = None,
    calibrate: str | Path | None = None,
    calibrate_tokens: int | None = None,
    inputs_of: Sequence[str] | None = None,
    inputs_allotment: str | None = None,
    inputs_prefill: bool = False,
    inputs_train: bool = False,
    inputs_fallback: float | None = None,
    inputs_fallback_tokens: int | None = None,
    bits: float | None = None,
    in_8_bits: Sequence[str] | None = None,
    rows: str | None = None,
    revision: str | None = None,
    base_model: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the stocha checkpoint of a model, as a folder that loads natively, with remote code and with this package.

    Args:
        source: Hub id, checkpoint folder or .gguf file (of a split one, any part); may be converted already.
        output: the folder to write, whole or not at all.
        activation: what runs in train() mode, a name in ACTIVATIONS (default: "stocha").
        p: StochA's probability of the base activation where the gate is negative (default: 0.3).
        positive: what runs where the gate is positive, one of POSITIVE_SIDES (default: "silu").
        inference: what runs in eval() mode (default: `activation` if that is deterministic, else the base).
        threshold: of fatrelu and shifted_relu, one number or one per layer (default: 0).
        k: neurons per token that topk keeps.
        refit: data to refit the FFNs on for ReLU, layer by layer, without training: a file, folder or Hub data set.
        target_sparsity: share of zeros to refit for, between 0 and 1 (default: what plain ReLU makes).
        refit_tokens: tokens to refit on (default: 98304, or 8 per neuron if that is more).
        refit_on_disk: keep the refit's streams on disk instead of in memory.
        inputs: share of the entries of projections' inputs to cut, by size (TEAL); 0 takes a source's cuts off.
        calibrate: text to measure thresholds of `inputs` on, and to quantize to 4 bits for: a file, folder or Hub data
            set.
        calibrate_tokens: tokens of it to use (default: 16384, or 2,097,152 where thresholds are learned).
        inputs_of: the projections to cut, names in PROJECTIONS (default: all, or attention's where the activation
            makes the FFN sparse).
        inputs_allotment: "uniform" cuts the share in each projection, "greedy" on average of a layer's weights, more
            where that changes the layer's output less, "output" on average of all layers, more where that changes the
            predictions less, "learned" by a threshold for each input of all layers, found by gradient and folded into
            the weights (default: "uniform").
        inputs_prefill: cut at every token in eval() mode, and not in decode steps alone.
        inputs_train: cut at every token in train() mode too.
        inputs_fallback: compute a decode step again without cuts where its most likely token has a lower probability
            than this, of the cuts of `inputs` or of the source; 0 takes that off a source.
        inputs_fallback_tokens: how many tokens such a step then computes, 1 to 8: its own and those before it, so that
            their keys and values are those without cuts (default: the source's, or 1).
        bits: quantize the weights to 8 or 4 bits; such a folder needs remote code or this package to be loaded. A
            number between them is a mean of bits a weight of the projections, with scales: 4 bits, and 8
            for each matrix that still fits, those first that lose most in 4.
        in_8_bits: names of the matrices that get 8 bits in any case where `bits` is less, in MATRICES (default:
            v_proj, embed_tokens and lm_head).
        rows: with bits, "outputs" lays out projections that cut their inputs a row an output, as both_layouts.py wants
            them, whatever share they cut (default: as steps with cuts read them fastest).
        revision: branch, tag or commit of a source on the Hub.
        base_model: Hub id of the model that a local source is a copy of.
        dtype: what weights become, one of "bfloat16", "float16" and "float32"; with `bits`, what has no codes, such as
            norms (default: what they are, and bfloat16 for a .gguf file).
        overwrite: replace `output` if it is a checkpoint folder.

    Returns:
        What was written.

    Raises:
        StochaError: for whatever cannot be converted, with nothing written.
    """
    output = local_path(output)
    fields = {"activation": activation, "p": p, "positive": positive, "inference": inference}
    changes = {key: value for key, value in (fields | {"threshold": threshold, "k": k}).items() if value is not None}
    of_cuts: dict[str, Any] = {"of": inputs_of, "allotment": inputs_allotment}
    of_cuts |= {"prefill": inputs_prefill, "train": inputs_train}
    in_4 = is_bits(bits) and bits != 8
    if inputs is not None or not in_4:
        of_cuts |= {"data": calibrate and str(calibrate), "tokens": calibrate_tokens}
    cuts = calibration_options(inputs, refit, of_cuts)
    options = refit_options(refit, refit_tokens, target_sparsity, refit_on_disk)
    if options is not None:
        changes = refit_activation(changes)
    check_fields(changes)
    fallback = FallbackOptions(inputs_fallback, inputs_fallback_tokens)
    fallback.check(inputs)
    check_bits(bits, in_8_bits, options, inputs_allotment)
    check_rows(rows, bits)
    if calibrate_tokens is not None and calibrate is None:
        raise StochaError(f"calibrate_tokens {calibrate_tokens} was given without calibrate: expected text")
    if base_model is not None:
        check_hub_id(base_model, "base_model")
    if dtype is not None and dtype not in DTYPES:
        raise StochaError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    check_output(output, overwrite)
    read = [local_path(name) for name in (source, refit, calibrate) if name is not None]
    check_apart(output, [path for path in read if path.exists()])
    check_data(refit, calibrate)
    with ExitStack() as stack:
        kind = "quantization" if bits is not None else "refit"
        work = stack.enter_context(refit_folder(output, kind)) if bits is not None or options is not None else None
        found = stack.enter_context(open_source(str(source), revision, dtype or GGUF_DTYPE, output))
        check_apart(output, (found.folder / name for name in found.files))
        if dtype is not None:
            refuse_quantized(found.config, found.id, f"dtype {dtype}")
        if cuts is not None and cuts.share and "stocha" not in found.config:  # the FFN stays as it is
            changes = {"activation": found.architecture.act} | changes
        config = _converted_config(found, base_model, changes)
        config, change = _cut(found, config if dtype is None else with_dtype(config, dtype), cuts)
        config = fallback.applied(config, found.id)
        if options is not None and work is not None:
            config, change = _refitted(found, config, options, work)
        elif bits is not None and work is not None:
            text = str(calibrate) if calibrate is not None and in_4 else None
            config, change = _quantized(found, config, bits, in_8_bits, rows, text, calibrate_tokens, dtype, work)
            found = replace(found, files=[name for name in found.files if not is_weight(name)])
        files = write_checkpoint(found, config, output, overwrite, change, dtype)
    stocha = config["stocha"]
    return Converted(config["num_hidden_layers"], str(output), stocha.get("source"), stocha, files, bits)


def check_data(*names: str | Path | None) -> None:
    """Open each data set that is named, before a source is downloaded. Raises StochaError."""
    for name in names:
        if name is not None:
            from stocha_hf.data import check_text  # which copying does not need

            check_text(name)


def _converted_config(source: Source, base_model: str | None, changes: dict[str, Any]) -> dict[str, Any]:
    """The source's config.json with hidden_act, auto_map and the stocha entry; every other key stays."""
    before = dict(source.config.get("stocha") or {})
    if "activation" in changes:
        before.pop("inference", None)  # follows the new activation unless it is asked for too
    origin = before.get("source")
    if origin is None and not began_random(before.get("history")):
        origin = {"id": source.id, "revision": source.revision}
    if base_model is not None:
        origin = {"revision": None, **(origin or {}), "id": base_model}
    entry = {**before, **changes, "source": origin, "stocha_version": __version__}
    return with_entry(source.config, checked_entry(entry, source.config, source.id))


def _cut(source: Source, config: dict[str, Any], cuts: Calibration | None) -> Changed:
    if cuts is None:
        return config, None
    if cuts.allotment != LEARNED:
        return with_cuts(source, config, cuts), None
    from stocha_hf.conversion.learned_cuts import learned_cuts  # needs torch, which copying does not

    learned = learned_cuts(source, config, cuts)
    return learned.config, learned.apply_to


def _refitted(source: Source, config: dict[str, Any], options: Refit, work: Path) -> Changed:
    from stocha_hf.conversion.refit import refit_checkpoint

    check_uncut(read_entry(config, source.id), source.id)
    fitted = refit_checkpoint(source, config, options, work)
    return fitted.config, fitted.apply_to


def _quantized(
    source: Source,
    config: dict[str, Any],
    bits: float,
    in_8_bits: Sequence[str] | None,
    rows: str | None,
    data: str | None,
    tokens: int | None,
    dtype: str | None,
    work: Path,
) -> Changed:
    from stocha_hf.conversion.quantize import Quantize, layout, quantize_checkpoint

    refuse_quantized(source.config, source.id, "quantizing")
    mean = bits if bits not in BITS else None
    options = Quantize(layout(bits, in_8_bits, config, rows), mean, data, tokens, dtype)
    quantized = quantize_checkpoint(source, config, options, work)
    return quantized.config, quantized.write_to
