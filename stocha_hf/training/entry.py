"""The one writer of a model's `stocha` entry in training: what it runs, its thresholds, its history.

change_entry(model, activation="relu", inference=None)
"""

from __future__ import annotations

from typing import Any

from torch import nn

from stocha_hf.checkpoints.entry import set_entry
from stocha_hf.cuts_stocha import is_cut, projections
from stocha_hf.errors import StochaError
from stocha_hf.models import patched_layers
from stocha_hf.spec import StochaConfig


def change_entry(model: nn.Module, **changes: Any) -> None:
    """Change keys of a patched model's entry: its layers follow, and so does what is saved and natively inferred.

    Everything is checked before anything changes. p is written only: set_activation sets it, step by step.

    Args:
        model: a patched model, also inside wrappers (peft, DDP, FSDP2).
        **changes: keys of StochaConfig; `inference=None` takes it from the activation, `threshold` is one number or
            a list of one per layer, `inputs` as JSON holds it, with other numbers for the projections that cut.

    Raises:
        StochaError: for an entry that this model cannot have.
    """
    layers, patched = patched_layers(model), stocha_model(model)
    config = patched.config
    try:
        stocha = StochaConfig.from_dict(config.stocha | changes).resolve(config.stocha["base"])
        if stocha.inputs is not None:
            stocha.inputs.check(len(layers))
    except ValueError as error:
        raise StochaError(str(error)) from None
    thresholds = stocha.threshold if isinstance(stocha.threshold, list) else [stocha.threshold] * len(layers)
    if len(thresholds) != len(layers):
        raise StochaError(f"{len(thresholds)} thresholds were given: expected {len(layers)}, one per layer")
    cutting = [{name: row[name] for name in row if is_cut(row[name])} for row in projections(patched)]
    if any({*row} != {*(stocha.inputs.thresholds if stocha.inputs else ())} for row in cutting):
        raise StochaError(
            f"the model cuts the inputs of {', '.join(cutting[0]) or 'none'}: expected thresholds for these"
        )
    for layer, threshold in zip(layers, thresholds, strict=True):
        layer.activation, layer.inference, layer.threshold = stocha.activation, str(stocha.inference), threshold
    for index, row in enumerate(cutting):
        for name, projection in row.items():
            projection.input_threshold, projection.input_centre = stocha.inputs.of(index, name)  # type: ignore
    set_entry(config, stocha)


def stocha_model(model: nn.Module) -> Any:
    """Return the patched model inside whatever wraps it: the one with the config."""
    return next(module for module in model.modules() if hasattr(type(module), "stocha_mode"))
