"""Run transformers' own model tests on a native class and on the stocha class, and compare what they say.

transformers' sdist holds the installed version's test_modeling_common.py, which the wheel lacks. It lacks the tests of
generation and export, so these are left out here. Each family runs twice in this process, as pytest counts:
native, and with its stocha MLPs. What fails on both sides is the test's; what fails on one is a difference.

    python benchmarks/transformers_tests.py [--families llama qwen2] [--activation relu] [--json RESULTS.jsonl]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import transformers

from stocha_hf.spec import ARCHITECTURES

ABSENT = {  # modules that the sdist lacks -> what the tests take from them
    "exporters/test_export.py": "class ExportTesterMixin: ...",
    "generation/test_utils.py": "class GenerationTesterMixin: ...",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}",
}
CASES = '''
import copy
import unittest

import torch
import transformers
from transformers.testing_utils import torch_device

import stocha_hf.modeling_stocha as ours
from stocha_hf.spec import ARCHITECTURES

from .generation.test_utils import GenerationTesterMixin
from .test_configuration_common import ConfigTester
from .test_modeling_common import ModelTesterMixin, ids_tensor

FAMILY, ACTIVATION = {family!r}, {activation!r}
ROW = ARCHITECTURES[FAMILY]
SIZES = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    intermediate_size=37, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)


class Tester:
    """What ModelTesterMixin asks for: sizes, a config and inputs."""

    batch_size, seq_length, is_training = 13, 7, True

    def __init__(self, config_class, entry):
        self.__dict__.update(SIZES)
        self.config_class, self.entry = config_class, entry

    def get_config(self):
        config = self.config_class(**SIZES)
        if self.entry:
            config.stocha = copy.deepcopy(self.entry)
        return config

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        mask = torch.tril(torch.ones_like(ids)).to(torch_device)
        return self.get_config(), {{"input_ids": ids, "attention_mask": mask}}


class Common(ModelTesterMixin, GenerationTesterMixin):
    classes, entry = (), None

    def setUp(self):
        self.all_model_classes = self.classes
        self.model_tester = Tester(self.classes[0].config_class, self.entry)
        self.config_tester = ConfigTester(self, config_class=self.classes[0].config_class)

    def test_config(self):
        self.config_tester.run_common_tests()


class Native(Common, unittest.TestCase):
    classes = tuple(getattr(transformers, name) for name in (ROW.model, ROW.causal_lm))


class Stocha(Common, unittest.TestCase):
    classes = tuple(getattr(ours, f"Stocha{{name}}") for name in (ROW.model, ROW.causal_lm))
    entry = {{"activation": ACTIVATION}}
'''


class Outcomes:
    """A pytest plugin: what became of each test, by its class."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, str]] = {"Native": {}, "Stocha": {}}

    def pytest_runtest_logreport(self, report: Any) -> None:
        _, kind, test = report.nodeid.split("::")
        if report.when == "call" or report.outcome != "passed":
            before = self.found[kind].get(test)
            self.found[kind][test] = "failed" if "failed" in (before, report.outcome) else report.outcome


def main() -> None:
    args = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        fetch(work)
        for family in args.families:
            (work / "tests" / f"test_{family}.py").write_text(CASES.format(family=family, activation=args.activation))
            row = {"family": family, "activation": args.activation} | compared(work / "tests" / f"test_{family}.py")
            row["transformers"] = transformers.__version__
            print(json.dumps(row))
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps(row) + "\n")


def fetch(work: Path) -> None:
    """Unpack the installed version's tests into a folder."""
    sdist = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", sdist]
    subprocess.run([*pip, "--dest", str(work)], check=True)
    with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
        for member in archive.getmembers():
            member.name = member.name.partition("/")[2]
            if member.name.startswith("tests/") and member.isfile():
                archive.extract(member, work, filter="data")
    for name, text in ABSENT.items():
        (work / "tests" / name).parent.mkdir(exist_ok=True)
        (work / "tests" / name).write_text(text)
    for package in {work / "tests", *((work / "tests" / name).parent for name in ABSENT)}:
        (package / "__init__.py").touch()


def compared(path: Path) -> dict[str, Any]:
    """Counts of both sides, and the tests whose outcomes differ."""
    outcomes = Outcomes()
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(path.parent.parent)]
    pytest.main([*options, "--no-header", "--no-summary", str(path)], plugins=[outcomes])
    native, stocha = outcomes.found["Native"], outcomes.found["Stocha"]
    return {
        "native": dict(Counter(native.values())),
        "stocha": dict(Counter(stocha.values())),
        "failed_on_both": sorted(test for test in native if native[test] == stocha.get(test) == "failed"),
        "different": {
            test: [native.get(test), stocha.get(test)]
            for test in sorted({*native, *stocha})
            if native.get(test) != stocha.get(test)
        },
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--families", nargs="+", default=["llama"], choices=list(ARCHITECTURES))
    found.add_argument("--activation", default="relu", help="of the stocha class, in train() mode")
    found.add_argument("--json", type=Path, help="file to add a row to for each family")
    return found


if __name__ == "__main__":
    main()
