"""`transformers serve FOLDER --trust-remote-code` answers with the folder's own activation and kernels, and streams.

An OpenAI client and `transformers chat` talk to one server.
"""

from __future__ import annotations

import socket
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import stocha_hf
from stocha_hf.decoding import generation

MESSAGES = [{"role": "user", "content": "w9 w17 w30 w41"}]


@pytest.mark.slow
def test_a_served_folder_streams_what_its_model_generates(tmp_path, monkeypatch, capsys):
    openai, serve = pytest.importorskip("openai"), pytest.importorskip("transformers.cli.serve")
    chat = pytest.importorskip("transformers.cli.chat")
    pytest.importorskip("uvicorn")
    by_kernels: list[bool] = []
    sample = generation.sample

    def noted(*args: Any, **kwargs: Any) -> Any:
        found = sample(*args, **kwargs)
        by_kernels.append(found is not None)
        return found

    monkeypatch.setattr(generation, "sample", noted)  # which the folder's modeling file takes when it is imported
    folder, tokenizer = tmp_path / "served", tiny_tokenizer()
    tiny_model().save_pretrained(tmp_path / "native")
    tokenizer.save_pretrained(tmp_path / "native")
    stocha_hf.convert(tmp_path / "native", folder, activation="fatrelu", threshold=0.5)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = serve.Serve(
        force_model=str(folder),
        trust_remote_code=True,
        device="cpu",
        host="127.0.0.1",
        port=port,
        non_blocking=True,
    )
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        chunks = client.chat.completions.create(
            model=str(folder), messages=MESSAGES, max_tokens=8, temperature=0, stream=True
        )
        pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
        said = iter([MESSAGES[0]["content"], "!exit"])
        monkeypatch.setattr(chat.RichInterface, "input", lambda self: next(said))
        monkeypatch.setattr(chat.RichInterface, "confirm", lambda self, *args, **kwargs: False)  # to go on writing
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # its client talks to the server
        chat.Chat(str(folder), f"http://127.0.0.1:{port}/v1", ["max_new_tokens=8", "do_sample=False"], user="user")
    finally:
        server.kill_server()
    prompt = tokenizer.apply_chat_template(MESSAGES, return_tensors="pt", add_generation_prompt=True)
    texts = {}
    for remote in (True, False):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=remote)
        with torch.no_grad():
            ids = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        texts[remote] = tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(pieces) > 1 and "".join(pieces).split() == texts[True].split() != texts[False].split()
    assert by_kernels[:2] == [True, True], "the loop that decodes with the kernels wrote both answers"
    assert texts[True].split() == [word for word in capsys.readouterr().out.split() if word in texts[True].split()]
