"""The command that serves the page in a browser on this machine. The page itself is in `page.py`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from smalti.app.session import Session
from smalti.core.config import flatten
from smalti.core.devices import Device, Precision
from smalti.core.errors import UserError
from smalti.core.provenance import versions
from smalti.images.sheets import save_png

MAX_UPLOAD_MEGABYTES = 20


@dataclass(frozen=True)
class App:
    """Settings of the page: its models and its port."""

    prior: str = "hourglass"
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    port: int = 7860
    """Port of the page. Only this machine can reach it."""
    device: Device = "auto"
    """Device to compute on."""
    precision: Precision = "auto"
    """Precision of the prior; auto is bf16 on hardware that is fast in it, otherwise fp32."""


def app(config: App) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        UserError: if Gradio is not installed, the port is in use, or a model cannot be loaded.
    """
    with serve(config) as blocks:
        print(f"http://127.0.0.1:{config.port}  (press Ctrl-C to stop)")
        blocks.block_thread()


@contextmanager
def serve(config: App) -> Iterator[Any]:
    """Serves the page as long as the context is open, and yields its `gradio.Blocks`.

    Raises:
        UserError: if Gradio is not installed, the port is in use, or a model cannot be loaded.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # set before the import, so that nothing is sent over the network
    try:
        from smalti.app.page import CSS, THEME, page
    except ModuleNotFoundError as error:
        raise UserError("the page needs Gradio: pip install 'smalti[app]'") from error
    session = Session(config.prior, config.tokenizer, config.device, config.precision)
    with TemporaryDirectory(prefix="smalti-app-") as folder:
        provenance = {**flatten(config), "prior_digest": session.prior.digest(), "versions": versions()}
        blocks = page(session, partial(_save, Path(folder), provenance))
        try:
            blocks.queue(default_concurrency_limit=1)  # requests that run at the same time slow each other down
            blocks.launch(
                server_name="127.0.0.1",
                server_port=config.port,
                max_file_size=MAX_UPLOAD_MEGABYTES * 1024**2,
                theme=THEME,
                css=CSS,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"port {config.port} is in use; give another --port") from error
        try:
            yield blocks
        finally:
            blocks.close(verbose=False)


def _save(
    folder: Path, provenance: dict[str, Any], prefix: str, images: list[Image.Image], **settings: Any
) -> list[str]:
    """Saves finished pictures as PNG files with all settings in a text chunk, and returns their paths."""
    paths = [folder / f"{prefix}-{settings['seed']}-{number}.png" for number in range(len(images))]
    for number, (path, image) in enumerate(zip(paths, images, strict=True)):
        save_png(path, image, {**provenance, **settings, "number": number})
    return [str(path) for path in paths]
