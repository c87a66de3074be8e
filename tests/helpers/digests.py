"""Prints digests of what every kind of model computes, to show that a refactoring changes no number.

Runs the commands of a checkout (two training steps of each tokenizer and prior, a latent set, samples, fills) with
fixed seeds in a temporary folder, and prints a SHA-256 of each result's numbers: weights, codes and pixels, without
metadata. Run it on two commits and compare the lines:

    $ python tests/helpers/digests.py --checkout ../before > before.txt
    $ python tests/helpers/digests.py > after.txt
    $ diff before.txt after.txt
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

TOKENIZERS = {
    "hrvq": ["--widths", "16", "16"],
    "vqvae": ["--widths", "16", "16", "--codebook-size", "64"],
    "vqvae2": ["--widths", "16", "16", "--levels", "2"],
    "vqgan": [
        "--widths",
        "32",
        "32",
        "--latent-width",
        "32",
        "--discriminator-start",
        "1",
        "--discriminator-width",
        "8",
    ],
    "hqa": [],
    "hams": [],
    "vae": ["--batch-size", "4"],
    "selfvae": ["--batch-size", "4"],
}
PRIORS = {  # name: tokenizer, flags of train_prior.py, flags of sample.py
    "hourglass": ("hrvq", ["--prior", "hourglass"], ["--steps", "5"]),
    "maskgit": ("hrvq", ["--prior", "maskgit"], ["--steps", "5"]),
    "pixelcnn": ("hrvq", ["--prior", "pixelcnn", "--model-width", "32"], []),
    "transformer": ("hrvq", ["--prior", "transformer", "--model-width", "48"], []),
    "realnvp": ("vae", ["--prior", "realnvp"], []),
    "hourglass-top": ("vqvae2", ["--prior", "hourglass", "--level", "0"], []),
    "hourglass-bottom": ("vqvae2", ["--prior", "hourglass", "--level", "1"], []),
}
ADAMW = ["--prior", "hourglass", "--optimizer", "adamw", "--accumulation", "2"]


def digest(arrays: dict[str, np.ndarray]) -> str:
    """Returns the first 16 hex digits of a SHA-256 over the arrays' names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.dtype} {array.shape}".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()[:16]


def model_digest(folder: Path) -> str:
    """Returns the digest of the weights in a model folder."""
    return digest(load_file(folder / "model.safetensors"))


def latents_digest(path: Path) -> str:
    """Returns the digest of all numeric data sets in a latent set."""
    arrays: dict[str, np.ndarray] = {}

    def add(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset) and item.dtype.kind in "iufb":
            arrays[name] = item[()]

    with h5py.File(path) as file:
        file.visititems(add)
    return digest(arrays)


def picture_digest(path: Path) -> str:
    """Returns the digest of an image file's pixels."""
    return digest({"pixels": np.asarray(Image.open(path))})


def main() -> None:
    """Runs the commands of the checkout and prints one line per result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[2])
    checkout = parser.parse_args().checkout.resolve()
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # recompiling every import takes seconds per command

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)

        def run(script: str, *arguments: str | Path) -> None:
            line = [sys.executable, str(checkout / "scripts" / f"{script}.py"), *map(str, arguments)]
            finished = subprocess.run(line, cwd=work, env=environment, capture_output=True, text=True, check=False)
            if finished.returncode:
                sys.exit(f"{' '.join(line)}\n{finished.stdout}{finished.stderr}")

        def show(name: str, value: str) -> None:
            print(f"{name:32} {value}", flush=True)

        common = ["--steps", "2", "--precision", "fp32", "--images", "emoji"]
        for kind, flags in TOKENIZERS.items():
            folder = work / "tokenizers" / kind
            run("train_tokenizer", "--tokenizer", kind, *common, "--out", folder, "--batch-size", "8", *flags)
            show(f"tokenizer {kind}", model_digest(folder))
        for kind in ("hrvq", "vqvae2", "vae"):
            path = work / f"{kind}.h5"
            run("build_latents", "--tokenizer", work / "tokenizers" / kind, "--out", path, "--precision", "fp32")
            show(f"latents {kind}", latents_digest(path))
        for name, (tokenizer, flags, _) in {**PRIORS, "hourglass-adamw": ("hrvq", ADAMW, [])}.items():
            folder = work / "priors" / name
            training = ["--latents", work / f"{tokenizer}.h5", "--out", folder, "--steps", "2", "--batch-size", "8"]
            run("train_prior", *flags, *training, "--precision", "fp32", "--sheet-samples", "0")
            show(f"prior {name}", model_digest(folder))
        for name in ("hourglass", "maskgit", "pixelcnn", "transformer", "realnvp"):
            out = work / f"{name}.png"
            sampling = ["--prior", work / "priors" / name, "--num", "4", "--precision", "fp32", "--out", out]
            run("sample", *sampling, *PRIORS[name][2])
            show(f"samples {name}", picture_digest(out))
        out = work / "two.png"
        levels = [work / "priors" / "hourglass-top", work / "priors" / "hourglass-bottom"]
        run("sample", "--prior", *levels, "--num", "4", "--steps", "3", "--precision", "fp32", "--out", out)
        show("samples two levels", picture_digest(out))
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        mask = np.zeros((32, 32), np.uint8)
        mask[8:20, 4:24] = 255
        Image.fromarray(noise).save(work / "image.png")
        Image.fromarray(mask).save(work / "mask.png")
        for name in ("hourglass", "maskgit", "pixelcnn", "transformer"):
            out = work / f"fill-{name}.png"
            filling = ["--prior", work / "priors" / name, "--image", work / "image.png", "--mask", work / "mask.png"]
            run("inpaint", *filling, "--precision", "fp32", "--out", out, "--candidates", "2")
            for path in sorted(work.glob(f"fill-{name}*.png")):
                show(f"fill {path.stem}", picture_digest(path))


if __name__ == "__main__":
    main()
