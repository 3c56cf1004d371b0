"""Loading a model for training or measuring, with this package's own classes: no code of the repo is run.

A converted checkpoint gets its stocha class; a native one is patched in memory, as if it had been converted.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from stocha_hf import modeling_stocha
from stocha_hf.checkpoints import inspection
from stocha_hf.checkpoints.metadata import public_name
from stocha_hf.errors import StochaError
from stocha_hf.hub import hub_errors
from stocha_hf.modeling_stocha import ARCHITECTURES, StochaConfig, StochaMLP, patch, stocha_mlps


def load_model(name: str, *, revision: str | None = None, **kwargs: Any) -> Any:
    """The CausalLM of a Hub id or folder as its stocha class; `kwargs` go to from_pretrained (dtype, ...).

    Raises StochaError for a model that cannot be found or of no known architecture.
    """
    import transformers

    config = load_config(name, revision)
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        raise StochaError(f"{name} has model_type {config.model_type!r}: expected one of {', '.join(ARCHITECTURES)}")
    converted = getattr(config, "stocha", None) is not None
    owner: Any = modeling_stocha if converted else transformers
    model_class = getattr(owner, f"Stocha{row.causal_lm}" if converted else row.causal_lm)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    with hub_errors("reading", name):
        model = model_class.from_pretrained(name, revision=revision, **kwargs)
    if not converted:
        source = {"id": public_name(name), "revision": getattr(config, "_commit_hash", None)}
        try:
            patch(model, StochaConfig(source=source))
        except ValueError as error:
            raise StochaError(str(error)) from None
    return model


def load_config(name: str, revision: str | None = None) -> Any:
    """The config of a Hub id or folder, as its native class. A folder is checked whole before its weights are read."""
    from transformers import AutoConfig

    _check_local(name)
    with hub_errors("reading", name):
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def _check_local(name: str) -> None:
    """Raise StochaError for a path that is no whole checkpoint folder; a Hub id is checked when it is fetched."""
    folder = inspection.user_path(name)
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise StochaError(f"{name} does not exist: expected a checkpoint folder or a Hub id such as org/name")
    if folder.exists():
        config = inspection.read_config(folder)
        inspection.check_config(config, name)
        index = partial(inspection.read_json, folder / inspection.INDEX, "an index of shards")
        inspection.check_weights(folder, inspection.weight_files(inspection.list_files(folder), index, name), config)


def tokenizer_folder(name: str, revision: str | None = None) -> Path:
    """A local folder with the tokenizer of a Hub id or folder. Raises StochaError where there is none."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    with hub_errors("reading", name):
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=["*token*", "*.json", "*.model", "*.txt"])
        )


def patched_layers(model: Any) -> list[StochaMLP]:
    layers = stocha_mlps(model)
    if not layers:
        raise StochaError(f"the {type(model).__name__} has no stochastic layers: call stocha_hf.patch on it first")
    return layers
