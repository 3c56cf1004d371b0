"""Time decoding against llama.cpp in bfloat16, 8 and 4 bits, which is what a CPU user would take instead: in one run.

All are decoded in turn, round after round, greedily, with the same number of threads; a ratio is taken within each
round. Ours by generate(), llama.cpp by its C API (llama_cpp.c: the Python binding takes milliseconds a token). Shapes
of random weights have a forced share of zeros on our side; llama.cpp is dense and reads all weights either way, so its
random weights are made directly in its formats. Real models are a converted folder, and a GGUF file that llama.cpp's
own quantizer turns into each format. With `--sparsity own` a folder, such as a refitted one, runs its own activation;
with `--text` the perplexity of both sides' weights is measured too, llama.cpp's by PyTorch in float32.

llama.cpp is built from llama-cpp-python's source, for this machine:

    pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36 && tar xzf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DLLAMA_BUILD_COMMON=OFF -DBUILD_SHARED_LIBS=ON
    cmake --build build --target llama
    python benchmarks/decode_llama_cpp.py --llama llama_cpp_python-0.3.36/vendor/llama.cpp --build build \
        --random 1b --sparsity 0.9 --ours 4 --theirs Q4_0 --json benchmarks/results/decode_llama_cpp.jsonl
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from gate_prediction import rows_of, sharing
from transformers import AutoModelForCausalLM

from stocha_hf.checkpoints.inspection import read_config
from stocha_hf.checkpoints.quantized import read_quantization
from stocha_hf.conversion.gguf import check_gguf, dequantize
from stocha_hf.data import text_windows
from stocha_hf.decoding.gate_prediction import predict_gates
from stocha_hf.measurement.evaluation import evaluate
from stocha_hf.measurement.speed import READ
from stocha_hf.measurement.speed_models import (
    SHAPES,
    VOCABULARIES,
    decode_seconds,
    decoding_in_turn,
    force_sparsity,
)
from stocha_hf.modeling_stocha import StochaConfig, stocha_mlps
from stocha_hf.models import load_model
from stocha_hf.patching import patch
from stocha_hf.quantization_stocha import IN_8_BITS, Quantization, StochaQuantConfig, exchange

HERE = Path(__file__).parent
VERSION = "llama-cpp-python 0.3.36"
TYPES = {"BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama_ftype
BLOCKS = {"BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q6_K": (256, 210)}  # weights, bytes
SCALES = {"Q8_0": 0, "Q4_0": 0, "Q6_K": 208}  # where a block's float16 scale is


class Llama:
    """llama.cpp with one file."""

    def __init__(self, library: ctypes.CDLL, path: Path, threads: int) -> None:
        self.library, self.handle = library, library.open_model(str(path).encode(), threads)
        if not self.handle:
            raise SystemExit(f"llama.cpp cannot load {path}")

    def seconds(self, prompt: list[int], steps: int, together: int, of_process: bool) -> float:
        """Seconds of a step of `together` tokens after a prompt."""
        given, chosen = (ctypes.c_int32 * len(prompt))(*prompt), (ctypes.c_int32 * steps)()
        return self.library.decode(self.handle, given, len(prompt), steps, together, chosen, of_process)


def shim(source: Path, build: Path, folder: Path) -> ctypes.CDLL:
    """llama_cpp.c, compiled against llama.cpp's headers and library."""
    target, libraries = folder / "shim.so", build / "bin"
    includes = [f"-I{source / part}" for part in ("include", "ggml/include")]
    linked = [f"-L{libraries}", "-lllama", f"-Wl,-rpath,{libraries.resolve()}"]
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", *includes, str(HERE / "llama_cpp.c"), "-o", str(target), *linked],
        check=True,
    )
    library = ctypes.CDLL(str(target))
    library.open_model.restype, library.open_model.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int]
    library.decode.restype = ctypes.c_double
    library.decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_void_p, ctypes.c_int]
    library.quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int]
    return library


