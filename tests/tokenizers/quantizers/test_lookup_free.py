"""FSQ and LFQ: codes by brute force over all of them, gradients by hand, entropies enumerated."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smalti import UserError
from smalti.core.codes import Level
from smalti.tokenizers.quantizers import lfq as lfq_module
from smalti.tokenizers.quantizers.fsq import FSQ, LEVELS
from smalti.tokenizers.quantizers.lfq import LFQ, entropy_loss

D = 4
radices_of_any_kind = st.lists(st.integers(2, 9), min_size=1, max_size=4).map(tuple)


def fsq_of(radices, seed=0):
    torch.manual_seed(seed)
    return FSQ(code_width=D, radices=radices)


def lfq_of(bits=3, seed=0, **more):
    torch.manual_seed(seed)
    return LFQ(code_width=D, bits=bits, **{"commitment_weight": 0.25, "entropy_weight": 0.1, **more})


def features(b=2, h=2, w=3, *, scale=2.0, seed=1):
    return torch.randn(b, D, h, w, generator=torch.Generator().manual_seed(seed)) * scale


def all_points(radices):
    """Every point of the grid, in the order of its code: the first dimension is the most significant digit."""
    axes = [[(digit - levels // 2) / (levels // 2) for digit in range(levels)] for levels in radices]
    return torch.tensor(list(itertools.product(*axes)))


@given(radices=radices_of_any_kind, seed=st.integers(0, 999))
@settings(max_examples=40)
def test_fsq_codes_are_the_nearest_points_of_the_grid(radices, seed):
    """Compares with all points: the nearest one to the bounded vector, measured in levels."""
    quantizer, z_e = fsq_of(radices, seed), features(seed=seed)
    steps = torch.tensor([levels // 2 for levels in radices])
    with torch.no_grad():
        down = quantizer.down(z_e).movedim(1, -1).flatten(0, 2).double()
        spans = torch.tensor([(levels - 1) * 1.001 / 2 for levels in radices]).double()
        offsets = torch.tensor([0.5 if levels % 2 == 0 else 0.0 for levels in radices]).double()
        bounded = torch.tanh(down + torch.atanh(offsets / spans)) * spans - offsets
        distances = torch.cdist(bounded, all_points(radices).double() * steps)
    codes = quantizer.encode(z_e)
    nearest = distances.min(1).values
    torch.testing.assert_close(distances.gather(1, codes.view(-1, 1))[:, 0], nearest, atol=1e-5, rtol=0)
    output = quantizer(z_e)
    assert output.codes.equal(codes)
    assert output.losses == {}
    torch.testing.assert_close(output.z_q, quantizer.lookup(codes), atol=1e-5, rtol=1e-5)


@given(radices=radices_of_any_kind)
def test_every_fsq_code_is_its_own_point_and_is_reached(radices):
    quantizer = FSQ(code_width=len(radices), radices=radices)
    for layer in (quantizer.down, quantizer.up):
        torch.nn.init.dirac_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    codes = torch.arange(math.prod(radices)).view(1, 1, -1)
    with torch.no_grad():
        points = quantizer.lookup(codes)
        torch.testing.assert_close(points[0, :, 0].T, all_points(radices))
        middles = torch.tensor([levels // 2 for levels in radices]).view(1, -1, 1, 1)
        spans = quantizer.span
        z_e = torch.atanh((points * middles + quantizer.offset) / spans) - torch.atanh(quantizer.offset / spans)
        assert quantizer.encode(z_e).equal(codes)


def test_fsq_keeps_zero_at_the_centre():
    """Also for even numbers of levels, where the bound is shifted."""
    quantizer = fsq_of((8, 5, 2))
    torch.nn.init.zeros_(quantizer.down.weight)
    torch.nn.init.zeros_(quantizer.down.bias)
    codes = quantizer.encode(features())
    assert Level(1, 1, (8, 5, 2)).split(codes).unique(dim=0).shape[0] >= 1
    assert codes.unique().tolist() == [(4 * 5 + 2) * 2 + 1]


@pytest.mark.parametrize("radices", [(1001,), (1002,), (65536,), (3, 2000), (2000, 3)])
def test_fsq_of_many_levels_has_only_its_own_codes(radices):
    """The bounds exceed the outermost level by more than half a level; vectors beyond them have the outermost one."""
    quantizer, z_e = fsq_of(radices), features(4, 8, 8)
    with torch.no_grad():
        quantizer.down.weight.mul_(200)
        output = quantizer(z_e)
        assert output.codes.equal(quantizer.encode(z_e))
        assert output.codes.min() >= 0
        assert output.codes.max() < math.prod(radices)
        torch.testing.assert_close(output.z_q, quantizer.lookup(output.codes), atol=1e-5, rtol=1e-4)


def test_fsq_of_nan_is_a_code():
    quantizer, z_e = fsq_of((8, 5, 2)), features()
    z_e[0] = math.nan
    codes = quantizer.encode(z_e)
    assert 0 <= codes.min() <= codes.max() < 80
    assert quantizer(z_e).z_q[0].isnan().all()  # which the training refuses


def test_fsq_gradient_is_that_of_the_bound():
    """The straight-through estimator skips the rounding alone: compared with finite differences of the rest."""
    quantizer, weights = fsq_of((7, 4)).double(), torch.randn(1, D, 1, 2, dtype=torch.float64)
    z_e = features(1, 1, 2).double()

    def unrounded(x):
        bounded = torch.tanh(quantizer.down(x) + torch.atanh(quantizer.offset / quantizer.span)) * quantizer.span
        return (quantizer.up((bounded - quantizer.offset) / quantizer.middle) * weights).sum().item()

    copy, step = fsq_of((7, 4)), 1e-6
    x = z_e.float().requires_grad_()
    (copy(x).z_q * weights.float()).sum().backward()
    expected = torch.zeros_like(z_e)
    with torch.no_grad():
        for index in np.ndindex(*z_e.shape):
            moved = z_e.clone()
            moved[index] += step
            expected[index] = (unrounded(moved) - unrounded(z_e)) / step
    torch.testing.assert_close(x.grad.double(), expected, atol=1e-4, rtol=1e-3)


def test_fsq_presets_have_about_as_many_codes_as_they_say():
    for size, levels in LEVELS.items():
        assert abs(math.log2(math.prod(levels)) - math.log2(size)) < 0.15
        assert min(levels) >= 5


def test_fsq_equals_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    radices, z_e = (8, 5, 6), features(3, 4, 4)
    quantizer, theirs = fsq_of(radices), library.FSQ(levels=list(radices), dim=D)
    for ours, layer in ((quantizer.down, theirs.project_in), (quantizer.up, theirs.project_out)):
        layer.load_state_dict({"weight": ours.weight[:, :, 0, 0], "bias": ours.bias})
    x, y, weights = z_e.clone().requires_grad_(), z_e.clone().requires_grad_(), torch.randn(z_e.shape)
    output, (z_q, codes) = quantizer(x), theirs(y)
    torch.testing.assert_close(output.z_q, z_q, atol=1e-5, rtol=1e-5)
    digits = Level(1, 1, radices).split(output.codes)
    assert (digits * torch.tensor([1, 8, 40])).sum(-1).equal(codes.long())  # theirs has the last dimension first
    (output.z_q * weights).sum().backward()
    (z_q * weights).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-4)


@given(bits=st.integers(1, 6), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_lfq_codes_are_the_nearest_corners(bits, seed):
    quantizer, z_e = lfq_of(bits, seed), features(seed=seed)
    corners = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=bits)))
    with torch.no_grad():
        distances = torch.cdist(quantizer.down(z_e).movedim(1, -1).flatten(0, 2), corners)
    codes = quantizer.encode(z_e)
    torch.testing.assert_close(distances.gather(1, codes.view(-1, 1))[:, 0], distances.min(1).values)
    output = quantizer(z_e)
    assert output.codes.equal(codes)
    torch.testing.assert_close(output.z_q, quantizer.lookup(codes), atol=1e-5, rtol=1e-5)


def entropies(logits):
    """Entropies by enumeration of all codes: the mean of the positions', and that of the mean."""
    bits = logits.shape[1]
    corners = torch.tensor(list(itertools.product([0.0, 1.0], repeat=bits)), dtype=torch.float64)
    p = (logits.double() @ corners.T).softmax(1)
    entropy = torch.distributions.Categorical
    return entropy(p).entropy().mean(), entropy(p.mean(0)).entropy()


