"""How many tokens a round of lossless decoding drafts at most: as many as give the most tokens a second.

A draft also ends by itself, after a token that it doubts. Of each drafted token, a is the chance to be accepted, g to
be accepted and not doubted, and s not to be doubted. Then a draft of k tokens at most gives
1 + a (1 + g + ... + g^(k-1)) tokens on average, for 1 + s + ... + s^(k-1) steps of a draft and a verification of one
token more. Its time is a straight line through those that were taken, over the number of tokens rounded up to a power
of two, for which kernels are made.
"""

from __future__ import annotations

from collections.abc import Iterator

FIRST = (1, 3)  # tokens that the first rounds draft at most, to see what steps of several tokens take
DECAY = 0.95  # of what earlier rounds count, a round
PATIENCE = 32  # rounds after which a draft that did not pay is tried again


class Times:
    """What verifications took so far."""

    def __init__(self) -> None:
        self.moments = [0.0] * 5  # of verifications: 1, size, size^2, seconds, size * seconds

    def add(self, tokens: int, seconds: float) -> None:
        size = _size(tokens)
        new = (1.0, size, size**2, seconds, size * seconds)
        self.moments = [DECAY * old + value for old, value in zip(self.moments, new, strict=True)]

    def line(self) -> tuple[float, float]:
        """What a verification takes in any case, and for each token of its size."""
        total, first, second, seconds, cross = self.moments
        spread = total * second - first * first
        slope = max(0.0, (total * cross - first * seconds) / spread) if spread > 1e-9 else 0.0
        return max((seconds - slope * first) / total, 0.0), slope


class Pace:
    """What rounds took and gave so far. A round verifies `tokens` at most.

    `times` are those of another Pace's verifications, too, for drafts of another kind: these take no steps.
    """

    def __init__(self, tokens: int, times: Times | None = None) -> None:
        self.most = tokens - 1
        self.is_free, self.times = times is not None, times or Times()
        self.accepted, self.safe, self.tried = 1.8, 1.6, 2.0  # to begin with; `safe`: accepted and not doubted
        self.sure, self.all = 1.6, 2.0  # drafted and not doubted; drafted
        self.draft = [0.0, 0.0]  # steps, seconds
        self.rounds = self.idle = 0

    def drafts(self) -> int:
        """Return how many tokens the next round should draft at most."""
        if self.rounds < len(FIRST) or not (self.is_free or self.draft[0]):
            return min(FIRST[min(self.rounds, len(FIRST) - 1)], self.most)
        rates = list(self._rates())
        best = max(range(len(rates)), key=rates.__getitem__)
        return best if best or self.idle < PATIENCE else 1

    def drafted(self, steps: int, doubted: bool, seconds: float) -> None:
        """Count the steps of a draft, and whether it doubted the last one's token."""
        self.draft = [DECAY * old + new for old, new in zip(self.draft, (steps, seconds), strict=True)]
        if steps:
            self.all, self.sure = DECAY * self.all + steps, DECAY * self.sure + steps - doubted

    def verified(self, count: int, accepted: int, doubted: bool, seconds: float) -> None:
        """Count a verification of so many drafts, of which the first `accepted` were right; the last one doubted."""
        self.rounds += 1
        self.idle = 0 if count else self.idle + 1
        self.times.add(count + 1, seconds)
        if count:
            self.tried = DECAY * self.tried + min(accepted + 1, count)
            self.accepted = DECAY * self.accepted + accepted
            self.safe = DECAY * self.safe + accepted - (doubted and accepted == count)

    def passed(self) -> None:
        """Count a round for which there was a draft that would not have paid."""
        self.idle += 1

    def _rates(self) -> Iterator[float]:
        """The tokens a second of drafts of 0, 1, 2, ... tokens at most: a round waits for this, so in one pass."""
        base, slope = self.times.line()
        first, ratio = self.accepted / self.tried, self.safe / self.tried
        step, each = (0.0, 1.0) if self.is_free else (self.draft[1] / self.draft[0], self.sure / self.all)
        tokens, ended, reached = 1.0, 0.0, 1.0  # seconds of drafts that ended before, and the chance that one did not
        yield 1 / (base + slope)
        for count in range(1, self.most + 1):
            tokens += first * ratio ** (count - 1)
            seconds = count * step + base + slope * _size(count + 1)
            yield tokens / (ended + reached * seconds)
            ended += (1 - each) * reached * seconds
            reached *= each


def _size(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
