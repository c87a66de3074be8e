"""Fills the same region of every image in a folder, three times each.

$ python examples/inpaint_folder.py runs/demo/prior my/photos filled
"""

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from smalti import inpaint, load_prior
from smalti.images.sheets import to_image


def main(prior_folder: str, images: str, out: str) -> None:
    """Writes `NAME-0.png`, `NAME-1.png` and `NAME-2.png` for every image NAME of the folder."""
    prior = load_prior(prior_folder)
    Path(out).mkdir(parents=True, exist_ok=True)
    for file in sorted(Path(images).glob("*.png")):
        image = Image.open(file)
        mask = Image.new("L", image.size)  # black is kept, white is filled
        width, height = image.size
        ImageDraw.Draw(mask).ellipse((width // 4, height // 4, 3 * width // 4, 3 * height // 4), fill=255)
        for number, fill in enumerate(inpaint(prior, image, mask, num=3, seed=0)):
            to_image(fill).save(Path(out) / f"{file.stem}-{number}.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
