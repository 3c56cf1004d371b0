"""Training-free methods: exact at share 0, as sparse as asked for, as their formulas say, and bytes by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import first_is_fast, tiny_model

from stocha_hf import StochaConfig, patch
from stocha_hf.cuts import PROJECTIONS
from stocha_hf.cuts_stocha import cut_inputs
from stocha_hf.errors import StochaError
from stocha_hf.measurement.blocks import blocks
from stocha_hf.measurement.bytes_read import ReadMeter
from stocha_hf.measurement.evaluation import evaluate
from stocha_hf.measurement.selection.attribution import corrected, own_token_gradients
from stocha_hf.measurement.selection.calibration import Calibration
from stocha_hf.measurement.selection.distributions import Distribution, input_distributions
from stocha_hf.measurement.selection.learned import UNCUT, learn_groups, learn_input_cuts
from stocha_hf.measurement.selection.methods import GAMMA, LOW_RANK, METHODS
from stocha_hf.measurement.selection.output_shares import LEVELS, equal_slopes, output_curves, output_shares
from stocha_hf.measurement.selection.thresholds import cutting, greedy_shares, uniform_shares

pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = torch.randint(3, 64, (4, 40), generator=torch.Generator().manual_seed(0))
PROMPT = 8
NEURONS = ("cats", "magnitude", "cett", "top_k", "top_k_gate", "core_infer", "reuse")  # which leave neurons out
INPUTS = ("teal", "scap", "scap_median", "wina", "spon")  # which leave inputs of all projections out


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    model = native()
    patch(model, StochaConfig())  # for CETT and evaluate; the methods are applied to native models too
    return Calibration(model, WINDOWS)


def native() -> Any:
    """The same model, not patched: its decode steps need no kernel."""
    return tiny_model(intermediate_size=96)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(WINDOWS).logits


def seen_by(model: Any, name: str, index: int = 0) -> torch.Tensor:
    """The inputs that a projection is given in a forward of WINDOWS."""
    found: list[torch.Tensor] = []
    linear = blocks(model)[index].linears[name]
    with linear.register_forward_pre_hook(lambda module, args: found.append(args[0])):
        logits(model)
    return found[0]


@pytest.mark.parametrize("name", first_is_fast(METHODS))
def test_share_0_is_the_original_exactly_and_a_share_changes_it_for_a_while(calibration, name) -> None:
    model, dense = calibration.model, logits(calibration.model)
    with METHODS[name].select(calibration, 0.0).applied(model, prompt=PROMPT):
        assert torch.equal(logits(model), dense)
    with METHODS[name].select(calibration, 0.5).applied(model, prompt=PROMPT):
        cut = logits(model)
    assert torch.equal(cut[:, :PROMPT], dense[:, :PROMPT])  # the prompt is read whole
    assert not torch.isclose(cut[:, PROMPT:], dense[:, PROMPT:]).all(-1).any()
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("name", NEURONS)
def test_neurons_are_left_out_at_about_the_share_asked_for(calibration, name) -> None:
    model = calibration.model
    with METHODS[name].select(calibration, 0.6).applied(model, prompt=PROMPT):
        zeros = (seen_by(model, "down_proj")[:, PROMPT:] == 0).double().mean().item()
    assert zeros == pytest.approx(0.6, abs=0.06)


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_left_out_at_about_the_share_asked_for(calibration, name) -> None:
    model = calibration.model
    selection = METHODS[name].select(calibration, 0.4)
    with selection.applied(model) as meter:
        evaluate(model, WINDOWS)
    dense = sum(linear.weight.numel() for block in blocks(model) for linear in block.linears.values())
    norms = sum(p.numel() for block in blocks(model) for p in block.module.parameters()) - dense
    size = next(model.parameters()).element_size()
    extra = sum(
        cut.extra_bytes(*blocks(model)[i].linears[k].weight.shape[:1], size)
        for i, row in enumerate(selection.inputs)
        for k, cut in row.items()
    )
    left_out = 1 - (meter.read().blocks - extra - size * norms) / (size * dense)
    assert left_out == pytest.approx(0.4, abs=0.03)


def test_teal_cuts_each_projections_inputs_of_small_magnitude(calibration) -> None:
    model, dense = calibration.model, seen_by(calibration.model, "q_proj")
    with METHODS["teal"].select(calibration, 0.4).applied(model):
        cut = seen_by(model, "q_proj")
    limit = dense.abs().quantile(0.4)
    assert torch.equal(cut, dense.masked_fill(dense.abs() <= limit, 0))


def test_wina_weighs_inputs_by_their_columns_norms(calibration) -> None:
    model, linear = calibration.model, blocks(calibration.model)[0].linears["v_proj"]
    dense = seen_by(model, "v_proj")
    with METHODS["wina"].select(calibration, 0.4).applied(model):
        cut = seen_by(model, "v_proj")
    sizes = dense.abs() * linear.weight.norm(dim=0)
    wanted = dense.masked_fill(sizes <= sizes.quantile(0.4), 0)
    assert (cut != wanted).double().mean() < 0.002  # at the threshold, to a bin


def test_scap_puts_the_centre_in_the_place_of_what_is_left_out(calibration) -> None:
    model, dense = calibration.model, seen_by(calibration.model, "down_proj")
    selection = METHODS["scap_median"].select(calibration, 0.5)
    centre = selection.inputs[0]["down_proj"].centre
    assert centre == pytest.approx(dense.median().item(), abs=0.01) and centre != 0
    cuts = {"down_proj": selection.inputs[0]["down_proj"]}
    with type(selection)([cuts, {}]).applied(model):
        cut = seen_by(model, "down_proj")
    left_out = cut != dense
    assert left_out.double().mean() == pytest.approx(0.5, abs=0.02)
    assert (cut[left_out] == torch.tensor(centre)).all()
    assert (dense[left_out] - centre).abs().max() <= (dense[~left_out] - centre).abs().min()


@torch.no_grad()
def test_constants_and_low_rank_factors_add_what_they_say(calibration) -> None:
    model, block = calibration.model, blocks(calibration.model)[0]
    x, weight = seen_by(model, "o_proj"), block.linears["o_proj"].weight
    for name in ("spon", "r_sparse"):
        cut = METHODS[name].select(calibration, 0.5).inputs[0]["o_proj"]
        kept = cut.kept(x, cut.keep(x))
        added, lost = cut.correction(x, kept), (x - kept) @ weight.T
        assert added is not None
        if name == "spon":
            torch.testing.assert_close(added, lost.mean((0, 1)), atol=1e-5, rtol=1e-4)
        else:
            first, second = cut.factors
            assert len(first) == max(round(LOW_RANK * 0.5 * weight.numel() / sum(weight.shape)), 1)
            best = torch.linalg.svdvals(weight)[len(first) :].norm()  # the error of the best factors of this rank
            assert (weight - second @ first).norm() < 1.02 * best
            torch.testing.assert_close(added, (x - kept) @ (second @ first).T, atol=1e-4, rtol=1e-4)
        with type(METHODS[name].select(calibration, 0.5))([{"o_proj": cut}, {}]).applied(model):
            output = block.linears["o_proj"](x)
        torch.testing.assert_close(output, kept @ weight.T + added, atol=1e-4, rtol=1e-4)


def test_neurons_kept_by_the_gate_the_hidden_vector_and_the_prompt(calibration) -> None:
    model, hidden = calibration.model, seen_by(calibration.model, "down_proj")
    act = torch.nn.functional.silu(seen_by_output(model, "gate_proj"))
    with METHODS["top_k"].select(calibration, 0.75).applied(model):
        kept = seen_by(model, "down_proj") != 0
    assert torch.equal(kept, hidden.abs() >= hidden.abs().topk(24).values[..., -1:])
    with METHODS["cats"].select(calibration, 0.75).applied(model):
        kept = seen_by(model, "down_proj") != 0
    assert (kept == (act.abs() > act.abs().quantile(0.75))).double().mean() > 0.998
    with METHODS["core_infer"].select(calibration, 0.75).applied(model, prompt=PROMPT):
        kept = seen_by(model, "down_proj")[:, PROMPT:] != 0
    votes = (hidden.abs() >= hidden.abs().topk(24).values[..., -1:])[:, :PROMPT].sum(1)
    assert torch.equal(kept, kept[:, :1].expand_as(kept)) and (kept[:, 0].sum(-1) == 24).all()
    for row, chosen in zip(votes, kept[:, 0], strict=True):
        assert row[chosen].min() >= row[~chosen].max()


def seen_by_output(model: Any, name: str) -> torch.Tensor:
    found: list[torch.Tensor] = []
    linear = blocks(model)[0].linears[name]
    with linear.register_forward_hook(lambda module, args, output: found.append(output)):
        logits(model)
    return found[0]


def test_reuse_takes_a_new_choice_at_every_fourth_token(calibration) -> None:
    model, hidden = calibration.model, seen_by(calibration.model, "down_proj")
    with METHODS["reuse"].select(calibration, 0.5).applied(model):
        kept = seen_by(model, "down_proj") != 0
    chosen = hidden.abs() > hidden.abs().quantile(0.5)
    first = torch.arange(40) // (GAMMA + 1) * (GAMMA + 1)
    assert (kept == chosen[:, first]).double().mean() > 0.998


@pytest.mark.parametrize("name", ["teal", "cats", "core_infer", "reuse", "r_sparse"])
def test_decode_steps_alone_are_the_same_as_a_window_after_its_prompt(calibration, name) -> None:
    model, selection = native(), METHODS[name].select(calibration, 0.5)
    text = WINDOWS[:2, : PROMPT + 8]
    with selection.applied(model, prompt=PROMPT) as meter, torch.no_grad():
        at_once = model(text).logits[:, PROMPT:]
    read = meter.read()
    with selection.applied(model, decoding=True) as meter, torch.no_grad():
        cache = model(text[:, :PROMPT], use_cache=True).past_key_values
        steps = [model(text[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, PROMPT + 8)]
    torch.testing.assert_close(torch.cat(steps, 1), at_once, atol=1e-4, rtol=1e-4)
    assert meter.read().share == pytest.approx(read.share, abs=1e-3)


def test_core_neurons_do_not_see_padding(calibration) -> None:
    model, selection = native(), METHODS["core_infer"].select(calibration, 0.5)
    prompts = WINDOWS[:2, :PROMPT].clone()
    prompts[1, :4] = 0
    mask = (prompts != 0).long()
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with selection.applied(model, decoding=True):
        together = model.generate(prompts, attention_mask=mask, **options)[1, PROMPT:]
        alone = model.generate(prompts[1:, 4:], attention_mask=mask[1:, 4:], **options)[0, 4:]
    assert torch.equal(together, alone)


@pytest.mark.slow
def test_greedy_shares_save_what_was_asked_for_and_lose_less_than_equal_ones(calibration) -> None:
    model = calibration.model
    found = greedy_shares(model, WINDOWS, calibration.inputs, 0.5)
    for block, shares in zip(blocks(model), found, strict=True):
        sizes = {name: linear.weight.numel() for name, linear in block.linears.items()}
        assert sum(sizes[name] * shares[name] for name in sizes) == pytest.approx(0.5 * sum(sizes.values()), rel=1e-3)
    assert len({round(share, 3) for share in found[0].values()}) > 3
    dense = logits(model)
    errors = []
    for name in ("teal", "teal_greedy"):
        with METHODS[name].select(calibration, 0.5).applied(model):
            errors.append((logits(model) - dense).square().mean().item())
    assert errors[1] < errors[0]
    assert uniform_shares(model, 0.3)[1] == dict.fromkeys(sizes, 0.3)


def test_output_shares_save_what_was_asked_for_and_change_predictions_least(calibration) -> None:
    model = calibration.model
    found = output_shares(model, WINDOWS, calibration.inputs, 0.5)
    sizes = [{name: linear.weight.numel() for name, linear in block.linears.items()} for block in blocks(model)]
    saved = sum(size[name] * shares[name] for size, shares in zip(sizes, found, strict=True) for name in size)
    assert saved == pytest.approx(0.5 * sum(sum(size.values()) for size in sizes), rel=1e-3)
    assert all(row["q_proj"] == row["k_proj"] and row["gate_proj"] == row["up_proj"] for row in found)
    dense = logits(model).log_softmax(-1)
    errors = []
    for name in ("teal", "teal_output"):
        with METHODS[name].select(calibration, 0.5).applied(model):
            errors.append(F.kl_div(logits(model).log_softmax(-1), dense, reduction="sum", log_target=True).item())
    assert errors[1] < errors[0]


def test_output_curves_are_those_of_whole_passes_and_leave_the_model_as_it_was(calibration) -> None:
    """So they are where a hook of another changes what a block returns; a window's first eighth is not cut."""
    model, uncut = calibration.model, WINDOWS.shape[1] // UNCUT
    hook = blocks(model)[0].module.register_forward_hook(lambda module, args, output: 1.5 * output)
    curve = next(c for c in output_curves(model, WINDOWS, calibration.inputs) if c.block and "o_proj" in c.names)
    block, seen = blocks(model)[curve.block], calibration.inputs[curve.block]["o_proj"]
    assert all("forward" not in vars(each.module) for each in blocks(model))
    dense = logits(model).log_softmax(-1)
    for level, loss in zip(LEVELS, curve.losses[1:], strict=True):
        with cutting(block, {"o_proj": seen.radius(level)}, uncut):
            found = logits(model).log_softmax(-1)
        assert torch.equal(found[:, :uncut], dense[:, :uncut])
        assert loss == pytest.approx(F.kl_div(found, dense, reduction="sum", log_target=True).item(), rel=1e-4)
    hook.remove()


