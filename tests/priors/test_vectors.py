"""Conditioning on vectors: the embedding, dropout, guidance in every sampler, what is learned, and refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import toys

from smalti.commands.class_labels import draw_conditions, find_conditions
from smalti.commands.generating import generate_codes, generate_levels
from smalti.core import models
from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.base import CodePrior, PriorConfig
from smalti.priors.conditioning import VectorEmbedding, no_condition
from smalti.priors.methods.sundae import Sundae, SundaeConfig
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig

KINDS = ["hourglass", "maskgit", "pixelcnn", "transformer"]
WIDTH = 3


def prior_of(kind="hourglass", **changes) -> CodePrior:
    """Returns an untrained prior with far from uniform predictions that differ between vectors."""
    torch.manual_seed(1)
    cls = models.class_of_kind("prior", kind)
    shape = {} if kind in ("pixelcnn", "transformer") else {"depth": (1,), "shorten": ()}
    config = dict(height=2, width=3, radices=(3, 2), condition_width=WIDTH, model_width=16, heads=2, **shape)
    prior = cls(cls.config_class(**{**config, **changes})).eval()
    with torch.no_grad():
        prior.head.weight.mul_(4 / prior.head.weight.norm(dim=1, keepdim=True))
        if prior.of_vector:
            prior.of_vector.out.weight.normal_()
            prior.of_vector.none.normal_()
    return prior


def codes_of(prior, condition, guidance, grid=None, rows=16):
    calm = {"steps": 4} if prior.kind in ("hourglass", "maskgit") else {}
    sampling = prior.method.sampling(guidance=guidance, **calm)
    return generate_codes(prior, torch.arange(rows), condition, seed=3, sampling=sampling, grid=grid)


@pytest.mark.parametrize("grid", [None, (3, 5)])
@pytest.mark.parametrize("kind", KINDS)
def test_guidance_runs_from_samples_without_a_vector_to_samples_with_it(kind, grid):
    """By classifier-free guidance, 0 is the prior without the vector and 1 the one with it; in canvases too."""
    prior, vectors = prior_of(kind), torch.randn(16, WIDTH)
    without, conditional = codes_of(prior, None, 1.0, grid), codes_of(prior, vectors, 1.0, grid)
    assert codes_of(prior, vectors, 0.0, grid).equal(without)
    assert codes_of(prior, no_condition(vectors), 3.0, grid).equal(without)
    assert not conditional.equal(without)
    assert not codes_of(prior, vectors, 3.0, grid).equal(conditional)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_codes_depend_on_its_own_vector_only(kind):
    prior, vectors = prior_of(kind), torch.randn(16, WIDTH)
    other = vectors.clone()
    other[5] = -3 * other[5]
    one, two = codes_of(prior, vectors, 2.0), codes_of(prior, other, 2.0)
    differs = (one != two).flatten(1).any(1)
    assert differs.nonzero().flatten().tolist() == [5]


def test_untrained_prior_ignores_vectors():
    config = HourglassConfig(condition_width=WIDTH, model_width=16, heads=2, depth=(1,), shorten=())
    prior, codes = Hourglass(config).eval(), torch.randint(512, (4, 2, 2))
    assert prior.features(codes, torch.randn(4, WIDTH)).equal(prior.features(codes))


def test_scale_and_offset_of_vectors_make_no_difference():
    """Standardized by NumPy's mean and deviation, as vectors of any encoder are; a constant number stays finite."""
    random = np.random.default_rng(0)
    vectors = np.c_[random.normal(size=(50, 2)), np.full(50, 7.0)]
    scaled = vectors * [1000, 0.01, 1] + [5000, 3, 0]
    embedded = []
    for each in (vectors, scaled):
        torch.manual_seed(0)
        embedding = VectorEmbedding(WIDTH, 8)
        torch.nn.init.normal_(embedding.out.weight)
        embedding.init_from_data(torch.from_numpy(each).float())
        expected = (each - each.mean(0)) / np.where(each.std(0) > 0, each.std(0), 1)
        standardized = (torch.from_numpy(each).float() - embedding.mean) / embedding.deviation
        assert np.allclose(standardized, expected, atol=1e-3)
        embedded.append(embedding(torch.from_numpy(each).float(), 50))
    assert torch.allclose(*embedded, atol=1e-2)
    assert embedded[0].isfinite().all()


def test_vector_dropout_depends_on_each_rows_seed():
    prior, vectors = prior_of(), torch.randn(2000, WIDTH)
    batch = {"conditions": vectors, "seeds": row_seeds(3, torch.arange(2000))}
    used = prior.conditioning(batch, 0.25)["condition"]
    assert used is not None
    dropped = used.isnan().all(1)
    assert dropped.equal(used.isnan().any(1))
    assert abs(float(dropped.float().mean()) - 0.25) < 0.04
    assert used[~dropped].equal(vectors[~dropped])
    half = prior.conditioning({name: tensor[500:] for name, tensor in batch.items()}, 0.25)["condition"]
    assert torch.equal(half.isnan(), used[500:].isnan())
    assert prior.conditioning(batch)["condition"] is vectors


