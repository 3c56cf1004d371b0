"""Put every way to read fewer weights on one picture: what the model still can, against the bytes of a decode step.

One row a point goes to --json, and a row that is there already is not measured again: a killed run goes on with the
same command. Measured are

- the original, and every method of stocha_hf/measurement/selection/methods.py at --shares, calibrated on --calibrate;
- --refit: the model refitted to these shares of zeros on the calibration text;
- --checkpoints: folders of converted, trained or refitted models; --gguf: files of llama.cpp, as dense points: their
  bytes are the file's, their perplexity that of the dequantized weights in transformers.

Of each: perplexity on each text of --eval; zeros; bytes read; acceptance, on what the original wrote greedily after
--prompts (as stocha-answers reads them; or after the beginnings of the first text); and --tasks with their standard
errors.
Perplexity is of the tokens after the first --prompt-tokens of each window, which are read whole, as a prompt is.
Tasks that generate read the question whole too; those that compare likelihoods are cut at every token.

    python benchmarks/frontier.py MODEL --calibrate train.jsonl --eval code.jsonl prose.jsonl --json out.jsonl \\
        --plot out.png --refit 0.6 0.7 0.8 0.9 0.95 --checkpoints A B --gguf Q8_0.gguf Q4_0.gguf \\
        --tasks humaneval --run-code
    python benchmarks/frontier.py --json out.jsonl --extra-rows more.jsonl --plot out.png    # draws, measures nothing
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from stocha_hf.answers.prompts import read_prompts, rendered, token_ids
from stocha_hf.checkpoints.hashing import weights_hash
from stocha_hf.conversion.convert import convert
from stocha_hf.conversion.gguf_header import read_gguf_header
from stocha_hf.data import calibration_windows, text_windows
from stocha_hf.errors import StochaError
from stocha_hf.measurement.acceptance import GreedyText, acceptance, greedy_text
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.evaluation import evaluate
from stocha_hf.measurement.plots import Picture, check_plot, plot
from stocha_hf.measurement.records import BytesRead
from stocha_hf.measurement.selection.applied import Selection
from stocha_hf.measurement.selection.calibration import Calibration
from stocha_hf.measurement.selection.methods import METHODS
from stocha_hf.models import load_model
from stocha_hf.tasks.evaluate import CHOSEN, evaluate_tasks

HIGHEST = 3  # times the original's perplexity: the end of the axis
SHARES = [0.25, 0.4, 0.5, 0.6, 0.7]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Scorer = Callable[[Any, bool], list[dict[str, Any]]]  # of a model, and whether a text at a time: its tasks' scores


@dataclass
class Measures:
    """What every point is measured by, on the same rows."""

    texts: dict[str, torch.Tensor]  # windows by name
    prompt: int  # tokens of a window that are read whole
    written: GreedyText | None  # by the original
    scorer: Scorer | None

    def of(self, model: Any, selection: Selection) -> dict[str, Any]:
        """A point's figures."""
        found: dict[str, Any] = {"perplexity": {}, "zeros": {}}
        sums: list[BytesRead] = []
        for name, windows in self.texts.items():
            with selection.applied(model, prompt=self.prompt) as meter:
                figures = evaluate(model, windows, self.prompt)
            found["perplexity"][name], found["zeros"][name] = figures.perplexity, figures.sparsity.mean
            sums.append(meter.read())
        found["bytes_read"] = _mean(sums).to_dict()
        if self.written is not None:
            with selection.applied(model, prompt=self.written.prompt):
                found["acceptance"] = acceptance(model, self.written)
        if self.scorer is not None and selection.prepare is None:  # which needs to know what will be generated
            with selection.applied(model, decoding=True):
                found["tasks"] = self.scorer(model, selection.remembers)
        return found


def _mean(parts: list[BytesRead]) -> BytesRead:
    """The mean over texts."""
    rows = [part.to_dict() for part in parts]
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    return BytesRead(**{name: value if name == "share" else round(value) for name, value in means.items()})


def dense(model: Any) -> Selection:
    """A selection that leaves nothing out: what is counted then are the model's own zeros."""
    return Selection([{} for _ in blocks(model)])


