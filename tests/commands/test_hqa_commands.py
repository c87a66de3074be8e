"""HQA from images to samples by the commands: trained layer by layer, stopped within and between layers, stored, drawn
from by priors on 1x1 grids, and compressed to files.
"""

import json
import signal

import numpy as np
import pytest
import torch
from helpers.build_toys import trained_in
from helpers.command_toys import run
from PIL import Image

from smalti import load
from smalti.commands import feature_cache
from smalti.commands.feature_cache import with_given
from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.core.randomness import derive, row_seeds
from smalti.images.decoding import to_float, to_uint8
from smalti.images.image_set import ImageRows, open_images
from smalti.latentsets.packed_file import bits_per_image, read_codes, write_codes
from smalti.latentsets.reader import LatentSet
from smalti.metrics.image_errors import mse
from smalti.scripts import build_latents, compress, sample, train_prior, train_tokenizer
from smalti.training.accelerator import accelerator
from smalti.training.run_folder import METRICS_NAME, RUN_NAME, Run

LAYERS = "--tokenizer hqa --widths 4 4 4 --residual-blocks 1 --codebook-size 5 --code-width 4 --height 8 --width 8"
FIT = "--steps 6 --batch-size 8 --save-steps 2 --report-steps 6 --log-steps 1 --precision fp32 --images img"
TRAIN = f"{LAYERS} {FIT}".split()
HQA = "runs/tokenizers/hqa"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained HQA of three layers, in a folder of its own, which is the current one."""
    with trained_in(tmp_path_factory.mktemp("hqa"), TRAIN, images=30) as folder:
        yield folder


def weights(folder, of):
    return load(folder / of, "tokenizer").state_dict()


def test_every_layer_is_a_tokenizer_whose_layers_are_those_below(folder):
    whole = weights(folder, HQA)
    for number in (1, 2):
        part = load(folder / HQA / f"layer-{number}", "tokenizer")
        assert len(part.layers) == number
        assert all(tensor.equal(whole[name]) for name, tensor in part.state_dict().items())
        assert (folder / HQA / f"layer-{number}" / METRICS_NAME).exists()
    sheet = Image.open(folder / HQA / "reconstructions.png")
    lower = Image.open(folder / HQA / "layer-1" / "reconstructions.png")
    assert sheet.height == 2 * lower.height  # the original and three layers; the original and one


@pytest.mark.parametrize("stopped_in", ["layer-1", "layer-2", "."])
def test_stopped_within_a_layer_it_goes_on_to_the_same(folder, capfd, monkeypatch, stopped_in):
    """By Ctrl-C in the middle of that layer; those before it are finished and stay."""
    out = folder / f"stopped{stopped_in}"
    stop_in = (out / stopped_in).resolve()
    log = Run.log  # the loop logs through it, at each step

    def interrupting(self, step, values):
        log(self, step, values)
        if self.folder.resolve() == stop_in and step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "log", interrupting)
    status, _, said = run(capfd, train_tokenizer.main, *TRAIN, "--out", out)
    assert status == 130, said
    monkeypatch.setattr(Run, "log", log)
    before = {path: path.stat().st_mtime_ns for path in out.glob("layer-*/model.safetensors")}
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", out)[0] == 0
    ours, theirs = weights(folder, out), weights(folder, HQA)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    finished = [path for path in before if path.parent.resolve() != stop_in]
    assert all(path.stat().st_mtime_ns == before[path] for path in finished)
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", out)[1].count("is finished: 6 steps") == 3


def test_features_of_frozen_layers_are_computed_once_if_they_fit(folder, capfd, monkeypatch):
    """And the training is the same as with those computed at each step."""
    rows = ImageRows(open_images("img", height=8, width=8), split="train", flips=True)
    below, process = load(folder / HQA / "layer-2", "tokenizer"), accelerator("fp32")
    batch = with_given(below, rows, process).__getitems__([5, 0, 5, 4])
    assert batch["given"].allclose(below.features(to_float(batch["images"])), atol=1e-5)
    plain = rows.__getitems__([5, 0, 5, 4])
    assert all(batch[name].equal(plain[name]) for name in plain)
    assert batch.keys() == {*plain, "given"}
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 0)
    assert with_given(below, rows, process) is rows
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", "each-step")[0] == 0
    ours, theirs = weights(folder, "each-step"), weights(folder, HQA)
    assert all(ours[name].allclose(theirs[name], atol=1e-4) for name in theirs)


def test_layers_may_have_steps_of_their_own(folder, capfd):
    out = folder / "own"
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-steps", "1", "3", "2")[0] == 0
    logs = [out / "layer-1", out / "layer-2", out]
    assert [json.loads((of / METRICS_NAME).read_text().splitlines()[-1])["step"] for of in logs] == [1, 3, 2]
    status, _, said = run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-steps", "1", "3")
    assert (status, "--layer-steps names 2 layers, but hqa has 3" in said) == (2, True)
    status, _, said = run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-steps", "1", "0", "2")
    assert (status, "layer_steps must be at least 1 each" in said) == (2, True)


def test_layers_may_have_images_a_step_of_their_own(folder, capfd):
    out = folder / "sizes"
    sizes = ["--layer-batch-sizes", "2", "4", "8"]
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--steps", "1", *sizes)[0] == 0
    runs = [json.loads((of / RUN_NAME).read_text())["settings"] for of in (out / "layer-1", out / "layer-2", out)]
    assert [settings["batch_size"] for settings in runs] == [2, 4, 8]
    status, _, said = run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-batch-sizes", "2", "4")
    assert (status, "--layer-batch-sizes names 2 layers, but hqa has 3" in said) == (2, True)
    status, _, said = run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-batch-sizes", "2", "4", "-8")
    assert (status, "layer_batch_sizes must be at least 1 each" in said) == (2, True)


def test_what_was_trained_on_other_layers_does_not_go_on(folder, capfd):
    """A layer below is trained on: those above it were not trained on that."""
    out = folder / "longer"
    assert run(capfd, train_tokenizer.main, *TRAIN, "--widths", "4", "4", "--out", out)[0] == 0
    longer = [*TRAIN, "--widths", "4", "4", "--out", out, "--steps", "8"]
    status, _, said = run(capfd, train_tokenizer.main, *longer)
    assert status == 2
    assert "below=" in said
    assert run(capfd, train_tokenizer.main, *longer, "--resume", "never")[0] == 0


def test_codes_of_one_position_are_stored_learned_and_drawn(folder, capfd):
    status, said, _ = run(capfd, build_latents.main, "--tokenizer", "hqa", "--workers", "0", "--device", "cpu")
    assert (status, "1×1 of 5" in said) == (0, True)
    codes = LatentSet(folder / "runs/latents/hqa.h5").batch(range(60))[0]
    assert codes.shape == (60, 1, 1)
    flags = "--steps 3 --batch-size 8 --model-width 16 --latents runs/latents/hqa.h5 --precision fp32"
    for prior, more in (("hourglass", "--heads 2 --depth 1 1 1"), ("pixelcnn", "--layers 1")):
        assert run(capfd, train_prior.main, "--prior", prior, *flags.split(), *more.split())[0] == 0
        status, said, wrong = run(capfd, sample.main, "--prior", prior, "--num", "4", "--out", f"{prior}.png")
        assert status == 0, wrong
        assert Image.open(folder / f"{prior}.png").width > 0


def test_another_layer_s_codes_are_stored_at_their_own_rate(folder, capfd):
    flags = ["--tokenizer", "hqa", "--workers", "0", "--device", "cpu", "--no-flips"]
    status, said, _ = run(capfd, build_latents.main, *flags, "--layer", "2")
    assert (status, "2×2 of 5" in said) == (0, True)
    stored = LatentSet(folder / "runs/latents/hqa-layer-2.h5")
    images = to_float(open_images("img", height=8, width=8).pixels(range(30)))
    assert stored.batch(range(30))[0].equal(load(HQA, "tokenizer").encode(images, layer=2)[0])
    assert stored.provenance.tokenizer_source == f"{HQA}/layer-2"
    for wrong in ("0", "4"):
        status, _, said = run(capfd, build_latents.main, *flags, "--layer", wrong)
        assert (status, said) == (2, f"error: hqa has layers 1 to 3; there is no layer {wrong}\n")


@pytest.mark.parametrize(("layer", "bits"), [(None, 3), (1, 4 * 4 * 3)])
def test_compressed_files_have_the_rate_they_say_and_come_back(folder, capfd, layer, bits):
    named = ["--layer", str(layer)] if layer else []
    status, said, wrong = run(capfd, compress.main, "--images", "img", *named, "--out", "x.smalti", "--device", "cpu")
    assert status == 0, wrong
    payload = -(-30 * bits // 8)
    header, _, body = (folder / "x.smalti").read_bytes().partition(b"\n")
    assert len(body) == payload
    assert (
        f"rate: {bits} bits an image, {bits / 64:.4g} a pixel; {payload} bytes of codes, {len(header) + 1} of" in said
    )
    tokenizer, images = load(HQA, "tokenizer"), to_float(open_images("img", height=8, width=8).pixels(range(30)))
    codes = tokenizer.encode(images, layer)
    with torch.no_grad():
        decoded = tokenizer.decode(codes, layer=layer)
        error = mse(decoded, images).mean()
    assert f"MSE {error:.4g}, PSNR {-10 * error.log10():.2f} dB" in said
    flags = ["--codes", "x.smalti", "--out", f"back-{layer}", "--decodes", "2", "--device", "cpu"]
    status, said, wrong = run(capfd, compress.main, *flags)
    assert (status, f"30 image(s) of {bits} bits each" in said) == (0, True), wrong
    assert len(list((folder / f"back-{layer}").iterdir())) == 3 * 30
    sampled = tokenizer.decode(codes, layer=layer, seeds=derive(row_seeds(0, torch.arange(30)), 2)).detach()
    for suffix, expected in (("", decoded), ("-sample-2", sampled)):
        picture = np.asarray(Image.open(folder / f"back-{layer}" / f"00007{suffix}.png"))
        assert np.array_equal(picture, to_uint8(expected)[7].permute(1, 2, 0).numpy())


def test_files_that_will_not_do_are_refused_in_one_line(folder, capfd):
    assert run(capfd, compress.main, "--images", "img", "--out", "whole.smalti")[0] == 0
    whole = (folder / "whole.smalti").read_bytes()
    other = json.loads(whole.partition(b"\n")[0].split(b" ", 3)[3])
    damages = {
        "cut.smalti": (whole[:-1], "damaged: 12 bytes of codes should follow"),
        "longer.smalti": (whole + b"x", "damaged"),
        "flipped.smalti": (whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], "damaged"),
        "header.smalti": (whole[:40], "not a whole file of packed codes"),
        "foreign.smalti": (b"PNG and other things", "not a whole file of packed codes"),
        "model.smalti": (whole.replace(other["tokenizer_digest"].encode(), b"0" * 64), "give --tokenizer the one"),
    }
    for name, (content, said) in damages.items():
        (folder / name).write_bytes(content)
        status, _, found = run(capfd, compress.main, "--codes", name)
        assert (status, found.count("\n"), said in found) == (2, 1, True), found
    for flags, said in (
        (["--codes", "none.smalti"], "not a file"),
        (["--codes", "whole.smalti", "--decodes", "-1"], "must not be negative"),
        (["--images", "img", "--layer", "9"], "no layer 9"),
    ):
        status, _, found = run(capfd, compress.main, *flags)
        assert (status, said in found) == (2, True), found


@pytest.mark.parametrize("radices", [((2,),), ((3, 3),), ((256,),), ((5,), (1000,))])
def test_packing_takes_whole_bits_and_gives_back_every_code(tmp_path, radices):
    layout = Layout(tuple(Level(2**level, 3, of) for level, of in enumerate(radices)))
    random = np.random.default_rng(0)
    codes = tuple(
        torch.from_numpy(random.integers(0, level.codebook_size, (7, *level.shape))) for level in layout.levels
    )
    expected = sum(level.positions * (level.codebook_size - 1).bit_length() for level in layout.levels)
    assert bits_per_image(layout) == expected
    size = write_codes(tmp_path / "x", codes, layout, {"by": "a test"})
    assert size - len((tmp_path / "x").read_bytes().partition(b"\n")[0]) - 1 == -(-7 * expected // 8)
    seen = []
    packed = read_codes(tmp_path / "x", seen.append)
    assert all(a.equal(b) for a, b in zip(packed.codes, codes, strict=True))
    assert (packed.layout, packed.header["by"], packed.size_bytes) == (layout, "a test", size)
    assert seen == [packed.header]
    with pytest.raises(UserError, match="real numbers"):
        bits_per_image(Layout((Level(1, 1, channels=3),)))
