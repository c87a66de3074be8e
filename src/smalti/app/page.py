"""The page in the browser: its controls, and the functions they call. The models' work is in `session.py`."""

import dataclasses
import html
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast, no_type_check

import gradio
import numpy as np
import torch
from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder
from PIL import Image
from torch import Tensor

from smalti.app.browser import IMAGE_IS_OPEN
from smalti.app.session import Frame, Session, progress_text
from smalti.commands.inpainting import Filling
from smalti.core.errors import UserError
from smalti.core.progress import duration
from smalti.images.decoding import decode, load_layers
from smalti.images.masks import MID_GREY
from smalti.images.sheets import to_image

CANVAS_SIZE = 512
"""Pixels of the longer side of the canvas that a mask is painted on. Small images are enlarged to it."""
FIRST_STEP = "Open, drop or paste an image, then paint over the part to fill."
MAX_IMAGES = 16
MAX_SEED = 2**53 - 1
"""The largest whole number that browsers send exactly."""
ANY_CLASS = "any"
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
    """Returns the mask `(h, w)` of the image's pixels whose area on the canvas is painted over by half or more.

    Raises:
        UserError: if something is painted, but less than half of every pixel.
    """
    coverage = np.zeros((height, width), np.uint8)
    for layer in layers:
        painted = Image.fromarray(np.array(layer.convert("RGBA"))[..., 3] > 0).convert("L")
        coverage |= np.array(painted.resize((width, height), Image.Resampling.BOX))
    if coverage.any() and coverage.max() <= MID_GREY:
        raise UserError("no pixel of the image is painted over by half or more; take a larger brush or paint more")
    return torch.from_numpy(coverage > MID_GREY)


def page(session: Session, save: Callable[..., list[str]]) -> gradio.Blocks:
    """Builds the page, which is not served yet.

    Args:
        session: the models that inpaint and sample.
        save: writes finished pictures, given a prefix of their names, the pictures and their settings; returns paths.
    """
    handlers = _Handlers(session, save)
    with gradio.Blocks(title="smalti", analytics_enabled=False) as blocks, gradio.Tabs() as tabs:
        with gradio.Tab("Inpaint", id="inpaint"), gradio.Row():
            opening = _inpaint_tab(session, handlers)
        with gradio.Tab("Generate", id="generate"), gradio.Row():
            images = _generate_tab(session, handlers)
        images.select(handlers.edit, images, [*opening, tabs], show_progress="hidden")
    return blocks


