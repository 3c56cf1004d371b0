"""Bad inputs to every command: one true sentence on stderr, exit status 2, nothing written, nothing changed.

Each line of a table is a command line and, after `->`, what its sentence has to hold. The commands run in this
process, in a folder that the fixture `place` fills once with whole and with broken models, data sets and measurements.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from helpers.bad_inputs import TABLES
from helpers.measured_files import bench, evaluation, generation
from safetensors.torch import load_file, save_file

from stocha_hf.conversion.convert import convert

LONG = "x" * 300
NESTED = "[" * 200_000 + "]" * 200_000
ROWS = [
    pytest.param(verb, *(part.strip() for part in line.split("->")), id=f"{verb} {line.partition('->')[0].strip()}")
    for verb, table in TABLES.items()
    for line in table.strip().splitlines()
    if line.strip() and not line.startswith("#")
]


def test_there_are_rows_of_every_command() -> None:
    counts = {verb: sum(row.values[0] == verb for row in ROWS) for verb in TABLES}
    print(counts, len(ROWS))
    assert len(ROWS) >= 150 and min(counts.values()) >= 8
    assert len({row.id for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("verb", "line", "words"), ROWS)
def test_refused(
    verb: str,
    line: str,
    words: str,
    place: Path,
    files: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    line = line.replace("LONG", LONG)
    monkeypatch.setattr(sys, "argv", [f"stocha-{verb}", *shlex.split(line)])
    before = files["before"]
    try:
        with pytest.raises(SystemExit) as refusal:
            import_module(f"stocha_hf.cli.{verb}").main()
    finally:
        after = listing(place)
        if after != before:  # for the other rows
            for name in after.keys() - before.keys():
                shutil.rmtree(name, ignore_errors=True)
            files["before"] = listing(place)
    assert after == before
    out, err = capfd.readouterr()
    assert refusal.value.code == 2, err
    assert out == "" and len(err.splitlines()) == 1, err
    assert err.startswith(f"stocha-{verb}: "), err
    for word in filter(None, map(str.strip, words.split(";"))):
        assert word in err
    assert "Traceback" not in err, err


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file and folder."""
    found = {}
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                status = entry.stat(follow_symlinks=False)
                found[entry.path] = (status.st_size, status.st_mtime_ns)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
    return found