class Rows:
    """The results file: a row a line, appended as they come; `settings` tell which rows are of this run."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        kept = read_rows(path) if path.exists() else []
        self._done = {_key(row) for row in kept if row.get("settings") == settings}
        if path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size:
            with path.open("a") as file:
                file.write("\n")  # after what a killed run left of its last row

    def measure(self, point: dict[str, Any], figures: Callable[[], dict[str, Any]]) -> None:
        """Add a point's row, unless it is there."""
        if _key(point) in self._done:
            return
        start = time.monotonic()
        row = point | figures()
        row |= {"seconds": round(time.monotonic() - start, 1), "device": _device(), "settings": self.settings}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._done.add(_key(row))
        print(told(row), flush=True)

    def lack(self, point: dict[str, Any]) -> bool:
        return _key(point) not in self._done


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["method"], row["share"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a file; what a killed run left of one is passed over."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def told(row: dict[str, Any]) -> str:
    """A row as a line of text."""
    read = row["bytes_read"]
    cells = [f"{row['method']:16}{row['share']:5.0%}  {read['step'] / 1e6:8.1f} MB  blocks {read['share']:6.1%}"]
    cells += [f"{name} {value:.3f}" for name, value in row.get("perplexity", {}).items()]
    if "acceptance" in row:
        cells.append(f"accepted {row['acceptance']:.1%}")
    cells += [f"{task['task']} {task['score']:.1%}" for task in row.get("tasks", [])]
    return "  ".join(cells)


def _device() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def measure(args: argparse.Namespace) -> None:
    folder = Path(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = {Path(name).stem: text_windows(name, folder, args.length, args.windows) for name in args.eval}
    settings = {name: getattr(args, name) for name in ("calibrate", "eval", "tokens", "length", "windows", "dtype")}
    settings |= {name: getattr(args, name) for name in ("prompt_tokens", "prompts", "tasks", "limit", "seed")}
    settings |= {"chosen": CHOSEN} if args.limit else {}
    rows = Rows(args.json, {"model": folder.name, "weights": weights_hash(folder)} | settings)
    measures = measure_original(args, folder, tokenizer, texts, rows)  # whose model is gone when it returns
    for point, make in others(args, folder):
        if rows.lack(point):
            gc.collect()
            rows.measure(point, lambda make=make: make(measures))


def measure_original(
    args: argparse.Namespace, folder: Path, tokenizer: Any, texts: dict[str, torch.Tensor], rows: Rows
) -> Measures:
    """Measure the original and every method on it; returns what the other points are measured by."""
    model = load(folder, args)
    written = None
    if args.new_tokens:
        written = greedy_text(model, prompts(args, tokenizer, texts), args.new_tokens, tokenizer.pad_token_id or 0)
    measures = Measures(texts, args.prompt_tokens, written, scorer(args, tokenizer))
    rows.measure({"method": "original", "share": 0.0}, lambda: measures.of(model, dense(model)))
    calibration = Calibration(model, calibration_windows(args.calibrate, folder, args.tokens, args.length, args.seed))
    for name in args.methods:
        for share in args.shares:
            point = {"method": name, "share": share, "oracle": METHODS[name].oracle}
            rows.measure(
                point, lambda name=name, share=share: measures.of(model, METHODS[name].select(calibration, share))
            )
    return measures


def others(args: argparse.Namespace, folder: Path) -> Iterator[tuple[dict[str, Any], Callable[[Measures], Any]]]:
    """The points that are models of their own: what they are called, and how to measure them."""

    def converted(source: Path, measures: Measures, **options: Any) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="stocha-frontier-") as output:
            convert(source, output, overwrite=True, **options)
            return loaded(Path(output), measures)

    def loaded(folder: Path, measures: Measures) -> dict[str, Any]:
        model = load(folder, args)
        return measures.of(model, dense(model))

    for share in args.refit:
        options = {"activation": "relu", "refit": args.refit_data or args.calibrate, "target_sparsity": share}
        options["refit_tokens"] = args.refit_tokens
        yield (
            {"method": "refit", "share": share},
            lambda measures, options=options: converted(folder, measures, **options),
        )
    for checkpoint in args.checkpoints:
        yield {"method": checkpoint.name, "share": 0.0}, lambda measures, path=checkpoint: loaded(path, measures)
    for file in args.gguf:
        yield (
            {"method": file.stem, "share": 0.0, "dense": True},
            lambda measures, file=file: of_file(file, converted(file, measures)),
        )


def load(folder: Path, args: argparse.Namespace) -> Any:
    return load_model(str(folder), dtype=getattr(torch, args.dtype)).eval().to(DEVICE)


def of_file(file: Path, figures: dict[str, Any]) -> dict[str, Any]:
    """The figures of the dequantized weights, with the bytes that llama.cpp reads of the file for a token: the blocks'
    and the head's, which may be the embedding.
    """
    tensors = sorted(read_gguf_header(file).tensors.items(), key=lambda item: item[1].begin)
    ends = [tensor.begin for _, tensor in tensors[1:]] + [file.stat().st_size]
    sizes = {name: end - tensor.begin for (name, tensor), end in zip(tensors, ends, strict=True)}
    inside = sum(size for name, size in sizes.items() if name.startswith("blk."))
    head = sizes.get("output.weight", sizes["token_embd.weight"])
    whole = figures["bytes_read"]["dense_blocks"]
    return figures | {"bytes_read": BytesRead(inside + head, inside, head, whole, inside / whole).to_dict()}


def prompts(args: argparse.Namespace, tokenizer: Any, texts: dict[str, torch.Tensor]) -> list[list[int]]:
    """The prompts that the original continues: those of --prompts, as chats where there is a template, or beginnings
    of the first text's windows.
    """
    if args.prompts is None:
        return next(iter(texts.values()))[: args.most_prompts, : args.length // 4].tolist()
    asked = read_prompts(args.prompts)[: args.most_prompts]
    texts_of_prompts = rendered(tokenizer, asked, chat=bool(tokenizer.chat_template))
    return [ids[-args.length // 2 :] for ids in token_ids(tokenizer, texts_of_prompts)]


def scorer(args: argparse.Namespace, tokenizer: Any) -> Scorer | None:
    """How tasks are scored, or None where none are asked for."""
    if not args.tasks:
        return None
    options: dict[str, Any] = {"limit": args.limit, "run_code": args.run_code, "task_data": args.task_data}

    def score(model: Any, one_by_one: bool) -> list[dict[str, Any]]:
        size = 1 if one_by_one else args.batch_size
        return evaluate_tasks(model, tokenizer, args.tasks, batch_size=size, **options).to_dict()

    return score


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Each task's score and each text's perplexity against the megabytes of a step, a line a method.

    A perplexity's axis ends at HIGHEST times the original's: some methods go to 100,000, and would hide the others.
    Oracles are left out: they know the next token, and are below the original. Of rows of one method, share and
    fallback the first is drawn.
    """
    rows = [row for row in rows if not row.get("oracle")]
    originals: dict[str, float] = {}
    for row in rows:
        originals |= row.get("perplexity", {}) if row["method"] == "original" else {}
    tasks = sorted({(task["task"], task["metric"]) for row in rows for task in row.get("tasks", [])})
    texts = sorted({name for row in rows for name in row.get("perplexity", {})})
    pictures = []
    for title in [*tasks, *texts]:
        lines: dict[str, dict[tuple[float, float | None], tuple[Any, ...]]] = {}
        for row in rows:
            for y, error in _values(row, title):
                point = (row["bytes_read"]["step"] / 1e6, y, _text(row), error)
                lines.setdefault(row["method"], {}).setdefault((row["share"], row.get("fallback")), point)
        points = {method: list(found.values()) for method, found in lines.items()}
        x = "weights read for a token, MB"
        if isinstance(title, str):
            limits = _limits(originals.get(title), [point[1] for found in points.values() for point in found])
            pictures.append(Picture(title, points, x, "perplexity", "y", False, limits))
        else:
            pictures.append(Picture(f"{title[0]}, {title[1]}", points, x, "score, %", "", False))
    plot(target, pictures)


def _limits(original: float | None, values: list[float]) -> tuple[float, float] | None:
    """The range of perplexities that is shown; what the points ask for where the original is not among them."""
    if original is None:
        return None
    return 0.97 * min(values), min(1.03 * max(values), HIGHEST * original)


def _values(row: dict[str, Any], title: Any) -> list[tuple[float, float | None]]:
    """A row's value of a picture and its standard error, or nothing."""
    if isinstance(title, str):
        return [(row["perplexity"][title], None)] if title in row.get("perplexity", {}) else []
    found = [task for task in row.get("tasks", []) if (task["task"], task["metric"]) == title]
    return [(100 * task["score"], 100 * (task["stderr"] or 0.0)) for task in found]


def _text(row: dict[str, Any]) -> str:
    return f"{row['share']:.0%}" if row["share"] else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the original model, native or converted")
    parser.add_argument("--calibrate", help="text that thresholds are taken from")
    parser.add_argument("--eval", nargs="+", default=[], help="texts to measure perplexity on")
    parser.add_argument("--json", type=Path, required=True, help="rows are added to this file")
    parser.add_argument("--plot", type=Path, help="draw the file's rows here")
    parser.add_argument("--extra-rows", type=Path, nargs="+", default=[], help="files whose rows are drawn too")
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=[*METHODS], metavar="METHOD")
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--refit", nargs="*", type=float, default=[], help="shares of zeros to refit to")
    parser.add_argument("--refit-data", help="text to refit on (default: the calibration text)")
    parser.add_argument("--refit-tokens", type=int)
    parser.add_argument("--checkpoints", nargs="*", type=Path, default=[])
    parser.add_argument("--gguf", nargs="*", type=Path, default=[], help="dense files of llama.cpp")
    parser.add_argument("--tokens", type=int, default=16_384, help="of calibration text")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--windows", type=int, help="of each text, evenly spaced (default: all)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of each window, read whole and not scored")
    parser.add_argument("--prompts", help="prompts to measure acceptance after, as stocha-answers reads them")
    parser.add_argument("--most-prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128, help="written after each prompt; 0: no acceptance")
    parser.add_argument("--tasks", nargs="*", default=[])
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--batch-size", type=int, help="texts of a task at a time (default: what suits the device)")
    parser.add_argument("--task-data", help="folder or file with the tasks' questions")
    parser.add_argument("--run-code", action="store_true", help="let tasks run the code that the model writes")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        if args.plot:
            check_plot(args.plot)
        if args.model:
            if not (args.calibrate and args.eval):
                raise StochaError("a model is to be measured: expected --calibrate and --eval with texts")
            if not 0 <= args.prompt_tokens < args.length - 1:
                raise StochaError(f"--prompt-tokens is {args.prompt_tokens}: expected less than --length less 1")
            measure(args)
        if args.plot:
            draw([row for path in [args.json, *args.extra_rows] for row in read_rows(path)], args.plot)
    except StochaError as error:
        raise SystemExit(f"frontier.py: {error}") from None


if __name__ == "__main__":
    main()
