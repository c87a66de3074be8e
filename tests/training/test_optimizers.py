"""Tests of optimizers: which parameters each trains, steps against torch's, and restored states."""

import copy

import pytest
import torch
from helpers.toys import TINY
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from smalti.core.errors import UserError
from smalti.core.models import class_of_kind
from smalti.training import optimizers
from smalti.training.optimizers import (
    BETAS,
    MUON,
    MUON_RATE_FACTOR,
    NEWTON_SCHULZ,
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


def test_weight_decay_leaves_out_gains_of_any_shape():
    module = nn.ParameterDict({"limit": torch.ones(4, 1, 1), "gain": torch.ones(4), "row": torch.ones(1, 4)})
    module["kernel"] = nn.Parameter(torch.ones(4, 2, 1, 1))
    adamw = make_optimizer(module, "adamw", learning_rate=0.1, weight_decay=0.5)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    decayed = {names[id(p)]: group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert decayed == {"row": 0.5, "kernel": 0.5, "limit": 0.0, "gain": 0.0}


@pytest.mark.parametrize("kind", ["hourglass", "maskgit"])
def test_muon_leaves_maps_to_queries_and_keys_to_adamw(kind):
    module = class_of_kind("prior", kind)(TINY[kind])
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in part.param_groups for p in group["params"]}
        for part in make_optimizer(module, "muon", learning_rate=0.1).parts
    )
    for name in ("to_q.weight", "to_k.weight"):
        assert any(each.endswith(name) for each in adamw)
        assert not any(each.endswith(name) for each in muon)
    for name in ("to_v.weight", "to_out.weight"):
        assert any(each.endswith(name) for each in muon)


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


def test_batched_muon_takes_the_steps_of_torchs_muon(monkeypatch: pytest.MonkeyPatch):
    """They are equal if both orthogonalize exactly, and torch's rate is zero where a weight waits for its turn."""

    def exactly(gradient, *settings):
        left, _, right = torch.linalg.svd(gradient, full_matrices=False)
        return left @ right

    monkeypatch.setattr(optimizers, "orthogonalized", lambda matrices, *settings: exactly(torch.stack(matrices)))
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", exactly)
    ours, theirs = (
        nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 4)) for _ in range(2)
    )
    theirs.load_state_dict(ours.state_dict())
    _, muon = make_optimizer(ours, "muon", learning_rate=0.01, weight_decay=0.1).parts
    weights = [{"params": [layer.weight]} for layer in theirs]
    reference = torch.optim.Muon(weights, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(4):
        for number, group in enumerate(reference.param_groups):
            group["lr"] = 2 * 0.01 * MUON_RATE_FACTOR if number % 2 == seed % 2 else 0
        draw = torch.Generator().manual_seed(seed)
        for mine, other in zip(ours, theirs, strict=True):
            mine.weight.grad = torch.randn(mine.weight.shape, generator=draw)
            other.weight.grad = mine.weight.grad.clone()
        muon.step()
        reference.step()
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.weight, other.weight)
    assert muon.state_dict()["state"].keys() == reference.state_dict()["state"].keys()