@given(bits=st.integers(1, 7), positions=st.integers(1, 9), seed=st.integers(0, 999))
@settings(max_examples=30)
def test_entropy_loss_of_one_group_is_that_of_whole_codes(bits, positions, seed):
    logits = torch.randn(positions, bits, generator=torch.Generator().manual_seed(seed)) * 3
    each, mean = entropies(logits)
    torch.testing.assert_close(entropy_loss(logits).double(), each - mean, atol=1e-5, rtol=1e-5)


def test_entropy_loss_of_groups_adds_their_entropies(monkeypatch):
    """The sum over groups is never below the entropy of whole codes, so the loss is never above theirs."""
    monkeypatch.setattr(lfq_module, "LARGEST_GROUP_BITS", 3)
    logits = torch.randn(20, 5) * 3
    each, whole = entropies(logits)
    grouped = entropies(logits[:, :3])[1] + entropies(logits[:, 3:])[1]
    torch.testing.assert_close(entropy_loss(logits).double(), each - grouped, atol=1e-5, rtol=1e-5)
    assert entropy_loss(logits) <= each - whole + 1e-5


def test_entropy_of_many_bits_has_no_tensor_of_all_codes():
    """The 2**30 codes would take 4 GiB; the largest allocation stays far below."""
    logits = (torch.randn(64, 30) * 3).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        entropy_loss(logits).backward()
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 2**26
    assert logits.grad.isfinite().all()


