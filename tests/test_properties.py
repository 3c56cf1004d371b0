"""Whatever a file that others made holds, reading it is a StochaError or a success: no other exception, no hang.

Inputs are drawn by hypothesis, near what is valid, and the same in every run.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_model
from helpers.gguf_writer import write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st

from stocha_hf.checkpoints.inspection import (
    INDEX,
    SINGLE,
    check_weights,
    list_files,
    read_config,
    read_json,
    weight_files,
)
from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.conversion.convert import convert
from stocha_hf.conversion.gguf import check_gguf
from stocha_hf.errors import StochaError

pytestmark = pytest.mark.slow
few = settings(max_examples=60, derandomize=True, database=None, deadline=timedelta(seconds=30))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([0, -1, 2**63, "relu"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A single and a sharded checkpoint, a converted one and a .gguf file."""
    folder = tmp_path_factory.mktemp("properties")
    model = tiny_model("llama", vocab_size=32)
    model.save_pretrained(folder / "single")
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    convert(folder / "single", folder / "stocha", activation="fatrelu", threshold=[0.1, 0.2])
    write_gguf(folder / "m.gguf", model)
    yield folder
    shutil.rmtree(folder)


def changed(data: bytes, edits: list[tuple[float, int]], keep: float) -> bytes:
    """`data` with bytes set at shares of its length, cut to a share of it."""
    new = bytearray(data)
    for place, value in edits:
        new[int(place * (len(new) - 1))] = value
    return bytes(new[: math.ceil(keep * len(new))])


EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4)
KEEP = st.just(1.0) | st.floats(0, 1)


@few
@given(data=st.data())
def test_config_json(work: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["single", "stocha"]))
    path = work / name / "config.json"
    whole = path.read_text()
    config = json.loads(whole)
    keys = st.sampled_from([*config, "auto_map", "quantization_config", "head_dim", "hidden_activation"])
    config |= data.draw(st.dictionaries(keys, VALUES, min_size=1, max_size=3))
    if isinstance(config.get("stocha"), dict):
        entry = st.sampled_from([*config["stocha"], "k", "source", "history"])
        config["stocha"] = config["stocha"] | data.draw(st.dictionaries(entry, VALUES, max_size=2))
    try:
        path.write_text(json.dumps(config))
        convert(work / name, work / "out", overwrite=True)
        assert read_config(work / "out")["auto_map"]["AutoModel"] == "modeling_stocha.StochaLlamaModel"
    except StochaError:
        pass
    finally:
        path.write_text(whole)
    assert not list(work.glob(".*"))


@few
@given(edits=EDITS, keep=KEEP, in_header=st.booleans())
def test_safetensors_header(work: Path, edits: list[tuple[float, int]], keep: float, in_header: bool) -> None:
    path = work / "single" / SINGLE
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little") if in_header else 8
    try:
        path.write_bytes(changed(whole[:length], edits, 1.0) + whole[length : math.ceil(keep * len(whole))])
        check_weights(path.parent, [SINGLE], read_config(path.parent))
    except StochaError:
        pass
    finally:
        path.write_bytes(whole)


@few
@given(content=VALUES, some=st.dictionaries(st.text(max_size=8), VALUES, max_size=3), within=st.booleans())
def test_index(work: Path, content: Any, some: dict[str, Any], within: bool) -> None:
    folder = work / "sharded"
    path = folder / INDEX
    whole = path.read_text()
    index = json.loads(whole)
    new = index | {"weight_map": index["weight_map"] | some if within else content}
    try:
        path.write_text(json.dumps(new))
        files = weight_files(list_files(folder), lambda: read_json(path, "an index"), "a model")
        check_weights(folder, files, read_config(folder))
    except StochaError:
        pass
    finally:
        path.write_text(whole)


@settings(few, max_examples=150)
@given(edits=EDITS, keep=KEEP)
def test_gguf_metadata(work: Path, edits: list[tuple[float, int]], keep: float) -> None:
    whole = (work / "m.gguf").read_bytes()
    header = whole.index(b"blk.1.ffn_down")
    path = work / "changed.gguf"
    path.write_bytes(changed(changed(whole[:header], edits, 1.0) + whole[header:], [], keep))
    with suppress(StochaError):
        check_gguf(path)


@settings(few, max_examples=100)
@given(
    lines=st.lists(
        st.sampled_from(
            ["license: mit", "language:", "- en", "  - [en, no]", "a: &a [*a]", "b: *a", "? [x]", ": {y: 1}", "<<: *a"]
        )
        | st.text(st.characters(codec="utf-8"), max_size=12),
        max_size=8,
    ),
    key=st.sampled_from(["license", "license_link", "language", "tags"]),
    value=VALUES,
)
def test_card_metadata(work: Path, lines: list[str], key: str, value: Any) -> None:
    folder = work / "card"
    folder.mkdir(exist_ok=True)
    text = "\n".join(["---", *lines, f"{key}: {json.dumps(value)}", "---", "# Card"])
    (folder / "README.md").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        found = source_metadata(folder)
    except StochaError:
        return
    for item in found.values():
        assert isinstance(item, str) or all(isinstance(part, str) for part in item)
