"""Detection: torchvision's RetinaNet or Faster R-CNN with a feature pyramid on the backbone, all of it trained.

Images keep their resolution. The backbone's batch norms keep their statistics: batches are small. N images, C bands,
H x W pixels, B boxes.
"""

import contextlib
import io
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from geokr.config import ConfigError
from geokr.evaluate_coco import Boxes, Detections
from geokr.evaluate_data import Data
from geokr.evaluate_dense import Room, check_images, kept
from geokr.evaluate_features import Entrant, Preparation
from geokr.evaluate_training import fit, steps_of, turned, turns
from geokr.feature_maps import check_scales, load_maps, map_network
from geokr.models import BackboneSpec, seeded

DETECTORS = ("retinanet", "fasterrcnn")
WIDTH = 256  # channels of the pyramid
RATIOS = (0.5, 1.0, 2.0)  # of anchors
SMALLEST = 32  # side of the smallest anchor where boxes are as large as in photographs; less where they are smaller


def library() -> Any:
    """pycocotools' evaluation. Raises ConfigError with the command that installs it."""
    try:
        from pycocotools import coco, cocoeval
    except ImportError as error:
        raise ConfigError("--task detect needs pycocotools: pip install -e '.[evaluate]' in geokr's folder") from error
    return coco, cocoeval


class Pyramid(nn.Module):
    """Images [N, C, H, W] to maps of WIDTH channels, by name from the finest."""

    def __init__(self, body: nn.Module, extra: Any) -> None:
        super().__init__()
        self.body = body
        self.channels: list[int] = body.feature_info.channels()  # type: ignore[union-attr,operator]
        self.fpn = FeaturePyramidNetwork(self.channels, WIDTH, extra)
        self.out_channels = WIDTH

    def forward(self, images_NCHW: Tensor) -> dict[str, Tensor]:
        maps = self.body(images_NCHW)
        # MambaOut's maps are [N, H, W, C]
        maps = [
            one if one.shape[1] == width else one.permute(0, 3, 1, 2)
            for one, width in zip(maps, self.channels, strict=True)
        ]
        # ConvNeXt's maps come as views of channels-last tensors
        return self.fpn(OrderedDict((str(n), one.contiguous()) for n, one in enumerate(maps)))

    def train(self, mode: bool = True) -> "Pyramid":
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class AsLarge(GeneralizedRCNNTransform):
    """Puts images together and changes none: torchvision's own leaves sizes alone in training only."""

    def __init__(self, bands: int) -> None:
        super().__init__(1, 1, [0.0] * bands, [1.0] * bands)

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


def make_detector(kind: str, spec: BackboneSpec, classes: int, smallest: float) -> Any:
    """The model with random weights. smallest: side of the finest map's anchors, in pixels.

    It takes normalised images of any side and leaves them that large.
    """
    sizes = [smallest * 2**level for level in range(5)]
    if kind == "retinanet":
        anchors = AnchorGenerator(tuple((s, s * 2 ** (1 / 3), s * 2 ** (2 / 3)) for s in sizes), (RATIOS,) * 5)
        pyramid = Pyramid(map_network(spec, (8, 16, 32)), LastLevelP6P7(WIDTH, WIDTH))
        model: Any = RetinaNet(pyramid, classes, anchor_generator=anchors)
        model.transform = AsLarge(spec.bands)
        return model
    anchors = AnchorGenerator(tuple((s,) for s in sizes), (RATIOS,) * 5)
    pyramid = Pyramid(map_network(spec, (4, 8, 16, 32)), LastLevelMaxPool())
    model = FasterRCNN(pyramid, classes + 1, rpn_anchor_generator=anchors)
    model.transform = AsLarge(spec.bands)
    return model


