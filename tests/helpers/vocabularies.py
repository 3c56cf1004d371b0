"""Tokenizers as real models have them, in small: byte-level BPE and SentencePiece's BPE with byte tokens."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def split(pattern: str) -> Any:
    """A text cut by a pattern, as Llama 3 and Qwen 2 do."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUTS = {  # llama.cpp's name -> (how a text is cut, whether whole words skip the merges)
    "gpt-2": (GPT2, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]), False),
    "llama-bpe": (split(rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}"), True),
    "dbrx": (split(rf"{LETTERS}|\p{{N}}{{1,3}}|{REST}"), False),
    "qwen2": (split(rf"{LETTERS}|\p{{N}}|{REST}"), False),
}


def byte_level_tokenizer(cut: str = "gpt-2", **parts: Any) -> Any:
    """The 256 bytes, `th` and `the`, and three special tokens before them; `parts` replace the tokenizer's own."""
    pre_tokenizer, whole_words = CUTS[cut]
    names = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    bpe = models.BPE({name: index for index, name in enumerate(names)}, [("t", "h"), ("th", "e")])
    bpe.ignore_merges = whole_words
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    for key, value in parts.items():
        setattr(tokenizer, key, value)
    return _whole(tokenizer)


def sentencepiece_tokenizer(first: bool = True) -> Any:
    """Byte tokens, letters, the merge of `th`, and a token that a user defined; `first` puts a space before a text."""
    letters = ["\u2581", *map(chr, range(97, 123)), "th", "\u2581th"]
    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("t", "h"), ("\u2581", "th")]
    tokenizer = Tokenizer(
        models.BPE({n: i for i, n in enumerate(names)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    spaces = [normalizers.Prepend("\u2581")] if first else []
    tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_tokens([AddedToken("[x]", normalized=False)])
    return _whole(tokenizer, unk_token="<unk>")


def _whole(tokenizer: Tokenizer, **special: str) -> Any:
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", **special
    )
    whole.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return whole
