"""Patched models in memory: every architecture, modes, unpatching, and the features of transformers that must go on
working.
"""

from __future__ import annotations

import copy
import json
import pickle
import types

import pytest
import torch
from helpers import tiny_model, tiny_tokenizer
from torch._dynamo.testing import CompileCounter
from transformers import GenerationMixin, LlamaConfig, LlamaForSequenceClassification, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from stocha_hf import modeling_stocha
from stocha_hf.modeling_stocha import ACTIVATIONS, ARCHITECTURES, StochaConfig, stocha_mlps, stocha_mode
from stocha_hf.patching import patch, set_activation, unpatch

TOKENS = torch.tensor([[1, 5, 9, 17, 33, 4, 8, 60], [1, 7, 7, 20, 41, 3, 62, 11]])
families = pytest.mark.parametrize("model_type", list(ARCHITECTURES))


def patched(model_type="llama", layers=2, **config):
    model = tiny_model(model_type, num_hidden_layers=layers)
    patch(model, StochaConfig(**config))
    return model


@families
def test_patch_keeps_weights_and_eval_numbers_and_unpatch_gives_the_native_model_back(model_type):
    model = tiny_model(model_type)
    before, keys, config = model(TOKENS).logits, list(model.state_dict()), model.config.to_dict()
    native_class, parameters = type(model), [id(parameter) for parameter in model.parameters()]
    assert patch(model, StochaConfig()) == model.config.num_hidden_layers
    assert type(model).__name__ == f"Stocha{native_class.__name__}" and isinstance(model, native_class)
    assert model.config.stocha["base"] == ARCHITECTURES[model_type].act
    assert list(model.state_dict()) == keys and [id(parameter) for parameter in model.parameters()] == parameters
    assert torch.equal(model(TOKENS).logits, before)
    assert not torch.equal(model.train()(TOKENS).logits, before)
    assert unpatch(model.eval()) == model.config.num_hidden_layers
    assert type(model) is native_class and model.config.to_dict() == config
    assert torch.equal(model(TOKENS).logits, before)


@families
def test_patch_with_a_native_activation_equals_the_native_class_with_that_hidden_act(model_type):
    key = ARCHITECTURES[model_type].act_key
    for act in ("relu", "relu2"):
        native = tiny_model(model_type, **{key: act})(TOKENS).logits
        model = patched(model_type, activation=act)
        assert getattr(model.config, key) == act
        assert torch.equal(model(TOKENS).logits, native)


def test_train_uses_activation_and_eval_uses_inference():
    model = patched(activation="relu", inference="mean", p=0.4)
    with model.stocha_mode("relu"):
        relu = model(TOKENS).logits
    with model.stocha_mode("mean"):
        mean = model(TOKENS).logits
    assert torch.equal(model.train()(TOKENS).logits, relu)
    assert torch.equal(model.eval()(TOKENS).logits, mean)
    assert not torch.equal(relu, mean)


def test_a_forced_mode_is_restored_also_after_an_error_and_when_nested():
    model = patched(p=0.2)
    before = model(TOKENS).logits
    with pytest.raises(RuntimeError), model.stocha_mode("relu"):
        with model.stocha_mode("stocha", p=0.9):
            assert {(mlp.forced, mlp.p) for mlp in stocha_mlps(model)} == {("stocha", 0.9)}
        assert {(mlp.forced, mlp.p) for mlp in stocha_mlps(model)} == {("relu", 0.2)}
        raise RuntimeError
    assert {(mlp.forced, mlp.p) for mlp in stocha_mlps(model)} == {(None, 0.2)}
    assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize(("name", "p"), [("swish", None), ("stocha", 1.2), ("topk", None)])
def test_a_wrong_mode_is_refused_and_changes_nothing(name, p):
    model = patched()
    with pytest.raises(ValueError), model.stocha_mode(name, p=p):
        pass
    assert {(mlp.forced, mlp.p) for mlp in stocha_mlps(model)} == {(None, 0.3)}


