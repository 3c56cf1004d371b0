"""Training data: which files and columns are taken, and what is refused."""

from __future__ import annotations

import json

import datasets
import pyarrow as pa
import pytest
from datasets import Dataset
from huggingface_hub.errors import HfHubHTTPError

from stocha_hf.data import load_data, load_mixture
from stocha_hf.data.row_text import plain_text
from stocha_hf.errors import StochaError

HTTPError = HfHubHTTPError.__bases__[0]  # the root of whichever HTTP library the client uses
TEXTS = ["first text", "second text"]


@pytest.mark.parametrize("streaming", [False, True])
def test_every_kind_of_file_gives_the_same_text(tmp_path, streaming):
    Dataset.from_dict({"text": TEXTS, "source": ["a", "b"]}).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "data.csv").write_text("text\nfirst text\nsecond text\n")
    for name in ("data.parquet", "data.jsonl", "data.csv"):
        rows = list(load_data(str(tmp_path / name), streaming=streaming))
        assert rows == [{"text": text} for text in TEXTS]


def test_a_text_file_is_one_document_and_a_folder_is_its_files(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"one line of {name}\n\nanother")
    rows = [row["text"] for row in load_data(str(folder))]
    assert rows == ["one line of a.txt\n\nanother", "one line of b.txt\n\nanother"]


def test_chat_and_completion_columns_are_taken_and_other_columns_left(tmp_path):
    chat = [[{"role": "user", "content": "hi"}]]
    Dataset.from_dict({"messages": chat, "score": [1]}).to_json(tmp_path / "chat.jsonl")
    Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "text": ["c"]}).to_json(tmp_path / "pairs.jsonl")
    assert load_data(str(tmp_path / "chat.jsonl")).column_names == ["messages"]
    assert sorted(load_data(str(tmp_path / "pairs.jsonl")).column_names) == ["completion", "prompt"]


def test_rows_of_token_ids_are_taken_as_they_are(tmp_path):
    Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "text": TEXTS}).to_parquet(tmp_path / "rows.parquet")
    assert list(load_data(str(tmp_path / "rows.parquet"))) == [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}]


def test_another_text_column_is_renamed(tmp_path):
    Dataset.from_dict({"body": TEXTS}).to_parquet(tmp_path / "data.parquet")
    assert list(load_data(str(tmp_path / "data.parquet"), text_column="body")) == [{"text": text} for text in TEXTS]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_training_data_is_refused_in_one_sentence(tmp_path, streaming):
    Dataset.from_dict({"body": TEXTS, "id": [1, 2]}).to_parquet(tmp_path / "columns.parquet")
    Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "weights.bin").write_bytes(b"")
    cases = {
        "columns.parquet": "columns body, id: expected the text column 'text'",
        "numbers.parquet": "there is 1 in the column text of row 1 of .*numbers.parquet: expected text",
        "empty.jsonl": "empty",
        "broken.parquet": "truncated or no parquet file",
        "weights.bin": "holds no text",
    }
    for name, words in cases.items():
        with pytest.raises(StochaError, match=words) as refusal:
            load_data(str(tmp_path / name), streaming=streaming)
        assert "\n" not in str(refusal.value) and name in str(refusal.value)


def test_without_the_package_datasets_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("stocha_hf.data.rows.find_spec", lambda name: None)
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(StochaError, match=r"pip install 'stocha_hf\[train\]'"):
        load_data(str(tmp_path / "data.txt"))


def test_null_is_no_text_and_lists_of_parts_are_theirs(tmp_path, caplog):
    call = [{"role": "user", "content": "weather?"}, {"role": "assistant", "content": None}]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]}
    ]
    chat = tmp_path / "chat.jsonl"
    chat.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (call, parts, None)))
    assert [plain_text(row).strip() for row in load_data(str(chat))] == ["weather?", "ab"]
    assert "chat.jsonl: 1 of 3 rows have no text and are left out" in caplog.text
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": null, "completion": "c"}\n')
    assert list(load_data(str(pairs), streaming=True)) == [{"completion": "b", "prompt": "a"}]
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"body": null}\n{"body": "x"}\n')
    for streaming in (False, True):
        assert list(load_data(str(texts), text_column="body", streaming=streaming)) == [{"text": "x"}]


def test_a_stream_names_the_row_when_it_gets_there(tmp_path):
    path = tmp_path / "chat.jsonl"
    good = {"messages": [{"role": "user", "content": "hi"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good, {"messages": "hi"})))
    rows = iter(load_data(str(path), streaming=True))
    assert [next(rows), next(rows)] == [good, good]
    with pytest.raises(StochaError, match=r"'hi' in the column messages of row 3 of .*chat\.jsonl"):
        next(rows)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_trouble_with_the_cache_is_not_blamed_on_the_data_or_the_network(tmp_path, monkeypatch, error):
    (tmp_path / "data.txt").write_text("text")

    def fail(*args, **kwargs):
        raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(StochaError, match=rf"cache of datasets cannot be written \({error.strerror}\)"):
        load_data(str(tmp_path / "data.txt"))