@pytest.fixture(scope="module")
def files(place: Path) -> dict[str, Any]:
    """What the last row left, under "before": a listing takes as long as most rows."""
    return {"before": listing(place)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    tiny_model().save_pretrained(folder / "native")
    tiny_model().save_pretrained(folder / "sharded", max_shard_size="20KB")
    for name in ("native", "sharded"):
        tiny_tokenizer().save_pretrained(folder / name)
    convert(folder / "native", folder / "relu", activation="relu")
    convert(folder / "native", folder / "stocha")
    convert(folder / "native", folder / "quantized4", bits=4)
    for name, (base, spoil) in MODELS.items():
        shutil.copytree(folder / base, folder / name)
        spoil(folder / name)
    (folder / "link").symlink_to("relu")
    _write_data(folder)
    _write_measurements(folder)
    for name, content in RECIPES.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def config(base: str = "relu", **changes: Any) -> tuple[str, Callable[[Path], None]]:
    """A spoiled copy of a model: these keys of config.json are changed."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return base, spoil


def entry(**changes: Any) -> tuple[str, Callable[[Path], None]]:
    """These keys of the stocha entry are changed."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content["stocha"] |= changes
        path.write_text(json.dumps(content))

    return "relu", spoil


def cuts(**changes: Any) -> tuple[str, Callable[[Path], None]]:
    """These keys of the stocha entry's `inputs` are changed."""
    return entry(activation="silu", inference="silu", inputs={"thresholds": {"q_proj": [0.1, 0.1]}} | changes)


def file(name: str, content: str | bytes | None, base: str = "relu") -> tuple[str, Callable[[Path], None]]:
    """A file is written anew, or removed."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return base, spoil


def quantization(**changes: Any) -> tuple[str, Callable[[Path], None]]:
    """These keys of a quantized folder's quantization_config are changed."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        content = json.loads(path.read_text())
        content["quantization_config"] |= changes
        path.write_text(json.dumps(content))

    return "quantized4", spoil


def tensors(
    change: Callable[[dict[str, torch.Tensor]], object], base: str = "relu"
) -> tuple[str, Callable[[Path], None]]:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        found = load_file(path)
        change(found)
        save_file(found, path, {"format": "pt"})

    return base, spoil


def index(change: Callable[[dict[str, str]], object]) -> tuple[str, Callable[[Path], None]]:
    """The weight_map of a sharded model is changed."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return "sharded", spoil


def _shard(folder: Path, number: int) -> Path:
    return next(folder.glob(f"model-0000{number}*"))


def _to_fp8(found: dict[str, torch.Tensor]) -> None:
    found.update({name: tensor.to(torch.float8_e4m3fn) for name, tensor in found.items()})


def _without_gates(found: dict[str, torch.Tensor]) -> None:
    for name in [name for name in found if "gate_proj" in name]:
        found[name.replace("gate_proj", "fc1")] = found.pop(name)


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _to_int8(found: dict[str, torch.Tensor]) -> None:
    found["model.layers.0.mlp.up_proj.codes"] = found["model.layers.0.mlp.up_proj.codes"].to(torch.int8)


def _nan(found: dict[str, torch.Tensor]) -> None:
    found["model.norm.weight"].fill_(float("nan"))


def _other_vocabulary(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_model(vocab_size=16).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


MODELS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "truncated": ("relu", _cut),
    "pickle": ("relu", _to_pickle),
    "corrupt": file("model.safetensors", b"\xff" * 100),
    "noweights": file("model.safetensors", None),
    "noconfig": file("config.json", None),
    "badconfig": file("config.json", '{"model_type": "lla'),
    "binaryconfig": file("config.json", b"\xff\xfe\x00binary"),
    "listconfig": file("config.json", "[1, 2]"),
    "nestedconfig": file("config.json", NESTED),
    "notokenizer": file("tokenizer.json", None),
    "badtokenizer": file("tokenizer.json", '{"version": '),
    "emptytokenizer": file("tokenizer.json", "{}"),
    "nan": tensors(_nan),
    "fivebits": quantization(bits=5),
    "newformat": quantization(format=3),
    "uncoded": tensors(lambda found: found.pop("model.layers.0.mlp.down_proj.codes"), "quantized4"),
    "wrongcodes": tensors(_to_int8, "quantized4"),
    "unconverted4": config("quantized4", stocha=None),
    "missing": tensors(lambda found: found.pop("model.layers.0.self_attn.q_proj.weight")),
    "extra": tensors(lambda found: found.update({"model.layers.0.mlp.gate_proj.weight": torch.zeros(4, 4)})),
    "vocabulary": ("native", _other_vocabulary),
    "gpt2": config(model_type="gpt2"),
    "typeless": config(model_type=None),
    "numbertype": config(model_type=5),
    "namelessclass": config(architectures=[None]),
    "noclasses": config(architectures=True),
    "quantized": config(quantization_config={"quant_method": "gptq"}),
    "awq": config(base="native", quantization_config={"quant_method": "awq"}),
    "bitsandbytes": config(base="native", quantization_config={"quant_method": "bitsandbytes"}),
    "fp8config": config(base="native", quantization_config={"quant_method": "fp8"}),
    "fp8": tensors(_to_fp8),
    "mixtral": config(base="native", model_type="mixtral"),
    "otheract": config(base="native", hidden_act="gelu_new"),
    "owncode": config(base="native", auto_map={"AutoModelForCausalLM": "m.X"}),
    "gateless": tensors(_without_gates),
    "width": config(intermediate_size=64),
    "threelayers": config(num_hidden_layers=3),
    "empty": file("model.safetensors", b""),
    "fewbytes": file("model.safetensors", b"\x10\0\0\0\0"),
    "noshard": ("sharded", lambda folder: _shard(folder, 2).unlink()),
    "cutshard": ("sharded", lambda folder: _shard(folder, 2).write_bytes(_shard(folder, 2).read_bytes()[:-1])),
    "indexup": index(lambda weights: weights.update({next(iter(weights)): "../../x"})),
    "indexroot": index(lambda weights: weights.update({next(iter(weights)): "/etc/passwd"})),
    "indexfile": index(lambda weights: weights.update({next(iter(weights)): "a.safetensors"})),
    "indextensor": index(lambda weights: weights.update(other=weights[next(iter(weights))])),
    "noindex": index(lambda weights: weights.clear()),
    "zerolayers": config(num_hidden_layers=0),
    "truelayers": config(num_hidden_layers=True),
    "wordlayers": config(num_hidden_layers="two"),
    "stocha5": config(stocha=5),
    "stochalist": config(stocha=["relu"]),
    "automap5": config(base="native", auto_map=5),
    "unknownactivation": entry(activation="swiglu"),
    "listactivation": entry(activation=["relu"]),
    "relu2": entry(activation="relu2", inference="relu2"),
    "unknownkey": entry(colour="red"),
    "threethresholds": entry(threshold=[0.1, 0.2, 0.3]),
    "wordthreshold": entry(threshold="low"),
    "cuts": cuts(),
    "cutsshape": cuts(thresholds={"q_proj": [0.1, 0.2, 0.3]}),
    "cutsword": cuts(thresholds={"q_proj": ["low", 0.1]}),
    "cutsname": cuts(thresholds={"lm_head": [0.1, 0.1]}),
    "cutscentre": cuts(centres={"k_proj": [0.1, 0.1]}),
    "cutsempty": entry(inputs={}),
    "cuts5": entry(inputs=5),
    "cutskey": cuts(colour="red"),
    "cutsprefill": cuts(prefill=1),
    "cutsshare": cuts(share=40),
    "source5": entry(source=5),
    "history5": entry(history=5),
    "base5": entry(base=5),
}


def _write_data(folder: Path) -> None:
    text = " ".join(f"w{4 + i % 60}" for i in range(200))
    user = {"role": "user", "content": "w5 w6"}
    rows: dict[str, list[Any]] = {
        "columns.jsonl": [{"body": "w4", "id": 1}],
        "number.jsonl": [{"text": text}, {"text": "w5"}, {"text": 5}],
        "numbers.jsonl": [{"text": 1}],
        "null.jsonl": [{"text": None}, {"text": None}],
        "notobject.jsonl": [{"text": text}, [1, 2]],
        "chatword.jsonl": [{"messages": "hello"}],
        "chatwords.jsonl": [{"messages": ["hello"]}],
        "chatmixed.jsonl": [{"messages": [user]}, {"messages": "hello"}],
        "chatnocontent.jsonl": [{"messages": [{"role": "user"}]}],
        "chatnumber.jsonl": [{"messages": [user | {"content": 5}]}],
        "prompts.jsonl": [{"prompt": ["w5"], "completion": "w6"}],
        "ids.jsonl": [{"input_ids": [4, 5, 6]}],
    }
    for name, content in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    files: dict[str, str | bytes] = {
        "text.txt": text, "short.txt": "w4 w5", "empty.txt": "", "blank.txt": " \n \n", "latin.txt": b"w4 \xff\xfe w5",
        "broken.jsonl": '{"text": "w4"}\n{"text": "w5"}\n{"text": "w6', "latin.jsonl": b'{"text": "\xff"}\n',
        "nested.jsonl": f'{{"text": {NESTED}}}\n', "empty.jsonl": "", "empty.json": "[]", "broken.json": '[{"text"',
        "broken.csv": "text,b\nw4,1\nw5,2,3\n", "head.csv": "text\n", "broken.parquet": b"PAR1 and no more",
        "empty.parquet": b"", "weights.bin": b"\0\0", "broken.gguf": b"GGUF" + bytes(100), "letters.gguf": b"letters",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    for name in ("nothing", "mixed", "images"):
        (folder / name).mkdir()
    (folder / "mixed" / "a.txt").write_text("w4")
    (folder / "mixed" / "b.csv").write_text("text\nw4\n")
    (folder / "images" / "a.png").write_bytes(b"\x89PNG")


def _write_measurements(folder: Path) -> None:
    own, speed, samples = evaluation(folder / "relu"), bench(folder / "relu"), generation(folder / "relu")
    runs = samples["runs"]
    aggregated = own["aggregated_sparsity"]
    files: dict[str, Any] = {
        "eval": own, "bench": speed, "generate": samples,
        "e-word": own | {"perplexity": "12"}, "e-null": own | {"perplexity": None}, "e-list": [own, own],
        "e-nan": own | {"perplexity": float("nan")}, "e-inf": own | {"perplexity": float("inf")},
        "e-true": own | {"tokens": True}, "e-zeros": own | {"sparsity": 0.5},
        "e-nolayers": own | {"sparsity": {"mean": 0.5, "per_layer": []}},
        "e-layers": own | {"sparsity": {"mean": 0.5, "per_layer": [0.5, "x"]}},
        "e-reuse": {key: value for key, value in own.items() if key != "reuse"},
        "e-hardware": own | {"hardware": None}, "e-data": own | {"data": ["a"]},
        "e-other": own | {"weights": "0" * 64},
        "e-noweights": own | {"weights": None}, "e-baseline": own | {"baseline": {"model": "x"}},
        "e-baseline5": own | {"baseline": 5}, "e-kl": own | {"kl": "far", "top1_agreement": 0.5},
        "e-lengths": own | {"aggregated_sparsity": aggregated | {"tokens": [1, 2, 4]}},
        "e-length64": own | {"length": 64}, "e-activation": own | {"activation": 5},
        "b-word": [speed[0] | {"dense_ms": "slow"}], "b-zero": [speed[0] | {"sparse_ms": 0}],
        "b-two": speed * 2, "b-empty": [], "b-nobatch": [{k: v for k, v in speed[0].items() if k != "batch"}],
        "b-other": [speed[0] | {"weights": "1" * 64}], "b-gbps": [speed[0] | {"read_gbps": None}],
        "g-runs": samples | {"runs": 5}, "g-run": samples | {"runs": [5]},
        "g-decoding": samples | {"runs": [runs[0] | {"decoding": "beam"}]},
        "g-p": samples | {"runs": [{k: v for k, v in runs[0].items() if k != "p"}]},
        "g-bleu": samples | {"runs": [runs[0] | {"self_bleu": "high"}]}, "g-prompts": samples | {"prompts": "a"},
        "g-other": samples | {"weights": None}, "number": 5, "text": "perplexity", "null": None,
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "nested.json").write_text(NESTED)
    (folder / "latin.json").write_bytes(b'{"perplexity": "\xff"}')
    for name in ("measured", "mangled"):
        shutil.copytree(folder / "relu", folder / name)
        (folder / name / "measurements").mkdir()
    (folder / "measured" / "measurements" / "evaluation.json").write_text(json.dumps(own | {"weights": "0" * 64}))
    (folder / "mangled" / "measurements" / "evaluation.json").write_text('{"perplexity": ')


MODEL, DATA = "model_name_or_path: stocha\n", "dataset: text.txt\n"
SCHEDULE = "schedule: [{activation: relu, until: 1.0}]\n"
CPU = "output_dir: out\nmax_steps: 1\nuse_cpu: true\nbf16: false\nreport_to: none\n"
GOOD = MODEL + DATA + SCHEDULE + CPU
RECIPES: dict[str, str | bytes] = {
    "good.yaml": GOOD,
    "broken.yaml": "a: [1, 2",
    "binary.yaml": b"\x80\x81",
    "list.yaml": "- a\n- b\n",
    "word.yaml": "hello",
    "empty.yaml": "",
    "unknown.yaml": GOOD + "colour: red\n",
    "nomodel.yaml": DATA + SCHEDULE + CPU,
    "nodata.yaml": MODEL + SCHEDULE + CPU,
    "twodata.yaml": GOOD + "datasets: {absent.txt: 1}\n",
    "noshare.yaml": MODEL + SCHEDULE + CPU + "datasets: {text.txt: 0}\n",
    "absentshare.yaml": MODEL + SCHEDULE + CPU + "datasets: {absent.txt: 1}\n",
    "noschedule.yaml": GOOD.replace(SCHEDULE, ""),
    "twice.yaml": GOOD + "max_steps: 2\n",
    "attention.yaml": GOOD + "attn_implementation: flash_attention_9\n",
    "activation.yaml": GOOD.replace("relu", "swiglu"),
    "activations.yaml": GOOD.replace("activation: relu", "activation: [relu]"),
    "phases.yaml": GOOD.replace("[{activation: relu, until: 1.0}]", "relu"),
    "alias.yaml": GOOD + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9 if i else ['x'] * 9)}]\n" for i in range(9)
    ),
}  # fmt: skip
