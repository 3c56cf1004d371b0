"""The model card: figures from files of measurements only, and only of the folder's own weights."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import assert_refused, call_command
from helpers.measured_files import bench, evaluation, generation, tasks
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file

from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.conversion.convert import convert
from stocha_hf.errors import StochaError
from stocha_hf.measurement import figures
from stocha_hf.publishing.card import check_card, write_card
from stocha_hf.publishing.card_text import card_text
from stocha_hf.publishing.markdown import code, fence, text


@pytest.fixture
def converted(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    convert(checkpoint(), tmp_path / "relu", activation="relu")
    return tmp_path / "relu"


def saved(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_card_warns_of_tools_that_run_another_activation(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    cards = {}
    for name, options in {
        "relu": {"activation": "relu"},
        "stocha": {},
        "bits": {"activation": "relu", "bits": 8},
    }.items():
        convert(checkpoint(), tmp_path / name, **options)  # type: ignore[arg-type]
        cards[name] = (tmp_path / name / "README.md").read_text()
    assert "run `relu` here" in cards["relu"] and "MLX-LM | stops." in cards["relu"]
    assert "trust-remote-code` runs it as it is" in cards["relu"]
    assert "llama.cpp and Ollama run `silu`, **wrong, without a word**" in cards["relu"]
    for name in ("stocha", "bits"):  # infers with SiLU, as all tools do; holds tensors that other tools do not know
        assert "Other tools" not in cards[name]
    config = json.loads((tmp_path / "stocha" / "config.json").read_text())
    config["stocha"]["inputs"] = {"thresholds": {"q_proj": [0.1, 0.1]}}
    assert "vLLM and the native class of transformers run this model **without the cuts**" in card_text(config, {})
    config["stocha"]["inputs"]["token_factors"] = True  # tensors that others have no place for
    config["stocha"]["history"] = [{"method": "full", "steps": 1}]
    told = " ".join(card_text(config, {}).split())
    assert "MLX-LM and vLLM stop at these vectors" in told
    assert "The native class of transformers runs this model **without the cuts**" in told
    assert "their names and shapes are the source's. Beside them each layer has up to four vectors" in told
    config["stocha"]["inference"] = "relu"
    assert "trust-remote-code` runs it **without the cuts**" in card_text(config, {})


def test_the_card_tells_what_the_files_tell(converted: Path, tmp_path: Path) -> None:
    before = evaluation(converted, model="org/source", activation="silu", perplexity=12.5)
    read = {"step": 900, "blocks": 450, "lm_head": 450, "dense_blocks": 800, "share": 0.5625}
    own = evaluation(converted, baseline=before, kl=0.21875, top1_agreement=0.6875, bytes_read=read)
    swapped = evaluation(converted, perplexity=5506.25, weights="other")
    files = [saved(tmp_path / f"{i}.json", content) for i, content in enumerate((own, swapped))]
    more = ["--bench", saved(tmp_path / "b.json", bench(converted))]
    more += ["--generation", saved(tmp_path / "g.json", generation(converted))]
    more += ["--tasks", saved(tmp_path / "t.json", tasks(converted))]
    old = (converted / "README.md").read_text()
    done = call_command("stocha-card", converted, files[0], "--row", f"swapped={files[1]}", *more, "--json")
    assert done.returncode == 0, done.stderr
    card = (converted / "README.md").read_text()
    assert "| before: org/source | silu | 12.50 | 81.2% |  | 25.0 tokens/s |" in card
    assert "| swapped | relu | 5506.25 | 81.2% |" in card
    assert "| **this model** | relu | 17.38 | 81.2% | 56% | 80.0 tokens/s, 3.2x |" in card
    for told in ("4,096 tokens of val.txt", "75% to 88% zeros", "6.2% of the neurons", "0.219 nats", "33 GB/s"):
        assert told in card
    assert "| stocha, p 0.5 | -1.375 | 0.625 | 31.5 |" in card and "| greedy | -0.875 | 0.125 | 100.0 |" in card
    assert "| task | questions | **this model** | before: org/source | difference |" in card
    assert "| humaneval, pass@1 | 164 | 43.8% ± 3.9% | 50.0% ± 3.9% | -6.2% (-12.5% to +0.0%) |" in card
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert ["humaneval", 0.4375] in [
        [result["dataset"]["type"], metric["value"]]
        for result in metadata["model-index"][0]["results"]
        for metric in result["metrics"]
    ]
    assert (converted / "README.md.orig").read_text() == old
    for picture in ("zeros", "diversity"):
        assert f"(measurements/{picture}.png)" in card
        assert (converted / f"measurements/{picture}.png").read_bytes().startswith(b"\x89PNG")
    check_card(converted)


def test_tasks_without_a_baseline_have_no_column_for_it(converted: Path, tmp_path: Path) -> None:
    files = [
        saved(tmp_path / "e.json", evaluation(converted)),
        saved(tmp_path / "t.json", tasks(converted, baseline=None)),
    ]
    assert call_command("stocha-card", converted, files[0], "--tasks", files[1]).returncode == 0
    assert "| humaneval, pass@1 | 164 | 43.8% ± 3.9% |\n" in (converted / "README.md").read_text()
    check_card(converted)
    saved(files[1], tasks(converted, tasks=[{"task": "humaneval"}]))
    assert_refused(
        call_command("stocha-card", converted, files[0], "--tasks", files[1]), "t.json has no tasks.0.metric"
    )


def test_a_row_has_its_own_speed_and_notes_stand_behind_the_figures(converted: Path, tmp_path: Path) -> None:
    quantized = {"weights": "4 bits", "perplexity": 18.25}
    files = {
        "e": evaluation(converted, inputs_cut="at every token"),
        "r": evaluation(converted, **quantized),
        "b": bench(converted, weights="4 bits", sparse_ms=5.0, speedup=2.5, inputs_cut=0.75),
        "other": bench(converted, weights="others"),
    }
    paths = {name: saved(tmp_path / f"{name}.json", content) for name, content in files.items()}
    notes = tmp_path / "notes.md"
    notes.write_text("### On an H100\n\nA table.\n")
    row = ["--row", f"4 bits={paths['r']}"]
    done = call_command(
        "stocha-card", converted, paths["e"], *row, "--row-bench", f"4 bits={paths['b']}", "--notes", notes
    )
    assert done.returncode == 0, done.stderr
    card = (converted / "README.md").read_text()
    assert "| 4 bits | relu | 18.25 | 81.2% |  | 200.0 tokens/s, 2.5x |" in card
    assert "| **this model** | relu | 17.38 | 81.2% |  |  |" in card
    assert "Decoding, 4 bits: bfloat16, batch 1, 64 tokens after 64, 75% of the inputs cut, dense" in card
    assert "Inputs were cut at every token" in card and "### On an H100\n\nA table.\n\n## " in card
    assert (converted / "measurements/notes.md").read_text() == notes.read_text()
    assert json.loads((converted / "measurements/row_benches.json").read_text())["4 bits"]["sparse_ms"] == 5.0
    check_card(converted)
    for label, bad in (("4 bits", "other"), ("8 bits", "b")):
        done = call_command("stocha-card", converted, paths["e"], *row, "--row-bench", f"{label}={paths[bad]}")
        assert_refused(done, f"row '{label}'")


def test_the_card_tells_what_answers_read(converted: Path, tmp_path: Path) -> None:
    read = {"step": 900, "blocks": 450, "lm_head": 450, "dense_blocks": 1125, "share": 0.4}
    drafts = {"steps": 90, "drafted": 100, "accepted": 80, "verifications": 20, "cut_share": 0.25, "copied": 30}
    fallback = {"below": 0.9, "steps": 90, "repeated": 9, "share": 0.1, "cut_share": 0.3, "tokens": 1}
    reading = {"task": "humaneval", "steps": 90, "texts": 60, "bytes_read": read, "fallback": None}
    path = saved(tmp_path / "e.json", evaluation(converted))
    told = {}
    for name, more in {"drafts": {"drafts": drafts}, "fallback": {"fallback": fallback}, "plain": {}}.items():
        file = saved(tmp_path / "t.json", tasks(converted, task_bytes=[reading | more]))
        assert call_command("stocha-card", converted, path, "--tasks", file).returncode == 0
        told[name] = (converted / "README.md").read_text()
    assert "In humaneval a token took 40% of the bytes" in told["drafts"]
    assert "Of 130 drafted tokens, 30 of them copied from the text before, it accepted 80." in told["drafts"]
    assert "a decode step read 40%" in told["fallback"] and "10% of the steps computed again" in told["fallback"]
    assert "on 60 of the answers." in told["plain"]
    saved(tmp_path / "t.json", tasks(converted, task_bytes=[{"task": "humaneval"}]))
    done = call_command("stocha-card", converted, path, "--tasks", tmp_path / "t.json")
    assert_refused(done, "t.json has no task_bytes.0.steps")


def test_the_card_tells_which_tokens_of_a_text_were_read_again(converted: Path, tmp_path: Path) -> None:
    fallback = {"below": 0.9, "steps": 90, "repeated": 36, "share": 0.4, "cut_share": 0.3, "tokens": 1}
    cut = {"inputs_cut": "at every token"}
    for name, more in {"with": cut | {"fallback": fallback}, "without": cut}.items():
        path = saved(tmp_path / f"{name}.json", evaluation(converted, **more))
        assert call_command("stocha-card", converted, path).returncode == 0
        card = (converted / "README.md").read_text()
        assert ("window of text is read. 40% of the tokens were in doubt" in card) == (name == "with")


def test_the_card_of_a_cut_model_tells_its_limits_and_how_it_drafts(checkpoint: Callable[..., Path]) -> None:
    convert(checkpoint(), folder := checkpoint().parent / "cut")
    config = json.loads((folder / "config.json").read_text())
    plain = card_text(config, {})
    assert "custom_generate=lossless" not in plain and "Cuts change what" not in plain
    config["stocha"]["inputs"] = {"thresholds": {"q_proj": [0.1, 0.1]}}
    cut = card_text(config, {})
    assert "custom_generate=lossless" in cut and "Cuts change what" in cut and "only swapped" not in cut
    config["stocha"]["history"] = [{"method": "full", "dataset": "docs", "steps": 60}]
    trained = card_text(config, {})
    assert "Cuts change what" in trained and "trained on; on other text" in trained


def test_metadata_holds_the_results_and_keeps_the_licence(converted: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "eval.json", evaluation(converted))
    for _ in range(2):  # a card is also written over a measured one
        assert call_command("stocha-card", converted, path).returncode == 0
    metadata = yaml.safe_load((converted / "README.md").read_text().split("---\n")[1])
    assert metadata["license"] == "apache-2.0" and metadata["stocha_weights"] == weights_hash(converted)
    (index,) = metadata["model-index"]
    metrics = [metric for result in index["results"] for metric in result["metrics"]]
    assert {metric["type"]: metric["value"] for metric in metrics} == {"perplexity": 17.375, "sparsity": 0.8125}
    assert source_metadata(converted)["license"] == "apache-2.0"


@pytest.mark.slow
def test_a_measured_checkpoint_end_to_end(converted: Path, tmp_path: Path) -> None:
    """The verbs' own output is what stocha-card reads."""
    data = tmp_path / "text.txt"
    data.write_text(" ".join(f"w{4 + i * i % 60}" for i in range(200)))
    quick = ["--dtype", "float32", "--json"]
    outputs = [
        call_command(
            "stocha-eval", converted, "--data", data, "--length", 16, "--baseline", tmp_path / "source", *quick
        ),
        call_command("stocha-bench", converted, "--prompt", 4, "--new", 3, *quick),
        call_command("stocha-generate", converted, "--prompt", "w5 w6", "--samples", 2, "--new", 4, *quick),
    ]
    paths = [tmp_path / f"{name}.json" for name in ("eval", "bench", "generate")]
    for path, done in zip(paths, outputs, strict=True):
        assert done.returncode == 0, done.stderr
        path.write_text(done.stdout)
    done = call_command("stocha-card", converted, paths[0], "--bench", paths[1], "--generation", paths[2])
    assert done.returncode == 0, done.stderr
    assert f"{json.loads(outputs[0].stdout)['perplexity']:.2f}" in (converted / "README.md").read_text()


