"""The mean of several checkpoints' weights and thresholds: it can have less perplexity than each of them alone.

Runs that began at one model and differ in seed, text, length or the teacher's share keep their neurons in place, so
that their mean is a model too, as sparse and as fast as each ("model soup", Wortsman et al., arXiv 2203.05482).
Nothing is trained, and memory is that of one tensor of each. docs/experiments/training.md says what it gained.

    stocha-average run-1 run-2 averaged
    stocha_hf.average(["run-1", "run-2"], "averaged", shares=[2, 1])
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.entry import read_entry, with_entry, with_stage
from stocha_hf.checkpoints.hashing import behaviour, weights_hash
from stocha_hf.checkpoints.headers import tensor_headers
from stocha_hf.checkpoints.inspection import check_folder
from stocha_hf.checkpoints.paths import local_path
from stocha_hf.checkpoints.quantized import refuse_quantized
from stocha_hf.checkpoints.staging import check_apart
from stocha_hf.conversion.output import check_output, write_checkpoint
from stocha_hf.conversion.source import Source, local_source, open_source
from stocha_hf.cuts import LEARNED_INPUTS
from stocha_hf.errors import StochaError
from stocha_hf.rules import is_number


@dataclass(frozen=True)
class Averaged:
    """What averaging wrote: the folder `output`, each source's share, of sum 1, and the names of the files."""

    output: str
    shares: list[float]
    files: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, as the command's --json prints them."""
        return asdict(self)


def average(
    sources: Sequence[str | Path],
    output: str | Path,
    *,
    shares: Sequence[float] | None = None,
    overwrite: bool = False,
) -> Averaged:
    """Write the weighted mean of several stocha checkpoints (Wortsman et al., arXiv 2203.05482).

    Means are taken in float32 and stored in the dtypes of the first source, whose other files come along.

    Args:
        sources: two or more folders or Hub ids of checkpoints that differ in weights and thresholds only.
        output: the folder to write, whole or not at all.
        shares: positive numbers, one per source, of any sum (default: all alike).
        overwrite: replace `output` if it is a checkpoint folder.

    Returns:
        What was written.

    Raises:
        StochaError: for sources that do not belong together, with nothing written.
    """
    output, parts = local_path(output), _parts(sources, shares)
    check_output(output, overwrite)
    for path in filter(None, map(local_source, map(str, sources))):  # before another one is downloaded
        check_folder(path, "a stocha checkpoint folder or a Hub id such as org/name")
    check_apart(output, [path for path in map(local_path, sources) if path.exists()])
    with ExitStack() as stack:
        found = [stack.enter_context(open_source(str(source), None, "bfloat16", output)) for source in sources]
        for source in found:
            check_apart(output, (source.folder / name for name in source.files))
        for other in found:
            _check_alike(found[0], other)
        config = _mean_config(found, parts)
        files = write_checkpoint(found[0], config, output, overwrite, partial(_mean_weights, found, parts))
    return Averaged(str(output), parts, files)


def _parts(sources: Sequence[str | Path], shares: Sequence[float] | None) -> list[float]:
    """The shares, of sum 1."""
    if len(sources) < 2:
        raise StochaError(f"{len(sources)} checkpoint was given: expected at least two, and then the folder to write")
    shares = [1.0] * len(sources) if shares is None else list(shares)
    numbers = all(is_number(share) and share > 0 for share in shares)
    total = sum(map(float, shares)) if numbers else math.nan
    parts = [share / total for share in shares] if 0 < total < math.inf else []
    if len(shares) != len(sources) or not all(parts) or not parts:
        given = " ".join(f"{share:g}" if isinstance(share, float) else repr(share) for share in shares)
        raise StochaError(
            f"shares are {given}: expected {len(sources)} positive numbers, one per checkpoint, with a finite sum"
        )
    return parts


def _check_alike(first: Source, other: Source) -> None:
    read_entry(other.config, other.id)
    refuse_quantized(other.config, other.id, "an average")
    if _scaled(other) != _scaled(first):
        raise StochaError(
            f"the weights of {other.id} and {first.id} have different scales, as the stages {LEARNED_INPUTS} "
            "of their histories say: expected runs from one folder with learned thresholds, or from ones without"
        )
    expected, given = (_comparable(source) for source in (first, other))
    for key in sorted(expected.keys() | given.keys()):
        if (have := given.get(key)) != (want := expected.get(key)):
            raise StochaError(
                f"{other.id} has {key} {have} where {first.id} has {want}: expected checkpoints that differ in "
                "weights and thresholds only, such as runs from one model"
            )


def _scaled(source: Source) -> list[dict[str, Any]]:
    """The history up to where learned thresholds scaled the weights last."""
    history = read_entry(source.config, source.id).history or []
    return history[
        : max((i + 1 for i, stage in enumerate(history) if stage.get("method") == LEARNED_INPUTS), default=0)
    ]


def _comparable(source: Source) -> dict[str, Any]:
    """What has to be the same: the config's entries that matter, and each tensor's shape."""
    config = behaviour(source.config)
    stocha = {f"stocha.{key}": value for key, value in config.pop("stocha").items() if key != "threshold"}
    shapes = {name: entry.shape for name, entry in tensor_headers(source.folder, source.files).items()}
    return config | stocha | shapes


def _mean_config(found: Sequence[Source], parts: Sequence[float]) -> dict[str, Any]:
    """The first config with the mean thresholds, and a history that says what was averaged."""
    entries = [read_entry(source.config, source.id) for source in found]
    layers = zip(*(entry.thresholds(found[0].config["num_hidden_layers"]) for entry in entries), strict=True)
    means = [sum(part * value for part, value in zip(parts, layer, strict=True)) for layer in layers]
    histories = [entry.history or [] for entry in entries]
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
    mean = replace(entries[0], threshold=means if len(set(means)) > 1 else means[0], history=histories[0][:common])
    return with_entry(found[0].config, with_stage(mean, stage))


def _mean_weights(found: Sequence[Source], parts: Sequence[float], folder: Path) -> None:
    """Overwrite the tensors of `folder`, a copy of the first source, with the means."""
    import torch  # which checking does not need

    from stocha_hf.checkpoints.tensors import Tensors
    from stocha_hf.progress import Progress

    tensors = [Tensors(source.folder) for source in found]
    means = Tensors(folder)
    for name in Progress(means.files, desc="Averaging", unit="tensor"):
        weighted = [part * one.read(name).float() for part, one in zip(parts, tensors, strict=True)]
        mean = torch.stack(weighted).sum(0)
        if not mean.to(means.read(name).dtype).isfinite().all():
            raise StochaError(f"the mean of {name} is not finite: expected numbers; check the checkpoints' weights")
        means.overwrite(name, mean)
