"""Conversion: a source checkpoint becomes a stocha checkpoint; no tensor is decoded.

Patching changes the activation and not one weight, so the shards are copied byte for byte (copy-on-write where the
file system can) and only config.json, the modeling file and the card are written. Hence the time of `cp`, and memory
independent of the model's size. Converting a converted checkpoint changes only what is asked for. Input cuts
(input_cuts.py) and refits (refit.py) run text through the model first; a refit, and cuts whose thresholds are learned,
then write other weights.

With `bits` the weights are quantized on the way (quantize.py).

    stocha-convert org/model model-stocha --p 0.3
    stocha_hf.convert("org/model", "model-stocha", p=0.3).stocha["inference"]   # "silu"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.companions import TOKENIZER_CONFIG, dump
from stocha_hf.checkpoints.entry import began_random, checked_entry, read_entry, with_entry
from stocha_hf.checkpoints.inspection import CONFIG, is_weight
from stocha_hf.checkpoints.modeling_file import code_files
from stocha_hf.checkpoints.names import check_hub_id
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.checkpoints.quantized import refuse_quantized
from stocha_hf.checkpoints.staging import check_apart, check_place, copy_file, staged_folder
from stocha_hf.conversion.input_cuts import Calibration, FallbackOptions, check_uncut, with_cuts
from stocha_hf.conversion.refit_work import Refit, refit_folder
from stocha_hf.conversion.source import Source, open_source
from stocha_hf.errors import StochaError
from stocha_hf.publishing import card
from stocha_hf.quantization import BITS, MATRICES, is_bits
from stocha_hf.spec import LEARNED, StochaConfig, __version__

DTYPES = ("bfloat16", "float16", "float32")


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
    revision: str | None = None,
    base_model: str | None = None,
    dtype: str = "bfloat16",
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
        revision: branch, tag or commit of a source on the Hub.
        base_model: Hub id of the model that a local source is a copy of.
        dtype: what a .gguf file's tensors become, one of DTYPES.
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
    cuts = _calibration(inputs, refit, of_cuts)
    options = None
    if refit is not None:
        options, changes = Refit(refit, refit_tokens, target_sparsity, refit_on_disk), _refit_activation(changes)
    elif target_sparsity is not None or refit_tokens is not None or refit_on_disk:
        raise StochaError(
            "target_sparsity, refit_tokens or refit_on_disk was given without refit: expected the data to refit on"
        )
    _check_fields(changes)
    fallback = FallbackOptions(inputs_fallback, inputs_fallback_tokens)
    fallback.check(inputs)
    if bits is not None and not is_bits(bits):
        raise StochaError(f"bits is {bits!r}: expected 4 or 8, or a mean of bits between them")
    if bits is not None and options is not None:
        raise StochaError("bits was given with refit: expected one of them; refit first, then quantize the result")
    if bits is not None and inputs_allotment == LEARNED:
        raise StochaError(
            f"bits {bits} was given with inputs_allotment {LEARNED}: expected one of them; cut first, then quantize "
            "the result"
        )
    if in_8_bits is not None and (not in_4 or not set(in_8_bits) <= set(MATRICES)):
        raise StochaError(
            f"in_8_bits {' '.join(in_8_bits)} was given with bits {bits}: expected bits below 8, and names among "
            f"{', '.join(MATRICES)}"
        )
    if calibrate_tokens is not None and calibrate is None:
        raise StochaError(f"calibrate_tokens {calibrate_tokens} was given without calibrate: expected text")
    if base_model is not None:
        check_hub_id(base_model, "base_model")
    if dtype not in DTYPES:
        raise StochaError(f"dtype is {dtype!r}: expected one of {', '.join(DTYPES)}")
    check_output(output, overwrite)
    read = [local_path(name) for name in (source, refit, calibrate) if name is not None]
    check_apart(output, [path for path in read if path.exists()])
    check_data(refit, calibrate)
    with ExitStack() as stack:
        kind = "quantization" if bits is not None else "refit"
        work = stack.enter_context(refit_folder(output, kind)) if bits is not None or options is not None else None
        found = stack.enter_context(open_source(str(source), revision, dtype, output))
        check_apart(output, (found.folder / name for name in found.files))
        if cuts is not None and cuts.share and "stocha" not in found.config:  # the FFN stays as it is
            changes = {"activation": found.architecture.act} | changes
        config, change = _converted_config(found, base_model, changes), None
        if cuts is not None and cuts.allotment == LEARNED:
            from stocha_hf.conversion.learned_cuts import learned_cuts  # needs torch, as a refit does

            learned = learned_cuts(found, config, cuts)
            config, change = learned.config, learned.apply_to
        elif cuts is not None:
            config = with_cuts(found, config, cuts)
        config = fallback.applied(config, found.id)
        if options is not None and work is not None:
            from stocha_hf.conversion.refit import refit_checkpoint  # needs torch, which copying does not

            check_uncut(read_entry(config, found.id), found.id)
            fitted = refit_checkpoint(found, config, options, work)
            config, change = fitted.config, fitted.apply_to
        elif bits is not None and work is not None:
            from stocha_hf.conversion.quantize import Quantize, layout, quantize_checkpoint

            refuse_quantized(found.config, found.id, "quantizing")
            text = str(calibrate) if calibrate is not None and in_4 else None
            mean = bits if bits not in BITS else None
            quantized = quantize_checkpoint(
                found, config, Quantize(layout(bits, in_8_bits, config), mean, text, calibrate_tokens), work
            )
            config, change = quantized.config, quantized.write_to
            found = replace(found, files=[name for name in found.files if not is_weight(name)])
        files = write_checkpoint(found, config, output, overwrite, change)
    stocha = config["stocha"]
    return Converted(config["num_hidden_layers"], str(output), stocha.get("source"), stocha, files, bits)


def _calibration(inputs: float | None, refit: str | None, given: dict[str, Any]) -> Calibration | None:
    """The options of input cuts, or None where none are asked for."""
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


def _check_fields(changes: dict[str, Any]) -> None:
    try:
        StochaConfig.from_dict(changes)
    except ValueError as error:
        raise StochaError(str(error)) from error


def _refit_activation(changes: dict[str, Any]) -> dict[str, Any]:
    changes = {"activation": "relu"} | changes
    if changes.keys() - {"activation"} or changes["activation"] != "relu":
        given = ", ".join(f"{key} {value}" for key, value in changes.items())
        raise StochaError(
            f"refit was given with {given}: expected activation relu and no other field, since the refit chooses the "
            "thresholds; convert the result again for another training activation"
        )
    return changes


def check_data(*names: str | Path | None) -> None:
    """Open each data set that is named, before a source is downloaded. Raises StochaError."""
    for name in names:
        if name is not None:
            from stocha_hf.data import check_text  # which copying does not need

            check_text(name)


def check_output(output: Path, overwrite: bool) -> None:
    """Raise StochaError where `output` cannot be written, or exists and is not to be replaced."""
    if not output.exists() and not output.is_symlink():
        check_place(output)
        return
    if not overwrite:
        raise StochaError(f"{output} exists: expected a new folder; choose another one or pass --overwrite")
    if not output.is_dir() or output.is_symlink() or (any(output.iterdir()) and not (output / CONFIG).is_file()):
        raise StochaError(f"{output} is not a checkpoint folder: expected one to overwrite; choose another output")


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


def write_checkpoint(
    source: Source, config: dict[str, Any], output: Path, overwrite: bool, change: Callable[[Path], None] | None = None
) -> list[str]:
    """Write the source's files with this config to `output`, whole or not at all; returns the names of its files.

    `change` may overwrite the copied tensors in the folder that it is given.
    """
    with staged_folder(output, replace=overwrite) as folder:
        copy_files(source, folder)
        if change is not None:
            change(folder)
        for file in code_files(config):
            copy_file(file, folder / file.name)
        (folder / CONFIG).write_text(dump(config), encoding="utf-8")
        card.write_card(folder, config=config, metadata=source.metadata)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def copy_files(source: Source, folder: Path) -> None:
    """Copy weights and companions, and the tokenizer's settings without code."""
    from stocha_hf.progress import Progress

    sizes = {name: (source.folder / name).stat().st_size for name in source.files}
    with Progress(total=sum(sizes.values()), unit="B", unit_scale=True, desc="Copying") as bar:
        for name in source.files:
            copy_file(source.folder / name, folder / name, bar.update)
    if source.tokenizer is not None:
        (folder / TOKENIZER_CONFIG).write_text(dump(source.tokenizer), encoding="utf-8")