def test_the_card_says_what_was_done_to_the_weights(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    refit = {"method": "refit", "tokens": 98304, "data": "docs.parquet", "held_out_errors": [0.5]}
    trained = {"method": "full", "dataset": "docs", "steps": 60}
    cards = []
    for history in ([], [refit], [refit, trained]):
        config["stocha"]["history"] = history
        cards.append(card_text(config, {}))
    assert "leaves every weight" in cards[0] and "Recipe" not in cards[0]
    assert "refitted layer by layer on 98,304 tokens of docs.parquet" in cards[1]
    assert "trained after the conversion" in cards[2] and "leaves every weight" not in cards[2]
    config["stocha"]["history"] = [{"method": "learned_inputs", "data": "answers.jsonl"}]
    without_cuts = card_text(config, {})
    assert "Weights of projections and norms were scaled." in without_cuts and "Thresholds" not in without_cuts
    assert "- method: refit" in cards[2] and "steps: 60" in cards[2] and "held_out" not in cards[2]


def test_figures_of_other_weights_are_refused(converted: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "eval.json", evaluation(converted))
    assert call_command("stocha-card", converted, path).returncode == 0
    weights = load_file(converted / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, converted / "model.safetensors", {"format": "pt"})
    with pytest.raises(StochaError, match=r"README\.md was measured on weights"):
        check_card(converted)
    card = (converted / "README.md").read_text()
    assert_refused(call_command("stocha-card", converted, path), "eval.json", "measured on weights", "stocha-card")
    assert (converted / "README.md").read_text() == card
    assert_refused(call_command("stocha-publish", converted, "user/model"), "README.md", "measured on weights")
    (converted / "README.md").unlink()  # the measurements alone are refused as well
    assert_refused(call_command("stocha-publish", converted, "user/model"), "evaluation.json", "measured on weights")
    shutil.rmtree(converted / "measurements")
    check_card(converted)


NASTY = "x\n\n<img src=x onerror=alert(1)>\n# Injected\n| a | b |\n```\n````\n[a](http://b) `c` *d* <!-- e"


def nasty_card(nasty: str, converted: Path, tmp_path: Path) -> str:
    """A card in which everything that others write is `nasty`."""
    path = converted / "config.json"
    config = json.loads(path.read_text())
    config["stocha"] |= {
        "history": [{"method": "refit", "tokens": 5, "data": nasty}],
    }
    before = evaluation(converted, model=nasty, activation=nasty)
    more = {"data": nasty, "dtype": nasty, "command": nasty, "hardware": nasty}
    own = evaluation(converted, baseline=before, kl=0.2, top1_agreement=0.5, **more)
    generated = generation(converted) | {"command": nasty, "dtype": nasty}
    files = {
        "evaluation": saved(tmp_path / "e.json", own),
        "bench": saved(tmp_path / "b.json", bench(converted, command=nasty, hardware=nasty, dtype=nasty)),
        "generation": saved(tmp_path / "g.json", generated),
    }
    inherited = {"license": nasty, "license_name": nasty, "language": ["en", nasty], "pipeline_tag": nasty}
    rows = {nasty: files["evaluation"]}
    return write_card(converted, config=config, metadata=inherited, rows=rows, **files).read_text()


def test_what_others_wrote_stays_text_and_in_its_place(converted: Path, tmp_path: Path) -> None:
    parsed = {}
    for name in ("plain", NASTY):
        card = nasty_card(name, converted, tmp_path)
        _, metadata, body = card.split("---\n", 2)
        tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
        kinds = [(token.type, token.tag) for token in tokens]
        inner = {child.type for token in tokens for child in token.children or []}
        headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
        parsed[name] = (kinds, inner, headings, yaml.safe_load(metadata).keys())
        assert "html_inline" not in inner and "html_block" not in dict(kinds)
    assert parsed["plain"][:2] == parsed[NASTY][:2] and len(parsed["plain"][0]) > 100
    assert parsed["plain"][2] == parsed[NASTY][2] and len(parsed["plain"][2]) == 8
    assert parsed["plain"][3] - parsed[NASTY][3] == {"license", "license_name"}  # what is no plain line is left out


@pytest.mark.parametrize(
    "changes", [{"source": {"id": NASTY}}, {"source": {"id": "a/b", "revision": NASTY}}, {"stocha_version": NASTY}]
)
def test_names_that_no_model_has_are_refused(converted: Path, changes: dict[str, Any]) -> None:
    config = json.loads((converted / "config.json").read_text())
    config["stocha"] |= changes
    with pytest.raises(StochaError, match="expected"):
        card_text(config, {})


@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_values_of_any_text_are_shown_as_they_are(value: str) -> None:
    line = " ".join("".join(char if char.isprintable() else " " for char in value).split())
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    paragraph = parser.parse(f"So {text(value)} it is")
    assert [token.type for token in paragraph] == ["paragraph_open", "inline", "paragraph_close"]
    children = paragraph[1].children or []
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == f"So {line} it is"
    if line:
        (span,) = [
            child for child in parser.parse(f"So {code(value)} it is")[1].children or [] if child.type != "text"
        ]
        assert (span.type, span.content) == ("code_inline", line)
    (block,) = parser.parse(fence(value, "yaml"))
    assert block.type == "fence" and block.content.split() == value.replace("\0", "\ufffd").split()


def test_a_failure_while_writing_leaves_the_old_card_and_files(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = saved(tmp_path / "eval.json", evaluation(converted))
    before = {path: path.read_bytes() for path in converted.rglob("*") if path.is_file()}
    monkeypatch.setattr(figures, "plot", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StochaError, match=r"measurements cannot be written \(No space left on device\)"):
        write_card(converted, evaluation=own)
    assert {path: path.read_bytes() for path in converted.rglob("*") if path.is_file()} == before


def test_a_card_without_measurements_is_written_over_the_old_one(converted: Path) -> None:
    (converted / "README.md").write_text("---\nlicense: mit\n---\nmy own words")
    card = write_card(converted).read_text()
    assert "license: mit" in card and "my own words" not in card and not (converted / "README.md.orig").exists()
    with pytest.raises(StochaError, match="no evaluation"):
        write_card(converted, bench="bench.json")
