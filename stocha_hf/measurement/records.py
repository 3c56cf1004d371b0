"""What measuring returns: one dataclass for each kind of result, whose `to_dict` is what the verbs print with --json.

    evaluation.evaluate -> Evaluation        cett.at_cett -> Truncation         sampling.sample -> Samples
    evaluation.compare  -> Comparison        speed_models.benchmark -> Benchmark
    answers.evaluate_answers -> AnswersEvaluation
    affinity.affinity   -> Affinity          predictivity.predictivity -> Predictivity

They are kept apart from what computes them, because publishing/ checks that files hold one, and needs no torch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


class Record:
    """A dataclass of figures."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures under the names of their fields, nested ones too: what JSON holds of them."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class Shares(Record):
    """A share, from 0 to 1: its mean over layers, and each layer's."""

    mean: float
    per_layer: list[float]


@dataclass(frozen=True)
class AggregatedSparsity(Record):
    """Share of neurons that none of a window's first t tokens used (ReLU Strikes Back, arXiv 2310.04564).

    `tokens` lists the t: 1, 2, 4, ... and the window's length. `mean` is over layers, for each t; `per_layer` has a
    list of the same for each layer. `independent` is what `mean` would be if every token chose its neurons anew.
    """

    tokens: list[int]
    mean: list[float]
    independent: list[float]
    per_layer: list[list[float]]


@dataclass(frozen=True)
class BytesRead(Record):
    """Bytes of weights that a decode step of one token reads, in the dtypes that they are stored in.

    `blocks` is the decoder blocks' part and `lm_head` the head's; `step` is their sum. `dense_blocks` is what the
    blocks have, and `share` how much of that is read.
    """

    step: int
    blocks: int
    lm_head: int
    dense_blocks: int
    share: float


@dataclass(frozen=True)
class Fallback(Record):
    """How often a step was computed again without cuts, because its most likely token had a probability `below` this.

    `repeated` of `steps` were, a `share` of them. `cut_share` is how much of the blocks a step with cuts reads; the
    bytes read beside this record count the repeated steps too. `tokens` is how many tokens such a step computed.
    """

    below: float
    steps: int
    repeated: int
    share: float
    cut_share: float
    tokens: int = 1


@dataclass(frozen=True)
class Drafts(Record):
    """What lossless decoding took for `steps` tokens, the first of each text not counted.

    So many were `drafted`, and more `copied` from the text before, which takes no step; so many of all these were
    `accepted`, in `verifications` steps without cuts. `cut_share` is how much of the blocks a draft reads; the bytes
    read beside this record are of a token, drafts and verifications together.
    """

    steps: int
    drafted: int
    accepted: int
    verifications: int
    cut_share: float
    copied: int = 0


@dataclass(frozen=True)
class Evaluation(Record):
    """What `evaluate` found of a model.

    `perplexity` is exp of the mean loss in nats; `tokens` counts the windows' tokens; `activation` is the one that
    ran. `sparsity` is the share of the FFNs' hidden entries that are zero, `never_active` of neurons that never fired,
    `reuse` of firing neurons that had fired at the token before as well. `bytes_read` is None in files that were
    written before it was counted. `inputs_cut` says where projections cut their inputs, if they do; `fallback` what of
    that was computed again.
    """

    perplexity: float
    tokens: int
    activation: str
    sparsity: Shares
    never_active: Shares
    reuse: Shares
    aggregated_sparsity: AggregatedSparsity
    bytes_read: BytesRead | None = None
    inputs_cut: str | None = None
    fallback: Fallback | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures; of a model that cuts no inputs, without `inputs_cut`, and likewise `fallback`."""
        absent = [key for key in ("inputs_cut", "fallback") if getattr(self, key) is None]
        return {key: value for key, value in super().to_dict().items() if key not in absent}


@dataclass(frozen=True)
class Comparison(Record):
    """How far a model's predictions are from a baseline's.

    `kl` is the mean Kullback-Leibler divergence from the baseline to the model, in nats a token; `top1_agreement` the
    share of tokens whose most likely successor is the same.
    """

    kl: float
    top1_agreement: float


@dataclass(frozen=True)
class AnswersEvaluation(Record):
    """What a model is worth on the tokens of answers, whose prompts it read in full.

    `rows` are the answers and `tokens` theirs. `kl` and `top1_agreement` are those of a Comparison, and
    `baseline_perplexity` is the other model's; None where there was none. `fallback` is None where the model has none.
    """

    rows: int
    tokens: int
    perplexity: float
    bytes_read: BytesRead
    fallback: Fallback | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    baseline_perplexity: float | None = None


@dataclass(frozen=True)
class Truncation(Record):
    """A model truncated at a CETT: what is left of it, and each layer's threshold of a neuron's output."""

    cett: float
    perplexity: float
    sparsity: Shares
    thresholds: list[float]


@dataclass(frozen=True)
class Predictivity(Record):
    """How well predictors of a middle width `rank` foretell active neurons: see predictivity.py.

    `recall` is the share of active neurons that were predicted to be, `predicted_sparsity` the share of all that were
    predicted not to be, `sparsity` the share that was not.
    """

    rank: int
    recall: Shares
    predicted_sparsity: Shares
    sparsity: Shares


@dataclass(frozen=True)
class Affinity(Record):
    """How far active neurons stay the same and come together: see affinity.py.

    `reuse` has an entry for each of `spans`: of a token's active neurons, the share that was active at one of so many
    tokens before. `coactivation_gap` is how much more likely the likeliest companion of a neuron is than any neuron.
    """

    spans: list[int]
    reuse: list[Shares]
    coactivation_gap: Shares


@dataclass(frozen=True)
class SampledText(Record):
    """One sample: its text, its length in tokens, and its log-likelihood in nats a token."""

    text: str
    tokens: int
    log_likelihood: float


@dataclass(frozen=True)
class Samples(Record):
    """Samples of several prompts: `samples[i]` are those of prompt i.

    `log_likelihood` is the mean over all samples, in nats a token; `distinct_1` to `distinct_3` (0 to 1) and
    `self_bleu` (0 to 100; None for one sample a prompt) are means over prompts.
    """

    self_bleu: float | None
    log_likelihood: float
    distinct_1: float
    distinct_2: float
    distinct_3: float
    samples: list[list[SampledText]]


@dataclass(frozen=True)
class Benchmark(Record):
    """Dense against sparse decode of one model.

    `sparsity` is the share of zeros while decoding, `inputs_cut` that of projections' inputs that steps cut, where a
    model cuts them. `batch` sequences are decoded at once, `new_tokens` after `prompt` tokens. `dense_ms` and
    `sparse_ms` are milliseconds a step, `speedup` the median of their ratios within a round, `tokens_per_second` the
    whole batch's when sparse, `read_gbps` what the memory gave meanwhile. `weights` and `revision` name a checkpoint;
    `forced_sparsity` is the share that a model of random weights was made to have.
    """

    model: str
    dtype: str
    sparsity: float
    batch: int
    prompt: int
    new_tokens: int
    dense_ms: float
    sparse_ms: float
    speedup: float
    tokens_per_second: float
    achieved_gbps: float | None
    read_gbps: float
    threads: int
    weights: str | None = None
    revision: str | None = None
    forced_sparsity: float | None = None
    inputs_cut: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures; a checkpoint's have no `forced_sparsity`, random weights no `weights` or `revision`."""
        absent = ["forced_sparsity"] if self.forced_sparsity is None else ["weights", "revision"]
        absent += ["inputs_cut"] if self.inputs_cut is None else []
        return {key: value for key, value in super().to_dict().items() if key not in absent}
