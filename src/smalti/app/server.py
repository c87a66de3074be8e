"""The command that serves the page in a browser on this machine. The page itself is in `page.py`.

Uploads, fills and Gradio's cache are in one temporary folder, which is removed when the server stops.
"""

import atexit
import logging
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from smalti.app.local_only import LocalOnly
from smalti.app.session import Session
from smalti.core.config import flatten
from smalti.core.devices import Device, Precision
from smalti.core.errors import UserError, one_line
from smalti.core.provenance import versions
from smalti.images.sheets import save_png

MAX_UPLOAD_MEGABYTES = 20
_LARGEST_PORT = 65535
_SECONDS_TO_STOP = 1


@dataclass(frozen=True)
class App:
    """Settings of the page: its models and its port.

    Raises:
        UserError: if the port is out of range.
    """

    prior: str = "hourglass"
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    port: int = 7860
    """Port of the page, or 0 for any free one. Only this machine can reach it."""
    device: Device = "auto"
    """Device to compute on."""
    precision: Precision = "auto"
    """Precision of the prior; `auto` is bf16 where the hardware is fast in it, fp16 on older GPUs, else fp32."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= _LARGEST_PORT:
            raise UserError(f"--port must be from 0 to {_LARGEST_PORT}, not {self.port}")


def app(config: App) -> None:
    """Serves the page until an exception ends it, such as that of Ctrl-C. Uploads and fills are removed.

    Raises:
        UserError: if Gradio is not installed, the port is in use, or a model cannot be loaded.
    """
    with serve(config) as url:
        print(f"{url}  (press Ctrl-C to stop)", flush=True)
        threading.Event().wait()


@contextmanager
def serve(config: App) -> Iterator[str]:
    """Serves the page as long as the context is open, and yields its address.

    Raises:
        UserError: if Gradio is not installed, the port is in use, or a model cannot be loaded.
    """
    port = _free_port(config.port)  # before models are loaded
    with _temporary_folder() as folder:
        try:
            from smalti.app.page import page
        except ModuleNotFoundError as error:
            raise UserError("the page needs Gradio: pip install -e '.[app]' in a checkout") from error
        session = Session(config.prior, config.tokenizer, config.device, config.precision)
        provenance = {**flatten(config), "prior_digest": session.prior.digest(), "versions": versions()}
        blocks = page(session, partial(_save, folder, provenance))
        blocks.queue(default_concurrency_limit=1)  # of each function; of the models' work, see `_connect`
        try:
            with _running(blocks, port):
                yield f"http://127.0.0.1:{port}"
        finally:
            session.close()


def _free_port(port: int) -> int:
    """Returns a port that is free now: the one asked for, or any for 0.

    Raises:
        UserError: if the port is in use, or the system reserves it.
    """
    try:
        with socket.create_server(("127.0.0.1", port)) as server:
            return server.getsockname()[1]
    except PermissionError as error:
        raise UserError(f"port {port} is reserved by the system; give --port a number above 1023") from error
    except OSError as error:
        raise UserError(f"port {port} is in use; give another --port") from error


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Yields a folder for all files of the page, Gradio's cache included, and removes it at the end.

    It is removed a second time when the process exits, because a fill that is being finished may create it again.
    """
    settings = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}  # nothing is sent or kept elsewhere
    with TemporaryDirectory(prefix="smalti-app-", ignore_cleanup_errors=True) as name:
        atexit.register(shutil.rmtree, name, ignore_errors=True)
        with _environment(**settings, GRADIO_TEMP_DIR=str(Path(name).resolve() / "gradio")):
            yield Path(name)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Sets environment variables for a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _running(blocks: Any, port: int) -> Iterator[None]:
    """Runs Gradio's web server in a thread.

    `mount_gradio_app` would do for the middleware too, but Gradio checks only in apps that it launched itself that the
    files which a request names were uploaded; a test holds that.

    Raises:
        UserError: if the port is in use, or Gradio does not reach its own server.
    """
    import httpx
    from starlette.middleware import Middleware

    from smalti.app.browser import CSS, HEAD, THEME

    try:
        with _environment(no_proxy="*"):  # Gradio asks its own server, which no HTTP proxy reaches, and nothing else
            blocks.launch(
                server_name="127.0.0.1",
                server_port=port,
                max_file_size=MAX_UPLOAD_MEGABYTES * 1024**2,
                app_kwargs={"middleware": [Middleware(LocalOnly)]},
                theme=THEME,
                css=CSS,
                head=HEAD,
                footer_links=[],
                show_error=True,
                quiet=True,
                prevent_thread_lock=True,
            )
    except OSError as error:
        raise UserError(f"port {port} is in use; give another --port") from error
    except (httpx.HTTPError, ValueError) as error:
        blocks.close(verbose=False)
        raise UserError(
            f"the page cannot be served at http://127.0.0.1:{port} ({one_line(error)}); allow connections to this "
            "machine itself, or give another --port"
        ) from error
    try:
        yield
    finally:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # open streams are cut off, which it reports
        blocks.server.config.timeout_graceful_shutdown = _SECONDS_TO_STOP
        blocks.close(verbose=False)


def _save(
    folder: Path, provenance: dict[str, Any], prefix: str, images: list[Image.Image], **settings: Any
) -> list[str]:
    """Saves finished pictures as PNG files with all settings in a text chunk, and returns their paths."""
    paths = [folder / f"{prefix}-{settings['seed']}-{number}.png" for number in range(len(images))]
    for number, (path, image) in enumerate(zip(paths, images, strict=True)):
        save_png(path, image, {**provenance, **settings, "number": number})
    return [str(path) for path in paths]
