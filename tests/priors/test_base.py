"""The contract of `CodePrior`: a new kind with nothing but `features` is trained and sampled by SUNDAE and MaskGIT."""

from dataclasses import dataclass

import pytest
import torch
from einops import rearrange

from smalti.core.randomness import row_seeds
from smalti.priors.base import CodePrior, PriorConfig, Sampler
from smalti.priors.methods.masked import MASK_TOKEN, MASKED
from smalti.priors.methods.sundae import SUNDAE


@dataclass(frozen=True)
class BagConfig(PriorConfig):
    model_width: int = 16


class Bag(CodePrior):
    """Adds the mean embedding of all codes to each position's own."""

    kind = "bag"
    config_class = BagConfig
    method = SUNDAE

    def features(self, codes, condition=None, upper=()):
        b, h, w = codes.shape
        x = self.head.embed(codes.masked_fill(codes == MASK_TOKEN, 0))
        x = x + x.mean(1, keepdim=True)
        if self.of_class:
            x = x + self.of_class(condition, b)[:, None]
        if self.of_upper:
            x = x + rearrange(self.of_upper(upper, h, w), "b h w d -> b (h w) d")
        return x


@pytest.mark.parametrize("method", [SUNDAE, MASKED])
def test_new_kind_needs_only_features(method):
    torch.manual_seed(0)
    prior = Bag(BagConfig(4, 6, (3, 2), classes=2, upper_radices=((5,),), upper_factors=(2,)))
    codes, upper, labels = torch.randint(6, (3, 4, 6)), torch.randint(5, (3, 2, 3)), torch.tensor([0, 1, -1])
    seeds = row_seeds(0, torch.arange(3))
    objective = method.objective(prior, method.objective_config())
    loss, _ = objective({"codes": codes, "labels": labels, "upper_0": upper, "seeds": seeds})
    loss.backward()
    assert all(parameter.grad is not None for parameter in prior.parameters())
    assert isinstance(method.sampler, Sampler)
    mask = codes < 2
    for settings in (method.sampling(steps=4), method.filling(steps=4)):
        samples = method.sampler(
            prior.eval(), known=codes, known_mask=mask, seeds=seeds, condition=labels, upper=(upper,), sampling=settings
        )
        assert torch.equal(samples[mask], codes[mask])
        assert 0 <= samples.min() <= samples.max() < 6
