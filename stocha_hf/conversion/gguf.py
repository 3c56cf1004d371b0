"""Reading a .gguf file: its tensors, dequantized by transformers, and its tokenizer, as an ordinary checkpoint.

It needs torch, and the extra `stocha_hf[gguf]`.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stocha_hf.errors import StochaError

SPECIAL_TOKENS = {  # of a tokenizer, and the metadata of a .gguf file that says which they are
    f"{ours}_token": f"tokenizer.ggml.{theirs}_token_id"
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
}


def dequantize(path: Path, folder: Path, dtype: str) -> dict[str, Any]:
    """Write a .gguf file's model and tokenizer into `folder` as a native checkpoint; returns its Hub metadata."""
    if not path.is_file():
        raise StochaError(f"{path} does not exist: expected a .gguf file, a folder or a Hub id such as org/name")
    if find_spec("gguf") is None:
        raise StochaError(f"{path} needs the package gguf, which is not installed: run pip install 'stocha_hf[gguf]'")
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        fields = GGUFReader(path).fields
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            dtype=getattr(torch, dtype),
            quantization_config=GgufConfig(dequantize=True),  # else tensors may stay packed and saving refuses
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        for name, key in SPECIAL_TOKENS.items():  # transformers 5.17 takes BOS for EOS
            if key in fields:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(int(fields[key].contents())))
    except Exception as error:  # gguf, tokenizers and transformers raise whatever a broken file leads them to
        raise StochaError(
            f"{path} cannot be read as GGUF ({_one_line(error)}): expected a whole file of a dense model"
        ) from None
    model.config.__dict__.pop("_model_name_or_path", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    named = {"license": "general.license", "language": "general.languages"}
    return {key: fields[field].contents() for key, field in named.items() if field in fields}


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
