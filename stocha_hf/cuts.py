"""What a folder that cuts projections' inputs may say of them, without importing torch: the `inputs` of its entry.

cuts_stocha.py, which ships with such folders and cuts, holds a copy of what is between the two marked lines.

    InputCuts({"down_proj": [0.1, 0.2]}).of(layer=1, projection="down_proj")    # (0.2, 0.0)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from stocha_hf.rules import Rules, are_numbers, check_keys, is_number, require, require_all

ALLOTMENTS = ("uniform", "greedy", "output")  # of the share of inputs to cut to projections
LEARNED = "learned"  # a threshold for each input instead, which takes scaled weights
LEARNED_INPUTS = "learned_inputs"  # the method of the stage in a history that scaled them, and trained none

# --- copied into cuts_stocha.py from here ---

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
