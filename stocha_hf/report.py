"""The model card: README.md with Hub metadata, written at conversion, with measurements, and completed at publication.

The text is model_card.md beside this file; measured.py tells what was measured. A card still has REPO_ID and REVISION
where only the publication knows the values; `published_card` fills them in for the upload and leaves the folder's own
file, and a user's edits, alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Any

from stocha_hf.checkpoint import CARD, began_random, read_config
from stocha_hf.config import ARCHITECTURES, StochaConfig
from stocha_hf.errors import StochaError
from stocha_hf.measured import HASH_KEY, Measured, check_measurements

TEMPLATE = Path(__file__).with_name("model_card.md")
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
COPIED = "Converting leaves every weight, its name and its shape as they are."
REFITTED = (
    "The feed-forward weights were refitted layer by layer on {tokens:,} tokens of {data}, without training; every "
    "other weight, all names and all shapes are the source's."
)
TRAINED = (
    "The weights were trained after the conversion, as the recipe below says; their names and shapes are the source's."
)
FROM_SCRATCH = "No weight comes from another model: the recipe below began with random ones."
SWAPPED_LIMITS = (
    "The conversion itself trains nothing: a checkpoint whose activation was only swapped needs continued pretraining "
    "or a ReLU fine-tune before its outputs under the new activation are useful."
)
REFITTED_LIMITS = (
    "A refit comes near the source's quality on text like that it was fitted on, less so on other text; continued "
    "pretraining goes on from it."
)
LONG = ("held_out_errors",)  # of a stage in the history: config.json holds them
TRAINED_LIMITS = (
    "Training moves the model towards the text it was trained on; on other text it may be worse than the source."
)
SCRATCH_LIMITS = "The model has seen the text of the recipe below and nothing else."
_METADATA = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---", re.DOTALL)


def source_metadata(folder: Path) -> dict[str, Any]:
    """The Hub metadata of a source's own card, {} where it has none or it does not parse.

    Every scalar stays a string: to the Hub the language `no` is Norwegian, to a YAML 1.1 parser it is False.
    """
    import yaml

    try:
        block = _METADATA.match((folder / CARD).read_text(encoding="utf-8-sig"))
        metadata = yaml.load(block[1], Loader=yaml.BaseLoader) if block else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def model_card(config: dict[str, Any], inherited: dict[str, Any], measured: Measured | None = None) -> str:
    """The card of a checkpoint, given its config.json, the metadata of its source and what was measured of it."""
    from huggingface_hub import ModelCardData

    row = ARCHITECTURES[config["model_type"]]
    stocha = StochaConfig.from_dict(config["stocha"]).resolve(row.act)
    source = stocha.source or {}
    source_id, revision = source.get("id") or "", source.get("revision")
    on_hub = "/" in source_id
    kept = {key: inherited[key] for key in INHERITED if inherited.get(key)}
    metadata = ModelCardData(
        base_model=source_id if on_hub else None,
        library_name="transformers",
        tags=["stocha", "activation-sparsity", config["model_type"]],
        **{"pipeline_tag": "text-generation", **kept},
        **(measured.metadata() if measured else {}),
    )
    name = f"`{source_id}`" if source_id else "an unnamed model"
    linked = f"[{source_id}](https://huggingface.co/{source_id})" if on_hub else name
    commit = f"revision `{revision}`" if revision else "revision unknown: it was a local folder or file"
    made = {
        "title": f"Stochastic-activation checkpoint of {linked}",
        "made": f"Made from {linked} ({commit}) with stocha_hf {stocha.stocha_version}.",
        "changes": f"What changes is the activation of the feed-forward layers of {row.causal_lm}:",
    }
    if began_random(config["stocha"]):
        made = {
            "title": f"{row.causal_lm} trained from scratch with stochastic activations or ReLU",
            "made": f"Trained from random weights with stocha_hf {stocha.stocha_version}.",
            "changes": "The activation of its feed-forward layers:",
        }
    p = f" (p = {stocha.p}, positive side: {stocha.positive})" if stocha.activation in ("stocha", "mean") else ""
    native = stocha.native_act
    note = "the same numbers" if native == stocha.inference else f"with `{native}` in place of `{stocha.inference}`"
    weights, limits = _what_was_done(stocha.history or [])
    licence = kept.get("license_name") or kept.get("license")
    values = {
        "weights": weights,
        "measured": measured.section() + "\n\n" if measured else "",
        "recipe": _recipe(stocha.history or []),
        "limits": limits,
        "metadata": metadata.to_yaml(),
        **made,
        "architecture": row.causal_lm,
        "activation": stocha.activation + p,
        "inference": stocha.inference,
        "native": native,
        "native_note": note,
        "license": _licence(licence, began_random(config["stocha"])),
    }
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(values)


def _what_was_done(history: list[dict[str, Any]]) -> tuple[str, str]:
    """What a card says of the weights, and of their limits."""
    if began_random({"history": history}):
        return FROM_SCRATCH, SCRATCH_LIMITS
    weights, limits = _what_changed(history)
    return weights, f"{limits} What limits the source model limits this one too."


def _what_changed(history: list[dict[str, Any]]) -> tuple[str, str]:
    if any(stage.get("method") != "refit" for stage in history):
        return TRAINED, TRAINED_LIMITS
    return (REFITTED.format(**history[-1]), REFITTED_LIMITS) if history else (COPIED, SWAPPED_LIMITS)


def _licence(stated: str | None, from_scratch: bool) -> str:
    if from_scratch:
        return f"Licence: {stated or 'not stated'}"
    return f"Licence of the source: {stated or 'not stated by the source'}"


def _recipe(history: list[dict[str, Any]]) -> str:
    """What was done to the weights, stage by stage, as YAML; nothing where they are the source's."""
    import yaml

    if not history:
        return ""
    return f"## Recipe\n\n```yaml\n{yaml.safe_dump(_shortened(history), sort_keys=False)}```\n\n"


def _shortened(value: Any) -> Any:
    """Without what is too long for a card; the stages of averaged checkpoints lie within a stage."""
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items() if key not in LONG}
    return [_shortened(inner) for inner in value] if isinstance(value, list) else value


def stocha_config(folder: Path) -> dict[str, Any]:
    """config.json of a stocha checkpoint folder. Raises StochaError for another folder."""
    config = read_config(folder)
    if not isinstance(config.get("stocha"), dict):
        raise StochaError(f"{folder} is no stocha checkpoint: expected a folder that stocha-convert or training wrote")
    return config


def write_card(folder: Path, config: dict[str, Any], measured: Measured) -> Path:
    """Write a folder's card with its measurements; one that is there is kept beside it."""
    path = folder / CARD
    card = model_card(config, source_metadata(folder), measured)
    if path.exists():
        path.replace(folder / f"{CARD}.orig")
    path.write_text(card, encoding="utf-8")
    return path


def check_card(folder: Path) -> None:
    """Raise StochaError where a folder's card or measurements tell of other weights than it has."""
    found = source_metadata(folder).get(HASH_KEY)
    check_measurements(folder, None if found is None else str(found))


def published_card(folder: Path, repo: str, tag: str) -> str:
    """The folder's card, or a new one where there is none, with the repo and the revision that its snippets name."""
    path = folder / CARD
    card = path.read_text(encoding="utf-8") if path.is_file() else model_card(read_config(folder), {})
    return card.replace("REPO_ID", repo).replace("REVISION", tag)