def test_vectors_are_learned_and_the_loss_in_evaluation_uses_the_true_ones():
    """The sign of a vector decides all codes of its row: the loss with it is near 0, without it near a guess."""
    vectors = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    codes = (vectors[:, :1, None] > 0).long().expand(-1, 2, 2).contiguous()
    torch.manual_seed(0)
    config = HourglassConfig(2, 2, radices=(2,), condition_width=2, model_width=16, heads=2, depth=(1,), shorten=())
    prior = Hourglass(config)
    objective = Sundae(prior, SundaeConfig(unrolled_steps=1, label_dropout=0.1))
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    for step in range(80):
        loss, _ = objective({"codes": codes, "conditions": vectors, "seeds": row_seeds(step, torch.arange(64))})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    objective.eval()
    seeds = row_seeds(99, torch.arange(64))
    losses = [
        float(objective({"codes": codes, "conditions": each, "seeds": seeds})[0].detach())
        for each in (vectors, -vectors, no_condition(vectors))
    ]
    assert losses[0] < 0.15
    assert losses[0] < losses[2] < losses[1]


def test_checkpoint_keeps_the_vectors_scale(tmp_path):
    prior = prior_of()
    assert prior.of_vector
    prior.of_vector.init_from_data(torch.randn(20, WIDTH) * 5 + 2)
    prior.save(tmp_path)
    loaded = models.load(tmp_path, "prior")
    codes, vectors = torch.randint(6, (4, 2, 3)), torch.randn(4, WIDTH)
    assert loaded.features(codes, vectors).equal(prior.features(codes, vectors))
    assert loaded.digest() == prior.digest()


def test_priors_without_vectors_keep_their_digest():
    """The digest is that of the last version without vectors, of a prior whose weights are all 0.5."""
    prior = Hourglass(replace(toys.TINY["hourglass"], absolute_positions=False, qk_norm=False))
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in prior.state_dict().items()}
    assert (
        models.digest(prior.kind, prior.config, state)
        == "b26813605e9fc527b595efb60f965a4acf08640dd342e619a731a38faf6c7771"
    )


def test_conditions_are_taken_in_turn():
    prior, vectors = prior_of(), np.arange(6.0).reshape(2, 3)
    found = find_conditions([prior], (), vectors)
    assert found.names == ["vector 0", "vector 1"]
    drawn = draw_conditions([prior], found.values, torch.arange(1, 5), seed=0)
    assert drawn is not None
    assert drawn.tolist() == [[3, 4, 5], [0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert draw_conditions([prior], find_conditions([prior], (), None).values, torch.arange(3), seed=0) is None


def test_levels_share_one_vector():
    """Both levels are conditional, or only the coarser one."""
    coarse = prior_of(height=1, width=2)
    for width in (WIDTH, 0):
        fine = prior_of(height=2, width=4, condition_width=width, upper_radices=((3, 2),), upper_factors=(2,))
        options = {
            "grids": [(1, 2), (2, 4)],
            "seed": 0,
            "samplings": [each.method.sampling() for each in (coarse, fine)],
        }
        codes = generate_levels([coarse, fine], torch.arange(3), torch.randn(3, WIDTH), **options)
        assert [tuple(each.shape) for each in codes] == [(3, 1, 2), (3, 2, 4)]


@pytest.mark.parametrize(
    ("priors", "classes", "vectors", "message"),
    [
        (["vector"], (), np.zeros((2, 4)), "has vectors of 4 numbers, but the prior was trained on 3"),
        (["vector"], (), np.zeros(3), r"has the shape \(3,\); give \(n, width\)"),
        (["vector"], (), np.full((1, 3), np.nan), "has NaN or infinity in row 0"),
        (["vector"], ("cats",), None, "conditioned on vectors, not on classes; give --conditions"),
        (["vector"], ("cats",), np.zeros((1, 3)), "--classes and --conditions cannot be given together"),
        (["class"], (), np.zeros((1, 3)), "not conditioned on vectors; train one with --condition vector"),
        (["vector", "class"], (), None, "the priors of the levels are conditioned on different things"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(priors, classes, vectors, message):
    made = {"vector": {}, "class": {"condition_width": 0, "classes": 2}}
    with pytest.raises(UserError, match=message):
        find_conditions([prior_of(**made[name]) for name in priors], classes, vectors)


def test_vectors_of_another_width_and_both_conditions_are_refused_from_python():
    with pytest.raises(
        UserError, match="conditioned on vectors of 3 numbers, but vectors of 2 were given; give vectors of that width"
    ):
        codes_of(prior_of(), torch.zeros(16, 2), 1.0)
    with pytest.raises(UserError, match="conditioned on classes or on vectors, not on both"):
        PriorConfig(classes=2, condition_width=3)