def test_output_curves_are_measured_in_float32_and_leave_bfloat16_weights_as_they_were() -> None:
    """In bfloat16 a small cut's divergence is lost in what rounding alone does."""
    model = native().bfloat16().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = input_distributions(model, WINDOWS)
    found = output_curves(model, WINDOWS, seen)
    assert all(value.dtype == torch.bfloat16 for value in model.state_dict().values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    expected = output_curves(model.float(), WINDOWS, seen)
    assert [curve.losses for curve in found] == [curve.losses for curve in expected]


def test_learned_thresholds_touch_no_weight_and_cut_as_folded_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learn_groups, "__kwdefaults__", learn_groups.__kwdefaults__ | {"steps": 20})
    model, folded = native().eval(), native().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    selection = METHODS["learned"].select(Calibration(model, WINDOWS), 0.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    row = selection.inputs[1]
    assert list(row) == list(PROJECTIONS) and row["q_proj"] is row["v_proj"]
    assert len(row["down_proj"].threshold.unique()) > 90 and row["down_proj"].extra_bytes(32, 4) == 0
    patch(folded, StochaConfig(activation="silu", inputs=learn_input_cuts(folded, WINDOWS, 0.5, steps=20)))
    with selection.applied(model) as meter:
        found = logits(model)
    with cut_inputs(folded, "always"):
        torch.testing.assert_close(logits(folded), found, rtol=1e-3, atol=1e-3)
        assert evaluate(folded, WINDOWS).bytes_read.share == pytest.approx(meter.read().share, abs=2e-3)


def test_equal_slopes_give_most_to_what_costs_least() -> None:
    """Losses a s^2 of inputs of sizes n: a s / n is equal, here with a = 1, 1, 4 and n = 1, 2, 1."""
    curves = [[a * level**2 for level in (0.0, *LEVELS)] for a in (1, 1, 4)]
    found = equal_slopes(curves, [1, 2, 1], 0.3)
    assert found == pytest.approx([0.2286, 0.4571, 0.0571], abs=0.02)
    assert sum(share * size for share, size in zip(found, [1, 2, 1], strict=True)) / 4 == pytest.approx(0.3)


def test_bytes_by_hand() -> None:
    """A layer of 7 projections in bfloat16, its down_proj's input half zeros and its gate a quarter active."""
    model = tiny_model().bfloat16()
    patch(model, StochaConfig(activation="relu"))
    meter = ReadMeter(model)
    for block in blocks(model):
        gate = torch.zeros(1, 4, 48, dtype=torch.bfloat16)
        gate[..., :12] = 1
        with torch.no_grad():
            block.act(gate)
            for name, linear in block.linears.items():
                x = torch.ones(1, 4, linear.in_features, dtype=torch.bfloat16)
                if name == "down_proj":
                    x[..., ::2] = 0
                linear(x)
    meter.close()
    attention = 32 * 32 + 2 * 16 * 32 + 32 * 32
    ffn, norms = 32 * 48, 2 * 32
    assert meter.read().to_dict() == {
        "step": 2 * (2 * (attention + ffn + ffn / 4 + ffn / 2 + norms) + 64 * 32),
        "blocks": 2 * 2 * (attention + ffn + ffn / 4 + ffn / 2 + norms),
        "lm_head": 2 * 64 * 32,
        "dense_blocks": 2 * 2 * (attention + 3 * ffn + norms),
        "share": (attention + 1.75 * ffn + norms) / (attention + 3 * ffn + norms),
    }


@pytest.mark.parametrize(
    ("name", "gate", "up", "down"),
    [
        ("cats", 1, 0.25, 0.25),
        ("top_k", 1, 1, 0.25),
        ("core_infer", 0.25, 0.25, 0.25),
        ("reuse", 0.4375, 0.4375, 0.25),
    ],
)
def test_bytes_follow_from_when_neurons_are_chosen(calibration, name, gate, up, down) -> None:
    model = calibration.model
    with METHODS[name].select(calibration, 0.75).applied(model, prompt=PROMPT) as meter:
        logits(model)
    attention, ffn, norms = 2 * 32 * 32 + 2 * 16 * 32, 32 * 96, 2 * 32
    share = (attention + norms + (gate + up + down) * ffn) / (attention + norms + 3 * ffn)
    assert meter.read().share == pytest.approx(share, abs=0.02)


def test_a_distribution_counts_what_comes_in_parts() -> None:
    values = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) + 0.3
    seen = Distribution()
    for part in values.split(7000):
        seen.add(part)
    for share in (0.01, 0.3, 0.5, 0.99):
        assert seen.below(seen.quantile(share)) == pytest.approx(share, abs=1e-6)
        assert (values <= seen.quantile(share)).double().mean().item() == pytest.approx(share, abs=0.002)
        assert ((values - 1).abs() <= seen.radius(share, 1)).double().mean().item() == pytest.approx(share, abs=0.003)
    assert seen.median() == pytest.approx(0.3, abs=0.03) and seen.mode() == pytest.approx(0.3, abs=0.4)
    assert seen.radius(0.0) == 0.0


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3"])
def test_own_token_gradients_are_those_of_steps_with_a_detached_cache(model_type) -> None:
    model = tiny_model(model_type).double()
    ids, hidden = WINDOWS[:1, :10], []
    found = list(own_token_gradients(model, ids))
    for block in blocks(model):
        block.linears["down_proj"].register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    cache = None
    for at in range(9):
        hidden.clear()
        output = model(ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        gradients = torch.autograd.grad(output.logits[0, -1].log_softmax(-1)[ids[0, at + 1]].neg(), hidden)
        cache = output.past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        for (gradient, h), by_step, of_step in zip(found, gradients, hidden, strict=True):
            torch.testing.assert_close(gradient[0, at], by_step[0, 0].float(), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(h[0, at], of_step[0, 0].float(), atol=1e-5, rtol=1e-4)


def test_attribution_keeps_what_the_loss_rests_on(calibration) -> None:
    """At the same number of neurons its loss is below magnitude's; and its score is the formula's."""
    model = calibration.model
    losses = {}
    for name in ("attribution", "top_k"):
        with METHODS[name].select(calibration, 0.7).applied(model):
            losses[name] = evaluate(model, WINDOWS).perplexity
    assert losses["attribution"] < losses["top_k"]
    g, h = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    score = [-g[1, i] * h[1, i] + 0.5 * abs(h[1, i]) * sum(g[1] ** 2) ** 0.5 for i in range(5)]
    torch.testing.assert_close(corrected(g, h)[1], torch.stack(score))
    with (
        pytest.raises(StochaError, match="no generation"),
        METHODS["attribution"].select(calibration, 0.5).applied(model, decoding=True),
    ):
        model.generate(WINDOWS[:1, :1], max_new_tokens=2)


def test_mistakes_are_told(calibration) -> None:
    with pytest.raises(StochaError, match=r"share to leave out is 1\.5: expected a number from 0 to below 1"):
        METHODS["teal"].select(calibration, 1.5)
    with (
        pytest.raises(StochaError, match="expected a prompt"),
        METHODS["core_infer"].select(calibration, 0.5).applied(calibration.model),
    ):
        pass
    with (
        pytest.raises(StochaError, match="the model has 3 blocks: expected 2"),
        METHODS["teal"].select(calibration, 0.5).applied(tiny_model(num_hidden_layers=3)),
    ):
        pass


def test_more_values_than_float32_can_count_are_counted() -> None:
    seen = Distribution()
    for value in (1.0, 2.0):
        seen.add(torch.tensor(value).expand(2**24 + 1))
    assert seen.quantile(1.0) < 2.1 and seen.below(1.5) == 0.5