class _Handlers:
    """The functions that the page's controls call.

    Gradio asks whether a function is a generator. The run-time type checks of the tests would wrap generators and hide
    that, hence `no_type_check`.
    """

    def __init__(self, session: Session, save: Callable[..., list[str]]) -> None:
        self._session, self._save = session, save

    def open(self, upload: dict[str, Any] | None) -> tuple[Any, ...]:
        """Opens an uploaded image; returns its pixels and file, its canvas, two messages (one empty), and no fills.

        If it is no image, the opened image, what is painted on it and its fills stay as they are.

        Args:
            upload: Gradio's description of the file, with its name as the user knows it in `orig_name`.
        """
        if upload is None:
            return (gradio.skip(),) * 5
        name = upload.get("orig_name") or Path(upload["path"]).name
        try:
            pixels = decode(Path(upload["path"]).read_bytes(), channels=self._session.channels)
        except UserError as error:
            text = f"{name} was not opened, and what is on the page stays: {error}"
            return gradio.skip(), gradio.skip(), _message(text, problem=True), gradio.skip(), gradio.skip()
        text = f"{name} will be {self._size(pixels, explained=True)}"
        return (pixels, upload["path"]), canvas_image(pixels), _message(text), _message(""), []

    def clear(self, opened: Any) -> Any:
        """Returns the canvas of the opened image, which Gradio's button for clearing takes away with the painting."""
        return gradio.skip() if opened is None else canvas_image(opened[0])

    def edit(self, event: gradio.SelectData, images: list[tuple[str, str | None]]) -> tuple[Any, ...]:
        """Opens a generated image that was clicked, on the other tab."""
        path = images[event.index][0]
        return *self.open({"path": path, "orig_name": "the generated image"}), gradio.Tabs(selected="inpaint")

    @no_type_check
    def inpaint(self, opened: Any, painted: Any, *values: Any) -> Iterator[tuple[Any, Any]]:
        """Fills the painted part of the opened image and yields pictures and status."""
        if opened is None:
            yield gradio.skip(), _message("open an image first, or generate one and click it", problem=True)
            return
        pixels, path = opened
        try:
            settings = _settings(self._session.prior.method.filling, values)
            mask = painted_mask(painted["layers"], *pixels.shape[1:])
            layers = load_layers(path, channels=len(pixels))
            frames = self._session.inpaint(pixels, mask, layers=layers, filling=Filling(), **settings)
            yield from self._outputs(frames, "fill", settings, note=f"; {self._size(pixels, explained=False)}")
        except UserError as error:
            yield gradio.skip(), _message(str(error), problem=True)

    @no_type_check
    def generate(self, *values: Any) -> Iterator[tuple[Any, Any]]:
        """Generates new images and yields pictures and status."""
        try:
            settings = _settings(self._session.prior.method.sampling, values)
            yield from self._outputs(self._session.sample(**settings), "sample", settings)
        except UserError as error:
            yield gradio.skip(), _message(str(error), problem=True)

    def _size(self, pixels: Tensor, *, explained: bool) -> str:
        """Describes the size, width first, at which an image's fills are computed, and what happens to the image."""
        _, height, width = pixels.shape
        work = self._session.working_size(height, width)
        if (work.height, work.width) == (height, width):
            return f"filled at its own size, {width}x{height}"
        explanation = (
            f", and the fills enlarged to its {width}x{height}; what is not painted over keeps its full size, and "
            "nothing is cropped"
        )
        return f"filled at {work.width}x{work.height} pixels{explanation if explained else ''}"

    @no_type_check
    def _outputs(
        self, frames: Iterator[Frame], prefix: str, settings: dict[str, Any], note: str = ""
    ) -> Iterator[tuple[Any, Any]]:
        """Yields the pictures and the step of every frame, then the saved pictures of the last one.

        At the end, or when the work is stopped, the files of pictures that are no longer shown are deleted. `note` is
        the end of the last message.
        """
        last, start, shown = None, time.monotonic(), []
        try:
            for last in frames:
                pictures = gradio.skip()
                if last.images is not None:
                    pictures = [save_pil_to_cache(each, get_upload_folder(), format="png") for each in last.images]
                    shown.append(pictures)
                yield pictures, _message(progress_text(last))
            if last is not None and last.images is not None:
                seconds = time.monotonic() - start
                text = f"finished after {last.step} of {last.steps} steps, {duration(seconds)}{note}"
                shown.append(self._save(prefix, last.images, **settings))
                yield shown[-1], _message(text)
        finally:
            for path in {*chain(*shown)} - {*chain(*shown[-1:])}:
                Path(path).unlink(missing_ok=True)


def _message(text: str, *, problem: bool = False) -> str:
    """Returns a line of HTML that shows the text exactly as it is."""
    kind = "alert" if problem else "status"
    return f'<p class="message{" problem" if problem else ""}" role="{kind}">{html.escape(text)}</p>'


