"""Loading a model for training or measuring, with this package's own classes: no code of the repo is run.

A converted checkpoint gets its stocha class; a native one is patched in memory, as if it had been converted. A folder
is checked whole before a weight is read, and a tensor that loading would fill with random numbers is an error.

    model = load_model("smollm2-sparse", dtype="auto").eval()
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from stocha_hf import modeling_stocha, quantization_stocha  # noqa: F401 - the latter registers with transformers
from stocha_hf.checkpoints import inspection
from stocha_hf.checkpoints.architecture import check_loaded
from stocha_hf.checkpoints.companions import CHAT_TEMPLATES, COMPANIONS
from stocha_hf.checkpoints.inspection import CONFIG
from stocha_hf.checkpoints.names import public_name
from stocha_hf.checkpoints.paths import is_path, local_path
from stocha_hf.cuts_stocha import cut_inputs, cut_projections
from stocha_hf.errors import StochaError
from stocha_hf.hub import hub_errors
from stocha_hf.modeling_stocha import StochaConfig, StochaMLP, stocha_mlps
from stocha_hf.patching import patch
from stocha_hf.spec import ARCHITECTURES


def load_model(name: str, *, revision: str | None = None, **kwargs: Any) -> Any:
    """Load a causal language model as its stocha class.

    Args:
        name: A Hub id or a folder, of a converted or a native model.
        revision: A branch, tag or commit of a Hub id.
        **kwargs: Go to from_pretrained: dtype, device_map, attn_implementation and so on.

    Returns:
        A StochaLlamaForCausalLM or a sibling, in eval mode. A native model is patched with StochaConfig(): it infers
        with its own activation.

    Raises:
        StochaError: The model cannot be found, is of no known architecture, or is not whole.
    """
    import transformers

    config = load_config(name, revision)
    row = ARCHITECTURES[config.model_type]
    converted = getattr(config, "stocha", None) is not None
    owner: Any = modeling_stocha if converted else transformers
    model_class = getattr(owner, f"Stocha{row.causal_lm}" if converted else row.causal_lm)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    with hub_errors("reading", name):
        model, info = model_class.from_pretrained(
            name, revision=revision, use_safetensors=True, output_loading_info=True, **kwargs
        )
    check_loaded(info, name)
    if not converted:
        source = {"id": public_name(name), "revision": getattr(config, "_commit_hash", None)}
        try:
            patch(model, StochaConfig(source=source))
        except ValueError as error:
            raise StochaError(str(error)) from error
    return model


def load_config(name: str, revision: str | None = None) -> Any:
    """Return the config of a Hub id or folder, as its native class. A folder is checked whole, weights included.

    Raises StochaError for a model that is not there, or cannot be loaded here.
    """
    from transformers import AutoConfig

    folder = _existing(name)
    if folder is not None:
        _check_folder(folder, name)
    with hub_errors("reading", name):
        if folder is None:
            _check_hub_config(name, revision)
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)


def _existing(name: str) -> Path | None:
    """The folder of this name, or None for what may be a Hub id. Raises StochaError for a path that is no folder."""
    path = local_path(name)
    if not path.exists() and not is_path(name):
        return None
    inspection.check_folder(name, "a checkpoint folder or a Hub id such as org/name")
    return path


def _check_folder(folder: Path, name: str) -> None:
    config = inspection.read_config(folder)
    _check_config(config, name)
    index = partial(inspection.read_json, folder / inspection.INDEX, "an index of shards")
    inspection.check_weights(folder, inspection.weight_files(inspection.list_files(folder), index, name), config)


def _check_hub_config(name: str, revision: str | None) -> None:
    """Read the config of a Hub id before transformers does, whose errors about it are tracebacks."""
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(name, inspection.CONFIG, revision=revision))
    _check_config(inspection.read_json(path, "a JSON object"), name)


def _check_config(config: dict[str, Any], name: str) -> None:
    inspection.check_config(config, name)
    code = config.get("auto_map")
    if not isinstance(code, dict | None):
        raise StochaError(
            f"config.json of {name} has auto_map {code!r}: expected a mapping; stocha-convert {name} OUT writes one"
        )


def tokenizer_folder(name: str, revision: str | None = None) -> Path:
    """Return a local folder with the tokenizer of a Hub id or folder. Raises StochaError where there is none."""
    if (folder := _existing(name)) is not None:
        return folder
    from huggingface_hub import snapshot_download

    with hub_errors("reading", name):
        wanted = [CONFIG, *COMPANIONS, CHAT_TEMPLATES]
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))


def patched_layers(model: Any) -> list[StochaMLP]:
    """Return the patched FFNs of a model in layer order. Raises StochaError where there are none."""
    layers = stocha_mlps(model)
    if not layers:
        raise StochaError(f"the {type(model).__name__} has no stochastic layers: call stocha_hf.patch on it first")
    return layers


def cutting_everywhere(model: Any) -> AbstractContextManager[Any]:
    """A context for reading whole windows of text, in which a model's input cuts apply at every token.

    Windows are prefill, which a model computes in full unless its config says otherwise: without this, figures would
    be those of the model without cuts. A model that cuts nothing is left alone.
    """
    return cut_inputs(model, "always") if cut_projections(model) else nullcontext()
