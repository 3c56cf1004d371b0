"""A page that shows which neurons a model uses while it writes: `stocha-publish --space` uploads it as a Space.

The same text is written twice, with the kernels that skip inactive neurons and without, each with its speed. Then one
pass over the text counts the active neurons of each token in each layer, drawn as a heat map. The activation can be
switched; what it makes of a model that was not trained for it can be seen.

    pip install '.[space]'
    python -m stocha_hf.publishing.space.app FOLDER   # or a Hub id; without one SmolLM2-135M-Instruct
"""

from __future__ import annotations

import html
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from transformers import AutoTokenizer, TextIteratorStreamer

from stocha_hf.modeling_stocha import StochaMLP, stocha_mlps, stocha_mode
from stocha_hf.models import load_model
from stocha_hf.spec import ACTIVATIONS

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "Explain in two sentences why the sky is blue."
STYLE = """<style>
.neurons {border-collapse: collapse; font: 10px monospace !important; width: auto !important}
.neurons tr, .neurons td, .neurons th {border: 0 !important; line-height: 1 !important; background: none}
.neurons td {width: 15px; min-width: 15px; height: 9px; padding: 0 !important}
.neurons th {font-weight: normal !important; white-space: pre; padding: 0 4px !important; text-align: right}
.neurons .token {writing-mode: vertical-rl; padding: 4px 0 !important; text-align: left}
</style>"""  # !important: over gradio's own style of tables
Page = tuple[str, str, str, str, str]  # sparse text, its speed, dense text, its speed, heat map


class Demo:
    """A model and what the page asks of it."""

    def __init__(self, name: str, revision: str | None = None) -> None:
        self.name = name
        self.tokenizer: Any = AutoTokenizer.from_pretrained(name, revision=revision)
        dtype = torch.bfloat16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else torch.float32
        self.model = load_model(name, revision=revision, dtype=dtype).eval()

    @property
    def modes(self) -> list[str]:
        """Activations that can be switched to, the model's own first."""
        own = str(self.model.config.stocha["inference"])
        has_k = self.model.config.stocha.get("k") is not None
        return [own, *(name for name, row in ACTIVATIONS.items() if name != own and (name != "topk" or has_k))]

    def write(self, prompt: str, mode: str, new: int) -> Iterator[Page]:
        """Write a text with and without kernels, a page for each piece, and at last the heat map."""
        ids = self._ids(prompt)
        text, speed, plain, slow = "", "", "", ""
        with stocha_mode(self.model, mode):
            for text, speed in self._written(ids, new):
                yield text, speed, plain, slow, ""
            with without_kernels():
                for plain, slow in self._written(ids, new):
                    yield text, speed, plain, slow, ""
            whole = torch.cat([ids, self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids], 1)
            shares = active_shares(self.model, whole)[:, ids.shape[1] :]
        tokens = [self.tokenizer.decode([token]) for token in whole[0, ids.shape[1] :].tolist()]
        yield text, speed, plain, slow, heat_map(tokens, shares)

    def _ids(self, prompt: str) -> torch.Tensor:
        if self.tokenizer.chat_template is None:
            return self.tokenizer(prompt, return_tensors="pt").input_ids
        chat = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]

    def _written(self, ids: torch.Tensor, new: int) -> Iterator[tuple[str, str]]:
        """The text so far and its speed, as it is written. The first token, which reads the prompt, is not timed."""
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        clock = Clock(streamer)
        options = {"max_new_tokens": new, "do_sample": False, "streamer": clock}
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": self.tokenizer.eos_token_id}
        thread = Thread(target=self.model.generate, args=(ids,), kwargs=options)
        thread.start()
        text = ""
        for piece in streamer:
            text += piece
            yield text, clock.speed
        thread.join()
        yield text, clock.speed


class Clock:
    """A streamer that notes when tokens come, before another one that makes text of them."""

    def __init__(self, streamer: TextIteratorStreamer) -> None:
        self.streamer, self.times = streamer, [0.0]

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.streamer.put(value)

    def end(self) -> None:
        self.streamer.end()

    @property
    def speed(self) -> str:
        """Tokens a second after the first, once there are two."""
        steps = self.times[2:]  # the prompt comes first
        return f"{(len(steps) - 1) / (steps[-1] - steps[0]):.1f} tokens/s" if len(steps) > 1 else ""


@contextmanager
def without_kernels() -> Iterator[None]:
    """PyTorch computes every layer, dense."""
    runtime, StochaMLP.runtime = StochaMLP.runtime, None
    try:
        yield
    finally:
        StochaMLP.runtime = runtime


@torch.no_grad()
def active_shares(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The share of neurons whose hidden entry is not 0, [layers, tokens], for token ids [1, tokens]."""
    rows: list[torch.Tensor] = []
    hooks = [
        mlp.down_proj.register_forward_pre_hook(lambda module, args: rows.append((args[0] != 0).float().mean(-1)[0]))
        for mlp in stocha_mlps(model)
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(rows)


def heat_map(tokens: list[str], shares: torch.Tensor) -> str:
    """A table as HTML: a column for each token, a row for each layer, the last layer on top; dark is active."""
    head = "".join(f'<th class="token">{html.escape(token)}</th>' for token in tokens)
    rows = []
    for layer in reversed(range(len(shares))):
        cells = "".join(
            f'<td style="background:hsl(230 70% {95 - 75 * share:.0f}%)" title="{html.escape(repr(token))}, layer '
            f'{layer}: {share:.0%}"></td>'
            for token, share in zip(tokens, shares[layer].tolist(), strict=True)
        )
        rows.append(f"<tr><th>{layer}</th>{cells}<th> {shares[layer].mean():.0%}</th></tr>")
    mean = f"{shares.mean():.0%} of the neurons are active. Rows are layers, columns tokens; dark is active."
    return f'{STYLE}<p>{mean}</p><table class="neurons">{"".join(rows)}<tr><th></th>{head}</tr></table>'


def page(demo: Demo) -> Any:
    """The page, a gradio.Blocks."""
    import gradio

    kernels = "skipping inactive neurons" if StochaMLP.runtime is not None else "kernels not available: PyTorch"
    name = html.escape(Path(demo.name).name)
    with gradio.Blocks(title=f"Neurons of {name}", fill_width=True) as blocks:
        gradio.Markdown(f"## Which neurons does {name} use?")
        with gradio.Row():
            prompt = gradio.Textbox(PROMPT, label="Prompt", scale=4)
            mode = gradio.Dropdown(demo.modes, value=demo.modes[0], label="Activation")
            new = gradio.Slider(8, 128, 48, step=8, label="Tokens")
        button = gradio.Button("Write", variant="primary")
        with gradio.Row():
            labels = f"Sparse: {kernels}", "Dense"
            sparse, dense = (gradio.Textbox(label=label, lines=4, max_lines=4) for label in labels)
        with gradio.Row():
            fast, slow = (gradio.Textbox(label="Speed", elem_id=name) for name in ("sparse-speed", "dense-speed"))
        picture = gradio.HTML()
        button.click(demo.write, [prompt, mode, new], [sparse, fast, dense, slow, picture])
    return blocks


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("MODEL", MODEL)
    page(Demo(name, os.environ.get("REVISION"))).launch()


if __name__ == "__main__":
    main()
