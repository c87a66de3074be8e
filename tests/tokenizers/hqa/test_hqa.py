"""HQA and HAMs: the posterior and the losses by hand, the way down by hand, frozen layers, resets.

The commands, layer by layer, have test_hqa_commands.py.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from helpers import toys

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import load
from smalti.core.randomness import row_seeds
from smalti.tokenizers.hqa.hams import HAMs, HAMsConfig
from smalti.tokenizers.hqa.hqa import HQA, HQAConfig
from smalti.tokenizers.quantizers.stochastic import RESET_NOISE, RESET_STEPS, START_LENGTH, StochasticQuantizer, draw
from smalti.tokenizers.reconstruction import Reconstruction

D, K = 3, 5
SMALL = {"height": 8, "width": 8, "widths": (4, 6, 4), "code_width": D, "codebook_size": K, "image_channels": 1}


def quantizer_of(**more) -> StochasticQuantizer:
    torch.manual_seed(0)
    return StochasticQuantizer(code_width=D, codebook_size=K, **more)


def hqa_of(config_class=HQAConfig, **more) -> HQA:
    torch.manual_seed(0)
    made = {HQAConfig: HQA, HAMsConfig: HAMs}[config_class](config_class(**{**SMALL, **more})).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # residual blocks start as the identity
    return made


def images_of(b: int = 2, c: int = 1, h: int = 8, w: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def features(b: int = 2, h: int = 2, w: int = 3) -> torch.Tensor:
    return torch.randn(b, D, h, w, generator=torch.Generator().manual_seed(1))


def seeds_of(count: int, seed: int = 0) -> torch.Tensor:
    return row_seeds(seed, torch.arange(count))


def posterior(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Eq. 3, of one vector."""
    unnormalized = np.array([math.exp(-sum((a - b) ** 2 for a, b in zip(z, e, strict=True))) for e in codebook])
    return unnormalized / unnormalized.sum()


def vectors_of(z_e: torch.Tensor) -> np.ndarray:
    return z_e.detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, D)


def test_the_terms_of_eq_4_by_hand_and_their_sum_is_the_mixture_s_density():
    """Entropy and commitment position by position; the sum is -log of an even mixture of Gaussians of variance 1/2 at
    the codewords, up to log k + d/2 log pi (Appendix B)."""
    quantizer, z_e = quantizer_of(weight=0.3).eval(), features()
    codebook = quantizer.codebook.detach().double().numpy()
    entropies, commitments, densities = [], [], []
    for z in vectors_of(z_e):
        q, squares = posterior(z, codebook), ((codebook - z) ** 2).sum(1)
        entropies.append(-sum(p * math.log(p) for p in q))
        commitments.append(sum(p * square for p, square in zip(q, squares, strict=True)))
        gaussians = [math.exp(-square / (2 * 0.5)) / (2 * math.pi * 0.5) ** (D / 2) for square in squares]
        densities.append(-math.log(sum(gaussians) / K))
    losses = quantizer(z_e, seeds_of(2), torch.zeros(2)).losses
    assert losses["entropy"].item() == pytest.approx(-0.3 * np.mean(entropies), rel=1e-5)
    assert losses["commitment"].item() == pytest.approx(0.3 * np.mean(commitments), rel=1e-5)
    constant = math.log(K) + D / 2 * math.log(math.pi)
    total = sum(loss.item() for loss in losses.values()) / 0.3
    assert total == pytest.approx(np.mean(densities) - constant, rel=1e-5)


def test_their_gradient_by_hand():
    """Of their sum: sum_k q_k 2 (z - e_k) for z_e, and its opposite, codeword by codeword."""
    quantizer, z_e = quantizer_of().eval(), features().requires_grad_()
    sum(quantizer(z_e, seeds_of(2), torch.zeros(2)).losses.values()).backward()
    codebook, vectors = quantizer.codebook.detach().double().numpy(), vectors_of(z_e)
    of_codebook = np.zeros_like(codebook)
    for z, found in zip(vectors, vectors_of(z_e.grad), strict=True):
        pulls = 2 * posterior(z, codebook)[:, None] * (z - codebook) / len(vectors)
        np.testing.assert_allclose(found, pulls.sum(0), rtol=1e-4, atol=1e-6)
        of_codebook -= pulls
    np.testing.assert_allclose(quantizer.codebook.grad, of_codebook, rtol=1e-4, atol=1e-6)


