"""Clipping and Adam's steps on the shards of FSDP2, against torch's on DTensors, in two gloo processes."""

from __future__ import annotations

import pytest
import torch
from helpers import run_two_ranks

from stocha_hf.training.shards import clip_shards, steps_on_shards

TWO = """
import copy
import torch
from torch import nn
from stocha_hf.training.shards import clip_shards, steps_on_shards

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.uneven, self.one = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(3, 1)  # one: no row for rank 1
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.one(self.uneven(self.wide(x)).tanh())

def one(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    mesh = init_device_mesh("cpu", (2,))
    for make in (
        lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
        lambda groups: torch.optim.Adam(groups, lr=0.1, foreach=True, amsgrad=True),
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    ):
        torch.manual_seed(0)
        models = [Model()]
        models.append(copy.deepcopy(models[0]))
        optimizers = []
        for model in models:
            fully_shard(model, mesh=mesh)
            weights = list(model.parameters())
            groups = [{"params": weights[::2], "weight_decay": 0.1}, {"params": weights[1::2]}]
            optimizers.append(make(groups))
        steps_on_shards(optimizers[1])
        for step in range(4):
            rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(10 * step + rank))
            for model in models:
                model.zero_grad()
                model(rows).square().sum().backward()
            most = 1e6 if step == 2 else 0.5
            expected = nn.utils.clip_grad_norm_(models[0].parameters(), most).full_tensor()
            found = clip_shards(models[1].parameters(), most)
            torch.testing.assert_close(found, expected)
            for a, b in zip(models[0].parameters(), models[1].parameters()):
                assert (a.grad is None) == (b.grad is None)
                if a.grad is not None:
                    torch.testing.assert_close(b.grad.to_local(), a.grad.to_local())
                    a.grad.to_local().copy_(b.grad.to_local())
            for optimizer in optimizers:
                optimizer.step()
            for a, b in zip(models[0].parameters(), models[1].parameters()):
                assert isinstance(b, DTensor) and torch.equal(a.to_local(), b.to_local())
            for a, b in zip(*(optimizer.state_dict()["state"].values() for optimizer in optimizers)):
                assert a.keys() == b.keys()
                for key in a:
                    assert type(a[key]) is type(b[key])
                    if isinstance(a[key], DTensor):
                        assert torch.equal(a[key].to_local(), b[key].to_local()), key
                    elif a[key] is not None:
                        assert torch.equal(a[key], b[key]), key
            assert [id(w) for group in optimizers[1].param_groups for w in group["params"]] == [
                id(w) for w in [*models[1].parameters()][::2] + [*models[1].parameters()][1::2]
            ]
    print("equal")
"""


@pytest.mark.slow
def test_steps_and_clipping_on_shards_are_those_on_dtensors() -> None:
    """Also where a rank has no row of a weight, and where a weight has no gradient."""
    done = run_two_ranks(TWO)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2


def test_plain_weights_are_left_to_torch() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    steps_on_shards(optimizer)
    for _ in range(2):
        weight.grad = torch.full((3,), 2.0)
        assert clip_shards([weight], 1.0) is None
        assert torch.equal(weight.grad, torch.full((3,), 2.0))
        optimizer.step()
    assert optimizer.state[weight]["step"] == 2
    assert optimizer.param_groups[0]["params"][0] is weight
