"""Classes of images: what a prior without training does not yet know, what one that is told them learns, guidance
against the enumerated chain of guided probabilities, and the names people give."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from smalti.commands.class_labels import draw_labels, find_classes
from smalti.commands.sample import generate_codes
from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.methods.sundae import Sundae, SundaeConfig, SundaeSampling, sample_sundae
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig

NAMES = ["Cats", "Camels", "dogs & wolves"]


def prior_of(sharpness: float = 1.5, **changes) -> Hourglass:
    """With strong opinions, of each class others, without training."""
    torch.manual_seed(1)
    config = dict(height=2, width=2, radices=(3,), classes=3, model_width=16, heads=2, depth=(1,), shorten=())
    prior = Hourglass(HourglassConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        prior.head.weight.mul_(sharpness / prior.head.weight.norm(dim=1, keepdim=True))
        if prior.of_class:
            prior.of_class.vectors.weight.normal_()
    prior.provenance = {"label_names": NAMES, "label_counts": [1, 6, 0, 3]}
    return prior


def test_a_new_prior_makes_no_difference_between_classes():
    prior = Hourglass(HourglassConfig(classes=3, model_width=16, heads=2, depth=(1,), shorten=())).eval()
    codes = torch.randint(512, (4, 2, 2))
    told, untold = prior.features(codes, torch.tensor([0, 1, 2, -1])), prior.features(codes)
    assert torch.equal(told, untold)


def test_a_class_reaches_every_position_and_only_its_row():
    prior, codes = prior_of(), torch.randint(3, (3, 2, 2))
    labels = torch.tensor([0, 1, 2])
    before = prior.features(codes, labels)
    after = prior.features(codes, torch.tensor([0, 2, 2]))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] - after[1]).abs().amax(-1).min() > 0.01
    assert torch.equal(prior.features(codes), prior.features(codes, torch.full((3,), -1)))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@torch.no_grad()
def test_the_guided_chain_is_the_enumerated_one(guidance):
    """Three classes side by side; at 1 the conditional model's chain, at 0 that of no class."""
    prior = prior_of(3.0)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    rows = 20_000
    labels = torch.arange(3 * rows) % 3
    blank = torch.zeros(3 * rows, 2, 2, dtype=torch.int64)
    sampling = SundaeSampling(steps=2, temperature=(1.2, 0.6), proportion=(1.0, 1.0), guidance=guidance)
    seeds = row_seeds(7, torch.arange(3 * rows))
    codes = sample_sundae(
        prior, known=blank, known_mask=blank.bool(), seeds=seeds, labels=labels, sampling=sampling
    ).flatten(1)
    for label in range(3):
        given = prior.head.log_probs(prior.features(grids.view(81, 2, 2), torch.full((81,), label)))
        free = prior.head.log_probs(prior.features(grids.view(81, 2, 2)))
        guided = free + guidance * (given - free)  # 81 4 3
        chain = torch.full((81,), 1 / 81, dtype=torch.float64)
        for temperature in (1.2, 0.6):
            new = (guided / temperature).softmax(-1).double()
            chain = chain @ torch.stack([new[:, i, grids[:, i]] for i in range(4)]).prod(0)
        of_class = codes[labels == label] @ torch.tensor([27, 9, 3, 1])
        found = torch.bincount(of_class, minlength=81) / rows
        assert (found - chain).abs().sum() < 0.1  # some 0.06 is chance, over 0.3 the chain of another class
        others = [int(other) for other in range(3) if other != label]
        if guidance:
            elsewhere = codes[labels == others[0]] @ torch.tensor([27, 9, 3, 1])
            assert (torch.bincount(elsewhere, minlength=81) / rows - chain).abs().sum() > 0.2


@torch.no_grad()
def test_guidance_goes_digit_by_digit():
    """Along a tree of two digits, against probabilities of the digits written out."""
    prior = prior_of(radices=(2, 2))
    codes, labels = torch.randint(4, (1, 2, 2)), torch.tensor([1])
    given, free = prior.features(codes, labels), prior.features(codes)

    def digits(features):  # log p of the first digit, and of the second given the first
        leaves = prior.head.log_probs(features).view(4, 2, 2)
        first = leaves.logsumexp(-1)
        return first, leaves - first[..., None]

    (first, second), (first_free, second_free) = digits(given), digits(free)
    guided_first = torch.lerp(first_free, first, 2.0).softmax(-1)
    guided_second = torch.lerp(second_free, second, 2.0).softmax(-1)
    expected = (guided_first[..., None] * guided_second).flatten(1)
    uniforms = torch.rand(40_000, 4, 2, generator=torch.Generator().manual_seed(0))
    many = [features.expand(40_000, -1, -1) for features in (given, free)]
    drawn = prior.head.sample(many[0], uniforms, without_class=many[1], guidance=2.0)
    found = F.one_hot(drawn, 4).float().mean(0)
    assert torch.allclose(found, expected, atol=0.015)
    assert not torch.allclose(expected, prior.head.log_probs(given).exp()[0], atol=0.03)


