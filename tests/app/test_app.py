"""The page in the browser: what it makes is what the commands make, and a real browser can work it."""

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

from smalti.app import session as studio_file
from smalti.app.server import App, serve
from smalti.app.session import Session
from smalti.commands.inpaint import Inpaint, inpaint
from smalti.commands.inpainting import Filling
from smalti.commands.sample import Sample, sample
from smalti.core.errors import UserError
from smalti.images.masks import examples
from smalti.images.sheets import to_image

pytest.importorskip("gradio", reason="the page needs Gradio (the extra `app`)")
from smalti.app.page import PAINTED_ON, painted_hole, painted_on

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SETTINGS = {"steps": 6, "temperature": (0.9, 0.5), "guidance": 2.0}


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """The folder of an untrained pair."""
    folder = tmp_path_factory.mktemp("app") / "pair"
    save_pair(folder)
    return folder


@pytest.fixture
def session(prior, monkeypatch):
    monkeypatch.setattr(studio_file, "SECONDS_BETWEEN", 0)
    return Session(str(prior), None, "cpu", "fp32")


def picture():
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=generator)


def test_fills_are_those_of_the_command(session, prior, tmp_path):
    pixels, hole = picture(), examples(16, 16)["box"]
    to_image(pixels).save(tmp_path / "in.png")
    Image.fromarray(hole.numpy()).save(tmp_path / "mask.png")
    frames = list(session.fills(pixels, hole, num=2, seed=4, filling=Filling(candidates=2), **SETTINGS))
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


def test_images_are_those_of_the_command(session, prior, tmp_path):
    frames = list(session.draws(num=3, seed=4, **SETTINGS))
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


def test_a_watcher_who_leaves_ends_the_work(session):
    frames = session.draws(num=1, seed=0, steps=100_000)
    next(frames)
    frames.close()  # joins the thread: it would take an hour


def test_what_cannot_be_filled_is_said(session):
    for hole, said in ((torch.zeros(16, 16).bool(), "no hole yet"), (torch.ones(16, 16).bool(), "nothing is left")):
        with pytest.raises(UserError, match=said):
            session.fills(picture(), hole, num=1, seed=0, filling=Filling())
    with pytest.raises(UserError, match="temperature must be above 0"):
        session.draws(num=1, seed=0, temperature=(0.0, 1.0))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (30, 900), (700, 40)])
def test_what_is_painted_is_the_hole(height, width):
    """Whatever the image's size: a cover over its left half is its left half, a dot on it is nothing."""
    on = painted_on(torch.zeros(3, height, width, dtype=torch.uint8))
    assert max(on.size) == PAINTED_ON
    layer = Image.new("RGBA", on.size)
    layer.paste((255, 0, 0, 255), (0, 0, on.width // 2, on.height))
    hole = painted_hole([layer], height, width)
    assert hole.shape == (height, width)
    wide = torch.arange(width) < width / 2
    wrong = (hole != wide).any(0).nonzero().flatten()
    assert ((wrong - width / 2).abs() <= 1 + width / on.width).all()  # the edge, where a pixel is half painted
    assert not painted_hole([Image.new("RGBA", on.size)], height, width).any()


def test_without_gradio_the_page_says_what_to_install(prior, monkeypatch):
    monkeypatch.setitem(sys.modules, "smalti.app.page", None)
    with pytest.raises(UserError, match=r"pip install 'smalti\[app\]'"), serve(App(prior=str(prior))):
        pass


def test_a_port_that_is_taken_is_said(prior):
    with socket.create_server(("127.0.0.1", 0)) as server:
        page = serve(App(prior=str(prior), port=server.getsockname()[1]))
        with pytest.raises(UserError, match="is taken; give another"), page:
            pass


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A real one."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="a browser is driven by Selenium")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver here: the page is not tried in a browser")
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
    """As a person does who waits until no message covers it."""
    browser.execute_script("arguments[0].click()", until(lambda: shown(browser, selector))[0])


def said(browser, element):
    return shown(browser, f"#{element}")[0].text if shown(browser, f"#{element}") else ""


def test_a_browser_opens_paints_fills_and_draws(prior, browser, tmp_path):
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
        assert until(lambda: "there is no hole yet" in shown(browser, "body")[0].text)
        ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(40, 20).release().perform()
        press(browser, "#fill")
        until(lambda: said(browser, "fill-said").startswith("finished"))
        assert len(shown(browser, "#fills img")) == 3
        browser.save_screenshot(str(tmp_path / "page.png"))
        source = shown(browser, "#fills img")[0].get_attribute("src")
        encoded = browser.execute_async_script(FETCH, source)
        fill = Image.open(io.BytesIO(base64.b64decode(encoded)))
        settings = json.loads(fill.info["smalti"])
        assert (settings["number"], settings["seed"], settings["num"]) == (0, 0, 3)
        changed = (np.array(fill) != np.array(to_image(picture()))).any(2)
        assert 0 < changed.sum() < 200  # of 256: where it was painted, and nowhere else
        press(browser, "#draw-tab, [role=tab]:nth-of-type(2)")
        press(browser, "#draw")
        until(lambda: said(browser, "draw-said").startswith("finished"))
        assert len(shown(browser, "#draws img")) == 8
        press(browser, "#draws img")
        assert until(lambda: not browser.find_element("id", "draw").is_displayed())  # it is there, to be painted on


FETCH = """
const done = arguments[1];
fetch(arguments[0]).then(r => r.blob()).then(b => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(",")[1]);
  reader.readAsDataURL(b);
});
"""
