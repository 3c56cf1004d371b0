"""Samples under the activation's noise: reproducible, independent, computed with a valid cache; and their figures."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import assert_refused, call_command, run_python, run_warm, tiny_model, tiny_tokenizer

from stocha_hf import StochaConfig, patch
from stocha_hf.errors import StochaError
from stocha_hf.measurement.diversity import distinct, self_bleu
from stocha_hf.measurement.sampling import generate, log_likelihoods, sample
from stocha_hf.modeling_stocha import FUNCTIONS, StochaMLP, stocha_mlps
from stocha_hf.models import load_model

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = [1, 5, 9, 17, 33, 4, 8, 60]
LIVELY = {"pad_token_id": None, "intermediate_size": 128}  # so that greedy decoding does not end in a loop at once


def patched(end=2, **config):
    model = tiny_model(**LIVELY)
    patch(model, StochaConfig(**config))
    model.generation_config.eos_token_id = end
    return model


@pytest.mark.parametrize("noise", [{"p": 0.5}, {"temperature": 1.0}, {"p": 0.5, "temperature": 1.0}])
def test_a_seed_gives_the_same_samples_and_they_differ_from_one_another(noise):
    model = patched(end=None)
    first = generate(model, PROMPT, samples=6, new=12, seed=3, **noise)
    torch.rand(5)
    assert generate(model, PROMPT, samples=6, new=12, seed=3, **noise) == first
    assert generate(model, PROMPT, samples=6, new=12, seed=4, **noise) != first
    assert len(set(map(tuple, first))) > 2
    assert all(len(sample) == 12 for sample in first)


def test_without_noise_all_samples_are_the_greedy_one():
    model = patched()
    expected = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=12)[0, len(PROMPT) :].tolist()
    assert generate(model, PROMPT, samples=3, new=12) == [expected] * 3


@pytest.mark.slow
def test_a_seed_gives_the_same_samples_in_another_process_and_the_generator_is_left_alone(checkpoint):
    code = (
        "import sys, json, torch; from stocha_hf.measurement.sampling import generate; "
        "from stocha_hf.models import load_model; "
        "torch.set_num_threads(1); model = load_model(sys.argv[1]).eval(); before = torch.get_rng_state(); "
        f"print(json.dumps(generate(model, {PROMPT}, samples=3, new=9, p=0.4, seed=7))); "
        "assert torch.equal(torch.get_rng_state(), before)"
    )
    folder = checkpoint(**LIVELY)
    done = run_warm(code, folder)
    expected = generate(load_model(str(folder)).eval(), PROMPT, samples=3, new=9, p=0.4, seed=7)
    assert json.loads(done.stdout) == expected, done.stderr


@pytest.mark.parametrize(("p", "positive", "act"), [(1.0, "silu", "silu"), (0.0, "relu", "relu")])
def test_at_the_ends_of_p_every_sample_is_greedy_under_the_pure_activation(p, positive, act):
    noisy, pure = patched(positive=positive), patched(activation=act)
    assert generate(noisy, PROMPT, samples=5, new=12, p=p) == generate(pure, PROMPT, samples=5, new=12)


def hidden_vectors(model, layer=0):
    """What the layer's down_proj is given, a list that grows with every forward."""
    found: list[torch.Tensor] = []
    stocha_mlps(model)[layer].down_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    return found


def test_the_prompt_is_read_with_noise_of_each_row_and_nothing_of_the_others():
    """Two rows with equal gates agree on p^2 + (1-p)^2 of the coins; 5 standard deviations of 1000 coins are 0.08."""
    model = patched()
    prompt, others = torch.tensor([PROMPT * 6] * 3), torch.tensor([PROMPT * 6, [7] * 48, [9] * 48])
    hidden, logits = hidden_vectors(model), []
    with torch.no_grad():
        for rows in (prompt, others):
            torch.manual_seed(0)
            with model.stocha_mode("stocha", p=0.3):
                logits.append(model(rows).logits)
        with model.stocha_mode("relu"):
            model(prompt)
    assert torch.equal(logits[0][0], logits[1][0]) and not torch.equal(logits[0][0], logits[0][1])
    chosen, negative = hidden[0] != 0, hidden[2][0] == 0
    assert chosen[:, ~negative].all() and negative.sum() > 1000
    for first, second in ((0, 1), (0, 2), (1, 2)):
        agreed = (chosen[first] == chosen[second])[negative].double().mean().item()
        assert agreed == pytest.approx(0.3**2 + 0.7**2, abs=0.08)


