"""What launches of Triton's kernels would compile for an H100, where there is none."""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

import pytest
import torch

POINTERS = {
    **{torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"},
    **{torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"},
}
NUMBERS = {int: "i32", float: "fp32"}


def compiling(modules: Iterable[ModuleType], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list to which launches of modules' kernels add what they compile, in the place of running it."""
    compiled: list[Any] = []

    class Kernel:
        def __init__(self, function: Any) -> None:
            self.function = function

        def __getitem__(self, grid: object) -> Any:
            return lambda *args, **options: compiled.append(compiled_for_h100(self.function, args, options))

    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(getattr(module, name)))
    return compiled


def compiled_for_h100(function: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """What a launch with these arguments would compile."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    values = dict(zip(function.arg_names, args, strict=False))
    values |= {name: options.pop(name) for name in function.arg_names if name in options}
    constants = {p.name: values[p.name] for p in function.params if p.is_constexpr}
    kinds = {
        name: POINTERS[value.dtype] if isinstance(value, torch.Tensor) else NUMBERS[type(value)]
        for name, value in values.items()
        if name not in constants
    }
    signature = {name: kinds.get(name, "constexpr") for name in function.arg_names}
    divisible = {  # as a launch says it of these numbers and of all pointers
        (function.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in kinds.items()
        if kind.startswith("*") or (kind == "i32" and values[name] % 16 == 0)
    }
    source = ASTSource(function, signature, constants, divisible)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)
