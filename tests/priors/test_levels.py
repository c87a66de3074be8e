"""Several levels, each with a prior of another kind: trained, sampled and evaluated as one model."""

import itertools
import json
import math
import sys
from dataclasses import dataclass

import pytest
import torch
from helpers.toys import log_probs, untrained_pair
from PIL import Image

import smalti
from smalti.commands.generating import generate_levels
from smalti.commands.inpainting import Filling, fill
from smalti.commands.model_paths import load_prior_with_tokenizer, load_priors
from smalti.core import models
from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import load
from smalti.core.randomness import row_seeds
from smalti.evaluation.code_likelihood import count_bits
from smalti.images.decoding import to_float, to_uint8
from smalti.images.sheets import save_png, to_image
from smalti.latentsets.provenance import Provenance
from smalti.latentsets.reader import LatentSet
from smalti.latentsets.writer import LatentSetWriter
from smalti.priors.grids import grids
from smalti.priors.methods.autoregressive import AncestralFilling, AncestralSampling
from smalti.priors.methods.masked import MaskedSampling
from smalti.priors.methods.sundae import SundaeSampling
from smalti.priors.networks.hourglass import Hourglass, HourglassConfig
from smalti.priors.networks.pixelcnn import PixelCNN, PixelCNNConfig
from smalti.scripts import inpaint, sample, train_prior
from smalti.tokenizers.base import SAME_CODES, Tokenizer
from smalti.training.run_folder import METRICS_NAME

LAYOUT = Layout((Level(2, 2, (3,)), Level(4, 4, (2, 3))))
ROWS = 96
TRAIN = "--latents latents.h5 --batch-size 16 --precision fp32 --log-steps 1000 --report-steps 1000 --save-steps 1000"
TRAIN += " --model-width 16 --heads 2"


@dataclass(frozen=True)
class TwoLevelsConfig:
    height: int = 4
    width: int = 4


