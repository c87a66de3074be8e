"""The page in a real browser, headless Chromium: open, paint, fill, generate, and the messages on bad files."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from smalti.app.server import MAX_UPLOAD_MEGABYTES, App, serve
from smalti.images.sheets import to_image

pytest.importorskip("gradio", reason="the page needs Gradio (the extra `app`)")

from helpers.command_toys import save_pair
from helpers.page import picture, until

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """The folder of an untrained prior and its tokenizer."""
    folder = tmp_path_factory.mktemp("app") / "pair"
    save_pair(folder)
    return folder


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


def shown(browser, selector):
    return browser.find_elements("css selector", selector)


def press(browser, selector):
    """Clicks an element where a person would; Selenium refuses it if something covers the element."""
    until(lambda: shown(browser, selector))[0].click()


def status(browser, element):
    return shown(browser, f"#{element}")[0].text if shown(browser, f"#{element}") else ""


def test_browser_opens_paints_fills_and_generates(prior, browser, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    to_image(picture()).save(tmp_path / "in.png")
    (tmp_path / "no *1*.png").write_text("no image")
    (tmp_path / "large.png").write_bytes(bytes(MAX_UPLOAD_MEGABYTES * 1024**2 + 1))
    with serve(App(prior=str(prior), port=0, device="cpu", precision="fp32")) as url:
        browser.get(url)
        upload = until(lambda: shown(browser, "#open input, input[data-testid^='Open an image']"))[0]
        upload.send_keys(str(tmp_path / "in.png"))
        canvas = until(lambda: shown(browser, "#editor canvas"))[0]
        until(lambda: canvas.size["height"] > 50)
        press(browser, "#fill")
        assert until(lambda: "nothing is masked yet" in shown(browser, "body")[0].text)
        ActionChains(browser).move_to_element(canvas).click_and_hold().move_by_offset(40, 20).release().perform()
        upload.send_keys(str(tmp_path / "no *1*.png"))
        until(lambda: status(browser, "open-status").startswith("no *1*.png was not opened"))
        upload.send_keys(str(tmp_path / "large.png"))
        until(lambda: "large.png" in shown(browser, ".toast-body")[0].text)
        press(browser, "#fill")  # the toast does not cover it, and the painting is still there
        until(lambda: re.match(r"step \d+ of 60|finished", status(browser, "fill-status")))  # a fast fill shows no step
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
        assert not status(browser, "server-gone")
    assert "start `smalti app` again" in until(lambda: status(browser, "server-gone"))


FETCH = """
const done = arguments[1];
fetch(arguments[0]).then(r => r.blob()).then(b => {
  const reader = new FileReader();
  reader.onload = () => done(reader.result.split(",")[1]);
  reader.readAsDataURL(b);
});
"""