@settings(deadline=None)
@given(
    rows=st.integers(1, 96),
    further_columns=st.integers(0, 160),
    tall=st.booleans(),
    smallest=st.floats(0.01, 1),
    scale=st.floats(-4, 15).map(lambda power: 10.0**power),
    bf16=st.booleans(),
    seed=st.integers(0, 2**16),
)
@example(rows=3, further_columns=0, tall=False, smallest=0.8125, scale=1.0, bf16=True, seed=1)  # a polynomial's minimum
def test_orthogonalization_applies_the_polynomials_to_singular_values(
    rows, further_columns, tall, smallest, scale, bf16, seed
):
    """Singular vectors stay, and singular values from a hundredth of the largest come near 1, at any usual scale."""
    draw = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(n, rows, generator=draw))[0] for n in (rows, rows + further_columns))
    values = smallest ** torch.linspace(0, 1, rows)
    matrix = left * values * scale @ right.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizers, "has_native_bf16", lambda kind: bf16)
        (result,) = orthogonalized([matrix.T.contiguous() if tall else matrix], MUON["eps"])
    assert result.dtype == (torch.bfloat16 if bf16 else torch.float32)
    inner = left.T @ (result.T if tall else result).float() @ right
    expected = values.double() / values.double().pow(4).sum() ** 0.25
    for a, b, c in NEWTON_SCHULZ:
        expected = a * expected + b * expected**3 + c * expected**5
    error = 0.15 if bf16 else 0.001  # of rounding, in bf16 where singular values are close together
    assert 0.79 - error < inner.diagonal().min()
    assert inner.diagonal().max() < 1.21 + error
    assert bf16 or (inner.diagonal() - expected).abs().max() < error  # bf16 moves values along steep polynomials
    assert (inner - inner.diagonal().diag()).abs().max() < error


@pytest.mark.parametrize("shape", [(8, 8), (48, 96), (192, 192), (192, 768)])
def test_orthogonalization_is_more_exact_than_torchs(monkeypatch: pytest.MonkeyPatch, shape):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda kind: True)  # torch's Muon always computes in bf16
    assert not orthogonalized([torch.zeros(shape)], MUON["eps"]).any()
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    ours = orthogonalized([matrix], MUON["eps"])[0].float()
    theirs = torch.optim._muon._zeropower_via_newtonschulz(matrix, (3.4445, -4.775, 2.0315), 5, MUON["eps"]).float()
    assert (ours - left @ right).norm() < (theirs - left @ right).norm()


@pytest.mark.parametrize("shape", [(8, 17), (8, 72), (64, 576), (576, 64)])
def test_iterations_of_the_gram_matrix_equal_those_of_the_matrix(monkeypatch: pytest.MonkeyPatch, shape):
    monkeypatch.setattr(optimizers, "has_native_bf16", lambda kind: False)
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    matrices[:, 0] = matrices[:, 1] + 1e-4 * matrices[:, 0]  # nearly singular
    results = []
    for aspect in (optimizers.TWO_FROM_ASPECT, 1_000):
        monkeypatch.setattr(optimizers, "TWO_FROM_ASPECT", aspect)
        results.append(orthogonalized(list(matrices), MUON["eps"]))
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


def test_a_run_of_a_version_whose_muon_had_no_turns_resumes():
    first, second = (make_optimizer(network(), "muon", learning_rate=0.01) for _ in range(2))
    saved = first.state_dict()
    for group in saved["parts"][-1]["param_groups"]:
        del group["turn"]
    restore(second, saved)
    assert [group["turn"] for group in second.parts[-1].param_groups] == [0]


def test_restored_state_continues_equally():
    whole, stopped = network(), network()
    optimizer = make_optimizer(whole, "muon", learning_rate=0.01)
    for seed in range(4):
        step(whole, optimizer, seed)
    first = make_optimizer(stopped, "muon", learning_rate=0.01)
    for seed in range(3):  # an odd number, so that the second run starts with the second turn
        step(stopped, first, seed)
    second = make_optimizer(stopped, "muon", learning_rate=0.5)  # the rate comes from the state
    assert isinstance(second, CombinedOptimizer)
    restore(second, first.state_dict())
    for seed in range(3, 4):
        step(stopped, second, seed)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), stopped.parameters(), strict=True))


def test_state_of_an_optimizer_of_other_weights_is_refused():
    saved = make_optimizer(network(), "muon", learning_rate=0.1).state_dict()
    other = make_optimizer(nn.Sequential(network(), nn.Linear(4, 4)), "muon", learning_rate=0.1)
    with pytest.raises(UserError, match=r"begun by another version of smalti, .* --resume never"):
        restore(other, saved)


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