@dataclass(frozen=True, slots=True, eq=False)
class Detect:
    """The task; see :class:`geokr.evaluate_dense.Task`. kind: one of DETECTORS."""

    found: Detections
    spec: BackboneSpec
    device: torch.device
    kind: str
    epochs: int
    batch: int
    resamples: int = 200  # each sorts all detections again
    _images: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        library()
        check_scales(self.spec)
        make_detector(self.kind, self.spec, len(self.found.classes), SMALLEST)
        room = Room()
        for name, part in self.data.parts.items():
            self._images[name] = kept(part.read, room)
            check_images(part.names, self._images[name])

    @property
    def data(self) -> Data:
        return self.found.data

    @property
    def smallest(self) -> float:
        """Side of the smallest anchor: SMALLEST halved until one in twenty boxes of train is smaller, at most twice.
        Boxes of a crowd are not learnt."""
        corners = np.concatenate([one.corners[~one.crowd] for one in self.found.boxes["train"]])
        sides = np.sqrt((corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1]))
        halvings = np.clip(np.ceil(np.log2(SMALLEST / max(np.percentile(sides, 5), 1.0))), 0, 2)
        return float(SMALLEST / 2**halvings)

    def check(self, entrant: Entrant) -> None:
        assert entrant.backbone is not None
        model = make_detector(self.kind, self.spec, len(self.found.classes), SMALLEST)
        load_maps(model.backbone.body, entrant.backbone, entrant.name)

    def run(self, entrant: Entrant, train: np.ndarray, val: np.ndarray, seed: int) -> "Precision":
        assert entrant.backbone is not None  # colours alone draw no boxes; the command leaves them out
        prepare, rng = entrant.prepare, np.random.default_rng(seed)
        with seeded(seed):
            model = make_detector(self.kind, self.spec, len(self.found.classes), self.smallest)
            load_maps(model.backbone.body, entrant.backbone, entrant.name)
            model = model.to(self.device).train()

            def loss_of(step: int) -> Tensor:
                images, targets = self._batch(prepare, rng.choice(train, self.batch), rng)
                return sum(model(images, targets).values(), torch.zeros((), device=self.device))

            def score() -> float:
                return self._tested(model, prepare, "val", val).values()["ap"]

            steps = steps_of(len(train), self.batch, self.epochs)
            fit(model, model.backbone.body, steps, loss_of, score, entrant.name)
        return self._tested(model, prepare, "test", np.arange(len(self.data.parts["test"])))

    def _batch(
        self, prepare: Preparation, ids: np.ndarray, rng: np.random.Generator
    ) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        images, targets = [], []
        for n, image in zip(ids.tolist(), self._images["train"](ids.tolist()), strict=True):
            boxes, turn = self.found.boxes["train"][n], turns(rng)
            alone = ~boxes.crowd  # a crowd's box is no object
            corners = turned_boxes(boxes.corners[alone], image.shape[:2], turn)
            labels = boxes.classes[alone] + (self.kind == "fasterrcnn")  # whose class 0 is the background
            images.append(turned(prepare([image])[0], turn).to(self.device))
            targets.append(
                {
                    "boxes": torch.from_numpy(corners).to(self.device),
                    "labels": torch.from_numpy(labels).to(self.device),
                }
            )
        return images, targets

    @torch.no_grad()
    def _tested(self, model: nn.Module, prepare: Preparation, split: str, ids: np.ndarray) -> "Precision":
        said = []
        for first in range(0, len(ids), self.batch):
            some = ids[first : first + self.batch].tolist()
            images = [prepare([image])[0].to(self.device) for image in self._images[split](some)]
            said += [{key: value.cpu().numpy() for key, value in one.items()} for one in model(images)]
        for one in said:
            one["labels"] = one["labels"] - (self.kind == "fasterrcnn")
        truth = [self.found.boxes[split][n] for n in ids.tolist()]
        return match(truth, said, len(self.found.classes))


