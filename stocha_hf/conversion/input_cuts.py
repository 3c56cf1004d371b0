"""Input cuts: a conversion that lets projections skip the small entries of their inputs.

Thresholds are measured on calibration text that runs through the model as it will infer
(measurement/selection/input_cuts.py), and stand in config.json under `stocha.inputs`. The custom class cuts; the
native class computes every input in full. No weight changes, but where thresholds are learned (learned_cuts.py).

    stocha-convert SOURCE OUTPUT --inputs 0.4 --calibrate text.parquet
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from stocha_hf.checkpoints.entry import read_entry, with_entry
from stocha_hf.checkpoints.names import public_name
from stocha_hf.conversion.source import Source
from stocha_hf.cuts import (
    ALLOTMENTS,
    ATTENTION,
    FALLBACK,
    FALLBACK_TOKENS,
    LEARNED,
    PROJECTIONS,
    is_fallback,
    is_fallback_tokens,
)
from stocha_hf.errors import StochaError
from stocha_hf.rules import is_number
from stocha_hf.spec import ACTIVATIONS, StochaConfig

DEFAULT_TOKENS = 16_384  # tens of millions of entries for each threshold
WINDOW = 1024  # tokens


@dataclass(frozen=True)
class Calibration:
    """What to cut, and the text to measure thresholds on.

    `share` is the share of input entries to cut; 0 takes a source's cuts off, and then nothing else is given. `data`
    is a file, folder or Hub data set (stocha_hf/data/rows.py), `tokens` how many of its tokens to use, `of` the
    projections to cut (None: all, or attention's where the activation makes the FFN sparse), `allotment` one of
    ALLOTMENTS or LEARNED. `prefill` and `train` are those of InputCuts. Raises StochaError.
    """

    share: float
    data: str | None = None
    tokens: int | None = None
    of: Collection[str] | None = None
    allotment: str | None = None
    prefill: bool = False
    train: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.share) or not 0 <= self.share < 1:
            raise StochaError(
                f"the share of inputs to cut is {self.share!r}: expected a share between 0 and 1, or 0 to cut none"
            )
        if not self.share and (given := [key for key in OPTIONS if getattr(self, key)]):
            raise StochaError(
                f"{given[0]} was given with a share of 0 inputs to cut, which takes cuts off: expected a share above 0"
            )
        if self.share and (self.data is None or not str(self.data).strip()):
            raise StochaError(
                f"a share of {self.share:g} inputs was given without text to measure thresholds on: expected a file, "
                "a folder or a Hub data set; give --calibrate DATA"
            )
        if self.tokens is not None and (type(self.tokens) is not int or self.tokens < 1):
            raise StochaError(
                f"the number of tokens to calibrate on is {self.tokens!r}: expected a whole number of at least 1"
            )
        if self.of is not None and (not self.of or isinstance(self.of, str) or not {*self.of} <= {*PROJECTIONS}):
            raise StochaError(
                f"the projections to cut are {self.of!r}: expected one or more of {', '.join(PROJECTIONS)}"
            )
        if self.allotment not in (None, *ALLOTMENTS, LEARNED):
            raise StochaError(
                f"the allotment is {self.allotment!r}: expected one of {', '.join((*ALLOTMENTS, LEARNED))}"
            )
        if self.allotment == LEARNED and self.of is not None:
            raise StochaError(
                f"inputs_of {' '.join(self.of)} was given with inputs_allotment {LEARNED}: expected one of them, as "
                "thresholds are learned for all projections together"
            )


OPTIONS = ("data", "tokens", "of", "allotment", "prefill", "train")  # that go with a share above 0


def with_cuts(source: Source, config: dict[str, Any], options: Calibration) -> dict[str, Any]:
    """Return a converted config.json with input cuts, calibrated on the source's weights; with a share of 0, without.

    Raises StochaError for text of less than one window, and a model whose inputs are not finite.
    """
    entry = replace(read_entry(config, source.id), inputs=None)
    if options.share:
        entry = replace(entry, inputs=_calibrated(source, entry, options))
    return with_entry(config, entry)


@dataclass(frozen=True)
class FallbackOptions:
    """The fallback that input cuts are to have: `fallback` and `tokens` as InputCuts has them, None as they are.

    A fallback of 0 takes it off, and 1 token the tokens before a step's own. Raises StochaError.
    """

    fallback: float | None
    tokens: int | None

    def __post_init__(self) -> None:
        if self.fallback is not None and not is_fallback(self.fallback):
            raise StochaError(f"inputs_fallback is {self.fallback!r}: expected {FALLBACK}")
        if self.tokens is not None and not is_fallback_tokens(self.tokens):
            raise StochaError(f"inputs_fallback_tokens is {self.tokens!r}: expected {FALLBACK_TOKENS}")
        if self.tokens is not None and self.fallback == 0:
            raise StochaError(
                f"inputs_fallback_tokens {self.tokens} was given with inputs_fallback 0, which takes the fallback "
                "off: expected one of them"
            )

    @property
    def given(self) -> str:
        """What was given, for a message; empty if nothing was."""
        tokens = "" if self.tokens is None else f"inputs_fallback_tokens {self.tokens}"
        return tokens if self.fallback is None else f"inputs_fallback {self.fallback:g}"

    def check(self, share: float | None) -> None:
        """Raise StochaError where this is of cuts that are taken off."""
        if self.given and share == 0:
            raise StochaError(
                f"{self.given} was given with a share of 0 inputs to cut, which takes cuts off: expected one of them"
            )

    def applied(self, config: dict[str, Any], where: str) -> dict[str, Any]:
        """Return a converted config.json with it. Raises StochaError without cuts, or for tokens of no fallback."""
        if not self.given:
            return config
        entry = read_entry(config, where)
        if entry.inputs is None:
            raise StochaError(
                f"{self.given} was given for {where}, which cuts no inputs: expected a folder that does, or inputs, "
                "the share to cut"
            )
        fallback = entry.inputs.fallback if self.fallback is None else self.fallback
        if not fallback and self.tokens is not None:
            raise StochaError(
                f"{self.given} was given for {where}, which has no fallback: expected inputs_fallback, a probability, "
                "with it"
            )
        tokens = entry.inputs.fallback_tokens if self.tokens is None else self.tokens
        kept = tokens if fallback and tokens != 1 else None
        cuts = replace(entry.inputs, fallback=fallback or None, fallback_tokens=kept)
        return with_entry(config, replace(entry, inputs=cuts))


def _calibrated(source: Source, entry: StochaConfig, options: Calibration) -> Any:
    from stocha_hf.data import calibration_windows  # none of this is needed for copying
    from stocha_hf.measurement.selection.input_cuts import calibrate_inputs

    length = min(WINDOW, source.config.get("max_position_embeddings") or WINDOW)
    tokens = max(options.tokens or DEFAULT_TOKENS, length)
    windows = calibration_windows(str(options.data), source.folder, tokens, length, options.seed)
    if not windows.numel():
        raise StochaError(
            f"{options.data} has fewer than {length} tokens: expected at least one window of text to calibrate "
            "thresholds on"
        )
    of = options.of or (ATTENTION if is_sparse(entry) else PROJECTIONS)
    allotment = options.allotment or ALLOTMENTS[0]
    used = {"data": public_name(str(options.data)), "tokens": windows.numel(), "seed": options.seed}
    return calibrate_inputs(
        uncut_model(source, entry),
        windows,
        options.share,
        of,
        allotment,
        prefill=options.prefill,
        train=options.train,
        calibration=used | {"allotment": allotment},
    )


def is_sparse(entry: StochaConfig) -> bool:
    """Return whether the activation in eval() mode makes the FFN sparse by its gate."""
    return ACTIVATIONS[str(entry.inference)].native not in (None, entry.base)


def uncut_model(source: Source, entry: StochaConfig, dtype: str = "auto") -> Any:
    """The source's model as it will infer, without cuts, in eval mode: on a GPU where there is one.

    In `dtype`, "auto" being config.json's; in float32 where the processor has no products in that.
    """
    import torch

    from stocha_hf.models import load_model
    from stocha_hf.patching import patch, unpatch
    from stocha_hf.quantization_stocha import computing_dtype

    model = load_model(str(source.folder), dtype=dtype).to("cuda" if torch.cuda.is_available() else "cpu")
    model.to(computing_dtype(next(model.parameters())))  # not bfloat16 on a processor that is slow in it
    unpatch(model)  # of what the source infers with
    patch(model, entry)  # type: ignore[arg-type] # inside the package there is one StochaConfig
    return model.eval()


def check_uncut(entry: StochaConfig, where: str) -> None:
    """Raise StochaError for an entry with input cuts, whose weights a refit would fit without them."""
    if entry.inputs is not None:
        raise StochaError(
            f"{where} cuts its projections' inputs: expected a model that computes them in full; convert it with "
            "--inputs 0 first, refit it, and convert the result with --inputs"
        )