@pytest.mark.parametrize("call", ["generate", "model.generate"])
def test_samples_with_a_cache_are_those_of_one_forward_with_the_same_coins(call, monkeypatch):
    """The coins of the prompt and of every step are recorded, and all tokens read at once with them."""
    model = patched(end=None)
    real, coins = FUNCTIONS["stocha"], {mlp: [] for mlp in stocha_mlps(model)}
    monkeypatch.setattr(StochaMLP, "runtime", None)  # the definition runs, which is recorded here

    def record(gate, ffn):
        act = real(gate, ffn)
        coins[ffn].append(act != 0)
        return act

    def replay(gate, ffn):
        return torch.where(torch.cat(coins[ffn], dim=1), torch.nn.functional.silu(gate), 0)

    monkeypatch.setitem(FUNCTIONS, "stocha", record)
    prompts = torch.tensor([PROMPT] * 3)
    if call == "generate":
        samples = torch.tensor(generate(model, PROMPT, samples=3, new=10, p=0.5))
    else:
        with model.stocha_mode("stocha", p=0.5):
            samples = model.generate(prompts, max_new_tokens=10, do_sample=False)[:, len(PROMPT) :]
    assert len(coins[stocha_mlps(model)[0]]) == 10  # the prompt, and each token but the last
    assert samples.unique(dim=0).shape[0] > 1
    monkeypatch.setitem(FUNCTIONS, "stocha", replay)
    with torch.no_grad(), model.stocha_mode("stocha", p=0.5):
        logits = model(torch.cat([prompts, samples[:, :-1]], dim=1), use_cache=False).logits
    assert torch.equal(logits[:, len(PROMPT) - 1 :].argmax(-1), samples)


def test_a_config_that_turns_the_cache_off_changes_nothing():
    model = patched()
    expected = generate(model, PROMPT, samples=3, new=10, p=0.5)
    model.config.use_cache = model.generation_config.use_cache = False
    assert generate(model, PROMPT, samples=3, new=10, p=0.5) == expected


def test_temperature_draws_from_the_softmax_whatever_the_generation_config_says():
    """4000 draws over 64 tokens: their total variation distance from the right softmax is at most about 0.05."""
    model = patched()
    model.generation_config.update(temperature=0.1, top_k=1, top_p=0.2, repetition_penalty=3.0)
    drawn = torch.tensor(generate(model, PROMPT, samples=4000, new=1, temperature=2.0)).flatten()
    with torch.no_grad():
        chances = (model(torch.tensor([PROMPT])).logits[0, -1] / 2).softmax(-1)
    assert (drawn.bincount(minlength=64) / 4000 - chances).abs().sum() / 2 < 0.08


def test_mode_and_generator_are_restored_after_an_error():
    model = patched(p=0.2)
    before = torch.get_rng_state()
    with pytest.raises(IndexError):
        generate(model, [999], samples=2, new=3, p=0.7)
    assert {(mlp.forced, mlp.p) for mlp in stocha_mlps(model)} == {(None, 0.2)}
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="p is 1"):
        generate(model, PROMPT, samples=2, new=3, p=1.5)


def test_a_sample_stops_at_its_own_end_of_text():
    free = generate(patched(end=None), PROMPT, samples=6, new=15, temperature=1.5, seed=1)
    ends = [free[0][4], free[1][9]]
    expected = [sample[: next((i for i, t in enumerate(sample) if t in ends), 15) + 1] for sample in free]
    found = generate(patched(end=ends), PROMPT, samples=6, new=15, temperature=1.5, seed=1)
    assert found == expected and len(set(map(len, found))) > 1


@pytest.mark.parametrize("prompt", [PROMPT, [1]])
def test_log_likelihoods_are_those_of_each_sample_on_its_own(prompt):
    model = patched(activation="relu")
    samples = [[5], [4, 2], [9, 9, 2, 0, 7], *([i, 2, 30 + i] for i in range(4, 13))]  # 2 is the end of text
    expected = []
    for one in samples:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + one])).logits[0].double().log_softmax(-1)
        chances = [logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(one)]
        expected.append(sum(chances) / len(chances))
    assert log_likelihoods(model, prompt, samples) == pytest.approx(expected, rel=1e-5)


def test_distinct_n_counts_ngrams_within_samples():
    samples = [[1, 2, 1, 2], [1, 2, 3]]
    assert [distinct(samples, n) for n in (1, 2, 3)] == [3 / 7, 3 / 5, 1.0]
    assert distinct([[4, 5], [4, 5]], 2) == 0.5
    assert distinct([[4], [5]], 2) == 0.0


def test_self_bleu_is_the_mean_of_bleu_against_the_other_samples():
    # of 5 words 4 are found, then 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples: (4/5 * 3/4 * 2/3 * 1/2) ** (1/4)
    pair = 100 * 0.2**0.25
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx(pair)
    assert self_bleu(["a b c d e", "a b c d f", "a b c d e"]) == pytest.approx((100 + pair + 100) / 3)
    assert self_bleu(["", ""]) == self_bleu(["a", "a"]) == 100
    assert self_bleu(["a b c d", "e f g h"]) < 20
    with pytest.raises(StochaError, match="at least 2"):
        self_bleu(["a"])


