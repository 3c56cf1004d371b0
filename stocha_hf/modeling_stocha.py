# Copyright 2026 the stocha_hf authors. Licensed under the Apache License, Version 2.0.
"""Stochastic activations for gated feed-forward layers: the one file that ships with every stocha checkpoint.

Llama-class models compute y = W_down(act(W_gate x) * (W_up x)). This file replaces `act` by one of FUNCTIONS: StochA
(Lomeli et al., arXiv 2509.22358), its deterministic expectation, ReLU, and the sparse activations of neighbouring
papers. In train() mode a model uses `config.stocha["activation"]`, in eval() mode `config.stocha["inference"]`.

Patching changes the *class* of existing modules and nothing else, so parameters, state-dict keys, hooks and devices
stay as they are, and any stocha checkpoint is a valid checkpoint of its native class. The file imports torch and
transformers only, because the Hub copies it into other people's Python with `trust_remote_code=True`. It holds the
definitions; where stocha_hf is installed, its runtime makes them fast. cuts_stocha.py and quantization_stocha.py ship
beside this file with checkpoints that need them.

    model = AutoModelForCausalLM.from_pretrained(REPO, trust_remote_code=True)
    with model.stocha_mode("stocha", p=0.5):        # force an activation; restored on exit
        model.generate(**inputs)
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import os
import shutil
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoConfig, GenerationMixin, initialization
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

# What passes between this file, of which every published repo keeps a copy, and an installed stocha_hf.
CONTRACT = 1

# --- stocha_hf/rules.py, from here ---

Rules = Iterator[tuple[str, bool, str]]  # a key, whether its value is right, and what was expected


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


def require(ok: bool, key: str, given: object, expected: str) -> None:
    """Raise ValueError in one sentence unless ok."""
    if not ok:
        raise ValueError(f"{key} is {repr(given)[:200]}: expected {expected}")


def require_all(entry: Any, prefix: str, rules: Rules) -> None:
    for key, fits, expected in rules:  # one by one: a rule may rely on those before it
        require(fits, prefix + key, getattr(entry, key), expected)


# --- to here ---

# --- stocha_hf/spec.py, from here ---

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

InputCuts = Any  # of cuts_stocha.py, which ships with the checkpoints that cut inputs
CUTTING = "one with input cuts: see stocha-convert --inputs"


def cuts_file() -> Any:
    """The module cuts_stocha; not by an import statement, for which transformers would ask every folder to hold it."""
    try:
        return importlib.import_module(".cuts_stocha", __package__)
    except ImportError as error:
        raise ValueError(
            f"cuts_stocha.py cannot be imported ({error}): expected it beside modeling_stocha.py, of the same "
            "version: run stocha-convert on the folder"
        ) from error


def input_cuts(entry: Any) -> Any:
    return cuts_file().InputCuts.from_dict(entry)


if __name__ == "stocha_hf.modeling_stocha":  # inside the package there is one StochaConfig
    _spec = importlib.import_module("stocha_hf.spec")  # no import statement: transformers would ask for the package
    ACTIVATIONS, ARCHITECTURES, StochaConfig = _spec.ACTIVATIONS, _spec.ARCHITECTURES, _spec.StochaConfig  # type: ignore[misc]
    Activation, Architecture, InputCuts = _spec.Activation, _spec.Architecture, _spec.InputCuts  # type: ignore[misc]


# Activations: functions (gate, ffn) -> act(gate), of gate's shape [..., intermediate_size] and dtype. `ffn` is the
# StochaMLP they run in: it holds base, p, positive, threshold and k. The hidden vector is act(gate) * up.


def stocha(gate: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """StochA (Lomeli et al., arXiv 2509.22358, sec. 3): base activation with probability p, else ReLU, per element.

    A compiler fuses this and hashes again in backward. In eager mode stocha_hf's runtime, where it is installed,
    takes its place with the same coins. Gradients are those of the chosen function, ReLU's being 0 at 0.
    """
    keys = coin_keys(gate)
    width = gate.shape[-1]
    bits = coin_hash(keys[:-width].view(*gate.shape[:-1], 1), keys[-width:])
    uniform = ((bits >> 8) + 2**23) * 2.0**-24  # in [0, 1), from the upper 24 bits: exact in float32
    drawn = uniform - ffn.p < 0  # not uniform < p: a compiler keeps what shrinks its inputs fourfold, here the mask
    base = BASE_FUNCTIONS[ffn.base](gate)
    return _with_positive_side(gate, base, torch.where(drawn, base, F.relu(gate)), ffn.positive)


def coin_keys(gate: torch.Tensor) -> torch.Tensor:
    """Draw the keys of a call's coins: 32 random bits for each token and each neuron, int32 [tokens + neurons].

    The coin of token i and neuron j is a hash of r_i ^ c_j, which costs less than a draw. The keys come from the
    generator that activation checkpointing restores. Any three coins of a call are exactly independent (simple
    tabulation: Patrascu and Thorup, arXiv 1011.5200, sec. 1); the multiplications break the pattern of four.
    """
    width = gate.shape[-1]
    return torch.randint(-(2**31), 2**31, (gate.numel() // width + width,), dtype=torch.int32, device=gate.device)


def coin_hash(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Hash the keys rows [..., 1] and columns [neurons], int32, to numbers that are uniform over the even int32 ones.

    The arithmetic shift clears the sign bit; the second multiplier is doubled and moves the 31 bits that are left up.
    """
    bits = (rows ^ columns).mul_(0x2C1B3C6D)
    bits ^= bits >> 15
    return bits.mul_(2 * 0x297A2D39)