def test_modes_are_per_model():
    first = patched(p=0.1)
    second, clone = patched(p=0.9), copy.deepcopy(first)
    with first.stocha_mode("relu"):
        assert all(mlp.forced is None for model in (second, clone) for mlp in stocha_mlps(model))
    first.train()
    assert not any(mlp.training for mlp in stocha_mlps(second))
    assert {mlp.p for mlp in stocha_mlps(second)} == {0.9}


def test_a_threshold_per_layer_reaches_its_layer():
    model = patched(activation="fatrelu", threshold=[0.1, 0.7])
    assert [mlp.threshold for mlp in stocha_mlps(model)] == [0.1, 0.7]
    with pytest.raises(ValueError, match="one number, or 2: one per layer"):
        patched(activation="fatrelu", threshold=[0.1, 0.7, 0.2])


def test_patch_reaches_the_decoder_inside_another_model():
    config = LlamaConfig(**{key: getattr(tiny_model().config, key) for key in ("vocab_size", "hidden_size")})
    config.num_hidden_layers, config.intermediate_size, config.num_attention_heads = 3, 48, 4
    config.num_key_value_heads = 2
    classifier = LlamaForSequenceClassification(config)
    assert patch(classifier, StochaConfig()) == 3
    assert type(classifier) is LlamaForSequenceClassification and type(classifier.model).__name__ == "StochaLlamaModel"
    with stocha_mode(classifier, "relu"):
        assert {mlp.forced for mlp in stocha_mlps(classifier)} == {"relu"}


def liger_forward(self, x):
    return x


liger_forward.__module__ = "liger_kernel.transformers.swiglu"


def test_liger_is_refused_before_and_after_patching():
    model = tiny_model()
    # as Liger's patch of an instance does it
    model.model.layers[0].mlp.__dict__["forward"] = types.MethodType(liger_forward, model.model.layers[0].mlp)
    with pytest.raises(ValueError, match="use_liger_kernel=False"):
        patch(model, StochaConfig())
    assert not stocha_mlps(model) and not hasattr(model.config, "stocha")
    model = patched()
    model.model.layers[1].mlp.__dict__["forward"] = types.MethodType(liger_forward, model.model.layers[1].mlp)
    with pytest.raises(ValueError, match="use_liger_kernel=False"):
        model.train()


def test_patch_refuses_what_it_cannot_patch_and_changes_nothing():
    model = patched()
    with pytest.raises(ValueError, match="already patched"):
        patch(model, StochaConfig())
    with pytest.raises(ValueError, match="expected one of LlamaForCausalLM"):
        patch(torch.nn.Linear(2, 2), StochaConfig())
    with pytest.raises(ValueError, match="base is 'relu': expected 'silu'"):
        patch(tiny_model(), StochaConfig(base="relu"))
    with pytest.raises(ValueError, match="expected a patched model"):
        unpatch(tiny_model())


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = patched(p=0.5).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(3)
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, again) for plain, again in zip(*gradients, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in gradients[0])


def test_generate_with_cache_equals_generate_without_and_left_padding_changes_nothing():
    model = patched(activation="relu")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    alone = model.generate(TOKENS[:1, :5], **options)
    assert torch.equal(alone, model.generate(TOKENS[:1, :5], use_cache=False, **options))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[:1, :5]], 1)
    batch, mask = torch.cat([padded, TOKENS[1:]]), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    both = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(both[0, 8:], alone[0, 5:])


def test_pipeline_generates_the_models_own_greedy_tokens_without_a_warning(caplog):
    model, tokenizer = patched(), tiny_tokenizer()
    inputs = tokenizer("w5 w9 w17", return_tensors="pt")
    greedy = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)(
        "w5 w9 w17", max_new_tokens=6, do_sample=False
    )
    assert made[0]["generated_text"] == "w5 w9 w17" + tokenizer.decode(greedy, skip_special_tokens=True)
    assert "not supported" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_equals_the_native_class(dtype):
    native = tiny_model().to(dtype)(TOKENS).logits
    model = patched().to(dtype)
    assert model(TOKENS).logits.dtype == dtype
    assert torch.equal(model(TOKENS).logits, native)
    assert model.train()(TOKENS).logits.isfinite().all()


