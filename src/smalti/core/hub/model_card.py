"""The card of a model on the hub (`README.md`), from its config and the records of its training."""

import json
from pathlib import Path
from typing import Any

from smalti.core.checkpoint_checks import TOKENIZER_FOLDER
from smalti.core.hub.cards import code, front_matter, license_line, listed, table
from smalti.core.hub.ids import HubId
from smalti.core.hub.public_names import public_command
from smalti.core.provenance import RUN_NAME, last_metrics

PIPELINES = {"tokenizer": "image-feature-extraction", "prior": "unconditional-image-generation"}
"""The hub's task of each family, by which it lists models."""
TAGS = {"tokenizer": ["image-tokenizer", "vector-quantization"], "prior": ["image-generation"]}
MEASURED = ("held_out_", "codes_used", "code_perplexity")
"""Beginnings of the names of the metrics that a card has."""
NOT_MEASURED = ("_first_",)
PICTURES = {
    "samples.png": "Samples, not selected",
    "reconstructions.png": "Images, and below each the reconstructions from its codes",
    "neighbours.png": "Samples, and below each the nearest training image",
}

CHANGED = "The weights were changed after the training that is recorded beside them."


def picture_line(name: str) -> str:
    """Returns the line of a card that shows a sheet."""
    return f"![{PICTURES[name]}]({name})"


def model_card(
    described: dict[str, Any],
    run: Path | None,
    target: HubId,
    *,
    facts: dict[str, str],
    fills: bool,
    levels: int,
    license: str | None,
    picture: str | None,
) -> str:
    """Returns the card of a model as Markdown, with the front matter that the hub reads.

    Args:
        described: the model's `config.json`, without local folders.
        run: the folder of its training, which may have no records; None if the weights were changed after it.
        target: where the model will be on the hub.
        facts: what it says of the network, by title.
        fills: whether the model can fill masked parts of images.
        levels: of a prior's tokenizer; sampling needs a prior for each.
        license: the licence, or None for none.
        picture: the name of the sheet beside the card, or None.
    """
    family, kind, provenance = described["family"], described["kind"], described["provenance"]
    record = _read_record(run) if run else {}
    tags = ["smalti", *TAGS[family], *(["inpainting"] if fills else []), kind]
    front = front_matter(license, library_name="smalti", pipeline_tag=PIPELINES[family], tags=tags)
    parts = [front, f"# {target.title}\n", _introduction(family, kind, provenance, fills, levels)]
    if picture:
        parts.append(f"{picture_line(picture)}\n\n*{PICTURES[picture]}.*\n")
    parts.append(f"## Use\n\n{_usage(family, target, provenance, fills, levels)}")
    rows = {
        "kind": code(kind),
        **facts,
        **_data(provenance, described["config"]),
        "steps": f"{provenance['steps']:,}" if run and "steps" in provenance else "",
        "digest": code(described["digest"]),
        "digest of its tokenizer": code(provenance["tokenizer_digest"]) if "tokenizer_digest" in provenance else "",
        "software": _software(described, record),
    }
    parts.append(f"## The model\n\n{table(rows)}\n")
    if run and (measured := _measured(run, provenance.get("steps"))):
        parts.append(
            "## Held-out numbers\n\nMeasured at the last step, on images that the training did not see.\n\n"
            f"{table({code(name): _number(name, value) for name, value in measured.items()})}\n"
        )
    parts.append(f"## Recipe\n\n{_recipe(record, provenance) if run else CHANGED}\n")
    parts.append(f"## Licence\n\n{license_line(license, 'weights')}\n")
    return "\n".join(parts)


def _introduction(family: str, kind: str, provenance: dict[str, Any], fills: bool, levels: int) -> str:
    data = f" It was trained on the images {code(str(provenance['image_source']))}." if _source(provenance) else ""
    if family == "tokenizer":
        does = "turns images into grids of discrete codes, and codes into images"
        if kind in ("selfvae", "vae"):
            does = "turns images into latents, and latents into images"
        return f"A tokenizer (`{kind}`) of smalti, which {does}.{data}\n"
    draws = "new images" if levels == 1 else f"level {_level(provenance)} of the {levels} levels of new images"
    also = " and fills masked parts of images" if fills else ""
    return f"A prior (`{kind}`) of smalti, which draws {draws}{also}.{data}\n"


def priors_of_levels(target: HubId, provenance: dict[str, Any], levels: int) -> list[str]:
    """Returns the names of the priors that sampling needs, coarsest first: this one, and `LEVEL-N` for the others."""
    return [str(target) if level == _level(provenance) else f"LEVEL-{level}" for level in range(levels)]


def _level(provenance: dict[str, Any]) -> int:
    return provenance.get("level", 0)


