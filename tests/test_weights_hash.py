"""The hash of a checkpoint follows what it computes and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import run_python, tiny_model

from stocha_hf import StochaConfig, patch
from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.checkpoints.inspection import CONFIG, INDEX
from stocha_hf.checkpoints.tensors import Tensors
from stocha_hf.errors import StochaError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "model")


def save(folder: Path, **options: Any) -> Path:
    model = tiny_model()
    patch(model, StochaConfig(activation="fatrelu", threshold=[0.1, 0.2]))
    model.save_pretrained(folder, **options)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config, indent=4))


def test_other_shards_and_files_leave_it(folder: Path, tmp_path: Path) -> None:
    sharded = save(tmp_path / "sharded", max_shard_size="20KB")
    assert (sharded / INDEX).exists() and len(list(sharded.glob("*.safetensors"))) > 2
    shutil.copy(folder / "model.safetensors", sharded / "consolidated.safetensors")  # not in the index
    (sharded / "README.md").write_text("A card")
    assert weights_hash(sharded) == weights_hash(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.update(transformers_version="0.0", dtype="float16", architectures=None),
        lambda config: config["stocha"].update(source={"id": "another"}, history=[], stocha_version="9"),
        lambda config: config["stocha"].update(activation="stocha"),
    ],
)
def test_what_changes_no_figure_leaves_it(change: Any, folder: Path) -> None:
    before = weights_hash(folder)
    edit(folder, change)
    assert weights_hash(folder) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["stocha"].update(threshold=[0.1, 0.25]),
        lambda config: config["stocha"].update(inference="relu"),
        lambda config: config.pop("stocha"),
        lambda config: config.update(rms_norm_eps=1e-3),
    ],
)
def test_what_changes_figures_changes_it(change: Any, folder: Path) -> None:
    before = weights_hash(folder)
    edit(folder, change)
    assert weights_hash(folder) != before


def test_one_changed_weight_changes_it(folder: Path) -> None:
    before, tensors, name = weights_hash(folder), Tensors(folder), "model.layers.1.mlp.down_proj.weight"
    weight = tensors.read(name)
    weight[3, 5] += 1e-3
    tensors.overwrite(name, weight)
    assert weights_hash(folder) != before


def test_a_renamed_tensor_changes_it(folder: Path) -> None:
    """Two layers of equal shape, swapped: the same bytes under other names."""
    before, tensors = weights_hash(folder), Tensors(folder)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    values = [tensors.read(name) for name in names]
    for name, value in zip(names, reversed(values), strict=True):
        tensors.overwrite(name, value)
    assert weights_hash(folder) != before


def test_broken_files_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-10], whole[:20], b"no header at all", b""):
        path.write_bytes(broken)
        with pytest.raises(StochaError, match=r"model\.safetensors"):
            weights_hash(folder)


def test_torch_is_not_imported(folder: Path) -> None:
    code = "import sys; from pathlib import Path; from stocha_hf.checkpoints.hashing import weights_hash\n"
    code += "weights_hash(Path(sys.argv[1])); assert 'torch' not in sys.modules"
    done = run_python(code, folder)
    assert done.returncode == 0, done.stderr
