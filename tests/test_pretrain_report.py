"""The page on pretraining: its tables are those of the results file, whose lines are runs of the list."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import yaml

ROOT = Path(__file__).parent.parent
pretrain_report = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "pretrain_report.py")))


def test_the_tables_are_those_of_the_results():
    page = pretrain_report.PAGE.read_text()
    assert pretrain_report.filled(page, pretrain_report.rows()) == page


def test_every_line_is_a_listed_run_with_its_options():
    listed = {run["name"]: run for run in yaml.safe_load((ROOT / "benchmarks/pretrain.yaml").read_text())["runs"]}
    for line in pretrain_report.RESULTS.read_text().splitlines():
        row = json.loads(line)
        run = listed[row["name"]]
        assert {key: row.get(key) for key in run} == run


def test_models_are_compared_question_by_question():
    answers = {"relu-x": "1100", "silu-x": "1111", "swi-20-x": "1100", "relu-x-s1": "1100", "swi-20-x-s1": "1110"}
    models = {name: {"task": {"right": right}} for name, right in answers.items()}
    assert pretrain_report.less(models, "silu", "x", ["task"]) == "+50.0 +- 28.9"
    assert pretrain_report.less(models, "swi-20", "x", ["task"]) == "+12.5 +- 12.5", "over two seeds"
    assert pretrain_report.less(models, "relu", "x", ["task"]) == "0.0"
    assert pretrain_report.less(models, "silu", "x", ["task"], base="swi-20") == "+50.0 +- 28.9", "the seed of both"
    assert pretrain_report.less(models, "relu", "x", ["task"], base="swi-20") == "-12.5 +- 12.5"
