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

from smalti.commands.class_labels import find_classes
from smalti.commands.inpainting import Filling, fills, working_size
from smalti.commands.model_paths import load_prior
from smalti.commands.sample import generate_images
from smalti.core.codes import Codes
from smalti.core.devices import Device, Precision, device
from smalti.core.errors import UserError
from smalti.images.decoding import to_uint8
from smalti.images.sheets import to_image

SECONDS_BETWEEN_FRAMES = 0.2
"""Shortest time between two unfinished frames. Each one is decoded, which costs about as much as a sampling step."""


Report: TypeAlias = Callable[[int, Callable[[], list[Image.Image]]], None]
"""Receives the number of a step and a function that renders the pictures after it."""


class Frame(NamedTuple):
    """The pictures after a sampling step; in the last frame they are finished."""

    step: int
    images: list[Image.Image]


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
        loaded_prior, loaded_tokenizer = load_prior(prior, tokenizer)
        self.prior, self.tokenizer = loaded_prior.to(self.device), loaded_tokenizer.to(self.device)
        self.classes = list(find_classes(self.prior, ("all",) if self.prior.classes else ()))

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.tokenizer.image_channels

    def inpaint(
        self,
        pixels: UInt8[Tensor, "c h w"],
        mask: Bool[Tensor, "h w"],
        *,
        num: int,
        seed: int,
        classes: Sequence[str] = (),
        filling: Filling,
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
            settings: sampler settings that differ from the defaults for filling.

        Raises:
            UserError: if no pixel or every pixel is masked, a class is unknown, or a setting is out of range.
        """
        if not mask.any():
            raise UserError("nothing is masked yet; paint over the part of the image to fill")
        if mask.all():
            raise UserError("the whole image is masked, so a fill has nothing to match; paint over less of it")
        sampling = replace(self.prior.method.filling(), **settings)
        class_numbers = list(find_classes(self.prior, classes).values())
        height, width = mask.shape
        size = working_size(self.tokenizer, height, width, filling.largest)

        def render(codes: Tensor) -> list[Image.Image]:
            decoded = self._decode((codes[:: filling.candidates],))[:, :, : size.height, : size.width]
            resized = F.interpolate(decoded, (height, width), mode="bilinear")
            return [to_image(image) for image in torch.where(mask, to_uint8(resized), pixels)]

        def work(report: Report) -> list[Image.Image]:
            filled = fills(
                [self.prior],
                self.tokenizer,
                pixels,
                mask,
                num=num,
                seed=seed,
                classes=class_numbers,
                sampling=sampling,
                filling=filling,
                precision=self.precision,
                callback=lambda step, codes: report(step, lambda: render(codes)),
            )
            return [to_image(image) for image in filled]

        return _frames(work)

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
        class_numbers = list(find_classes(self.prior, classes).values())

        def work(report: Report) -> list[Image.Image]:
            steps = count()
            images = generate_images(
                [self.prior],
                self.tokenizer,
                num=num,
                seed=seed,
                sampling=sampling,
                classes=class_numbers,
                batch_size=num,
                precision=self.precision,
                watch=lambda _, codes: report(next(steps), lambda: [to_image(image) for image in self._decode(codes)]),
            )
            return [to_image(image) for image in images]

        return _frames(work)

    @torch.no_grad()
    def _decode(self, codes: Codes) -> Tensor:
        """Decodes codes to images on the CPU."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.decode(tuple(level.to(self.device) for level in codes)).cpu()


class _CancelledError(Exception):
    """Ends the work of a thread whose frames are no longer read."""


def _frames(work: Callable[[Report], list[Image.Image]]) -> Iterator[Frame]:
    """Runs `work` in a thread and yields the frames it reports, then its result as the last frame.

    At most one frame per `SECONDS_BETWEEN_FRAMES` is rendered. Closing the iterator ends the work at its next step.
    """
    frames: Queue[Frame | None] = Queue()
    cancelled = threading.Event()
    last_step, last_time = -1, time.monotonic()

    def report(step: int, render: Callable[[], list[Image.Image]]) -> None:
        nonlocal last_step, last_time
        if cancelled.is_set():
            raise _CancelledError
        last_step = step
        if time.monotonic() - last_time >= SECONDS_BETWEEN_FRAMES:
            frames.put(Frame(step + 1, render()))
            last_time = time.monotonic()

    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(work, report)
        working.add_done_callback(lambda _: frames.put(None))
        try:
            while (frame := frames.get()) is not None:
                yield frame
            finished = working.result()  # an error of the thread is raised here
            yield Frame(last_step + 1, finished)
        finally:
            cancelled.set()
