# Copyright 2026 the stocha_hf authors. Licensed under the Apache License, Version 2.0.
"""Projections that cut small entries of their inputs: ships beside modeling_stocha.py with checkpoints that cut.

`config.stocha["inputs"]` says which projections cut, and from which size on an entry stays (TEAL, arXiv 2408.14690;
SCAP, arXiv 2412.07174). The folder's `auto_map` names this file, which hands on the classes of modeling_stocha.py; so
folders that cut nothing carry one file. A quantized folder's quantization_stocha.py imports this one.

    model = AutoModelForCausalLM.from_pretrained(REPO, trust_remote_code=True)
    with model.cut_inputs("never"):                 # force where it cuts; restored on exit
        model.generate(**inputs)

A model with a fallback computes a step again, without cuts, where it is in doubt: the fallback policy of BiLD (Kim et
al., arXiv 2302.07863), whose little model is here the large one with cuts. Wrong tokens are nearly all doubtful ones.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import DynamicCache, StaticCache

from .modeling_stocha import *  # noqa: F403 - the classes that auto_map names
from .modeling_stocha import (
    CUTTING,
    Rules,
    StochaConfig,
    StochaMLP,
    are_numbers,
    become,
    check_keys,
    holding,
    is_a,
    is_number,
    require,
    require_all,
)

# --- stocha_hf/cuts.py, from here ---

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")  # of a decoder layer
SHARED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))  # the same input
TOKEN_FACTOR = "_token_factor"  # what ends the names of tokens' factors, behind the first of such projections
FALLBACK = "a probability from 0 to below 1"
FALLBACK_TOKENS = "a whole number from 1 to 8"  # as many as the kernels take in one step


@dataclass(frozen=True)
class InputCuts:
    """The `inputs` of a `stocha` entry: which entries of projections' inputs are cut, so that decoding can skip them.

    A projection W computes W where(|x - c| > t, x, c), with a threshold t and a centre c of its own: c = 0 is TEAL
    (arXiv 2408.14690), the mode or median SCAP (arXiv 2412.07174). With `token_factors` a token's thresholds are
    t exp(tanh(w x + b)): w and b are weights of the folder, the `token_factor` of the first of the projections that
    read one input, as in SHARED.

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
        token_factors: Whether each token multiplies thresholds by factors of its own; None: it does not.

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
    token_factors: bool | None = None

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
        yield "token_factors", isinstance(self.token_factors, bool | None), "true or false"
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

    def leaders(self) -> dict[str, str]:
        """Return for each projection that cuts the first that reads its input and cuts: it has their token factor."""
        groups = [[name for name in group if name in self.thresholds] for group in SHARED]
        return {name: group[0] for group in groups for name in group}

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

if __name__ == "stocha_hf.cuts_stocha":  # inside the package there is one InputCuts
    InputCuts = importlib.import_module("stocha_hf.cuts").InputCuts  # type: ignore[misc]

CUTS = ("never", "decode", "always")  # where a projection cuts its input; "decode": one new token a sequence


# Which rows of a step are cut is the model's, not a thread's. One lock for all models of a process, because one in a
# Cutting could be neither copied nor pickled with its model.
_again = threading.RLock()


class Text(NamedTuple):
    """The text that a step's tokens end.

    ids   int64 [batch, length], the step's token of each row the last
    mask  attention_mask of a call on the last tokens of `ids`
    """

    ids: torch.Tensor
    mask: Any


