"""What a model does in a decode step on a CPU: sparse and fused where that is allowed, and always the same numbers."""

from __future__ import annotations

import copy
import io
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIGS, run_warm, tiny_model
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from stocha_hf.decoding import ops, state, step
from stocha_hf.decoding.gate_prediction import predict_gates
from stocha_hf.errors import StochaError
from stocha_hf.measurement.sparsity import SparsityMeter
from stocha_hf.modeling_stocha import StochaConfig, StochaLlamaForCausalLM, stocha_mlps
from stocha_hf.patching import patch, unpatch


def relu_model(model_type: str = "llama", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    model = tiny_model(model_type, **overrides).to(dtype)
    patch(model, StochaConfig(activation="relu"))
    return model.eval()


def decoded(model: Any, tokens: torch.Tensor, prompt: int = 4, **kwargs: Any) -> torch.Tensor:
    """Logits of the tokens after the prompt, fed one at a time."""
    cache = model(tokens[:, :prompt], use_cache=True, **kwargs).past_key_values
    steps = [model(tokens[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, tokens.shape[1])]
    return torch.cat(steps, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each kernel was called, and whole steps."""
    counts = dict.fromkeys(("_ffn", "_linear", "run"), 0)

    def counting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return kernel(*args, **kwargs)

        return counted

    for name in counts:
        module: Any = step if name == "run" else ops
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    yield counts


TOKENS = torch.tensor([[5, 9, 13, 21, 34, 8, 55, 40], [11, 7, 62, 30, 4, 19, 23, 50]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("model_type", list(CONFIGS))
@torch.no_grad()
def test_decoding_gives_the_dense_logits(
    model_type: str, batch: int, dtype: torch.dtype, calls: dict[str, int]
) -> None:
    model = relu_model(model_type, dtype)
    tokens = TOKENS[:batch].repeat(1, 2)
    with torch.enable_grad():  # the dense path
        expected = model(tokens).logits[:, 4:].detach()
    assert set(calls.values()) == {0}
    found = decoded(model, tokens)
    assert calls["run"] == tokens.shape[1] - 4
    close = {torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    assert (found - expected).norm() <= close * expected.norm()


@torch.no_grad()
def test_a_model_in_float64_decodes_densely(calls: dict[str, int]) -> None:
    model = relu_model(dtype=torch.float64)
    assert decoded(model, TOKENS).dtype == torch.float64 and set(calls.values()) == {0}


@torch.no_grad()
def test_biases_of_the_projections_are_added() -> None:
    model = relu_model(attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    with torch.enable_grad():
        expected = model(TOKENS).logits[:, 4:].detach()
    torch.testing.assert_close(decoded(model, TOKENS), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_is_masked(calls: dict[str, int]) -> None:
    model = relu_model()
    alone = model.generate(TOKENS[1:, 3:], max_new_tokens=6, do_sample=False)
    assert calls["run"] > 0
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), TOKENS[1:, 3:]], 1)
    batch, mask = torch.cat([TOKENS[:1], padded]), torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    length = alone.shape[1] - 5
    assert torch.equal(together[1, 8 : 8 + length], alone[0, 5:])


@torch.no_grad()
def test_a_static_cache_decodes_the_same() -> None:
    model = relu_model()
    dynamic = model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False)
    model.generation_config.disable_compile = True
    assert torch.equal(
        model.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, cache_implementation="static"), dynamic
    )


def test_gradients_adapters_and_hooks_are_honoured(calls: dict[str, int]) -> None:
    from peft import LoraConfig, get_peft_model

    model = relu_model()
    x = torch.randn(1, 1, 32, requires_grad=True)
    mlp = stocha_mlps(model)[0]
    mlp(x).sum().backward()  # type: ignore[operator]
    assert x.grad is not None and calls["_ffn"] == 0
    with torch.no_grad():
        plain = decoded(model, TOKENS)
        meter = SparsityMeter(model)
        with meter.record():
            assert torch.allclose(decoded(model, TOKENS), plain, atol=1e-4)
        assert 0.2 < meter.read()["mean"] < 0.8
        meter.close()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "gate_proj", "down_proj"])).eval()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    with torch.no_grad():
        different = decoded(adapted, TOKENS)
        assert not torch.allclose(different, plain, atol=1e-2)
        merged = decoded(adapted.merge_and_unload(), TOKENS)
    torch.testing.assert_close(different, merged, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_predicted_gates_decode_the_same_until_the_weights_change(calls: dict[str, int]) -> None:
    model = relu_model()
    expected = decoded(model, TOKENS)
    assert predict_gates(model) == 2
    assert torch.equal(decoded(model, TOKENS), expected)
    assert not any("coarse" in key for key in model.state_dict())
    model.model.layers[0].mlp.gate_proj.weight.mul_(-1)
    with torch.enable_grad():
        changed = model(TOKENS).logits[:, 4:].detach()
    torch.testing.assert_close(decoded(model, TOKENS), changed, rtol=1e-4, atol=1e-4)
    with pytest.raises(StochaError, match="patched"):
        predict_gates(tiny_model())


@torch.no_grad()
def test_weights_that_were_offloaded_are_fetched() -> None:
    from accelerate import cpu_offload

    model = relu_model()
    expected = decoded(model, TOKENS)
    offloaded = cpu_offload(relu_model(), execution_device=torch.device("cpu"))
    assert offloaded.model.layers[0].mlp.up_proj.weight.is_meta
    torch.testing.assert_close(decoded(offloaded, TOKENS), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_forced_mode_decodes_by_its_own_rule() -> None:
    model = relu_model()
    for name in ("silu", "mean", "drelu", "relu2", "topk"):
        for mlp in stocha_mlps(model):
            mlp.k = 5
        with model.stocha_mode(name):
            with torch.enable_grad():
                expected = model(TOKENS).logits[:, 4:].detach()
            torch.testing.assert_close(decoded(model, TOKENS), expected, rtol=1e-3, atol=1e-3)


def test_a_decode_step_leaves_the_users_objects_as_they_were(tmp_path: Path) -> None:
    model = relu_model()
    model.save_pretrained(tmp_path / "before")
    classes, state = [type(module) for module in model.modules()], copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        decoded(model, TOKENS)
    assert [type(module) for module in model.modules()] == classes
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    assert len(torch.nn.utils.parameters_to_vector(model.parameters())) == model.num_parameters()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "after")
    name = "model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    model.train()(TOKENS, labels=TOKENS).loss.backward()  # no inference tensor was left behind
    assert stocha_mlps(model)[0].down_proj.weight.grad is not None


@torch.no_grad()
def test_what_a_decode_step_holds_is_counted_until_training() -> None:
    model = relu_model()
    before = model.get_memory_footprint()
    decoded(model, TOKENS)
    held = sum(mlp.down_proj.weight.nbytes for mlp in stocha_mlps(model))  # type: ignore[operator]
    assert model.get_memory_footprint() - before == held > 0
    assert model.eval().get_memory_footprint() - before == held
    assert model.train().get_memory_footprint() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(-1),
        lambda weight: weight.data.mul_(-1),  # as peft merges adapters: counts up no version
        lambda weight: setattr(weight, "data", -weight.data),
    ],
)
@pytest.mark.parametrize("with_kernels", [True, False])
@torch.no_grad()
def test_changed_weights_are_seen(change: Any, with_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not with_kernels:
        for module in (ops, state):
            monkeypatch.setattr(module, "kernels", lambda: None)
    model = relu_model()
    before = decoded(model, TOKENS[:1])
    for mlp in stocha_mlps(model):
        change(mlp.down_proj.weight)
    with torch.enable_grad():
        expected = model(TOKENS[:1]).logits[:, 4:].detach()
    assert not torch.allclose(before, expected, atol=1e-2)
    torch.testing.assert_close(decoded(model, TOKENS[:1]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_that_a_file_holds_are_in_memory_once(tmp_path: Path) -> None:
    relu_model(dtype=torch.bfloat16, hidden_size=256, intermediate_size=2048).save_pretrained(tmp_path)
    model = StochaLlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    expected = decoded(model, TOKENS)
    mlp = stocha_mlps(model)[0]
    assert mlp.decode_state.is_sole, "the parameter's pages went back to the file"
    torch.testing.assert_close(decoded(model, TOKENS), expected)
    x = torch.randn(1, 20, 256, dtype=torch.bfloat16)
    dense = mlp.down_proj(mlp.hidden(mlp.gate_proj(x), mlp.up_proj(x)))
    torch.testing.assert_close(mlp(x), dense, rtol=0.02, atol=0.02 * dense.abs().max().item())


@torch.no_grad()
def test_hooks_on_the_activation_and_global_hooks_are_called(calls: dict[str, int]) -> None:
    model = relu_model()
    expected, seen = decoded(model, TOKENS), []
    handle = stocha_mlps(model)[0].act_fn.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(decoded(model, TOKENS), expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 5 and all((act >= 0).all() and (act == 0).any() for act in seen)
    handle.remove()
    handle = stocha_mlps(model)[0].act_fn.register_forward_hook(lambda module, args, output: output * 0)
    assert not torch.allclose(decoded(model, TOKENS), expected, atol=1e-2), "a hook can change the activation"
    handle.remove()
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    calls.update(dict.fromkeys(calls, 0))
    decoded(model, TOKENS[:1])
    handle.remove()
    assert set(calls.values()) == {0} and names.count("RunningActivation") == 2 * 5 and names.count("Linear") > 0


def test_quantizers_and_parametrizations_see_the_native_layers() -> None:
    model = relu_model()
    with torch.no_grad():
        expected = decoded(model, TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(module) is nn.Linear for module in quantized.modules())
    with torch.no_grad():
        assert (decoded(quantized, TOKENS) - expected).norm() < 0.2 * expected.norm()
    prune.l1_unstructured(model.model.layers[0].self_attn.q_proj, "weight", 0.3)
    parametrizations.weight_norm(model.model.layers[1].self_attn.o_proj)
    with torch.enable_grad():
        dense = model(TOKENS).logits[:, 4:].detach()
    with torch.no_grad():
        torch.testing.assert_close(decoded(model, TOKENS), dense, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_threads_decode_in_one_model(calls: dict[str, int]) -> None:
    model = relu_model(num_hidden_layers=4)
    expected = decoded(model, TOKENS)
    classes = [type(module) for module in model.modules()]
    before, interval = calls["run"], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: _decoded_alone(model), range(12)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(logits, expected) for logits in found) and calls["run"] > before
    assert [type(module) for module in model.modules()] == classes


def _decoded_alone(model: Any) -> torch.Tensor:
    with torch.no_grad():  # of each thread
        return decoded(model, TOKENS)


def test_a_merged_adapter_leaves_a_model_that_decodes_sparsely(calls: dict[str, int]) -> None:
    from peft import LoraConfig, get_peft_model

    model = relu_model()
    adapted = get_peft_model(model, LoraConfig(target_modules=["gate_proj", "down_proj"])).eval()
    with torch.no_grad():
        decoded(adapted, TOKENS)
        merged = adapted.merge_and_unload()
        calls.update(dict.fromkeys(calls, 0))
        decoded(merged, TOKENS)
    assert calls["run"] == 4


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_compiled_forward_is_one_graph() -> None:
    model = relu_model(num_hidden_layers=1)
    expected = decoded(model, TOKENS[:1])
    model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(decoded(model, TOKENS[:1]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_among_processes_no_weight_is_copied(tmp_path: Path, calls: dict[str, int]) -> None:
    model, alone = relu_model(), relu_model()
    expected = decoded(alone, TOKENS)
    calls.update(dict.fromkeys(calls, 0))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        torch.testing.assert_close(decoded(model, TOKENS[:1]), expected[:1], rtol=1e-4, atol=1e-4)
        assert calls["_ffn"] == calls["run"] == 0 and stocha_mlps(model)[0].decode_state is None
        decoded(alone, TOKENS)
        assert calls["run"] > 0
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_compiled_step_keeps_the_kernels(calls: dict[str, int]) -> None:
    model = relu_model(num_hidden_layers=1)
    expected = decoded(model, TOKENS)  # also copies down_proj
    calls.update(dict.fromkeys(calls, 0))
    mlp = stocha_mlps(model)[0]
    x = torch.randn(1, 1, 32)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(mlp, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), mlp(x))  # type: ignore[operator]
    assert any("stocha.ffn" in str(node.target) for node in graphs[0].graph.nodes)
    model.forward = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(decoded(model, TOKENS), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
@torch.no_grad()
def test_without_kernels_the_same_is_computed_in_pytorch(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ops, state):
        monkeypatch.setattr(module, "kernels", lambda: None)
    mlp: Any = stocha_mlps(relu_model())[0]
    for x in (torch.randn(1, 1, 32), torch.randn(1, 3, 32)):
        gates = mlp.gate_proj(x)
        mlp.inference = "fatrelu"
        mlp.threshold = gates.flatten().kthvalue(max(int(share * gates.numel()), 1)).values.item()
        expected = F.linear(F.threshold(gates, mlp.threshold, 0.0) * mlp.up_proj(x), mlp.down_proj.weight)
        torch.testing.assert_close(mlp(x), expected, rtol=1e-4, atol=1e-4)
    assert (mlp.decode_state is None) == (share < 0.6), "dense decoding copies nothing"


def test_unpatching_copying_and_pickling(calls: dict[str, int]) -> None:
    model = relu_model()
    with torch.no_grad():
        expected = decoded(model, TOKENS)
        assert torch.equal(decoded(copy.deepcopy(model), TOKENS), expected)
        layers = io.BytesIO()
        torch.save(model.model.layers, layers)
        layers.seek(0)
        model.model.layers = torch.load(layers, weights_only=False)
        assert torch.equal(decoded(model, TOKENS), expected)
        assert copy.deepcopy(model).model.layers[0].mlp.decode_state is None, "a copy makes its own"
    unpatch(model)
    assert not any(type(module).__module__.startswith("stocha_hf") for module in model.modules())
    assert not any("decode_state" in vars(module) for module in model.modules())
    calls.update(dict.fromkeys(calls, 0))
    with torch.no_grad():
        decoded(model, TOKENS)
    assert set(calls.values()) == {0}


LOAD = """
import sys, torch
sys.modules["stocha_hf"] = None if sys.argv[2] == "alone" else __import__("stocha_hf")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
out = model.generate(torch.tensor([[5, 9, 13]]), max_new_tokens=12, do_sample=False)
print(out.tolist(), model.model.layers[0].mlp.decode_state is not None)
"""


@pytest.mark.slow
def test_a_published_folder_decodes_the_same_with_and_without_the_package(tmp_path: Path) -> None:
    model = relu_model()
    model.save_pretrained(tmp_path / "relu")
    native = type(tiny_model()).from_pretrained(tmp_path / "relu")
    expected = native.generate(torch.tensor([[5, 9, 13]]), max_new_tokens=12, do_sample=False).tolist()
    alone = run_warm(LOAD, tmp_path / "relu", "alone")
    together = run_warm(LOAD, tmp_path / "relu", "together")
    assert alone.stdout.split("]]")[0] == together.stdout.split("]]")[0] == str(expected)[:-2], alone.stderr
    assert "False" in alone.stdout and "True" in together.stdout, together.stderr