def test_without_the_probabilistic_loss_it_is_eq_2():
    quantizer, z_e = quantizer_of(probabilistic=False, weight=2.0), features()
    codebook = quantizer.codebook.detach().double().numpy()
    square = np.mean([((codebook - z) ** 2).sum(1).min() for z in vectors_of(z_e)])
    losses = quantizer(z_e, seeds_of(2), torch.zeros(2)).losses
    assert losses["codebook"].item() == pytest.approx(2 * square, rel=1e-5)
    assert losses["commitment"].item() == pytest.approx(2 * 0.25 * square, rel=1e-5)


@pytest.mark.parametrize("how", ["encode", "training"])
def test_codes_are_drawn_from_the_posterior(how):
    """The same vector for many images: frequencies are Eq. 3's, of samples and of the Gumbel softmax alike."""
    quantizer, count = quantizer_of(), 4000
    quantizer.codebook.data.mul_(0.3)  # near each other, so that something is drawn
    z_e = (0.3 * features(1, 1, 1)).expand(count, D, 1, 1)
    codes = (
        quantizer.encode(z_e, seeds_of(count))
        if how == "encode"
        else quantizer(z_e, seeds_of(count), torch.zeros(count)).codes
    )
    expected = posterior(vectors_of(z_e[:1])[0], quantizer.codebook.detach().double().numpy())
    frequencies = np.bincount(codes.flatten(), minlength=K) / count
    np.testing.assert_allclose(frequencies, expected, atol=4 * math.sqrt(0.25 / count))
    assert expected.max() < 0.5


def test_a_draw_is_of_its_seed_and_not_of_its_batch():
    logits, seeds = torch.randn(6, 2, 2, K, generator=torch.Generator().manual_seed(0)), seeds_of(6)
    together = draw(logits, seeds)
    assert together.equal(torch.cat([draw(logits[i : i + 1], seeds[i : i + 1]) for i in range(6)]))
    assert not together.equal(draw(logits, seeds_of(6, seed=1)))
    assert draw(logits, None).equal(logits.argmax(-1))


def test_the_relaxation_hardens_with_progress():
    """At the end of training z_q is the codeword drawn; at its start the mixture that the temperature makes."""
    quantizer, z_e = quantizer_of(temperature=2.0), features()
    soft, hard = (quantizer(z_e, seeds_of(2), torch.full((2,), progress)) for progress in (0.0, 1.0))
    torch.testing.assert_close(hard.z_q, quantizer.lookup(hard.codes), atol=1e-4, rtol=0)
    assert soft.codes.equal(hard.codes)  # of the same noise
    assert not soft.z_q.allclose(hard.z_q, atol=0.1)
    halfway = quantizer._temperature(torch.tensor([0.5]))
    assert halfway.item() == pytest.approx(2.0 * 0.5 + 1e-3 * 0.5)


def test_resets_by_hand():
    """When due, a codeword that nothing uses moves to beside one in use, and no other moves."""
    for due in (False, True):
        quantizer = quantizer_of()
        quantizer.use.copy_(torch.tensor([2.0, 1e-9, 1.0, 1e-9, 2.0]))
        quantizer.steps.fill_(RESET_STEPS - 1 if due else 0)
        quantizer._used.append(torch.tensor([2.0, 0.0, 1.0, 0.0, 2.0]))
        before = quantizer.codebook.detach().clone()
        quantizer.after_step(seeds_of(2))
        moved = (quantizer.codebook != before).any(1)
        assert moved.tolist() == ([False, True, False, True, False] if due else [False] * K)
        if due:
            gaps = torch.cdist(quantizer.codebook[moved], before[[0, 2, 4]])
            assert gaps.min(1).values.max() < 6 * RESET_NOISE * math.sqrt(D)
            assert gaps.argmin(1).unique().numel() == 2  # none twice
            assert (quantizer.use > 0.03 * quantizer.use.max()).all()  # they are not dead at once
    bad = quantizer_of()
    bad.steps.fill_(RESET_STEPS - 1)
    bad._used.append(torch.tensor([2.0, 0.0, 1.0, 0.0, 2.0]))
    bad.use.copy_(torch.tensor([2.0, 1e-9, 1.0, 1e-9, 2.0]))
    before = bad.codebook.detach().clone()
    bad.after_step(seeds_of(2), torch.tensor(True))
    assert bad.codebook.equal(before)


def effective_rate(reset_below: float) -> float:
    """Bits of entropy of the codes that a quantizer, all but one of whose codewords start far away, learns to use."""
    torch.manual_seed(0)
    quantizer = StochasticQuantizer(code_width=D, codebook_size=16, reset_below=reset_below)
    quantizer.codebook.data[1:] += 30
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.05)
    z_e = 2 * torch.randn(256, D, 1, 1)
    for step in range(200):
        output = quantizer(z_e, seeds_of(256, step), torch.full((256,), step / 200))
        optimizer.zero_grad()
        ((output.z_q - z_e).square().mean() + sum(output.losses.values())).backward()
        optimizer.step()
        quantizer.after_step(seeds_of(256, step))
    shares = torch.bincount(quantizer.encode(z_e).flatten(), minlength=16) / 256
    return -sum(p * math.log2(p) for p in shares.tolist() if p)


