"""The session and the page's functions: pictures equal those of the commands. Requests are in `test_server.py`."""

import threading
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from smalti.app import session as session_file
from smalti.app.server import _save
from smalti.app.session import Frame, Session, progress_text
from smalti.commands.inpaint import Inpaint, inpaint
from smalti.commands.inpainting import Filling
from smalti.commands.sample import Sample, sample
from smalti.core.errors import UserError
from smalti.images.masks import examples
from smalti.images.sheets import to_image

pytest.importorskip("gradio", reason="the page needs Gradio (the extra `app`)")
import gradio
from helpers.command_toys import save_pair
from helpers.page import picture

from smalti.app.page import (
    CANVAS_SIZE,
    _another_image,
    _Handlers,
    _ready,
    _slider_defaults,
    _stopped,
    _waiting,
    canvas_image,
    page,
    painted_mask,
)

SETTINGS = {"steps": 6, "temperature": (0.9, 0.5), "guidance": 2.0}


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """The folder of an untrained prior and its tokenizer."""
    folder = tmp_path_factory.mktemp("app") / "pair"
    save_pair(folder)
    return folder


@pytest.fixture
def session(prior, monkeypatch):
    monkeypatch.setattr(session_file, "SECONDS_BETWEEN_FRAMES", 0)
    return Session(str(prior), None, "cpu", "fp32")


def test_fills_equal_those_of_the_command(session, prior, tmp_path):
    pixels, mask = picture(), examples(16, 16)["box"]
    to_image(pixels).save(tmp_path / "in.png")
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    frames = list(session.inpaint(pixels, mask, num=2, seed=4, filling=Filling(candidates=2), **SETTINGS))
    config = Inpaint(
        sampling=session.prior.method.filling(**SETTINGS),
        image=tmp_path / "in.png",
        mask=tmp_path / "mask.png",
        filling=Filling(candidates=2),
        num=2,
        seed=4,
        prior=(str(prior),),
        device="cpu",
        precision="fp32",
        out=tmp_path / "out.png",
    )
    inpaint(config)
    for image, name in zip(frames[-1].images, ("out.png", "out-2.png"), strict=True):
        assert Image.open(tmp_path / name).tobytes() == image.tobytes()
    assert [frame.step for frame in frames] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert frames[1].images[0].tobytes() != frames[-1].images[0].tobytes()


def test_fills_have_the_transparency_and_the_profile_that_those_of_the_command_have(session, prior, tmp_path):
    mask, alpha = examples(16, 16)["box"], np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    soft = Image.fromarray(np.dstack([picture().permute(1, 2, 0).numpy(), alpha]))
    soft.save(tmp_path / "in.png", icc_profile=profile)
    Image.fromarray(mask.numpy()).save(tmp_path / "mask.png")
    names = {"image": tmp_path / "in.png", "mask": tmp_path / "mask.png", "out": tmp_path / "out.png"}
    sampling = session.prior.method.filling()
    config = Inpaint(sampling, num=1, seed=4, prior=(str(prior),), device="cpu", precision="fp32", **names)
    expected = Image.open(inpaint(config))
    handlers = _Handlers(session, partial(_save, tmp_path, {}))
    opened = handlers.open({"path": str(tmp_path / "in.png")})[0]
    paint = Image.fromarray(np.uint8(mask) * 255).resize((CANVAS_SIZE, CANVAS_SIZE), Image.Resampling.NEAREST)
    paint = Image.merge("RGBA", [paint] * 4)
    values = [1, 4, "any", *(default for *_, default in _slider_defaults(type(sampling)))]
    *_, (paths, _) = handlers.inpaint(opened, {"layers": [paint]}, *values)
    fill = Image.open(paths[0])
    assert (fill.mode, fill.info["icc_profile"]) == ("RGBA", profile)
    assert fill.tobytes() == expected.tobytes()