def mean(gate: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """The exact expectation of StochA over its draws, as dropout's inference rule is of dropout."""
    base = BASE_FUNCTIONS[ffn.base](gate)
    return _with_positive_side(gate, base, ffn.p * base + (1 - ffn.p) * F.relu(gate), ffn.positive)


def _with_positive_side(gate: torch.Tensor, base: torch.Tensor, mixed: torch.Tensor, positive: str) -> torch.Tensor:
    """`mixed` where gate < 0; elsewhere the base activation ("silu", S+), ReLU ("relu", R+) or `mixed` ("drawn")."""
    return torch.where(gate < 0, mixed, {"silu": base, "relu": F.relu(gate), "drawn": mixed}[positive])


def topk(gate: torch.Tensor, ffn: StochaMLP) -> torch.Tensor:
    """The k largest of relu(gate) of each token, the rest 0 (Lazy Neuron, arXiv 2210.06313)."""
    largest = F.relu(gate).topk(ffn.k, dim=-1)
    return torch.zeros_like(gate).scatter(-1, largest.indices, largest.values)


FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "stocha": stocha,
    "mean": mean,
    # SwiGLU's and GeGLU's, the latter with the tanh approximation: what models are pretrained with (arXiv 2002.05202)
    "silu": lambda gate, ffn: F.silu(gate),
    "gelu_pytorch_tanh": lambda gate, ffn: F.gelu(gate, approximate="tanh"),
    "relu": lambda gate, ffn: F.relu(gate),
    "relu2": lambda gate, ffn: F.relu(gate).square(),  # ReLU^2 Wins, arXiv 2402.03804
    "drelu": lambda gate, ffn: F.relu(gate),  # TurboSparse, arXiv 2406.05955; see ON_UP
    "fatrelu": lambda gate, ffn: F.threshold(gate, ffn.threshold, 0.0),  # ProSparse, arXiv 2402.13516
    "shifted_relu": lambda gate, ffn: F.relu(gate - ffn.threshold),  # ReLU Strikes Back, arXiv 2310.04564
    "topk": topk,
}
ON_UP = {"drelu": F.relu}  # what acts on the up projection too
BASE_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    name: functools.partial(FUNCTIONS[name], ffn=None) for name in BASES
}