def test_resets_raise_the_effective_rate():
    without, reset = effective_rate(0.0), effective_rate(0.03)
    print(f"effective rate of 16 codes: {without:.2f} bits without resets, {reset:.2f} with")
    assert without < 1
    assert reset > 2.5


@pytest.mark.parametrize(("config_class", "normalize"), [(HQAConfig, False), (HQAConfig, True), (HAMsConfig, False)])
def test_the_way_up_and_down_by_hand(config_class, normalize):
    """Algorithm 1, with the most probable codes at every layer."""
    tokenizer, images = hqa_of(config_class, normalize=normalize), images_of()
    tokenizer.init_from_data(images_of(16))
    found, codes = images, []
    for layer in tokenizer.layers:
        found = layer.encoder((found - layer.mean) / layer.deviation)
        codes.append(layer.quantizer.encode(found))
    for number in (1, 2, 3):
        (encoded,) = tokenizer.encode(images, number)
        assert encoded.equal(codes[number - 1])
        assert tokenizer.layout_of(number).check((encoded,)) is None
        grid = encoded
        for above in range(number - 1, 0, -1):
            layer = tokenizer.layers[above]
            made = layer.decoder(layer.quantizer.lookup(grid))
            grid = (
                made.argmax(1)
                if config_class is HAMsConfig
                else tokenizer.layers[above - 1].quantizer.encode(made * layer.deviation + layer.mean)
            )
        lowest = tokenizer.layers[0]
        expected = lowest.decoder(lowest.quantizer.lookup(grid)).clamp(-1, 1)
        assert tokenizer.decode((encoded,), layer=number).equal(expected)
    assert tokenizer.encode(images)[0].equal(codes[-1])
    assert tokenizer.layout == Layout((Level(1, 1, (K,)),))
    assert (tokenizer.layers[2].deviation != 1).any() == normalize
    for refused in (0, 4):
        with pytest.raises(UserError, match=f"layers 1 to 3; there is no layer {refused}"):
            tokenizer.encode(images, refused)
    with pytest.raises(UserError, match="1 digit; cannot decode 2"):
        hqa_of().decode((codes[-1],), 2)


@torch.no_grad()
def test_a_code_has_many_decodes_each_of_its_seed():
    """Against every path of codes from the top of two layers: as often as Eq. 3 has it. Of HAMs, by the logits."""
    for config_class in (HQAConfig, HAMsConfig):
        tokenizer, count = hqa_of(config_class, height=4, width=4, widths=(4, 4), codebook_size=3), 3000
        grid = torch.ones(1, 1, 1, dtype=torch.long)
        for parameter in tokenizer.parameters():
            parameter.mul_(0.5)  # so that no path is all but certain
        lower, top = tokenizer.layers
        made = top.decoder(top.quantizer.lookup(grid))
        logits = made.movedim(1, -1) if config_class is HAMsConfig else lower.quantizer.logits(made)
        shares = logits.softmax(-1)[0].reshape(4, 3)
        decoded = tokenizer.decode((grid.expand(count, 1, 1),), seeds=seeds_of(count))
        paths = torch.tensor(list(product(range(3), repeat=4)))
        images = lower.decoder(lower.quantizer.lookup(paths.view(-1, 2, 2))).clamp(-1, 1)
        nearest = torch.cdist(decoded.flatten(1), images.flatten(1))
        assert nearest.min(1).values.max() < 0.01
        frequencies = torch.bincount(nearest.argmin(1), minlength=81) / count
        expected = torch.stack([shares[range(4), path].prod() for path in paths])
        assert (frequencies - expected).abs().max() < 4 * math.sqrt(0.25 / count)
        assert expected.max() < 0.95  # there are many
        torch.testing.assert_close(decoded[:5], tokenizer.decode((grid.expand(5, 1, 1),), seeds=seeds_of(5)))


