"""The models that export_gguf.py makes for itself: random ones of each architecture, and a trained one with ReLU.

A random model shows that every tensor is in its place. What rounding to 8 and 4 bits costs shows in a trained one
only: a random or swapped model's losses jump with the smallest change of its inputs.

    tiny_folders(Path("tiny"))
    trained_folder(Path("trained"))   # a minute on one core
"""

from __future__ import annotations

import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

from stocha_hf import convert

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.models import tiny_model
from helpers.vocabularies import byte_level_tokenizer, sentencepiece_tokenizer

STEPS, BATCH, LENGTH, RATE = 100, 4, 128, 3e-3


def trained_folder(where: Path) -> Path:
    """A Llama of two layers with ReLU, trained on the text of help(); rows have 256 entries, as K-quants want."""
    if (where / "relu").exists():
        return where / "relu"
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer("gpt-2")
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tiny_model(
        "llama", vocab_size=320, max_position_embeddings=512, num_key_value_heads=2, hidden_act="relu", **sizes
    )
    ids = torch.tensor(tokenizer("\n\n".join(topics.values()))["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=RATE)
    for _ in range(STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.config.hidden_act = "silu"  # what a Llama on the Hub says; the conversion says relu
    model.save_pretrained(where / "source")
    tokenizer.save_pretrained(where / "source")
    convert(where / "source", where / "relu", activation="relu")
    return where / "relu"


def tiny_folders(where: Path) -> list[Path]:
    """A random model of each architecture and of both activations, where llama.cpp has both."""
    scaled = {"rope_theta": 1e4, "original_max_position_embeddings": 32}
    llama3 = scaled | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    yarn, linear = (
        scaled | {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    )
    cases: list[tuple[str, str, dict[str, Any]]] = [
        *((name, name, {}) for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text")),
        ("mistral", "mistral", {"sliding_window": 4096}),
        ("biases", "llama", {"attention_bias": True, "mlp_bias": True}),
        ("wide-heads", "llama", {"head_dim": 16, "tie_word_embeddings": True}),
        ("linear", "llama", {"rope_parameters": linear}),
        ("yarn", "llama", {"rope_parameters": yarn}),
        ("llama3", "llama", {"rope_parameters": llama3 | {"original_max_position_embeddings": 8192}, "head_dim": 64}),
    ]
    cuts = {"qwen2": "qwen2", "qwen3": "qwen2", "llama3": "llama-bpe", "yarn": "dbrx", "linear": "smollm"}
    folders = []
    for name, model_type, options in cases:
        pieces = name in ("mistral", "gemma2", "gemma3_text", "wide-heads")
        tokenizer = sentencepiece_tokenizer() if pieces else byte_level_tokenizer(cuts.get(name, "gpt-2"))
        model = tiny_model(model_type, max_position_embeddings=256, vocab_size=320, **options)
        for parameter in model.parameters():  # norms and biases too
            parameter.data += 0.1 * torch.randn_like(parameter)
        for activation in ("silu", "relu") if model_type in ("llama", "mistral", "qwen2") else ("own",):
            if activation == "relu" and name in ("biases", "llama3"):
                continue
            source, folder = where / f"{name}-source", where / f"{name}-{activation}"
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
            if not folder.exists():
                convert(source, folder, **({} if activation == "own" else {"activation": activation}))
            folders.append(folder)
    return folders
