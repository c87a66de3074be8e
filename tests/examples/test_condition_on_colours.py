"""The example of conditioning on vectors at toy size: from images to samples and fills, and what is refused."""

import json

import numpy as np
import pytest
import torch
from helpers.build_toys import FLAGS, one_thread, save_tokenizer, write_images
from helpers.command_toys import example, run
from PIL import Image

from smalti import LatentSet, UserError, inpaint, load_prior, sample
from smalti.app.session import Session
from smalti.evaluation.code_likelihood import count_bits
from smalti.latentsets.conditions import add_conditions
from smalti.scripts import build_latents, train_prior
from smalti.scripts import inpaint as inpaint_command
from smalti.scripts import sample as sample_command

TRAIN = [
    "--latents",
    "colours/latents.h5",
    "--batch-size",
    "8",
    "--model-width",
    "16",
    "--precision",
    "fp32",
    "--sheet-samples",
    "4",
]
VECTORS = np.linspace(0, 1, 24).reshape(2, 12)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    write_images(tmp_path / "img", 40)
    save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "colours_of_test.py").write_text("from helpers.command_toys import example\n")
    with (tmp_path / "colours_of_test.py").open("a") as file:
        file.write('mean_colours = example("condition_on_colours").mean_colours\n')
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield tmp_path


def test_quarters_are_averaged():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.uint8).view(2, 3, 4, 6)
    expected = [
        images[1, c, y : y + 2, x : x + 3].double().mean() / 255 for y in (0, 2) for x in (0, 3) for c in range(3)
    ]
    assert np.allclose(example("condition_on_colours").mean_colours(images)[1], expected)


def test_commands_condition_on_vectors_from_images_to_fills(folder, capfd):
    def refused(main, *arguments):
        status, _, error = run(capfd, main, *arguments)
        assert status == 2
        return error.strip().splitlines()[-1]

    build = [*FLAGS, "--no-flips", "--conditions", "colours_of_test:mean_colours", "--out", "colours/latents.h5"]
    status, shown, error = run(capfd, build_latents.main, *build)
    assert status == 0, error
    assert "a vector of 12 numbers for each row, from colours_of_test:mean_colours, SHA-256" in shown
    without = [flag for flag in build if flag != "--conditions" and not flag.startswith("colours_of")]
    assert "already holds these codes" in run(capfd, build_latents.main, *without)[1]  # its vectors are kept

    for kind, flags in (("pixelcnn", ["--layers", "2"]), ("hourglass", ["--heads", "2", "--depth", "1", "1", "1"])):
        training = ["--prior", kind, *TRAIN, *flags, "--condition", "vector", "--steps", "2", "--out", "colours/prior"]
        status, _, error = run(capfd, train_prior.main, *training, "--resume", "never")
        assert status == 0, error
        if kind == "pixelcnn":
            latents, prior = LatentSet("colours/latents.h5"), load_prior("colours/prior")
            bits = count_bits([prior], latents)
            logged = json.loads((folder / "colours/prior/metrics.jsonl").read_text().splitlines()[-1])
            assert bits.per_code[0] == pytest.approx(logged["held_out_bits_per_code"], rel=1e-4)
            prior.of_vector.out.weight.data.normal_()
            assert count_bits([prior], latents).per_code != bits.per_code  # the vectors are used
    assert (folder / "colours/prior/samples.png").exists()
    example("condition_on_colours").main("colours", guidances=(1.0, 2.0), num=2)
    assert (folder / "colours/guidance.png").exists()
    losses = json.loads(capfd.readouterr().out.replace("'", '"'))
    assert [*losses] == ["right", "shuffled", "none"]

    np.save("two.npy", VECTORS)
    np.save("narrow.npy", VECTORS[:, :5])
    drawing = ["--prior", "colours/prior", "--num", "5", "--steps", "2", "--precision", "fp32", "--conditions"]
    status, _, error = run(capfd, sample_command.main, *drawing, "two.npy", "--files", "--out", "drawn.png")
    assert status == 0, error
    prior = load_prior("colours/prior")
    sampling = prior.method.sampling(steps=2)
    images = sample(prior, num=5, conditions=VECTORS[[0, 1, 0, 1, 0]], sampling=sampling, precision="fp32")
    assert np.array_equal(np.array(Image.open("drawn/3.png")), images[3].permute(1, 2, 0))
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save("mask.png")
    filling = ["--prior", "colours/prior", "--image", "img/0000.png", "--mask", "mask.png", "--candidates", "2"]
    filling += ["--steps", "2", "--precision", "fp32", "--out", "fill.png"]
    assert run(capfd, inpaint_command.main, *filling, "--conditions", "two.npy")[0] == 0
    mask = torch.eye(8).bool()
    assert inpaint(prior, Image.open("img/0000.png"), mask, num=1, conditions=torch.ones(1, 12)).shape == (1, 3, 8, 8)

    assert "the prior was trained on 12" in refused(sample_command.main, *drawing, "narrow.npy", "--out", "x.png")
    assert "cannot be read" in refused(inpaint_command.main, *filling, "--conditions", "none.npy", "--overwrite")
    one = [*drawing[:2], "--classes", "cats", "--out", "x.png"]
    assert "conditioned on vectors, not on classes" in refused(sample_command.main, *one)
    with pytest.raises(UserError, match="has vectors of 5 numbers"):
        sample(prior, num=1, conditions=VECTORS[:, :5])
    Session("colours/prior", None, "cpu", "fp32")
    assert "conditioned on vectors; the page draws and fills without them" in capfd.readouterr().err
    realnvp = ["--prior", "realnvp", "--latents", "colours/latents.h5", "--condition", "vector"]
    assert "--prior realnvp is conditioned on nothing; leave --condition out" in refused(train_prior.main, *realnvp)
    run(capfd, build_latents.main, *without[:-1], "plain.h5")
    plain = [*TRAIN[2:], "--heads", "2", "--condition", "vector", "--out", "p", "--latents", "plain.h5"]
    assert "plain.h5 has no vectors for --condition vector" in refused(train_prior.main, *plain)
    added = add_conditions(
        LatentSet("plain.h5"), LatentSet("colours/latents.h5").vectors(range(40)), "plain.h5", "colours"
    )
    assert added.content_digest == LatentSet("colours/latents.h5").content_digest
