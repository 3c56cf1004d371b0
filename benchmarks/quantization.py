"""What 4 bits keep: bits, perplexity and divergence of this package's folders and of llama.cpp's files, same weights.

The models at hand come from 4-bit GGUF files. Their weights lie on the grid of the quantizer that made them, and the
same quantizer rounds them to themselves. So `permute` first shuffles the hidden channels, the neurons and the value
channels within each head: the model computes the same, and each new group holds weights of many old ones. Every
row is measured with its weights as float32 in the same model, on the same text, so that only weights differ.

    python benchmarks/quantization.py permute FOLDER shuffled
    python benchmarks/quantization.py gguf shuffled Q4_K_M q4km.gguf --libllama .../libllama.so
    stocha-convert shuffled ours --activation silu --bits 4 --calibrate other-text
    python benchmarks/quantization.py measure shuffled q4km.gguf ours --text text.parquet --json out.jsonl
    python benchmarks/quantization.py prefill ours FOLDER --json out.jsonl

llama.cpp is the sdist of llama-cpp-python 0.3.36, of which only the target `llama` is built.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from stocha_hf import load_model
from stocha_hf.conversion.gguf import LAYER_PARTS, PARTS
from stocha_hf.data import text_windows
from stocha_hf.quantization import is_matrix

FTYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15}  # llama_ftype


@torch.no_grad()
def permute(folder: str, output: str) -> None:
    """Write the same model with channels, neurons and values in random order; of Llama's and Qwen 2's family."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config, generator = model.config, torch.Generator().manual_seed(1)
    channels = torch.randperm(config.hidden_size, generator=generator)

    def shuffle(module: Any, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None) -> None:
        for name, value in list(module.named_parameters(recurse=False)):
            value = value if rows is None else value[rows]
            value = value[:, columns] if columns is not None and value.dim() == 2 else value
            module.get_parameter(name).data = value.contiguous()

    shuffle(model.model.embed_tokens, columns=channels)
    if not config.tie_word_embeddings:
        shuffle(model.lm_head, columns=channels)
    shuffle(model.model.norm, rows=channels)
    for layer in model.model.layers:
        neurons = torch.randperm(config.intermediate_size, generator=generator)
        attention, size = layer.self_attn, layer.self_attn.head_dim
        values = [torch.randperm(size, generator=generator) for _ in range(config.num_key_value_heads)]
        sharing = config.num_attention_heads // len(values)
        kept = torch.cat([order + size * head for head, order in enumerate(values)])
        used = torch.cat([values[head // sharing] + size * head for head in range(config.num_attention_heads)])
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            shuffle(norm, rows=channels)
        for linear, rows, columns in (
            (attention.q_proj, None, channels),
            (attention.k_proj, None, channels),
            (attention.v_proj, kept, channels),
            (attention.o_proj, channels, used),
            (layer.mlp.gate_proj, neurons, channels),
            (layer.mlp.up_proj, neurons, channels),
            (layer.mlp.down_proj, channels, neurons),
        ):
            shuffle(linear, rows, columns)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)


class _Parameters(ctypes.Structure):
    """llama_model_quantize_params of llama.h."""

    _fields_ = [
        ("threads", ctypes.c_int32),
        *((name, ctypes.c_int) for name in ("ftype", "output", "embedding")),
        *(
            (name, ctypes.c_bool)
            for name in ("requantize", "quantize_output", "only_copy", "pure", "split", "dry_run")
        ),
        *((name, ctypes.c_void_p) for name in ("imatrix", "overrides", "tensors", "prune")),
        ("buffer", ctypes.c_size_t),
    ]


def quantize_gguf(folder: str, kind: str, output: str, libllama: str) -> None:
    """Write a folder's weights as llama.cpp quantizes them."""
    path = Path(output).with_suffix(".bf16.gguf")
    write_gguf(folder, path)
    library = ctypes.CDLL(libllama)
    library.llama_model_quantize_default_params.restype = _Parameters
    library.llama_backend_init()
    parameters = library.llama_model_quantize_default_params()
    parameters.threads, parameters.ftype, parameters.requantize = torch.get_num_threads(), FTYPES[kind], True
    status = library.llama_model_quantize(str(path).encode(), output.encode(), ctypes.byref(parameters))
    path.unlink()
    if status:
        raise SystemExit(f"llama.cpp could not quantize {folder} to {kind}: status {status}")


def write_gguf(folder: str, path: Path) -> None:
    """Write a Llama's or Qwen 2's tensors in bfloat16, without a vocabulary; rows keep the order that they have."""
    import gguf
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(2048)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    native = {ours: theirs for theirs, ours in (PARTS | LAYER_PARTS).items()}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, end = name.rpartition(".")
        block, _, part = module.removeprefix("model.layers.").partition(".")
        own = f"blk.{block}.{native[part]}.{end}" if module.startswith("model.layers.") else f"{native[module]}.{end}"
        array = value.float().numpy()
        if value.dim() == 1:
            writer.add_tensor(own, array)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(own, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_weights(path: str) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """A file's matrices by this package's names, and their bytes."""
    import gguf

    found, sizes = {}, {}
    for tensor in gguf.GGUFReader(path).tensors:
        if len(tensor.shape) == 2:
            module = str(tensor.name).rpartition(".")[0]
            if module.startswith("blk."):
                _, block, part = module.split(".")
                module = f"model.layers.{block}.{LAYER_PARTS[part]}"
            else:
                module = PARTS[module]
            shape = tuple(int(size) for size in tensor.shape[::-1])
            array = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
            found[module], sizes[module] = torch.from_numpy(np.array(array)), int(tensor.n_bytes)
    return found, sizes


def folder_weights(folder: str) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The same of a quantized folder; a tied lm_head is the embedding's."""
    modules = {
        name: module for name, module in load_model(folder).named_modules() if is_matrix(name) and len(module._buffers)
    }
    sizes = {name: sum(part.nbytes for part in module.buffers()) for name, module in modules.items()}
    return {name: module.dequantized() for name, module in modules.items()}, sizes


@torch.no_grad()
def measure(folder: str, others: list[str], text: str, length: int, windows: int) -> list[dict[str, Any]]:
    """Perplexity of the folder and of each other set of weights, and their divergence from the folder."""
    from transformers import AutoModelForCausalLM

    tokens = text_windows(text, Path(folder), length, windows)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = torch.cat([model(window[None]).logits.log_softmax(-1).half() for window in tokens])
    rows = [{"weights": Path(folder).name, "perplexity": _perplexity(reference.float(), tokens)}]
    for other in others:
        weights, sizes = gguf_weights(other) if other.endswith(".gguf") else folder_weights(other)
        for name, value in weights.items():
            model.get_submodule(name).weight.copy_(value)
        body = [name for name in weights if ".layers." in name]
        loss = divergence = 0.0
        for window, expected in zip(tokens, reference, strict=True):
            found, expected = model(window[None]).logits[0].log_softmax(-1), expected.float()
            divergence += (expected.exp() * (expected - found)).sum(-1).mean().item() / len(tokens)
            loss += F.nll_loss(found[:-1], window[1:]).item() / len(tokens)
        rows.append(
            {
                "weights": Path(other).name,
                "bits_of_layers": 8 * sum(sizes[name] for name in body) / sum(weights[name].numel() for name in body),
                "bits": 8 * sum(sizes.values()) / sum(value.numel() for value in weights.values()),
                "perplexity": math.exp(loss),
                "kl": divergence,
            }
        )
        print(rows[-1], flush=True)
    return [{"model": Path(folder).name, "text": Path(text).name, "tokens": tokens.numel()} | row for row in rows]


def _perplexity(logs: torch.Tensor, tokens: torch.Tensor) -> float:
    return math.exp(F.nll_loss(logs[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item())


@torch.no_grad()
def prefill(quantized: str, plain: str, rounds: int = 5) -> list[dict[str, Any]]:
    """Seconds for prompts of a quantized folder and of the bfloat16 one, in turn; peak memory is the process's."""
    models = {name: load_model(name, dtype=torch.bfloat16).eval() for name in (quantized, plain)}
    rows = []
    for length in (16, 64, 256):
        tokens = torch.randint(100, 1000, (1, length), generator=torch.Generator().manual_seed(0))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(rounds):
            for name, model in models.items():
                start = time.perf_counter()
                model(tokens, logits_to_keep=1)
                seconds[name].append(time.perf_counter() - start)
        ratios = [b / a for a, b in zip(seconds[quantized], seconds[plain], strict=True)]
        rows.append(
            {
                "model": Path(plain).name,
                "prompt": length,
                "threads": torch.get_num_threads(),
                "quantized_ms": 1e3 * statistics.median(seconds[quantized]),
                "bfloat16_ms": 1e3 * statistics.median(seconds[plain]),
                "speedup": statistics.median(ratios),
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    shuffling, making, measuring, timing = map(verbs.add_parser, ("permute", "gguf", "measure", "prefill"))
    shuffling.add_argument("folder")
    shuffling.add_argument("output")
    making.add_argument("folder")
    making.add_argument("kind", choices=FTYPES)
    making.add_argument("output")
    making.add_argument("--libllama", required=True)
    measuring.add_argument("folder")
    measuring.add_argument("others", nargs="+", help=".gguf files and quantized folders of the same weights")
    measuring.add_argument("--text", required=True)
    measuring.add_argument("--length", type=int, default=512)
    measuring.add_argument("--windows", type=int, default=8)
    timing.add_argument("quantized")
    timing.add_argument("plain")
    for verb in (measuring, timing):
        verb.add_argument("--json", type=Path, required=True, help="lines are added to this file")
    args = parser.parse_args()
    if args.verb == "permute":
        permute(args.folder, args.output)
    elif args.verb == "gguf":
        quantize_gguf(args.folder, args.kind, args.output, args.libllama)
    else:
        if args.verb == "measure":
            rows = measure(args.folder, args.others, args.text, args.length, args.windows)
        else:
            rows = prefill(args.quantized, args.plain)
        with args.json.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