def test_a_hub_data_set_shows_no_address_that_may_be_signed(monkeypatch):
    def fail(*args, **kwargs):
        raise HTTPError("GET https://cdn.example/x?Signature=secret")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(StochaError, match=r"org/data cannot be read from the Hub \(HTTPError\)") as refusal:
        load_data("org/data")
    assert "secret" not in str(refusal.value)


def test_out_of_memory_is_not_a_broken_file(tmp_path, monkeypatch):
    (tmp_path / "data.txt").write_text("text")
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        load_data(str(tmp_path / "data.txt"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_holds_its_shares_and_every_row(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 seconds at the end of each pass
    Dataset.from_dict({"text": [f"a{i}" for i in range(30)], "other": list(range(30))}).to_json(tmp_path / "a.jsonl")
    large = pa.table({"text": pa.array([f"b{i}" for i in range(100)], pa.large_string())})
    Dataset(large).to_parquet(tmp_path / "b.parquet")
    shares = {str(tmp_path / "a.jsonl"): 3, str(tmp_path / "b.parquet"): 1}
    rows, again = ([row["text"] for row in load_mixture(shares, seed=1, streaming=streaming)] for _ in range(2))
    assert rows == again
    assert {row for row in rows if row[0] == "b"} == {f"b{i}" for i in range(100)}
    assert len(rows) > 300
    assert abs(sum(row[0] == "a" for row in rows) / len(rows) - 0.75) < 0.1
    pair = {"prompt": ["c"], "completion": ["d"]}
    Dataset(pa.table({name: pa.array(value, pa.large_string()) for name, value in pair.items()})).to_parquet(
        tmp_path / "c.parquet"
    )
    Dataset.from_dict(pair).to_json(tmp_path / "d.jsonl")
    shares = {str(tmp_path / name): 1 for name in ("c.parquet", "d.jsonl")}
    rows = list(load_mixture(shares, seed=1, streaming=streaming))
    assert len(rows) > 1 and all(row == {"prompt": "c", "completion": "d"} for row in rows)


@pytest.mark.parametrize("streaming", [False, True])
def test_text_is_mixed_with_answers_as_the_completion_of_no_prompt(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    large = pa.table({"text": pa.array(["b"] * 9, pa.large_string())})
    Dataset(large).to_parquet(tmp_path / "b.parquet")
    answer = {"prompt": "a", "completion": "c", "finished": True}
    Dataset.from_list([answer | {"tokens": 1, "id": "0"}] * 9).to_json(tmp_path / "a.jsonl")
    Dataset.from_list([{"prompt": "d", "completion": "e"}] * 9).to_json(tmp_path / "d.jsonl")
    a, b, d = (str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "d.jsonl"))
    text = {"prompt": "", "completion": "b"}
    pair = {"prompt": "d", "completion": "e"}
    for parts, expected in (
        ((a, b), [answer, text | {"finished": None}]),
        ((b, a), [answer, text | {"finished": None}]),
        ((a, d), [answer, pair | {"finished": None}]),
        ((b, d), [text, pair]),
    ):
        found = list(load_mixture(dict.fromkeys(parts, 1), seed=0, streaming=streaming))
        assert all(found.count(row) >= 9 for row in expected)
        assert sum(map(found.count, expected)) == len(found)


def test_a_mixture_that_cannot_be_is_refused(tmp_path):
    Dataset.from_dict({"text": ["a"]}).to_json(tmp_path / "a.jsonl")
    Dataset.from_dict({"messages": [[{"role": "user", "content": "c"}]]}).to_json(tmp_path / "c.jsonl")
    a, c = str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")
    for shares in ({}, {a: 0}, {a: -1}, {a: "much"}, {a: float("nan")}, {a: True}):
        with pytest.raises(StochaError, match="each with a share above 0"):
            load_mixture(shares, seed=0)
    chat = [{"role": "user", "content": "c"}]
    Dataset.from_dict({"prompt": [chat], "completion": [chat]}).to_json(tmp_path / "d.jsonl")
    for other in (c, str(tmp_path / "d.jsonl")):
        with pytest.raises(StochaError, match="the same training columns"):
            load_mixture({a: 1, other: 1}, seed=0)
    Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}).to_json(tmp_path / "b.jsonl")
    pairs = [str(tmp_path / "b.jsonl"), str(tmp_path / "d.jsonl")]
    for parts in (pairs, pairs[::-1]):
        with pytest.raises(StochaError, match="mixes text with messages in the column completion of "):
            load_mixture(dict.fromkeys(parts, 1), seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_row_of_which_it_is_not_known_whether_it_ended_is_kept(tmp_path, streaming):
    rows = [{"prompt": "a", "completion": f"b{i}", "finished": None if i else True} for i in range(3)]
    Dataset.from_list([*rows, rows[0] | {"completion": None}]).to_json(tmp_path / "a.jsonl")
    assert list(load_data(str(tmp_path / "a.jsonl"), streaming=streaming)) == rows
