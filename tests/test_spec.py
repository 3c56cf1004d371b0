"""spec.py and the others that have a copy in files that ship: the same text, one class, equal values across copies."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import run_python

from stocha_hf import cuts_stocha, modeling_stocha, quantization_stocha, spec

ROOT = Path(__file__).parent.parent


def test_shipped_files_hold_current_copies() -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci/copy_spec.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["spec.py", "cuts.py", "rules.py", "cuts_stocha.py"])
def test_a_lost_marker_fails_the_check(name: str, tmp_path: Path) -> None:
    for part in (".ci", "stocha_hf"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=lambda folder, names: [n for n in names if "." not in n])
    file = tmp_path / "stocha_hf" / name
    file.write_text(re.sub("(cuts_stocha.py|modeling_stocha.py|cuts.py,) from here", "no marker", file.read_text()))
    check = [sys.executable, tmp_path / ".ci/copy_spec.py", "--check"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"stocha_hf/{name} has 0 parts that begin with" in done.stderr


def test_the_package_has_one_config_class_and_every_activation_a_function() -> None:
    assert modeling_stocha.StochaConfig is spec.StochaConfig
    assert set(modeling_stocha.FUNCTIONS) == set(spec.ACTIVATIONS)
    assert set(modeling_stocha.BASE_FUNCTIONS) == {row.act for row in spec.ARCHITECTURES.values()}
    for module in (modeling_stocha, cuts_stocha, quantization_stocha):
        for row in spec.ARCHITECTURES.values():
            for name in row.auto_map("").values():
                assert getattr(module, name.lstrip(".")) is getattr(modeling_stocha, name.lstrip("."))


def test_importing_spec_does_not_import_torch() -> None:
    done = run_python(
        "import sys; from stocha_hf.spec import StochaConfig; print(StochaConfig().p, 'torch' in sys.modules)"
    )
    assert done.stdout.split() == ["0.3", "False"], done.stderr


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (5, "the config's stocha entry is 5: expected a mapping"),
        ([], "the config's stocha entry is []"),
        ({"activation": ["relu"]}, "activation is ['relu']: expected one of"),
        ({"base": 3}, "base is 3"),
        ({"inference": {}}, "inference is {}"),
        ({"positive": None}, "positive is None"),
        ({"p": True}, "p is True: expected a probability"),
        ({"threshold": -1}, "threshold is -1: expected a number of 0 or more"),
        ({"threshold": []}, "threshold is []"),
        ({"threshold": "0.1"}, "threshold is '0.1'"),
        ({"threshold": [0.1, None]}, "threshold is [0.1, None]"),
        ({"k": True}, "k is True: expected a number of neurons"),
        ({"source": "org/model"}, "source is 'org/model': expected a mapping"),
        ({"source": {"id": 5}}, "source is {'id': 5}"),
        ({"history": {}}, "history is {}: expected a list of mappings"),
        ({"history": ["refit"]}, "history is ['refit']"),
        ({"stocha_version": 1}, "stocha_version is 1"),
        ({1: 2}, "['1']: expected no other keys"),
    ],
)
def test_a_wrong_entry_is_refused_in_one_sentence_that_names_the_key(entry: object, words: str) -> None:
    with pytest.raises(ValueError) as refusal:
        spec.StochaConfig.from_dict(entry)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_thresholds_and_k_must_fit_the_model() -> None:
    assert spec.StochaConfig(threshold=0.5).thresholds(3) == [0.5] * 3
    with pytest.raises(ValueError, match="one number, or 3: one per layer"):
        spec.StochaConfig(threshold=[0.1, 0.2]).thresholds(3)
    with pytest.raises(ValueError, match="k is 100: expected at most 48"):
        spec.StochaConfig(activation="topk", k=100).thresholds(2, width=48)