class TwoLevels(Tokenizer):
    """Stores the codes as colours: the coarser level in red, the finer one in green and blue."""

    kind, config_class = "two-levels", TwoLevelsConfig
    image_channels, downsampling = 3, 1

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.ones(1))

    @property
    def layout(self):
        return LAYOUT

    def encode(self, images):
        red, green, blue = ((images + 1) / 2).unbind(1)
        upper = red.unflatten(1, (2, 2)).unflatten(3, (2, 2)).amax((2, 4))
        return (2 * upper).round().long(), (3 * green.round() + (2 * blue).round()).long()

    def decode(self, codes, digits=None):
        upper, lower = codes
        red = upper.repeat_interleave(2, 1).repeat_interleave(2, 2)
        return torch.stack([red / 2, lower // 3, lower % 3 / 2], 1) * 2 - 1


def codes_of_rows():
    """Returns codes of two levels: each coarse code x decides the four finer ones, whose digits are (x == 2, x)."""
    upper = torch.randint(3, (ROWS, 2, 2), generator=torch.Generator().manual_seed(0))
    coarse = upper.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return upper, (coarse == 2).long() * 3 + coarse


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the tokenizer, its latent set, and a prior of each level, of different kinds."""
    folder, patch = tmp_path_factory.mktemp("levels"), pytest.MonkeyPatch()
    patch.setitem(models._CLASSES, ("tokenizer", "two-levels"), TwoLevels)
    patch.chdir(folder)
    tokenizer = TwoLevels(TwoLevelsConfig())
    tokenizer.save("tokenizer")
    size = {"height": 4, "width": 4, "channels": 3}
    provenance = Provenance("two-levels", {}, tokenizer.digest(), "tokenizer", "none", "f00d", size)
    numbers = torch.arange(ROWS)
    columns = {"labels": numbers * 0 - 1, "source_ids": numbers, "held_out": numbers % 4 == 0, "flipped": numbers < 0}
    with LatentSetWriter(folder / "latents.h5", LAYOUT, **columns, provenance=provenance) as writer:
        writer.write(0, codes_of_rows())
    for flags in (
        "--prior hourglass --level 0 --steps 40 --depth 1 --shorten --out top",
        "--prior pixelcnn --level 1 --steps 120 --learning-rate 0.005 --layers 2 --out bottom",
    ):
        assert run(train_prior.main, *TRAIN.split(), *flags.split()) == 0
    yield folder
    patch.undo()


def run(main, *arguments):
    before, sys.argv = sys.argv, ["command", *map(str, arguments)]
    try:
        main()
        return 0
    except SystemExit as error:
        return error.code
    finally:
        sys.argv = before


def test_each_level_is_trained_conditioned_on_the_coarser_ones(place):
    config = json.loads((place / "bottom" / "config.json").read_text())["config"]
    assert (config["upper_radices"], config["upper_factors"], config["radices"]) == ([[3]], [2], [2, 3])
    lines = [json.loads(line) for line in (place / "bottom" / METRICS_NAME).read_text().splitlines()]
    assert lines[-1]["held_out_bits_per_code"] < 0.3  # without the coarser level it would be more than log2(3) / 4
    assert not (place / "top" / "samples.png").exists()  # a coarser level alone cannot be decoded
    assert (place / "bottom" / "samples.png").exists()


def test_levels_are_sampled_as_one_model(place, capfd):
    """Priors of two kinds, given in any order; finer codes depend on the coarser ones as in training."""
    for sources, out in ((("top", "bottom"), "a.png"), (("bottom", "top"), "b.png")):
        assert run(sample.main, "--prior", *sources, "--num", 6, "--out", out) == 0
    a, b = (Image.open(place / name) for name in ("a.png", "b.png"))
    assert len(json.loads(a.text["smalti"])["prior_digests"]) == 2
    assert a.tobytes() == b.tobytes()
    priors, _ = load_priors(("top", "bottom"), None)
    samplings = [SundaeSampling(steps=10), AncestralSampling()]
    upper, lower = generate_levels(priors, torch.arange(64), None, grids=[(2, 2), (4, 4)], seed=0, samplings=samplings)
    coarse = upper.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert (lower == (coarse == 2).long() * 3 + coarse).float().mean() > 0.7  # one in six by chance
    assert len(upper.flatten(1).unique(dim=0)) > 10


def test_flags_are_those_of_the_last_prior(place, capfd):
    assert run(sample.main, "--prior", "top", "bottom", "--num", 2, "--temperature", "0.5", "--out", "c.png") == 0
    assert run(sample.main, "--prior", "bottom", "top", "--num", 2, "--steps", "3", "--out", "d.png") == 0
    assert run(sample.main, "--prior", "top", "bottom", "--steps", "3", "--out", "e.png") == 2
    assert "--steps" in capfd.readouterr().err


def test_all_levels_inpaint_as_one_model(place, capfd):
    """Known pixels are kept, and finer codes depend on the sampled coarser ones; the command does the same."""
    priors, tokenizer = load_priors(("top", "bottom"), None)
    codes = tuple(level[:32] for level in codes_of_rows())
    pixels = to_uint8(tokenizer.decode(codes))
    assert all(map(torch.equal, tokenizer.encode(to_float(pixels)), codes))
    mask = torch.zeros(32, 4, 4, dtype=torch.bool)
    mask[:, :2, 2:] = True
    filled = fill(
        priors,
        tokenizer,
        pixels,
        mask,
        seeds=row_seeds(0, torch.arange(32)),
        sampling=AncestralFilling(),
        filling=Filling(candidates=2, dilation=0, match_colour=False),
    )
    upper, lower = tokenizer.encode(to_float(filled))
    known = ~mask.unsqueeze(1).expand_as(pixels)
    assert torch.equal(filled[known], pixels[known])
    inside = lower[:, :2, 2:]
    assert (inside == ((upper == 2).long() * 3 + upper)[:, :1, 1:]).float().mean() > 0.7
    assert (upper[:, 0, 1] != codes[0][:, 0, 1]).any()
    save_png(place / "in.png", to_image(pixels[0]))
    save_png(place / "mask.png", Image.fromarray(mask[0].numpy()))
    for order in ("top bottom", "bottom top"):
        flags = f"--prior {order} --image in.png --mask mask.png --num 1 --dilation 0 --out fill-{order[0]}.png"
        assert run(inpaint.main, *flags.split()) == 0
    assert (place / "fill-t.png").exists()
    assert Image.open(place / "fill-t.png").tobytes() == Image.open(place / "fill-b.png").tobytes()
    with pytest.raises(UserError, match="top draws one of several levels, so it cannot draw images alone"):
        load_prior_with_tokenizer("top", None)


@pytest.mark.parametrize(
    ("main", "flags", "message"),
    [
        (
            sample.main,
            "--prior bottom",
            "the tokenizer has levels 0, 1, but the priors given draw 1; give one for each",
        ),
        (sample.main, "--prior top top", "the priors given draw 0, 0"),
        (sample.main, "--prior", "--prior needs at least one prior"),
        (inpaint.main, "--prior top --image a --mask b", "but the priors given draw 0; give one for each"),
        (
            train_prior.main,
            f"{TRAIN} --prior pixelcnn --layers 2 --level 0 --init bottom --out never",
            "bottom is a prior of level 1, but this one is of level 0; give --init one of that level",
        ),
        (train_prior.main, f"{TRAIN} --level 2 --out never", "has levels 0 to 1; --level 2 is not one of them"),
    ],
)
def test_priors_that_make_no_model_are_refused_in_one_line(place, capfd, main, flags, message):
    assert run(main, *flags.split()) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_functions_of_the_library_need_one_prior_for_each_level(place):
    priors, _ = load_priors(("top", "bottom"), None)
    pixels, mask = torch.zeros(3, 4, 4, dtype=torch.uint8), torch.eye(4, dtype=torch.bool)
    for wrong, levels in ((priors[0], "0"), (priors[1:], "1"), ([priors[0]] * 2, "0, 0")):
        with pytest.raises(UserError, match=f"the tokenizer has levels 0, 1, but the priors given draw {levels};"):
            smalti.sample(wrong, num=1)
        with pytest.raises(UserError, match=f"the tokenizer has levels 0, 1, but the priors given draw {levels};"):
            smalti.inpaint(wrong, pixels, mask)
    assert torch.equal(smalti.sample(priors, num=2), smalti.sample(priors[::-1], num=2))
    few = smalti.sample(priors, num=2, sampling=SundaeSampling(steps=1, proportion=(0.1, 0.1)))
    assert not torch.equal(few, smalti.sample(priors, num=2))
    with pytest.raises(UserError, match=r"does not fit the prior; give SundaeSampling or AncestralSampling"):
        smalti.sample(priors, num=1, sampling=MaskedSampling())


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((Level(2, 2, channels=3), Level(4, 4, (3,))), "holds real-valued latents"),
        (
            (Level(2, 2, (3,)), Level(4, 6, (3,))),
            "2x2 and 4x6, are not one a whole multiple of the other; give a lower --level",
        ),
        ((Level(3, 3, (3,)), Level(4, 4, (3,))), "3x3 and 4x4, are not"),
    ],
)
def test_levels_that_no_prior_learns_are_refused(levels, message):
    with pytest.raises(UserError, match=message):
        grids(levels, 1)


def enumerated_bits(prior, upper=()):
    """Returns -log2 p of every grid, as the product over positions of the head's enumerated probabilities."""
    level, size = prior.level, prior.level.codebook_size
    grids = torch.tensor(list(itertools.product(range(size), repeat=level.positions)))
    coarser = tuple(codes.expand(len(grids), -1, -1) for codes in upper)
    table = log_probs(prior.head, prior.features(grids.view(-1, level.height, level.width), upper=coarser))
    return -table.gather(-1, grids[..., None])[..., 0].double().sum(-1) / math.log(2)


@torch.no_grad()
def test_bits_per_code_are_those_of_enumerated_probabilities(tmp_path):
    torch.manual_seed(0)
    layout = Layout((Level(1, 2, (3,)), Level(2, 4, (2,))))
    upper, lower = torch.randint(3, (10, 1, 2)), torch.randint(2, (10, 2, 4))
    numbers = torch.arange(10)
    columns = {"labels": numbers * 0 - 1, "source_ids": numbers, "held_out": numbers % 3 == 0, "flipped": numbers < 0}
    provenance = Provenance("none", {}, "", "none", "none", "", {"height": 4, "width": 8, "channels": 3})
    with LatentSetWriter(tmp_path / "set.h5", layout, **columns, provenance=provenance) as writer:
        writer.write(0, (upper, lower))
    sizes = {"model_width": 8, "layers": 2}
    top = PixelCNN(PixelCNNConfig(1, 2, (3,), **sizes)).eval()
    bottom = PixelCNN(PixelCNNConfig(2, 4, (2,), upper_radices=((3,),), upper_factors=(2,), **sizes)).eval()
    bits = count_bits([top, bottom], LatentSet(tmp_path / "set.h5"), batch_size=3)
    rows = numbers[numbers % 3 == 0].tolist()
    powers = 2 ** torch.arange(7, -1, -1)
    top_bits = torch.stack([enumerated_bits(top)[upper[row].flatten() @ torch.tensor([3, 1])] for row in rows])
    bottom_bits = torch.stack([enumerated_bits(bottom, (upper[row],))[lower[row].flatten() @ powers] for row in rows])
    assert bits.rows == 4
    assert bits.per_code == pytest.approx((float(top_bits.mean()) / 2, float(bottom_bits.mean()) / 8), abs=1e-5)
    errors = (float(top_bits.std()) / 2 / 2, float(bottom_bits.std()) / 2 / 8)
    assert bits.standard_errors == pytest.approx(errors, abs=1e-5)
    assert bits.per_dimension == pytest.approx(float((top_bits + bottom_bits).mean()) / 96, abs=1e-6)
    other = count_bits([top, bottom], LatentSet(tmp_path / "set.h5"), split="train", batch_size=100)
    assert other.rows == 6
    assert other.per_code != bits.per_code
    sundae = Hourglass(HourglassConfig(1, 2, (3,), model_width=8, heads=1, depth=(1,), shorten=()))
    for priors, message in (
        ([sundae, bottom], "a hourglass has no exact likelihood of codes"),
        ([top], r"has 2 level\(s\), but 1 priors are given"),
        ([top, top], r"not for codes of \(2,\)"),
    ):
        with pytest.raises(UserError, match=message):
            count_bits(priors, LatentSet(tmp_path / "set.h5"))


def test_bits_of_another_tokenizers_codes_are_refused(tmp_path):
    layout, numbers = Layout((Level(1, 2, (3,)),)), torch.arange(10)
    columns = {"labels": numbers * 0 - 1, "source_ids": numbers, "held_out": numbers % 3 == 0, "flipped": numbers < 0}
    provenance = Provenance("hrvq", {}, "ab" * 32, "none", "none", "", {"height": 4, "width": 8, "channels": 3})
    with LatentSetWriter(tmp_path / "set.h5", layout, **columns, provenance=provenance) as writer:
        writer.write(0, (torch.randint(3, (10, 1, 2)),))
    latents = LatentSet(tmp_path / "set.h5")
    prior = PixelCNN(PixelCNNConfig(1, 2, (3,), model_width=8, layers=2)).eval()
    bits = count_bits([prior], latents)  # the prior records no tokenizer
    tokenizer = untrained_pair()[1]
    prior.provenance["tokenizer_digest"] = tokenizer.digest()
    for options in ({}, {"tokenizer": tokenizer}):
        with pytest.raises(
            UserError, match=f"codes of the tokenizer {tokenizer.digest()[:12]}, but .* of abababababab"
        ):
            count_bits([prior], latents, **options)
    tokenizer.provenance[SAME_CODES] = {"code_digest": tokenizer.code_digest(), "digests": ["ab" * 32]}
    assert count_bits([prior], latents, tokenizer=tokenizer) == bits
    prior.provenance["tokenizer_digest"] = "ab" * 32
    assert count_bits([prior], latents) == bits


def test_saved_prior_has_its_level(place):
    assert load("bottom", "prior").provenance["level"] == 1


@torch.no_grad()
def test_hourglass_is_conditioned_on_coarser_levels_with_and_without_guidance():
    torch.manual_seed(0)
    config = HourglassConfig(4, 4, (3,), classes=2, upper_radices=((5,),), upper_factors=(2,), model_width=16, heads=2)
    prior, codes, upper = Hourglass(config).eval(), torch.randint(3, (1, 4, 4)), torch.randint(5, (1, 2, 2))
    features = prior.features(codes, upper=(upper,))
    for y, x in itertools.product(range(2), repeat=2):
        other = upper.clone()
        other[0, y, x] = (upper[0, y, x] + 1) % 5
        changed = (prior.features(codes, upper=(other,)) - features).abs().amax(-1).view(4, 4) > 1e-4
        assert changed[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].all()
    prior.head.weight.mul_(30)
    samples = {}
    for guidance, coarser in itertools.product((1.0, 3.0), (upper, (upper + 1) % 5)):
        samples[guidance, coarser] = prior.method.sampler(
            prior,
            known=codes.repeat(3, 1, 1),
            known_mask=torch.zeros(3, 4, 4, dtype=torch.bool),
            seeds=row_seeds(0, torch.arange(3)),
            condition=torch.full((3,), -1),  # without a class both branches of guidance are equal
            upper=(coarser.repeat(3, 1, 1),),
            sampling=SundaeSampling(steps=3, guidance=guidance),
        )
    plain, plain_with_other_codes, guided, guided_with_other_codes = samples.values()
    assert torch.equal(plain, guided)
    assert torch.equal(plain_with_other_codes, guided_with_other_codes)
    assert not torch.equal(plain, plain_with_other_codes)
