"""Training loss, with and without a teacher: equal to that of full logits; its gradient survives every wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import CONFIGS, first_is_fast, run_two_ranks, tiny_model

from stocha_hf.errors import StochaError
from stocha_hf.training.heads import final_hidden_states, open_head
from stocha_hf.training.losses import check_teacher, chunked_losses, token_losses, training_losses

WIDTH, VOCAB = 16, 50
pytestmark = pytest.mark.usefixtures("one_thread")


def reference(hidden: Any, head: Any, taught: Any, teacher: Any, labels: Any, temperature: float, softcap: Any) -> Any:
    """(nll, kl) sums from full logits, straight from the definitions."""
    logits, teacher_logits = (h(x)[:, :-1] for h, x in ((head, hidden), (teacher, taught)))
    if softcap is not None:
        logits, teacher_logits = (softcap * torch.tanh(x / softcap) for x in (logits, teacher_logits))
    labels = labels[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    p, q = (torch.softmax(x / temperature, -1) for x in (teacher_logits, logits))
    kl = (p * (p.log() - q.log())).sum(-1)[labels != -100].sum()
    return nll, kl * temperature**2


def case(dtype: torch.dtype = torch.float64, bias: bool = False) -> tuple[Any, ...]:
    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
    teacher = torch.nn.Linear(2 * WIDTH, VOCAB, bias=False, dtype=dtype).requires_grad_(False)
    hidden = (3 * torch.randn(3, 11, WIDTH, dtype=dtype)).requires_grad_()
    taught = 3 * torch.randn(3, 11, 2 * WIDTH, dtype=dtype)
    labels = torch.randint(VOCAB, (3, 11))
    labels[0, :4] = labels[2, 7:] = -100
    return hidden, head, taught, teacher, labels


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_values_and_gradients_equal_full_logits(chunk: int, temperature: float, softcap: float | None) -> None:
    hidden, head, taught, teacher, labels = case(bias=True)
    nll, kl = reference(hidden, head, taught, teacher, labels, temperature, softcap)
    inputs = [hidden, *head.parameters()]
    expected = torch.autograd.grad((0.7 * nll + 0.3 * kl) / 7, inputs)
    losses = chunked_losses(
        hidden, head, taught, teacher, labels, kl_weight=0.3, temperature=temperature, softcap=softcap, chunk=chunk
    )
    torch.testing.assert_close(losses.nll, nll.detach())
    torch.testing.assert_close(losses.kl, kl.detach())
    torch.testing.assert_close(losses.loss, 0.7 * nll + 0.3 * kl)
    assert losses.tokens == (labels[:, 1:] != -100).sum()
    torch.testing.assert_close(torch.autograd.grad(losses.loss / 7, inputs), expected)


@pytest.mark.parametrize("compiled", first_is_fast([False, True]))
def test_without_a_teacher_it_is_the_next_token_loss(compiled: bool) -> None:
    hidden, head, _, _, labels = case()
    nll, _ = reference(hidden, head, hidden, head, labels, 1.0, None)
    expected = torch.autograd.grad(nll, [hidden, head.weight])
    options = {"token_losses": torch.compile(token_losses, backend="aot_eager")} if compiled else {}
    losses = chunked_losses(hidden, head, None, None, labels, chunk=8, **options)
    torch.testing.assert_close(losses.loss, nll)
    assert losses.kl == 0
    torch.testing.assert_close(torch.autograd.grad(losses.loss, [hidden, head.weight]), expected)


def test_bf16_sums_in_float32() -> None:
    hidden, head, taught, teacher, labels = case(torch.bfloat16)
    losses = chunked_losses(hidden, head, taught, teacher, labels, kl_weight=0.5, chunk=4)
    nll, kl = reference(hidden.double(), head.double(), taught.double(), teacher.double(), labels, 1.0, None)
    assert losses.loss.dtype == losses.nll.dtype == losses.kl.dtype == torch.float32
    torch.testing.assert_close(losses.nll.double(), nll.detach(), rtol=0.02, atol=0)
    torch.testing.assert_close(losses.kl.double(), kl.detach(), rtol=0.02, atol=0)
    losses.loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and hidden.grad.isfinite().all()


def test_no_token_left_is_a_zero_with_gradient() -> None:
    hidden, head, taught, teacher, labels = case()
    losses = chunked_losses(hidden, head, taught, teacher, torch.full_like(labels, -100), kl_weight=0.5)
    losses.loss.backward()
    assert losses.loss == losses.nll == losses.kl == losses.tokens == 0
    assert not hidden.grad.any() and not head.weight.grad.any()


def test_no_gradient_without_grad_mode_and_none_to_the_teacher() -> None:
    hidden, head, taught, teacher, labels = case()
    teacher.requires_grad_(True)
    with torch.no_grad():
        assert not chunked_losses(hidden, head, taught, teacher, labels, kl_weight=0.5).loss.requires_grad
    head.requires_grad_(False)
    chunked_losses(hidden, head, taught, teacher, labels, kl_weight=0.5).loss.backward()
    assert hidden.grad.any() and head.weight.grad is None and teacher.weight.grad is None


def test_logits_exist_for_one_chunk_and_hooks_of_the_head_run_once() -> None:
    hidden, head, taught, teacher, labels = case()
    student_calls, rows = [], []
    head.register_forward_pre_hook(lambda module, args: student_calls.append(len(args[0])))
    teacher.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    chunked_losses(hidden, head, taught, teacher, labels, kl_weight=0.5, chunk=8)
    assert student_calls == [labels.numel()] and sum(rows) == labels.numel() and max(rows) == 8
    assert "forward" not in vars(head)


def batch(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 64, (rows, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def opened(model_type: str = "llama", seed: int = 0, **overrides: Any) -> Any:
    model = tiny_model(model_type, **overrides)
    torch.manual_seed(seed)
    for weight in model.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    open_head(model)
    return model


@pytest.mark.parametrize("model_type", CONFIGS)
def test_final_hidden_states_are_what_the_head_sees(model_type: str) -> None:
    model, seen = opened(model_type), []
    with model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0])), torch.no_grad():
        model(**batch())
    torch.testing.assert_close(final_hidden_states(model, batch()), seen[0], rtol=0, atol=0)
    assert len(seen) == 1  # the head itself did not run again


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_model_losses_equal_the_models_own_logits(model_type: str, checkpointing: bool) -> None:
    """With Gemma's softcap and tied weights, and with activation checkpointing."""
    model, teacher, inputs = opened(model_type), opened(model_type, seed=2), batch()
    logits, teacher_logits = model(**inputs).logits, teacher(**inputs).logits.detach()
    nll, kl = reference(logits, lambda x: x, teacher_logits, lambda x: x, inputs["labels"], 2.0, None)
    (0.5 * nll + 0.5 * kl).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    losses = training_losses(model.train(), teacher, inputs, kl_weight=0.5, temperature=2.0, chunk=7)
    losses.loss.backward()
    torch.testing.assert_close((losses.nll, losses.kl), (nll.detach(), kl.detach()))
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("target_modules", [["down_proj"], ["down_proj", "lm_head"]])
def test_peft_trains_its_adapters_only(target_modules: list[str]) -> None:
    peft = pytest.importorskip("peft")
    teacher = opened()
    config = peft.LoraConfig(target_modules=target_modules, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model(tie_word_embeddings=False), config)
    open_head(model)
    losses = training_losses(model, teacher, batch(), kl_weight=0.5)
    logits, teacher_logits = model(**batch()).logits, teacher(**batch()).logits
    nll, kl = reference(logits, lambda x: x, teacher_logits, lambda x: x, batch()["labels"], 1.0, None)
    torch.testing.assert_close(losses.loss, 0.5 * (nll + kl))
    losses.loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert any("lm_head" in name for name in trained) == ("lm_head" in target_modules)


