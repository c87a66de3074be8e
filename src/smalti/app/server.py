"""The command that serves the page in the browser. What is on the page is in `page.py`."""

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

MOST_MEGABYTES = 20


@dataclass(frozen=True)
class App:
    """What the page works with."""

    prior: str = "hourglass"
    """A trained prior: a kind (the one in runs/priors/KIND), a folder, or a hub id."""
    tokenizer: str | None = None
    """Its tokenizer: a kind, a folder or a hub id [default: the copy in the prior's folder]."""
    port: int = 7860
    """Of this machine, on which the page is; nobody else's machine reaches it."""
    device: Device = "auto"
    """Where to compute."""
    precision: Precision = "auto"
    """Arithmetic of the prior; auto is bf16 where the hardware is fast in it."""


def app(config: App) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        UserError: if Gradio is not there, the port is taken, or a model will not do.
    """
    with serve(config) as blocks:
        print(f"http://127.0.0.1:{config.port}  (Ctrl-C ends it)")
        blocks.block_thread()


@contextmanager
def serve(config: App) -> Iterator[Any]:
    """The running page, for as long as the context lasts.

    Raises:
        UserError: as `app` does.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing leaves the machine
    try:
        from smalti.app.page import CSS, THEME, page
    except ModuleNotFoundError as error:
        raise UserError("the page needs Gradio: pip install 'smalti[app]'") from error
    session = Session(config.prior, config.tokenizer, config.device, config.precision)
    with TemporaryDirectory(prefix="smalti-app-") as folder:
        made_with = {**flatten(config), "prior_digest": session.prior.digest(), "versions": versions()}
        blocks = page(session, partial(_saved, Path(folder), made_with))
        try:
            blocks.queue(default_concurrency_limit=1)  # one at a time: they would only slow each other down
            blocks.launch(
                server_name="127.0.0.1",
                server_port=config.port,
                max_file_size=MOST_MEGABYTES * 1024**2,
                theme=THEME,
                css=CSS,
                footer_links=[],
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"port {config.port} is taken; give another --port") from error
        try:
            yield blocks
        finally:
            blocks.close(verbose=False)


def _saved(folder: Path, made_with: dict[str, Any], what: str, images: list[Image.Image], **made_by: Any) -> list[str]:
    """Finished pictures as files whose names and text chunks say what made them."""
    paths = [folder / f"{what}-{made_by['seed']}-{number}.png" for number in range(len(images))]
    for number, (path, image) in enumerate(zip(paths, images, strict=True)):
        save_png(path, image, {**made_with, **made_by, "number": number})
    return [str(path) for path in paths]
