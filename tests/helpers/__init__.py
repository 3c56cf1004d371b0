"""What the tests share: tiny models, the package's commands, training runs, kernel references and a loopback Hub.

conftest.py holds the fixtures and sets the environment; import plain functions from here:

    from helpers import assert_refused, call_command, run_command, run_python, run_two_ranks, run_warm, tiny_model
    from helpers.training import arguments, losses, run
    from helpers.kernels import bound, dense, error, matrices
"""

from helpers.commands import BIN, Warm, assert_refused, call_command, run_command, run_python, run_two_ranks, run_warm
from helpers.models import CONFIGS, SIZES, tiny_model, tiny_tokenizer
from helpers.tiers import first_is_fast

__all__ = [
    "BIN",
    "CONFIGS",
    "SIZES",
    "Warm",
    "assert_refused",
    "call_command",
    "first_is_fast",
    "run_command",
    "run_python",
    "run_two_ranks",
    "run_warm",
    "tiny_model",
    "tiny_tokenizer",
]
