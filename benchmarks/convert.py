"""Time a conversion against `cp -r`, in alternation, and take its peak memory: a synthetic 4 GB Llama of eight shards.

Both write the same bytes to the same disk, and on a shared machine the disk's speed varies from run to run, so the two
alternate and the figure is the median of the pairs' ratios. Before each run the dirty pages are written back (sync),
outside the clock; after each the output is removed. Peak memory is VmHWM of the converting process.

    python benchmarks/convert.py [--gigabytes 4] [--pairs 21] [--folder /tmp]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HIDDEN, WIDTH = 4096, 14336
LAYER = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
SHARDS = 8
CONVERT = """
import re, sys
from stocha_hf.conversion.convert import convert
convert(sys.argv[1], sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def write_shard(path: Path, tensors: dict[str, tuple[int, int]]) -> None:
    """A safetensors file of random bf16 bytes, written in pieces: the benchmark itself needs no memory either."""
    header, offset = {}, 0
    for name, shape in tensors.items():
        size = 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for start in range(0, offset, len(block)):
            file.write(block[: offset - start])


def write_model(folder: Path, gigabytes: float) -> int:
    layers = max(SHARDS, round(gigabytes * 1e9 / (6 * HIDDEN * WIDTH)))
    names = {
        f"model.layers.{layer}.mlp.{part}.weight": (layer * SHARDS // layers, shape)
        for layer in range(layers)
        for part, shape in LAYER.items()
    }
    files = [f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors" for shard in range(SHARDS)]
    for shard, file in enumerate(files):
        write_shard(folder / file, {name: shape for name, (owner, shape) in names.items() if owner == shard})
    weight_map = {name: files[owner] for name, (owner, _) in names.items()}
    config = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(path.stat().st_size for path in folder.iterdir())


def timed_copy(source: Path, output: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, output], check=True)
    return time.perf_counter() - start


def timed_convert(source: Path, output: Path) -> tuple[float, float]:
    """Seconds of the whole process, Python's start included, and its peak memory in MB."""
    start = time.perf_counter()
    peak = subprocess.run([sys.executable, "-c", CONVERT, source, output], check=True, stdout=subprocess.PIPE).stdout
    return time.perf_counter() - start, int(peak) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as work:
        source, output = Path(work) / "source", Path(work) / "output"
        source.mkdir()
        size = write_model(source, args.gigabytes)
        print(f"{size / 1e9:.2f} GB in {SHARDS} shards")
        print(f"{'pair':>4}{'cp -r s':>10}{'convert s':>11}{'ratio':>8}{'peak MB':>9}")
        ratios, peaks = [], []
        for pair in range(args.pairs):
            runs = {}
            for name in ("cp", "convert") if pair % 2 else ("convert", "cp"):
                os.sync()
                runs[name] = (timed_copy if name == "cp" else timed_convert)(source, output)
                shutil.rmtree(output)
            copied, (converted, peak) = runs["cp"], runs["convert"]
            ratios.append(converted / copied)
            peaks.append(peak)
            print(f"{pair + 1:>4}{copied:>10.2f}{converted:>11.2f}{ratios[-1]:>8.3f}{peak:>9.0f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f}, peak memory {max(peaks):.0f} MB")


if __name__ == "__main__":
    main()
