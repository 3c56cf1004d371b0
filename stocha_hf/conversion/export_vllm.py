"""A checkpoint as a folder for vLLM's transformers backend.

vLLM's own Llama, Qwen and Gemma classes know one activation each and refuse any other. Its transformers backend builds
transformers' class, with attention and linear layers of its own, and takes a native one without remote code. So plain
ReLU goes out as the native class, which needs no trust in code; what modeling_stocha.py alone computes, with that.

    write_vllm(source, "relu", Path("out"), overwrite=False)   # "vllm serve out --model-impl transformers"
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from stocha_hf.checkpoints.companions import dump
from stocha_hf.checkpoints.entry import ACT_KEYS, checked_entry, with_entry, with_keys
from stocha_hf.checkpoints.inspection import CARD, CONFIG
from stocha_hf.checkpoints.staging import staged_folder
from stocha_hf.conversion.output import copy_files, write_checkpoint
from stocha_hf.conversion.source import Source
from stocha_hf.spec import ACTIVATIONS, class_names

README = """# {name}, for vLLM

```
{command}
```

`config.json` names the native class and `{key}: {activation}`, which transformers reads, and vLLM with it.{warning}
Made from {name} by stocha-export.
"""
WARNING = """
llama.cpp's converter, Ollama and MLX-LM do not: they would run `{base}`, **wrong, without a word**."""


def write_vllm(source: Source, activation: str, output: Path, overwrite: bool) -> tuple[str, str]:
    """Write the folder, whole or not at all; returns its class's name and the command that serves it."""
    row = source.architecture
    if ACTIVATIONS[activation].native != activation:
        entry = checked_entry(dict(source.config["stocha"]), source.config, source.id)
        write_checkpoint(source, with_entry(source.config, replace(entry, inputs=None)), output, overwrite)
        return f"Stocha{row.causal_lm}", f"vllm serve {output} --trust-remote-code"
    command = f"vllm serve {output}" + ("" if activation == row.act else " --model-impl transformers")
    with staged_folder(output, replace=overwrite) as folder:
        config = _native_config(source, activation)
        copy_files(source, folder, config)
        (folder / CONFIG).write_text(dump(config), encoding="utf-8")
        warning = "" if activation == row.act else WARNING.format(base=row.act)
        told = {"name": source.id, "command": command, "key": row.act_key, "activation": activation}
        (folder / CARD).write_text(README.format(**told, warning=warning), encoding="utf-8")
    return row.causal_lm, command


def _native_config(source: Source, activation: str) -> dict[str, Any]:
    """The source's config without what names code, and with this activation of the native class."""
    acts = {key: activation for key in (source.architecture.act_key, *ACT_KEYS) if key in source.config}
    names = class_names(source.config.get("architectures") or [source.architecture.causal_lm], common=True)
    dropped = dict.fromkeys(("auto_map", "model_file", "stocha"))
    return with_keys(source.config, dropped | acts | {"architectures": names})
