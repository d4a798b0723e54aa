"""What the dataset and the configuration together say about a run, resolved and checked before anything is built."""

import hashlib
from dataclasses import dataclass

from geokr.config import ConfigError, suggestion
from geokr.manifests import Band, Manifest, dump_manifest
from geokr.models import BackboneSpec, check_backbone_name
from geokr.options import PretrainOptions
from geokr.schedules import steps_of_epochs
from geokr.train import Plan


@dataclass(frozen=True, slots=True)
class Facts:
    """What the dataset and the configuration together say about a run."""

    manifest: Manifest
    bands: tuple[Band, ...]
    spec: BackboneSpec
    mean: list[float]
    std: list[float]
    steps: int

    @property
    def dataset_hash(self) -> str:
        """SHA-256 of the manifest, which lists the hash of every shard."""
        return hashlib.sha256(dump_manifest(self.manifest)).hexdigest()

    @property
    def band_indices(self) -> tuple[int, ...]:
        """Places of the model's bands among the record's, from 0."""
        return tuple(self.manifest.bands.index(band) for band in self.bands)

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(band.name for band in self.bands)


def choose_bands(manifest: Manifest, names: tuple[str, ...] | None) -> tuple[Band, ...]:
    """The dataset's bands that the model takes. Raises ConfigError naming those it does not have."""
    have = {band.name: band for band in manifest.bands}
    for name in names or ():
        if name not in have:
            raise ConfigError(
                f"model.bands: the dataset has no band {name!r}{suggestion(name, have)}; it has {', '.join(have)}"
            )
    if names is not None and (not names or len(set(names)) != len(names)):
        raise ConfigError(f"model.bands={list(names)}: expected one band or more, each once, out of {', '.join(have)}")
    return manifest.bands if names is None else tuple(have[name] for name in names)


def statistics(manifest: Manifest, bands: tuple[Band, ...], normalisation: str) -> tuple[list[float], list[float]]:
    """Mean and std of each band as the model's input is normalised. Raises ConfigError where that cannot be."""
    if normalisation == "published":
        if manifest.tile.dtype != "uint8":
            raise ConfigError(
                f"model.normalisation=published divides by 255, but the dataset's tiles are {manifest.tile.dtype}; "
                "use model.normalisation=dataset"
            )
        return [0.0] * len(bands), [255.0] * len(bands)
    at = [manifest.bands.index(band) for band in bands]
    mean, std = ([values[i] for i in at] for values in (manifest.train.mean, manifest.train.std))
    for band, deviation in zip(bands, std, strict=True):
        if deviation <= 0:
            raise ConfigError(f"band {band.name!r} is constant over the training tiles; leave it out of model.bands")
    return mean, std


def gather_facts(options: PretrainOptions, manifest: Manifest) -> Facts:
    """Resolves what the configuration leaves to the dataset. Raises ConfigError for what does not fit it."""
    names = ", ".join(source.shown for source in options.data.sources)
    if manifest.train.records == 0:
        raise ConfigError(f"data.records={names}: the dataset has no training records; pack more scenes")
    if len(manifest.classes) < 2:
        only = "".join(entry.name for entry in manifest.classes)
        raise ConfigError(
            f"data.records={names}: the dataset has one class only ({only}), so all tiles have the same label and "
            "there is nothing to learn: labels.merge or labels.drop left no other; pack again with two or more"
        )
    size = options.data.image_size or manifest.tile.size
    if size > manifest.tile.size:
        raise ConfigError(
            f"data.image_size={size} is larger than the dataset's tiles of {manifest.tile.size} px: use at most that, "
            "or pack with a larger tile.size"
        )
    check_backbone_name(options.model.backbone)
    bands = choose_bands(manifest, options.model.bands)
    mean, std = statistics(manifest, bands, options.model.normalisation)
    if options.train.max_steps is not None:
        steps = options.train.max_steps
    else:
        assert options.train.epochs is not None
        steps = steps_of_epochs(options.train.epochs, manifest.train.records, options.data.global_batch)
    spec = BackboneSpec(options.model.backbone, len(bands), size, options.model.drop_path)
    return Facts(manifest, bands, spec, mean, std, steps)


def make_plan(options: PretrainOptions, steps: int) -> Plan:
    """The run in steps; null intervals mean ten times in a run."""
    tenth = max(1, -(-steps // 10))
    return Plan(
        steps=steps,
        global_batch=options.data.global_batch,
        log_every=options.log.every_steps,
        validate_every=options.validation.every_steps or tenth,
        checkpoint_every=options.checkpoint.every_steps or tenth,
    )
