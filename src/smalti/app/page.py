"""The page in the browser: its controls, and the functions they call. The models' work is in `session.py`."""

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

CANVAS_SIZE = 512
"""Pixels of the longer side of the canvas that a mask is painted on. Small images are enlarged to it."""
MAX_IMAGES = 16
ANY_CLASS = "any"
CSS = "#fills img, #images img { image-rendering: pixelated }"
THEME = themes.Default(font="system-ui", font_mono="monospace")  # Gradio downloads fonts of other names
_SLIDER_RANGES = {  # minimum, maximum, step
    "steps": (1, 200, 1),
    "temperature": (0.05, 2.0, 0.05),
    "guidance": (0.0, 5.0, 0.1),
    "top_p": (0.05, 1.0, 0.05),
}


def canvas_image(pixels: Tensor) -> Image.Image:
    """Resizes an image `(c, h, w)` for the canvas, whose longer side is `CANVAS_SIZE`."""
    _, height, width = pixels.shape
    scale = CANVAS_SIZE / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return to_image(pixels).resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)


def painted_mask(layers: list[Image.Image], height: int, width: int) -> Tensor:
    """Returns the mask `(h, w)` of the image's pixels whose area on the canvas is painted over by half or more."""
    coverage = np.zeros((height, width), np.uint8)
    for layer in layers:
        painted = Image.fromarray(np.array(layer.convert("RGBA"))[..., 3] > 0).convert("L")
        coverage |= np.array(painted.resize((width, height), Image.Resampling.BOX))
    return torch.from_numpy(coverage > 127)


def page(session: Session, save: Callable[..., list[str]]) -> gradio.Blocks:
    """Builds the page, which is not served yet.

    Args:
        session: the models that inpaint and sample.
        save: writes finished pictures, given a prefix of their names, the pictures and their settings; returns paths.
    """
    handlers = _Handlers(session, save)
    with gradio.Blocks(title="smalti", analytics_enabled=False) as blocks, gradio.Tabs() as tabs:
        with gradio.Tab("Inpaint", id="inpaint"), gradio.Row():
            opened, editor = _inpaint_tab(session, handlers)
        with gradio.Tab("Generate", id="generate"), gradio.Row():
            images = _generate_tab(session, handlers)
        images.select(handlers.edit, images, [opened, editor, tabs])
    return blocks


class _Handlers:
    """The functions that the page's controls call.

    Gradio asks whether a function is a generator. The run-time type checks of the tests would wrap generators and hide
    that, hence `no_type_check`.
    """

    def __init__(self, session: Session, save: Callable[..., list[str]]) -> None:
        self._session, self._save = session, save

    def open(self, path: str | None) -> tuple[Any, Any]:
        """Opens an image file; returns its pixels and its canvas."""
        if path is None:
            return None, None
        with _shown_errors():
            pixels = load_image(path, channels=self._session.channels)
        return pixels.numpy(), canvas_image(pixels)

    def edit(self, event: gradio.SelectData, images: list[tuple[str, str | None]]) -> tuple[Any, Any, Any]:
        """Opens a generated image that was clicked, on the other tab."""
        return *self.open(images[event.index][0]), gradio.Tabs(selected="inpaint")

    @no_type_check
    def inpaint(self, opened: Any, painted: Any, *values: Any) -> Iterator[tuple[Any, str]]:
        """Fills the painted part of the opened image and yields pictures and status."""
        if opened is None:
            raise gradio.Error("open an image first, or generate one and click it", print_exception=False)
        pixels = torch.from_numpy(opened)
        settings = _settings(self._session.prior.method.filling, values)
        with _shown_errors():
            mask = painted_mask(painted["layers"], *pixels.shape[1:])
            frames = self._session.inpaint(pixels, mask, filling=Filling(), **settings)
            yield from self._outputs(frames, "fill", settings)

    @no_type_check
    def generate(self, *values: Any) -> Iterator[tuple[Any, str]]:
        """Generates new images and yields pictures and status."""
        settings = _settings(self._session.prior.method.sampling, values)
        with _shown_errors():
            yield from self._outputs(self._session.sample(**settings), "sample", settings)

    @no_type_check
    def _outputs(self, frames: Iterator[Frame], prefix: str, settings: dict[str, Any]) -> Iterator[tuple[Any, str]]:
        """Yields the pictures of every frame with its step, then the saved pictures of the last one."""
        last = None
        for last in frames:
            yield last.images, f"step {last.step}"
        if last is not None:
            yield self._save(prefix, last.images, **settings), f"finished after {last.step} steps"