def test_sampled_codes_differ_by_seed_and_the_others_do_not():
    tokenizer, images = hqa_of(), images_of(64)
    first, again, other = (tokenizer.encode(images, seeds=seeds_of(64, seed))[0] for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
    torch.manual_seed(3)
    assert tokenizer.train().encode(images)[0].equal(tokenizer.eval().encode(images)[0])


@pytest.mark.parametrize("config_class", [HQAConfig, HAMsConfig])
def test_the_top_layer_s_reconstruction_loss(config_class):
    """Squared error to z_e of the layer below, or cross-entropy over its codes."""
    tokenizer, images = hqa_of(config_class), images_of()
    output = tokenizer(images)
    below = tokenizer.features(images, 2)
    made = tokenizer.layers[2].decoder(tokenizer.layers[2].quantizer.lookup(tokenizer.encode(images)[0]))
    codes = tokenizer.layers[1].quantizer.encode(below)[:, None]
    expected = (
        -made.log_softmax(1).gather(1, codes).mean() if config_class is HAMsConfig else (made - below).square().mean()
    )
    torch.testing.assert_close(output.losses["reconstruction"], expected)
    torch.testing.assert_close(output.reconstruction, tokenizer.decode(output.codes))
    assert tokenizer.train()(images).reconstruction is None


@pytest.mark.parametrize("kind", ["hqa", "hams"])
def test_lower_layers_stay_bit_for_bit(kind, tmp_path):
    """Through training with averaged weights; the top one moves, all of it."""
    before = {name: tensor.clone() for name, tensor in toys.make("tokenizer", kind)[0].state_dict().items()}
    model = toys.train(tmp_path, lambda: toys.make("tokenizer", kind))
    model.train()
    assert not any(module.training for module in model.layers[0].modules())
    assert all(module.training for module in model.layers[1].modules())
    for after in (model.state_dict(), load(tmp_path, "tokenizer").state_dict()):
        moved = {name for name, tensor in after.items() if not tensor.equal(before[name])}
        assert moved
        assert all(name.startswith("layers.1.") for name in moved)
    still = [name for name, _ in model.layers[1].named_parameters() if f"layers.1.{name}" not in moved]
    assert not still


def test_training_lowers_the_loss_of_every_combination():
    for posterior, target, probabilistic in product(("stochastic", "nearest"), ("features", "codes"), (True, False)):
        choice = {"posterior": posterior, "target": target, "probabilistic": probabilistic}
        tokenizer, images = hqa_of(**choice, widths=(4, 4)).train(), images_of(16)
        tokenizer.init_from_data(images)
        batch = {
            "images": ((images + 1) * 127.5).byte(),
            "seeds": seeds_of(16),
            "progress": torch.full((16,), 0.5),
        }
        objective = Reconstruction(tokenizer)
        optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=0.01)
        before, terms = objective(batch)
        assert "mse" not in terms
        for _ in range(10):
            optimizer.zero_grad()
            objective(batch)[0].backward()
            optimizer.step()
        assert objective(batch)[0] < before, choice


@torch.no_grad()
def test_the_start_is_from_the_images_or_left_out():
    """Every codeword of the top layer is used, and z_e spread as widely as codewords are; nothing below moves."""
    for config_class in (HQAConfig, HAMsConfig):
        tokenizer, images = hqa_of(config_class, height=16, width=16), images_of(64, h=16, w=16)
        before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
        tokenizer.init_from_data(images)
        moved = {name for name, tensor in tokenizer.state_dict().items() if not tensor.equal(before[name])}
        assert all(name.startswith("layers.2.") for name in moved)
        assert tokenizer.encode(images)[0].unique().numel() == K
        if config_class is HQAConfig:
            vectors = vectors_of(tokenizer.features(images))
            assert math.sqrt(vectors.var(0).sum()) == pytest.approx(START_LENGTH, rel=0.05)
        random = hqa_of(config_class, kmeans_start=False, linear_start=False)
        before = {name: tensor.clone() for name, tensor in random.state_dict().items()}
        random.init_from_data(images)
        assert all(tensor.equal(before[name]) for name, tensor in random.state_dict().items())


def test_sizes_and_settings_that_will_not_do():
    with pytest.raises(UserError, match="12x8 do not divide by 8, the downsampling of 3 layers"):
        hqa_of(height=12)
    with pytest.raises(UserError, match="6x8 do not divide by 4"):
        hqa_of().features(images_of(h=6), 2)
    assert "--reset-below 0.03" in hqa_of(HAMsConfig).collapse_remedy()
    assert "fewer codes" in hqa_of().collapse_remedy()
    for wrong in ({"widths": ()}, {"widths": (4, 0)}, {"codebook_size": 1}, {"temperature": 0.0}, {"reset_below": 1.0}):
        with pytest.raises(UserError):
            hqa_of(**wrong)
    assert hqa_of().features(images_of(h=16, w=24)).shape == (2, D, 2, 3)
