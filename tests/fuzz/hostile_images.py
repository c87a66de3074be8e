"""Makes damaged and hostile image files: valid images of many formats and modes, and random changes of them.

PNG chunks are changed with correct checksums; sizes that other formats declare are replaced by extreme ones.
"""

import random
import struct
import zlib
from functools import cache
from io import BytesIO

import numpy as np
from fuzzing import integer, mutate
from PIL import Image, ImageDraw

SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXTRA_CHUNKS = (
    b"tRNS",
    b"PLTE",
    b"eXIf",
    b"iCCP",
    b"zTXt",
    b"iTXt",
    b"tEXt",
    b"gAMA",
    b"acTL",
    b"fcTL",
    b"fdAT",
    b"IDAT",
)
HEADER_BYTES = 64
LARGE_SIDES = (1, 64, 3000, 20000, 65000, 10**6)
LARGEST_BOMB_BYTES = 5 * 10**7
VALID: tuple[tuple[str, str, dict[str, object]], ...] = (
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "P", {"transparency": 0}),
    ("PNG", "L", {"transparency": 3}),
    ("PNG", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (9, 7))]}),
    *(("JPEG", mode, {}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "RGB", {"progressive": True}),
    *(("TIFF", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "I", "LAB")),
    *(("TIFF", "RGB", {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
    ("TIFF", "1", {"compression": "group4"}),
    ("GIF", "P", {}),
    ("GIF", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (9, 7))]}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("WEBP", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (24, 17))]}),
    *(
        (name, "RGB", {})
        for name in ("BMP", "ICO", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "IM", "ICNS", "AVIF")
    ),
    ("TGA", "RGBA", {"compression": "tga_rle"}),
)


@cache
def valid(index: int) -> bytes:
    """Returns the bytes of a small image."""
    kind, mode, options = VALID[index]
    noise = np.random.default_rng(index).integers(0, 256, (17, 24), np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise.astype(np.uint16) * 257)
    elif mode == "LAB":
        image = Image.merge("LAB", (image, image, image))
    else:
        image = image.convert("RGB").convert(mode)
    file = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {**options, **({"exif": exif.tobytes()} if kind in ("JPEG", "PNG", "WEBP") else {})}
    image.save(file, kind, **options)
    return file.getvalue()


def available() -> list[int]:
    """Returns the numbers of the images that this Pillow can write."""
    found = []
    for index in range(len(VALID)):
        try:
            valid(index)
        except (OSError, KeyError, ValueError):
            continue
        found.append(index)
    return found


def chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def change_chunks(png: bytes, rng: random.Random) -> bytes:
    """Returns a PNG with changed, missing, repeated or additional chunks, all with correct checksums."""
    chunks, at = [], len(SIGNATURE)
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        chunks.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + size]))
        at += 12 + size
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(chunks))
        kind, content = chunks[place]
        match rng.choice(("header", "header", "change", "add", "add", "text", "remove", "repeat", "move", "pixels")):
            case "header":
                chunks[0] = (b"IHDR", mutate(chunks[0][1], rng, most=2))
            case "change":
                chunks[place] = (kind, mutate(content, rng))
            case "add":
                extra = rng.randbytes(rng.choice((0, 1, 2, 6, 26, 768, 3000)))
                chunks.insert(place + 1, (rng.choice(EXTRA_CHUNKS), extra))
            case "text":
                packed = zlib.compress(bytes(rng.choice((10, 10**6, 2 * 10**7))))
                name = rng.choice((b"zTXt", b"iCCP", b"iTXt"))
                prefix = b"x\0\1\0\0\0" if name == b"iTXt" else b"x\0\0"
                chunks.insert(place + 1, (name, prefix + packed))
            case "remove":
                del chunks[place]
            case "repeat":
                chunks.insert(place, chunks[place])
            case "move":
                chunks.insert(rng.randrange(len(chunks)), chunks.pop(place))
            case "pixels":
                pixels = mutate(bytes(rng.choice((1, 1000, 10**6))), rng)
                chunks[place] = (b"IDAT", zlib.compress(pixels))
        if not chunks:
            break
    return SIGNATURE + b"".join(chunk(*each) for each in chunks)


def bomb(rng: random.Random) -> bytes:
    """Returns a valid PNG of extreme sides that compresses very well."""
    depth, colour, channels = rng.choice(
        ((1, 0, 1), (8, 0, 1), (16, 0, 1), (8, 2, 3), (8, 6, 4), (16, 6, 4), (8, 4, 2))
    )
    width, height = rng.choice(LARGE_SIDES), rng.choice(LARGE_SIDES)
    row = 1 + (width * depth * channels + 7) // 8
    packer, left = zlib.compressobj(1), min(height * row, LARGEST_BOMB_BYTES)
    pieces = [packer.compress(bytes(min(10**6, left - done))) for done in range(0, left, 10**6)]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", b"".join(pieces) + packer.flush()) + chunk(b"IEND", b"")


def hostile(content: bytes, rng: random.Random) -> bytes:
    """Returns a damaged or hostile version of an image's bytes, or now and then a decompression bomb."""
    kind = rng.choice(("bytes", "bytes", "head", "head", "chunks", "chunks", "cut", "joined"))
    if rng.random() < 0.01:
        return bomb(rng)
    if kind == "chunks" and content.startswith(SIGNATURE):
        return change_chunks(content, rng)
    if kind == "head":  # where most formats declare sizes
        size = rng.choice((1, 2, 4))
        position = rng.randrange(min(HEADER_BYTES, len(content)))
        value = integer(rng, size).to_bytes(size, rng.choice(("little", "big")))
        return content[:position] + value + content[position + size :]
    if kind == "cut":
        return content[: rng.randrange(len(content))]
    if kind == "joined":
        other = valid(rng.choice(available()))
        return content[: rng.randrange(len(content))] + other[rng.randrange(len(other)) :]
    return mutate(content, rng, most=rng.choice((1, 4, 20)))


def mask_like(rng: random.Random, mode: str, size: tuple[int, int]) -> Image.Image:
    """Returns an image with a shape in it, as masks have."""
    image = Image.new("L", size, rng.choice((0, 255, 128)))
    corners = sorted(rng.randrange(size[0]) for _ in range(2)), sorted(rng.randrange(size[1]) for _ in range(2))
    box = (corners[0][0], corners[1][0], corners[0][1], corners[1][1])
    ImageDraw.Draw(image).rectangle(box, fill=rng.choice((0, 255, 200)))
    if mode in ("LA", "RGBA"):
        colour = Image.new(mode[:-1], size, "white" if rng.random() < 0.5 else "black")
        colour.putalpha(image)
        return colour
    return image.convert(mode)
