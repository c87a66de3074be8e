"""A trained prior and its tokenizer, kept on one device, that inpaint and sample while a page shows every step.

The page itself is in `page.py`, the command that serves it in `server.py`.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from queue import Queue
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from smalti.commands.class_labels import class_names, find_classes
from smalti.commands.generating import generate_images
from smalti.commands.inpainting import Filling, WorkingSize, callback_calls, fills, working_size
from smalti.commands.model_paths import load_prior_with_tokenizer
from smalti.core.codes import Codes
from smalti.core.devices import Device, Precision, device
from smalti.core.errors import UserError
from smalti.core.progress import duration, print_note
from smalti.images.blending import restore_transparency
from smalti.images.decoding import Layers, to_uint8
from smalti.images.sheets import to_image

SECONDS_BETWEEN_FRAMES = 0.2
"""Shortest time between two unfinished frames. Each one is decoded, which costs about as much as a sampling step."""
PREVIEW_SIZE = 512
"""Largest height and width of unfinished fills, in pixels. Fills of a phone's photo take seconds to render in full."""

Report: TypeAlias = Callable[[int, Callable[[], list[Image.Image]]], None]
"""Receives the number of a step and a function that renders the pictures after it."""


class Frame(NamedTuple):
    """The state of the work after a sampling step.

    Attributes:
        step: number of steps done; fewer than `steps` in the last frame if the sampler stopped early.
        steps: the largest number of steps that this work takes.
        images: the pictures as they are, at most `PREVIEW_SIZE` pixels high and wide; None if they were not rendered.
            In the last frame they are finished, in full size.
        seconds_left: an estimate from the steps done so far, None before the first.
    """

    step: int
    steps: int
    images: list[Image.Image] | None
    seconds_left: float | None


def progress_text(frame: Frame) -> str:
    """Returns `step i of n` and the time left."""
    step = f"step {frame.step} of {frame.steps}"
    if frame.seconds_left is None:
        return step
    if frame.step >= frame.steps:
        return f"{step}, almost finished"
    return f"{step}, about {duration(frame.seconds_left)} left"


