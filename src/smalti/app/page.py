"""The page in the browser: what is on it, and which part of it does what. The work itself is in `session.py`."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast, no_type_check

import gradio
import numpy as np
import torch
from gradio import themes
from PIL import Image
from torch import Tensor

from smalti.app.session import Frame, Session
from smalti.commands.inpainting import Filling
from smalti.core.errors import UserError
from smalti.images.decoding import load_image
from smalti.images.sheets import to_image

PAINTED_ON = 512
"""Pixels of the longer side of what is painted on, whatever the image's: small ones would be too small to hit."""
MOST = 16
"""Most pictures at once."""
ANY = "any"
CSS = "#fills img, #draws img { image-rendering: pixelated }"
THEME = themes.Default(font="system-ui", font_mono="monospace")  # fonts of other names are fetched from the web
_RANGES = {  # least, most, step
    "steps": (1, 200, 1),
    "temperature": (0.05, 2.0, 0.05),
    "guidance": (0.0, 5.0, 0.1),
    "top_p": (0.05, 1.0, 0.05),
}


def painted_on(pixels: Tensor) -> Image.Image:
    """An image of `(c, h, w)` as it is painted on: enlarged, or shrunk, to `PAINTED_ON`."""
    _, height, width = pixels.shape
    scale = PAINTED_ON / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return to_image(pixels).resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def painted_hole(layers: list[Image.Image], height: int, width: int) -> Tensor:
    """What was painted, as a hole of the image's size: pixels that are covered by half or more."""
    covered = np.zeros((height, width), np.uint8)
    for layer in layers:
        painted = Image.fromarray(np.array(layer.convert("RGBA"))[..., 3] > 0).convert("L")
        covered |= np.array(painted.resize((width, height), Image.Resampling.BOX))
    return torch.from_numpy(covered > 127)


def page(session: Session, saved: Callable[..., list[str]]) -> gradio.Blocks:
    """The page, not yet served.

    Args:
        studio: what fills and draws.
        saved: writes finished pictures, given what they are, the pictures and their settings; returns the paths.
    """

    def shown(frames: Iterator[Frame], what: str, made_by: dict[str, Any]) -> Iterator[tuple[Any, str]]:
        last = None
        for last in frames:
            yield last.images, f"step {last.step}"
        if last is not None:
            yield saved(what, last.images, **made_by), f"finished after {last.step} steps"

    def opened(path: str | None) -> tuple[Any, Any]:
        if path is None:
            return None, None
        with _as_a_line():
            pixels = load_image(path, channels=session.channels)
        return pixels.numpy(), painted_on(pixels)

    # Gradio asks whether a function is a generator, which the checks of shapes in tests would hide
    @no_type_check
    def filled(held: Any, painted: Any, *values: Any) -> Iterator[tuple[Any, str]]:
        if held is None:
            raise gradio.Error("open an image first, or draw one and click on it", print_exception=False)
        pixels = torch.from_numpy(held)
        settings = _settings(session.prior.method.filling, values)
        with _as_a_line():
            mask = painted_hole(painted["layers"], *pixels.shape[1:])
            frames = session.fills(pixels, mask, filling=Filling(), **settings)
            yield from shown(frames, "fill", settings)

    @no_type_check
    def drawn(*values: Any) -> Iterator[tuple[Any, str]]:
        settings = _settings(session.prior.method.sampling, values)
        with _as_a_line():
            yield from shown(session.draws(**settings), "sample", settings)

    def taken(event: gradio.SelectData, images: list[tuple[str, str | None]]) -> tuple[Any, Any, Any]:
        return *opened(images[event.index][0]), gradio.Tabs(selected="fill")

    with gradio.Blocks(title="smalti", analytics_enabled=False) as blocks, gradio.Tabs() as tabs:
        with gradio.Tab("Fill a hole", id="fill"), gradio.Row():
            with gradio.Column():
                held = gradio.State()
                upload = gradio.UploadButton("Open an image", file_types=["image"], elem_id="open")
                editor = gradio.ImageEditor(
                    label="Paint over what is to be filled",
                    elem_id="editor",
                    type="pil",
                    sources=None,
                    transforms=None,
                    layers=False,
                    format="png",
                    brush=gradio.Brush(default_size=48, colors=["#ff2d95"], color_mode="fixed"),
                    canvas_size=(PAINTED_ON, PAINTED_ON),
                )
                given = _controls(session, session.prior.method.filling, num=3)
            with gradio.Column():
                button = gradio.Button("Fill", variant="primary", elem_id="fill")
                stop = gradio.Button("Stop")
                said = gradio.Markdown(elem_id="fill-said")
                gallery = gradio.Gallery(label="Fills", elem_id="fills", format="png", columns=3)
            upload.upload(opened, upload, [held, editor])
            running = button.click(filled, [held, editor, *given], [gallery, said])
            stop.click(None, cancels=[running])
        with gradio.Tab("Draw new images", id="draw"), gradio.Row():
            with gradio.Column():
                asked = _controls(session, session.prior.method.sampling, num=8)
            with gradio.Column():
                button = gradio.Button("Draw", variant="primary", elem_id="draw")
                stop = gradio.Button("Stop")
                said = gradio.Markdown("A click on an image takes it to the other page.", elem_id="draw-said")
                images = gradio.Gallery(
                    label="Images", elem_id="draws", format="png", columns=4, allow_preview=False, interactive=False
                )
            running = button.click(drawn, asked, [images, said])
            stop.click(None, cancels=[running])
            images.select(taken, images, [held, editor, tabs])
    return blocks


@contextmanager
def _as_a_line() -> Iterator[None]:
    """What the person can mend is a line on the page."""
    try:
        yield
    except UserError as error:
        raise gradio.Error(str(error), print_exception=False) from error


def _controls(session: Session, sampling: type, num: int) -> list[Any]:
    """Number, seed, class, and of the sampling what `_RANGES` has: what `_settings` reads."""
    with gradio.Row():
        how_many = gradio.Slider(1, MOST, num, step=1, label="how many")
        seed = gradio.Number(0, label="seed", precision=0)
        of = gradio.Dropdown([ANY, *session.classes], value=ANY, label="class", visible=bool(session.classes))
    with gradio.Row():
        sliders = []
        for name, label, value in _numbers(sampling):
            (least, most, step), visible = _RANGES[name], name != "guidance" or bool(session.classes)
            slider = gradio.Slider(least, most, value, step=step, label=label, visible=visible, min_width=220)
            sliders.append(slider)
    return [how_many, seed, of, *sliders]


def _numbers(sampling: type) -> Iterator[tuple[str, str, float]]:
    """Of each slider the field, the label, and the value to begin with."""
    defaults = {field.name: field.default for field in dataclasses.fields(sampling)}
    for name in (name for name in _RANGES if name in defaults):
        default = defaults[name]
        if isinstance(default, tuple):
            first, last = default
            yield from ((name, f"{name}, first step", first), (name, f"{name}, last step", last))
        else:
            yield name, name, cast(float, default)


def _settings(sampling: type, values: tuple[Any, ...]) -> dict[str, Any]:
    """What `_controls` hold, as what `Session` takes."""
    how_many, seed, of, *numbers = values
    settings: dict[str, Any] = {"num": int(how_many), "seed": int(seed or 0), "classes": () if of == ANY else (of,)}
    for (name, _, start), value in zip(_numbers(sampling), numbers, strict=True):
        number = type(start)(value)
        settings[name] = (settings[name], number) if name in settings else number
    return settings