def test_samples_equal_those_of_the_command(session, prior, tmp_path):
    frames = list(session.sample(num=3, seed=4, **SETTINGS))
    sampling = session.prior.method.sampling(**SETTINGS)
    sample(
        Sample(
            sampling=sampling,
            prior=(str(prior),),
            num=3,
            seed=4,
            files=True,
            device="cpu",
            precision="fp32",
            out=tmp_path / "all.png",
        )
    )
    for number, image in enumerate(frames[-1].images):
        assert Image.open(tmp_path / "all" / f"{number}.png").tobytes() == image.tobytes()
    assert [frame.step for frame in frames] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert {frame.steps for frame in frames} == {6}
    assert (frames[0].images, frames[0].seconds_left, frames[-1].seconds_left) == (None, None, 0)
    assert all(frame.seconds_left > 0 for frame in frames[1:6])


def test_closing_the_frames_ends_the_work(session):
    before = set(threading.enumerate())
    frames = session.sample(num=1, seed=0, steps=100_000)
    next(frames)
    working = set(threading.enumerate()) - before
    assert working
    closing = threading.Thread(target=frames.close, daemon=True)  # joins the others
    closing.start()
    closing.join(60)  # seconds; the work would take an hour
    assert not [thread for thread in (closing, *working) if thread.is_alive()]


def test_closing_the_session_ends_the_work(session):
    frames = session.sample(num=1, seed=0, steps=100_000)
    next(frames)
    session.close()
    assert not [frame for frame in frames if frame.step == frame.steps]


def test_unfinished_fills_of_a_large_photo_are_small_and_finished_ones_are_not(session):
    """A portrait photo is shrunk as a whole; previews are at most 512 pixels high."""
    pixels, mask = torch.full((3, 1200, 900), 90, dtype=torch.uint8), torch.zeros(1200, 900).bool()
    mask[600:630, 400:440] = True
    frames = list(session.inpaint(pixels, mask, num=1, seed=0, filling=Filling(candidates=1), steps=2))
    size = session.working_size(1200, 900)
    assert (size.height, size.width) == (26, 20)  # four times the area of 8x16 pixels
    assert frames[1].images[0].size == (384, 512)
    assert frames[-1].images[0].size == (900, 1200)


@pytest.mark.parametrize(
    ("step", "seconds_left", "text"),
    [
        (0, None, "step 0 of 60"),
        (1, 0.2, "step 1 of 60, about 1 s left"),
        (2, 89.7, "step 2 of 60, about 90 s left"),
        (3, 200.0, "step 3 of 60, about 3 min left"),
        (60, 0.0, "step 60 of 60, almost finished"),
    ],
)
def test_progress_is_steps_and_time_left(step, seconds_left, text):
    assert progress_text(Frame(step, 60, None, seconds_left)) == text


def test_wrong_masks_and_settings_are_user_errors(session):
    nothing, everything = torch.zeros(16, 16).bool(), torch.ones(16, 16).bool()
    for mask, message in ((nothing, "nothing is masked yet"), (everything, "the whole image is masked")):
        with pytest.raises(UserError, match=message):
            session.inpaint(picture(), mask, num=1, seed=0, filling=Filling())
    with pytest.raises(UserError, match="temperature must be at least"):
        session.sample(num=1, seed=0, temperature=(0.0, 1.0))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (30, 900), (700, 40)])