def _inpaint_tab(session: Session, handlers: _Handlers) -> tuple[gradio.State, gradio.ImageEditor]:
    """Lays out the tab that inpaints; returns the opened image and the editor."""
    with gradio.Column():
        opened = gradio.State()
        upload = gradio.UploadButton("Open an image", file_types=["image"], elem_id="open")
        editor = gradio.ImageEditor(
            label="Paint over the part to fill",
            elem_id="editor",
            type="pil",
            sources=None,
            transforms=None,
            layers=False,
            format="png",
            brush=gradio.Brush(default_size=48, colors=["#ff2d95"], color_mode="fixed"),
            canvas_size=(CANVAS_SIZE, CANVAS_SIZE),
        )
        controls = _controls(session, session.prior.method.filling, num=3)
    with gradio.Column():
        button = gradio.Button("Fill", variant="primary", elem_id="fill")
        stop = gradio.Button("Stop")
        status = gradio.Markdown(elem_id="fill-status")
        gallery = gradio.Gallery(label="Fills", elem_id="fills", format="png", columns=3)
    upload.upload(handlers.open, upload, [opened, editor])
    running = button.click(handlers.inpaint, [opened, editor, *controls], [gallery, status])
    stop.click(None, cancels=[running])
    return opened, editor


def _generate_tab(session: Session, handlers: _Handlers) -> gradio.Gallery:
    """Lays out the tab that generates images; returns their gallery."""
    with gradio.Column():
        controls = _controls(session, session.prior.method.sampling, num=8)
    with gradio.Column():
        button = gradio.Button("Generate", variant="primary", elem_id="generate")
        stop = gradio.Button("Stop")
        status = gradio.Markdown("Click an image to inpaint it.", elem_id="generate-status")
        images = gradio.Gallery(
            label="Images", elem_id="images", format="png", columns=4, allow_preview=False, interactive=False
        )
    running = button.click(handlers.generate, controls, [images, status])
    stop.click(None, cancels=[running])
    return images


@contextmanager
def _shown_errors() -> Iterator[None]:
    """Shows user errors as messages on the page."""
    try:
        yield
    except UserError as error:
        raise gradio.Error(str(error), print_exception=False) from error


def _controls(session: Session, sampling: type, num: int) -> list[Any]:
    """Lays out controls of number, seed, class and sampler settings, in the order that `_settings` reads them."""
    conditional = bool(session.classes)
    with gradio.Row():
        number = gradio.Slider(1, MAX_IMAGES, num, step=1, label="number of images")
        seed = gradio.Number(0, label="seed", precision=0)
        image_class = gradio.Dropdown(
            [ANY_CLASS, *session.classes], value=ANY_CLASS, label="class", visible=conditional
        )
    with gradio.Row():
        sliders = []
        for name, label, value in _slider_defaults(sampling):
            minimum, maximum, step = _SLIDER_RANGES[name]
            visible = name != "guidance" or conditional
            sliders.append(
                gradio.Slider(minimum, maximum, value, step=step, label=label, visible=visible, min_width=220)
            )
    return [number, seed, image_class, *sliders]


def _slider_defaults(sampling: type) -> Iterator[tuple[str, str, float]]:
    """Yields the field, the label and the first value of every slider; a field with two values has two sliders."""
    defaults = {field.name: field.default for field in dataclasses.fields(sampling)}
    for name in (name for name in _SLIDER_RANGES if name in defaults):
        default = defaults[name]
        if isinstance(default, tuple):
            first, last = default
            yield from ((name, f"{name}, first step", first), (name, f"{name}, last step", last))
        else:
            yield name, name, cast(float, default)


def _settings(sampling: type, values: tuple[Any, ...]) -> dict[str, Any]:
    """Converts the values of `_controls` to arguments of `Session.inpaint` and `Session.sample`."""
    number, seed, image_class, *slider_values = values
    classes = () if image_class == ANY_CLASS else (image_class,)
    settings: dict[str, Any] = {"num": int(number), "seed": int(seed or 0), "classes": classes}
    for (name, _, default), slider_value in zip(_slider_defaults(sampling), slider_values, strict=True):
        value = type(default)(slider_value)
        settings[name] = (settings[name], value) if name in settings else value
    return settings
