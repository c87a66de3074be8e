"""The page in the browser: its pictures equal those of the commands, and a real browser can use it."""

import asyncio
import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import Any, cast

import numpy as np
import pytest
import torch
from helpers.command_toys import save_pair
from PIL import Image

from smalti.app import session as session_file
from smalti.app.local_only import REFUSAL, LocalOnly
from smalti.app.server import MAX_UPLOAD_MEGABYTES, App, serve
from smalti.app.session import Frame, Session
from smalti.commands.inpaint import Inpaint, inpaint
from smalti.commands.inpainting import Filling
from smalti.commands.sample import Sample, sample
from smalti.core.errors import UserError
from smalti.images.masks import examples
from smalti.images.sheets import to_image

pytest.importorskip("gradio", reason="the page needs Gradio (the extra `app`)")
import gradio
from gradio_client import Client, handle_file

from smalti.app.page import CANVAS_SIZE, _Handlers, canvas_image, painted_mask, progress_text

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
    assert [frame.step for frame in frames] == [0, 1, 2, 3, 4, 5, 6, 6]
    assert frames[1].images[0].tobytes() != frames[-1].images[0].tobytes()


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
    frames = session.sample(num=1, seed=0, steps=100_000)
    next(frames)
    frames.close()  # joins the thread, which would otherwise run for an hour


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


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_out_of_range_is_a_user_error(port):
    with pytest.raises(UserError, match="--port must be from 0 to 65535"):
        App(port=port)


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


def until(condition, seconds=60):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(cast(Any, None), seconds).until(lambda _: condition())


def shown(browser, selector):
    return browser.find_elements("css selector", selector)


def press(browser, selector):
    """Clicks an element where a person would; Selenium refuses it if something covers the element."""
    until(lambda: shown(browser, selector))[0].click()


def status(browser, element):
    return shown(browser, f"#{element}")[0].text if shown(browser, f"#{element}") else ""


@pytest.fixture(scope="module")
def address(prior):
    """The address of a page that is served to all tests that only read it."""
    with serve(App(prior=str(prior), port=0, device="cpu", precision="fp32")) as url:
        yield url


def respond(address, method, path, headers, *, body=b"", size=200):
    """Sends a request with these headers only; returns its status and the first `size` bytes of the content."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=20)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read(size)
    connection.close()
    return response.status, content


SSE, JOIN = "/gradio_api/queue/data?session_hash=x", "/gradio_api/queue/join"
JSON = {"Content-Type": "application/json"}
JOB = json.dumps({"data": [None], "fn_index": 0, "session_hash": "x"}).encode()


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/config"), ("GET", SSE), ("POST", JOIN)])
@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("evil.example", None),
        ("evil.example:PORT", "http://evil.example:PORT"),
        ("127.0.0.1.evil.example:PORT", None),
        ("127.0.0.1:PORT", "http://evil.example"),
        ("127.0.0.1:PORT", "null"),
        ("localhost:PORT", "http://localhost:1"),
        ("localhost:PORT", "https://localhost:PORT"),
        ("localhost:PORT", "http://localhost:PORT.evil.example"),
        ("user@localhost:PORT", None),
        (None, None),
    ],
)
def test_requests_of_other_sites_are_refused(address, method, path, host, origin):
    """DNS rebinding sends another site's name as Host; a request across sites has another Origin."""
    port = address.rpartition(":")[2]
    given = {"Host": host, "Origin": origin}
    headers = {name: value.replace("PORT", port) for name, value in given.items() if value is not None}
    code, content = respond(address, method, path, headers, body=JOB if method == "POST" else b"")
    if host is None:
        assert code in (400, 403)  # the server itself refuses HTTP/1.1 without Host
    else:
        assert (code, content) == (403, REFUSAL.encode())