def _usage(family: str, target: HubId, provenance: dict[str, Any], fills: bool, levels: int) -> str:
    """Returns how to load the model, in three lines, and the command."""
    if family == "tokenizer":
        program = [
            "from smalti import load_tokenizer",
            "",
            f'tokenizer = load_tokenizer("{target}")',
            "codes = tokenizer.encode(images)  # images: float (b, c, h, w) in [-1, 1]",
            "reconstructions = tokenizer.decode(codes)",
        ]
        commands = [f"smalti build-latents --tokenizer {target} --images my/photos"]
        rest = ""
    else:
        names = priors_of_levels(target, provenance, levels)
        loaded = ", ".join(f'load_prior("{name}")' for name in names)
        program = [
            "from smalti import load_prior, sample",
            "",
            f"prior = {loaded}" if levels == 1 else f"priors = [{loaded}]",
            f"images = sample({'prior' if levels == 1 else 'priors'}, num=16)  # uint8 (16, c, h, w)",
        ]
        commands = [f"smalti sample --prior {' '.join(names)}"]
        commands += [f"smalti inpaint --prior {' '.join(names)} --image in.png --mask mask.png"] if fills else []
        copy = HubId(target.repo, target.revision, target.within(TOKENIZER_FOLDER))
        rest = f'\nIts tokenizer is in the folder `{TOKENIZER_FOLDER}`: `load_tokenizer("{copy}")`.\n'
        if levels > 1:
            others = ", ".join(f"`{name}`" for name in names if name != str(target))
            rest += f"\nSampling needs the priors of all levels; {others} stands for the ones of the other levels.\n"
    lines = "\n".join(["```python", *program, "```"])
    shell = "\n".join(["```", *commands, "```"])
    return f"{lines}\n\nOr from the command line:\n\n{shell}\n{rest}"


def _source(provenance: dict[str, Any]) -> str:
    source = provenance.get("image_source")
    return source if isinstance(source, str) else ""


def _data(provenance: dict[str, Any], config: dict[str, Any]) -> dict[str, str]:
    """Returns what is known of the training images."""
    names, counts = provenance.get("label_names") or [], provenance.get("images") or {}
    classes = len(names) or config.get("classes") or 0
    prepared = provenance.get("preprocessing") or {}
    size = f"{prepared['height']}×{prepared['width']}" if {"height", "width"} <= prepared.keys() else ""
    number = f"{counts['training']:,} to train, {counts['held_out']:,} held out" if counts else ""
    flips = provenance.get("flips", prepared.get("flips"))
    ways = [
        f"{size} pixels" if size else "",
        f"fit: {prepared['fit']}" if "fit" in prepared else "",
        "" if flips is None else "with mirror images" if flips else "no mirror images",
        f"{prepared['crops']} random crop(s) of each" if "crops" in prepared else "",
    ]
    return {
        "trained on": ", ".join(filter(None, [code(_source(provenance)) if _source(provenance) else "", number])),
        "images as": "; ".join(filter(None, ways)),
        "classes": f"{classes}: {listed(list(names))}" if names else str(classes or ""),
        "left out": f"{provenance['skipped_images']} damaged images" if "skipped_images" in provenance else "",
        "started from": code(str(provenance["init"])) if "init" in provenance else "",
        "converted from": code(str(provenance["converted_from"])) if "converted_from" in provenance else "",
    }


def _read_record(run: Path) -> dict[str, Any]:
    """Returns `run.json`; nothing if there is none, as of a converted model."""
    try:
        return json.loads((run / RUN_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _measured(run: Path, steps: int | None) -> dict[str, float]:
    try:
        metrics = last_metrics(run, until=steps)
    except (OSError, ValueError, KeyError):
        return {}
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith(MEASURED) and not any(part in name for part in NOT_MEASURED)
    }


def _number(name: str, value: float) -> str:
    return f"{value:.1%}" if name.startswith("codes_used") else f"{value:.5g}"


def _software(described: dict[str, Any], record: dict[str, Any]) -> str:
    versions = record.get("versions") or ({"smalti": described["smalti"]} if "smalti" in described else {})
    commit = [f"commit {record['git_commit']}"] if record.get("git_commit") else []
    return ", ".join([*(f"{name} {number}" for name, number in versions.items()), *commit])


def _recipe(record: dict[str, Any], provenance: dict[str, Any]) -> str:
    if not record.get("command"):
        return "The command that trained it is not recorded beside it."
    seed = record.get("settings", {}).get("seed")
    seeded = f" The seed is {seed}." if seed is not None else ""
    command = public_command(str(record["command"]))
    text = f"```\n{command}\n```\n\nAll settings of the network are in `config.json`.{seeded}"
    if "tokenizer_digest" in provenance:
        text += f" The codes were made by the tokenizer in the folder `{TOKENIZER_FOLDER}`."
    return text
