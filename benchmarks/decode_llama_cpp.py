"""Time a sparse Llama's decoding against llama.cpp, which is dense: what a CPU user would take instead, in one run.

The same random weights in bfloat16 on both sides, FATReLU thresholds forced to a share of zeros on ours (llama.cpp
runs SiLU: it reads all weights either way), the same number of threads. Needs llama-cpp-python, built from source for
this machine (`pip install llama-cpp-python`), and gguf.

    python benchmarks/decode_llama_cpp.py --random 1b --sparsity 0.9 --json out.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stocha_hf.measurement.speed import READ
from stocha_hf.measurement.speed_models import (
    SHAPES,
    VOCABULARY,
    decode_seconds,
    decoding_in_turn,
    force_sparsity,
    predict,
    random_llama,
)
from stocha_hf.modeling_stocha import StochaConfig, patch

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(model: Any, path: Path) -> None:
    """The model's tensors as BF16 GGUF with no vocabulary; rotary order does not matter for random weights."""
    from gguf import GGMLQuantizationType, GGUFWriter

    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: torch.Tensor) -> None:
        if tensor.dim() == 1:
            writer.add_tensor(name, tensor.float().numpy())
        else:
            data = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.BF16)

    add("token_embd.weight", model.model.embed_tokens.weight.data)
    add("output_norm.weight", model.model.norm.weight.data)
    for index, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            add(f"blk.{index}.{theirs}.weight", layer.get_submodule(ours).weight.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_seconds(llama: Any, prompt: list[int], new: int) -> float:
    """Seconds of a greedily decoded token."""
    llama.reset()
    llama.eval(prompt)
    start = time.perf_counter()
    for _ in range(new):
        token = int(np.argmax(llama.scores[llama.n_tokens - 1]))
        llama.eval([token])
    return (time.perf_counter() - start) / new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", default="1b", choices=sorted(SHAPES))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--recall", type=float, help="skip gate rows as well, with this recall (1: exactly)")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, required=True, help="a line is added to this file")
    args = parser.parse_args()
    from llama_cpp import Llama, __version__

    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (1, 64))
    sparse = random_llama(args.random, torch.bfloat16)
    with tempfile.TemporaryDirectory(prefix="stocha-gguf-") as folder:
        write_gguf(sparse, Path(folder) / "model.gguf")
        threads = torch.get_num_threads()
        path = str(Path(folder) / "model.gguf")
        llama = Llama(path, n_threads=threads, n_ctx=256, n_batch=256, logits_all=False, verbose=False)
    patch(sparse, StochaConfig(activation="relu"))
    force_sparsity(sparse, args.sparsity, tokens)
    predict(sparse, args.recall)
    seconds = decoding_in_turn(
        {
            "llama.cpp": lambda: llama_cpp_seconds(llama, tokens[0].tolist(), args.new),
            "sparse": lambda: decode_seconds(sparse, tokens, args.new),
        },
        args.rounds,
    )
    record = {
        "model": f"random Llama {args.random}",
        "forced_sparsity": args.sparsity,
        "recall": args.recall,
        "threads": threads,
        "llama_cpp_python": __version__,
        "llama_cpp_ms": 1e3 * statistics.median(seconds["llama.cpp"]),
        "sparse_ms": 1e3 * statistics.median(seconds["sparse"]),
        "speedup": statistics.median(a / b for a, b in zip(seconds["llama.cpp"], seconds["sparse"], strict=True)),
        "read_gbps": READ / statistics.median(seconds["read"]) / 1e9,
    }
    with args.json.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(record)


if __name__ == "__main__":
    main()
