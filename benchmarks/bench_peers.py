"""Other ways of feeding the same tiles with the same augmentation, each as its documentation or its users have it.

    published      one TIFF (DEFLATE) and one JSON a tile, OpenCV, PIL, torchvision's transforms, DataLoader
    files          one JPEG a tile, PIL, torchvision's v2 transforms, DataLoader with persistent workers
    files, tuned   the same files as a careful user reads them: libjpeg-turbo, views for symmetries, one colour matrix
    webdataset     tar shards, shuffled, decoded to PIL, batched in the workers (webdataset.github.io, "WebLoader")
    litdata        chunks made by litdata.optimize, StreamingDataset with a transform, StreamingDataLoader

The JPEG bytes are the records' own. Workers are as many as threads elsewhere. None of them checks a checksum or can
go on at a given sample, but for LitData's StreamingDataLoader, which keeps its state. All give uint8 but the
published way, which scales to 0..1.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.bench_cases import Case, Setting
from benchmarks.bench_data import BATCH, is_rgb_jpeg
from geokr.options import AugmentOptions
from pipelines import augment
from pipelines.reader import Reader

_SHARD = 512  # tiles in a tar file
_AHEAD = 2  # batches a worker prepares ahead: PyTorch's default


@dataclass(frozen=True, slots=True)
class Place:
    """Where the peers' copies of the tiles lie, and what all of them need."""

    folder: Path
    count: int
    workers: int
    batch: int
    augment: AugmentOptions

    def file(self, number: int, ending: str) -> Path:
        return self.folder / "files" / f"{number:05d}.{ending}"


