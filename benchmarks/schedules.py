"""Compare ways to convert: a list of training runs through the recipe, each evaluated, one JSON line a run.

The list is YAML: `recipe` is the YAML file that all runs share; `shared` holds keys that override it; `starts` maps a
name to options of stocha-convert (`refit: true` stands for the training text, `of` for the run that is converted, by
default the model); each of `runs` has a `name`, a `start` (one of the starts, or an earlier run), `tokens`, and any
keys of the recipe; its `teacher` may be a start or an earlier run. `data` in either is the name of one of the files of
--data, without its ending, in place of the first. A run with a `name` and `average`, a list of earlier runs, trains
nothing: it is their mean (stocha-average).

A run without `start` begins with random weights: the recipe has `model_config`, and --model is a folder with a
tokenizer. `branch: RUN` with `at: 0.8` goes on from RUN's checkpoint at that share of training, so that schedules that
differ later need not be trained from the beginning again; RUN has to save one there (`save_steps: 0.1`). `modes` are
activations in which the result is evaluated too. `probe: true` looks at every checkpoint: benchmarks/probe.py.

    python benchmarks/schedules.py benchmarks/schedules.yaml --model SmolLM2-135M-Instruct --data train.parquet \
        --eval val.parquet --work runs --results results.jsonl [--only 'silu*' 'refit90*'] [--gpus 4 --jobs 8]

Each line has perplexity, zeros and dead neurons on every evaluation text, the divergence (KL) from the starts' common
model where there is one, and the losses as they were logged.

Every run is the recipe in a process of its own, so one that fails is a line with `error` and the others go on. Started
again, it skips what `results` holds. Tokens per second mean something with one job a GPU only. `--seconds` is for a
machine that is lent: no run is begun that would not end by then, judging by the slowest that has ended.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from probe import probe
from tqdm import tqdm
from transformers import AutoTokenizer

from stocha_hf.data import load_data, text_windows
from stocha_hf.data.row_text import plain_text
from stocha_hf.measurement.evaluation import compare, evaluate
from stocha_hf.models import load_model

ROOT = Path(__file__).parent.parent
LENGTH = 1024
COMPARED = 64  # evenly spaced windows of each text for the divergence
STARTING = 40  # seconds of a run on a GPU that its length does not change: imports, compiling, evaluation
OF_THE_RUN = {"name", "start", "tokens", "data", "branch", "at", "modes", "probe"}  # keys that are none of the recipe


class Bench:
    """The list of runs, the folders they live in, and the GPUs that are free."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.listed = args, yaml.safe_load(args.runs.read_text())
        self.lock, self.tokenising = threading.Lock(), threading.Lock()
        self.turn, self.unfinished = threading.Condition(), set[str]()
        self.began, self.paces = time.monotonic(), list[float]()  # seconds a token of the runs that ended
        self.branched = {(run["branch"], run["at"]) for run in self.listed["runs"] if "branch" in run}
        self.free = [job % args.gpus if args.gpus else None for job in range(args.jobs)]
        self.windows = {Path(name).stem: text_windows(name, args.model, LENGTH) for name in args.eval}

    def go(self) -> None:
        finished = {row["name"] for row in self.results() if "error" not in row}
        runs = [
            run for run in self.listed["runs"] if any(fnmatch.fnmatch(run["name"], glob) for glob in self.args.only)
        ]
        used = {run.get(key) for run in runs for key in ("start", "teacher")}
        starts = [{"name": name, **options} for name, options in self.listed.get("starts", {}).items() if name in used]
        jobs = self.ordered(starts, [run for run in runs if run["name"] not in finished])
        self.unfinished = {job["name"] for job in jobs}
        with ThreadPoolExecutor(self.args.jobs) as pool:
            while jobs:
                with self.turn:
                    self.turn.wait_for(lambda: self.free and any(map(self.ready, jobs)))
                    job = next(filter(self.ready, jobs))
                    if not self.in_time(job):
                        jobs[:] = self.without(job, jobs)
                        continue
                    gpu = self.free.pop(0)
                jobs.remove(job)
                pool.submit(self.on_a_gpu, gpu, job)

    def ready(self, job: dict[str, Any]) -> bool:
        """Whether what it begins from is there, or has failed."""
        return not self.needs(job) & self.unfinished

    @staticmethod
    def trained(job: dict[str, Any]) -> float:
        """Tokens that a run trains on itself."""
        return job.get("tokens", 0) * (1 - job.get("at", 0))

    def in_time(self, job: dict[str, Any]) -> bool:
        if self.args.seconds is None or not self.paces:
            return True
        left = self.args.seconds - (time.monotonic() - self.began)
        return STARTING + max(self.paces) * self.trained(job) <= left

    def without(self, job: dict[str, Any], jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The jobs without this one and those that need it."""
        left_out = {job["name"]}
        for other in jobs:
            if self.needs(other) & left_out:
                left_out.add(other["name"])
        print(f"not begun, for want of time: {', '.join(sorted(left_out))}", flush=True)
        return [other for other in jobs if other["name"] not in left_out]

    def results(self) -> list[dict[str, Any]]:
        path = self.args.results
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @staticmethod
    def needs(job: dict[str, Any]) -> set[Any]:
        return {job.get(key) for key in ("start", "teacher", "of", "branch")} | set(job.get("average", []))

    def ordered(self, starts: list[dict[str, Any]], runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Conversions just before the first run that begins from them; GPUs are given in this order."""
        jobs: list[dict[str, Any]] = []
        for run in runs:
            jobs += [start for start in starts if start["name"] in self.needs(run) and start not in jobs]
            jobs.append(run)
        return jobs

    def on_a_gpu(self, gpu: int | None, job: dict[str, Any]) -> None:
        is_run = "tokens" in job or "average" in job
        try:
            (self.run if is_run else self.convert)(gpu, job["name"], job)
        except subprocess.CalledProcessError as error:
            self.add(job | {"error": error.stderr})
        except Exception as error:  # of any kind: the other runs go on
            self.add(job | {"error": f"{type(error).__name__}: {error}"})
        finally:
            with self.turn:
                self.unfinished.remove(job["name"])
                self.free.append(gpu)
                self.turn.notify()

    def folder(self, name: str) -> Path:
        return self.args.work / name

    def data(self, job: dict[str, Any]) -> Path:
        files = {path.stem: path for path in self.args.data}
        return files[job["data"]] if "data" in job else self.args.data[0]

    def convert(self, gpu: int | None, name: str, options: dict[str, Any]) -> None:
        if self.folder(name).exists():
            return
        source = self.folder(options["of"]) if "of" in options else self.args.model
        command = [*self.verb("convert"), str(source), str(self.folder(name)), "--json"]
        for key, value in options.items():
            if key not in ("name", "of", "data"):
                command += [f"--{key.replace('_', '-')}", str(self.data(options) if key == "refit" else value)]
        self.process(gpu, name, command)

    @staticmethod
    def verb(name: str) -> list[str]:
        """One of the package's commands, also where it is not installed."""
        return [sys.executable, "-c", f"from stocha_hf.cli.{name} import main; main()"]

    def run(self, gpu: int | None, name: str, run: dict[str, Any]) -> None:
        row, command = self.averaging(name, run) if "average" in run else self.training(name, run)
        start = time.monotonic()
        self.process(gpu, name, command)
        row |= {"device": "cpu" if gpu is None else torch.cuda.get_device_name(gpu)}
        trained = round(time.monotonic() - start, 1)
        row |= {"jobs_per_gpu": self.args.jobs / max(self.args.gpus, 1), **self.figures(gpu, name, run)}
        seconds = {"training_seconds": trained, "seconds": round(time.monotonic() - start, 1)}
        self.add(row | seconds | {"command": shlex.join(command)})
        if tokens := self.trained(run):
            self.paces.append(max(seconds["seconds"] - STARTING, 0) / tokens)
        self.drop_checkpoints(name)

    def averaging(self, name: str, run: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        return dict(run), [*self.verb("average"), *(str(self.folder(one)) for one in [*run["average"], name])]

    def training(self, name: str, run: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What a row says of the run, and the command that trains it."""
        keys = self.listed["shared"] | {k: v for k, v in run.items() if k not in OF_THE_RUN}
        batch = LENGTH * keys["per_device_train_batch_size"] * keys.get("gradient_accumulation_steps", 1)
        if "start" in run:
            keys["model_name_or_path"] = self.folder(run["start"])
        else:
            keys["tokenizer_name_or_path"] = self.args.model
        keys |= {
            "dataset": self.rows(self.data(run)),
            "packing": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "output_dir": self.folder(name),
            "max_length": LENGTH,
            "max_steps": round(run["tokens"] / batch),
        }
        if "branch" in run:
            self.copy_checkpoint(run, keys["max_steps"])
        if teacher := keys.get("teacher"):
            keys["teacher"] = self.folder(teacher)
        command = [sys.executable, str(ROOT / "recipes/continued_pretrain.py"), "--config", self.listed["recipe"]]
        for key, value in keys.items():
            command += [f"--{key}", json.dumps(value) if isinstance(value, list | dict | bool) else str(value)]
        return run | {"learning_rate": keys["learning_rate"], "seed": keys["seed"], "batch_tokens": batch}, command

    def copy_checkpoint(self, run: dict[str, Any], steps: int) -> None:
        """Where the trainer finds it, and goes on as if it had been stopped there."""
        checkpoint = f"checkpoint-{round(run['at'] * steps)}"
        shutil.copytree(self.folder(run["branch"]) / checkpoint, self.folder(run["name"]) / checkpoint)

    def drop_checkpoints(self, name: str) -> None:
        """All that no other run of the list branches from; each is three times as large as the model."""
        checkpoints = self.checkpoints(name)
        for step, folder in checkpoints.items():
            if (name, round(step / max(checkpoints), 4)) not in self.branched:
                shutil.rmtree(folder)

    def checkpoints(self, name: str) -> dict[int, Path]:
        """Those that a run saved on its way, by their step."""
        found = {re.fullmatch(r"checkpoint-(\d+)", path.name): path for path in self.folder(name).iterdir()}
        return {int(match[1]): path for match, path in sorted(found.items(), key=lambda i: str(i[1])) if match}

    def rows(self, text: Path) -> Path:
        """A file's text as rows of LENGTH token ids, documents running on over row ends: made once for all runs."""
        path = self.args.work / f"{text.stem}-{LENGTH}.parquet"
        with self.tokenising:
            if not path.exists():
                tokenizer = AutoTokenizer.from_pretrained(self.args.model)
                texts = [plain_text(row) + tokenizer.eos_token for row in load_data(str(text))]
                parts = []
                for at in tqdm(range(0, len(texts), 1000), desc=f"Tokenising {text.name}", disable=None):
                    ids = tokenizer(texts[at : at + 1000], return_attention_mask=False)["input_ids"]
                    parts += [np.array(row, dtype=np.int32) for row in ids]
                flat = np.concatenate(parts)
                flat = flat[: len(flat) // LENGTH * LENGTH]
                offsets = np.arange(0, len(flat) + 1, LENGTH, dtype=np.int32)
                pq.write_table(pa.table({"input_ids": pa.ListArray.from_arrays(offsets, flat)}), path)
        return path

    def process(self, gpu: int | None, name: str, command: list[str]) -> None:
        """Run it on a GPU; its output goes to NAME.log. Raises CalledProcessError with the log's last line."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        if gpu is not None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
        log = self.args.work / f"{name}.log"
        with log.open("w") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
            raise subprocess.CalledProcessError(code, command, stderr=last)

    def figures(self, gpu: int | None, name: str, run: dict[str, Any]) -> dict[str, Any]:
        device = "cpu" if gpu is None else f"cuda:{gpu}"
        folder = self.folder(name)
        state = folder / "trainer_state.json"
        logs = json.loads(state.read_text())["log_history"] if state.exists() else []
        found: dict[str, Any] = {}
        for key, best in (("tokens_per_second", statistics.median), ("peak_memory_gb", max)):
            values = [log[key] for log in logs if key in log][1:]  # the first one compiles
            found[key] = best(values) if values else None
        found["curve"] = [
            [log["step"], round(log["loss"], 4), round(log["sparsity"], 4)] for log in logs if "loss" in log
        ]
        trained = folder / "merged" if (folder / "merged").exists() else folder
        model = self.load(trained, device)
        original = self.load(self.args.model, device) if "start" in run or "average" in run else None
        found["parameters"] = model.num_parameters()
        for text, windows in self.windows.items():
            found[text] = measured(model, windows)
            if original is not None:
                found[text] |= compare(model, original, windows[:: max(len(windows) // COMPARED, 1)]).to_dict()
            for mode in run.get("modes", []):
                with model.stocha_mode(mode):
                    found[text][mode] = measured(model, windows)
        if run.get("probe"):
            found["probes"] = [
                {"step": step, **probe(self.load(path, device), self.windows)}
                for step, path in sorted(self.checkpoints(name).items())
            ]
        return found

    def load(self, folder: Path, device: str) -> Any:
        with self.lock:  # from_pretrained changes PyTorch's default device for all threads meanwhile
            model = load_model(str(folder), dtype=torch.bfloat16)
        return model.eval().to(device)

    def add(self, row: dict[str, Any]) -> None:
        with self.lock, self.args.results.open("a") as file:
            file.write(json.dumps(row, default=str) + "\n")
        texts = {k: v for k, v in row.items() if isinstance(v, dict) and "perplexity" in v}
        told = "  ".join(f"{k} {v['perplexity']:.3f} at {v['zeros']:.1%}" for k, v in texts.items())
        speed = f"  {row['tokens_per_second']:.0f} tokens/s" if row.get("tokens_per_second") else ""
        print(f"{row['name']:32} {told or row.get('error')}{speed}  {row.get('seconds', '')} s", flush=True)


def measured(model: Any, windows: torch.Tensor) -> dict[str, Any]:
    """What a results line has of evaluate()."""
    figures = evaluate(model, windows)
    return {
        "perplexity": figures.perplexity,
        "zeros": figures.sparsity.mean,
        "zeros_per_layer": [round(share, 4) for share in figures.sparsity.per_layer],
        "dead": figures.never_active.mean,
        "dead_per_layer": [round(share, 4) for share in figures.never_active.per_layer],
        "tokens": figures.tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="YAML: recipe, shared, starts, runs")
    parser.add_argument(
        "--model", type=Path, required=True, help="checkpoint folder that all starts are made from, or a tokenizer"
    )
    parser.add_argument("--data", nargs="+", type=Path, required=True, help="training text, the first file by default")
    parser.add_argument("--eval", nargs="+", required=True, help="texts to evaluate on")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument("--results", type=Path, required=True, help="lines are added to this file")
    parser.add_argument("--only", nargs="+", default=["*"], help="names of runs, with wildcards")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count())
    parser.add_argument("--seconds", type=float, help="begin no run that would end later than this")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: one a GPU)")
    args = parser.parse_args()
    args.jobs = args.jobs or max(args.gpus, 1)
    args.work.mkdir(parents=True, exist_ok=True)
    Bench(args).go()


if __name__ == "__main__":
    main()