@pytest.mark.slow
@torch.no_grad()
def test_compiled_forward_equals_eager_and_still_draws_noise_in_training():
    model = tiny_model(num_hidden_layers=1)
    patch(model, StochaConfig(p=0.5))
    eager = model(TOKENS).logits
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(TOKENS).logits, eager, rtol=1e-4, atol=1e-4)
    model.train()
    assert not torch.equal(compiled(TOKENS).logits, compiled(TOKENS).logits)


def test_set_activation_lasts_in_training_and_leaves_inference_alone():
    model = patched(p=0.2)
    before = model(TOKENS).logits
    with stocha_mode(model, "relu"):
        relu = model(TOKENS).logits
    set_activation(model, "stocha", 0.0)
    assert {(mlp.activation, mlp.forced, mlp.p) for mlp in stocha_mlps(model)} == {("stocha", None, 0.0)}
    set_activation(model, "relu")
    assert {(mlp.activation, mlp.forced, mlp.p) for mlp in stocha_mlps(model)} == {("relu", None, 0.0)}
    assert torch.equal(model.train()(TOKENS).logits, relu)
    assert torch.equal(model.eval()(TOKENS).logits, before)
    kept = [mlp.p_tensor for mlp in stocha_mlps(model)]
    set_activation(model, "relu", 0.0)
    assert all(mlp.p_tensor is p for mlp, p in zip(stocha_mlps(model), kept, strict=True))


@pytest.mark.parametrize(("name", "p"), [("swish", None), ("stocha", 1.2), ("topk", None)])
def test_set_activation_refuses_what_is_wrong_and_changes_nothing(name, p):
    model = patched()
    with pytest.raises(ValueError):
        set_activation(model, name, p)
    assert {(mlp.activation, mlp.p) for mlp in stocha_mlps(model)} == {("stocha", 0.3)}
    with pytest.raises(ValueError, match="expected a patched model"):
        set_activation(tiny_model(), "relu")


def test_p_is_no_part_of_the_state_dict_and_survives_copies_and_casts():
    model = patched(p=0.7).to(torch.bfloat16)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    stocha_mlps(model)[0].p = 0.1
    assert [[mlp.p for mlp in stocha_mlps(one)] for one in (model, *copies)] == [[0.1, 0.7], [0.7, 0.7], [0.7, 0.7]]
    assert list(model.state_dict()) == list(tiny_model().state_dict())


