"""The activation schedule: which activation, with which p, at each step of training.

A schedule is a list of phases over training progress (0 to 1). What it asks for follows from the step alone, so a
resumed run lands in the right phase and nothing needs to be stored. The optimizer and the learning-rate schedule run
on over a switch. In YAML, the schedules of Lomeli et al. (arXiv 2509.22358, sec. 3) and the annealed one:

    schedule:                                                   # StochA+FT, alpha = 0.2
      - {activation: stocha, p: 0.3, until: 0.8}
      - {activation: relu, until: 1.0}

    schedule:                                                   # Swi+FT, alpha = 0.1
      - {activation: silu, until: 0.9}
      - {activation: relu, until: 1.0}

    schedule:                                                   # annealed StochA, then ReLU
      - {activation: stocha, p: [0.5, 0.0], anneal: linear, until: 0.6}
      - {activation: relu, until: 1.0}

    schedule:                                                   # FATReLU thresholds raised, then held at 90% zeros
      - {activation: fatrelu, sparsity: [0.6, 0.9], until: 0.6}
      - {activation: fatrelu, sparsity: 0.9, until: 1.0}
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from stocha_hf.errors import StochaError
from stocha_hf.spec import StochaConfig
from stocha_hf.training.plain_yaml import plain_yaml

# Share of the way from p's first to its last value, at share t of the phase.
ANNEAL = {"linear": lambda t: t, "cosine": lambda t: (1 - math.cos(math.pi * t)) / 2}


class Moment(NamedTuple):
    """What a schedule asks for at one step: `phase` counts from 0, `sparsity` is None where thresholds stay."""

    phase: int
    activation: str
    p: float
    sparsity: float | None


@dataclass(frozen=True)
class Phase:
    """One activation up to training progress `until`.

    p and sparsity are numbers, or [first, last] to anneal between. `sparsity` is for fatrelu: the mean share of zeros
    over layers that thresholds are moved to during the phase; without it they stay what the checkpoint has.
    """

    activation: str
    until: float
    p: float | list[float] = 0.3
    sparsity: float | list[float] | None = None
    anneal: str = "linear"

    def __post_init__(self) -> None:
        for key in ("activation", "anneal"):
            if not isinstance(getattr(self, key), str):
                raise StochaError(f"{key} of a phase is {getattr(self, key)!r}: expected a name")
        for value in _ends("p", self.p):
            try:
                StochaConfig(activation=self.activation, p=value)
            except ValueError as error:
                raise StochaError(f"a phase of the schedule is wrong: {error}") from None
        if self.anneal not in ANNEAL:
            raise StochaError(f"anneal is {self.anneal!r}: expected one of {', '.join(ANNEAL)}")
        if self.sparsity is not None:
            self._check_sparsity()

    def _check_sparsity(self) -> None:
        if self.activation != "fatrelu":
            raise StochaError(f"a phase of {self.activation} has sparsity: expected it with fatrelu only")
        for value in _ends("sparsity", self.sparsity):
            if not isinstance(value, int | float) or not 0 < value < 1:
                raise StochaError(f"sparsity is {self.sparsity!r}: expected shares of zeros between 0 and 1")

    def at(self, value: Any, share: float) -> Any:
        """p or sparsity at a share (0 to 1) of this phase."""
        if not isinstance(value, list):
            return value
        first, last = value[0], value[-1]
        return first + (last - first) * ANNEAL[self.anneal](share)

    def __str__(self) -> str:
        """As a log says it: `stocha, p 0.5 to 0.0, until 0.5 of the run`."""
        words = [self.activation]
        for key, value in self.to_dict().items():
            if key in ("p", "sparsity"):
                words.append(f"{key} {' to '.join(map(str, _ends(key, value)))}")
        return ", ".join([*words, "to the end" if self.until == 1 else f"until {self.until} of the run"])

    def to_dict(self) -> dict[str, Any]:
        """The keys that have an effect, as parse takes them."""
        given = {"activation": self.activation, "until": self.until, "sparsity": self.sparsity}
        if self.activation in ("stocha", "mean"):
            given["p"] = self.p
        if any(isinstance(value, list) for value in given.values()):
            given["anneal"] = self.anneal
        return {key: value for key, value in given.items() if value is not None}


def _ends(name: str, value: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    if len(values) not in (1, 2):
        raise StochaError(f"{name} is {value!r}: expected a number, or [first, last] to anneal between")
    return values


@dataclass(frozen=True)
class Schedule:
    """Which activation training runs, from progress 0 to 1.

    Args:
        phases: in order; each ends at its `until`, the last one at 1.

    Raises:
        StochaError: where the phases do not cover training, or one of them is wrong.
    """

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        ends = [phase.until for phase in self.phases]
        if not ends or any(not isinstance(end, int | float) for end in ends) or ends[-1] != 1:
            raise StochaError(f"the schedule's phases end at {ends}: expected the last one to end at until: 1.0")
        if any(not before < after for before, after in zip([0, *ends], ends, strict=False)):
            raise StochaError(f"the schedule's phases end at {ends}: expected rising values between 0 and 1")

    @classmethod
    def parse(cls, phases: str | list[dict[str, Any]]) -> Schedule:
        """Make a schedule of a list of mappings, or of such a list as YAML or JSON text (for the command line).

        Args:
            phases: mappings with the keys activation and until, and if wanted p, sparsity and anneal.

        Raises:
            StochaError: for unknown or missing keys, and as the class does.
        """
        given = plain_yaml(phases, "the schedule") if isinstance(phases, str) else phases
        if not isinstance(given, list) or not all(isinstance(phase, dict) for phase in given):
            raise StochaError(f"schedule is {phases!r}: expected a list of {{activation, p, sparsity, anneal, until}}")
        known = set(Phase.__dataclass_fields__)
        for phase in given:
            if unknown := sorted(map(str, set(phase) - known)):
                raise StochaError(f"a phase has the key {unknown[0]!r}: expected {', '.join(sorted(known))}")
            if missing := sorted({"activation", "until"} - set(phase)):
                raise StochaError(f"the phase {phase} has no {missing[0]!r}: expected activation and until in each")
        return cls(tuple(Phase(**phase) for phase in given))

    def at(self, progress: float) -> Moment:
        """Return what training runs at a progress of 0 to 1; a phase ends just before its `until`."""
        ends = [phase.until for phase in self.phases]
        index = next((i for i, end in enumerate(ends) if progress < end), len(ends) - 1)
        start = ends[index - 1] if index else 0.0
        phase = self.phases[index]
        share = (progress - start) / (phase.until - start)
        return Moment(index, phase.activation, phase.at(phase.p, share), phase.at(phase.sparsity, share))

    def to_list(self) -> list[dict[str, Any]]:
        """The phases as config.json's history records them: what has an effect."""
        return [phase.to_dict() for phase in self.phases]
