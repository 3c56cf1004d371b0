"""A model's own answers: what is written is what it would say, and a file goes on where it was left."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from helpers import assert_refused, call_command, tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stocha_hf.answers import aligned, batches, writing
from stocha_hf.answers.choosing import BLOCK, Choice, numbers
from stocha_hf.answers.finishing import Finishing
from stocha_hf.answers.grouped import NAME, attend, grouped_attention
from stocha_hf.answers.prompts import read_prompts, rendered, token_ids
from stocha_hf.answers.room import ROWS, rows_at_once
from stocha_hf.answers.writing import write_answers
from stocha_hf.data import calibration_windows, load_data
from stocha_hf.data.row_text import plain_text
from stocha_hf.decoding import step
from stocha_hf.errors import StochaError
from stocha_hf.modeling_stocha import ARCHITECTURES, StochaConfig, StochaMLP
from stocha_hf.patching import patch
from stocha_hf.training.answer_tokens import answer_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [f"w{4 + i} w9 w{10 + 2 * i}" for i in range(9)]
GREEDY: dict[str, Any] = {"new": 10, "temperature": 0.0}


def texts(path: Path) -> list[str]:
    return [plain_text(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("free", "expected"), [(80e9, ROWS["cuda"]), (1e9, 44), (1e6, 1)])
def test_as_many_answers_are_in_work_as_memory_holds(monkeypatch, free: float, expected: int) -> None:
    """Qwen2.5-0.5B in bfloat16: 24 layers of two heads of 64, 12 KB a token, and 151,936 words a step."""
    sizes = {"num_hidden_layers": 24, "num_key_value_heads": 2, "num_attention_heads": 14, "hidden_size": 896}
    model = SimpleNamespace(
        device=torch.device("cuda"), dtype=torch.bfloat16, config=SimpleNamespace(**sizes, vocab_size=151_936)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free), int(free)))
    assert rows_at_once(model, 900) == expected
    assert rows_at_once(tiny_model(), 900) == ROWS["cpu"]


def test_answers_are_those_of_the_model_with_template_and_special_tokens(tmp_path: Path) -> None:
    model, tokenizer, path = tiny_model(), tiny_tokenizer(), tmp_path / "answers.jsonl"
    asked = rendered(tokenizer, [*PROMPTS, PROMPTS[0]], chat=True)
    assert len(asked) == 9 and asked[0] == "w4 w4 w9 w10 w5"
    written = write_answers(model, tokenizer, asked, path, batch_size=4, **GREEDY)
    assert (written.answers, written.new, written.too_long) == (9, 9, 0)
    expected = set()
    for text in asked:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)[0]
        expected.add(text + tokenizer.decode(whole[ids.shape[1] :]))
    assert set(texts(path)) == expected
    assert sorted(map(plain_text, load_data(str(path)))) == sorted(expected)
    tokenizer.save_pretrained(tmp_path)
    assert calibration_windows(str(path), tmp_path, 64, 8, 0).shape == (8, 8)  # what a refit reads


def test_a_run_that_was_killed_goes_on(tmp_path: Path) -> None:
    model, tokenizer, path = tiny_model(), tiny_tokenizer(), tmp_path / "answers.jsonl"
    write_answers(model, tokenizer, PROMPTS, path, **GREEDY)
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:4]) + whole[4][:20])
    written = write_answers(model, tokenizer, PROMPTS, path, **GREEDY)
    assert (written.answers, written.new) == (9, 5)
    assert path.read_text().splitlines(keepends=True)[:4] == whole[:4] and sorted(texts(path)) == sorted(
        plain_text(json.loads(line)) for line in whole
    )
    with pytest.raises(StochaError, match=r"answers\.jsonl holds answers with temperature 0\.0, and temperature is 1"):
        write_answers(model, tokenizer, PROMPTS, path, new=10, temperature=1)
    other = tmp_path / "answers.parquet"
    write_answers(model, tokenizer, PROMPTS[:5], other, **GREEDY)
    lines = other.with_name("answers.parquet.part.jsonl")  # is there if a run was killed before it removed them
    lines.write_text("".join(json.dumps(row) + "\n" for row in pyarrow.parquet.read_table(other).to_pylist()))
    assert write_answers(model, tokenizer, PROMPTS, other, **GREEDY).new == 4
    assert sorted(map(plain_text, load_data(str(other)))) == sorted(texts(path))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"answers.{kind}" for kind in ("jsonl", "jsonl.settings", "parquet", "parquet.settings")
    )


def test_a_file_without_marks_is_read_and_not_gone_on_with(tmp_path: Path) -> None:
    model, tokenizer, path = tiny_model(), tiny_tokenizer(), tmp_path / "answers.jsonl"
    write_answers(model, tokenizer, PROMPTS, path, **GREEDY)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    before = [{"text": row.pop("prompt") + row.pop("completion")} | row for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in before))
    assert [row["text"] for row in load_data(str(path))] == [row["text"] for row in before]
    with pytest.raises(StochaError, match=r"rows of answers\.jsonl do not tell a prompt .*; name another output"):
        write_answers(model, tokenizer, PROMPTS, path, **GREEDY)
    assert [json.loads(line) for line in path.read_text().splitlines()] == before


def bpe_tokenizer(bos: bool) -> Any:
    """A tokenizer of four letters that has a token for two of them, as `ab`; with `bos` it begins texts with <s>."""
    tokens = ["<s>", "</s>", "<turn>", *"abcd", "ab", "cd"]
    words = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b"), ("c", "d")]))
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", extra_special_tokens=["<turn>"]
    )
    if bos:
        words.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tokenizer.backend_tokenizer.post_processor = words.post_processor
    return tokenizer


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_rows_become_the_tokens_that_the_model_read_and_wrote(
    bos: bool, streaming: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, path = bpe_tokenizer(bos), tmp_path / "answers.jsonl"
    of = tokenizer.convert_tokens_to_ids
    prompts = ["<s><turn>ca", "<s>abac", "<s>dc<turn>"]
    wrote = [of(["b", "cd", "</s>"]), of(["d", "ab", "a"]), of(["d", "c", "<turn>"])]  # done, cut, and done otherwise
    read: list[list[int]] = []

    def continue_prompts(model: Any, ids: list[list[int]], **options: Any) -> Any:
        read.extend(ids)
        yield from enumerate(wrote)

    monkeypatch.setattr(writing, "continue_prompts", continue_prompts)
    write_answers(tiny_model(), tokenizer, prompts, path, new=3)
    data = load_data(str(path), streaming=streaming)
    found = list(answer_tokens(data, tokenizer))
    assert [row["input_ids"] for row in found] == [prompt + answer for prompt, answer in zip(read, wrote, strict=True)]
    assert [row["completion_mask"] for row in found] == [[0] * len(prompt) + [1] * 3 for prompt in read]
    assert all(prompt.count(0) == 1 for prompt in read)
    among = Dataset.from_list([{"prompt": "", "completion": "abd", "finished": None}])  # text, in a mixture
    (row,) = answer_tokens(among, tokenizer)
    assert row["input_ids"] == [*([0] if bos else []), *of(["ab", "d", "</s>"])]
    assert set(row["completion_mask"]) == {1}
    joint = [tokenizer(plain_text(row))["input_ids"] for row in data]
    assert [len(ids) for ids in joint] == [len(p) + len(a) - n for p, a, n in zip(read, wrote, (1, 1, 0), strict=True)]


def test_samples_differ_by_seed_and_equal_ones_are_written_once(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    drawn = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        path = tmp_path / f"{name}.jsonl"
        write_answers(model, tokenizer, PROMPTS[:2], path, new=6, temperature=1.0, samples=3, seed=seed)
        drawn.append(texts(path))
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 2
    with pytest.raises(StochaError, match="with seed 1, and seed is 2 now"):
        write_answers(model, tokenizer, PROMPTS[:2], path, new=6, temperature=1.0, samples=3, seed=2)
    greedy = write_answers(model, tokenizer, PROMPTS[:2], tmp_path / "d.jsonl", samples=3, **GREEDY)
    assert (greedy.answers, greedy.new) == (2, 2)
    again = write_answers(model, tokenizer, PROMPTS[:2], tmp_path / "d.jsonl", samples=3, **GREEDY)
    assert (again.answers, again.new, again.new_tokens) == (2, 0, 0), "equal ones are not drawn again"


def test_a_file_gets_more_samples_later(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for name, samples in (("whole", [4]), ("grown", [1, 4, 2])):
        for count in samples:
            path = tmp_path / f"{name}.jsonl"
            done = write_answers(model, tokenizer, PROMPTS[:3], path, new=6, temperature=1.0, samples=count)
    assert done.new == 0, "fewer are there"
    assert sorted(texts(tmp_path / "grown.jsonl")) == sorted(texts(tmp_path / "whole.jsonl"))
    settings = path.with_name("grown.jsonl.settings")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"samples": 2}))  # as once
    assert write_answers(model, tokenizer, PROMPTS[:3], path, new=6, temperature=1.0, samples=4).new == 0
    for broken in ("no JSON", "5", '{"equal": null}'):
        settings.write_text(broken)
        with pytest.raises(StochaError, match=r"without a readable grown\.jsonl\.settings: expected answers of this"):
            write_answers(model, tokenizer, PROMPTS[:3], path, new=6, temperature=1.0, samples=4)


def test_what_is_drawn_is_the_same_in_any_batch_and_after_a_kill(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    options: dict[str, Any] = {"new": 12, "temperature": 1.0, "top_p": 0.9, "samples": 2}
    for rows in (1, 3, 18):
        write_answers(model, tokenizer, PROMPTS, tmp_path / f"{rows}.jsonl", batch_size=rows, **options)
    expected = sorted(texts(tmp_path / "1.jsonl"))
    assert sorted(texts(tmp_path / "3.jsonl")) == sorted(texts(tmp_path / "18.jsonl")) == expected
    assert len(set(expected)) == 18, "samples of a prompt differ"
    write_answers(model, tokenizer, PROMPTS[4:], tmp_path / "killed.jsonl", **options)
    write_answers(model, tokenizer, PROMPTS, tmp_path / "killed.jsonl", **options)
    assert sorted(texts(tmp_path / "killed.jsonl")) == expected


def test_numbers_follow_from_key_and_place_alone() -> None:
    found = numbers([5, 2**64 - 1], [3, 0], 4)
    assert found.dtype == torch.float64 and torch.equal(found[0, 1:], numbers([5], [4], 3)[0])
    assert torch.equal(found[1], numbers([2**64 - 1], [0], 4)[0])
    many = numbers(range(1000), [0] * 1000, 1000)
    assert 0 <= many.min() < 1e-5 and 1 - 1e-5 < many.max() < 1
    # five standard errors of a share of 1,000,000 draws are at most 0.0025; of 1,000, 0.016
    assert torch.allclose(many.flatten().histc(10, 0, 1) / 1e6, torch.full((10,), 0.1).double(), atol=0.0025)
    for line in (many[:, 0], many[0]):
        assert torch.allclose(line.histc(4, 0, 1) / 1e3, torch.full((4,), 0.25).double(), atol=0.07)


def test_prompts_without_room_for_an_answer_are_left_out(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()  # 64 positions
    long = " ".join(["w7"] * 60)
    written = write_answers(model, tokenizer, [long, "w8"], tmp_path / "a.jsonl", **GREEDY)
    assert (written.answers, written.too_long) == (1, 1)
    for words, advice in ((60, "a smaller --new"), (63, "a smaller --new"), (64, "a shorter prompt")):
        given = [" ".join(["w7"] * words)], tmp_path / "b.jsonl"
        with pytest.raises(StochaError, match=f"the shortest prompt has {words} tokens.*; give {advice}"):
            write_answers(model, tokenizer, *given, **GREEDY)
        if advice == "a smaller --new":
            assert write_answers(model, tokenizer, *given, new=1, temperature=0.0).answers == 1
            (tmp_path / "b.jsonl").unlink()


def test_no_prompts_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for finish, what in ((None, "prompt"), (Finishing(), "beginning")):
        with pytest.raises(StochaError, match=f"^there is no {what}: expected at least one$"):
            write_answers(tiny_model(), tiny_tokenizer(), [], tmp_path / "a.jsonl", finish=finish)
    assert not list(tmp_path.iterdir())


def test_a_bos_is_neither_doubled_nor_written_where_the_tokenizer_puts_it(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = "<s> {% for message in messages %}{{ message['content'] }} {% endfor %}"
    asked = rendered(tokenizer, ["w5 w6"], chat=True)
    assert token_ids(tokenizer, asked) == [[1, 5, 6]]
    write_answers(model, tokenizer, asked, tmp_path / "a.jsonl", **GREEDY)
    (text,) = texts(tmp_path / "a.jsonl")
    assert tokenizer(text)["input_ids"][:3] == [1, 5, 6] and not text.startswith("<s>")


def test_prompts_come_from_files_of_any_kind(tmp_path: Path) -> None:
    chat = [
        {"role": "user", "content": "w5"},
        {"role": "assistant", "content": "w6"},
        {"role": "user", "content": "w7"},
    ]
    files = {
        "a.txt": ("w5 w6\n\nw7\n", ["w5 w6", "w7"]),
        "b.jsonl": ('{"prompt": "w5", "text": "no"}\n', ["w5"]),
        "c.jsonl": (json.dumps({"messages": [*chat, {"role": "assistant", "content": "w8"}]}) + "\n", [chat]),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_text(content)
        assert read_prompts(str(tmp_path / name)) == expected
    assert read_prompts(str(tmp_path / "b.jsonl"), column="text") == ["no"]
    assert rendered(tiny_tokenizer(), [chat], chat=True) == ["w4 w5 w4 w6 w4 w7 w5"]


def test_top_p_draws_from_the_nucleus_by_its_chances() -> None:
    some = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chances = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    logits = chances.log().repeat(20_000, 1)
    for top_p, kept in ((1.0, 5), (0.75, 3), (0.7, 2), (0.2, 1)):
        drawn = Choice(1.0, top_p)(logits, some).bincount(minlength=5) / 20_000
        expected = chances * (torch.arange(5) < kept)
        # five standard errors of a share of 20,000 draws are at most 0.018
        assert torch.allclose(drawn, expected / expected.sum(), atol=0.018)
        assert drawn[kept:].sum() == 0
    cold = Choice(0.1)(logits, some).bincount(minlength=5) / 20_000
    assert cold[0] == pytest.approx((chances**10 / (chances**10).sum())[0].item(), abs=0.018)


@pytest.mark.parametrize("size", [5, BLOCK, 3 * BLOCK, 3 * BLOCK + 7])
def test_a_number_draws_the_token_that_it_falls_on(size: int) -> None:
    torch.manual_seed(0)
    logits = 4 * torch.randn(50, size).masked_fill(torch.rand(50, size) < 0.5, -torch.inf)
    ends = logits.double().softmax(-1).cumsum(-1)
    some = torch.rand(50, dtype=torch.float64)
    some[:2] = torch.tensor([0.0, 1 - 2**-53])
    drawn = Choice(1.0)(logits, some)
    assert logits.gather(1, drawn[:, None]).isfinite().all(), "of no chance is none"
    exact = torch.searchsorted(ends, some[:, None], right=True)[:, 0]
    assert (drawn == exact)[2:].all() and drawn[0] == exact[0], "float32 rounds a boundary by 1e-7"
    assert drawn.dtype == torch.int64 and ((Choice(1.0)(logits) >= 0) & (Choice(1.0)(logits) < size)).all()


@pytest.mark.parametrize("tokens", [1, 3])
def test_grouped_attention_is_sdpa_without_copies(tokens: int) -> None:
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    query, key, value = (torch.randn(4, heads, size, 8) for heads, size in ((6, tokens), (2, 64), (2, 64)))
    hidden = torch.rand(4, 1, tokens, 64) < 0.5
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    for some in (mask, None) if tokens == 1 else (mask,):
        expected = sdpa_attention_forward(module, query, key, value, some, scaling=0.3)[0]
        assert torch.allclose(attend(module, query, key, value, some, scaling=0.3)[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_model_uses_it_in_steps_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(kind), [[5, 6, 7], [8], [9, 10]]
    expected = dict(batches.continue_prompts(model, prompts, new=6, ends=(), rows=3))
    steps = []
    monkeypatch.setattr(
        batches, "grouped_attention", lambda config, _: grouped_attention(config, torch.device("cuda"))
    )
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, NAME, lambda *args, **more: steps.append(1) or attend(*args, **more))
    assert dict(batches.continue_prompts(model, prompts, new=6, ends=(), rows=3)) == expected
    assert len(steps) == 2 * batches.STRIDE and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_few_answers_at_a_time_are_whole_steps_of_the_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind, **({} if kind == "llama" else {"sliding_window": 6}))
    patch(model, StochaConfig(activation=ARCHITECTURES[kind].act))
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 64, (size,), generator=draw).tolist() for size in (3, 2, 7, 5, 30, 4)]
    given: dict[str, Any] = {"new": 20, "ends": ()}
    with monkeypatch.context() as without:
        without.setattr(StochaMLP, "runtime", None)
        without.setattr(batches, "has_whole_steps", lambda model: False)
        expected = dict(batches.continue_prompts(model, prompts, rows=2, **given))
    monkeypatch.setattr(aligned, "PLACES", 4)  # what no text needs is dropped soon
    calls, run = [], step.run
    monkeypatch.setattr(step, "run", lambda *args, **more: calls.append(1) or run(*args, **more))
    for rows in (1, 2, 6):
        assert dict(batches.continue_prompts(model, prompts, rows=rows, **given)) == expected
    assert len(calls) == (6 + 3 + 1) * 3 * batches.STRIDE  # each of 24 steps for 20 tokens


def test_the_command_writes_answers_and_tells_how_many(checkpoint, tmp_path: Path) -> None:
    source, prompts = checkpoint(), tmp_path / "prompts.txt"
    prompts.write_text("w5 w6\nw7\nw5 w6\n")
    options = ["--new", 5, "--temperature", 0, "--dtype", "float32"]
    done = call_command("stocha-answers", source, prompts, tmp_path / "out.jsonl", *options, "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["answers"] == figures["new"] == len(texts(tmp_path / "out.jsonl")) == 2
    assert figures["weights"] and figures["new_tokens"] <= 10
    done = call_command("stocha-answers", source, prompts, tmp_path / "out.jsonl", *options)
    assert "2 answers, 0 of them new" in done.stdout
    assert_refused(call_command("stocha-answers", source, prompts, tmp_path / "out.csv"), "out.csv", ".parquet")
