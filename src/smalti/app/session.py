"""A trained pair at work for somebody who watches: fills and new images, shown step by step as they come about.

What is on the page, and how it reaches a browser, is in `app.py`.
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

SECONDS_BETWEEN = 0.2
"""Between two pictures of what is under way: each is decoded, which costs about as much as a step."""


Show: TypeAlias = Callable[[int, Callable[[], list[Image.Image]]], None]
"""Takes a step, and what draws the pictures as they are after it."""


class Frame(NamedTuple):
    """The pictures as they are after some step; those of the last frame are finished."""

    step: int
    images: list[Image.Image]


class Session:
    """A prior and its tokenizer on one device.

    Args:
        prior: a kind, a folder or a hub id.
        tokenizer: of its codes; None for the copy in the prior's folder.
        on: where to compute.
        precision: of the prior.

    Raises:
        UserError: as `load_prior` does.
    """

    def __init__(self, prior: str, tokenizer: str | None, on: Device, precision: Precision) -> None:
        self.device = device(on)
        self.precision: Precision = precision
        loaded, decoder = load_prior(prior, tokenizer)
        self.prior, self.tokenizer = loaded.to(self.device), decoder.to(self.device)
        self.classes = list(find_classes(self.prior, ("all",) if self.prior.classes else ()))

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return self.tokenizer.image_channels

    def fills(
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
        """An image with its hole filled `num` times: those that `inpaint.py` makes with the same settings.

        Args:
            pixels: of any size.
            hole: True = to fill.
            num: how many fills.
            seed: fill i depends on it and on i alone.
            classes: what to fill with, in turn.
            filling: how, beside the sampling.
            settings: of the sampling, where not the defaults.

        Raises:
            UserError: for a hole that is none or all, a class there is not, or settings that will not do.
        """
        if not mask.any():
            raise UserError("there is no hole yet: paint over what is to be filled")
        if mask.all():
            raise UserError("the whole image is painted over, and nothing is left to go by; paint less")
        sampling = replace(self.prior.method.filling(), **settings)
        chosen = list(find_classes(self.prior, classes).values())
        height, width = mask.shape
        size = working_size(self.tokenizer, height, width, filling.largest)

        def as_it_is(codes: Tensor) -> list[Image.Image]:
            decoded = self._decode((codes[:: filling.candidates],))[:, :, : size.height, : size.width]
            fitted = F.interpolate(decoded, (height, width), mode="bilinear")
            return [to_image(image) for image in torch.where(mask, to_uint8(fitted), pixels)]

        def work(show: Show) -> list[Image.Image]:
            filled = fills(
                [self.prior],
                self.tokenizer,
                pixels,
                mask,
                num=num,
                seed=seed,
                classes=chosen,
                sampling=sampling,
                filling=filling,
                precision=self.precision,
                callback=lambda step, codes: show(step, lambda: as_it_is(codes)),
            )
            return [to_image(image) for image in filled]

        return _watched(work)

    def draws(self, *, num: int, seed: int, classes: Sequence[str] = (), **settings: Any) -> Iterator[Frame]:
        """New images: those that `sample.py` makes with the same settings.

        Args:
            num: how many.
            seed: image i depends on it and on i alone.
            classes: of which to draw, in turn; of none, each as often as in the training set.
            settings: of the sampling, where not the defaults.

        Raises:
            UserError: for a class there is not, or settings that will not do.
        """
        sampling = replace(self.prior.method.sampling(), **settings)
        chosen = list(find_classes(self.prior, classes).values())

        def work(show: Show) -> list[Image.Image]:
            steps = count()
            images = generate_images(
                [self.prior],
                self.tokenizer,
                num=num,
                seed=seed,
                sampling=sampling,
                classes=chosen,
                batch_size=num,
                precision=self.precision,
                watch=lambda _, codes: show(next(steps), lambda: [to_image(image) for image in self._decode(codes)]),
            )
            return [to_image(image) for image in images]

        return _watched(work)

    @torch.no_grad()
    def _decode(self, codes: Codes) -> Tensor:
        """Images of codes, on the CPU."""
        with torch.autocast(self.device.type, enabled=False):
            return self.tokenizer.decode(tuple(level.to(self.device) for level in codes)).cpu()


class _NobodyLooksError(Exception):
    """Ends work whose watcher has left."""


def _watched(work: Callable[[Show], list[Image.Image]]) -> Iterator[Frame]:
    """What a function shows while it works, and then what it returns, as they come; it stops if nobody asks for more.

    The function works in a thread, and passes what it shows the step and a function that draws the pictures, which is
    called now and then only.
    """
    frames: Queue[Frame | None] = Queue()
    left = threading.Event()
    last_step, last_time = -1, time.monotonic()

    def show(step: int, draw: Callable[[], list[Image.Image]]) -> None:
        nonlocal last_step, last_time
        if left.is_set():
            raise _NobodyLooksError
        last_step = step
        if time.monotonic() - last_time >= SECONDS_BETWEEN:
            frames.put(Frame(step + 1, draw()))
            last_time = time.monotonic()

    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(work, show)
        working.add_done_callback(lambda _: frames.put(None))
        try:
            while (frame := frames.get()) is not None:
                yield frame
            finished = working.result()  # raises here what was raised there
            yield Frame(last_step + 1, finished)
        finally:
            left.set()