def random_gguf(name: str, type_name: str, path: Path) -> None:
    """A GGUF file of random blocks, of the types that llama.cpp's quantizer chooses where embeddings are tied."""
    from gguf import GGMLQuantizationType, GGUFWriter

    hidden, width, layers, heads, key_heads = SHAPES[name]
    head, vocabulary = hidden // heads, VOCABULARIES[name]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("no_vocab")
    random = np.random.default_rng(0)

    def add(key: str, rows: int, columns: int, kind: str) -> None:
        if kind == "Q6_K" and columns % 256:  # as the quantizer falls back
            kind = "Q8_0"
        weights, size = BLOCKS[kind]
        blocks = random.integers(0, 256, (rows * columns // weights, size), dtype=np.uint8)
        if kind == "BF16":
            blocks = (random.standard_normal((rows * columns, 1), dtype=np.float32) * 0.02).view(np.uint8)[:, 2:]
        else:
            at = SCALES[kind]
            blocks[:, at : at + 2] = np.frombuffer(np.float16(0.002).tobytes(), dtype=np.uint8)
        data = np.ascontiguousarray(blocks).reshape(rows, -1)
        writer.add_tensor(key, data, raw_dtype=GGMLQuantizationType[kind])

    add("token_embd.weight", vocabulary, hidden, "Q6_K" if type_name.startswith("Q4") else type_name)
    writer.add_tensor("output_norm.weight", np.ones(hidden, dtype=np.float32))
    for i in range(layers):
        for key in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{key}.weight", np.ones(hidden, dtype=np.float32))
        for key, rows, columns in (
            ("attn_q", heads * head, hidden),
            ("attn_k", key_heads * head, hidden),
            ("attn_v", key_heads * head, hidden),
            ("attn_output", hidden, heads * head),
            ("ffn_gate", width, hidden),
            ("ffn_up", width, hidden),
            ("ffn_down", hidden, width),
        ):
            add(f"blk.{i}.{key}.weight", rows, columns, type_name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def random_model(
    name: str,
    bits: int,
    head_bits: int,
    activation: str = "relu",
    transposed: tuple[str, ...] = Quantization.transposed,
) -> Any:
    """A patched Llama of a shape with random weights, bfloat16 or made in 8 or 4 bits with a row an input in some."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, width, layers, heads, key_heads = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCABULARIES[name], hidden_size=hidden, intermediate_size=width,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=hidden // heads,
        tie_word_embeddings=True, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)
    if bits < 16:
        named = IN_8_BITS if head_bits == 8 else ("v_proj",)
        exchange(model, Quantization(bits=bits, in_8_bits=named, transposed=transposed))
    model = model.to_empty(device="cpu")
    model.tie_weights()
    model.model.rotary_emb.__init__(config)
    for parameter in model.parameters():
        parameter.data.fill_(1.0) if parameter.dim() == 1 else parameter.data.normal_(0, 0.02)
    for key, buffer in model.named_buffers():
        if key.endswith(".codes"):
            low, high = (0, 256) if buffer.dtype == torch.uint8 else (-127, 128)
            buffer.copy_(torch.randint(low, high, buffer.shape, dtype=buffer.dtype))
        elif key.endswith(".scale"):
            buffer.fill_(0.02 / 64 if buffer.dtype == torch.float16 else 15 << 11 | 60)  # 2^-9, zero 7.5
    patch(model, StochaConfig(activation=activation))
    return model.eval()


def cut_shares(model: Any) -> dict[str, float]:
    """The shares of inputs that a folder's projections cut, by name."""
    found = (getattr(model.config, "stocha", None) or {}).get("inputs") or {}
    return dict.fromkeys(found.get("thresholds", ()), found.get("share") or 0.0)


def step_bytes(model: Any, zeros: float) -> int:
    """Bytes of weights that a step of one token reads."""
    total, tied, shares = 0, model.config.tie_word_embeddings, cut_shares(model)
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if not (last.endswith("_proj") or last == ("embed_tokens" if tied else "lm_head")):
            continue
        tensors = [module.codes, module.scale] if hasattr(module, "codes") else [module.weight]
        size = sum(tensor.nbytes for tensor in tensors)
        if tensors[0].dim() == 3:  # a head in two planes, of which a greedy step reads one
            size -= tensors[0].nbytes // 2
        if getattr(module, "transposed", True):  # else what is cut is read all the same
            size -= round(size * shares.get(last, 0.0))
        total += round(size * (1 - zeros)) if last in ("up_proj", "down_proj") else size
    return total


def ours(args: argparse.Namespace, bits: int, tokens: torch.Tensor) -> Any:
    """The model to time: of the random shape, or of the folder, quantized to 8 or 4 bits."""
    if args.random:
        dense = args.sparsity is None  # SiLU then, under which folders have a row an output in down_proj too
        model = random_model(args.random, bits, args.head_bits, *(("silu", ()) if dense else ()))
    elif bits == 16 or read_quantization(read_config(Path(args.folder)), args.folder) is not None:
        model = load_model(args.folder, dtype=torch.bfloat16)
    else:
        in_8_bits = IN_8_BITS if args.head_bits == 8 else ("v_proj",)
        config = StochaQuantConfig(bits=bits, in_8_bits=in_8_bits)
        model = load_model(args.folder, dtype=torch.bfloat16, quantization_config=config)
    model.eval()
    if args.sparsity == "own":
        return model
    if args.sparsity is not None:
        force_sparsity(model, args.sparsity, tokens)
    else:
        for mlp in stocha_mlps(model):
            mlp.inference = mlp.base
    return model


def together_seconds(model: Any, tokens: torch.Tensor, steps: int, together: int, now: Callable[[], float]) -> float:
    """Seconds of a step of several tokens of one sequence, as verifying a draft takes."""
    with torch.inference_mode():
        cache = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
        start = now()
        for _ in range(steps):
            model(tokens[:, :together], past_key_values=cache)
        return (now() - start) / steps


@torch.no_grad()
def quality(model: Any, windows: torch.Tensor) -> dict[str, float]:
    """Perplexity on token ids [windows, length], and zeros of the hidden vectors where the model is patched."""
    if stocha_mlps(model):
        found = evaluate(model, windows)
        return {"perplexity": found.perplexity, "zeros": found.sparsity.mean}
    losses = [F.cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]).item() for row in windows]
    return {"perplexity": math.exp(statistics.fmean(losses))}


def of_gguf(path: Path, windows: torch.Tensor) -> dict[str, float]:
    """The quality of a GGUF file's weights, dequantized."""
    with tempfile.TemporaryDirectory(prefix="stocha-dequantized-") as folder:
        dequantize(check_gguf(path), Path(folder), "float32")
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return quality(model, windows)


@dataclass
class Prepared:
    """By name: functions that return seconds of a step, the bytes that each reads, functions for the quality, and what
    gate prediction finds.
    """

    measures: dict[str, Callable[[], float]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    qualities: dict[str, Callable[[], dict[str, float]]] = field(default_factory=dict)
    gates: dict[str, dict[str, float]] = field(default_factory=dict)


def prepared(args: argparse.Namespace, folder: Path) -> Prepared:
    """All sides; files go to a folder."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    tokens = torch.randint(1000, (1, args.prompt))
    now = time.process_time if args.cpu else time.perf_counter
    windows = text_windows(args.text, Path(args.folder), 512, args.windows) if args.text else None
    done = Prepared()
    library = shim(args.llama, args.build, folder)
    for kind in args.theirs:
        path = folder / f"{kind}.gguf"
        if args.random:
            random_gguf(args.random, kind, path)
        elif library.quantize(str(args.gguf).encode(), str(path).encode(), TYPES[kind]):
            raise SystemExit(f"llama.cpp cannot turn {args.gguf} into {kind}")
        done.sizes[kind] = path.stat().st_size
        llama = Llama(library, path, args.threads)
        done.qualities[kind] = partial(of_gguf, path, windows)
        done.measures[kind] = partial(llama.seconds, tokens[0].tolist(), args.new, args.together, args.cpu)
    for bits in args.ours:
        model = ours(args, bits, tokens)
        zeros = args.sparsity or 0.0
        if zeros == "own":
            zeros = evaluate(model, windows if windows is not None else tokens).sparsity.mean
        done.sizes[f"ours {bits}"] = step_bytes(model, zeros)
        done.qualities[f"ours {bits}"] = partial(quality, model, windows)
        if args.together == 1:
            done.measures[f"ours {bits}"] = partial(decode_seconds, model, tokens, args.new, now)
        else:
            done.measures[f"ours {bits}"] = partial(together_seconds, model, tokens, args.new, args.together, now)
        if args.recall:
            predicted = sharing(model)
            predict_gates(predicted, args.recall)
            done.gates[f"ours {bits} predicted"] = found = rows_of(predicted, tokens)
            done.sizes[f"ours {bits} predicted"] = done.sizes[f"ours {bits}"] + copy_bytes(model, predicted, found)
            done.measures[f"ours {bits} predicted"] = partial(decode_seconds, predicted, tokens, args.new, now)
    return done


def copy_bytes(model: Any, predicted: Any, found: dict[str, float]) -> int:
    """What a step with predicted gates reads more: their copies, less the rows of gates that it leaves out."""
    gates = [mlp.gate_proj for mlp in stocha_mlps(model)]
    tensors = [(gate.codes, gate.scale) if hasattr(gate, "codes") else (gate.weight,) for gate in gates]
    left_out = sum(tensor.nbytes for parts in tensors for tensor in parts) * (1 - found["gate_rows"])
    return sum(mlp.decode_state.coarse.nbytes for mlp in stocha_mlps(predicted)) - round(left_out)


def record_of(args: argparse.Namespace, seconds: dict[str, list[float]], sizes: dict[str, int]) -> dict[str, Any]:
    """The line for the file of results."""
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    own = [name.removeprefix("ours ") for name in sizes if name.startswith("ours ")]
    pairs = {f"{theirs} / {ours}": (theirs, f"ours {ours}") for theirs in args.theirs for ours in own}
    ratios = {pair: [a / b for a, b in zip(*map(seconds.get, names), strict=True)] for pair, names in pairs.items()}
    return {
        "model": f"random Llama {args.random}" if args.random else Path(args.folder).name,
        "forced_sparsity": args.sparsity,
        "head_bits": args.head_bits,
        "tokens_a_step": args.together,
        "threads": args.threads,
        "clock": "of the process" if args.cpu else "wall",
        "ms": {name: 1e3 * medians[name] for name in sizes},
        "tokens_per_second": {name: args.together / medians[name] for name in sizes},
        "gigabytes": {name: size / 1e9 for name, size in sizes.items()},
        "gbps": {name: size / medians[name] / 1e9 for name, size in sizes.items()},
        "read_gbps": READ / medians["read"] / 1e9,
        "llama_cpp_over_ours": {pair: statistics.median(found) for pair, found in ratios.items()},
        "each_round": {pair: [round(ratio, 3) for ratio in found] for pair, found in ratios.items()},
        "processor": platform.processor() or platform.machine(),
        "versions": {"llama.cpp": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def gains(args: argparse.Namespace, seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """By bits: what gate prediction gains, the median of the rounds' ratios and each of them."""
    found = {}
    for bits in args.ours:
        ratios = [a / b for a, b in zip(seconds[f"ours {bits}"], seconds[f"ours {bits} predicted"], strict=True)]
        found[str(bits)] = {"median": statistics.median(ratios), "rounds": [round(ratio, 3) for ratio in ratios]}
    return found


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, required=True, help="llama.cpp's source folder")
    parser.add_argument("--build", type=Path, required=True, help="where it was built")
    parser.add_argument("--random", choices=sorted(SHAPES), help="a shape of random weights")
    parser.add_argument("--folder", help="a converted checkpoint")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, of any type")
    parser.add_argument("--ours", type=int, nargs="+", default=[4], choices=[16, 8, 4], help="bits of our weights")
    parser.add_argument("--theirs", nargs="+", default=["Q4_0"], choices=list(TYPES))
    parser.add_argument(
        "--sparsity",
        type=lambda text: text if text == "own" else float(text),
        help="zeros to force, or own: those of the folder's activation; without it the base activation runs, dense",
    )
    parser.add_argument("--text", help="measure perplexities on this text, of a real model")
    parser.add_argument("--windows", type=int, default=8, help="of 512 tokens of the text")
    parser.add_argument("--head-bits", type=int, default=8, choices=[8, 4], help="of embeddings and lm_head")
    parser.add_argument("--together", type=int, default=1, help="tokens a step")
    parser.add_argument("--recall", type=float, help="time ours with gates predicted by this recall as well")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu", action="store_true", help="time one thread by its CPU time: on a machine with others")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64, help="tokens before")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args(given)
    if args.text and (args.random or not args.folder):
        parser.error("--text measures a real model: give --folder and --gguf in place of --random")
    if args.recall and (args.sparsity is None or args.together > 1):
        parser.error("--recall predicts zeros of one token: give --sparsity, and no --together")
    args.threads = 1 if args.cpu else args.threads
    return args


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="stocha-gguf-", ignore_cleanup_errors=True) as folder:
        sides = prepared(args, Path(folder))
        seconds = decoding_in_turn(sides.measures, args.rounds)
        record = record_of(args, seconds, sides.sizes)
        if args.text:
            record["text"] = Path(args.text).name
            record["quality"] = {name: found() for name, found in sides.qualities.items()}
        if sides.gates:
            record |= {"recall": args.recall, "gates": sides.gates, "full_over_predicted": gains(args, seconds)}
    with args.json.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