def test_websockets_of_other_sites_are_refused():
    """Gradio has none today; a refusal is a close before the connection is accepted."""
    sent, passed_on = [], []

    async def send(message):
        sent.append(message)

    async def page(scope, *_):
        passed_on.append(scope)

    for host, origin in ((b"evil.example", b"http://evil.example"), (b"localhost:1", b"http://localhost:1")):
        scope = {"type": "websocket", "headers": [(b"host", host), (b"origin", origin)]}
        asyncio.run(LocalOnly(page)(scope, cast(Any, None), send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert [dict(scope["headers"])[b"host"] for scope in passed_on] == [b"localhost:1"]


@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:PORT", "LOCALHOST:PORT", "[::1]:PORT", "localhost:9000"])
@pytest.mark.parametrize("with_origin", [False, True])
def test_requests_of_the_page_are_answered(address, host, with_origin):
    """Another port is that of a forwarding, such as `ssh -L 9000:localhost:7860`."""
    host = host.replace("PORT", address.rpartition(":")[2])
    headers = {"Host": host} | ({"Origin": f"http://{host}"} if with_origin else {})
    assert respond(address, "GET", "/", headers)[0] == 200
    code, content = respond(address, "POST", JOIN, {**headers, **JSON}, body=JOB)
    assert code == 200
    assert "event_id" in json.loads(content)
    code, content = respond(address, "GET", SSE, headers)  # the events of that job
    assert (code, content[:6]) == (200, b"data: ")


def test_only_uploaded_files_are_opened(address):
    """A request that names another file of this machine, as if it had been uploaded, fails."""
    host, data = address.removeprefix("http://"), [{"path": __file__, "meta": {"_type": "gradio.FileData"}}]
    job = json.dumps({"data": data, "fn_index": 0, "session_hash": "files"}).encode()
    assert respond(address, "POST", JOIN, {"Host": host, **JSON}, body=job)[0] == 200
    _, events = respond(address, "GET", SSE.replace("=x", "=files"), {"Host": host}, size=100_000)
    assert b'"success":false' in events.replace(b" ", b"")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that a process can handle")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_uploads_and_fills_are_removed_when_a_signal_stops_the_page(prior, tmp_path, name):
    """A photo is uploaded and images are being generated when the signal arrives."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    to_image(picture()).save(tmp_path / "in.png")
    arguments = ["--prior", str(prior), "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "smalti", "app", *arguments]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[0]
            client = Client(url, verbose=False)
            client.predict(handle_file(tmp_path / "in.png"), api_name="/open")
            client.submit(16, 0, "any", 200, 1.0, 0.5, api_name="/generate")
            until(lambda: [path for path in temporary.rglob("in.png") if path.is_file()])
            time.sleep(1)  # the first steps
            process.send_signal(getattr(signal, name))
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + getattr(signal, name)
    assert "Traceback" not in errors
    assert not [path for path in temporary.rglob("*") if path.is_file() and path.suffix in (".png", ".webp", ".jpg")]
    assert not list(temporary.glob("smalti-app-*"))
    assert not list(temporary.glob("gradio*"))


def test_a_bad_upload_is_named_and_leaves_the_photo_and_the_painting(prior):
    handlers = _Handlers(Session(str(prior), None, "cpu", "fp32"), lambda *_: [])
    outputs = handlers.open({"path": __file__, "orig_name": "my *photo* <1>.png"})
    assert outputs[:2] == (gradio.skip(), gradio.skip())
    assert outputs[2].startswith('<p class="message problem" role="alert">my *photo* &lt;1&gt;.png was not opened')


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
    (tmp_path / "no.png").write_text("no image")
    with serve(App(prior=str(prior), port=0, device="cpu", precision="fp32")) as url:
        client = Client(url, verbose=False)
        assert "open an image first" in client.predict(painted, *numbers, api_name="/inpaint")[1]
        assert "in.png will be filled at its own size, 16x16" in str(
            client.predict(handle_file(tmp_path / "in.png"), api_name="/open")
        )
        assert "no.png was not opened" in str(client.predict(handle_file(tmp_path / "no.png"), api_name="/open"))
        assert "nothing is masked yet" in client.predict(empty, *numbers, api_name="/inpaint")[1]
        fills, status = client.predict(painted, *numbers, api_name="/inpaint")
        assert len(fills) == 2
        assert re.search(r"finished after 2 of 2 steps, \d+ s; filled at its own size, 16x16", status)
        fill = Image.open(fills[1]["image"])
        settings = json.loads(fill.info["smalti"])
        assert (settings["number"], settings["seed"], settings["num"]) == (1, 4, 2)
        assert (settings["steps"], settings["temperature"]) == (2, [0.9, 0.5])
        changed = (np.array(fill) != np.array(to_image(picture()))).any(2)
        assert changed[:8, :8].any()
        assert not changed[8:].any()
        assert not changed[:, 8:].any()
        images, status = client.predict(*numbers, api_name="/generate")
        assert len(images) == 2
        assert re.search(r">finished after 2 of 2 steps, \d+ s<", status)


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
        until(lambda: re.match(r"step \d+ of 60", status(browser, "fill-status")))
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
