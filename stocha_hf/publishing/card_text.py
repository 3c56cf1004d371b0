"""The text of a model card: what a checkpoint's config.json, its source's metadata and its measurements say.

The text is model_card.md beside this file, with other_tools.md in it; tables.py tells what was measured. What comes
from a config, a source or a file of measurements is escaped by markdown.py. A card has REPO_ID and REVISION, whose
values only the publication knows.

    card_text(config, source_metadata(folder))
"""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from stocha_hf.checkpoints.entry import began_random, cuts_sentence, read_entry
from stocha_hf.checkpoints.metadata import INHERITED
from stocha_hf.checkpoints.quantized import read_quantization
from stocha_hf.cuts import LEARNED, LEARNED_INPUTS, InputCuts
from stocha_hf.errors import StochaError
from stocha_hf.publishing.markdown import code, fence, text
from stocha_hf.publishing.measurements import Measurements
from stocha_hf.publishing.tables import measured_metadata, measured_section
from stocha_hf.quantization import BITS, Quantization, is_bits
from stocha_hf.spec import ARCHITECTURES, StochaConfig

TEMPLATE, TOOLS = (Path(__file__).with_name(name) for name in ("model_card.md", "other_tools.md"))
COPIED = "Converting leaves every weight, its name and its shape as they are; only its dtype may differ."
REFITTED = (
    "The feed-forward weights were refitted layer by layer on {tokens} of {data}, without training; every other "
    "weight, all names and all shapes are the source's."
)
TRAINED = (
    "The weights were trained after the conversion, as the recipe below says; their names and shapes are the source's."
)
SCALED = (
    "Weights of projections and norms were scaled. Without cuts the model computes what the source does, up to "
    "rounding; names and shapes are the source's."
)
WITH_THRESHOLDS = (
    " Thresholds for each input were learned on {data}; scales in the weights let one per projection do the same."
)
SCALED_AFTER = "{weights} Weights of projections and norms were scaled for thresholds that were learned on {data}."
FROM_SCRATCH = "No weight comes from another model: the recipe below began with random ones."
SCRATCH_LIMITS = "The model has seen the text of its recipe and nothing else."
SWAPPED_LIMITS = (
    "The conversion itself trains nothing: a checkpoint whose activation was only swapped needs continued pretraining "
    "or a ReLU fine-tune before its outputs under the new activation are useful."
)
REFITTED_LIMITS = (
    "A refit comes near the source's quality on text like that it was fitted on, less so on other text; continued "
    "pretraining goes on from it."
)
TRAINED_LIMITS = (
    "Training moves the model towards the text it was trained on; on other text it may be worse than the source."
)
ROUNDED = "The weights are the source's, its matrices rounded in groups of 32: {bits}."
ROUNDED_AFTER = "{weights} At last its matrices were rounded in groups of 32, under names of their own: {bits}."
NATIVE_USE = "2. without `trust_remote_code`: the native {architecture}, {note};"
QUANTIZED_USE = (
    "2. without `trust_remote_code` not at all: the weights are quantized, and `quantization_stocha.py` reads them;"
)
WITH_FACTORS = (
    " Beside them each layer has up to four vectors: factors of input thresholds that a token has of its own."
)
DENSE_ELSEWHERE = """## Other tools

llama.cpp, MLX-LM, vLLM and the native class of transformers run this model **without the cuts**: dense, with these
weights and the source's activation.

"""
NOT_ELSEWHERE = """## Other tools

The native class of transformers runs this model **without the cuts**: dense, with these weights and the source's
activation. What it saves lacks the vectors of tokens' own factors, and stocha-convert refuses that. llama.cpp's
converter, MLX-LM and vLLM stop at these vectors: `stocha-convert FOLDER OUT --inputs 0` leaves them and the cuts out,
and what it writes all of these run, dense.

"""
CUT_LIMITS = (
    "Cuts change what the model predicts, and a text that it writes with them drifts from what it would write "
    "without: test the task that you need. Nothing says that a step with cuts is faster: that depends on the machine."
)
DRAFTING = """With stocha_hf the cuts can draft, and the model verifies without them. It then writes, in greedy
decoding, what it writes without cuts:

```python
from stocha_hf import lossless

model.generate(**inputs, custom_generate=lossless, do_sample=False, max_new_tokens=32)
```

"""
LONG = ("held_out_errors",)  # of a stage in the history: config.json holds them