def turned_boxes(corners: np.ndarray, size: tuple[int, ...], turn: tuple[bool, bool, bool]) -> np.ndarray:
    """Corners [B, 4] in an image of (height, width), where :func:`geokr.evaluate_dense.turned` brings them."""
    height, width = size[:2]
    found = corners.copy()
    if turn[0]:
        found, height, width = found[:, [1, 0, 3, 2]], width, height
    if turn[1]:
        found[:, [0, 2]] = width - found[:, [2, 0]]
    if turn[2]:
        found[:, [1, 3]] = height - found[:, [3, 1]]
    return np.ascontiguousarray(found)


# ------------------------------------------------------------------------------------------------- precision


@dataclass(frozen=True, slots=True, eq=False)
class Precision:
    """Which detections pycocotools took for which boxes. evaluation: its COCOeval, matched. classes: K."""

    evaluation: Any
    images: int
    classes: int

    def values(self, ids: np.ndarray | None = None) -> dict[str, float]:
        """COCO's average precision: mean of IoU 0.5 to 0.95, at 0.5, and at 0.75; over classes with boxes there."""
        ap_TK = self._of(np.arange(self.images) if ids is None else ids)
        # all NaN where no box is among the images
        ap_T = np.nanmean(ap_TK, axis=1) if np.isfinite(ap_TK).any() else np.full(len(ap_TK), np.nan)
        return {"ap": float(ap_T.mean()), "ap50": float(ap_T[0]), "ap75": float(ap_T[5])}

    def by_class(self) -> dict[str, np.ndarray]:
        ap_TK = self._of(np.arange(self.images))
        return {"ap": ap_TK.mean(0), "ap50": ap_TK[0]}

    def _of(self, ids: np.ndarray) -> np.ndarray:
        """Average precision [10 thresholds, K]; NaN for classes without boxes among these images."""
        drawn = object.__new__(type(self.evaluation))
        drawn.params, drawn._paramsEval = self.evaluation.params, self.evaluation._paramsEval
        matched = self.evaluation.evalImgs
        # of classes, then of images; an image drawn twice stands in two places
        drawn.evalImgs = [matched[k * self.images + n] for k in range(self.classes) for n in ids.tolist()]
        with contextlib.redirect_stdout(io.StringIO()):
            drawn.accumulate()
        precision_TRK = drawn.eval["precision"][..., 0, 0]
        return np.where(precision_TRK[:, 0] < 0, np.nan, precision_TRK.mean(1))


def match(truth: Sequence[Boxes], said: Sequence[dict[str, np.ndarray]], classes: int) -> Precision:
    """said: of each image boxes [B, 4] as corners, labels [B] from 0, scores [B]."""
    coco, cocoeval = library()
    images = [{"id": n} for n in range(len(truth))]
    categories = [{"id": k} for k in range(classes)]
    expected, found = [], []
    for n, (boxes, one) in enumerate(zip(truth, said, strict=True)):
        expected += [
            _annotation(n, corners, k) | {"iscrowd": int(crowd), "ignore": int(crowd)}
            for corners, k, crowd in zip(boxes.corners, boxes.classes, boxes.crowd, strict=True)
        ]
        found += [
            _annotation(n, corners, k) | {"score": float(score), "iscrowd": 0}
            for corners, k, score in zip(one["boxes"], one["labels"], one["scores"], strict=True)
        ]
    with contextlib.redirect_stdout(io.StringIO()):
        pair = [coco.COCO(), coco.COCO()]
        for made, annotations in zip(pair, (expected, found), strict=True):
            for number, annotation in enumerate(annotations, 1):  # 0 would mean no match
                annotation["id"] = number
            made.dataset = {"images": images, "categories": categories, "annotations": annotations}
            made.createIndex()
        evaluation = cocoeval.COCOeval(*pair, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
    return Precision(evaluation, len(truth), classes)


def _annotation(image: int, corners: np.ndarray, k: int) -> dict[str, Any]:
    x0, y0, x1, y1 = map(float, corners)
    return {
        "image_id": image,
        "category_id": int(k),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": (x1 - x0) * (y1 - y0),
    }
