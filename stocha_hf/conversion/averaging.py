"""The mean of several checkpoints' weights and thresholds: it can have less perplexity than each of them alone.

Runs that began at one model and differ in seed, text, length or the teacher's share keep their neurons in place, so
that their mean is a model too, as sparse and as fast as each ("model soup", Wortsman et al., arXiv 2203.05482).
Nothing is trained, and memory is that of one tensor of each. docs/experiments/training.md says what it gained.

    stocha-average run-1 run-2 averaged
    from stocha_hf.conversion.averaging import average; average(["run-1", "run-2"], "averaged", shares=[2, 1])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.hashing import behaviour, weights_hash
from stocha_hf.checkpoints.inspection import tensor_headers
from stocha_hf.conversion.convert import check_output, write_checkpoint
from stocha_hf.conversion.source import Source, open_source
from stocha_hf.errors import StochaError


def average(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    shares: Sequence[float] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the weighted mean of two or more stocha checkpoints (folders or Hub ids) to the folder `output`.

    `shares` are positive numbers, one per source, of any sum (default: all alike). Means are taken in float32 and
    stored in the dtypes of the first source, whose tokenizer and other files come along. Returns output, shares and
    files. Raises StochaError, with nothing written, unless the sources differ in weights and thresholds only.
    """
    output, parts = Path(output), _parts(sources, shares)
    check_output(output, overwrite)
    with ExitStack() as stack:
        found = [stack.enter_context(open_source(str(source), None, "bfloat16")) for source in sources]
        for other in found:
            _check_alike(found[0], other)
        config = _mean_config(found, parts)
        files = write_checkpoint(found[0], config, output, overwrite, partial(_mean_weights, found, parts))
    return {"output": str(output), "shares": parts, "files": files}


def _parts(sources: Sequence[str | Path], shares: Sequence[float] | None) -> list[float]:
    """The shares, of sum 1."""
    if len(sources) < 2:
        raise StochaError(f"{len(sources)} checkpoint was given: expected at least two, and then the folder to write")
    shares = [1.0] * len(sources) if shares is None else list(shares)
    if len(shares) != len(sources) or not all(math.isfinite(share) and share > 0 for share in shares):
        given = " ".join(f"{share:g}" for share in shares)
        raise StochaError(f"shares are {given}: expected {len(sources)} positive numbers, one per checkpoint")
    return [share / sum(shares) for share in shares]


def _check_alike(first: Source, other: Source) -> None:
    if "stocha" not in other.config:
        raise StochaError(f"{other.id} is no stocha checkpoint: expected one that stocha-convert or training wrote")
    expected, given = (_comparable(source) for source in (first, other))
    for key in sorted(expected.keys() | given.keys()):
        if (have := given.get(key)) != (want := expected.get(key)):
            raise StochaError(
                f"{other.id} has {key} {have} where {first.id} has {want}: expected checkpoints that differ in "
                "weights and thresholds only, such as runs from one model"
            )


def _comparable(source: Source) -> dict[str, Any]:
    """What has to be the same: the config's entries that matter, and each tensor's shape."""
    config = behaviour(source.config)
    stocha = {f"stocha.{key}": value for key, value in config.pop("stocha").items() if key != "threshold"}
    return config | stocha | {name: shape for name, (shape, _) in tensor_headers(source.folder, source.files).items()}


def _mean_config(found: Sequence[Source], parts: Sequence[float]) -> dict[str, Any]:
    """The first config with the mean thresholds, and a history that says what was averaged."""
    entries = [source.config["stocha"] for source in found]
    layers = zip(*map(_per_layer, found), strict=True)
    means = [sum(part * value for part, value in zip(parts, layer, strict=True)) for layer in layers]
    histories = [entry.get("history") or [] for entry in entries]
    common = 0
    while all(len(history) > common and history[common] == histories[0][common] for history in histories):
        common += 1
    stage = {
        "method": "average",
        "of": [
            {"share": part, "weights": weights_hash(source.folder), "history": history[common:]}
            for part, source, history in zip(parts, found, histories, strict=True)
        ],
    }
    changes = {"threshold": means if len(set(means)) > 1 else means[0], "history": [*histories[0][:common], stage]}
    return found[0].config | {"stocha": entries[0] | changes}


def _per_layer(source: Source) -> list[float]:
    threshold = source.config["stocha"].get("threshold", 0.0)
    return threshold if isinstance(threshold, list) else [threshold] * source.config["num_hidden_layers"]


def _mean_weights(found: Sequence[Source], parts: Sequence[float], folder: Path) -> None:
    """Overwrite the tensors of `folder`, a copy of the first source, with the means."""
    import torch  # which checking does not need
    from tqdm import tqdm

    from stocha_hf.checkpoints.tensors import Tensors

    tensors = [Tensors(source.folder) for source in found]
    means = Tensors(folder)
    for name in tqdm(means.files, desc="Averaging", unit="tensor", disable=None, leave=False):
        weighted = [part * one.read(name).float() for part, one in zip(parts, tensors, strict=True)]
        means.overwrite(name, torch.stack(weighted).sum(0))
