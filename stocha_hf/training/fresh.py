"""Models that begin with random weights: a config in the recipe's YAML, `model_config`, in place of a source model.

    model_config: {model_type: llama, hidden_size: 512, intermediate_size: 1536, num_hidden_layers: 8, ...}
    tokenizer_name_or_path: my-tokenizer

Its keys are those of a config.json of the native class. The vocabulary and the special tokens come from the tokenizer,
and the weights from `seed` and the class's own initialisation. What comes back is patched like any model that
load_model returns, so schedules, checkpoints and commands take it as they take others; config.json's history says that
the first stage began with random weights, and the card says so too.
"""

from __future__ import annotations

from typing import Any

from stocha_hf.errors import StochaError
from stocha_hf.spec import ARCHITECTURES

OLDER_KEYS = {"rope_theta", "rope_scaling", "torch_dtype"}  # of config.json files that transformers still reads
FROM_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_start(name: str | None, model_config: Any, tokenizer: str | None, use_peft: bool) -> None:
    """Raise StochaError unless training has one thing to begin with: a model, or a config with a tokenizer."""
    if name is None and model_config is None:
        raise StochaError(
            "model_name_or_path is missing: expected it in the YAML file or as --model_name_or_path; for random "
            "weights model_config and tokenizer_name_or_path"
        )
    if name is not None and (model_config is not None or tokenizer is not None):
        raise StochaError(
            f"model_name_or_path is {name} beside model_config or tokenizer_name_or_path: expected the first, or the "
            "two others for random weights"
        )
    if name is None and tokenizer is None:
        raise StochaError("model_config has no tokenizer: expected tokenizer_name_or_path, a folder or a Hub id")
    if name is None and use_peft:
        raise StochaError("use_peft is true with model_config: expected a pretrained model for an adapter")


def fresh_model(given: str | dict[str, Any], tokenizer: Any, *, seed: int, **options: Any) -> Any:
    """A patched model with random weights; `given` is the config as a mapping, or as YAML or JSON text.

    `options` are dtype and attn_implementation. An entry `stocha` in the config is that of config.json. Raises
    StochaError for a config that is none, or whose vocabulary is not the tokenizer's.
    """
    import torch
    import transformers

    from stocha_hf.modeling_stocha import StochaConfig
    from stocha_hf.patching import patch

    entries = _checked(given)
    stocha = entries.pop("stocha", {})
    config = transformers.AutoConfig.for_model(**entries)
    # transformers keeps any key; what its class does not know is misspelt
    if unknown := sorted(set(entries) - set(type(config)().to_dict()) - OLDER_KEYS):
        raise StochaError(
            f"model_config has the key {unknown[0]!r}: expected keys of a {config.model_type} config.json"
        )
    for key, value in _of_tokenizer(tokenizer).items():
        if entries.get(key, value) != value:
            raise StochaError(
                f"model_config has {key} {entries[key]} and the tokenizer {value}: leave it out, it is the tokenizer's"
            )
        setattr(config, key, value)
    dtype = options.pop("dtype", None)
    options["dtype"] = torch.float32 if dtype in (None, "auto") else getattr(torch, str(dtype), dtype)
    torch.manual_seed(seed)
    try:
        model = getattr(transformers, ARCHITECTURES[config.model_type].causal_lm)._from_config(config, **options)
        patch(model, StochaConfig.from_dict(stocha))
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise StochaError(f"model_config makes no model: {str(error).splitlines()[0]}") from None
    return model


def _checked(given: str | dict[str, Any]) -> dict[str, Any]:
    import yaml

    try:
        entries = yaml.safe_load(given) if isinstance(given, str) else given
    except yaml.YAMLError:
        entries = None
    if not isinstance(entries, dict):
        raise StochaError(f"model_config is {given!r}: expected the keys of a config.json")
    row = ARCHITECTURES.get(str(entries.get("model_type")))
    if row is None:
        known = ", ".join(ARCHITECTURES)
        raise StochaError(f"model_config has model_type {entries.get('model_type')!r}: expected one of {known}")
    if (act := entries.get(row.act_key, row.act)) != row.act:
        raise StochaError(
            f"model_config has {row.act_key} {act!r}: expected {row.act!r}, or nothing; the schedule says what it runs"
        )
    return dict(entries)


def _of_tokenizer(tokenizer: Any) -> dict[str, Any]:
    ids = {key: getattr(tokenizer, key) for key in FROM_TOKENIZER}
    return {"vocab_size": len(tokenizer), **ids}
