"""Every recipe: its keys exist, its schedule covers the run, and the files that its header names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from stocha_hf.cli.train import parse
from stocha_hf.config import ACTIVATIONS

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "accelerate")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_recipe_parses_and_names_files_that_exist(path, tmp_path):
    data, args, model, schedule = parse(
        ["--config", str(path), "--use_cpu", "true", "--output_dir", str(tmp_path)], None
    )
    assert data.dataset and (model.model_name_or_path or args.model_config) and args.max_steps > 0
    ends_with = "silu" if path.stem in ("adapt", "teacher") else "relu"  # they make the teacher
    assert ACTIVATIONS[schedule.phases[-1].activation].native == ends_with
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for name in re.findall(r"recipes/[\w./-]+\.(?:py|yaml)", header):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/accelerate/*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_loads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]
