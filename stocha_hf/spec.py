"""What a stocha checkpoint may say: activations, architectures and StochaConfig, without importing torch.

Converting copies files and needs no tensor, while importing torch costs seconds and hundreds of megabytes. So whatever
can be known of an activation without computing it stands here. The files that ship with checkpoints have to work
alone. modeling_stocha.py, which every published repo carries, holds a copy of the first marked part; cuts_stocha.py,
which ships with checkpoints that cut inputs, of the second. `make style` renews the copies, and a test compares them.
Inside the package both files take the classes from here, so there is one StochaConfig.

    from stocha_hf.spec import ACTIVATIONS, ARCHITECTURES, StochaConfig
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELING_FILE, CUTS_FILE, MLX_FILE = (
    Path(__file__).with_name(f"{name}_stocha.py") for name in ("modeling", "cuts", "mlx")
)
ALLOTMENTS = ("uniform", "greedy", "output")  # of the share of inputs to cut to projections
LEARNED = "learned"  # a threshold for each input instead, which takes scaled weights
LEARNED_INPUTS = "learned_inputs"  # the method of the stage in a history that scaled them, and trained none

# --- copied into modeling_stocha.py from here ---

__version__ = "0.2.0"
Rules = Iterator[tuple[str, bool, str]]  # a key, whether its value is right, and what was expected


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


def check_keys(cls: Any, where: str, entry: Any) -> None:
    """Raise ValueError where an entry as JSON holds it is not a mapping, or has a key that is not a field."""
    require(isinstance(entry, dict), where, entry, "a mapping")
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(str(key) for key in entry if key not in known)
    require(not unknown, where, unknown, f"no other keys than {', '.join(sorted(known))}")


def is_number(value: object) -> bool:
    """Return whether a value is an ordinary number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**1023


def are_numbers(values: object, least: float) -> bool:
    """Whether this is a list of one or more numbers, each `least` or more."""
    return isinstance(values, list) and bool(values) and all(is_number(x) and x >= least for x in values)


def _is_text(value: object) -> bool:
    pairs = value.items() if isinstance(value, dict) else [(None, None)]
    return all(isinstance(key, str) and isinstance(text, str | None) for key, text in pairs)


def require(ok: bool, key: str, given: object, expected: str) -> None:
    """Raise ValueError in one sentence unless ok."""
    if not ok:
        raise ValueError(f"{key} is {repr(given)[:200]}: expected {expected}")


def require_all(entry: Any, prefix: str, rules: Rules) -> None:
    for key, fits, expected in rules:  # one by one: a rule may rely on those before it
        require(fits, prefix + key, getattr(entry, key), expected)


# --- to here ---


def input_cuts(entry: Any) -> InputCuts:
    """Return the cuts of a `stocha` entry's `inputs`, for StochaConfig.from_dict."""
    return InputCuts.from_dict(entry)


# --- copied into cuts_stocha.py from here ---

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")  # of a decoder layer
FALLBACK = "a probability from 0 to below 1"
FALLBACK_TOKENS = "a whole number from 1 to 8"  # as many as the kernels take in one step


@dataclass(frozen=True)
class InputCuts:
    """The `inputs` of a `stocha` entry: which entries of projections' inputs are cut, so that decoding can skip them.

    A projection W computes W where(|x - c| > t, x, c), with a threshold t and a centre c of its own: c = 0 is TEAL
    (arXiv 2408.14690), the mode or median SCAP (arXiv 2412.07174).

    Args:
        thresholds: One per layer, 0 or more, for each projection that cuts, a name in PROJECTIONS.
        centres: One per layer, for those of these projections whose centre is not 0.
        share: The share of entries that the thresholds were made to cut.
        prefill: Whether eval() mode cuts at every token; if not, where each sequence has one new token.
        train: Whether train() mode cuts, at every token.
        calibration: The text that the thresholds were measured on.
        fallback: A step whose most likely token has a lower probability is computed again without cuts; None: none is.
        fallback_tokens: How many tokens such a step then computes, 1 to 8: its own and those before it, whose keys and
            values earlier steps wrote with cuts; None: its own.

    Raises:
        ValueError: For any other value; the message names the key, what was given and what was expected.
    """

    thresholds: dict[str, list[float]]
    centres: dict[str, list[float]] | None = None
    share: float | None = None
    prefill: bool = False
    train: bool = False
    calibration: dict[str, Any] | None = None
    fallback: float | None = None
    fallback_tokens: int | None = None

    def __post_init__(self) -> None:
        require_all(self, "inputs.", self._rules())

    def _rules(self) -> Rules:
        lists = f"a list of numbers for one or more of {', '.join(PROJECTIONS)}"
        yield "thresholds", _are_lists(self.thresholds, PROJECTIONS, least=0), lists
        centred = self.centres is None or _are_lists(self.centres, self.thresholds)
        yield "centres", centred, "a list of numbers for projections that have thresholds"
        yield "share", self.share is None or (is_number(self.share) and 0 < self.share < 1), "a share between 0 and 1"
        yield "prefill", isinstance(self.prefill, bool), "true or false"
        yield "train", isinstance(self.train, bool), "true or false"
        yield "calibration", isinstance(self.calibration, dict | None), "a mapping"
        yield "fallback", self.fallback is None or is_fallback(self.fallback), FALLBACK
        count = self.fallback_tokens
        yield "fallback_tokens", count is None or is_fallback_tokens(count), FALLBACK_TOKENS
        yield "fallback_tokens", count is None or bool(self.fallback), "none where there is no fallback"

    def check(self, layers: int) -> None:
        """Raise ValueError where this cannot be of a model with so many layers."""
        for key, lists in (("thresholds", self.thresholds), ("centres", self.centres or {})):
            for name, values in lists.items():
                require(len(values) == layers, f"inputs.{key}.{name}", values, f"{layers} numbers: one per layer")

    def of(self, layer: int, projection: str) -> tuple[float, float]:
        """Return the threshold and the centre of a projection that cuts."""
        centres = (self.centres or {}).get(projection)
        return self.thresholds[projection][layer], centres[layer] if centres else 0.0

    @classmethod
    def from_dict(cls, entry: Any) -> InputCuts:
        """Return the cuts of an entry as JSON holds it. Raises ValueError for whatever is not one."""
        check_keys(cls, "inputs", entry)
        require("thresholds" in entry, "inputs.thresholds", None, "thresholds: run stocha-convert --inputs")
        return cls(**entry)


def is_fallback(value: object) -> bool:
    """Return whether a value can be the `fallback` of input cuts."""
    return is_number(value) and 0 <= value < 1  # type: ignore[operator]


def is_fallback_tokens(value: object) -> bool:
    """Return whether a value can be the `fallback_tokens` of input cuts."""
    return type(value) is int and 1 <= value <= 8


def _are_lists(value: object, names: Collection[str], least: float = -(2.0**1023)) -> bool:
    """Whether this maps one or more of these names to lists of numbers, each `least` or more."""
    known = isinstance(value, dict) and bool(value) and all(name in names for name in value)
    return known and all(are_numbers(row, least) for row in value.values())  # type: ignore[attr-defined]


# --- to here ---
