"""What the benchmarks of decoding share: timing in turn, ratios within a round, the memory's bandwidth.

Timings on shared machines drift by more than the differences that matter. So everything compared is run in turn,
round after round, a ratio is taken within each round, and medians are reported, also of the memory's read bandwidth,
which bounds every kernel here. speed_ffn.py measures one FFN, speed_models.py whole models.

    seconds = in_turn({"dense": dense, "sparse": sparse}, rounds=15)
    ratio(seconds, "dense", "sparse")
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from stocha_hf.decoding.build import kernels
from stocha_hf.progress import Progress

READ = 2**28  # bytes read for the bandwidth
DENSE = -1e30  # a threshold that every gate is above


def timed(function: Callable[[], object]) -> float:
    """Seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round, after one round that is not counted."""
    return measured_in_turn({name: partial(timed, function) for name, function in functions.items()}, rounds)


def measured_in_turn(measures: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each measure returned in each round, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in measures}
    for counted in Progress(range(rounds + 1), desc="Measuring", unit="round"):
        for name, measure in measures.items():
            seconds[name] += [measure()] * (counted > 0)
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median over rounds of one function's time over another's."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))


def read_memory() -> Callable[[], object]:
    """A function that reads READ bytes with all threads."""
    data, library = torch.zeros(READ, dtype=torch.uint8), kernels()
    if library is None:
        return data.view(torch.int64).sum
    return lambda: library.stocha_read(data.data_ptr(), READ, torch.get_num_threads())


def threshold_for(gates: torch.Tensor, share: float) -> float:
    """The threshold that zeroes this share of the gates."""
    count = round(share * gates.numel())
    return gates.flatten().float().kthvalue(count).values.item() if count else DENSE
