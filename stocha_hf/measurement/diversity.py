"""How diverse several samples of one prompt are. Distinct-n counts tokens; self-BLEU compares texts, by sacrebleu.

    distinct([[5, 7, 5], [5, 7, 9]], n=2)       # 0.75: three different pairs of four
    self_bleu(["the cat sat down", "the cat sat up"])

sacrebleu is an optional dependency (`pip install 'stocha_hf[generate]'`), imported when self-BLEU is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from stocha_hf.errors import StochaError


def distinct(samples: Sequence[Sequence[int]], n: int) -> float:
    """Distinct-n (Li et al., arXiv 1510.03055): different n-grams of token ids by all n-grams of the samples, 0 to 1.

    0 where no sample has n tokens.
    """
    ngrams = [tuple(sample[i : i + n]) for sample in samples for i in range(len(sample) - n + 1)]
    return len(set(ngrams)) / max(len(ngrams), 1)


def self_bleu(texts: Sequence[str]) -> float:
    """Self-BLEU (Zhu et al., arXiv 1802.01886): BLEU of each text with all others as references, the mean, 0 to 100.

    100 means that all are equal. Raises StochaError for fewer than two texts and where sacrebleu is missing.
    """
    if len(texts) < 2:
        raise StochaError(f"self-BLEU was given {len(texts)} samples: expected at least 2")
    check_sacrebleu()
    from sacrebleu import sentence_bleu

    scores = []
    for i, text in enumerate(texts):
        others = [*texts[:i], *texts[i + 1 :]]
        # sacrebleu gives an empty text 0, also beside its equals
        scores.append(100.0 if text in others else sentence_bleu(text, others).score)
    return sum(scores) / len(scores)


def check_sacrebleu() -> None:
    """Raise StochaError if self-BLEU could not be computed: called before what takes long."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError:
        raise StochaError(
            "sacrebleu is missing: expected it for self-BLEU; run pip install 'stocha_hf[generate]'"
        ) from None
