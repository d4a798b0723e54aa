"""Segmentation: a decoder of segmentation-models-pytorch on the backbone, both trained; cloud or snow is two classes.

Images keep their resolution: trained on crops, tested in overlapping windows of the same side. What colours alone say
is a softmax regression on each pixel's values, their squares, and mean and deviation around it.
N images, C bands, H x W pixels, K classes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from geokr import probes
from geokr.config import ConfigError
from geokr.evaluate_data import Data
from geokr.evaluate_dense import Room, check_images, kept
from geokr.evaluate_features import Entrant, Preparation
from geokr.evaluate_images import form
from geokr.evaluate_pairs import OUTSIDE, Pairs
from geokr.evaluate_training import fit, steps_of, turned, turns
from geokr.feature_maps import check_scales, load_maps
from geokr.models import BackboneSpec, seeded

STRIDE = 32  # of decoders: sides are multiples of it
WINDOWS = 16  # at once
AROUND = 9  # pixels across, of mean and deviation for the colour baseline
PIXELS = 20_000  # which that is fitted on


def library() -> Any:
    """segmentation-models-pytorch. Raises ConfigError with the command that installs it."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ConfigError(
            "--task segment needs segmentation-models-pytorch: pip install -e '.[evaluate]' in geokr's folder"
        ) from error
    return smp


@dataclass(frozen=True, slots=True, eq=False)
class Confusion:
    """Of each test image: [N, K, K] pixels of true class (rows) by predicted one."""

    counts: np.ndarray

    def values(self, ids: np.ndarray | None = None) -> dict[str, float]:
        """Mean IoU and F1 over the classes that are there or were said to be, and the share of pixels that is right."""
        iou_K, f1_K = _by_class(self.counts if ids is None else self.counts[ids])
        total_KK = (self.counts if ids is None else self.counts[ids]).sum(0)
        right = float(np.trace(total_KK) / max(total_KK.sum(), 1))
        return {"miou": float(np.nanmean(iou_K)), "pixel_accuracy": right, "f1": float(np.nanmean(f1_K))}

    def by_class(self) -> dict[str, np.ndarray]:
        iou_K, f1_K = _by_class(self.counts)
        return {"iou": iou_K, "f1": f1_K}


