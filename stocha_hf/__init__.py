"""Sparse feed-forward layers for pretrained language models: convert, train, measure and publish.

Names are imported when first used, so `import stocha_hf` and every command's --help stay fast and free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stocha_hf.answers.writing import write_answers
    from stocha_hf.conversion.averaging import average
    from stocha_hf.conversion.convert import convert
    from stocha_hf.conversion.export import export
    from stocha_hf.conversion.refit_model import refit
    from stocha_hf.cuts import InputCuts
    from stocha_hf.cuts_stocha import cut_inputs
    from stocha_hf.decoding.lossless import lossless
    from stocha_hf.errors import StochaError
    from stocha_hf.measurement.answers import evaluate_answers
    from stocha_hf.measurement.evaluation import compare, evaluate
    from stocha_hf.measurement.sampling import sample
    from stocha_hf.measurement.selection.input_cuts import calibrate_inputs
    from stocha_hf.measurement.selection.learned import learn_input_cuts
    from stocha_hf.measurement.speed_models import benchmark
    from stocha_hf.modeling_stocha import StochaConfig, stocha_mode
    from stocha_hf.models import load_model
    from stocha_hf.patching import patch, set_activation, unpatch
    from stocha_hf.publishing.card import write_card
    from stocha_hf.publishing.upload import publish
    from stocha_hf.quantization_stocha import StochaQuantConfig
    from stocha_hf.spec import __version__
    from stocha_hf.tasks.evaluate import compare_tasks, evaluate_tasks
    from stocha_hf.training.arguments import StochaArguments
    from stocha_hf.training.run import train
    from stocha_hf.training.schedule import Schedule
    from stocha_hf.training.trainer import StochaTrainer

_HOMES = {
    "average": "conversion.averaging",
    "benchmark": "measurement.speed_models",
    "calibrate_inputs": "measurement.selection.input_cuts",
    "compare": "measurement.evaluation",
    "compare_tasks": "tasks.evaluate",
    "convert": "conversion.convert",
    "cut_inputs": "cuts_stocha",
    "evaluate": "measurement.evaluation",
    "evaluate_answers": "measurement.answers",
    "evaluate_tasks": "tasks.evaluate",
    "export": "conversion.export",
    "learn_input_cuts": "measurement.selection.learned",
    "load_model": "models",
    "lossless": "decoding.lossless",
    "patch": "patching",
    "publish": "publishing.upload",
    "refit": "conversion.refit_model",
    "sample": "measurement.sampling",
    "set_activation": "patching",
    "stocha_mode": "modeling_stocha",
    "train": "training.run",
    "unpatch": "patching",
    "write_answers": "answers.writing",
    "write_card": "publishing.card",
    "InputCuts": "cuts",
    "Schedule": "training.schedule",
    "StochaArguments": "training.arguments",
    "StochaConfig": "spec",
    "StochaError": "errors",
    "StochaQuantConfig": "quantization_stocha",
    "StochaTrainer": "training.trainer",
    "__version__": "spec",
}
__all__ = [
    "InputCuts",
    "Schedule",
    "StochaArguments",
    "StochaConfig",
    "StochaError",
    "StochaQuantConfig",
    "StochaTrainer",
    "__version__",
    "average",
    "benchmark",
    "calibrate_inputs",
    "compare",
    "compare_tasks",
    "convert",
    "cut_inputs",
    "evaluate",
    "evaluate_answers",
    "evaluate_tasks",
    "export",
    "learn_input_cuts",
    "load_model",
    "lossless",
    "patch",
    "publish",
    "refit",
    "sample",
    "set_activation",
    "stocha_mode",
    "train",
    "unpatch",
    "write_answers",
    "write_card",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'stocha_hf' has no attribute {name!r}")
    return getattr(import_module(f"stocha_hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
