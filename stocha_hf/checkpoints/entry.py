"""The `stocha` entry of a config, and the keys that follow from it: read and written here and nowhere else.

The entry says what a checkpoint trains and infers with, where it came from and what was done to it. The native class
reads `hidden_act` (Gemma's `hidden_activation`), the Auto classes read `auto_map`, MLX-LM reads `model_file` and other
tools `architectures`, so they change together.

    config = with_entry(config, stocha)   # a config.json as a dict
    set_entry(model.config, stocha)       # a transformers config
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stocha_hf.checkpoints.names import check_label, check_origin
from stocha_hf.cuts import InputCuts
from stocha_hf.errors import StochaError
from stocha_hf.quantization import QUANTIZATION_FILE
from stocha_hf.spec import ARCHITECTURES, MLX_FILE, StochaConfig, class_names

SIZES = ("num_hidden_layers", "intermediate_size")
MOST_LAYERS = 10_000
RANDOM_START = "random weights"  # `start` of the first stage of a history that began without a source
ACT_KEYS = ("hidden_act", "hidden_activation")  # Gemma's configs on the Hub hold both, and its class reads one


def read_entry(config: Mapping[str, Any], where: str) -> StochaConfig:
    """The entry of a config of a known model_type, with nothing left open.

    Raises StochaError where there is none, or one that this model cannot have.
    """
    entry = config.get("stocha")
    if not isinstance(entry, dict):
        raise StochaError(f"{where} is not a stocha checkpoint: expected one that stocha-convert or training wrote")
    return checked_entry(entry, config, where)


def checked_entry(entry: dict[str, Any], config: Mapping[str, Any], where: str) -> StochaConfig:
    """An entry for a config as a StochaConfig, with nothing left open. Raises StochaError as `read_entry` does."""
    row, layers, width = ARCHITECTURES[str(config["model_type"])], *map(config.get, SIZES)
    try:
        stocha = StochaConfig.from_dict(entry).resolve(row.act)
        if isinstance(layers, int) and layers <= MOST_LAYERS:  # what is no count of layers is refused with the tensors
            stocha.thresholds(layers, width if isinstance(width, int) else None)
    except ValueError as error:
        raise StochaError(f"the stocha entry of {where} is wrong: {error}") from error
    check_origin(stocha.source, where)
    check_label(stocha.stocha_version, f"stocha.stocha_version of {where}")
    return stocha


def entry_keys(model_type: str, present: Mapping[str, Any], stocha: StochaConfig) -> dict[str, Any]:
    """What a config of this model_type holds for a resolved StochaConfig; `present` are the keys that it has.

    A key whose value is None is to be left out.
    """
    row = ARCHITECTURES[model_type]
    acts = dict.fromkeys(sorted({row.act_key} | {key for key in ACT_KEYS if key in present}), stocha.native_act)
    return acts | code_keys(model_type, present, stocha) | {"stocha": stocha.to_dict()}


def code_keys(model_type: str, present: Mapping[str, Any], stocha: StochaConfig) -> dict[str, Any]:
    """The keys of a config that name code, or a class: what they say, or None where they are to be left out."""
    common = stocha.common and not present.get("quantization_config")
    names = present.get("architectures") or [ARCHITECTURES[model_type].causal_lm]
    return {
        "architectures": class_names(names, common),
        "auto_map": auto_map(model_type, present, stocha),
        "model_file": None if common else MLX_FILE.name,
    }


def auto_map(model_type: str, config: Mapping[str, Any], stocha: StochaConfig) -> dict[str, str]:
    """The `auto_map` of a config: it names the last of the code files, each of which hands on the first's classes."""
    quantized = bool(config.get("quantization_config"))
    return ARCHITECTURES[model_type].auto_map(QUANTIZATION_FILE.stem if quantized else stocha.module)


def with_entry(config: Mapping[str, Any], stocha: StochaConfig) -> dict[str, Any]:
    """A config.json, as a dict, with this entry; every other key stays. `stocha` is resolved."""
    return with_keys(config, entry_keys(str(config["model_type"]), config, stocha))


def with_keys(config: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with these keys in it, and without those that are None."""
    return {key: value for key, value in (dict(config) | dict(keys)).items() if value is not None or key not in keys}


def set_entry(config: Any, stocha: StochaConfig) -> None:
    """Give a transformers config this entry, in place. `stocha` is resolved."""
    for key, value in entry_keys(config.model_type, vars(config), stocha).items():
        if value is not None:
            setattr(config, key, value)
        elif key in vars(config):
            delattr(config, key)


def began_random(history: list[dict[str, Any]] | None) -> bool:
    """Whether a history began with random weights, so that the checkpoint has no source."""
    return history is not None and bool(history) and history[0].get("start") == RANDOM_START


def with_stage(stocha: StochaConfig, stage: Mapping[str, Any]) -> StochaConfig:
    """This config with one more stage of its history; what a stage leaves as None is not recorded."""
    kept = {key: value for key, value in stage.items() if value is not None}
    return replace(stocha, history=[*(stocha.history or []), kept])


def cuts_sentence(cuts: InputCuts, loads_natively: bool = True) -> str:
    """Say what input cuts do, in a sentence without its full stop; and what the native class does, if it can load."""
    share = f"{cuts.share:.0%} of the inputs" if cuts.share else "small inputs"
    where = "at every token" if cuts.prefill else "in decode steps of one token"
    if cuts.fallback:
        where += f", and a step whose most likely token has a probability below {cuts.fallback:g} is computed again "
        where += "without cuts"
        if (cuts.fallback_tokens or 1) > 1:
            where += f", with the tokens before it, {cuts.fallback_tokens} in all"
    said = f"{share} of {', '.join(cuts.thresholds)} are cut {where}"
    if loads_natively:
        said += "; the native class cuts nothing: it runs the model as it would be without thresholds"
    return said