class Cutting:
    """What the projections of a model share: which tokens of the call that runs now they cut, and its fallback.

    cut_at    bool [batch, seq]: the tokens whose inputs are cut; None: all
    paid_at   those whose reading has a price in training; None: as cut_at
    paused    whether the call that runs now cuts nothing
    fallback  a step whose most likely token has a lower probability is in doubt; 0: none is
    tokens    so many tokens at most are computed again, the step's own and those before it, where these are known
    doubted   bool [batch]: which rows of the last step were in doubt; None before there was one
    steps, repeated  by rows so far, those whose text has ended too; how many of them were computed again
    """

    def __init__(self, fallback: float, tokens: int = 1) -> None:
        self.fallback, self.tokens, self.steps, self.repeated, self.warned = fallback, tokens, 0, 0, False
        self.cut_at: torch.Tensor | None = None
        self.paid_at: torch.Tensor | None = None
        self.paused = False
        self.doubted: torch.Tensor | None = None

    def tell(self, step: Any, ids: torch.Tensor, mask: Any) -> None:
        """Note with a step's input_ids [batch, 1] the text that they end, as Text has it.

        A step in doubt can then compute tokens before its own again. It is noted with the tensor, which a call that
        follows is given or not, and with nothing that two threads share.
        """
        if self.fallback and self.tokens > 1 and isinstance(step, torch.Tensor) and step.shape[1] == 1:
            step.stocha_text = Text(ids, mask)  # type: ignore[attr-defined]

    @torch.compiler.disable(reason="a step in doubt is computed again, which no graph decides: switch that off by "
                            "model.cut_inputs('decode', fallback=0)")  # fmt: skip
    def call(self, model: Any, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return call(*args, **kwargs); of a step, with the rows in doubt computed again without cuts.

        A row's result does not depend on the others: those in no doubt keep the first call's, and its keys and values.
        """
        given = kwargs | dict(zip(POSITIONAL, args))  # noqa: B905
        cache = self._rewindable(model, given)
        if cache is None:
            return call(*args, **kwargs)
        with _again:
            found = call(*args, **kwargs)
            doubted = self.judge(found.logits[:, -1])
            if doubted is None:
                return found
            text: Text | None = getattr(given.get("input_ids"), "stocha_text", None)
            count = 1
            if text is not None and len(args) <= len(POSITIONAL):
                count = min(self.tokens, cache.most(text.ids.shape[1]))
                args, kwargs = (), _with_earlier(given, text, count)
            with cache.rewound(count, doubted), holding([self], paused=True):
                again = call(*args, **kwargs)
        return _merged(found, again, doubted)

    def judge(self, logits: torch.Tensor) -> torch.Tensor | None:
        """Count a step of these logits [batch, vocabulary]; return which rows are in doubt, None where none is."""
        self.doubted = self.doubts(logits)
        repeated = int(self.doubted.sum())
        self.steps, self.repeated = self.steps + len(logits), self.repeated + repeated
        return self.doubted if repeated else None

    def doubts(self, logits: torch.Tensor) -> torch.Tensor:
        """Return for logits [..., vocabulary] whether they are in doubt, bool [...]."""
        logits = logits.float()
        return (logits.amax(-1) - logits.logsumexp(-1)).exp() < self.fallback

    def _rewindable(self, model: Any, given: dict[str, Any]) -> Any:
        """A call's cache as one that forgets tokens; None where it is no step with cuts, logits and known cache."""
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        cache = given.get("past_key_values", given.get("cache"))
        if cache is None or tokens is None or tokens.shape[1] != 1 or given.get("return_dict") is False:
            return None
        if model.get_output_embeddings() is None:  # a base model, without logits to judge by
            return None
        x = tokens[..., None] if tokens.dim() == 2 else tokens
        if not any(module.cuts(x) for module in cut_projections(model)[:1]):
            return None
        if hasattr(cache, "rewound"):
            return cache
        if type(cache) in (DynamicCache, StaticCache) and not cache.offloading:
            return Rewindable(cache)
        if not self.warned:
            self.warned = True
            warnings.warn(
                f"the cache is a {type(cache).__name__}, which cannot forget a token: expected a DynamicCache or a "
                "StaticCache without offloading; steps in doubt are not computed again without cuts",
                stacklevel=2,
            )
        return None


POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values")  # the first arguments of a model


def _with_earlier(given: dict[str, Any], text: Text, count: int) -> dict[str, Any]:
    """The arguments of a step's call, for the last `count` tokens of its text."""
    positions = given.get("position_ids")
    if positions is not None:
        positions = (positions + torch.arange(1 - count, 1, device=positions.device)).clamp(min=0)
    longer = {"input_ids": text.ids[:, -count:], "attention_mask": text.mask, "position_ids": positions}
    return given | longer | {"logits_to_keep": 1}


def _merged(found: Any, again: Any, doubted: torch.Tensor) -> Any:
    """What a step returns, of the rows in doubt as a second call has it for its last token."""

    def merge(first: torch.Tensor, second: torch.Tensor, dim: int) -> torch.Tensor:
        rows = doubted.view(-1, *[1] * (first.dim() - 1)).to(first.device)
        return torch.where(rows, second.narrow(dim, second.shape[dim] - 1, 1), first)

    found.logits = merge(found.logits, again.logits, 1)
    for name, dim in (("hidden_states", 1), ("attentions", 2)):
        if found.get(name) is not None:
            found[name] = tuple(merge(*both, dim) for both in zip(found[name], again[name], strict=True))
    return found


class Rewindable:
    """A DynamicCache or StaticCache before a step: it can forget the step's token, and some before it.

    A dynamic layer puts new tensors in the place of old ones, so these are kept. A static one is written in place: the
    next step writes the same places again, unless it has a window that is full, and thus moves. Another cache has the
    same two methods, `most` and `rewound`.
    """

    def __init__(self, cache: Any) -> None:
        self.cache, self.layers = cache, list(cache.layers)
        self.before = [dict(vars(layer)) for layer in self.layers]
        if type(cache) is StaticCache:
            for kept, layer in zip(self.before, self.layers, strict=True):
                moves = layer.is_sliding and layer.cumulative_length_int >= layer.max_cache_len
                for name in ("cumulative_length", *(("keys", "values") if moves else ())):
                    kept[name] = kept[name].clone()

    def most(self, length: int) -> int:
        """Return how many tokens it can forget, the step's own among them, of a text of this length.

        Of a layer whose window is full that is one: what the window has left behind is gone.
        """
        held = self._held()
        windows = [
            layer.max_cache_len if type(self.cache) is StaticCache else layer.sliding_window
            for layer in self.layers
            if layer.is_sliding
        ]
        return length if held + 1 == length and all(held < window for window in windows) else 1

    @contextmanager
    def rewound(self, count: int, rows: torch.Tensor) -> Iterator[None]:
        """Forget the last `count` tokens, which a call then writes again; other rows than these keep their own.

        Args:
            count: The step's own token and those before it, as many as `most` says at most.
            rows: bool [batch].
        """
        end = self._held() + 1
        others = None if bool(rows.all()) else [part.clone() for part in self._last(count, end)]
        self._rewind(count - 1)
        yield
        for part, own in zip(self._last(count, end), others or (), strict=others is not None):
            part.copy_(torch.where(rows.to(part.device)[:, None, None, None], part, own))

    def _held(self) -> int:
        """How many tokens it had before the step."""
        kept: dict[str, Any] = self.before[0] if self.before else {"keys": None}
        for name in ("cumulative_length_int", "cumulative_length"):
            if name in kept:
                return int(kept[name])
        return 0 if kept["keys"] is None else kept["keys"].shape[2]

    def _last(self, count: int, end: int) -> list[torch.Tensor]:
        """The keys and values of the last `count` of `end` tokens, as far as layers have them."""
        parts = [part for layer in self.cache.layers for part in (layer.keys, layer.values)]
        ends = [min(end, part.shape[2]) for part in parts]
        return [part[:, :, max(last - count, 0) : last] for part, last in zip(parts, ends, strict=True)]

    def _rewind(self, earlier: int) -> None:
        """Make the layers what they were before the step, less some tokens."""
        self.cache.layers[:] = self.layers
        for layer, kept in zip(self.layers, self.before, strict=True):
            vars(layer).update(kept)
            if not earlier:
                continue
            if type(self.cache) is DynamicCache:
                layer.keys, layer.values = (part[:, :, :-earlier] for part in (layer.keys, layer.values))
            for name in ("cumulative_length", "cumulative_length_int"):
                if name in kept:
                    setattr(layer, name, kept[name] - earlier)


class CutInput:
    """Mixin before the class of a projection, which may be nn.Linear, quantized or other: it cuts its input.

    The cut is the projection's own: hooks on it see what it was given, and an adapter around it reads that in full.

    "decode" is a call with one new token for each sequence, x [batch, 1, size]. Prompts are computed in full, and so
    are several tokens at once after a cache, as assisted generation verifies them: together they would read nearly all
    weights anyway, and drafts with cuts are then judged without. The length decides, not the cache, whose own length a
    compiler does not know, and which also holds earlier turns of a chat when the next prompt comes.
    """

    state = (
        *("input_threshold", "input_centre", "cutting", "factors"),
        *("cut_training", "cut_inference", "cut_forced", "native_class", "input_major"),
    )

    training: bool
    input_threshold: float
    input_centre: float
    factors: tuple[Any, ...]  # the module that has its tokens' factors, and their name there; empty: they are 1
    cutting: Cutting
    cut_training: str
    cut_inference: str
    cut_forced: str | None
    native_class: type[nn.Module]
    input_major: Any  # the runtime's

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the projection of x [batch, length, size], cut where that is to be, with x's shape and dtype."""
        x = self.cut(x) if self.cuts(x) else x
        if StochaMLP.runtime is not None and not self.training:
            found = StochaMLP.runtime.cut_linear(self, x)  # None where the native class is to compute it
            if found is not None:
                return found
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def train(self, mode: bool = True) -> Any:
        if mode:  # as a StochaMLP's
            self.input_major = None
        return super().train(mode)  # type: ignore[misc]

    def cuts(self, x: torch.Tensor) -> bool:
        """Return whether a forward on x [batch, length, size] now cuts."""
        if self.cutting.paused:
            return False
        where = self.cut_forced or (self.cut_training if self.training else self.cut_inference)
        return where == "always" or (where == "decode" and x.shape[-2] == 1)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with the centre in the place of all entries within the threshold of it; NaN stays."""
        return x.masked_fill(self.small(x), self.input_centre)

    def small(self, x: torch.Tensor) -> torch.Tensor:
        """Return which entries of x are cut, bool of x's shape."""
        centred = x - self.input_centre if self.input_centre else x
        if self.factors:
            factor = token_logs(x, getattr(*self.factors)).exp()
            small = centred.abs().float() <= self.input_threshold * factor
        else:
            small = centred.abs() <= self.input_threshold
        cut_at = self.cutting.cut_at
        return small if cut_at is None else small & cut_at[..., None]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        made: Any = super().__reduce_ex__(protocol)  # a function that makes it, the function's arguments, its state
        return _new_cut, (self.native_class,), *made[2:]


def token_logs(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of tokens' factors of thresholds, between -1 and 1.

    Args:
        x: A projection's input before it is cut, [..., size].
        weights: The w and b of tanh(w x + b), [size + 1].

    Returns:
        float32 [..., 1].
    """
    w, b = weights.float().split([x.shape[-1], 1])
    return torch.tanh((x.float() * w).sum(-1, keepdim=True) + b)


_cut_classes: dict[type[nn.Module], type[nn.Module]] = {}  # by the class that cuts now


def cut_class(native: type[nn.Module]) -> type[nn.Module]:
    if native not in _cut_classes:
        _cut_classes[native] = type(f"Cut{native.__name__}", (CutInput, native), {"__module__": __name__})
    return _cut_classes[native]


def _new_cut(native: type[nn.Module]) -> nn.Module:
    """An empty module, for copy and pickle, which find no class that was made while running."""
    kind = cut_class(native)
    return kind.__new__(kind)


def cut_projections(model: nn.Module) -> list[CutInput]:
    """The projections of a model that cut their inputs, layer by layer."""
    return [module for module in model.modules() if is_cut(module)]  # type: ignore[misc]


def is_cut(module: nn.Module) -> bool:
    """Return whether a module is a CutInput."""
    return is_a(module, CutInput)


def projections(native: nn.Module) -> list[dict[str, nn.Module]]:
    """The projections of each decoder layer by name; of one with an adapter around it, the one inside."""
    base: Any = native
    parts = [(layer.self_attn, layer.mlp) for layer in base.base_model.layers]
    return [
        {name: getattr(module, "base_layer", module) for part in both for name, module in part.named_children()}
        for both in parts
    ]


def set_cuts(native: Any) -> None:
    """Let the projections that a model's config names cut their inputs, those of them that do not yet."""
    cuts = StochaConfig.from_dict(native.config.stocha).inputs
    if cuts is None:
        return
    cutting = native.__dict__.setdefault("cutting", Cutting(cuts.fallback or 0.0, cuts.fallback_tokens or 1))
    for index, layer in enumerate(projections(native)):
        for name in cuts.thresholds:
            module = layer[name]
            if not is_cut(module):
                threshold, centre = cuts.of(index, name)
                module.__dict__.update(
                    input_threshold=threshold,
                    input_centre=centre,
                    factors=(),
                    cutting=cutting,
                    cut_training="always" if cuts.train else "never",
                    cut_inference="always" if cuts.prefill else "decode",
                    cut_forced=None,
                    native_class=type(module),
                    input_major=None,
                )
                become(module, cut_class(type(module)))
    add_token_factors(native, cuts)


def add_token_factors(native: Any, cuts: InputCuts) -> None:
    """Give a model the weights of its tokens' factors, where it is to have and has none: zeros, so that these are 1.

    They are not the projections' own: quantizers exchange these while a folder is loaded.
    """
    leaders = cuts.leaders() if cuts.token_factors else {}
    for index, layer in enumerate(projections(native)):
        for name, leader in leaders.items():
            module: Any = layer[name]
            owner, key = factor_owner(native, index, leader), factor_name(leader)
            if key not in owner._parameters:
                like = next(tensor for tensor in native.parameters() if tensor.is_floating_point())
                owner.register_parameter(key, nn.Parameter(like.new_zeros(module.in_features + 1)))
            owner.get_parameter(key).requires_grad_(False)  # cuts have no gradient
            if is_cut(module):
                module.factors = owner, key


def factor_name(leader: str) -> str:
    """The name of tokens' factors in the module that a projection is in; it is the first that reads its input."""
    return leader + TOKEN_FACTOR


def factor_owner(native: Any, layer: int, projection: str) -> nn.Module:
    """The module of a layer that a projection is in, and that has its tokens' factors."""
    found: Any = native.base_model.layers[layer]
    return found.self_attn if projection in ATTENTION else found.mlp


@contextmanager
def cut_inputs(
    model: nn.Module, where: str, fallback: float | None = None, fallback_tokens: int | None = None
) -> Iterator[nn.Module]:
    """Force where a model cuts its projections' inputs, in train() and eval() alike; restored on exit.

    Args:
        model: A patched model whose config has input cuts.
        where: "always" at every token, "decode" where each sequence has one new token, "never".
        fallback: In eval(), a step with cuts whose most likely token has a lower probability is computed again
            without; 0: none is. None keeps the model's own.
        fallback_tokens: How many tokens such a step then computes, 1 to 8: its own and those before it, where they are
            known, as in generate(). None keeps the model's own.

    Raises:
        ValueError: For another `where`, `fallback` or `fallback_tokens`, or a model without input cuts.
    """
    cutting = cut_projections(model)
    require(bool(cutting), "the model", type(model).__name__, CUTTING)
    require(where in CUTS, "where the model cuts inputs", where, f"one of {', '.join(CUTS)}")
    require(fallback is None or is_fallback(fallback), "fallback", fallback, FALLBACK)
    count = fallback_tokens
    require(count is None or is_fallback_tokens(count), "fallback_tokens", count, FALLBACK_TOKENS)
    given = {key: value for key, value in (("fallback", fallback), ("tokens", count)) if value is not None}
    with holding(cutting, cut_forced=where), holding([cutting[0].cutting], **given):
        yield model


def saved_cuts(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Return a config's `inputs`, of the layers that the model has: some may be cut out."""
    set_cuts(model)
    kept = {"thresholds": "input_threshold", "centres": "input_centre"}
    return inputs | {
        key: {name: [getattr(layer[name], kept[key]) for layer in projections(model)] for name in inputs[key]}
        for key in kept.keys() & inputs.keys()
    }
