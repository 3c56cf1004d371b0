"""Refitting a model in memory: the same fit, layer by layer, as from folder to folder (refit.py), in place.

model = AutoModelForCausalLM.from_pretrained("org/model", dtype="bfloat16")
stocha_hf.refit(model, "text.parquet", tokenizer, target_sparsity=0.8)
model.generate(**inputs)          # sparse
model.save_pretrained("sparse")
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stocha_hf.checkpoints.entry import read_entry
from stocha_hf.checkpoints.quantized import refuse_quantized
from stocha_hf.checkpoints.tensors import ModelTensors
from stocha_hf.conversion.input_cuts import check_uncut
from stocha_hf.conversion.layerwise import Layers
from stocha_hf.conversion.refit import (
    WINDOW,
    check_original,
    refit_layers,
    refitted_entry,
    wanted_tokens,
    whole_batches,
)
from stocha_hf.conversion.refit_ffn import Fitted
from stocha_hf.conversion.refit_work import Refit
from stocha_hf.data import calibration_windows
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import stocha_mlps
from stocha_hf.patching import patch, unpatch
from stocha_hf.spec import ARCHITECTURES, StochaConfig


def refit(
    model: nn.Module,
    data: str | Path | torch.Tensor,
    tokenizer: Any = None,
    *,
    tokens: int | None = None,
    target_sparsity: float | None = None,
    seed: int = 0,
) -> nn.Module:
    """Refit a loaded model's FFNs for ReLU, in place, layer by layer and without training.

    Beside the model it takes the memory of the new FFNs and of one layer in float32, and 16 bytes x tokens x
    hidden_size for the streams.

    Args:
        model: a native CausalLM of a known architecture, or one that was patched and still infers with its base
            activation; of any float dtype, on one device.
        data: a file, folder or Hub data set of text, or token ids, int64 [windows, length].
        tokenizer: of the model; needed where `data` is text.
        tokens: how many tokens of the text to use (default: 98304, or 8 per neuron if that is more).
        target_sparsity: the wanted share of zeros in the hidden vectors, between 0 and 1 (default: what plain ReLU
            makes).
        seed: the same seed gives the same weights.

    Returns:
        The model, now its stocha class, with refitted gate_proj, up_proj and down_proj. It infers with relu, or with
        fatrelu and one threshold per layer where `target_sparsity` asks for more zeros.

    Raises:
        StochaError: for a model that cannot be refitted, and too little text; the model is then as it was.
    """
    is_text = not isinstance(data, torch.Tensor)
    options = Refit(str(data) if is_text else "token ids", tokens, target_sparsity, seed=seed)
    before = _native_entry(model)
    settings: Any = model.config
    native = {key: value for key, value in settings.to_dict().items() if key not in ("stocha", "auto_map")}
    native |= {ARCHITECTURES[settings.model_type].act_key: before.base}
    if is_text:
        length = min(WINDOW, settings.max_position_embeddings or WINDOW)
        data = _text_windows(options, tokenizer, wanted_tokens(options, native, length), length)
    windows = whole_batches(_checked_ids(data, settings.vocab_size), native, options.data)
    layers = Layers(ModelTensors(model), native, str(next(model.parameters()).device))
    store: dict[int, Fitted] = {}
    figures = refit_layers(layers, windows, options, store)
    stocha = refitted_entry(before, options, windows.numel(), figures)
    if stocha_mlps(model):
        unpatch(model)
    patch(model, stocha)  # type: ignore[arg-type] # inside the package there is one StochaConfig
    with torch.no_grad():
        for index, mlp in enumerate(stocha_mlps(model)):
            for part, matrix in store[index].ffn.parts.items():
                getattr(mlp, part).weight.copy_(matrix)
    return model


def _native_entry(model: nn.Module) -> StochaConfig:
    """The entry that a model's refit adds to. Raises StochaError for a model that cannot be refitted."""
    config: Any = getattr(model, "config", None)
    refuse_quantized(config.to_dict() if hasattr(config, "to_dict") else {}, "the model", "a refit")
    row = ARCHITECTURES.get(str(getattr(config, "model_type", None)))
    names = {row.causal_lm, f"Stocha{row.causal_lm}"} if row else set()
    if row is None or type(model).__name__ not in names:
        known = ", ".join(row.causal_lm for row in ARCHITECTURES.values())
        raise StochaError(f"the model is a {type(model).__name__}: expected one of {known}")
    if not stocha_mlps(model):
        if (act := getattr(config, row.act_key)) != row.act:
            raise StochaError(f"the model has {row.act_key} {act!r}: expected {row.act!r}, the original's")
        return StochaConfig(activation="relu").resolve(row.act)
    entry = read_entry(config.to_dict(), "the model")
    check_uncut(entry, "the model")
    check_original(entry, "the model")
    return replace(entry, activation="relu", inference="relu", threshold=0.0)


def _text_windows(options: Refit, tokenizer: Any, wanted: int, length: int) -> torch.Tensor:
    if tokenizer is None:
        raise StochaError(f"refitting on {options.data} needs a tokenizer: expected the model's own, or token ids")
    with tempfile.TemporaryDirectory(prefix="stocha-tokenizer-") as folder:
        tokenizer.save_pretrained(folder)
        return calibration_windows(options.data, Path(folder), wanted, length, options.seed)


def _checked_ids(windows: Any, vocabulary: int) -> torch.Tensor:
    if windows.dim() != 2 or windows.dtype != torch.int64 or (windows.numel() and not _within(windows, vocabulary)):
        raise StochaError(
            f"the token ids are {windows.dtype} of shape {list(windows.shape)}: expected int64 [windows, length], "
            f"from 0 to {vocabulary - 1}"
        )
    return windows.cpu()


def _within(windows: torch.Tensor, vocabulary: int) -> bool:
    return int(windows.min()) >= 0 and int(windows.max()) < vocabulary