def test_models_must_share_a_vocabulary_and_be_opened() -> None:
    with pytest.raises(StochaError, match=r"vocabulary of 32 .* one of 64"):
        check_teacher(tiny_model().config, tiny_model(vocab_size=32).config)
    check_teacher(tiny_model().config, tiny_model("gemma2").config)
    with pytest.raises(StochaError, match="open_head"):
        final_hidden_states(tiny_model(), batch())


WRAPPED = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from test_loss import batch, training_losses, opened

def one(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    teacher, inputs = opened(seed=2), batch()
    half = {key: value[rank : rank + 1] for key, value in inputs.items()}
    def step(model, inputs):
        for _ in range(2):  # the second step is where a hook that was left half-done would show
            model.zero_grad()
            losses = training_losses(model, teacher, inputs, kl_weight=0.5, chunk=4)
            losses.loss.backward()
        return losses.loss.item()
    whole = opened()
    step(whole, inputs)
    alone = step(opened(), half)
    ddp = DistributedDataParallel(opened())
    assert step(ddp, half) == alone
    sharded, mesh = opened(tie_word_embeddings=False), init_device_mesh("cpu", (2,))
    whole_untied = opened(tie_word_embeddings=False)
    step(whole_untied, inputs)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard([sharded.model.norm, sharded.lm_head], mesh=mesh, reshard_after_forward=False)  # accelerate's grouping
    fully_shard(sharded, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    assert step(sharded, half) == step(opened(tie_word_embeddings=False), half)  # not rounded to the output dtype
    for model, reference in ((ddp.module, whole), (sharded, whole_untied)):
        for (name, weight), expected in zip(model.named_parameters(), reference.parameters()):
            grad = weight.grad.full_tensor() if hasattr(weight.grad, "full_tensor") else weight.grad
            torch.testing.assert_close(2 * grad, expected.grad, rtol=1e-3, atol=1e-4, msg=lambda text: name + text)
    print("equal")
"""


@pytest.mark.slow
def test_gradients_are_synchronised_by_ddp_and_fsdp(request: pytest.FixtureRequest) -> None:
    """Two ranks with half a batch each: the averaged gradients are those of the whole batch."""
    done = run_two_ranks(WRAPPED, request.path.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2