@pytest.mark.slow
def test_the_command_measures_ways_of_decoding_side_by_side(checkpoint, tmp_path):
    source, prompts, plot = checkpoint(**LIVELY), tmp_path / "prompts.txt", tmp_path / "curve.png"
    prompts.write_text("w5 w6 w7\n\nw20\n")
    options = ["--prompt", "w20", "--prompts", prompts, "--samples", 3, "--new", 6, "--dtype", "float32", "--seed", 5]
    ways = ["--p", 0.4, 1, "--temperature", 1.5, "--decoding", "stocha", "temperature", "greedy"]
    done = call_command("stocha-generate", source, *options, *ways, "--json", "--plot", plot)
    figures = json.loads(done.stdout)
    assert figures["prompts"] == ["w20", "w5 w6 w7", "w20"] and figures["seed"] == 5, done.stderr
    runs = figures["runs"]
    assert [run["decoding"] for run in runs] == ["stocha", "stocha", "temperature", "greedy"]
    assert [runs[0]["p"], runs[1]["p"], runs[2]["temperature"]] == [0.4, 1, 1.5]
    assert runs[1]["samples"] == runs[3]["samples"]  # p = 1 is SiLU
    assert runs[0]["samples"][0] != runs[0]["samples"][2]  # the same prompt again, with noise of its own
    assert runs[3]["self_bleu"] == 100 and runs[0]["self_bleu"] < 100 > runs[2]["self_bleu"]
    for run in runs:
        means = [sample["log_likelihood"] for samples in run["samples"] for sample in samples]
        assert len(means) == 9 and run["log_likelihood"] == pytest.approx(sum(means) / 9)
        assert 0 < run["distinct_1"] <= 1 and run["distinct_2"] <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    tokens = generate(load_model(str(source)).eval(), [20], samples=3, new=6, p=0.4, seed=5)
    assert [len(sample) for sample in tokens] == [sample["tokens"] for sample in runs[0]["samples"][0]]


@pytest.mark.slow
def test_the_command_shows_samples_of_a_chat(checkpoint):
    source = checkpoint(**LIVELY)
    options = ["--prompt", "w6", "--samples", 2, "--new", 4, "--dtype", "float32", "--chat"]
    done = call_command("stocha-generate", source, *options)
    samples = generate(load_model(str(source)).eval(), [4, 6, 5], samples=2, new=4, p=0.9)  # the template's w4 w6 w5
    texts = [repr(tiny_tokenizer().decode(sample, skip_special_tokens=True)) for sample in samples]
    lines = done.stdout.splitlines()
    assert lines[:3] == ["[stocha 0.9] w6", *(f"  {text}" for text in texts)], done.stderr
    assert lines[3].startswith("stocha 0.9: log-likelihood -") and len(lines) == 4
    (source / "chat_template.jinja").unlink()
    assert_refused(call_command("stocha-generate", source, *options), "no chat template", "--chat")


@pytest.mark.parametrize("noise", [{}, {"p": 0.5}, {"temperature": 1.0}])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_refused(value, noise):
    model = patched()
    model.lm_head.weight.data[5] = value
    with pytest.raises(StochaError, match="logits are NaN or infinite"):
        generate(model, PROMPT, samples=2, new=3, **noise)


def test_samples_of_texts_and_of_token_ids_are_the_same():
    model, tokenizer = patched(), tiny_tokenizer()
    options = {"samples": 2, "new": 3, "temperature": 1.0}
    found = sample(model, tokenizer, ["w5 w9"], **options)
    assert found == sample(model, tokenizer, [[5, 9]], **options)
    assert found.to_dict().keys() == {
        "self_bleu", "log_likelihood", "distinct_1", "distinct_2", "distinct_3", "samples"
    }  # fmt: skip
    assert found.to_dict()["samples"][0][0].keys() == {"text", "tokens", "log_likelihood"}
    assert sample(model, tokenizer, ["w5"], samples=1, new=2).self_bleu is None
    with pytest.raises(StochaError, match="the prompt '' has no tokens"):
        sample(model, tokenizer, [""], **options)
    with pytest.raises(StochaError, match="the token 64, but the model only 64 tokens"):
        sample(model, tokenizer, [[64]], **options)


@pytest.mark.parametrize(
    ("package", "options"), [("sacrebleu", []), ("matplotlib.backend_bases", ["--plot", "curve.png"])]
)
def test_a_missing_package_is_told_before_the_model_is_read(package, options, tmp_path):
    code = (
        f"import sys; sys.modules['{package}'] = None; sys.argv[0] = 'x'; "
        "from stocha_hf.cli.generate import main; main()"
    )
    done = run_python(code, tmp_path, "--prompt", "w5", *options)
    assert_refused(done, package.split(".")[0], "missing", "pip install 'stocha_hf[")