@pytest.mark.slow
def test_set_activation_reaches_into_wrappers_that_train():
    """DDP, FSDP2 (which changes the class of what it shards) and torch.compile's, in a process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = patched(p=0.5).train()
        for mlp in stocha_mlps(sharded):
            torch.distributed.fsdp.fully_shard(mlp, mesh=mesh)
        torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
        ddp = torch.nn.parallel.DistributedDataParallel(patched(p=0.5).train())
        for wrapped in (sharded, ddp, torch.compile(patched(layers=1, p=0.5).train(), backend="eager")):
            losses = []
            for name, p in (("stocha", 1.0), ("silu", None), ("relu", None)):
                set_activation(wrapped, name, p)
                losses.append(wrapped(input_ids=TOKENS, labels=TOKENS).loss)
                losses[-1].backward()
            assert losses[0] == losses[1] != losses[2]
            assert {(mlp.activation, mlp.p) for mlp in stocha_mlps(wrapped)} == {("relu", 1.0)}
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_another_p_does_not_recompile_and_reaches_the_compiled_model():
    model, graphs = patched(layers=1).train(), CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for name in ("stocha", "mean"):
        set_activation(compiled, name, 0.5)
        compiled(TOKENS, labels=TOKENS).loss.backward()
        count, losses = graphs.frame_count, []
        for p in (0.0, 0.25, 0.75, 1.0):
            set_activation(compiled, name, p)
            losses.append(compiled(TOKENS, labels=TOKENS).loss)
        losses[1].backward()  # after later assignments of p
        assert graphs.frame_count == count
        with stocha_mode(model, "silu"):
            assert losses[3] == model(TOKENS, labels=TOKENS).loss
        assert len({loss.item() for loss in losses}) == 4


def test_every_activation_runs_in_a_model():
    model = patched(k=5)
    for name in ACTIVATIONS:
        with model.stocha_mode(name):
            assert model(TOKENS).logits.isfinite().all()


@families
def test_transformers_knows_the_classes_as_it_knows_the_native_ones(model_type):
    row = ARCHITECTURES[model_type]
    causal, base = (getattr(modeling_stocha, f"Stocha{name}") for name in (row.causal_lm, row.model))
    assert GenerationMixin in causal.__bases__ and GenerationMixin not in base.__bases__
    assert causal.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    assert base.__name__ in MODEL_MAPPING_NAMES.values(), "else it counts as a model with a loss"


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_transformers_own_tests_train_trains(model_type, checkpointing):
    """As test_training and test_training_gradient_checkpointing of its ModelTesterMixin, which skip base models."""
    row, config = ARCHITECTURES[model_type], patched(model_type).config
    classes = [getattr(modeling_stocha, f"Stocha{name}") for name in (row.model, row.causal_lm)]
    with_a_loss = [cls for cls in classes if cls.__name__ not in MODEL_MAPPING_NAMES.values()]
    assert with_a_loss == classes[1:]
    for cls in with_a_loss:
        model = cls(config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(TOKENS, labels=TOKENS).loss.backward()
        assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


def test_a_mode_under_inference_mode_leaves_a_model_that_trains():
    model = patched(activation="mean")
    with torch.inference_mode(), model.eval().stocha_mode("relu", p=0.5):
        model(TOKENS)
    assert not any(mlp.p_tensor.is_inference() for mlp in stocha_mlps(model))
    model.train()(TOKENS, labels=TOKENS).loss.backward()


def test_a_model_under_accelerates_hooks_is_patched_and_unpatched_for_real(tmp_path):
    tiny_model().save_pretrained(tmp_path / "native")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    options = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    model = type(tiny_model()).from_pretrained(tmp_path / "native", **options)
    with torch.no_grad():
        native = model(TOKENS).logits
        assert patch(model, StochaConfig(activation="relu")) == 2
        torch.testing.assert_close(model(TOKENS).logits, patched(activation="relu")(TOKENS).logits)
        unpatch(model)
        torch.testing.assert_close(model(TOKENS).logits, native)


def test_an_mlp_with_a_forward_of_its_own_is_refused():
    model = tiny_model()
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x
    with pytest.raises(ValueError, match=r"an MLP's forward is .*expected the native one"):
        patch(model, StochaConfig())
    assert not stocha_mlps(model) and not hasattr(model.config, "stocha")


def test_a_model_with_layers_cut_out_saves_the_thresholds_that_are_left(tmp_path):
    model = tiny_model(num_hidden_layers=4)
    patch(model, StochaConfig(activation="fatrelu", threshold=[0.1, 0.2, 0.3, 0.4]))
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert [mlp.threshold for mlp in stocha_mlps(loaded)] == [0.1, 0.4]


def test_function_transforms_run_the_definition():
    """torch.func's grad and vmap, per sample, with draws of their own."""
    model = patched(p=0.5).train()
    mlp = stocha_mlps(model)[0]
    parameters = {name: value.detach() for name, value in mlp.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(mlp, parameters, (x,)).sum()

    rows = torch.randn(3, 5, 32)
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="different")(parameters, rows)
    assert gradients["gate_proj.weight"].shape == (3, 48, 32)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_an_entry_that_leaves_keys_out_is_completed_and_saved(tmp_path):
    folder = tmp_path / "short"
    patched(activation="relu").save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"stocha": {"activation": "relu"}}))
    model = type(patched()).from_pretrained(folder)
    model.save_pretrained(tmp_path / "again", False)
    assert not (tmp_path / "again" / "modeling_stocha.py").exists(), "not the main process"
    assert unpatch(model) == 2 and model.config.hidden_act == "silu"
    native = type(tiny_model()).from_pretrained(folder)
    assert patch(native, StochaConfig(activation="relu")) == 2 and native.config.stocha["base"] == "silu"
