"""What an evaluation compares: an export, its baselines, and how images are made ready for each of them."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import geokr
from geokr import band_names, evaluate_features
from geokr.config import ConfigError
from geokr.evaluate_data import Data
from geokr.evaluate_features import Entrant, Preparation
from geokr.models import BackboneSpec, build_backbone, seeded
from geokr.weights import load_into, read_state

COLOUR = "colour"


def entrants(
    main: str, baselines: Sequence[str], data: Data, bands: Sequence[int] | None, device: torch.device, *, large: bool
) -> list[Entrant]:
    """The weights and what they are compared with, all loaded before anything is computed.

    Exports are given images as their own cards say, the rest as the first one's does. large: images keep their size.
    """
    first = _exported(main, data, bands, large=large)
    assert first.backbone is not None
    about: Any = first.backbone.card
    spec, prepare = spec_of(about), first.prepare
    found = [first]
    for name in baselines:
        if name == COLOUR:
            found.append(Entrant(COLOUR, None, prepare))
        elif name == "random":
            with seeded(0):
                backbone = build_backbone(spec)
            evaluate_features.calibrate(backbone, data.parts["train"], prepare, device)
            found.append(Entrant("random", backbone, prepare))
        elif name == "imagenet":
            backbone = _imagenet(spec)
            found.append(Entrant("imagenet", backbone, _as_imagenet(backbone, about, prepare)))
        elif Path(f"{name}.json").exists():
            found.append(_exported(name, data, bands, large=large, like=(Path(main).name, about)))
        else:
            backbone = build_backbone(spec)
            load_into(backbone, read_state(name), name)
            found.append(Entrant(Path(name).name, backbone, prepare))
    return _told_apart(found, [main, *baselines])


def _told_apart(found: list[Entrant], words: Sequence[str]) -> list[Entrant]:
    """Each under a name of its own: where files have one, with the folders above them."""
    names = [entrant.name for entrant in found]
    return [
        dataclasses.replace(entrant, name=word) if names.count(entrant.name) > 1 else entrant
        for entrant, word in zip(found, words, strict=True)
    ]


def _exported(
    path: str,
    data: Data,
    bands: Sequence[int] | None,
    *,
    large: bool,
    like: tuple[str, Mapping[str, Any]] | None = None,
) -> Entrant:
    """like: name and card of the weights that it is compared with, to whose bands ``bands`` belong."""
    backbone, name = geokr.load_backbone(path), Path(path).name
    about: Any = backbone.card
    if like is not None:
        if large and about["backbone"]["name"] != like[1]["backbone"]["name"]:
            raise ConfigError(
                f"{path}: is a {about['backbone']['name']}, {like[0]} a {like[1]['backbone']['name']}; segment and "
                "detect compare weights of one architecture"
            )
        bands = _bands_of(name, about, like, data, bands)
    prepare = preparation(name, about, data, bands)
    return Entrant(name, backbone, prepare.as_large() if large else prepare)


def _bands_of(
    name: str, about: Mapping[str, Any], like: tuple[str, Mapping[str, Any]], data: Data, bands: Sequence[int] | None
) -> Sequence[int] | None:
    """Which of the images' bands other weights take, from 1; None to go by the images' own names of them."""
    own, first = ([band["name"] for band in card["bands"]] for card in (about, like[1]))
    if own == first or (bands is None and data.names):
        return bands
    if not set(own) <= set(first):
        raise ConfigError(
            f"{name}: takes {', '.join(own)}, {like[0]} {', '.join(first)}; nothing says which of the images' bands "
            "those are: compare them one by one, each with its --bands"
        )
    given = range(1, len(first) + 1) if bands is None else bands
    return [given[first.index(band)] for band in own]


def _as_imagenet(backbone: nn.Module, about: Mapping[str, Any], prepare: Preparation) -> Preparation:
    """Images as ImageNet's weights saw them, where they are of 8 bits in red, green and blue; else as the card says.

    Their first convolution takes red, green and blue in this order, whatever the card's is.
    """
    names, config = [band["name"] for band in about["bands"]], getattr(backbone, "pretrained_cfg", None)
    colours = [band_names.colour(name) for name in names]
    if config is None or about["input"]["dtype"] != "uint8" or sorted(map(str, colours)) != ["blue", "green", "red"]:
        return prepare
    bands = tuple(prepare.bands[colours.index(colour)] for colour in ("red", "green", "blue"))
    mean, std = ([255.0 * value for value in config[key]] for key in ("mean", "std"))
    return Preparation(mean, std, prepare.side, bands)


def _imagenet(spec: BackboneSpec) -> nn.Module:
    try:
        return build_backbone(spec, pretrained=True)
    except ConfigError as error:
        raise ConfigError(
            f"--baselines imagenet: timm's weights for {spec.name!r} cannot be had ({error.__cause__ or error}). Fetch "
            "them elsewhere and give their file in place of the word, or leave it out"
        ) from error


def spec_of(about: Mapping[str, Any]) -> BackboneSpec:
    """The architecture that a card names."""
    return BackboneSpec(about["backbone"]["name"], len(about["bands"]), about["backbone"]["image_size"])


def preparation(weights: str, about: Mapping[str, Any], data: Data, bands: Sequence[int] | None) -> Preparation:
    """How images become what a backbone takes. Raises ConfigError where they are not what its card describes."""
    names = [band["name"] for band in about["bands"]]
    if bands is None and data.names:
        places = [band_names.place_of(name, data.names) for name in names]
        if lacking := [name for name, place in zip(names, places, strict=True) if place is None]:
            if len(lacking) < len(names) or data.bands != len(names):
                raise ConfigError(
                    f"--data {data.path}: has bands {', '.join(data.names)}, {weights} takes {', '.join(names)}; say "
                    f"which is {lacking[0]} with --bands, from 1, in that order"
                )
        else:
            bands = [place + 1 for place in places if place is not None]
    if bands is None:
        if data.bands != len(names):
            raise ConfigError(
                f"--data {data.path}: images of {data.bands} band(s), {weights} takes {len(names)} "
                f"({', '.join(names)}); say which with --bands, from 1, in that order"
            )
        bands = range(1, len(names) + 1)
    if len(bands) != len(names) or not all(1 <= band <= data.bands for band in bands):
        raise ConfigError(
            f"--bands {' '.join(map(str, bands))}: expected {len(names)} numbers from 1 to {data.bands}, for "
            f"{', '.join(names)}"
        )
    if data.dtype != about["input"]["dtype"]:
        raise ConfigError(
            f"--data {data.path}: images of {data.dtype}, {weights} was trained on {about['input']['dtype']}; its "
            "mean and deviation mean nothing for them: convert the images"
        )
    chosen = tuple(band - 1 for band in bands)
    return Preparation(about["input"]["mean"], about["input"]["std"], about["backbone"]["image_size"], chosen)
