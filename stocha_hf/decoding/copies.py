"""Drafts that take no step: what stood in the text behind its last tokens when they stood there before.

Answers repeat their question, and code its names. Where they do, such drafts are mostly right, and cost nothing but
their share of a verification (compare prompt lookup decoding, github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

GRAM = 4  # tokens that must have stood in the text before


class Copies:
    """A text that grows, and where in it each GRAM tokens stood last."""

    def __init__(self, text: list[int]) -> None:
        self.text: list[int] = []
        self.behind: dict[tuple[int, ...], int] = {}  # the place behind them
        self.read(text)

    def read(self, tokens: list[int]) -> None:
        """Let the text go on with these."""
        for token in tokens:
            if len(self.text) >= GRAM:  # now something stands behind them
                self.behind[tuple(self.text[-GRAM:])] = len(self.text)
            self.text.append(token)

    def drafts(self, most: int) -> list[int]:
        """Return what stood behind the last tokens before, so many tokens at most; none if they are new.

        Where it reaches the text's end, the draft goes on with itself: a text that loops goes on looping.
        """
        place = self.behind.get(tuple(self.text[-GRAM:]))
        if place is None:
            return []
        distance, found = len(self.text) - place, self.text[place : place + most]
        while len(found) < most:
            found.append(found[-distance])
        return found