def peer_cases(setting: Setting, stack: ExitStack) -> Iterator[Case]:
    """Those whose packages are installed; none unless the tiles are JPEGs of three bands, on the CPU."""
    if not is_rgb_jpeg(setting) or setting.device.type != "cpu":
        return
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="geokr-peers-")))
    place = Place(
        folder,
        count=min(setting.dataset.train.records, max(setting.images, BATCH)),
        workers=setting.threads,
        batch=min(BATCH, max(1, setting.dataset.train.records // (2 * setting.threads))),
        augment=setting.options.augment,
    )
    copy_jpegs(setting, place)
    for name, package, make in PEERS:
        if package is None or importlib.util.find_spec(package):
            yield _case(name, endless(make(place)), place, setting)


def workers(place: Place) -> dict[str, Any]:
    """Of a DataLoader. Forked, as on Linux by default up to Python 3.13: the transforms are closures."""
    return {"num_workers": place.workers, "multiprocessing_context": "fork"}


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from loader


def _case(name: str, batches: Iterator[Any], place: Place, setting: Setting) -> Case:
    next(batches)  # starts the workers now, before this process has many threads

    def take(images: int) -> int:
        done = 0
        while done < images:
            done += len(next(batches)[0])
        return done

    # What the workers had prepared and what is in their hands.
    ready = (_AHEAD + 1) * place.workers * place.batch
    return Case("peers", name, lambda: take(setting.images), lambda: take(ready))


def copy_jpegs(setting: Setting, place: Place) -> None:
    """The records' JPEGs and fractions as files."""
    (place.folder / "files").mkdir()
    reader = Reader(setting.dataset, setting.dataset.train, threads=4, timeout_s=60)
    for start in range(0, place.count, _SHARD):
        samples = reader.read(np.arange(start, min(start + _SHARD, place.count)))
        for number, image, fractions in zip(samples.ids.tolist(), samples.images, samples.fractions, strict=True):
            place.file(number, "jpg").write_bytes(image.tobytes())
            place.file(number, "json").write_text(json.dumps(fractions.tolist()))
        samples.release()
    reader.close()


# ---------------------------------------------------------------------------------------------- transforms


def _turn_and_jitter(options: AugmentOptions) -> list[Any]:
    """torchvision's transforms for the symmetries of the square and the colours, of PIL images and tensors."""
    from torchvision.transforms import v2

    jitter = v2.ColorJitter(options.brightness, options.contrast, options.saturation, options.hue)
    transpose = v2.RandomApply([v2.Lambda(_transposed)])
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    return [*flips, transpose, v2.RandomApply([jitter], options.colour_probability)]


def _transposed(image: Any) -> Any:
    from PIL import Image

    return image.mT if isinstance(image, torch.Tensor) else image.transpose(Image.Transpose.TRANSPOSE)


def pil_transform(options: AugmentOptions) -> Callable[[Any], torch.Tensor]:
    from torchvision.transforms import v2

    return v2.Compose([*_turn_and_jitter(options), v2.PILToTensor()])


def _fractions(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


# -------------------------------------------------------------------------------------- one file a tile


class Files(Dataset):
    """read: image and fractions of a tile, from its number."""

    def __init__(self, count: int, read: Callable[[int], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._count, self._read = count, read

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._read(number)


def _over_files(place: Place, read: Callable[[int], tuple[torch.Tensor, torch.Tensor]], **more: Any) -> DataLoader:
    return DataLoader(Files(place.count, read), place.batch, shuffle=True, drop_last=True, **workers(place), **more)


def _target(place: Place, number: int) -> torch.Tensor:
    return _fractions(json.loads(place.file(number, "json").read_text()))


def published(place: Place) -> Iterable[Any]:
    import cv2
    from PIL import Image
    from torchvision import transforms

    for number in range(place.count):
        with Image.open(place.file(number, "jpg")) as tile:
            tile.save(place.file(number, "tif"), compression="tiff_adobe_deflate")
    options = place.augment
    jitter = transforms.ColorJitter(options.brightness, options.contrast, options.saturation, (-0.3, 0.3))
    quarter_turns = transforms.RandomChoice([transforms.RandomRotation((a, a)) for a in (0, 90, 180, 270)])
    flips = [transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip()]
    turns = transforms.RandomApply([quarter_turns], 0.5)
    transform = transforms.Compose([*flips, turns, jitter, transforms.ToTensor()])

    def read(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels: Any = cv2.imread(str(place.file(number, "tif")))
        image: Any = transform(Image.fromarray(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)))
        return image, _target(place, number)

    return _over_files(place, read)


def files(place: Place) -> Iterable[Any]:
    from PIL import Image

    transform = pil_transform(place.augment)

    def read(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(place.file(number, "jpg")) as tile:
            return transform(tile.convert("RGB")), _target(place, number)

    return _over_files(place, read, persistent_workers=True)


def tuned_files(place: Place) -> Iterable[Any]:
    import cv2
    import simplejpeg

    facts = augment.BandFacts("uint8", (0, 1, 2), (117.0,) * 3, (58.0,) * 3)
    ids = np.arange(place.count)
    drawn = augment.draw(place.augment, facts, 0, np.zeros_like(ids), ids)  # at once: one by one it costs 0.4 ms

    def read(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        tile = simplejpeg.decode_jpeg(place.file(number, "jpg").read_bytes(), colorspace="RGB")
        coloured = cv2.transform(tile, drawn.colour[number])
        turned = augment.apply_dihedral(coloured, int(drawn.dihedral[number]))
        return torch.from_numpy(np.ascontiguousarray(turned)), _target(place, number)

    return _over_files(place, read, persistent_workers=True, worker_init_fn=_one_thread)


def _one_thread(_: int) -> None:
    """Of OpenCV in each worker."""
    import cv2

    cv2.setNumThreads(0)


# ---------------------------------------------------------------------------------------------- libraries


def webdataset(place: Place) -> Iterable[Any]:
    import webdataset as wds

    each = max(1, place.count // (4 * place.workers))  # shards must be at least as many as workers
    with wds.ShardWriter(str(place.folder / "web-%05d.tar"), maxcount=each, verbose=0) as sink:  # type: ignore[attr-defined]
        for number in range(place.count):
            tile, target = (place.file(number, ending).read_bytes() for ending in ("jpg", "json"))
            sink.write({"__key__": f"{number:05d}", "jpg": tile, "json": target})
    shards = sorted(map(str, place.folder.glob("web-*.tar")))
    dataset = (
        wds.WebDataset(shards, shardshuffle=len(shards))  # type: ignore[attr-defined]
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map_tuple(pil_transform(place.augment), _fractions)
        .batched(place.batch, partial=False)
    )
    return wds.WebLoader(dataset, batch_size=None, persistent_workers=True, **workers(place))  # type: ignore[attr-defined]


def _litdata_item(path: str) -> dict[str, Any]:
    from PIL import Image

    fractions = json.loads(Path(path).with_suffix(".json").read_text())
    return {"image": Image.open(path), "fractions": np.array(fractions, np.float32)}


def litdata(place: Place) -> Iterable[Any]:
    import litdata as ld
    from torchvision.transforms import v2

    paths = [str(place.file(number, "jpg")) for number in range(place.count)]
    folder = str(place.folder / "litdata")
    ld.optimize(_litdata_item, paths, folder, chunk_bytes="64MB", num_workers=place.workers, verbose=False)
    transform = v2.Compose(_turn_and_jitter(place.augment))

    def item(stored: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        return transform(stored["image"]), torch.as_tensor(stored["fractions"])

    dataset = ld.StreamingDataset(folder, shuffle=True, drop_last=True, transform=item)
    return ld.StreamingDataLoader(dataset, batch_size=place.batch, persistent_workers=True, **workers(place))


PEERS: tuple[tuple[str, str | None, Callable[[Place], Iterable[Any]]], ...] = (
    ("published", "cv2", published),
    ("files", None, files),
    ("files, tuned", "cv2", tuned_files),
    ("webdataset", "webdataset", webdataset),
    ("litdata", "litdata", litdata),
)
