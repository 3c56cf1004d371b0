"""Patch models in memory, and set what they run: the public functions around modeling_stocha.py.

That file ships with every checkpoint and patches the models that it builds. A native model which is in memory already
is patched from here, by the same functions; so all that only an installed stocha_hf does stays out of the copies that
published repositories keep.

    from stocha_hf import StochaConfig, patch, unpatch
    patch(model, StochaConfig(activation="relu"))
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.activations import ACT2FN

from stocha_hf import modeling_stocha
from stocha_hf.cuts_stocha import cut_projections, projections, set_cuts
from stocha_hf.modeling_stocha import (
    ARCHITECTURES,
    StochaConfig,
    StochaMLP,
    become,
    checked_mlps,
    is_native,
    native_mlps,
    patch_mlps,
    refuse_liger,
    require,
    stocha_mlps,
)


def set_activation(model: nn.Module, activation: str, p: float | None = None) -> None:
    """Set what a model runs in train() mode from now on, for a schedule: the lasting counterpart of stocha_mode.

    Works inside wrappers too (DDP, FSDP, peft, torch.compile). It may be called at every step: a p that changes does
    not recompile a compiled model, another activation does once. Everything is checked before anything changes.

    Args:
        model: A patched model.
        activation: A key of ACTIVATIONS.
        p: Probability of the base activation, 0 to 1; None keeps it.

    Raises:
        ValueError: For an unknown activation, a p outside [0, 1] or a model without patched MLPs.
    """
    for mlp in checked_mlps(model, activation, p):
        if mlp.activation != activation:
            mlp.activation = activation
        if p is not None and mlp.p != p:
            mlp.p = p


def patch(model: nn.Module, config: StochaConfig) -> int:
    """Turn a native model (or the one inside a wrapper such as peft's) into its stocha class, in place.

    Everything is checked before anything changes.

    Args:
        model: A transformers model of a type in ARCHITECTURES.
        config: What it is to run.

    Returns:
        The number of patched MLPs.

    Raises:
        ValueError: For a model of no known architecture, one that is patched already, one with Liger applied or an
            MLP whose forward was replaced, or a base that is not the model's own.
    """
    require(not stocha_mlps(model), "the model", "already patched", "a native model: call stocha_hf.unpatch first")
    by_name = {name: row for row in ARCHITECTURES.values() for name in (row.causal_lm, row.model)}
    native = next((module for module in model.modules() if is_native(module, *by_name)), None)
    if native is None:
        raise ValueError(f"the model is a {type(model).__name__}: expected one of {', '.join(by_name)}")
    row = by_name[type(native).__name__]
    hf_config: Any = native.config
    converted = getattr(hf_config, "stocha", None)
    config = config.resolve(row.act if converted else getattr(hf_config, row.act_key))
    mlps = native_mlps(native, row, hf_config)
    for mlp in mlps:
        _refuse_replaced_forward(mlp, "an MLP's forward")
    for layer in projections(native) if config.inputs is not None else []:
        for name in config.inputs.thresholds:  # type: ignore[union-attr]
            _refuse_replaced_forward(layer[name], f"the forward of a {name}")
    patch_mlps(mlps, config)
    hf_config.stocha, hf_config.auto_map = config.to_dict(), row.auto_map(config.module)
    setattr(hf_config, row.act_key, config.native_act)
    set_cuts(native)
    become(native, getattr(modeling_stocha, f"Stocha{type(native).__name__}"))
    return len(stocha_mlps(native))


def _refuse_replaced_forward(module: nn.Module, what: str) -> None:
    """Raise ValueError where a module's own forward would hide the patched class's; accelerate's hooks keep theirs."""
    forward = module.__dict__.get("forward")
    refuse_liger(forward)
    require(
        forward is None or "_old_forward" in module.__dict__, what, forward, "the native one, which can be patched"
    )


def unpatch(model: nn.Module) -> int:
    """Give a patched model its native classes and its base activation back, in place.

    Args:
        model: A patched model, or a wrapper with one inside.

    Returns:
        The number of MLPs.

    Raises:
        ValueError: For a model without patched MLPs.
    """
    mlps = stocha_mlps(model)
    require(bool(mlps), "the model", type(model).__name__, "a patched model")
    for mlp in mlps:
        mlp.act_fn = ACT2FN[mlp.base]
        mlp.act_fn.train(mlp.training)
        _restore(mlp, StochaMLP.state)
    for projection in cut_projections(model):
        if factors := getattr(projection, "factors", ()):  # none in folders' copies of before
            owner, key = factors
            owner._parameters.pop(key, None)
        _restore(projection, projection.state)
    patched = next(module for module in model.modules() if hasattr(type(module), "stocha_mode"))
    native = next(cls for cls in type(patched).__mro__ if f"Stocha{cls.__name__}" == type(patched).__name__)
    become(patched, native)
    patched.__dict__.pop("cutting", None)
    hf_config: Any = patched.config
    setattr(hf_config, ARCHITECTURES[hf_config.model_type].act_key, hf_config.stocha["base"])
    del hf_config.stocha, hf_config.auto_map
    return len(mlps)


def _restore(module: Any, state: tuple[str, ...]) -> None:
    become(module, module.native_class)
    for key in state:
        del module.__dict__[key]