def test_entropy_loss_gradient_by_finite_differences():
    assert torch.autograd.gradcheck(entropy_loss, (torch.randn(4, 5, dtype=torch.float64).requires_grad_(),))


def test_lfq_losses_and_gradient_equal_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    z_e, bits = features(3, 4, 4, scale=0.3), 5
    quantizer = lfq_of(bits)
    theirs = library.LFQ(
        dim=D, codebook_size=2**bits, entropy_loss_weight=0.1, commitment_loss_weight=0.25, has_projections=True
    ).train()
    for ours, layer in ((quantizer.down, theirs.project_in), (quantizer.up, theirs.project_out)):
        layer.load_state_dict({"weight": ours.weight[:, :, 0, 0], "bias": ours.bias})
    x, y, weights = z_e.clone().requires_grad_(), z_e.clone().requires_grad_(), torch.randn(z_e.shape)
    output, (z_q, codes, loss) = quantizer(x), theirs(y)
    torch.testing.assert_close(output.z_q, z_q, atol=1e-5, rtol=1e-5)
    assert output.codes.equal(codes.long())
    total = sum(output.losses.values())
    torch.testing.assert_close(total, loss, atol=2e-3, rtol=1e-3)  # theirs clamps probabilities at 1e-5
    ((output.z_q * weights).sum() + total).backward()
    ((z_q * weights).sum() + loss).backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-3, rtol=1e-2)


def test_lfq_commitment_is_the_squared_distance_to_the_corner():
    quantizer, z_e = lfq_of(commitment_weight=0.5), features()
    values = quantizer.down(z_e)
    expected = 0.5 * (values - torch.sign(values)).square().mean()
    torch.testing.assert_close(quantizer(z_e).losses["commitment"], expected)


@pytest.mark.parametrize("quantizer", [fsq_of((8, 5, 3)), lfq_of(3)], ids=["fsq", "lfq"])
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_first_digits_leave_the_other_dimensions_at_the_centre(quantizer, digits):
    codes = torch.randint(math.prod(quantizer.radices), (2, 3, 4))
    split = Level(1, 1, quantizer.radices).split(codes).float()
    for index, levels in enumerate(quantizer.radices):
        middle, half = (levels // 2, levels // 2) if isinstance(quantizer, FSQ) else (0.5, 0.5)
        split[..., index] = (split[..., index] - middle) / half if index < digits else 0
    expected = torch.einsum("bhwn,dn->bdhw", split, quantizer.up.weight[:, :, 0, 0])
    expected = expected + quantizer.up.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(quantizer.lookup(codes, digits), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fsq_of((8, 1)), "radix must be at least 2"),
        (lambda: fsq_of((2**16, 2**16)), "more than the"),
        (lambda: lfq_of(31), "bits must be from 1 to 30"),
        (lambda: lfq_of(entropy_weight=-1.0), "at least 0, not 3, 0.25 and -1.0"),
    ],
)
def test_impossible_sizes_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