def _inpaint_tab(session: Session, handlers: _Handlers) -> list[Any]:
    """Lays out the tab that inpaints; returns the outputs of `_Handlers.open`."""
    with gradio.Column():
        opened = gradio.State()
        upload = gradio.UploadButton("Open an image", elem_id="open")  # any file, so that others get a message
        file_status = gradio.HTML(_message(FIRST_STEP), elem_id="open-status")
        editor = gradio.ImageEditor(
            label="Paint the mask",
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
        button, stop = _buttons("Fill", elem_id="fill")
        status = gradio.HTML(_message(""), elem_id="fill-status")
        gallery = gradio.Gallery(
            label="Fills",
            elem_id="fills",
            format="png",
            columns=3,
            object_fit="contain",
            interactive=False,
            buttons=["download", "download_all", "fullscreen"],  # without "share", which uploads to a website
        )
    opening = [opened, editor, file_status, status, gallery]
    upload.upload(handlers.open, upload, opening, preprocess=False, show_progress_on=file_status)
    editor.clear(handlers.clear, opened, editor, show_progress="hidden")
    running = _connect(button, stop, handlers.inpaint, [opened, editor, *controls], gallery, status)
    ended = [gallery, status, button, stop]
    opened.change(_another_image, None, ended, cancels=[running], queue=False, show_progress="hidden", js=IMAGE_IS_OPEN)
    return opening


def _generate_tab(session: Session, handlers: _Handlers) -> gradio.Gallery:
    """Lays out the tab that generates images; returns their gallery."""
    with gradio.Column():
        controls = _controls(session, session.prior.method.sampling, num=8)
    with gradio.Column():
        button, stop = _buttons("Generate", elem_id="generate")
        status = gradio.HTML(_message("Click an image to inpaint it."), elem_id="generate-status")
        images = gradio.Gallery(
            label="Images",
            elem_id="images",
            format="png",
            columns=4,
            allow_preview=False,
            interactive=False,
            buttons=["download_all"],
        )
    _connect(button, stop, handlers.generate, controls, images, status)
    return images


def _buttons(name: str, elem_id: str) -> tuple[gradio.Button, gradio.Button]:
    """Lays out the button that starts work, and the one that stops it."""
    with gradio.Row():
        button = gradio.Button(name, variant="primary", elem_id=elem_id, scale=3)
        return button, gradio.Button("Stop", interactive=False, elem_id=f"{elem_id}-stop")


def _connect(
    button: gradio.Button, stop: gradio.Button, work: Callable[..., Any], inputs: list[Any], *outputs: Any
) -> Any:
    """Connects the buttons to the work, and returns it: one can be pressed before and after it, the other during it.

    Args:
        button: starts the work.
        stop: stops it.
        work: a generator of the outputs.
        inputs: its inputs.
        outputs: the gallery and the message.
    """
    buttons, (_, status) = [button, stop], outputs
    one_at_a_time = "models"  # fills and images that are computed at the same time slow each other down
    waiting = button.click(_waiting, None, [status, *buttons], queue=False, show_progress="hidden")
    running = waiting.then(work, inputs, [*outputs], show_progress="hidden", concurrency_id=one_at_a_time)
    running.then(_ready, None, buttons, queue=False, show_progress="hidden")
    stop.click(_stopped, None, [status, button], cancels=[running], queue=False, show_progress="hidden")
    return running


def _waiting() -> tuple[Any, ...]:
    """Returns the message until the first step: requests of several windows are processed one after the other."""
    text = "starting; if another window of this page is at work, its work is finished first"
    return _message(text), gradio.Button(interactive=False), gradio.Button(interactive=True)


def _ready() -> tuple[Any, ...]:
    """Returns the states of the buttons while there is no work."""
    return gradio.Button(interactive=True), gradio.Button(interactive=False)


def _another_image() -> tuple[Any, ...]:
    """Returns no fills and no message, and the states of the buttons: work on the image before is cancelled."""
    return [], _message(""), *_ready()


def _stopped() -> tuple[Any, ...]:
    """Returns the message after a click on Stop, and the states of the buttons.

    Stop can be pressed again, because Gradio does not cancel work that has not reached the server yet.
    """
    return _message("stopped; pictures that were shown meanwhile are unfinished"), gradio.Button(interactive=True)


def _controls(session: Session, sampling: type, num: int) -> list[Any]:
    """Lays out controls of number, seed, class and sampler settings, in the order that `_settings` reads them."""
    conditional = bool(session.classes)
    with gradio.Row():
        number = gradio.Slider(1, MAX_IMAGES, num, step=1, label="images")
        seed = gradio.Number(0, label="seed", precision=0)
        image_class = gradio.Dropdown(
            [ANY_CLASS, *session.classes], value=ANY_CLASS, label="class", visible=conditional
        )
    with gradio.Accordion("Sampler settings", open=False), gradio.Row():
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
            yield from ((name, f"first {name}", first), (name, f"last {name}", last))
        else:
            yield name, name, cast(float, default)


def _settings(sampling: type, values: tuple[Any, ...]) -> dict[str, Any]:
    """Converts the values of `_controls` to arguments of `Session.inpaint` and `Session.sample`.

    Raises:
        UserError: if the seed is too large.
    """
    number, seed, image_class, *slider_values = values
    if abs(seed or 0) > MAX_SEED:
        raise UserError(f"the seed must be a whole number from {-MAX_SEED} to {MAX_SEED}")
    classes = () if image_class == ANY_CLASS else (image_class,)
    settings: dict[str, Any] = {"num": int(number), "seed": int(seed or 0), "classes": classes}
    for (name, _, default), slider_value in zip(_slider_defaults(sampling), slider_values, strict=True):
        value = type(default)(slider_value)
        settings[name] = (settings[name], value) if name in settings else value
    return settings
