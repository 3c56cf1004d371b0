"""Compare the memory of sparse and dense decoding: each loads the checkpoint and decodes in a process of its own.

    python benchmarks/decode_memory.py FOLDER [--json out.jsonl]        # a converted ReLU checkpoint
    python benchmarks/decode_memory.py --random 1b                      # a Llama of random weights, written first

Reported is the resident memory after decoding, mapped weight files included, and the largest at any time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

DECODE = """
import json, resource, sys, torch
from pathlib import Path
from stocha_hf import models as loading
folder, kind = sys.argv[1:]
model = loading.load_model(folder, dtype=torch.bfloat16).eval()
if kind == "dense":
    import transformers
    name = type(model).__name__.removeprefix("Stocha")
    del model
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.bfloat16).eval()
model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"resident_mb": int(status["VmRSS"].split()[0]) / 1e3,
                  "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3}))
"""


def measured(folder: str, kind: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", DECODE, folder, kind], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def write_random(shape: str, folder: str) -> None:
    import torch

    from stocha_hf.measurement.speed_models import random_llama
    from stocha_hf.modeling_stocha import StochaConfig
    from stocha_hf.patching import patch

    model = random_llama(shape, torch.bfloat16)
    patch(model, StochaConfig(activation="relu"))
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--random", choices=["1b", "3b"])
    parser.add_argument("--json", type=Path, help="a line is added to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stocha-memory-") as work:
        folder = args.folder or work
        if args.random:
            write_random(args.random, work)
        record: dict[str, Any] = {"model": f"random Llama {args.random}" if args.random else folder}
        record |= {kind: measured(folder, kind) for kind in ("dense", "sparse")}
    record["ratio"] = {key: record["sparse"][key] / record["dense"][key] for key in record["dense"]}
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(record) + "\n")
    print(record)


if __name__ == "__main__":
    main()
