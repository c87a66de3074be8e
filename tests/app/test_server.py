"""The server of the page over HTTP: which requests are answered, and what is left when it stops."""

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from smalti.app.local_only import REFUSAL, LocalOnly
from smalti.app.server import App, _running, serve
from smalti.core.errors import UserError
from smalti.images.sheets import to_image

pytest.importorskip("gradio", reason="the page needs Gradio (the extra `app`)")
import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from helpers.command_toys import save_pair
from helpers.page import picture, until

from smalti.app.page import CANVAS_SIZE


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    """The folder of an untrained prior and its tokenizer."""
    folder = tmp_path_factory.mktemp("app") / "pair"
    save_pair(folder)
    return folder


@pytest.fixture(autouse=True)
def _temporary_folders_in_that_of_the_test(monkeypatch, tmp_path):
    """Gradio's client leaves an empty folder for each file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("port", [-1, 65536])
def test_port_out_of_range_is_a_user_error(port):
    with pytest.raises(UserError, match="--port must be from 0 to 65535"):
        App(port=port)


def test_missing_gradio_is_a_user_error(prior, monkeypatch):
    monkeypatch.setitem(sys.modules, "smalti.app.page", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[app\]'"), serve(App(prior=str(prior))):
        pass


def test_port_in_use_is_a_user_error(prior):
    with socket.create_server(("127.0.0.1", 0)) as server:
        page = serve(App(prior=str(prior), port=server.getsockname()[1]))
        with pytest.raises(UserError, match="is in use; give another"), page:
            pass


def test_the_page_is_served_where_an_http_proxy_is_set(prior, monkeypatch):
    """The proxy is a closed port. Gradio asks its own server while it starts, by httpx, which obeys these variables."""
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "example.org")
    with serve(App(prior=str(prior), port=0, device="cpu")) as url:
        assert respond(url, "GET", "/", {"Host": url.removeprefix("http://")})[0] == 200
        assert os.environ["no_proxy"] == "example.org"


def test_a_page_that_its_own_server_does_not_answer_is_a_user_error():
    def launch(**_):
        raise httpx.ConnectError("refused")

    running = _running(SimpleNamespace(launch=launch, close=lambda **_: None), 7860)
    with pytest.raises(UserError, match=r"cannot be served at http://127.0.0.1:7860 \(refused\); allow"), running:
        pass


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
    body = JOB if method == "POST" and host else b""  # without Host, the server closes before it has read one
    code, content = respond(address, method, path, headers, body=body)
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
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_uploads_and_fills_are_removed_when_a_signal_stops_the_page(prior, tmp_path, name):
    """A photo is uploaded and images are being generated when the signal arrives."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    to_image(picture()).save(tmp_path / "in.png")
    arguments = ["--prior", str(prior), "--port", "0", "--device", "cpu"]
    command = [sys.executable, "-m", "smalti", "app", *arguments]
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(getattr(signal, name), signal.SIG_DFL),  # background jobs ignore SIGINT
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
        with pytest.raises(AppError, match="not supported between instances of 'str' and 'int'"):
            client.predict("two", *numbers[1:], api_name="/generate")
        images, status = client.predict(*numbers, api_name="/generate")
        assert len(images) == 2
        assert re.search(r">finished after 2 of 2 steps, \d+ s<", status)
