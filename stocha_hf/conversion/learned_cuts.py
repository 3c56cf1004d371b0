"""Input cuts whose thresholds are learned, one for each input: a conversion that scales weights.

What is learned (measurement/selection/learned.py) is folded into norms and projections, so that config.json holds one
threshold a projection as for any cuts. The folder's weights are then no longer the source's: uncut they compute the
same, up to rounding to their dtype. config.json says so under `stocha.history`, and the card.

Each row is a whole text from its first token, as decoding meets it, and its prompt is not cut; of a text in which
nothing marks a prompt, a random beginning.

    stocha-convert SOURCE OUTPUT --inputs 0.5 --inputs-allotment learned --calibrate answers.jsonl
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from stocha_hf.checkpoints.entry import read_entry, with_entry, with_stage
from stocha_hf.checkpoints.names import public_name
from stocha_hf.checkpoints.quantized import refuse_quantized
from stocha_hf.checkpoints.tensors import Tensors
from stocha_hf.conversion.input_cuts import Calibration, is_sparse, uncut_model
from stocha_hf.conversion.source import Source
from stocha_hf.cuts import LEARNED, LEARNED_INPUTS
from stocha_hf.data import calibration_texts
from stocha_hf.data.windows import SHORTEST
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.selection.learned import BATCH, answers, learn_input_cuts

DEFAULT_TOKENS = 2**21  # padding included: about what all steps take
WINDOW = 512  # tokens


@dataclass(frozen=True)
class LearnedCuts:
    """The result: the converted model's config.json with its cuts, and the model whose weights were scaled."""

    config: dict[str, Any]
    model: Any

    def apply_to(self, checkpoint: Path) -> None:
        """Overwrite the decoder layers' weights of a copy of the source, in the dtypes that they have there."""
        tensors = Tensors(checkpoint)
        for index, block in enumerate(blocks(self.model)):
            names = tensors.layer(index)
            for name, value in block.module.state_dict().items():
                tensors.overwrite(names[name], value)


def learned_cuts(source: Source, config: dict[str, Any], options: Calibration) -> LearnedCuts:
    """Learn thresholds for `source`, of which `config` is the converted config.json.

    Raises StochaError for a quantized source, an FFN that is sparse by its gate, too few texts, and a model whose
    predictions are not finite.
    """
    entry = replace(read_entry(config, source.id), inputs=None)
    refuse_quantized(source.config, source.id, "learning thresholds")
    if is_sparse(entry):
        raise StochaError(
            f"inputs_allotment {LEARNED} was given for {source.id} with the activation {entry.inference}, which makes "
            f"the FFN sparse: expected {entry.base}; give --activation {entry.base}, or another allotment"
        )
    length = min(WINDOW, source.config.get("max_position_embeddings") or WINDOW)
    wanted = max((options.tokens or DEFAULT_TOKENS) // length, 1)
    rows, lengths, prompts = calibration_texts(str(options.data), source.folder, wanted, length, options.seed)
    if len(rows) < (least := min(BATCH, wanted)):
        raise StochaError(
            f"{options.data} has {len(rows)} texts that are long enough to learn thresholds on: expected {least} or "
            f"more, each a row of the data set, of {SHORTEST} tokens or more, and its prompt of fewer than {length}"
        )
    used = {"data": public_name(str(options.data)), "tokens": int(lengths.sum()), "seed": options.seed}
    model = uncut_model(source, entry, _dtype(source.folder, torch.cuda.is_available()))
    cuts = learn_input_cuts(
        model,
        rows,
        options.share,
        cut_at=answers(lengths, length, options.seed, prompts),
        prefill=options.prefill,
        train=options.train,
        calibration=used | {"allotment": LEARNED},
    )
    stage = {"method": LEARNED_INPUTS, **used, "share": options.share}
    return LearnedCuts(with_entry(config, with_stage(replace(entry, inputs=cuts), stage)), model)


def _dtype(folder: Path, on_gpu: bool) -> str:
    """What to scale the weights in: float32, but on a GPU the dtype of weights that have less anyway."""
    tensors = Tensors(folder)
    stored = tensors.read(tensors.ending("layers.0.self_attn.q_proj.weight")).dtype
    return "float32" if not on_gpu or stored == torch.float32 else str(stored).removeprefix("torch.")
