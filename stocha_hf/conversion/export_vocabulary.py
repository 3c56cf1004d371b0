"""A tokenizer as the metadata of a GGUF file: tokens, their kinds, merges, special tokens, chat template.

llama.cpp has a tokenizer of its own, so only what it splits alike is written. Byte-level BPE is known by how it cuts a
text before merging (PRE_TOKENIZERS, compared with the tokenizer's own rules and not with the model's name), and
SentencePiece's BPE by its byte tokens. Whatever else there is, is refused.

    vocabulary(load_tokenizer(folder), 49152, "my-model")["tokenizer.ggml.pre"]   # "smollm"
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stocha_hf.errors import StochaError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's kinds of tokens
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {  # (how a text is cut, whether whole words skip the merges) -> llama.cpp's name of the same
    (("ByteLevel with its words",), False): "gpt-2",
    (("Digits one by one", "ByteLevel with its words"), False): "smollm",
    ((f"Split {_WORDS % '{1,3}'}", "ByteLevel"), True): "llama-bpe",
    ((f"Split {_WORDS % '{1,3}'}", "ByteLevel"), False): "dbrx",
    ((f"Split {_WORDS % ''}", "ByteLevel"), False): "qwen2",
}
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # transformers' name -> GGUF's
SPACE = "\u2581"  # SentencePiece's mark of a space
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACES = {  # the ways in which SentencePiece's spaces are written, without their details
    (None, "Metaspace"), ("Replace", None), ("Replace", "Split"), ("Prepend Replace", None)
}  # fmt: skip


def vocabulary(tokenizer: Any, rows: int, where: str) -> dict[str, Any]:
    """The metadata of a tokenizer, for a model whose embedding has that many rows.

    Raises StochaError for a tokenizer that llama.cpp does not have, or with more tokens than rows.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise _unknown(where, f"is a {type(tokenizer).__name__}")
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise _unknown(where, f"is of the type {model['type']}")
    texts = {index: text for text, index in model["vocab"].items()}
    added = {token["id"]: token for token in parts["added_tokens"]}
    texts |= {index: token["content"] for index, token in added.items()}
    if (most := max(texts, default=-1)) >= rows:
        raise StochaError(f"the tokenizer of {where} has the token {most}: expected at most the {rows} of its model")
    pieces = bool(model["byte_fallback"])
    own = _sentencepiece(parts, tokenizer, rows, where) if pieces else _byte_level(parts, where)
    kinds = {
        index: _kind(text, added.get(index), model["unk_token"] if pieces else None) for index, text in texts.items()
    }
    own["token_type"] = [kinds.get(index, UNUSED) for index in range(rows)]
    spaced = {index for index, token in added.items() if pieces and token["normalized"]}
    own["tokens"] = [_spelled(texts.get(index, f"[PAD{index}]"), index in spaced) for index in range(rows)]
    for ours, theirs in SPECIAL.items():
        if (index := getattr(tokenizer, f"{ours}_token_id")) is not None:
            own[f"{theirs}_token_id"] = index
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    own["add_bos_token"] = whole[:1] == [tokenizer.bos_token_id] != plain[:1]
    own["add_eos_token"] = whole[-1:] == [tokenizer.eos_token_id] != plain[-1:]
    found = {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    if isinstance(tokenizer.chat_template, str):
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found


def _byte_level(parts: Mapping[str, Any], where: str) -> dict[str, Any]:
    cut, whole_words = tuple(_steps(parts["pre_tokenizer"])), bool(parts["model"]["ignore_merges"])
    name = PRE_TOKENIZERS.get((cut, whole_words))
    normal = {step["type"] for step in _flat(parts["normalizer"], "normalizers")}
    if name is None or normal - {"NFC"}:  # llama.cpp composes no characters, as its own converter has it for Qwen
        raise _unknown(where, f"cuts a text by {', '.join([*sorted(normal), *cut]) or 'nothing'}")
    return {"model": "gpt2", "pre": name, "merges": [_joined(merge) for merge in parts["model"]["merges"]]}


def _sentencepiece(parts: Mapping[str, Any], tokenizer: Any, rows: int, where: str) -> dict[str, Any]:
    """SentencePiece merges the pair whose result has the highest score; here, the result of the earliest merge."""
    written = tuple(
        " ".join(step["type"] for step in _flat(parts[key], inner)) or None
        for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
    )
    if written not in _SPACES:
        raise _unknown(where, f"cuts a text by {', '.join(map(str, written))}")
    ids: dict[str, int] = parts["model"]["vocab"]
    scores: dict[int, float] = {}
    for rank, merge in enumerate(parts["model"]["merges"]):
        scores.setdefault(ids["".join(merge.split(" ") if isinstance(merge, str) else merge)], -float(rank))
    first = tokenizer.backend_tokenizer.encode("a", add_special_tokens=False).tokens[0]
    return {
        "model": "llama",
        "pre": "default",
        "scores": [scores.get(index, -1e6) for index in range(rows)],
        "add_space_prefix": first.startswith(SPACE),
    }


def _steps(step: Any) -> Iterator[str]:
    """How a text is cut, step by step, as PRE_TOKENIZERS has it."""
    for one in _flat(step, "pretokenizers"):
        if one["type"] == "ByteLevel" and not one["add_prefix_space"]:
            yield "ByteLevel with its words" if one["use_regex"] else "ByteLevel"
        elif one["type"] == "Digits" and one["individual_digits"]:
            yield "Digits one by one"
        elif one["type"] == "Split" and (one["behavior"], one["invert"]) == ("Isolated", False):
            yield f"Split {one['pattern'].get('Regex', one['pattern'])}"
        else:
            yield str(one)


def _flat(step: Any, inner: str) -> list[dict[str, Any]]:
    """The steps of a sequence, or the one that there is."""
    if step is None:
        return []
    return [one for each in step[inner] for one in _flat(each, inner)] if step["type"] == "Sequence" else [step]


def _kind(text: str, added: Mapping[str, Any] | None, unknown: str | None) -> int:
    if unknown is not None and text == unknown:
        return UNKNOWN
    if unknown is not None and _BYTE.fullmatch(text):
        return BYTE
    if added is None:
        return NORMAL
    return CONTROL if added["special"] else USER_DEFINED


def _spelled(text: str, spaced: bool) -> str:
    """A token's text. llama.cpp finds added tokens before it marks spaces; `spaced` are found after it here."""
    return text.replace(SPACE, " ") if spaced else text


def _joined(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)


def _unknown(where: str, what: str) -> StochaError:
    return StochaError(
        f"the tokenizer of {where} {what[:200]}, which llama.cpp does not support: expected that of GPT-2, SmolLM, "
        "Llama, Mistral, Qwen2 or Gemma"
    )
