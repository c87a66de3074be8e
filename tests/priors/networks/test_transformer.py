"""The transformer equals x-transformers' decoder, and on canvases the features of one window for each position."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from einops import rearrange
from helpers.causal import prior_of, random_conditioning, receptive_field
from hypothesis import given, settings
from hypothesis import strategies as st
from rotary_embedding_torch import RotaryEmbedding
from x_transformers import Decoder
from x_transformers.x_transformers import FeedForward

from smalti.benchmarks.ancestral import sample_naively
from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.methods.autoregressive import AncestralSampling, Likelihood, LikelihoodConfig, sample_ancestral
from smalti.priors.networks.positions import AxialRotary, sinusoidal_positions

GUIDED = AncestralSampling(guidance=2.0, temperature=0.8)


def transformer_of(height=4, width=8, **changes):
    return prior_of(height, width, kind="transformer", **changes)


def random_codes(prior, b, h, w):
    return torch.randint(prior.head.codebook_size, (b, h, w), generator=torch.Generator().manual_seed(3))


def set_gain(norm, weight):
    """Sets the weight of an x-transformers LayerNorm, which may be stored less one."""
    norm.gamma.copy_(weight - float(norm.unit_offset))


def decoder_with_weights_of(prior) -> Decoder:
    """Returns x-transformers' decoder with a prior's weights; LayerNorm is RMSNorm of centred queries and keys."""
    config = prior.config
    heads, e = config.heads, config.model_width // config.heads
    decoder = Decoder(
        dim=config.model_width,
        depth=config.layers,
        heads=heads,
        attn_dim_head=e,
        attn_qk_rmsnorm=True,
        ff_mult=config.feedforward_mult,
    )
    centring = torch.eye(e) - 1 / e
    for layer, (norms, attention, _), (ff_norms, feedforward, _) in zip(
        prior.layers, decoder.layers[::2], decoder.layers[1::2], strict=True
    ):
        weights = rearrange(layer.attention.asked.weight, "(p m e) d -> p m e d", p=3, m=heads)
        centred = torch.einsum("f e, p m e d -> p m f d", centring, weights[:2])
        for to, weight in zip((attention.to_q, attention.to_k, attention.to_v), (*centred, weights[2]), strict=True):
            to.weight.copy_(rearrange(weight, "m e d -> (m e) d"))
        attention.to_out.weight.copy_(layer.attention.out.weight)
        for theirs, ours in zip((attention.q_rmsnorm, attention.k_rmsnorm), layer.attention.qk_norms, strict=True):
            theirs.gamma.copy_((ours.weight - 1).expand_as(theirs.gamma))
        set_gain(norms[0], layer.attention.norm.weight)
        set_gain(ff_norms[0], layer.norm.weight)
        assert isinstance(feedforward, FeedForward)
        first, last = (module for module in feedforward.modules() if isinstance(module, torch.nn.Linear))
        first.load_state_dict(layer.hidden.state_dict())
        last.load_state_dict(layer.out.state_dict())
    set_gain(decoder.final_norm, prior.norm.weight)
    return decoder.eval()


@pytest.mark.parametrize("absolute", [True, False])
@torch.no_grad()
def test_features_equal_those_of_x_transformers(absolute):
    prior = transformer_of(3, 5, radices=(4,), classes=2, layers=3, model_width=32, absolute_positions=absolute)
    for name, parameter in prior.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.uniform_(0.5, 2.0)
    codes, labels = random_codes(prior, 4, 3, 5), torch.tensor([-1, 0, 1, 1])
    embedded = prior.head.embedding[codes.flatten(1)]
    x = torch.cat([prior.start.expand(4, 1, -1), embedded[:, :-1]], 1) + prior.of_class.vectors.weight[labels + 1, None]
    if absolute:
        x = x + sinusoidal_positions(3, 5, 32, torch.device("cpu"))
    theirs = decoder_with_weights_of(prior)(x, rotary_pos_emb=(AxialRotary(16)(3, 5), None))
    assert torch.allclose(prior.features(codes, labels), theirs, atol=2e-4)
    turned = decoder_with_weights_of(prior)(x, rotary_pos_emb=(AxialRotary(16)(5, 3), None))
    assert not torch.allclose(turned, theirs, atol=0.1)


@pytest.mark.parametrize("head_width", [8, 12, 32, 64])
def test_rotary_frequencies_are_the_librarys(head_width):
    assert torch.equal(AxialRotary(head_width).rotary.freqs, RotaryEmbedding(head_width // 2, theta=100).freqs)


@torch.no_grad()
def test_narrowest_heads_have_one_frequency_for_each_axis():
    """The library alone cannot make it: it divides by zero."""
    angles = AxialRotary(4)(2, 3)[0]  # each angle stands twice, for the two channels that it rotates
    assert angles.tolist() == [[row, row, column, column] for row in range(2) for column in range(3)]
    assert transformer_of(heads=4).features(torch.zeros(1, 4, 8, dtype=torch.int64)).isfinite().all()


def test_every_earlier_code_is_seen():
    for position in (0, 1, 17, 31):
        seen = receptive_field(transformer_of(), position).flatten()
        assert torch.equal(seen, torch.arange(32) < position)


@torch.no_grad()
def test_attention_does_not_depend_on_the_scale_of_queries_and_keys():
    """QK-norm removes it; the scale of the values matters."""
    prior = transformer_of()
    codes = random_codes(prior, 2, 4, 8)
    before = prior.features(codes)
    for layer in prior.layers:
        layer.attention.asked.weight[:32] *= 30  # queries and keys
    assert torch.allclose(prior.features(codes), before, atol=1e-3)
    for layer in prior.layers:
        layer.attention.asked.weight[32:] *= 30
    assert not torch.allclose(prior.features(codes), before, atol=0.1)


@settings(max_examples=15)
@given(
    trained=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    radices=st.lists(st.integers(2, 4), min_size=1, max_size=3).map(tuple),
    classes=st.integers(0, 2),
    guided=st.booleans(),
    share=st.sampled_from([0.0, 0.4]),
)
def test_cached_sampling_draws_the_codes_of_full_recomputation(trained, h, w, radices, classes, guided, share):
    """On smaller, equal and larger grids than in training, with classes, guidance and known codes."""
    prior = transformer_of(*trained, radices=radices, classes=classes, layers=2)
    seeds, sampling = row_seeds(5, torch.arange(3)), GUIDED if guided else AncestralSampling()
    known, labels = random_codes(prior, 3, h, w), torch.tensor([-1, 0, 1]) % (classes + 1) - 1 if classes else None
    mask = torch.rand(3, h, w, generator=torch.Generator().manual_seed(h)) < share
    cached = sample_ancestral(prior, known=known, known_mask=mask, seeds=seeds, condition=labels, sampling=sampling)
    assert torch.equal(cached, sample_naively(prior, known, mask, seeds, sampling, labels))


def best_windows(size, window, step=1):
    """Returns for each position the start of the windows that cover it, of those at most half a window apart."""
    gaps = max(1, math.ceil((size - window) / max(step, window // step // 2 * step))) if size > window else 0
    starts = [step * ((number * ((size - window) // step)) // max(gaps, 1)) for number in range(gaps + 1)]
    return [[start for start in starts if start <= position < start + window] for position in range(size)]


@pytest.mark.parametrize(
    ("h", "w", "changes"),
    [(5, 8, {}), (4, 13, {}), (9, 11, {"classes": 2}), (8, 12, {"upper_radices": ((5,),), "upper_factors": (2,)})],
)
@torch.no_grad()
def test_features_on_a_canvas_are_those_of_the_highest_and_most_central_window(h, w, changes):
    prior = transformer_of(**changes)
    codes, conditioning = random_codes(prior, 2, h, w), random_conditioning(prior, 2, h, w)
    features = prior.features(codes, **conditioning).view(2, h, w, -1)
    step = 2 if conditioning["upper"] else 1
    tops, lefts = best_windows(h, min(h, 4), step), best_windows(w, min(w, 8), step)
    for r, c in itertools.product(range(h), range(w)):
        top = min(tops[r])
        left = min(lefts[c], key=lambda start: (-min(c - start + 1, start + 8 - c), start))
        window = codes[:, top : top + 4, left : left + 8]
        upper = tuple(each[:, top // 2 : top // 2 + 2, left // 2 : left // 2 + 4] for each in conditioning["upper"])
        expected = prior.features(window, conditioning["condition"], upper).view(*window.shape, -1)[
            :, r - top, c - left
        ]
        assert torch.allclose(features[:, r, c], expected, atol=1e-4)


@torch.no_grad()
def test_probabilities_of_all_canvases_sum_to_one():
    """The trained grid is 2x2, the canvas 3x3 of two codes."""
    prior = transformer_of(2, 2, radices=(2,), layers=2)
    canvases = torch.tensor(list(itertools.product(range(2), repeat=9))).view(-1, 3, 3)
    log_p = -prior.head.nll(prior.features(canvases), canvases.flatten(1)).sum(-1)
    assert abs(float(log_p.double().exp().sum()) - 1) < 1e-5
    assert log_p.exp().max() > 4 / 512


@torch.no_grad()
def test_features_on_a_canvas_depend_on_earlier_positions_only():
    prior = transformer_of(2, 3)
    codes = random_codes(prior, 1, 5, 7)
    before = prior.features(codes)
    for position in range(35):
        changed = codes.clone()
        changed.view(-1)[position] = (changed.view(-1)[position] + 1) % 6
        differs = (prior.features(changed) - before)[0].abs().amax(-1) > 1e-5
        assert not differs[: position + 1].any()
        assert differs.any() == (position < 34)


def test_training_in_bf16_lowers_the_loss_and_stays_near_fp32():
    losses = {}
    for bf16 in (False, True):
        torch.manual_seed(0)
        prior = transformer_of(classes=2).train()
        objective, optimizer = Likelihood(prior, LikelihoodConfig()), torch.optim.AdamW(prior.parameters(), lr=3e-3)
        codes = (torch.arange(8)[:, None, None] + torch.arange(4)[:, None] + torch.arange(8)) % 6
        batch = {"codes": codes, "labels": torch.arange(8) % 2, "seeds": row_seeds(0, torch.arange(8))}
        losses[bf16] = []
        for _ in range(30):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss, _ = objective(batch)
            assert loss.dtype == torch.float32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[bf16].append(loss.item())
        assert losses[bf16][-1] < losses[bf16][0] / 2
    assert losses[True][0] == pytest.approx(losses[False][0], abs=0.05)


def test_default_size_is_between_three_and_four_million_parameters():
    config = transformer_of().config_class()
    prior = type(transformer_of())(replace(config, classes=10))
    assert 3e6 < sum(parameter.numel() for parameter in prior.parameters()) < 4e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "multiple of 4 x heads"),
        ({"heads": 0}, "multiple of 4 x heads"),
        ({"layers": 0}, "--layers must be at least 1, not 0"),
        ({"feedforward_mult": 0}, "feedforward[-_]mult must be at least 1, not 0"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_configs_that_make_no_network_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        transformer_of(**changes)