def card_text(config: dict[str, Any], inherited: dict[str, Any], measured: Measurements | None = None) -> str:
    """Return the card of a checkpoint, given its config.json, its source's metadata and what was measured of it.

    Raises StochaError for a config that is not a stocha checkpoint's.
    """
    row = ARCHITECTURES.get(str(config.get("model_type")))
    if row is None:
        raise StochaError(f"the config has model_type {config.get('model_type')!r}: expected a stocha checkpoint's")
    stocha = read_entry(config, "the config")
    kept = {key: value for key in INHERITED if (value := _plain(inherited.get(key)))}
    p = f" (p = {stocha.p}, positive side: {stocha.positive})" if stocha.activation in ("stocha", "mean") else ""
    native = stocha.native_act
    same = "nothing is cut" if stocha.inputs else "the same numbers"
    note = same if native == stocha.inference else f"with `{native}` in place of `{stocha.inference}`"
    history = stocha.history or []
    before = [stage for stage in history if stage.get("method") != "quantize"]
    weights, limits = _what_was_done(before, stocha.inputs)
    native_use = NATIVE_USE.format(architecture=row.causal_lm, note=note)
    if quantization := read_quantization(config, "the config"):
        rounded = ROUNDED_AFTER if before else ROUNDED
        weights, native_use = rounded.format(weights=weights, bits=_bits(quantization, history)), QUANTIZED_USE
    values = {
        "weights": weights,
        "measured": measured_section(measured) + "\n\n" if measured else "",
        "recipe": _recipe(history),
        "limits": limits,
        "metadata": _metadata(config["model_type"], _source_id(stocha), kept, measured),
        **_origin(stocha, row.causal_lm, text(kept.get("license_name") or kept.get("license") or "not stated")),
        "activation": stocha.activation + p,
        "inference": stocha.inference,
        "cuts": f"In the custom class, {cuts_sentence(stocha.inputs, not quantization)}.\n\n" if stocha.inputs else "",
        "native": "not possible: the weights are quantized" if quantization else native,
        "native_use": native_use,
        "drafting": DRAFTING if stocha.inputs else "",
        "tools": "" if quantization else _other_tools(stocha, str(stocha.base)),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _metadata(model_type: str, source: str, kept: dict[str, Any], measured: Measurements | None) -> str:
    """The card's front matter, as YAML."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        base_model=source if "/" in source else None,
        library_name="transformers",
        tags=["stocha", "activation-sparsity", model_type],
        **{"pipeline_tag": "text-generation", **kept},
        **(measured_metadata(measured) if measured else {}),
    ).to_yaml()


def _origin(stocha: StochaConfig, architecture: str, licence: str) -> dict[str, str]:
    """What a card says of where the checkpoint comes from."""
    version = text(stocha.stocha_version)
    if began_random(stocha.history or []):
        return {
            "title": f"{architecture} trained from scratch with stochastic activations or ReLU",
            "made": f"Trained from random weights with stocha_hf {version}.",
            "changes": "The activation of its feed-forward layers:",
            "license": f"Licence: {licence}",
        }
    source, revision = _source_id(stocha), (stocha.source or {}).get("revision")
    linked = f"[{source}](https://huggingface.co/{source})" if "/" in source else code(source) or "an unnamed model"
    commit = f"revision {code(revision)}" if revision else "revision unknown: it was a local folder or file"
    only_cut = stocha.inputs and stocha.activation == stocha.inference == stocha.base
    changed = f"{'input of projections, not the ' if only_cut else ''}activation of the feed-forward layers"
    return {
        "title": f"Stochastic-activation checkpoint of {linked}",
        "made": f"Made from {linked} ({commit}) with stocha_hf {version}.",
        "changes": f"What changes is the {changed} of {architecture}:",
        "license": f"Licence of the source: {licence}",
    }


def _source_id(stocha: StochaConfig) -> str:
    """The Hub id, or the name, of the source; empty where it is not known."""
    return str((stocha.source or {}).get("id") or "")


def _plain(value: Any) -> Any:
    """A source's metadata as far as a card takes it over: a line of text, or a list of a few such lines."""
    if isinstance(value, list):
        return [item for item in value if _plain(item) and isinstance(item, str)][:100]
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 500 else None


def _bits(quantization: Quantization, history: list[dict[str, Any]]) -> str:
    """To how many bits which matrices were rounded."""
    if quantization.bits == 8 or not quantization.in_8_bits:
        return f"all to {quantization.bits} bits"
    names = [code(name) for name in quantization.in_8_bits if not name.startswith("layers.")]
    if more := len(quantization.in_8_bits) - len(names):
        names.append(f"{more} {'matrix' if more == 1 else 'matrices'} of single layers")
    said = f"{', '.join(names)} to 8 bits, all others to {quantization.bits}"
    mean = next((stage.get("bits") for stage in reversed(history) if stage.get("method") == "quantize"), None)
    is_mean = is_bits(mean) and mean not in BITS
    return f"{said}; at most {mean:g} bits a weight of the projections" if is_mean else said


def _what_was_done(history: list[dict[str, Any]], cuts: InputCuts | None) -> tuple[str, str]:
    """What a card says of the weights, and of their limits."""
    if began_random(history):
        return FROM_SCRATCH, SCRATCH_LIMITS
    weights, limits = _what_changed(history, cuts)
    if cuts:
        limits = CUT_LIMITS if limits == SWAPPED_LIMITS else f"{limits} {CUT_LIMITS}"
        weights += WITH_FACTORS if cuts.token_factors else ""
    return weights, f"{limits} What limits the source model limits this one too."


def _what_changed(history: list[dict[str, Any]], cuts: InputCuts | None) -> tuple[str, str]:
    others = [stage for stage in history if stage.get("method") != LEARNED_INPUTS]
    if len(others) < len(history):
        data = text(next(stage.get("data", "a text") for stage in history if stage.get("method") == LEARNED_INPUTS))
        weights, limits = _what_changed(others, cuts)
        told = SCALED + (WITH_THRESHOLDS if cuts and (cuts.calibration or {}).get("allotment") == LEARNED else "")
        return (SCALED_AFTER if others else told).format(weights=weights, data=data), limits
    if any(stage.get("method") != "refit" for stage in history):
        return TRAINED, TRAINED_LIMITS
    if not history:
        return COPIED, SWAPPED_LIMITS
    tokens = history[-1].get("tokens")
    said = f"{tokens:,} tokens" if isinstance(tokens, int) else "tokens"
    return REFITTED.format(tokens=said, data=text(history[-1].get("data", "a text"))), REFITTED_LIMITS


def _other_tools(stocha: StochaConfig, base: str) -> str:
    """Which tools run a checkpoint as something else; nothing where it infers as its source does."""
    if stocha.common:
        if stocha.inputs is None:
            return ""
        return NOT_ELSEWHERE if stocha.inputs.token_factors else DENSE_ELSEWHERE
    told = {
        "act": code(str(stocha.inference)) + (" and cut the inputs of projections" if stocha.inputs else ""),
        "base": code(base),
        "vllm": "it **without the cuts**" if stocha.inputs else "it as it is",
    }
    return Template(TOOLS.read_text(encoding="utf-8")).substitute(told)


def _recipe(history: list[dict[str, Any]]) -> str:
    """What was done to the weights, stage by stage, as YAML; nothing where they are the source's."""
    import yaml

    if not history:
        return ""
    return f"## Recipe\n\n{fence(yaml.safe_dump(_shortened(history), sort_keys=False), 'yaml')}\n\n"


def _shortened(value: Any) -> Any:
    """Without what is too long for a card; the stages of averaged checkpoints lie within a stage."""
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items() if key not in LONG}
    return [_shortened(inner) for inner in value] if isinstance(value, list) else value
