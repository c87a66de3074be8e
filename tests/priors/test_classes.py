"""Class conditioning: embeddings, classifier-free guidance against an enumerated chain, label dropout and names."""

import itertools

import jaxtyping
import numpy as np
import pytest
import torch
from helpers.toys import log_probs
from torch.nn import functional as F

from smalti.commands.class_labels import draw_labels, find_classes, find_conditions, label_counts, trained_classes
from smalti.commands.generating import generate_codes
from smalti.core.errors import UserError
from smalti.core.randomness import row_seeds
from smalti.priors.methods.sundae import Sundae, SundaeConfig, SundaeSampling, sample_sundae
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig

NAMES = ["Cats", "Camels", "dogs & wolves"]


def prior_of(sharpness: float = 1.5, **changes) -> Hourglass:
    """Returns an untrained prior with far from uniform predictions that differ between classes."""
    torch.manual_seed(1)
    config = dict(height=2, width=2, radices=(3,), classes=3, model_width=16, heads=2, depth=(1,), shorten=())
    prior = Hourglass(HourglassConfig(**{**config, **changes})).eval()
    with torch.no_grad():
        prior.head.weight.mul_(sharpness / prior.head.weight.norm(dim=1, keepdim=True))
        if prior.of_class:
            prior.of_class.vectors.weight.normal_()
    prior.provenance = {"label_names": NAMES, "label_counts": [1, 6, 1, 3]}
    return prior


def test_untrained_prior_ignores_classes():
    prior = Hourglass(HourglassConfig(classes=3, model_width=16, heads=2, depth=(1,), shorten=())).eval()
    codes = torch.randint(512, (4, 2, 2))
    assert torch.equal(prior.features(codes, torch.tensor([0, 1, 2, -1])), prior.features(codes))


def test_class_affects_every_position_of_its_row_only():
    prior, codes = prior_of(), torch.randint(3, (3, 2, 2))
    labels = torch.tensor([0, 1, 2])
    before = prior.features(codes, labels)
    after = prior.features(codes, torch.tensor([0, 2, 2]))
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] - after[1]).abs().amax(-1).min() > 0.01
    assert torch.equal(prior.features(codes), prior.features(codes, torch.full((3,), -1)))


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
@torch.no_grad()
def test_guided_samples_follow_the_enumerated_chain(guidance):
    """Three classes in one batch. Guidance 1 is the conditional model's chain, 0 the unconditional one's."""
    prior = prior_of(3.0, absolute_positions=False)
    grids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    rows = 20_000
    labels = torch.arange(3 * rows) % 3
    blank = torch.zeros(3 * rows, 2, 2, dtype=torch.int64)
    sampling = SundaeSampling(steps=2, temperature=(1.2, 0.6), proportion=(1.0, 1.0), guidance=guidance)
    seeds = row_seeds(7, torch.arange(3 * rows))
    codes = sample_sundae(
        prior, known=blank, known_mask=blank.bool(), seeds=seeds, condition=labels, sampling=sampling
    ).flatten(1)
    for label in range(3):
        conditional = log_probs(prior.head, prior.features(grids.view(81, 2, 2), torch.full((81,), label)))
        unconditional = log_probs(prior.head, prior.features(grids.view(81, 2, 2)))
        guided = unconditional + guidance * (conditional - unconditional)  # 81 4 3
        chain = torch.full((81,), 1 / 81, dtype=torch.float64)
        for temperature in (1.2, 0.6):
            new = (guided / temperature).softmax(-1).double()
            chain = chain @ torch.stack([new[:, i, grids[:, i]] for i in range(4)]).prod(0)

        def distance(other: int, chain: torch.Tensor = chain) -> torch.Tensor:
            numbers = codes[labels == other] @ torch.tensor([27, 9, 3, 1])
            return (torch.bincount(numbers, minlength=81) / rows - chain).abs().sum()

        assert distance(label) < 0.1  # some 0.06 is chance, over 0.3 the chain of another class
        if guidance:
            assert distance(1 if label == 0 else 0) > 0.2


@torch.no_grad()
def test_guidance_is_applied_digit_by_digit():
    """A tree of two digits, against probabilities of the digits computed by hand."""
    prior = prior_of(radices=(2, 2))
    codes, labels = torch.randint(4, (1, 2, 2)), torch.tensor([1])
    conditional, unconditional = prior.features(codes, labels), prior.features(codes)

    def digits(features):  # log p of the first digit, and of the second given the first
        leaves = log_probs(prior.head, features).view(4, 2, 2)
        first = leaves.logsumexp(-1)
        return first, leaves - first[..., None]

    (first, second), (first_free, second_free) = digits(conditional), digits(unconditional)
    guided_first = torch.lerp(first_free, first, 2.0).softmax(-1)
    guided_second = torch.lerp(second_free, second, 2.0).softmax(-1)
    expected = (guided_first[..., None] * guided_second).flatten(1)
    uniforms = torch.rand(40_000, 4, 2, generator=torch.Generator().manual_seed(0))
    many = [features.expand(40_000, -1, -1) for features in (conditional, unconditional)]
    samples = prior.head.sample(many[0], uniforms, unconditional=many[1], guidance=2.0)
    frequencies = F.one_hot(samples, 4).float().mean(0)
    assert torch.allclose(frequencies, expected, atol=0.015)
    assert not torch.allclose(expected, log_probs(prior.head, conditional).exp()[0], atol=0.03)


def test_classes_are_learned_unless_labels_are_dropped():
    """Rows of class 0 are all zeros, of class 1 all ones: with the class, the loss falls far below that of a guess."""
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


