"""Compare exported GGUF files with the folders that they were made from, by llama.cpp itself.

For each FOLDER and precision: the perplexity of the same windows, the greedy continuation, and the tokens of a text
with numbers, spaces, emoji and other scripts. Greedy texts part at the first near tie, so ours also says of each token
that llama.cpp wrote whether it would have written it there, and how far behind its own choice it is if not (nats).

Ours is transformers' native class in float32, with the weights and inputs of matrices rounded as f16 and bf16 round
them; below these, with the weights that the file holds, and inputs in 8 bits in groups of 32, or of 256 for K-quants,
as llama.cpp's kernels take them. llama.cpp is built from the sdist of llama-cpp-python 0.3.36, target `llama`;
`llama-quantize` is llama_cpp_quantize.cpp, over its C API:

    python benchmarks/export_gguf.py FOLDER --precision f32 q4_0 --llama-cpp SOURCES --libraries BUILD/bin --json FILE
    python benchmarks/export_gguf.py tiny --architectures --llama-cpp SOURCES --libraries BUILD/bin --json FILE

With --architectures, FOLDER is only where tiny random models are made, one of each architecture and activation that
can be exported; with --train, where a small ReLU model is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_models import tiny_folders, trained_folder

from stocha_hf import export
from stocha_hf.conversion.export_metadata import plan_metadata
from stocha_hf.data import load_tokenizer

SCORES, QUANTIZE = (Path(__file__).with_name(f"llama_cpp_{name}.cpp") for name in ("scores", "quantize"))
ROUNDED = {"f16": torch.float16, "bf16": torch.bfloat16}
TEXT = (
    "I've 3 cats, 33 dogs and 3333333 birds;  we'll see  two\n\n  lines,\tTABS, don't SHOUT'LL. \u00dcber caf\u00e9, "
    "na\u00efve \u4f60\u597d\uff0c\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 "
    "\U0001f600\U0001f469\u200d\U0001f4bb "
    "def f(x):\n    return x**2 # 1,234.56\n\n\n\nThe end..."
)


def build(source: Path, program: Path, llama_cpp: Path, libraries: Path) -> Path:
    includes = [f"-I{llama_cpp / part}" for part in ("include", "ggml/include")]
    links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-lllama", "-lggml", "-lggml-base"]
    subprocess.run(["g++", "-O2", "-std=c++17", source, *includes, *links, "-o", program], check=True)
    return program


def llama_cpp(program: Path, model: Path, windows: torch.Tensor, new: int, folder: Path) -> dict[str, Any]:
    (folder / "ids").write_bytes(windows.numpy().astype(np.int32).tobytes())
    (folder / "text").write_text(TEXT, encoding="utf-8")
    threads = torch.get_num_threads()
    arguments = [model, folder / "ids", windows.shape[1], new, threads, folder / "text"]
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed on {model}: {done.stderr}")
    return json.loads(done.stdout)


@torch.no_grad()
def transformers(
    folder: Path, file: Path, windows: torch.Tensor, theirs: list[int], precision: str
) -> tuple[list[float], list[int], list[float]]:
    """Mean loss of each window, as many greedy tokens after the first as `theirs` are, and how far each of `theirs`
    is behind the choice here (0 where it is the choice).
    """
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if precision in ROUNDED:
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data = parameter.data.to(ROUNDED[precision]).float()
    elif precision != "f32":
        types = take_weights(model, file)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and precision != "f32":
            group = 0 if precision in ROUNDED else 256 if types[name].endswith("_K") else 32
            taken = partial(rounded, dtype=ROUNDED.get(precision), size=group)
            module.register_forward_pre_hook(lambda module, args, taken=taken: (taken(args[0]),))
    losses = []
    for window in windows:
        logits = model(window[None]).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, window[1:]).item())
    ids = model.generate(
        windows[:1],
        attention_mask=torch.ones_like(windows[:1]),
        max_new_tokens=len(theirs),
        min_new_tokens=len(theirs),
        do_sample=False,
        suppress_tokens=None,
        pad_token_id=0,
        eos_token_id=None,
    )
    length, wrote = windows.shape[1], torch.tensor(theirs)
    logits = model(torch.cat([windows[0], wrote])[None]).logits[0, length - 1 : -1].log_softmax(-1)
    behind = logits.amax(-1) - logits[torch.arange(len(theirs)), wrote]
    return losses, ids[0, length:].tolist(), behind.tolist()


def rounded(inputs: torch.Tensor, dtype: torch.dtype | None, size: int) -> torch.Tensor:
    """What llama.cpp's product takes of its inputs: in `dtype`, or in 8 bits in groups of `size`.

    The scale of 32 is float16, that of the 256 which K-quants take is float32.
    """
    if dtype is not None:
        return inputs.to(dtype).float()
    groups = inputs.unflatten(-1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    held = scale.half().float() if size == 32 else scale
    return ((groups / scale.clamp_min(1e-30)).round() * held).flatten(-2)


def take_weights(model: Any, file: Path) -> dict[str, str]:
    """Give a model the weights that a file of the architecture `smallthinker` holds, as they are read from it.

    Returns the file's type of each module's weight.
    """
    from gguf import GGUFReader, dequantize

    plan = plan_metadata(model.config.to_dict(), "relu", str(file))
    own, types = dict(model.named_parameters()), {}
    held = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    for name, theirs in plan.names.items():
        full = next((full for full in (f"model.{name}", name) if full in own), None)
        if full is not None:
            values = torch.from_numpy(dequantize(held[theirs].data, held[theirs].tensor_type).copy())
            own[full].data = values.reshape(own[full].shape)
            types[full.removesuffix(".weight")] = held[theirs].tensor_type.name
    types.setdefault("lm_head", types["model.embed_tokens"])  # tied
    return types


def compare(
    folder: Path, precision: str, activation: str | None, windows: torch.Tensor, new: int, program: Path, work: Path
) -> dict[str, Any]:
    file = work / "model.gguf"
    done = export(folder, file, precision=precision, activation=activation, overwrite=True)
    theirs = llama_cpp(program, file, windows, new, work)
    losses, greedy, behind = transformers(folder, file, windows, theirs["greedy"], precision)
    ours, llama = (math.exp(sum(values) / len(values)) for values in (losses, theirs["losses"]))
    same = next((i for i, pair in enumerate(zip(greedy, theirs["greedy"], strict=True)) if len({*pair}) > 1), new)
    record = {
        "model": json.loads((folder / "config.json").read_text())["model_type"],
        "folder": folder.name,
        "architecture": done.architecture,
        "activation": done.activation,
        "precision": precision,
        "megabytes": round(done.bytes / 1e6, 1),
        "windows": list(windows.shape),
        "perplexity": ours,
        "llama_cpp_perplexity": llama,
        "difference_percent": 100 * (llama / ours - 1),
        "greedy_tokens": new,
        "greedy_tokens_alike": same,
        "their_tokens_chosen_here": behind.count(0.0),
        "furthest_behind": max(behind),
        "tokens_of_text_alike": load_tokenizer(folder)(TEXT)["input_ids"] == theirs["tokens"],
    }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", nargs="+", default=["f32"])
    parser.add_argument("--activation", help="given to export")
    parser.add_argument("--architectures", action="store_true")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--llama-cpp", type=Path, required=True)
    parser.add_argument("--libraries", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file for each row")
    args = parser.parse_args()
    folders = tiny_folders(args.folder) if args.architectures else [args.folder]
    folders = [trained_folder(args.folder)] if args.train else folders
    with tempfile.TemporaryDirectory(prefix="stocha-export-") as name:
        work = Path(name)
        program = build(SCORES, work / "llama_cpp_scores", args.llama_cpp, args.libraries)
        build(QUANTIZE, work / "llama-quantize", args.llama_cpp, args.libraries)
        os.environ["PATH"] = f"{work}{os.pathsep}{os.environ['PATH']}"  # where stocha-export looks for it
        for folder in folders:
            tokenizer = load_tokenizer(folder)
            ids = torch.tensor(tokenizer(args.text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"])
            windows = ids[: args.windows * args.length].view(args.windows, args.length)
            for precision in args.precision:
                record = compare(folder, precision, args.activation, windows, args.new, program, work)
                with args.json.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(json.dumps(record))


if __name__ == "__main__":
    main()
