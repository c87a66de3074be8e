"""The commands with HQA: training layer by layer, resuming within a layer, latent sets, priors on 1x1 grids, and
compression to files.
"""

import json
import shutil
import signal

import numpy as np
import pytest
import torch
from helpers.build_toys import trained_in
from helpers.command_toys import run
from PIL import Image

from smalti.core.codes import Layout, Level
from smalti.core.errors import UserError
from smalti.core.models import load
from smalti.core.randomness import derive, row_seeds
from smalti.images.decoding import to_float, to_uint8
from smalti.images.image_set import ImageRows, open_images
from smalti.latentsets.packed_file import bits_per_image, read_codes, write_codes
from smalti.latentsets.reader import LatentSet
from smalti.metrics.image_errors import mse
from smalti.scripts import build_latents, compress, sample, train_prior, train_tokenizer
from smalti.tokenizers.hqa import feature_cache
from smalti.tokenizers.hqa.feature_cache import with_feature_cache
from smalti.training.accelerator import accelerator
from smalti.training.run_folder import METRICS_NAME, RUN_NAME, Run

LAYERS = "--tokenizer hqa --widths 4 4 4 --residual-blocks 1 --codebook-size 5 --code-width 4 --height 8 --width 8"
FIT = "--steps 6 --batch-size 8 --save-steps 2 --report-steps 6 --log-steps 1 --precision fp32 --images img"
TRAIN = f"{LAYERS} {FIT}".split()
HQA = "runs/tokenizers/hqa"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained HQA of three layers in a folder of its own, the current one."""
    with trained_in(tmp_path_factory.mktemp("hqa"), TRAIN, images=30) as folder:
        yield folder


def weights(folder, run):
    return load(folder / run, "tokenizer").state_dict()


def test_every_layers_folder_holds_a_tokenizer_of_the_layers_so_far(folder):
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
def test_a_run_stopped_within_a_layer_resumes_to_the_same_weights(folder, capfd, monkeypatch, stopped_in):
    """Ctrl-C stops the run in the middle of that layer; the layers before it are finished and stay."""
    out = folder / f"stopped{stopped_in}"
    stop_in = (out / stopped_in).resolve()
    log = Run.log  # the loop calls it at each step

    def interrupting(self, step, values):
        log(self, step, values)
        if self.folder.resolve() == stop_in and step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "log", interrupting)
    status, _, err = run(capfd, train_tokenizer.main, *TRAIN, "--out", out)
    assert status == 130, err
    monkeypatch.setattr(Run, "log", log)
    before = {path: path.stat().st_mtime_ns for path in out.glob("layer-*/model.safetensors")}
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", out)[0] == 0
    ours, theirs = weights(folder, out), weights(folder, HQA)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    finished = [path for path in before if path.parent.resolve() != stop_in]
    assert all(path.stat().st_mtime_ns == before[path] for path in finished)
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", out)[1].count("is finished: 6 steps") == 3


def test_the_feature_cache_does_not_change_training(folder, capfd, monkeypatch):
    """Features of frozen layers are cached if they fit into memory; else they are computed at each step."""
    rows = ImageRows(open_images("img", height=8, width=8), split="train", flips=True)
    lower, process = load(folder / HQA / "layer-2", "tokenizer"), accelerator("fp32")
    batch = with_feature_cache(lower, rows, process).__getitems__([5, 0, 5, 4])
    assert batch["features"].allclose(lower.features(to_float(batch["images"])), atol=1e-5)
    plain = rows.__getitems__([5, 0, 5, 4])
    assert all(batch[name].equal(plain[name]) for name in plain)
    assert batch.keys() == {*plain, "features"}
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 0)
    assert with_feature_cache(lower, rows, process) is rows
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", "each-step")[0] == 0
    ours, theirs = weights(folder, "each-step"), weights(folder, HQA)
    assert all(ours[name].allclose(theirs[name], atol=1e-4) for name in theirs)


def test_settings_of_upper_layers_are_refused_before_lower_ones_are_trained(folder, capfd):
    command = [*TRAIN, "--out", folder / "tall", "--height", "12"]
    status, _, err = run(capfd, train_tokenizer.main, *command)
    assert (status, "images of 12x8 are not divisible by 8, the downsampling of 3 layers" in err) == (2, True)
    assert not (folder / "tall").exists()


def test_each_layer_can_have_its_own_number_of_steps(folder, capfd):
    out = folder / "own"
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-steps", "1", "3", "2")[0] == 0
    runs = [out / "layer-1", out / "layer-2", out]
    assert [json.loads((each / METRICS_NAME).read_text().splitlines()[-1])["step"] for each in runs] == [1, 3, 2]
    status, _, err = run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-steps", "1", "3")
    assert (status, "--layer-steps names 2 layers, but hqa has 3; give one number for each layer, or none" in err) == (
        2,
        True,
    )
    status, _, err = run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-steps", "1", "0", "2")
    assert (status, "--layer-steps must be at least 1 each" in err) == (2, True)


def test_each_layer_can_have_its_own_batch_size(folder, capfd):
    out = folder / "sizes"
    sizes = ["--layer-batch-sizes", "2", "4", "8"]
    assert run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--steps", "1", *sizes)[0] == 0
    runs = [json.loads((each / RUN_NAME).read_text())["settings"] for each in (out / "layer-1", out / "layer-2", out)]
    assert [settings["batch_size"] for settings in runs] == [2, 4, 8]
    status, _, err = run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-batch-sizes", "2", "4")
    assert (status, "--layer-batch-sizes names 2 layers, but hqa has 3" in err) == (2, True)
    status, _, err = run(capfd, train_tokenizer.main, *TRAIN, "--out", out, "--layer-batch-sizes", "2", "4", "-8")
    assert (status, "--layer-batch-sizes must be from 1 to" in err) == (2, True)


def test_only_the_last_layer_trains_on(folder, capfd):
    """The upper layers were trained on the features of the lower ones, so a refusal must leave those as they are."""
    out = folder / "longer"
    command = [*TRAIN, "--widths", "4", "4", "--out", out]
    assert run(capfd, train_tokenizer.main, *command)[0] == 0
    lower = weights(folder, out / "layer-1")
    status, _, err = run(capfd, train_tokenizer.main, *command, "--steps", "8")
    assert status == 2
    assert "give --layer-steps with 6 for it" in err
    assert all(tensor.equal(lower[name]) for name, tensor in weights(folder, out / "layer-1").items())
    status, printed, _ = run(capfd, train_tokenizer.main, *command)
    assert (status, "6 steps. Give more --layer-steps for the last layer" in printed) == (0, True)
    assert run(capfd, train_tokenizer.main, *command, "--layer-steps", "6", "8")[0] == 0
    assert json.loads((out / METRICS_NAME).read_text().splitlines()[-1])["step"] == 8
    assert run(capfd, train_tokenizer.main, *command, "--steps", "8", "--resume", "never")[0] == 0


def test_resume_never_forgets_the_upper_layers_at_once(folder, capfd, monkeypatch):
    """After an interruption, the same command without it trains the rest."""
    out = folder / "anew"
    command = [*TRAIN, "--widths", "4", "4", "--out", out]
    assert run(capfd, train_tokenizer.main, *command)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("smalti.commands.train_tokenizer.load_tokenizer", lambda _: pytest.fail("the second layer began"))
        with pytest.raises(pytest.fail.Exception):
            run(capfd, train_tokenizer.main, *command, "--seed", "1", "--resume", "never")
    assert not (out / METRICS_NAME).exists()
    assert run(capfd, train_tokenizer.main, *command, "--seed", "1")[0] == 0
    assert json.loads((out / RUN_NAME).read_text())["settings"]["seed"] == 1


def test_a_layer_does_not_resume_on_other_lower_layers(folder, capfd):
    out = folder / "others"
    command = [*TRAIN, "--widths", "4", "4", "--out", out]
    assert run(capfd, train_tokenizer.main, *command)[0] == 0
    shutil.rmtree(out / "layer-1")
    status, _, err = run(capfd, train_tokenizer.main, *command, "--layer-steps", "2", "6")
    assert status == 2
    assert "holds a run with lower layers with the digest" in err


def test_priors_learn_and_sample_codes_of_one_position(folder, capfd):
    status, printed, _ = run(capfd, build_latents.main, "--tokenizer", "hqa", "--workers", "0", "--device", "cpu")
    assert (status, "1×1 of 5" in printed) == (0, True)
    codes = LatentSet(folder / "runs/latents/hqa.h5").batch(range(60))[0]
    assert codes.shape == (60, 1, 1)
    flags = "--steps 3 --batch-size 8 --model-width 16 --latents runs/latents/hqa.h5 --precision fp32"
    for prior, more in (("hourglass", "--heads 2 --depth 1 1 1"), ("pixelcnn", "--layers 1")):
        assert run(capfd, train_prior.main, "--prior", prior, *flags.split(), *more.split())[0] == 0
        status, printed, err = run(capfd, sample.main, "--prior", prior, "--num", "4", "--out", f"{prior}.png")
        assert status == 0, err
        assert Image.open(folder / f"{prior}.png").width > 0


def test_a_lower_layers_codes_are_stored_at_their_own_resolution(folder, capfd):
    flags = ["--tokenizer", "hqa", "--workers", "0", "--device", "cpu", "--no-flips"]
    status, printed, _ = run(capfd, build_latents.main, *flags, "--layer", "2")
    assert (status, "2×2 of 5" in printed) == (0, True)
    stored = LatentSet(folder / "runs/latents/hqa-layer-2.h5")
    images = to_float(open_images("img", height=8, width=8).pixels(range(30)))
    assert stored.batch(range(30))[0].equal(load(HQA, "tokenizer").encode(images, layer=2)[0])
    assert stored.provenance.tokenizer_source == f"{HQA}/layer-2"
    for wrong in ("0", "4"):
        status, _, err = run(capfd, build_latents.main, *flags, "--layer", wrong)
        assert (status, err) == (2, f"error: hqa has layers 1 to 3; there is no layer {wrong}\n")


@pytest.mark.parametrize(("layer", "bits"), [(None, 3), (1, 4 * 4 * 3)])
def test_compressed_files_have_the_printed_rate_and_decode(folder, capfd, layer, bits):
    layer_flags = ["--layer", str(layer)] if layer else []
    status, printed, err = run(
        capfd, compress.main, "--images", "img", *layer_flags, "--out", "x.smalti", "--device", "cpu"
    )
    assert status == 0, err
    payload = -(-30 * bits // 8)
    header, _, body = (folder / "x.smalti").read_bytes().partition(b"\n")
    assert len(body) == payload
    assert (
        f"rate: {bits} bits an image, {bits / 64:.4g} a pixel; {payload} bytes of codes, {len(header) + 1} of"
        in printed
    )
    tokenizer, images = load(HQA, "tokenizer"), to_float(open_images("img", height=8, width=8).pixels(range(30)))
    codes = tokenizer.encode(images, layer)
    with torch.no_grad():
        decoded = tokenizer.decode(codes, layer=layer)
        errors = mse(to_float(to_uint8(decoded)), images)  # as evaluate.py computes them
    assert f"MSE {errors.mean():.4g}, PSNR {(-10 * errors.log10()).mean():.2f} dB" in printed
    flags = ["--codes", "x.smalti", "--out", f"back-{layer}", "--decodes", "2", "--device", "cpu"]
    status, printed, err = run(capfd, compress.main, *flags)
    assert (status, f"30 image(s) of {bits} bits each" in printed) == (0, True), err
    assert len(list((folder / f"back-{layer}").glob("*.png"))) == 3 * 30
    sampled = tokenizer.decode(codes, layer=layer, seeds=derive(row_seeds(0, torch.arange(30)), 2)).detach()
    for suffix, expected in (("", decoded), ("-sample-2", sampled)):
        picture = np.asarray(Image.open(folder / f"back-{layer}" / f"0007{suffix}.png"))
        assert np.array_equal(picture, to_uint8(expected)[7].permute(1, 2, 0).numpy())


def test_damaged_and_foreign_files_are_refused_in_one_line(folder, capfd):
    assert run(capfd, compress.main, "--images", "img", "--out", "whole.smalti")[0] == 0
    whole = (folder / "whole.smalti").read_bytes()
    other = json.loads(whole.partition(b"\n")[0].split(b" ", 3)[3])
    damages = {
        "cut.smalti": (whole[:-1], "damaged: 12 bytes of codes should follow"),
        "longer.smalti": (whole + b"x", "damaged"),
        "flipped.smalti": (whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:], "damaged"),
        "header.smalti": (whole[:40], "not a whole file of packed codes"),
        "foreign.smalti": (b"PNG and other things", "not a whole file of packed codes"),
        "model.smalti": (whole.replace(other["tokenizer_digest"].encode(), b"0" * 64), "damaged: its header"),
    }
    for name, (content, message) in damages.items():
        (folder / name).write_bytes(content)
        status, _, err = run(capfd, compress.main, "--codes", name)
        assert (status, err.count("\n"), message in err) == (2, 1, True), err
    for flags, message in (
        (["--codes", "none.smalti"], "No such file"),
        (["--codes", "whole.smalti", "--decodes", "-1"], "must not be negative"),
        (["--images", "img", "--layer", "9"], "no layer 9"),
    ):
        status, _, err = run(capfd, compress.main, *flags)
        assert (status, message in err) == (2, True), err


@pytest.mark.parametrize("radices", [((2,),), ((3, 3),), ((256,),), ((5,), (1000,))])
def test_packed_codes_take_whole_bits_and_read_back_exactly(tmp_path, radices):
    layout = Layout(tuple(Level(2**level, 3, each) for level, each in enumerate(radices)))
    random = np.random.default_rng(0)
    codes = tuple(
        torch.from_numpy(random.integers(0, level.codebook_size, (7, *level.shape))) for level in layout.levels
    )
    expected = sum(level.positions * (level.codebook_size - 1).bit_length() for level in layout.levels)
    assert bits_per_image(layout) == expected
    size = write_codes(tmp_path / "x", codes, layout, {"by": "a test"})
    assert size - len((tmp_path / "x").read_bytes().partition(b"\n")[0]) - 1 == -(-7 * expected // 8)
    headers = []
    packed = read_codes(tmp_path / "x", headers.append)
    assert all(a.equal(b) for a, b in zip(packed.codes, codes, strict=True))
    assert (packed.layout, packed.header["by"], packed.size_bytes) == (layout, "a test", size)
    assert headers == [packed.header]
    with pytest.raises(UserError, match="real-valued latents, which have no fixed rate"):
        bits_per_image(Layout((Level(1, 1, channels=3),)))
