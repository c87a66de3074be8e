"""The page in the browser: its pictures equal those of the commands, and a real browser can use it."""

import base64
import io
import json
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from helpers.command_toys import save_pair
from PIL import Image

from smalti.app import session as session_file
from smalti.app.server import App, serve
from smalti.app.session import Session
from smalti.commands.inpaint import Inpaint, inpaint
from smalti.commands.inpainting import Filling
from smalti.commands.sample import Sample, sample
from smalti.core.errors import UserError
from smalti.images.masks import examples
from smalti.images.sheets import to_image

pytest.importorskip("gradio", reason="the page needs Gradio (the extra `app`)")
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from smalti.app.page import CANVAS_SIZE, canvas_image, painted_mask

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
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


def picture():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=generator)


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
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5, 6, 6]
    assert frames[0].images[0].tobytes() != frames[-1].images[0].tobytes()


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
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5, 6, 6]


def test_closing_the_frames_ends_the_work(session):
    frames = session.sample(num=1, seed=0, steps=100_000)
    next(frames)
    frames.close()  # joins the thread, which would otherwise run for an hour


def test_wrong_masks_and_settings_are_user_errors(session):
    nothing, everything = torch.zeros(16, 16).bool(), torch.ones(16, 16).bool()
    for mask, message in ((nothing, "nothing is masked yet"), (everything, "the whole image is masked")):
        with pytest.raises(UserError, match=message):
            session.inpaint(picture(), mask, num=1, seed=0, filling=Filling())
    with pytest.raises(UserError, match="temperature must be above 0"):
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


def test_missing_gradio_is_a_user_error(prior, monkeypatch):
    monkeypatch.setitem(sys.modules, "smalti.app.page", None)
    with pytest.raises(UserError, match=r"pip install 'smalti\[app\]'"), serve(App(prior=str(prior))):
        pass


def test_port_in_use_is_a_user_error(prior):
    with socket.create_server(("127.0.0.1", 0)) as server:
        page = serve(App(prior=str(prior), port=server.getsockname()[1]))
        with pytest.raises(UserError, match="is in use; give another"), page:
            pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium, driven by Selenium."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="Selenium is not installed")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed, so the page is not tested in a browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-sync"
    for flag in [*flags.split(), "disable-component-update", "window-size=1300,1100"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def until(condition, seconds=60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(None, seconds).until(lambda _: condition())


def shown(browser, selector):
    return browser.find_elements("css selector", selector)


def press(browser, selector):
    """Clicks an element even if a message covers it."""
    browser.execute_script("arguments[0].click()", until(lambda: shown(browser, selector))[0])


def status(browser, element):
    return shown(browser, f"#{element}")[0].text if shown(browser, f"#{element}") else ""


def test_page_opens_fills_and_generates_over_http(prior, tmp_path):
    """Gradio's client calls the functions of the page's controls, as a browser does."""
    to_image(picture()).save(tmp_path / "in.png")
    for name, opacity in (("empty", 0), ("painted", 255)):
        layer = Image.new("RGBA", (CANVAS_SIZE, CANVAS_SIZE))
        layer.paste((255, 0, 0, opacity), (0, 0, CANVAS_SIZE // 2, CANVAS_SIZE // 2))
        layer.save(tmp_path / f"{name}.png")
    empty, painted = (
        {"background": None, "layers": [handle_file(tmp_path / f"{name}.png")], "composite": None}
        for name in ("empty", "painted")
    )
    numbers = [2, 4, "any", 2, 0.9, 0.5]  # number of images, seed, class, steps, temperature
    with serve(App(prior=str(prior), port=free_port(), device="cpu", precision="fp32")) as blocks:
        client = Client(blocks.local_url, verbose=False)
        with pytest.raises(AppError, match="open an image first"):
            client.predict(painted, *numbers, api_name="/inpaint")
        client.predict(handle_file(tmp_path / "in.png"), api_name="/open")
        with pytest.raises(AppError, match="nothing is masked yet"):
            client.predict(empty, *numbers, api_name="/inpaint")
        fills, status = client.predict(painted, *numbers, api_name="/inpaint")
        assert (len(fills), status) == (2, "finished after 2 steps")
        fill = Image.open(fills[1]["image"])
        settings = json.loads(fill.info["smalti"])
        assert (settings["number"], settings["seed"], settings["num"]) == (1, 4, 2)
        assert (settings["steps"], settings["temperature"]) == (2, [0.9, 0.5])
        changed = (np.array(fill) != np.array(to_image(picture()))).any(2)
        assert changed[:8, :8].any()
        assert not changed[8:].any()
        assert not changed[:, 8:].any()
        images, status = client.predict(*numbers, api_name="/generate")
        assert (len(images), status) == (2, "finished after 2 steps")


def test_browser_opens_paints_fills_and_generates(prior, browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    to_image(picture()).save(tmp_path / "in.png")
    (tmp_path / "no.png").write_text("no image")
    with serve(App(prior=str(prior), port=free_port(), device="cpu", precision="fp32")) as blocks:
        browser.get(blocks.local_url)
        upload = until(lambda: shown(browser, "#open input, input[data-testid^='Open an image']"))[0]
        upload.send_keys(str(tmp_path / "no.png"))
        assert until(lambda: "no.png" in shown(browser, "body")[0].text)
        upload.send_keys(str(tmp_path / "in.png"))
        canvas = until(lambda: shown(browser, "#editor canvas"))[0]
        until(lambda: canvas.size["height"] > 50)
        press(browser, "#fill")
        assert until(lambda: "nothing is masked yet" in shown(browser, "body")[0].text)
        ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(40, 20).release().perform()
        press(browser, "#fill")
        until(lambda: status(browser, "fill-status").startswith("finished"))
        assert len(shown(browser, "#fills img")) == 3
        browser.save_screenshot(str(tmp_path / "page.png"))
        source = shown(browser, "#fills img")[0].get_attribute("src")
        encoded = browser.execute_async_script(FETCH, source)
        fill = Image.open(io.BytesIO(base64.b64decode(encoded)))
        settings = json.loads(fill.info["smalti"])
        assert (settings["number"], settings["seed"], settings["num"]) == (0, 0, 3)
        changed = (np.array(fill) != np.array(to_image(picture()))).any(2)
        assert 0 < changed.sum() < 200  # of 256: only painted pixels change
        press(browser, "[role=tab]:nth-of-type(2)")
        press(browser, "#generate")
        until(lambda: status(browser, "generate-status").startswith("finished"))
        assert len(shown(browser, "#images img")) == 8
        press(browser, "#images img")
        assert until(lambda: not browser.find_element("id", "generate").is_displayed())  # the other tab opened


FETCH = """
const done = arguments[1];
fetch(arguments[0]).then(r => r.blob()).then(b => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(",")[1]);
  reader.readAsDataURL(b);
});
"""
