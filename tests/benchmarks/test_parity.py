"""The plain network of the parity benchmark computes what an hourglass of the same structure does."""

import math

import torch
from helpers.toys import log_probs

from smalti.benchmarks import parity
from smalti.benchmarks.parity import PLAIN_STRUCTURE, PlainHourglass
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig

CONFIG = HourglassConfig(4, 6, radices=(7,), model_width=32, heads=2, depth=(0, 2, 0), **PLAIN_STRUCTURE)
NAMES_OF_BLOCK = {
    "norm1.weight": "0.0.0.gamma",
    "q.weight": "0.1.to_q.weight",
    "k.weight": "0.1.to_k.weight",
    "v.weight": "0.1.to_v.weight",
    "out.weight": "0.1.to_out.weight",
    "norm2.weight": "1.0.0.gamma",
    "feedforward.0.weight": "1.1.ff.0.0.weight",
    "feedforward.0.bias": "1.1.ff.0.0.bias",
    "feedforward.2.weight": "1.1.ff.2.weight",
    "feedforward.2.bias": "1.1.ff.2.bias",
}
"""Names of a plain block's weights, and of those of our layers 2i and 2i + 1."""
NAMES_OF_OTHERS = {"down": "body.down.map", "up": "body.up.map", "valley_norm": "body.norm", "norm": "norm"}


def plain_of(network: Hourglass) -> PlainHourglass:
    """Returns a plain network with the weights of an hourglass."""
    plain, weights = PlainHourglass(network.config), dict(network.named_parameters())
    copied = {"embedding.weight": weights["head.embedding"]}
    copied |= {"logits.weight": weights["head.weight"], "logits.bias": weights["head.bias"]}
    for theirs, ours in NAMES_OF_OTHERS.items():
        copied |= {f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    for block in range(network.config.depth[1]):
        for theirs, ours in NAMES_OF_BLOCK.items():
            layer, _, rest = ours.partition(".")
            name = f"body.valley.before.encoder.layers.{2 * block + int(layer)}.{rest}"
            copied[f"blocks.{block}.{theirs}"] = weights[name] + rest.endswith("gamma")  # stored minus one
    missing, unexpected = plain.load_state_dict(copied, strict=False)
    assert {name.rpartition(".")[2] for name in missing} == {"bias"}  # of LayerNorms, which start at zero
    assert not unexpected
    return plain


def test_the_plain_network_computes_what_the_hourglass_does():
    torch.manual_seed(0)
    network = Hourglass(CONFIG).eval()
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    codes = torch.randint(7, (3, 4, 6))
    with torch.no_grad():
        plain = plain_of(network)
        torch.testing.assert_close(plain.features(codes), network.features(codes), atol=2e-5, rtol=1e-4)
        ours = log_probs(network.head, network.features(codes))
        torch.testing.assert_close(plain(codes).log_softmax(-1), ours, atol=1e-4, rtol=1e-4)


def test_the_variants_learn(monkeypatch):
    codes = (torch.arange(16).view(4, 4) % 9).repeat(60, 1, 1)  # all rows are equal
    monkeypatch.setattr(parity, "portrait_codes", lambda count: (codes[:count], (3, 3)))
    tiny = {"model_width": 16, "heads": 2}
    monkeypatch.setattr(
        parity, "HourglassConfig", lambda *grid, radices: HourglassConfig(*grid, radices=radices, **tiny)
    )
    step, loss = parity.parity(steps=80, batch=8, images=40, held_out=20)
    assert all(variant.work() > 0 for variant in step.variants)
    assert all(variant.work() < 0.8 * math.log(9) for variant in loss.variants)
