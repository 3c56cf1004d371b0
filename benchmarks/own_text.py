"""Let a Llama write text by itself, as a JSONL file with a column `text`: data for a refit or a distillation.

What a model says at temperature 1 is a mixture like that of its own training text, which is often not public. So it
can stand in for general text where there is none (Liu et al., LLM-QAT, arXiv 2305.17888); docs/experiments/refit.md
and docs/experiments/training.md say how far that goes.

    python benchmarks/own_text.py SmolLM2-135M-Instruct own.jsonl --tokens 10000000 --length 512 --batch 1024

Sampling is bound by launching kernels, so on a GPU a step of all samples is a CUDA graph over a cache of fixed size (a
draft of this made 100,000 tokens a second with SmolLM2-135M on an H100 that did other work beside it). Each batch is
added to the file as soon as it is there: a run that is killed leaves what it had.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import trange
from transformers import AutoTokenizer

from stocha_hf.models import load_model

BUCKETS = 4  # a step attends to a quarter, a half, ... of the cache, so that short texts do not read all of it


class Sampler:
    """Draws `batch` samples of a Llama with SiLU at a time, [batch, length], in its dtype and on its device."""

    def __init__(self, model: Any, batch: int, length: int, temperature: float) -> None:
        self.model, self.config, self.temperature = model, model.config, temperature
        device, dtype = model.device, model.dtype
        heads, layers = self.config.num_key_value_heads, self.config.num_hidden_layers
        self.cache = torch.zeros(2, layers, batch, heads, length, self.config.head_dim, device=device, dtype=dtype)
        every = torch.arange(length, device=device)
        self.cos, self.sin = (part[0] for part in model.model.rotary_emb(self.cache, every[None]))
        self.slots = every
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(batch, dtype=torch.int64, device=device)
        self.steps = [self._recorded(length * (i + 1) // BUCKETS) for i in range(BUCKETS)]

    def sample(self, first: int) -> torch.Tensor:
        """Token ids after `first`, [batch, length]."""
        self.position.zero_()
        self.ids.fill_(first)
        length = len(self.slots)
        found = torch.empty(len(self.ids), length, dtype=torch.int64, device=self.ids.device)
        for at in range(length):
            self.steps[at * BUCKETS // length]()
            found[:, at] = self.ids
        return found

    def logits(self, reach: int) -> torch.Tensor:
        """Of the tokens after `ids`, float32 [batch, vocabulary]; attention sees the first `reach` slots."""
        model, seen = self.model.model, (self.slots[:reach] <= self.position)[None, None, None]
        x = model.embed_tokens(self.ids)
        for index, layer in enumerate(model.layers):
            x = x + self._attention(layer.self_attn, layer.input_layernorm(x), index, seen)
            normed, mlp = layer.post_attention_layernorm(x), layer.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))
        return self.model.lm_head(model.norm(x)).float()

    def _attention(self, attention: Any, x: torch.Tensor, index: int, seen: torch.Tensor) -> torch.Tensor:
        batch, groups, width = len(x), self.config.num_key_value_heads, self.config.head_dim
        q, k = (self._rotated(part(x).view(batch, -1, width)) for part in (attention.q_proj, attention.k_proj))
        for cached, new in zip(self.cache[:, index], (k, attention.v_proj(x).view(batch, -1, width)), strict=True):
            cached.index_copy_(2, self.position, new[:, :, None])
        keys, values = self.cache[:, index, :, :, : seen.shape[-1]]
        mixed = F.scaled_dot_product_attention(q.view(batch, groups, -1, width), keys, values, attn_mask=seen)
        return attention.o_proj(mixed.reshape(batch, -1))

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos[self.position] + torch.cat([-second, first], -1) * self.sin[self.position]

    def _step(self, reach: int) -> None:
        probabilities = (self.logits(reach) / self.temperature).softmax(-1)
        self.ids.copy_((probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1))
        self.position += 1

    def _recorded(self, reach: int) -> Callable[[], object]:
        """A step that attends to `reach` slots; on a GPU the replay of its graph."""
        if self.ids.device.type != "cuda":
            return lambda: self._step(reach)
        self.position.zero_()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step(reach)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step(reach)
        return graph.replay


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint folder or Hub id of a Llama")
    parser.add_argument("output", type=Path, help=".jsonl file")
    parser.add_argument("--tokens", type=int, default=130_000, help="at least so many, in whole batches")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--batch", type=int, default=128, help="samples at a time")
    parser.add_argument("--start", default="<|endoftext|>", help="token that a sample begins with: one between texts")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.start not in tokenizer.get_vocab():
        parser.error(f"{args.model} has no token {args.start}: expected one of its own, such as {tokenizer.bos_token}")
    model = load_model(args.model, dtype=torch.bfloat16).eval().to(args.device)
    kind = f"{model.config.model_type} with {model.config.hidden_act}"
    if kind != "llama with silu":
        parser.error(f"{args.model} is a {kind}: expected a llama with silu")
    first = tokenizer.convert_tokens_to_ids(args.start)
    torch.manual_seed(args.seed)
    sampler = Sampler(model, args.batch, args.length, args.temperature)
    with args.output.open("w", encoding="utf-8") as file:
        for _ in trange(-(-args.tokens // (args.batch * args.length)), desc="Sampling", disable=None):
            ids = sampler.sample(first)
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts(tokenizer, ids))
            file.flush()


def texts(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    """Token ids [batch, seq] as texts, cut at special tokens, where the model began another text."""
    special, found = set(tokenizer.all_special_ids), []
    for sample in ids.tolist():
        for is_special, piece in itertools.groupby(sample, key=special.__contains__):
            if not is_special:
                found.append(tokenizer.decode(list(piece)))
    return found


if __name__ == "__main__":
    main()
