"""Sources that others made: nothing of the user's is deleted, copied or published by them, none of their code is run,
and what a card repeats of theirs is plain.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers import run_warm, tiny_tokenizer
from transformers import AutoTokenizer

from stocha_hf.checkpoints.companions import check_links, companion_files
from stocha_hf.checkpoints.inspection import list_files
from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.checkpoints.modeling_file import is_ours
from stocha_hf.conversion.averaging import average
from stocha_hf.conversion.convert import convert
from stocha_hf.data import load_tokenizer
from stocha_hf.errors import StochaError
from stocha_hf.publishing.upload import _additions, _publishable
from stocha_hf.spec import MODELING_FILE


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Overwriting.


def test_overwriting_what_is_read_is_refused(checkpoint, tmp_path):
    source, around = checkpoint(name="models/source"), tmp_path / "models"
    (around / "config.json").write_text("{}")
    inside = source / "inside"
    convert(source, inside)  # where nothing is replaced, nothing is lost
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "text.jsonl").write_text("{}")
    before = contents(tmp_path)
    refit = {"refit": str(inside / "text.jsonl")}
    (inside / "text.jsonl").write_text('{"text": "w4"}')
    cases: list[tuple[Path, Path, str, dict[str, Any]]] = [
        (source, source, "is the source", {}),
        (tmp_path / "link", source, "is the source", {}),
        (source, tmp_path / "models" / ".." / "models" / "source", "is the source", {}),
        (source, inside, "lies in the source", {}),
        (source, around, "holds the source", {}),
        (source, source, "is the source", {"refit": "text.jsonl"}),
        (tmp_path / "link", inside, "holds the source .*text.jsonl|lies in the source", refit),
    ]
    for given, output, words, options in cases:
        with pytest.raises(StochaError, match=words):
            convert(given, output, overwrite=True, **options)
    with pytest.raises(StochaError, match="is the source"):
        average([inside, inside], inside, overwrite=True)
    (inside / "text.jsonl").unlink()
    assert contents(tmp_path) == before


def test_overwriting_the_files_that_a_source_links_to_is_refused(checkpoint, tmp_path):
    convert(checkpoint(), tmp_path / "out")
    links = tmp_path / "links"
    links.mkdir()
    for path in (tmp_path / "source").iterdir():
        (links / path.name).write_bytes(path.read_bytes())
    (links / "model.safetensors").unlink()
    (links / "model.safetensors").symlink_to(tmp_path / "out" / "model.safetensors")
    before = contents(tmp_path)
    with pytest.raises(StochaError, match="is a link to"):
        convert(links, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == before


# Files that are copied and published.


def test_companions_are_a_fixed_list():
    given = ["tokenizer.json", "LICENSE", "additional_chat_templates/tool.jinja"]
    strays = [".hf_token", "vocab.x", "token", "my_tokens.txt", "tokenizer.py", "LICENSE.env", "chat_template.py"]
    strays += ["additional_chat_templates/x.py", "additional_chat_templates/../../x.jinja", "sub/tokenizer.json"]
    assert companion_files([*strays, *given]) == sorted(given)


def test_secrets_beside_a_model_are_neither_copied_nor_published(checkpoint, tmp_path):
    source, out = checkpoint(), tmp_path / "out"
    for folder in (source, out):
        if folder == out:
            convert(source, out)
        (folder / ".hf_token").write_text("secret")
        (folder / "vocab.x").symlink_to("/etc/passwd")
        (folder / "evil.py").write_text("raise SystemExit")
    copied = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    copied |= {"chat_template.jinja", "LICENSE", "README.md", "modeling_stocha.py"}
    assert {path.name for path in out.iterdir()} == copied | {".hf_token", "vocab.x", "evil.py"}
    assert {*_publishable(out), "README.md", "modeling_stocha.py"} == copied


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "config.json", "model.safetensors", "README.md"])
def test_a_link_out_of_the_folder_is_refused(checkpoint, tmp_path, name):
    source = checkpoint()
    outside = tmp_path / "outside"
    (source / name).rename(outside)
    (source / name).symlink_to(outside)
    with pytest.raises(StochaError, match=rf"{name} is a link to .*outside: expected a file of"):
        convert(source, tmp_path / "out")
    (source / name).unlink()
    (source / name).write_bytes(outside.read_bytes())
    convert(source, tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    (tmp_path / "out" / name).symlink_to(outside)
    with pytest.raises(StochaError, match="is a link to"):
        _publishable(tmp_path / "out")


def test_links_within_the_folder_and_into_the_hubs_cache_are_followed(checkpoint, tmp_path, monkeypatch):
    repo = tmp_path / "hub" / "models--org--name"
    checkpoint(name="hub/models--org--name/blobs")
    snapshot, shared = repo / "snapshots" / ("0" * 40), tmp_path / "hub" / "blobs" / "ab"
    snapshot.mkdir(parents=True)
    shared.mkdir(parents=True)
    (repo / "blobs" / "model.safetensors").rename(shared / "xet")
    (repo / "blobs" / "model.safetensors").symlink_to(shared / "xet")
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "NOTICE").symlink_to(snapshot / "LICENSE")
    done = convert(snapshot, tmp_path / "out")
    assert done.source == {"id": "org/name", "revision": "0" * 40} and "NOTICE" in done.files
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "LICENSE").symlink_to(repo / "blobs" / "LICENSE")
    with pytest.raises(StochaError, match="is a link to"):
        check_links(plain, ["LICENSE"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    check_links(plain, ["LICENSE"])


# Code.

CODE = "import pathlib; pathlib.Path({!r}).write_text('ran')\nclass Evil:\n    pass\n"


ANSWERED = """
import sys, stocha_hf
from transformers import AutoTokenizer
source, converted, text, out = sys.argv[1:]
print(AutoTokenizer.from_pretrained(converted)("w4 w5").input_ids)
stocha_hf.convert(source, out, refit=text, refit_tokens=512)
"""


@pytest.mark.slow
def test_a_sources_code_is_not_copied_named_or_run(checkpoint, tmp_path):
    """Whoever answers yes when transformers asks has not run it either."""
    source, out, trace, text = checkpoint(), tmp_path / "out", tmp_path / "trace", tmp_path / "text.jsonl"
    (source / "evil.py").write_text(CODE.format(str(trace)))
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    edit_json(source / "config.json", auto_map={"AutoConfig": "evil.Evil"})
    files = convert(source, out).files
    assert "evil.py" not in files and "auto_map" not in json.loads((out / "tokenizer_config.json").read_text())
    assert "evil" not in (out / "config.json").read_text()
    text.write_text(f'{{"text": "{"w4 w5 w6 " * 100}"}}\n' * 20)
    done = run_warm(ANSWERED, source, out, text, tmp_path / "refitted", given="y\n" * 9)
    assert done.returncode == 0 and done.stdout.strip() == str(tiny_tokenizer()("w4 w5").input_ids), done.stderr
    assert not trace.exists()


def test_a_tokenizer_that_needs_the_sources_code_is_refused(checkpoint, tmp_path):
    source = checkpoint()
    edit_json(
        source / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]}, tokenizer_class="Evil"
    )
    with pytest.raises(StochaError, match=r"needs code of that folder, which is never run"):
        load_tokenizer(source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(StochaError, match=r"needs the code that its tokenizer_config\.json names, which is never run"):
        convert(source, tmp_path / "out")


def test_only_a_modeling_file_of_ours_is_published(checkpoint, tmp_path):
    out = tmp_path / "out"
    convert(checkpoint(), out)

    def published() -> bytes:
        additions = _additions(out, _publishable(out), "user/model")
        item = next(item for item in additions if item.path_in_repo == "modeling_stocha.py")
        return Path(str(item.path_or_fileobj)).read_bytes()

    assert is_ours(out / "modeling_stocha.py") and published() == MODELING_FILE.read_bytes()
    for released in (Path(__file__).parent / "released").glob("*.py"):
        (out / "modeling_stocha.py").write_bytes(released.read_bytes())
        assert is_ours(out / "modeling_stocha.py") and published() == released.read_bytes()
        edit_json(out / "config.json", auto_map={"AutoConfig": "evil.Evil"})
        sent = {item.path_in_repo: item.path_or_fileobj for item in _additions(out, _publishable(out), "user/model")}
        named = json.loads(sent["config.json"])["auto_map"].values()
        assert named and all(name.removeprefix("modeling_stocha.") in released.read_text() for name in named)
    (out / "modeling_stocha.py").write_text(MODELING_FILE.read_text() + "\nimport os\n")
    with pytest.warns(UserWarning, match="not a file that stocha_hf wrote, so the package's own"):
        assert published() == MODELING_FILE.read_bytes()
    edit_json(out / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    edit_json(out / "config.json", auto_map={"AutoModel": "other--repo.evil.Evil"})
    with pytest.warns(UserWarning, match="package's own"):
        sent = {item.path_in_repo: item.path_or_fileobj for item in _additions(out, _publishable(out), "user/model")}
    assert b"evil" not in sent["config.json"] and b"evil" not in sent["tokenizer_config.json"]


# Metadata and names.


def bomb(depth: int = 40) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, depth)]
    return "\n".join([*lines, f"language: *a{depth - 1}", f"license: *a{depth - 1}"])


@pytest.mark.parametrize(
    "text", [bomb(), "a: &a [*a]\nlicense: *a", "[" * 5000, "license: {a: b}\ntags: [[x]]", "? [a]\n: b"]
)
def test_only_strings_and_short_lists_are_taken_from_a_card(checkpoint, tmp_path, text):
    source = checkpoint()
    (source / "README.md").write_text(f"---\n{text}\n---\n# Source\n")
    convert(source, tmp_path / "out")
    assert "Licence of the source: not stated" in (tmp_path / "out" / "README.md").read_text()


def test_a_cards_metadata_keep_their_words(checkpoint):
    source = checkpoint()
    (source / "README.md").write_text(
        "---\nlanguage: [en, no]\nlicense: apache-2.0\nn: 1\nmodel-index: [{a: b}]\n---\n"
    )
    assert source_metadata(source) == {"language": ["en", "no"], "license": "apache-2.0", "n": "1"}


MARKUP = "org/x\n\n<img src=x>\n# Injected"


@pytest.mark.parametrize("value", ["", MARKUP, "a b", "org/x/y", "org/../x", "-x/y", "org/x" * 40, "[x](y)", "x`y"])
def test_a_base_model_must_be_a_hub_id(checkpoint, tmp_path, value):
    with pytest.raises(StochaError, match=r"base_model is .*not a valid Hub id: expected one such as org/name"):
        convert(checkpoint(), tmp_path / "out", base_model=value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["license", "license_name", "license_link", "language", "pipeline_tag"])
def test_markup_in_a_sources_metadata_is_refused(checkpoint, tmp_path, key):
    source = checkpoint()
    (source / "README.md").write_text(f"---\n{key}: {json.dumps(MARKUP)}\n---\n")
    with pytest.raises(StochaError, match=f"{key} in .*README.md is .*: expected a plain name"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    "origin", [5, [1], {"id": MARKUP}, {"id": "a/b/c"}, {"id": "ok", "revision": "x`y"}, {"id": 5}, {"<b>": "<b>"}]
)
def test_an_origin_that_is_no_name_is_refused(checkpoint, tmp_path, origin):
    convert(checkpoint(), tmp_path / "first")
    entry = json.loads((tmp_path / "first" / "config.json").read_text())["stocha"]
    edit_json(tmp_path / "first" / "config.json", stocha=entry | {"source": origin})
    with pytest.raises(StochaError, match="source"):
        convert(tmp_path / "first", tmp_path / "second")
    with pytest.raises(StochaError, match="source"):
        _publishable(tmp_path / "first")


def test_a_folders_name_becomes_a_plain_one(checkpoint, tmp_path):
    source = checkpoint(name="<b>my model`s [x](y)")
    assert convert(source, tmp_path / "out").source["id"] == "b-my model-s -x--y-"


@pytest.mark.parametrize("name", ["x" * 300, "~nouser-at-all/x", "a\0b", "x/" * 3000 + "y"])
def test_a_name_that_no_file_system_has_is_refused(checkpoint, tmp_path, name):
    for source, output in ((name, tmp_path / "out"), (checkpoint(), name)):
        with pytest.raises(StochaError):
            convert(source, output)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"model_type": "llama", "hidden_act": "\\ud800"}',
        "5",
        "null",
        '{"model_type": ["llama"]}',
        "\xff\xfe",
    ],
)
def test_a_config_that_is_none_is_refused(checkpoint, tmp_path, text):
    source = checkpoint()
    (source / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StochaError, match=r"config.json|model_type"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize(
    "value", [5, "x", [], None, {"activation": []}, {"p": "x"}, {"history": 5}, {"threshold": {}}]
)
def test_a_stocha_entry_that_is_none_is_refused(checkpoint, tmp_path, value):
    source = checkpoint()
    edit_json(source / "config.json", stocha=value)
    with pytest.raises(StochaError, match="stocha"):
        convert(source, tmp_path / "out")


def test_code_named_in_a_strange_way_is_dropped(checkpoint, tmp_path):
    source = checkpoint()
    edit_json(source / "config.json", auto_map=5)
    convert(source, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w4").input_ids
    assert "modeling_stocha.py" in list_files(tmp_path / "out")
    assert os.stat(tmp_path / "out" / "modeling_stocha.py").st_nlink == 1
