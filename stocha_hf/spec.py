"""What a stocha checkpoint may say: activations, architectures and StochaConfig, without importing torch.

Converting copies files and needs no tensor, while importing torch costs seconds and hundreds of megabytes. So whatever
can be known of an activation without computing it stands here. modeling_stocha.py ships with every checkpoint and has
to work alone, so it holds a copy of what is between the two marked lines. `make style` renews it, and a test compares
them. Inside the package that file takes the classes from here, so there is one StochaConfig.

    from stocha_hf.spec import ACTIVATIONS, ARCHITECTURES, StochaConfig
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stocha_hf.cuts import InputCuts
from stocha_hf.rules import Rules, are_numbers, check_keys, is_number, require, require_all

MODELING_FILE, CUTS_FILE, MLX_FILE = (
    Path(__file__).with_name(f"{name}_stocha.py") for name in ("modeling", "cuts", "mlx")
)

# --- copied into modeling_stocha.py from here ---

__version__ = "0.2.0"


@dataclass(frozen=True)
class Architecture:
    """How one native model family is patched: its class names and where its config names the activation."""

    causal_lm: str
    model: str
    mlp: str
    act_key: str
    act: str

    def auto_map(self, module: str) -> dict[str, str]:
        """Return config.json's `auto_map`, which makes the Auto classes find this file's classes in a module."""
        names = {"AutoConfig": "AutoConfig", "AutoModel": self.model, "AutoModelForCausalLM": self.causal_lm}
        return {auto: f"{module}.Stocha{name}" for auto, name in names.items()}


ARCHITECTURES = {  # by model_type
    "llama": Architecture("LlamaForCausalLM", "LlamaModel", "LlamaMLP", "hidden_act", "silu"),
    "mistral": Architecture("MistralForCausalLM", "MistralModel", "MistralMLP", "hidden_act", "silu"),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Model", "Qwen2MLP", "hidden_act", "silu"),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Model", "Qwen3MLP", "hidden_act", "silu"),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Model", "Gemma2MLP", "hidden_activation", "gelu_pytorch_tanh"),
    "gemma3_text": Architecture(
        "Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3MLP", "hidden_activation", "gelu_pytorch_tanh"
    ),
}


@dataclass(frozen=True)
class Activation:
    """What is known of an activation without computing it.

    `native` is the name in transformers' ACT2FN of what the native class runs in its place (None: the base
    activation). `cut` says up to which gate value a hidden entry is surely 0, so that decoding can skip the neuron:
    "zero", "threshold" (that of the layer), or None where there is no such value.
    """

    native: str | None
    deterministic: bool = True
    cut: str | None = None


ACTIVATIONS = {
    "stocha": Activation(native=None, deterministic=False),
    "mean": Activation(native=None),
    "silu": Activation(native="silu"),
    "gelu_pytorch_tanh": Activation(native="gelu_pytorch_tanh"),
    "relu": Activation(native="relu", cut="zero"),
    "relu2": Activation(native="relu2", cut="zero"),
    "drelu": Activation(native="relu", cut="zero"),
    "fatrelu": Activation(native="relu", cut="threshold"),
    "shifted_relu": Activation(native="relu", cut="threshold"),
    "topk": Activation(native="relu"),
}
BASES = ("silu", "gelu_pytorch_tanh")  # what models are pretrained with
POSITIVE_SIDES = ("silu", "relu", "drawn")


@dataclass(frozen=True)
class StochaConfig:
    """The `stocha` entry of config.json.

    Args:
        activation: What runs in train() mode, a key of ACTIVATIONS.
        base: The source model's own activation; None takes it from the model.
        p: Probability of the base activation for a negative gate, 0 to 1 (stocha, mean).
        positive: What runs where gate >= 0: "silu" (the base activation, S+), "relu" (R+) or "drawn".
        inference: What runs in eval() mode; None means `activation`, or the base activation if that is random.
        threshold: For fatrelu and shifted_relu, 0 or more: one number, or one per layer.
        k: For topk, the number of neurons that stay.
        inputs: Which entries of projections' inputs are cut, if any are.
        source: {"id", "revision"} of the model that was converted.
        history: What refits, training, learned thresholds, averages and quantizing did to the weights, by stage.
        stocha_version: The version of stocha_hf that wrote the entry.

    Raises:
        ValueError: For any other value; the message names the key, what was given and what was expected.
    """

    activation: str = "stocha"
    base: str | None = None
    p: float = 0.3
    positive: str = "silu"
    inference: str | None = None
    threshold: float | list[float] = 0.0
    k: int | None = None
    inputs: InputCuts | None = None
    source: dict[str, str | None] | None = None
    history: list[dict[str, Any]] | None = None
    stocha_version: str = __version__

    def __post_init__(self) -> None:
        require_all(self, "", self._rules())

    def _rules(self) -> Rules:
        names = f"one of {', '.join(ACTIVATIONS)}"
        steady = [name for name, row in ACTIVATIONS.items() if row.deterministic]
        yield "activation", self.activation in [*ACTIVATIONS], names
        yield "base", self.base in [None, *ACTIVATIONS], names
        yield "inference", self.inference in [None, *steady], f"a deterministic activation, {', '.join(steady)}"
        yield "p", is_number(self.p) and 0 <= self.p <= 1, "a probability between 0 and 1"
        yield "positive", self.positive in [*POSITIVE_SIDES], f"one of {', '.join(POSITIVE_SIDES)}"
        thresholds = self.threshold if isinstance(self.threshold, list) else [self.threshold]
        yield "threshold", are_numbers(thresholds, 0), "a number of 0 or more, or a list of one per layer"
        needs_k = "topk" in (self.activation, self.inference)
        counts = self.k >= 1 if type(self.k) is int else self.k is None and not needs_k
        yield "k", counts, "a number of neurons, at least 1, for topk"
        # by name: the class ships in cuts_stocha.py, a file that folders without cuts lack
        yield "inputs", self.inputs is None or type(self.inputs).__name__ == "InputCuts", "an InputCuts"
        yield "source", self.source is None or _is_text(self.source), "a mapping of names to text"
        stages = [] if self.history is None else self.history
        staged = isinstance(stages, list) and all(isinstance(stage, dict) for stage in stages)
        yield "history", staged, "a list of mappings, one per stage"
        yield "stocha_version", isinstance(self.stocha_version, str), "a version's text"

    def resolve(self, base: str) -> StochaConfig:
        """Return this config with nothing left open, for a model whose own activation is `base`."""
        require(self.base in (None, base), "base", self.base, f"{base!r}, the model's own activation")
        own = self.activation if ACTIVATIONS[self.activation].deterministic else base
        return dataclasses.replace(self, base=base, inference=self.inference or own)

    def thresholds(self, layers: int, width: int | None = None) -> list[float]:
        """Return one threshold per layer, for a model of `layers` FFNs of `width` neurons.

        Raises ValueError where the config cannot be that model's: another number of thresholds, of FFNs or of
        inputs, or k above the width.
        """
        if self.inputs is not None:
            self.inputs.check(layers)
        values = self.threshold if isinstance(self.threshold, list) else [self.threshold] * layers
        require(len(values) == layers, "threshold", self.threshold, f"one number, or {layers}: one per layer")
        too_wide = self.k is not None and width is not None and self.k > width
        require(not too_wide, "k", self.k, f"at most {width}, the number of neurons of a layer")
        return values

    @property
    def common(self) -> bool:
        """Whether a tool that knows the family, and reads no activation, runs `inference`. Needs a resolved config."""
        return self.inference == self.base

    @property
    def native_act(self) -> str:
        """What the native class runs for `inference`: config.json's hidden_act. Needs a resolved config."""
        native = ACTIVATIONS[str(self.inference)].native or self.base
        return str(native)

    @property
    def module(self) -> str:
        """The module that `auto_map` names: the file that cuts inputs imports the one of all models."""
        return "cuts_stocha" if self.inputs else "modeling_stocha"

    @classmethod
    def from_dict(cls, entry: Any) -> StochaConfig:
        """Return the config of an entry as JSON holds it. Raises ValueError for whatever is not one."""
        check_keys(cls, "the config's stocha entry", entry)
        if entry.get("inputs") is not None:
            entry = entry | {"inputs": input_cuts(entry["inputs"])}
        return cls(**entry)

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON holds it, without keys that are left open."""
        return dataclasses.asdict(self, dict_factory=_without_none)


def class_names(names: list[str] | None, common: bool) -> list[str]:
    """Return config.json's `architectures`: native classes where tools that go by them run the model right.

    Elsewhere this file's classes, at which llama.cpp's converter, PowerInfer's and vLLM's native classes stop, where
    they would run the base activation without a word. The Auto classes go by `model_type` and `auto_map`.
    """
    native = [name.removeprefix("Stocha") for name in names or []]
    return native if common else [f"Stocha{name}" for name in native]


def _without_none(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value is not None}


def _is_text(value: object) -> bool:
    pairs = value.items() if isinstance(value, dict) else [(None, None)]
    return all(isinstance(key, str) and isinstance(text, str | None) for key, text in pairs)


# --- to here ---


def input_cuts(entry: Any) -> InputCuts:
    """Return the cuts of a `stocha` entry's `inputs`, for StochaConfig.from_dict."""
    return InputCuts.from_dict(entry)
