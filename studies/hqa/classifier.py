"""HQA's evaluator: a classifier of digits, trained once, which scores reconstructions of test images by its features.

The data that it is trained and tested on is opened in `study.py`.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from smalti.core.devices import best_device
from smalti.core.randomness import generator_for
from smalti.images.decoding import to_float
from smalti.images.image_set import ImageRows, ImageSet
from smalti.metrics.frechet import Moments, frechet_distance
from smalti.metrics.image_errors import mse
from smalti.studies.experiment import Evaluator

CLASSIFIER_FEATURES = 128
IMAGES_AT_ONCE = 250
DIGEST_LETTERS = 10
"""Letters of the digests of both sets of images in the names of results."""


class Classifier(nn.Module):
    """A small convolutional network for digits. Fréchet distances are measured on its features.

    Args:
        classes: The number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        stages = [
            layer
            for before, after in ((1, 16), (16, 32), (32, 64))
            for layer in (nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        ]
        self.body = nn.Sequential(*stages, nn.Flatten(), nn.Linear(64 * 16, CLASSIFIER_FEATURES), nn.ReLU())
        self.head = nn.Linear(CLASSIFIER_FEATURES, classes)

    def forward(self, images: Float[Tensor, "b 1 32 32"]) -> Float[Tensor, "b k"]:
        """Returns logits."""
        return self.head(self.body(images))


def train_classifier(path: Path, images: ImageSet, steps: int) -> Classifier:
    """Loads the classifier at `path`, or trains it on real digits and saves it there."""
    torch.manual_seed(0)
    classifier = Classifier(len(images.label_names)).to(best_device())
    if path.exists():
        classifier.load_state_dict(torch.load(path, map_location=best_device(), weights_only=True))
        return classifier.eval()
    rows = ImageRows(images, split="all", flips=False)
    order = torch.randint(len(rows), (steps, 64), generator=generator_for(0))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    for numbers in order:
        batch = rows.__getitems__(numbers.tolist())
        logits = classifier(to_float(batch["images"]).to(best_device()))
        loss = F.cross_entropy(logits, batch["labels"].to(best_device()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(classifier.state_dict(), path)
    return classifier.eval()


class ClassifierEvaluator(Evaluator):
    """Scores reconstructions of test images: MSE, Fréchet distance of the classifier's features, and its errors.

    Args:
        train: Images to train the classifier on.
        test: The test images, in [-1, 1].
        labels: The labels of the test images.
        steps: Training steps of the classifier.
        folder: The folder that keeps the classifier.

    Attributes:
        classifier: The classifier, trained once.
    """

    def __init__(
        self, train: ImageSet, test: Float[Tensor, "n 1 h w"], labels: Int64[Tensor, " n"], *, steps: int, folder: Path
    ) -> None:
        tested = hashlib.sha256(test.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:DIGEST_LETTERS]
        trained = f"{steps}steps-{train.fingerprint[:DIGEST_LETTERS]}"
        super().__init__(f"{len(test)}images-{tested}-{trained}")
        self._test, self._labels = test, labels
        self.classifier = train_classifier(folder / f"classifier-{trained}.pt", train, steps)

    @torch.no_grad()
    def scores(self, images: Float[Tensor, "n 1 h w"]) -> dict[str, float]:
        """Returns `mse` in [0, 1] units, `frechet`, and `error`, the share of images that are classified wrongly."""
        real, reconstructed, wrong = Moments(CLASSIFIER_FEATURES), Moments(CLASSIFIER_FEATURES), 0
        for rows in torch.arange(len(images)).split(IMAGES_AT_ONCE):
            features = self.classifier.body(images[rows].to(best_device()))
            reconstructed.update(features)
            real.update(self.classifier.body(self._test[rows].to(best_device())))
            wrong += int((self.classifier.head(features).argmax(1).cpu() != self._labels[rows]).sum())
        return {
            "mse": float(mse(images, self._test).mean()),
            "frechet": frechet_distance(real, reconstructed),
            "error": wrong / len(images),
        }
