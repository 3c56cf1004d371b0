"""The model card: figures from files of measurements only, and only of the folder's own weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import assert_refused, run_command
from helpers.measured_files import bench, evaluation, generation
from safetensors.torch import load_file, save_file

from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.checkpoints.metadata import source_metadata
from stocha_hf.conversion.convert import convert
from stocha_hf.errors import StochaError
from stocha_hf.publishing.card import check_card, model_card


@pytest.fixture
def converted(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    convert(checkpoint(), tmp_path / "relu", activation="relu")
    return tmp_path / "relu"


def saved(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_the_card_tells_what_the_files_tell(converted: Path, tmp_path: Path) -> None:
    before = evaluation(converted, model="org/source", activation="silu", perplexity=12.5)
    own = evaluation(converted, baseline=before, kl=0.21875, top1_agreement=0.6875)
    swapped = evaluation(converted, perplexity=5506.25, weights="other")
    files = [saved(tmp_path / f"{i}.json", content) for i, content in enumerate((own, swapped))]
    more = ["--bench", saved(tmp_path / "b.json", bench(converted))]
    more += ["--generation", saved(tmp_path / "g.json", generation(converted))]
    old = (converted / "README.md").read_text()
    done = run_command("stocha-card", converted, files[0], "--row", f"swapped={files[1]}", *more, "--json")
    assert done.returncode == 0, done.stderr
    card = (converted / "README.md").read_text()
    assert "| before: org/source | silu | 12.50 | 81.2% | 25.0 tokens/s |" in card
    assert "| swapped | relu | 5506.25 | 81.2% |" in card
    assert "| **this model** | relu | 17.38 | 81.2% | 80.0 tokens/s, 3.2x |" in card
    for told in ("4,096 tokens of val.txt", "75% to 88% zeros", "6.2% of the neurons", "0.219 nats", "33 GB/s"):
        assert told in card
    assert "| stocha, p 0.5 | -1.375 | 0.625 | 31.5 |" in card and "| greedy | -0.875 | 0.125 | 100.0 |" in card
    assert (converted / "README.md.orig").read_text() == old
    for picture in ("zeros", "diversity"):
        assert f"(measurements/{picture}.png)" in card
        assert (converted / f"measurements/{picture}.png").read_bytes().startswith(b"\x89PNG")
    check_card(converted)


def test_metadata_holds_the_results_and_keeps_the_licence(converted: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "eval.json", evaluation(converted))
    for _ in range(2):  # a card is also written over a measured one
        assert run_command("stocha-card", converted, path).returncode == 0
    metadata = yaml.safe_load((converted / "README.md").read_text().split("---\n")[1])
    assert metadata["license"] == "apache-2.0" and metadata["stocha_weights"] == weights_hash(converted)
    (index,) = metadata["model-index"]
    metrics = [metric for result in index["results"] for metric in result["metrics"]]
    assert {metric["type"]: metric["value"] for metric in metrics} == {"perplexity": 17.375, "sparsity": 0.8125}
    assert source_metadata(converted)["license"] == "apache-2.0"


@pytest.mark.slow
def test_a_measured_checkpoint_end_to_end(converted: Path, tmp_path: Path) -> None:
    """The verbs' own output is what stocha-card reads."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{4 + i * i % 60}" for i in range(200)))
    quick = ["--dtype", "float32", "--json"]
    outputs = [
        run_command(
            "stocha-eval", converted, "--data", text, "--length", 16, "--baseline", tmp_path / "source", *quick
        ),
        run_command("stocha-bench", converted, "--prompt", 4, "--new", 3, *quick),
        run_command("stocha-generate", converted, "--prompt", "w5 w6", "--samples", 2, "--new", 4, *quick),
    ]
    paths = [tmp_path / f"{name}.json" for name in ("eval", "bench", "generate")]
    for path, done in zip(paths, outputs, strict=True):
        assert done.returncode == 0, done.stderr
        path.write_text(done.stdout)
    done = run_command("stocha-card", converted, paths[0], "--bench", paths[1], "--generation", paths[2])
    assert done.returncode == 0, done.stderr
    assert f"{json.loads(outputs[0].stdout)['perplexity']:.2f}" in (converted / "README.md").read_text()


def test_the_card_says_what_was_done_to_the_weights(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    refit = {"method": "refit", "tokens": 98304, "data": "docs.parquet", "held_out_errors": [0.5]}
    trained = {"method": "full", "dataset": "docs", "steps": 60}
    cards = []
    for history in ([], [refit], [refit, trained]):
        config["stocha"]["history"] = history
        cards.append(model_card(config, {}))
    assert "leaves every weight" in cards[0] and "Recipe" not in cards[0]
    assert "refitted layer by layer on 98,304 tokens of docs.parquet" in cards[1]
    assert "trained after the conversion" in cards[2] and "leaves every weight" not in cards[2]
    assert "- method: refit" in cards[2] and "steps: 60" in cards[2] and "held_out" not in cards[2]


def test_figures_of_other_weights_are_refused(converted: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "eval.json", evaluation(converted))
    assert run_command("stocha-card", converted, path).returncode == 0
    weights = load_file(converted / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, converted / "model.safetensors", {"format": "pt"})
    with pytest.raises(StochaError, match=r"README\.md was measured on weights"):
        check_card(converted)
    card = (converted / "README.md").read_text()
    assert_refused(run_command("stocha-card", converted, path), "eval.json", "measured on weights", "stocha-card")
    assert (converted / "README.md").read_text() == card
    assert_refused(run_command("stocha-publish", converted, "user/model"), "README.md", "measured on weights")
    (converted / "README.md").unlink()  # the measurements alone are refused as well
    assert_refused(run_command("stocha-publish", converted, "user/model"), "evaluation.json", "measured on weights")
    shutil.rmtree(converted / "measurements")
    check_card(converted)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("eval.json", {"loss": 1}, ["eval.json has no perplexity", "stocha-eval --json"]),
        ("eval.json", "no JSON", ["eval.json has no perplexity"]),
        ("bench.json", [{"shape": [8, 8]}], ["bench.json has no dense_ms", "stocha-bench FOLDER --json"]),
        ("row.json", {"length": 64}, ["the row 'swapped' has length 64", "32", "same options"]),
    ],
)
def test_other_files_are_refused(converted: Path, tmp_path: Path, name: str, content: Any, words: list[str]) -> None:
    own = evaluation(converted)
    files = {"eval.json": own, "bench.json": bench(converted), "row.json": own}
    files[name] = own | content if name == "row.json" else content
    paths = [saved(tmp_path / key, value) for key, value in files.items()]
    done = run_command("stocha-card", converted, paths[0], "--bench", paths[1], "--row", f"swapped={paths[2]}")
    assert_refused(done, *words)
    assert not (converted / "measurements").exists() and not (converted / "README.md.orig").exists()


def test_no_stocha_checkpoint(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = checkpoint()
    path = saved(tmp_path / "eval.json", evaluation(source))
    assert_refused(run_command("stocha-card", source, path), "no stocha checkpoint")
    assert_refused(run_command("stocha-card", source, path, "--row", "unlabelled.json"), "LABEL=EVAL")
    assert_refused(run_command("stocha-card", tmp_path / "none", path), "config.json", "does not exist")