def hidden_vector(gate: torch.Tensor, up: torch.Tensor, ffn: StochaMLP, act: Any = None) -> torch.Tensor:
    """Return act(gate) * up, both [..., intermediate_size], as `ffn` runs now; `act` may take its function's place."""
    name = ffn.running
    act = functools.partial(FUNCTIONS[name], ffn=ffn) if act is None else act
    return act(gate) * (ON_UP[name](up) if name in ON_UP else up)


class RunningActivation(nn.Module):
    """act_fn of a StochaMLP: the activation that it runs now, as a module, so that hooks see it and can change it."""

    def __init__(self, ffn: StochaMLP) -> None:
        super().__init__()
        self.ffn = (ffn,)  # in a tuple: the MLP is this module's parent and no child of it

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[self.ffn[0].running](gate, self.ffn[0])


def _runtime() -> Any:
    """stocha_hf's runtime for this file's contract; where it is installed but fails, None and one warning."""
    if importlib.util.find_spec("stocha_hf") is None:
        return None
    try:
        from stocha_hf.decoding.runtime import for_contract

        return for_contract(CONTRACT)
    except Exception as error:  # whatever another version raises
        warnings.warn(
            f"stocha_hf is installed but cannot speed up {__name__}, which computes in PyTorch instead: {error!r}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class StochaMLP(nn.Module):
    """A native gated MLP whose class was changed: same gate_proj, up_proj, down_proj; `act_fn` is what it runs.

    Modes are attributes of each layer, so two models in one process never share them. `forced` overrules `activation`
    and `inference`; the other attributes are those of StochaConfig. `decode_state` is the runtime's.
    """

    contract = CONTRACT
    runtime: Any = None  # stocha_hf's, of the class, so that models can be copied and pickled; set when one is patched
    state = (
        *("activation", "inference", "forced", "base", "p_tensor", "positive", "threshold", "k"),
        *("native_class", "decode_state"),
    )

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module
    activation: str
    inference: str
    forced: str | None
    base: str
    p_tensor: torch.Tensor
    positive: str
    threshold: float
    k: int
    native_class: type[nn.Module]
    decode_state: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute W_down(act(W_gate x) * (W_up x)) of an x [..., hidden_size], in its shape and float dtype."""
        if self.runtime is not None and not self.training:
            found = self.runtime.ffn(self, x)  # None where this is no step that can skip neurons
            if found is not None:
                return found
        return self.down_proj(self.hidden(self.gate_proj(x), self.up_proj(x)))

    def hidden(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Return the hidden vector, act(gate) * up, of gate and up [..., intermediate_size]."""
        if is_called(self.act_fn):
            return hidden_vector(gate, up, self, self.act_fn)
        if self.running == "stocha" and self.runtime is not None and not torch.compiler.is_compiling():
            found = self.runtime.stocha(gate, up, self.p, self.base, self.positive)
            if found is not None:
                return found
        return hidden_vector(gate, up, self)

    @property
    def running(self) -> str:
        """The name of the activation that a forward now runs."""
        return self.forced or (self.activation if self.training else self.inference)

    @property
    def p(self) -> Any:
        """A float; for a compiler a 0-dim float64 CPU tensor, which is an input of its graph and no constant in it, so
        that another p does not recompile.
        """
        return self.p_tensor if torch.compiler.is_compiling() else self.p_tensor.item()

    @p.setter
    def p(self, value: Any) -> None:
        # A new tensor: a backward that is still to come may need the old one. The device is named because models are
        # built on the meta device; no buffer, so that state dicts, casts and broadcasts leave it alone.
        with torch.inference_mode(False):
            self.p_tensor = torch.tensor(value, dtype=torch.float64, device="cpu")

    def train(self, mode: bool = True) -> StochaMLP:
        # Liger rebinds the instance's `forward`, which bypasses the activation silently; every trainer calls train().
        refuse_liger(self.__dict__.get("forward"))
        if mode:  # its copies of weights would be old after a step of training
            self.decode_state = None
        return super().train(mode)


def is_called(module: nn.Module) -> bool:
    """Return whether something hangs on a module's call, so that it must be made: a hook, or another forward."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__ or nn.modules.module._has_any_global_hook()


@contextmanager
def holding(modules: list[Any], **values: Any) -> Iterator[None]:
    """Set attributes of modules, and give each its own values back on exit."""
    before = [(module, key, getattr(module, key)) for module in modules for key in values]
    try:
        for module, key, _ in before:
            setattr(module, key, values[key])
        yield
    finally:
        for module, key, value in before:
            setattr(module, key, value)


def refuse_liger(thing: object) -> None:
    if str(getattr(thing, "__module__", "")).startswith("liger_kernel"):
        raise ValueError(
            "Liger's fused SwiGLU is applied to this model: expected the native FFN, since Liger's kernel computes "
            "SiLU only and would bypass the activation; load the model with use_liger_kernel=False"
        )


def is_native(module: nn.Module, *names: str) -> bool:
    return type(module).__name__ in names and type(module).__module__.startswith("transformers.models.")


def native_mlps(model: nn.Module, row: Architecture, config: Any) -> list[nn.Module]:
    """The model's gated MLPs in layer order, after checking that there is one per layer."""
    for module in model.modules():
        refuse_liger(type(module))
    mlps = [module for module in model.modules() if is_native(module, row.mlp)]
    count = config.num_hidden_layers
    require(len(mlps) == count, "the number of native MLPs", len(mlps), f"{count} {row.mlp}")
    return mlps


def patch_mlps(mlps: list[nn.Module], config: StochaConfig) -> None:
    """Turn native MLPs, in layer order, into StochaMLPs under a resolved config."""
    width = getattr(getattr(mlps[0], "gate_proj", None), "out_features", None) if mlps else None
    thresholds = config.thresholds(len(mlps), width)
    StochaMLP.runtime = StochaMLP.runtime or _runtime()
    for mlp, threshold in zip(mlps, thresholds, strict=True):
        state = {key: getattr(config, key, None) for key in StochaMLP.state}
        mlp.__dict__.update(state | {"native_class": type(mlp), "threshold": threshold})
        mlp.act_fn = RunningActivation(mlp)  # type: ignore[arg-type]
        mlp.act_fn.train(mlp.training)
        become(mlp, StochaMLP)
        mlp.p = config.p  # type: ignore[assignment]


def become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change a module's class, also under accelerate's hooks, which keep the bound forward that they wrap."""
    module.__class__ = kind
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(kind.forward, module)


def stocha_mlps(model: nn.Module) -> list[StochaMLP]:
    """The patched MLPs of a model in layer order."""
    return [module for module in model.modules() if is_a(module, StochaMLP)]  # type: ignore[misc]


def is_a(module: nn.Module, kind: type) -> bool:
    """By name: each trust_remote_code load has classes of its own, and FSDP2 derives one from a module's."""
    return any(cls.__name__ == kind.__name__ for cls in type(module).__mro__)


def checked_mlps(model: nn.Module, activation: str, p: float | None) -> list[StochaMLP]:
    """The patched MLPs, after checking that they can run this activation; None keeps p."""
    mlps = stocha_mlps(model)
    require(bool(mlps), "the model", type(model).__name__, "a patched model: see stocha_hf.patch")
    StochaConfig(activation=activation, p=mlps[0].p if p is None else p, k=mlps[0].k)
    return mlps


@contextmanager
def stocha_mode(model: nn.Module, name: str, p: float | None = None) -> Iterator[nn.Module]:
    """Force one activation in train() and eval() alike, optionally with another p; restored on exit.

    Args:
        model: A patched model.
        name: A key of ACTIVATIONS.
        p: Probability of the base activation, 0 to 1; None keeps it.

    Raises:
        ValueError: For an unknown name, a p outside [0, 1] or a model without patched MLPs.
    """
    mlps = checked_mlps(model, name, p)
    with holding(mlps, forced=name, **({} if p is None else {"p": p})):
        yield model


class StochaModel:
    """Mixin before a native class: patches the MLPs after construction and saves a checkpoint that loads by itself."""

    config: Any
    training: bool
    cutting: Any = None  # of a model that cuts inputs: a Cutting of cuts_stocha.py

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing to register: save_pretrained writes auto_map and this file, also for a class that FSDP renamed."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        entry = getattr(config, "stocha", None)
        require(entry is not None, "the config's stocha entry", None, "one: run stocha-convert on the model first")
        row = ARCHITECTURES[config.model_type]
        stocha_config = StochaConfig.from_dict(entry).resolve(row.act)
        stocha_config.thresholds(config.num_hidden_layers, config.intermediate_size)  # before any weight is made
        config.stocha = stocha_config.to_dict()  # whole, also where the entry left keys out
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        patch_mlps(native_mlps(self, row, config), stocha_config)  # type: ignore[arg-type]
        if stocha_config.inputs is not None and stocha_config.inputs.token_factors:
            cuts_file().add_token_factors(self, stocha_config.inputs)  # before weights are loaded

    def initialize_weights(self) -> None:
        """As the native one; tokens' factors that a folder lacks, since the native class saved it, are 1."""
        super().initialize_weights()  # type: ignore[misc]
        for name, weights in self.named_parameters():  # type: ignore[attr-defined]
            if name.endswith("_token_factor"):
                initialization.zeros_(weights)  # not one that was loaded

    def train(self, mode: bool = True) -> Any:
        """As the native one; and sets the input cuts, after from_pretrained's quantizers, which exchange nn.Linear."""
        if self.config.stocha.get("inputs"):
            cuts_file().set_cuts(self)
        return super().train(mode)  # type: ignore[misc]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime = None if self.training or torch.compiler.is_compiling() else StochaMLP.runtime
        found = None if runtime is None else runtime.call(self, args, kwargs)
        if found is not None:  # None where this is no step, or one that must call modules
            return found
        call = super().__call__  # type: ignore[misc]
        with nullcontext() if runtime is None else runtime.step(self, args, kwargs):
            if self.training or not getattr(self.cutting, "fallback", 0):
                return call(*args, **kwargs)
            return self.cutting.call(self, call, args, kwargs)

    def get_memory_footprint(self, *args: Any, **kwargs: Any) -> int:
        """The bytes of parameters and buffers, and of what decode steps hold beside them."""
        held = 0 if StochaMLP.runtime is None else StochaMLP.runtime.held_bytes(self)
        return super().get_memory_footprint(*args, **kwargs) + held  # type: ignore[misc]

    def stocha_mode(self, name: str, p: float | None = None) -> Any:
        """`with model.stocha_mode("relu"): ...`; see the function of the same name."""
        return stocha_mode(self, name, p)  # type: ignore[arg-type]

    def cut_inputs(self, where: str, fallback: float | None = None, fallback_tokens: int | None = None) -> Any:
        """`with model.cut_inputs("never"): ...`; see the function of the same name in cuts_stocha.py."""
        require(bool(self.config.stocha.get("inputs")), "the model", type(self).__name__, CUTTING)
        return cuts_file().cut_inputs(self, where, fallback, fallback_tokens)

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As the native one; the folder gets this file and those of its kind beside it, and its config names them."""
        entry = self.config.stocha
        if isinstance(entry["threshold"], list):  # of the layers that there are: some may be cut out
            entry = entry | {"threshold": [mlp.threshold for mlp in stocha_mlps(self)]}  # type: ignore[arg-type]
        if entry.get("inputs"):
            entry = entry | {"inputs": cuts_file().saved_cuts(self, entry["inputs"])}
        self.config.stocha = entry
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        resolved = StochaConfig.from_dict(entry).resolve(ARCHITECTURES[self.config.model_type].act)
        quantized = getattr(self, "hf_quantizer", None) is not None
        self.config.architectures = class_names(self.config.architectures, resolved.common and not quantized)
        self.config.auto_map = ARCHITECTURES[self.config.model_type].auto_map(resolved.module)
        if kwargs.get("is_main_process", args[0] if args else True):
            self.config.save_pretrained(save_directory)
            others = ["mlx_stocha.py"] * hasattr(self.config, "model_file")
            for name in {os.path.basename(__file__), f"{resolved.module}.py", *others}:
                if os.path.isfile(path := os.path.join(os.path.dirname(__file__), name)):  # transformers caches one
                    shutil.copyfile(path, os.path.join(save_directory, name))
            if complete := getattr(getattr(self, "hf_quantizer", None), "complete", None):  # quantization_stocha.py's
                complete(self, save_directory)
        if push_to_hub:
            hub = {key: kwargs[key] for key in ("commit_message", "private", "token", "create_pr") if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.fspath(save_directory)), **hub)  # type: ignore


class StochaGeneration:
    """Mixin before a native class that generates, as StochaModel: what generate() calls of it."""

    training: bool
    cutting: Any

    def prepare_inputs_for_generation(
        self, input_ids: Any, *args: Any, inputs_embeds: Any = None, **kwargs: Any
    ) -> Any:
        """As the native one; a fallback gets to know the text that a step continues."""
        native = super().prepare_inputs_for_generation  # type: ignore[misc]
        found = native(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if self.cutting is not None and not args and not self.training:
            self.cutting.tell(found.get("input_ids"), input_ids, kwargs.get("attention_mask"))
        return found

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """As the native one, which generate() calls for greedy decoding and for sampling."""
        runtime = StochaMLP.runtime
        found = None if runtime is None or self.training else runtime.sample(self, *args, **kwargs)
        return super()._sample(*args, **kwargs) if found is None else found  # type: ignore[misc]

    def _extract_generation_mode_kwargs(self, *args: Any, **kwargs: Any) -> Any:
        """As the native one, which forgets a streamer that a function for `custom_generate` takes."""
        native = super()._extract_generation_mode_kwargs  # type: ignore[misc]
        runtime = StochaMLP.runtime
        return native(*args, **kwargs) if runtime is None else runtime.mode_kwargs(native, *args, **kwargs)


class StochaAutoConfig:
    """What `auto_map` names for AutoConfig: the native config, with this file's class in `architectures`.

    `transformers serve` and trl's trainers look a class up in transformers by that name, and find this file's there.
    """

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing to register: the config that from_pretrained returns is the native one."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As AutoConfig.from_pretrained."""
        found = AutoConfig.from_pretrained(*args, **kwargs | {"trust_remote_code": False})
        config = found[0] if isinstance(found, tuple) else found  # with return_unused_kwargs
        config.architectures = class_names(config.architectures, common=False)
        for name in config.architectures:
            setattr(transformers, name, globals().get(name))
        return found


def _stocha_class(name: str) -> type:
    """The stocha class of a native one: the same with stocha MLPs."""
    native = getattr(transformers, name)
    generates = name.endswith("ForCausalLM")
    bases = (StochaModel, StochaGeneration, native, GenerationMixin) if generates else (StochaModel, native)
    return type(f"Stocha{name}", bases, {"__module__": __name__, "__doc__": f"{name} with stocha MLPs."})


# StochaLlamaForCausalLM, StochaLlamaModel and so on, in transformers' lists of class names too: else pipeline() prints
# a page of "not supported", label smoothing does not shift the labels, and a base model counts as one with a loss.
for model_type, row in ARCHITECTURES.items():
    for name, known in ((row.causal_lm, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), (row.model, MODEL_MAPPING_NAMES)):
        globals()[f"Stocha{name}"] = _stocha_class(name)
        known[f"stocha_{model_type}"] = f"Stocha{name}"