def test_a_class_is_learned_and_forgotten_where_it_is_dropped():
    """Rows of class 0 are all zeros, of class 1 all ones: told the class, the loss falls far below a coin's."""
    codes = (torch.arange(64) % 2).view(-1, 1, 1).expand(-1, 2, 2).contiguous()
    labels = torch.arange(64) % 2
    losses = {}
    for dropout in (0.0, 1.0):
        torch.manual_seed(0)
        prior = Hourglass(
            HourglassConfig(2, 2, radices=(2,), classes=2, model_width=16, heads=2, depth=(1,), shorten=())
        )
        objective = Sundae(prior, SundaeConfig(unrolled_steps=1, label_dropout=dropout))
        optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
        for step in range(60):
            batch = {"codes": codes, "labels": labels, "seeds": row_seeds(step, torch.arange(64))}
            loss, _ = objective(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[dropout] = float(loss.detach())
    assert losses[0.0] < 0.02
    assert losses[1.0] > 0.1


def test_labels_are_dropped_by_the_rows_seeds():
    prior = prior_of()
    codes, labels = torch.randint(3, (2000, 2, 2)), torch.arange(2000) % 3
    batch = {"codes": codes, "labels": labels, "seeds": row_seeds(3, torch.arange(2000))}
    told = prior.conditioning(batch, 0.25)["labels"]
    assert told is not None
    assert abs(float((told == -1).float().mean()) - 0.25) < 0.04
    assert torch.equal(told[told >= 0], labels[told >= 0])
    assert torch.equal(prior.conditioning({k: v[500:] for k, v in batch.items()}, 0.25)["labels"], told[500:])
    assert prior.conditioning(batch)["labels"] is labels
    assert prior_of(classes=0).conditioning(batch)["labels"] is None


@pytest.mark.parametrize("label", [-2, 3])
def test_a_label_without_a_class_is_refused(label):
    with pytest.raises(UserError, match=r"labels must be from -1 \(any class\) to 2, got"):
        generate_codes(prior_of(), torch.arange(2), torch.tensor([0, label]), seed=0, sampling=SundaeSampling(steps=1))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((), {}),
        (("all",), {"Cats": 0, "Camels": 1, "dogs & wolves": 2}),
        (("dogs", "cats"), {"dogs & wolves": 2, "Cats": 0}),
        (("CAM",), {"Camels": 1}),
    ],
)
def test_classes_are_found_by_name_and_kept_in_the_order_asked(asked, found):
    assert list(find_classes(prior_of(), asked).items()) == list(found.items())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("ca", "'ca' may be Cats or Camels; there are: Cats, Camels, dogs & wolves"),
        ("cow", "no class is called 'cow'; there are: Cats, Camels, dogs & wolves"),
    ],
)
def test_a_name_that_is_none_or_several_is_one_line(asked, said):
    with pytest.raises(UserError, match=said):
        find_classes(prior_of(), [asked])
    with pytest.raises(UserError, match="knows no classes"):
        find_classes(prior_of(classes=0), [asked])


def test_classes_without_names_are_numbers():
    prior = prior_of()
    prior.provenance = {}
    assert find_classes(prior, ["2", "0"]) == {"2": 2, "0": 0}
    assert draw_labels(prior, [], torch.arange(4), 0).tolist() == [-1] * 4


def test_labels_are_drawn_as_often_as_they_occur_and_each_by_its_own_number():
    labels = draw_labels(prior_of(), [], torch.arange(5000), seed=4)
    shares = torch.bincount(labels + 1, minlength=4) / 5000
    assert torch.allclose(shares, torch.tensor([0.1, 0.6, 0.0, 0.3]), atol=0.03)
    assert torch.equal(draw_labels(prior_of(), [], torch.arange(100, 110), seed=4), labels[100:110])
    assert draw_labels(prior_of(), [2, 0], torch.arange(1, 6), seed=4).tolist() == [0, 2, 0, 2, 0]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: HourglassConfig(classes=-1), "classes must not be negative, got -1"),
        (lambda: SundaeConfig(label_dropout=1.5), "label_dropout must be from 0 to 1, got 1.5"),
        (lambda: SundaeSampling(guidance=-1.0), "guidance must not be negative, got -1.0"),
    ],
)
def test_values_outside_their_ranges_are_refused(wrong, said):
    with pytest.raises(UserError, match=said):
        wrong()
