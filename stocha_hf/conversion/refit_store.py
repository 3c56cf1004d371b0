"""Finished layers of a refit: one file a layer, so that a killed run goes on after them.

store = LayerFiles(folder)
store[0] = fitted        # whole or not at all
0 in store               # in the next run as well
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from stocha_hf.conversion.refit_ffn import FFN, PARTS, Fitted
from stocha_hf.conversion.refit_streams import KEPT
from stocha_hf.conversion.refit_work import reading_layer


class Store(Protocol):
    """Where finished layers are kept."""

    def __contains__(self, index: int) -> bool: ...

    def __setitem__(self, index: int, fitted: Fitted) -> None: ...

    def __getitem__(self, index: int) -> Fitted: ...


@dataclass(frozen=True)
class LayerFiles:
    """A Store of one file a layer; its FFNs are read to `device`."""

    folder: Path
    device: str = "cpu"

    def path(self, index: int) -> Path:
        return self.folder / f"layer-{index:03d}.safetensors"

    def __contains__(self, index: int) -> bool:
        return self.path(index).exists()

    def __setitem__(self, index: int, fitted: Fitted) -> None:
        ffn = fitted.ffn
        partial = self.path(index).with_suffix(".partial")
        matrices = {part: matrix.cpu() for part, matrix in ffn.parts.items()}
        told = {"threshold": repr(ffn.threshold), "error": repr(fitted.error), "zeros": repr(fitted.zeros)}
        try:
            save_file(matrices, partial, told)
        except (OSError, SafetensorError):
            if not (streams := [*self.folder.glob(f"{Path(KEPT).stem}.*")]):
                raise
            for path in streams:  # they take the most room, and only save time
                path.unlink()
            save_file(matrices, partial, told)
        partial.rename(self.path(index))

    def __getitem__(self, index: int) -> Fitted:
        path = self.path(index)
        with reading_layer(path), safe_open(path, framework="pt", device=self.device) as stored:
            told = {name: float(figure) for name, figure in (stored.metadata() or {}).items()}
            gate, up, down = (stored.get_tensor(part) for part in PARTS)
            return Fitted(FFN(gate, up, down, told["threshold"]), told["error"], told["zeros"])