class Session:
    """A prior and its tokenizer on one device.

    Args:
        prior: a kind, a folder or a hub id.
        tokenizer: its tokenizer; None for the copy in the prior's folder.
        on: the device to compute on.
        precision: the precision of the prior.

    Raises:
        UserError: if the prior, the tokenizer or the device is not available.
    """

    def __init__(self, prior: str, tokenizer: str | None, on: Device, precision: Precision) -> None:
        self.device = device(on)
        self.precision: Precision = precision
        loaded_prior, loaded_tokenizer = load_prior_with_tokenizer(prior, tokenizer)
        self.prior, self.tokenizer = loaded_prior.to(self.device), loaded_tokenizer.to(self.device)
        if self.prior.condition_width:
            print_note("note: this prior is conditioned on vectors; the page draws and fills without them")
        trained = find_classes(self.prior, ("all",) if self.prior.classes else ())
        self.classes = [class_names(self.prior)[number] for number in trained]
        self._closed = threading.Event()

    def close(self) -> None:
        """Ends all work at its next step."""
        self._closed.set()

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.tokenizer.image_channels

    def working_size(self, height: int, width: int, filling: Filling | None = None) -> WorkingSize:
        """Returns the size at which an image is filled; a larger image is shrunk to it as a whole."""
        return working_size(self.tokenizer, height, width, (filling or Filling()).largest)

    def inpaint(
        self,
        pixels: UInt8[Tensor, "c h w"],
        mask: Bool[Tensor, "h w"],
        *,
        num: int,
        seed: int,
        classes: Sequence[str] = (),
        filling: Filling,
        layers: Layers | None = None,
        **settings: Any,
    ) -> Iterator[Frame]:
        """Fills the masked pixels of an image `num` times, as `inpaint.py` does with the same settings.

        Args:
            pixels: an image of any size.
            mask: True for the pixels to fill.
            num: number of fills.
            seed: fill i depends on the seed and i alone.
            classes: the classes of the fills, in turn; empty for fills without class conditioning.
            filling: the settings of filling besides those of the sampler.
            layers: the image's transparency and colour profile, which the finished fills keep.
            settings: sampler settings that differ from the defaults for filling.

        Raises:
            UserError: if no pixel or every pixel is masked, a class is unknown, or a setting is out of range.
        """
        if not mask.any():
            raise UserError("nothing is masked yet; paint over the part of the image to fill")
        if mask.all():
            raise UserError("the whole image is masked, so a fill has nothing to match; paint over less of it")
        sampling = replace(self.prior.method.filling(), **settings)
        class_numbers = find_classes(self.prior, classes)
        height, width = mask.shape
        size = self.working_size(height, width, filling)
        preview_pixels, preview_mask = _preview(pixels, mask)

        def render(codes: Tensor) -> list[Image.Image]:
            decoded = self._decode((codes[:: filling.candidates],))[:, :, : size.height, : size.width]
            resized = F.interpolate(decoded, preview_mask.shape, mode="bilinear")
            return [to_image(image) for image in torch.where(preview_mask, to_uint8(resized), preview_pixels)]

        def work(report: Report) -> list[Image.Image]:
            filled = fills(
                [self.prior],
                self.tokenizer,
                pixels,
                mask,
                num=num,
                seed=seed,
                conditions=class_numbers,
                sampling=sampling,
                filling=filling,
                precision=self.precision,
                callback=lambda step, codes: report(step, lambda: render(codes)),
            )
            return [_with_layers(image, pixels, mask, layers) for image in filled]

        return _frames(work, callback_calls([self.prior], self.tokenizer, sampling, size), self._closed)

    def sample(self, *, num: int, seed: int, classes: Sequence[str] = (), **settings: Any) -> Iterator[Frame]:
        """Generates new images, as `sample.py` does with the same settings.

        Args:
            num: number of images.
            seed: image i depends on the seed and i alone.
            classes: the classes of the images, in turn; empty for the class frequencies of the training set.
            settings: sampler settings that differ from the defaults.

        Raises:
            UserError: if a class is unknown or a setting is out of range.
        """
        sampling = replace(self.prior.method.sampling(), **settings)
        class_numbers = find_classes(self.prior, classes)

        def work(report: Report) -> list[Image.Image]:
            steps = count()
            images = generate_images(
                [self.prior],
                self.tokenizer,
                num=num,
                seed=seed,
                sampling=sampling,
                conditions=class_numbers,
                batch_size=num,
                precision=self.precision,
                watch=lambda _, codes: report(next(steps), lambda: [to_image(image) for image in self._decode(codes)]),
            )
            return [to_image(image) for image in images]

        steps = sampling.calls(self.prior.level.height, self.prior.level.width)
        return _frames(work, steps, self._closed)

    @torch.no_grad()
    def _decode(self, codes: Codes) -> Tensor:
        """Decodes codes to images on the CPU."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.decode(tuple(level.to(self.device) for level in codes)).cpu()


class _CancelledError(Exception):
    """Ends the work of a thread whose frames are no longer read."""


def _with_layers(
    filled: UInt8[Tensor, "c h w"],
    pixels: UInt8[Tensor, "c h w"],
    mask: Bool[Tensor, "h w"],
    layers: Layers | None,
) -> Image.Image:
    """Returns a fill with the transparency and the colour profile of its image, which Pillow writes into files."""
    if layers is not None and layers.alpha is not None:
        filled = restore_transparency(filled, pixels, mask, colours=layers.colours, alpha=layers.alpha)
    image = to_image(filled)
    if layers is not None and layers.profile is not None:
        image.info["icc_profile"] = layers.profile
    return image


def _preview(
    pixels: UInt8[Tensor, "c h w"], mask: Bool[Tensor, "h w"]
) -> tuple[UInt8[Tensor, "c h2 w2"], Bool[Tensor, "h2 w2"]]:
    """Shrinks an image and its mask to at most `PREVIEW_SIZE` pixels a side; smaller ones keep their size."""
    scale = PREVIEW_SIZE / max(mask.shape)
    if scale >= 1:
        return pixels, mask
    size = [max(1, round(side * scale)) for side in mask.shape]
    shrunk = F.interpolate(pixels.unsqueeze(0), size, mode="bilinear", antialias=True)[0]
    return shrunk, F.adaptive_max_pool2d(mask[None].float(), size)[0] > 0


def _frames(work: Callable[[Report], list[Image.Image]], steps: int, closed: threading.Event) -> Iterator[Frame]:
    """Runs `work` in a thread and yields the frames it reports, then its result as the last frame.

    At most one frame per `SECONDS_BETWEEN_FRAMES` is rendered. The first frame comes before the first step. Closing
    the iterator, or setting `closed`, ends the work at its next step.
    """
    frames: Queue[Frame | None] = Queue()
    cancelled = threading.Event()
    start = last_time = time.monotonic()
    last_step = -1

    def report(step: int, render: Callable[[], list[Image.Image]]) -> None:
        nonlocal last_step, last_time
        if cancelled.is_set() or closed.is_set():
            raise _CancelledError
        last_step, done = step, step + 1
        now = time.monotonic()
        if (is_due := now - last_time >= SECONDS_BETWEEN_FRAMES) or done == steps:
            seconds_left = (now - start) / done * max(0, steps - done)
            frames.put(Frame(done, steps, render() if is_due else None, seconds_left))
            last_time = time.monotonic()

    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(work, report)
        working.add_done_callback(lambda _: frames.put(None))
        try:
            yield Frame(0, steps, None, None)
            while (frame := frames.get()) is not None:
                yield frame
            try:
                finished = working.result()  # an error of the thread is raised here
            except _CancelledError:
                return
            yield Frame(last_step + 1, steps, finished, 0.0)
        finally:
            cancelled.set()