def test_painted_area_becomes_the_mask(height, width):
    """Painting over the left half of the canvas masks the left half of the image; an empty layer masks nothing."""
    canvas = canvas_image(torch.zeros(3, height, width, dtype=torch.uint8))
    assert max(canvas.size) == CANVAS_SIZE
    layer = Image.new("RGBA", canvas.size)
    layer.paste((255, 0, 0, 255), (0, 0, canvas.width // 2, canvas.height))
    mask = painted_mask([layer], height, width)
    assert mask.shape == (height, width)
    left_half = torch.arange(width) < width / 2
    wrong = (mask != left_half).any(0).nonzero().flatten()
    assert ((wrong - width / 2).abs() <= 1 + width / canvas.width).all()  # pixels at the edge are half painted
    assert not painted_mask([Image.new("RGBA", canvas.size)], height, width).any()


def test_a_stroke_too_thin_for_any_pixel_is_named():
    """Pixels of an image of 32x32 are 16 wide on the canvas, and the thinnest brush is 1."""
    layer = Image.new("RGBA", (CANVAS_SIZE, CANVAS_SIZE))
    layer.paste((255, 0, 0, 255), (100, 100, 300, 104))
    with pytest.raises(UserError, match="take a larger brush"):
        painted_mask([layer], 32, 32)


def test_a_bad_upload_is_named_and_leaves_the_photo_and_the_painting(prior):
    handlers = _Handlers(Session(str(prior), None, "cpu", "fp32"), lambda *_: [])
    outputs = handlers.open({"path": __file__, "orig_name": "my *photo* <1>.png"})
    assert (*outputs[:2], *outputs[3:]) == (gradio.skip(),) * 4
    assert outputs[2].startswith('<p class="message problem" role="alert">my *photo* &lt;1&gt;.png was not opened')


def test_opening_another_image_removes_the_fills_and_their_message(prior, tmp_path):
    to_image(picture()).save(tmp_path / "in.png")
    handlers = _Handlers(Session(str(prior), None, "cpu", "fp32"), lambda *_: [])
    (pixels, path), canvas, opened, fills_message, fills = handlers.open({"path": str(tmp_path / "in.png")})
    assert (pixels == picture()).all()
    assert path == str(tmp_path / "in.png")
    assert max(canvas.size) == CANVAS_SIZE
    assert "in.png will be filled at" in opened
    assert 'role="status"></p>' in fills_message
    assert fills == []


def test_files_of_pictures_that_are_no_longer_shown_are_deleted(session, tmp_path, monkeypatch):
    """They are in Gradio's cache, which is removed only when the server stops."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    handlers = _Handlers(session, lambda *_, **_settings: [str(tmp_path / "saved.png")])
    frames = [Frame(step, 3, [Image.new("RGB", (4, 4), (step, 0, 0))], 1.0) for step in (1, 2, 3)]

    def files():
        return {str(path) for path in tmp_path.rglob("*.png")}

    stopped = handlers._outputs(iter(frames), "fill", {})
    shown = [next(stopped)[0] for _ in range(2)]
    assert files() == {*shown[0], *shown[1]}
    stopped.close()
    assert files() == set(shown[1])  # which stays on the page
    *_, (pictures, _) = handlers._outputs(iter(frames), "fill", {})
    assert pictures == [str(tmp_path / "saved.png")]
    assert not files()


def test_clearing_the_canvas_keeps_the_image(session):
    handlers = _Handlers(session, lambda *_: [])
    assert handlers.clear((picture(), "in.png")).tobytes() == canvas_image(picture()).tobytes()
    assert handlers.clear(None) == gradio.skip()


def test_buttons_before_during_and_after_work():
    """One button starts work and is off during it; Stop is off before and after it, and stays on after a click."""
    assert [button.interactive for button in _waiting()[1:]] == [False, True]
    assert [button.interactive for button in _ready()] == [True, False]
    assert [button.interactive for button in _stopped()[1:]] == [True]
    fills, message, *buttons = _another_image()
    assert (fills, message) == ([], '<p class="message" role="status"></p>')
    assert [button.interactive for button in buttons] == [True, False]


def test_fills_and_images_are_computed_one_after_the_other(session):
    """Two tabs of the browser may ask for both at once."""
    functions = {function.api_name: function for function in page(session, lambda *_: []).fns.values()}
    assert functions["inpaint"].concurrency_id == functions["generate"].concurrency_id
    assert functions["inpaint"].queue
    assert functions["generate"].queue


def test_the_page_offers_no_upload_to_a_website(session):
    galleries = [block for block in page(session, lambda *_: []).blocks.values() if isinstance(block, gradio.Gallery)]
    assert len(galleries) == 2
    assert not [gallery for gallery in galleries if "share" in gallery.buttons]


def test_a_seed_that_browsers_cannot_send_exactly_is_a_message_without_flags(session):
    handlers = _Handlers(session, lambda *_: [])
    ((_, message),) = handlers.generate(1, 1e40, "any", 4, 0.9, 0.5, 2.0, 1.0)
    assert "the seed must be a whole number from -9007199254740991 to 9007199254740991" in message
    assert "--" not in message
