"""`transformers serve FOLDER --trust-remote-code` answers with the folder's own activation, and streams."""

from __future__ import annotations

import socket

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

import stocha_hf

MESSAGES = [{"role": "user", "content": "w9 w17 w30 w41"}]


@pytest.mark.slow
def test_a_served_folder_streams_what_its_model_generates(tmp_path):
    openai, serve = pytest.importorskip("openai"), pytest.importorskip("transformers.cli.serve")
    pytest.importorskip("uvicorn")
    folder, tokenizer = tmp_path / "fat", tiny_tokenizer()
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