def _by_class(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total_KK = counts.sum(0).astype(np.float64)
    right_K, said_K, true_K = np.diag(total_KK), total_KK.sum(0), total_KK.sum(1)
    union_K = said_K + true_K - right_K
    there = union_K > 0
    union_K = np.where(there, union_K, 1.0)
    return np.where(there, right_K / union_K, np.nan), np.where(there, 2 * right_K / (union_K + right_K), np.nan)


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """The task; see :class:`geokr.evaluate_dense.Task`. crop: side of crops and windows."""

    pairs: Pairs
    spec: BackboneSpec
    device: torch.device
    decoder: str
    crop: int
    epochs: int
    batch: int
    resamples: int = 1000
    _images: dict[str, Any] = field(default_factory=dict)
    _masks: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """All that can be wrong shows here: architecture, decoder, pixels."""
        check_scales(self.spec)
        self._model(None, "")
        room = Room()
        for name, part in self.data.parts.items():
            self._images[name], self._masks[name] = kept(part.read, room), kept(self.pairs.masks[name], room)
            check_images(part.names, self._images[name])

    @property
    def data(self) -> Data:
        return self.pairs.data

    def check(self, entrant: Entrant) -> None:
        if entrant.backbone is not None:
            self._model(entrant.backbone, entrant.name)

    def run(self, entrant: Entrant, train: np.ndarray, val: np.ndarray, seed: int) -> Confusion:
        if entrant.backbone is None:
            return self._colours(entrant.prepare, train, val, seed)
        name, prepare, rng = entrant.name, entrant.prepare, np.random.default_rng(seed)
        with seeded(seed):
            model = self._model(entrant.backbone, name).to(self.device).to(memory_format=torch.channels_last).train()
            names = self.data.parts["train"].names
            sizes = [form(Path(names[int(n)]))[2:] for n in train]  # of files, since there may be too many pixels
            area = np.mean([height * width for height, width in sizes]) / self.crop**2
            steps = steps_of(max(len(train), round(len(train) * area)), self.batch, self.epochs)

            def loss_of(step: int) -> Tensor:
                images, masks = self._crops(prepare, rng.choice(train, self.batch), rng)
                logits = model(images.to(self.device, memory_format=torch.channels_last))
                return _loss(logits, masks.to(self.device))

            def score() -> float:
                return self._tested(model, prepare, "val", val).values()["miou"]

            fit(model, model.encoder, steps, loss_of, score, name)
        return self._tested(model, prepare, "test", np.arange(len(self.data.parts["test"])))

    def _model(self, backbone: nn.Module | None, name: str) -> Any:
        try:
            model = library().create_model(
                self.decoder,
                encoder_name=f"tu-{self.spec.name}",
                encoder_weights=None,
                in_channels=self.spec.bands,
                classes=len(self.data.classes),
            )
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"--decoder {self.decoder}: segmentation-models-pytorch makes none for {self.spec.name} ({error}); "
                "take unet, fpn or another backbone"
            ) from error
        if backbone is not None:
            load_maps(model.encoder.model, backbone, name)
        return model

    def _crops(self, prepare: Preparation, ids: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Crops at random places, so turned: images [N, C, S, S], masks [N, S, S]."""
        images, masks = [], []
        for image, mask in zip(self._images["train"](ids.tolist()), self._masks["train"](ids.tolist()), strict=True):
            rows, columns = (_place(length, self.crop, rng) for length in mask.shape)
            turn = turns(rng)
            images.append(turned(self._filled(prepare([image[rows, columns]])[0]), turn))
            masks.append(turned(self._filled(torch.from_numpy(mask[rows, columns].astype(np.int64)), OUTSIDE), turn))
        return torch.stack(images), torch.stack(masks)

    def _filled(self, pixels: Tensor, value: int = 0) -> Tensor:
        """[..., H, W] filled at the right and below to the crop's side. 0 is the mean of normalised images."""
        height, width = pixels.shape[-2:]
        return pad(pixels, (0, self.crop - width, 0, self.crop - height), value=value)

    def _tested(self, model: nn.Module, prepare: Preparation, split: str, ids: np.ndarray) -> Confusion:
        counts = []
        for n in ids.tolist():
            logits_KHW = self._windows(model, prepare(self._images[split]([n]))[0])
            counts.append(confusion(logits_KHW.argmax(0).cpu().numpy(), self._masks[split]([n])[0], self._classes))
        return Confusion(np.array(counts))

    @property
    def _classes(self) -> int:
        return len(self.data.classes)

    @torch.no_grad()
    def _windows(self, model: nn.Module, image_CHW: Tensor) -> Tensor:
        """Logits [K, H, W], the mean of the windows that a pixel lies in."""
        height, width = image_CHW.shape[1:]
        places = [(y, x) for y in _starts(height, self.crop) for x in _starts(width, self.crop)]
        total = torch.zeros(self._classes, height, width, device=self.device)
        times = torch.zeros(height, width, device=self.device)
        for first in range(0, len(places), WINDOWS):
            some = places[first : first + WINDOWS]
            windows = [self._filled(image_CHW[:, y : y + self.crop, x : x + self.crop]) for y, x in some]
            batch = torch.stack(windows).to(self.device, memory_format=torch.channels_last)
            for (y, x), logits in zip(some, model(batch).float(), strict=True):
                inside = total[:, y : y + self.crop, x : x + self.crop]
                inside += logits[:, : inside.shape[1], : inside.shape[2]]
                times[y : y + self.crop, x : x + self.crop] += 1
        return total / times

    # ------------------------------------------------------------------------------------- colours alone

    def _colours(self, prepare: Preparation, train: np.ndarray, val: np.ndarray, seed: int) -> Confusion:
        rng = np.random.default_rng(seed)
        fit_on, choose_by = (self._pixels(prepare, *where, rng) for where in (("train", train), ("val", val)))
        chosen, counts = probes.chosen_linear(fit_on, choose_by)[0], []
        for n in range(len(self.data.parts["test"])):
            mask = self._masks["test"]([n])[0]
            found = chosen(colours(prepare(self._images["test"]([n]))[0])).argmax(1).reshape(mask.shape)
            counts.append(confusion(found, mask, self._classes))
        return Confusion(np.array(counts))

    def _pixels(
        self, prepare: Preparation, split: str, ids: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Some pixels of these images: (what is known of them, their classes as [N, K])."""
        known, classes = [], []
        for n in ids.tolist():
            mask = self._masks[split]([n])[0].ravel()
            inside = np.flatnonzero(mask != OUTSIDE)
            some = rng.permutation(inside)[: max(1, PIXELS // len(ids))]
            known.append(colours(prepare(self._images[split]([n]))[0])[some])
            classes.append(mask[some])
        return np.concatenate(known), np.eye(self._classes)[np.concatenate(classes)]


def colours(image_CHW: Tensor) -> np.ndarray:
    """Of each pixel [H * W, 4 * C]: values, their squares, mean and deviation of the pixels around it."""
    around = {"kernel_size": AROUND, "stride": 1, "padding": AROUND // 2, "count_include_pad": False}
    mean = avg_pool2d(image_CHW[None], **around)[0]
    deviation = (avg_pool2d(image_CHW[None].square(), **around)[0] - mean.square()).clamp(min=0).sqrt()
    return torch.cat([image_CHW, image_CHW.square(), mean, deviation]).flatten(1).T.numpy()


def confusion(found_HW: np.ndarray, mask_HW: np.ndarray, classes: int) -> np.ndarray:
    """[K, K] pixels of true class (rows) by found one; those outside count nowhere."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    said, truth = torch.from_numpy(found_HW), torch.from_numpy(mask_HW.astype(np.int64))
    if not (truth != OUTSIDE).any():
        return np.zeros((classes, classes), np.int64)
    return multiclass_confusion_matrix(said, truth, num_classes=classes, ignore_index=OUTSIDE).numpy()


def _loss(logits_NKHW: Tensor, masks_NHW: Tensor) -> Tensor:
    """Mean cross entropy over the pixels that count, of which a batch may have none."""
    total = cross_entropy(logits_NKHW.float(), masks_NHW, ignore_index=OUTSIDE, reduction="sum")
    return total / (masks_NHW != OUTSIDE).sum().clamp(min=1)


def crop_side(side: int) -> int:
    """The next multiple of the decoders' stride, two of them at least: smaller maps have nothing to normalise over."""
    return max(2 * STRIDE, -(-side // STRIDE) * STRIDE)


def _place(length: int, side: int, rng: np.random.Generator) -> slice:
    start = int(rng.integers(max(length - side, 0) + 1))
    return slice(start, min(start + side, length))


def _starts(length: int, side: int) -> list[int]:
    """Where windows begin that overlap by half, the last one at the edge."""
    return [*range(0, max(length - side, 0), side // 2), max(length - side, 0)]