def test_label_dropout_depends_on_each_rows_seed():
    prior = prior_of()
    codes, labels = torch.randint(3, (2000, 2, 2)), torch.arange(2000) % 3
    batch = {"codes": codes, "labels": labels, "seeds": row_seeds(3, torch.arange(2000))}
    used = prior.conditioning(batch, 0.25)["condition"]
    assert used is not None
    assert abs(float((used == -1).float().mean()) - 0.25) < 0.04
    assert torch.equal(used[used >= 0], labels[used >= 0])
    assert torch.equal(prior.conditioning({k: v[500:] for k, v in batch.items()}, 0.25)["condition"], used[500:])
    assert prior.conditioning(batch)["condition"] is labels
    assert prior_of(classes=0).conditioning(batch)["condition"] is None


@pytest.mark.parametrize("label", [-2, 3])
def test_label_without_a_class_is_refused(label):
    with pytest.raises(UserError, match=r"labels must be from -1 \(any class\) to 2, got"):
        generate_codes(prior_of(), torch.arange(2), torch.tensor([0, label]), seed=0, sampling=SundaeSampling(steps=1))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), []),
        (None, []),
        (("all",), [0, 1, 2]),
        (("dogs", "cats"), [2, 0]),
        (("dogs", "cats", "dogs"), [2, 0, 2]),
        (("CAM",), [1]),
        ((name for name in ("dogs", "cats")), [2, 0]),
        (np.array(["dogs", "cats"]), [2, 0]),
        ([2, np.int64(1)], [2, 1]),
        (torch.tensor([2, 0]), [2, 0]),
    ],
)
def test_classes_are_found_by_name_in_the_order_of_the_names(names, expected):
    found = find_conditions([prior_of()], names, None)
    assert found.values == expected
    assert found.names == [["Cats", "Camels", "dogs & wolves"][number] for number in expected]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ca", "'ca' may be Cats or Camels; there are: Cats, Camels, dogs & wolves"),
        ("cow", "no class is called 'cow'; there are: Cats, Camels, dogs & wolves"),
        (3, "no class is called 3; there are: Cats, Camels, dogs & wolves"),
        (-1, "no class is called -1; there are: Cats, Camels, dogs & wolves"),
    ],
)
def test_unknown_and_ambiguous_names_are_refused(name, message):
    with pytest.raises(UserError, match=message):
        find_classes(prior_of(), [name])
    with pytest.raises(UserError, match="this prior has no classes"):
        find_classes(prior_of(classes=0), [name])


@pytest.mark.parametrize(
    ("requested", "message"),
    [
        ([0.5], "a class must be a whole number, not 0.5"),
        ([None], "a class must be a whole number, not None"),
        (3, "classes is 3; give a list of names, or of the numbers of classes"),
    ],
)
def test_requests_that_are_no_names_and_numbers_are_one_line(requested, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests alone
    with pytest.raises(UserError, match=message):
        find_classes(prior_of(), requested)


@pytest.mark.parametrize(
    ("names", "requested", "expected"),
    [
        (["a", "A", "b"], "A", 1),
        (["a", "A", "b"], "a", 0),
        (["a", "A", "b"], "B", 2),
        (["cafe\u0301", "b", "c"], "caf\u00e9", 0),
        (["caf\u00e9", "b", "c"], "CAFE\u0301", 0),
        (["cafe\u0301s", "b", "c"], "caf\u00e9", 0),
        (["cafe\u0301", "caf\u00e9", "c"], "caf\u00e9", 1),
        (["Stra\u00dfe", "b", "c"], "STRASSE", 0),
    ],
)
def test_names_that_differ_in_case_or_unicode_form_are_told_apart(names, requested, expected):
    prior = prior_of()
    prior.provenance["label_names"] = names
    assert find_classes(prior, [requested]) == [expected]


def test_classes_without_training_images_are_refused_and_left_out_of_all():
    prior = prior_of()
    labels, held_out = torch.tensor([0, 1, 1, 2, -1, 0]), torch.tensor([False, True, True, False, False, True])
    training, others = (torch.bincount(labels[held_out == side] + 1).numpy() for side in (False, True))
    prior.provenance["label_counts"] = label_counts(training, others, 3).tolist()
    assert prior.provenance["label_counts"] == [1, 2, 0, 1]
    with pytest.raises(UserError, match="the prior was trained on no image of the class 'Camels'; choose another one"):
        find_classes(prior, ["cam"])
    assert find_classes(prior, ["all"]) == [0, 2]
    assert trained_classes(prior) == [0, 2]
    assert 1 not in draw_labels(prior, [], torch.arange(1000), seed=0)


def test_classes_without_names_are_numbered():
    prior = prior_of()
    prior.provenance = {}
    assert find_classes(prior, ["2", "0"]) == [2, 0]
    assert draw_labels(prior, [], torch.arange(4), 0).tolist() == [-1] * 4


def test_labels_are_drawn_by_frequency_and_row_number():
    prior = prior_of()
    prior.provenance["label_counts"] = [1, 6, 0, 3]
    labels = draw_labels(prior, [], torch.arange(5000), seed=4)
    shares = torch.bincount(labels + 1, minlength=4) / 5000
    assert torch.allclose(shares, torch.tensor([0.1, 0.6, 0.0, 0.3]), atol=0.03)
    assert torch.equal(draw_labels(prior, [], torch.arange(100, 110), seed=4), labels[100:110])
    assert draw_labels(prior_of(), [2, 0], torch.arange(1, 6), seed=4).tolist() == [0, 2, 0, 2, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HourglassConfig(classes=-1), "classes and condition_width must not be negative, got -1 and 0"),
        (lambda: SundaeConfig(label_dropout=1.5), "label_dropout must be from 0 to 1, got 1.5"),
        (lambda: SundaeSampling(guidance=-1.0), "guidance must not be negative, got -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
