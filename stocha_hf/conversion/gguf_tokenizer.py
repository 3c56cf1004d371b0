"""The tokenizer inside a .gguf file, as transformers reads it: written into a folder, read back, and tried.

transformers builds it from the file's vocabulary by rules of its own, which change from one release to the next, and a
tokenizer that cuts every word into letters looks like any other. So what a reader of the folder will get must write
words of its vocabulary as the tokens that they are, and begin a text as llama.cpp does.

    write_tokenizer(Path("model.gguf"), metadata, folder)   # folder holds the model's config.json
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stocha_hf.data.windows import load_tokenizer
from stocha_hf.errors import StochaError

SPECIAL_TOKENS = {  # of a tokenizer, and the metadata of a .gguf file that says which they are
    f"{ours}_token": f"tokenizer.ggml.{theirs}_token_id"
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
}
BEGIN_WITH_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "midm-2.0", "pixtral", "tekken")  # tokenizer.ggml.pre
TRIED = 1000  # tokens, spread over the vocabulary, among which words are looked for
_WORD = re.compile("[\u0120\u2581]([a-z]{3,})")  # after a space, as byte-level BPE and SentencePiece mark it


def write_tokenizer(path: Path, metadata: Mapping[str, Any], folder: Path) -> None:
    """Save the tokenizer inside a file beside its model's config.json.

    Raises StochaError for one that transformers cannot read, or reads otherwise than the file means it.
    """
    _read(path, metadata, folder).save_pretrained(folder)
    _check(load_tokenizer(folder), metadata, path)


def _read(path: Path, metadata: Mapping[str, Any], folder: Path) -> Any:
    """A folder of its own keeps transformers from a neighbour's tokenizer.json."""
    from transformers import AutoTokenizer

    link = folder / "model.gguf"
    link.symlink_to(path.resolve())
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=link.name, trust_remote_code=False)
        for name, key in SPECIAL_TOKENS.items():  # the file's, whatever the tokenizer's class has by default
            if key in metadata:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(metadata[key])))
        ends = metadata.get("tokenizer.ggml.add_eos_token") is True
        for name, added in (("add_bos_token", _begins_with_bos(metadata)), ("add_eos_token", ends)):
            setattr(tokenizer, name, added)  # transformers 5.18 does not read either
    except Exception as error:  # tokenizers and transformers raise whatever a broken vocabulary leads them to
        reason = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise StochaError(
            f"the tokenizer in {path} cannot be read ({reason}): expected a vocabulary that transformers knows; "
            "convert the model's safetensors instead"
        ) from error
    finally:
        link.unlink()
    return tokenizer


def _begins_with_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether a text begins with BOS. Where a file does not say, llama.cpp adds it for SentencePiece's vocabularies,
    and for those of Llama 3 and some others.
    """
    usual = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in BEGIN_WITH_BOS
    asked = metadata.get("tokenizer.ggml.add_bos_token", usual)
    return asked is True and SPECIAL_TOKENS["bos_token"] in metadata


def _check(tokenizer: Any, metadata: Mapping[str, Any], path: Path) -> None:
    spread = list(range(0, len(tokenizer), max(1, len(tokenizer) // TRIED)))
    found = (_WORD.fullmatch(token or "") for token in tokenizer.convert_ids_to_tokens(spread))  # ids may have gaps
    words = {match[0]: match[1] for match in found if match}
    cut = [word for token, word in words.items() if tokenizer.tokenize(f"a {word}")[-1:] != [token]]
    if 2 * len(cut) > len(words):
        raise _misread(
            path, f"cuts {len(cut)} of {len(words)} words of its vocabulary into pieces, such as {cut[0]!r}"
        )
    if _begins_with_bos(metadata) and tokenizer("a")["input_ids"][:1] != [metadata[SPECIAL_TOKENS["bos_token"]]]:
        raise _misread(path, f"begins no text with {tokenizer.bos_token!r}")


def _misread(path: Path, what: str) -> StochaError:
    from transformers import __version__

    return StochaError(
        f"the tokenizer in {path}, as transformers {__version__} reads it, {what}: update transformers, or convert "
        "the model's safetensors instead"
    )
