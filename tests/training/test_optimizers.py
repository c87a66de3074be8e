"""Tests of optimizers: which parameters each trains, steps against torch's, and restored states."""

import copy

import pytest
import torch
from torch import nn

from smalti.training import optimizers
from smalti.training.optimizers import (
    BETAS,
    MUON,
    MUON_RATE_FACTOR,
    BatchedMuon,
    CombinedOptimizer,
    make_optimizer,
    orthogonalized,
    restore,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4, bias=False))


def step(module, optimizer, seed):
    module.zero_grad()
    module(torch.arange(5)).mul(torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))).sum().backward()
    optimizer.step()


def test_muon_trains_weights_of_linear_layers_and_adamw_the_rest():
    module = network()
    assert MUON.keys() < torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))]).defaults.keys()
    adamw, muon = make_optimizer(module, "muon", learning_rate=0.1, weight_decay=0.5).parts
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, BatchedMuon)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    trained = [{names[id(p)] for group in part.param_groups for p in group["params"]} for part in (adamw, muon)]
    assert trained == [{"0.weight", "1.bias", "2.weight", "2.bias"}, {"1.weight", "3.weight"}]
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.5, 0.0]  # matrices only
    assert {group["lr"] for group in muon.param_groups} == {MUON_RATE_FACTOR * 0.1}


def test_module_without_matrices_gets_adamw_alone():
    (part,) = make_optimizer(
        nn.Sequential(nn.LayerNorm(4), nn.Conv2d(4, 4, 3, groups=2)), "muon", learning_rate=0.1
    ).parts
    assert isinstance(part, torch.optim.AdamW)


def test_muon_takes_a_convolution_as_the_matrix_of_its_kernels():
    """In either memory layout, its steps are those of a linear layer with the same matrix."""
    for layout in (torch.contiguous_format, torch.channels_last):
        convolution, linear = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(27, 4, bias=False)
        linear.weight.data.copy_(convolution.weight.data.flatten(1))
        convolution.to(memory_format=layout)
        optimizers_of_both = [make_optimizer(each, "muon", learning_rate=0.01) for each in (convolution, linear)]
        for seed in range(3):
            gradient = torch.randn(4, 27, generator=torch.Generator().manual_seed(seed))
            convolution.weight.grad = gradient.view(4, 3, 3, 3).to(memory_format=layout)
            linear.weight.grad = gradient
            for optimizer in optimizers_of_both:
                optimizer.step()
        torch.testing.assert_close(convolution.weight.flatten(1), linear.weight)


def test_muon_update_is_nearly_orthogonal():
    module = nn.Linear(8, 16, bias=False)
    before = module.weight.detach().clone()
    optimizer = make_optimizer(module, "muon", learning_rate=0.01)
    module(torch.randn(32, 8, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    optimizer.step()
    singular = torch.linalg.svdvals(before - module.weight.detach())
    assert singular.max() / singular.min() < 2.5  # Newton-Schulz leaves them within about 0.7 .. 1.2 of one value


def test_batched_muon_takes_the_steps_of_torchs_muon(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda kind: True)  # torch's Muon always computes in bf16
    ours, theirs = (
        nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 4)) for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    _, muon = make_optimizer(ours, "muon", learning_rate=0.01, weight_decay=0.1).parts
    weights = [layer.weight for layer in theirs]
    reference = torch.optim.Muon(weights, lr=0.01 * MUON_RATE_FACTOR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        for mine, other in zip(ours, theirs, strict=True):
            mine.weight.grad = torch.randn(mine.weight.shape, generator=draw)
            other.weight.grad = mine.weight.grad.clone()
        before = [weight.detach().clone() for weight in weights]
        muon.step()
        reference.step()
        for mine, other, start in zip(ours, theirs, before, strict=True):
            # both compute in bfloat16 with different rounding; the difference is small relative to the step
            assert (mine.weight - other.weight).norm() < 0.02 * (other.weight - start).norm()
            mine.weight.data.copy_(other.weight)
    assert muon.state_dict()["state"].keys() == reference.state_dict()["state"].keys()


def test_orthogonalization_is_equal_in_bf16_and_fp32(monkeypatch: pytest.MonkeyPatch):
    """The results are equal to bfloat16's rounding."""
    matrices, results = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(0)), {}
    for has_bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(optimizers, "has_native_bf16", lambda kind, has_bf16=has_bf16: has_bf16)
        results[dtype] = orthogonalized(matrices, (3.4445, -4.775, 2.0315), 5, 1e-7)
        assert results[dtype].dtype == dtype
    assert (results[torch.bfloat16].float() - results[torch.float32]).norm() < 0.05 * results[torch.float32].norm()


@pytest.mark.parametrize("shape", [(8, 17), (8, 72), (64, 576)])
def test_iterations_of_the_gram_matrix_equal_those_of_the_matrix(monkeypatch: pytest.MonkeyPatch, shape):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda kind: False)
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    matrices[:, 0] = matrices[:, 1] + 1e-4 * matrices[:, 0]  # nearly singular
    results = []
    for aspect in (optimizers.GRAM_FROM_ASPECT, 1_000):
        monkeypatch.setattr(optimizers, "GRAM_FROM_ASPECT", aspect)
        results.append(orthogonalized(matrices, MUON["ns_coefficients"], 5, 1e-7))
    torch.testing.assert_close(*results, atol=1e-3, rtol=1e-3)


def test_adamw_equals_torchs():
    ours, theirs = network(), network()
    optimizer = make_optimizer(ours, "adamw", learning_rate=0.01)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=BETAS, weight_decay=0.0)
    for seed in range(3):
        step(ours, optimizer, seed)
        step(theirs, reference, seed)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_restored_state_continues_equally():
    whole, stopped = network(), network()
    optimizer = make_optimizer(whole, "muon", learning_rate=0.01)
    for seed in range(4):
        step(whole, optimizer, seed)
    first = make_optimizer(stopped, "muon", learning_rate=0.01)
    for seed in range(2):
        step(stopped, first, seed)
    second = make_optimizer(stopped, "muon", learning_rate=0.5)  # the rate comes from the state
    assert isinstance(second, CombinedOptimizer)
    restore(second, first.state_dict())
    for seed in range(2, 4):
        step(stopped, second, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))


def test_adamax_equals_torchs_and_can_be_restored():
    """It has its own betas, and weight decay on matrices only."""
    ours, theirs, again = network(), network(), network()
    optimizer = make_optimizer(ours, "adamax", learning_rate=0.1, weight_decay=0.5)
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    rest = [parameter for parameter in theirs.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": rest}]
    expected = torch.optim.Adamax(groups, lr=0.1, betas=(0.9, 0.999))
    for seed in range(3):
        step(ours, optimizer, seed)
        step(theirs, expected, seed)
    other = make_optimizer(again, "adamax", learning_rate=0.1, weight_decay=0.5)
    again.load_state_dict(ours.state_dict())
    restore(other, copy.deepcopy(optimizer.state_dict()))
    for module, its_optimizer in ((ours, optimizer), (theirs, expected), (again, other)):
        step(module, its_optimizer, 9)
    for a, b, c in zip(ours.parameters(), theirs.parameters(), again.parameters(), strict=True):
        assert a.equal(b)
        assert a.equal(c)
