"""The configuration of a pretraining run, section by section. Every key's meaning is the text under it."""

import os
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from geokr.config import Options, suggestion

Range = tuple[float, float]


def _home(value: Any) -> Any:
    """A path from ``~/`` on, as a shell would have made of it had it not stood behind ``key=``."""
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


class RunOptions(Options):
    dir: str = "out/run"
    """Folder of the run: metrics, checkpoints, TensorBoard, resolved configuration."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides initial weights, the order of samples and every augmentation."""

    _at_home = field_validator("dir", mode="before")(_home)


class RecordsSource(Options):
    """A dataset among those of a run."""

    path: str = Field(min_length=1)
    """Folder that pack_records.py wrote, or its URL."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the samples that come from it, in relation to the others' weights."""
    label_weights: str | None = None
    """As data.label_weights."""

    _at_home = field_validator("path", "label_weights", mode="before")(_home)

    @property
    def is_remote(self) -> bool:
        """Whether it has to be fetched; ``file://`` is a folder."""
        return "://" in self.path and not self.path.startswith("file://")

    @property
    def folder(self) -> str:
        """The path of a folder on this machine."""
        return self.path.removeprefix("file://")

    @property
    def shown(self) -> str:
        """The path without what may be secret in a URL: a password before the host, a query after the path."""
        if not self.is_remote:
            return self.folder
        scheme, _, rest = self.path.partition("://")
        rest = rest.partition("?")[0]
        host, slash, path = rest.partition("/")
        return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def _listed(value: Any) -> Any:
    """A list's items as RecordsSource; ValueError names the item that cannot be one."""
    if not isinstance(value, list | tuple):
        if value is None or isinstance(value, str):
            return _home(value)
        raise ValueError(
            "expected a folder or URL, or a list of them, or of {path: ..., weight: ..., label_weights: ...}"
        )
    if not value:
        raise ValueError("an empty list: name a dataset")
    sources = tuple(_source(item, number) for number, item in enumerate(value, 1))
    paths = [source.path.rstrip("/") for source in sources]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"{twice[0]!r} stands twice: name it once, with a larger weight")
    return sources


def _source(item: Any, number: int) -> RecordsSource:
    if isinstance(item, RecordsSource):
        return item
    known = list(RecordsSource.model_fields)
    if not isinstance(item, str | dict) or (isinstance(item, dict) and "path" not in item):
        raise ValueError(f"item {number}: expected a folder or URL, or {{path: ..., weight: ...}}; got {item!r}")
    tree = {"path": item} if isinstance(item, str) else item
    for key in tree:
        if key not in known:
            raise ValueError(f"item {number}: unknown key {key!r}{suggestion(str(key), known)}; it has {known}")
    try:
        return RecordsSource.model_validate(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ValueError(f"item {number}: {fault['loc'][0]}: {fault['msg']}; got {fault['input']!r}") from None


class DataOptions(Options):
    records: str | tuple[RecordsSource, ...] | None = None
    """Folder that pack_records.py wrote, or its URL (`s3://`, `gs://`, `https://`); or a list of such, each alone or as
    `{path: ..., weight: ..., label_weights: ...}`. `weight` is a share of the samples; without any each record counts
    once."""
    labels: str | None = None
    """The land-cover product to train on, where the records hold several; null for the one they were packed with
    first."""
    label_weights: str | None = None
    """File with a weight for the label of each training record, by which its supervision counts more or less
    (weigh_records.py makes one); in a list of datasets each has its own: `{path: ..., label_weights: ...}`."""
    cache_dir: str | None = None
    """Where shards of datasets behind URLs are kept on this machine; null for `geokr/records` in the user's cache."""
    cache_gb: float | None = Field(default=None, gt=0)
    """Gigabytes (10^9 bytes) of shards that are kept there, the least recently used going first; null: no limit."""
    image_size: int | None = Field(default=None, ge=8)
    """Side of the images the model sees; null for the tiles' own. Smaller: the whole tile is resized by area."""
    global_batch: int = Field(default=256, ge=2)
    """Samples an optimizer step sees, over all processes and accumulation steps."""
    loader: Literal["auto", "dali", "torch", "synthetic"] = "auto"
    """`auto`: DALI where it is installed, else torch. `synthetic`: one random batch, to time the step alone; no
    other loader can go on with such a run."""
    threads: int | None = Field(default=None, ge=1)
    """Host threads for reading, decoding and augmenting in each process; null for a share of the cores."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that are prepared ahead."""
    read_timeout_s: float = Field(default=120.0, gt=0)
    """A read that takes longer than this, or a transfer that stands still for so long, stops the run with the
    shard's name."""

    _list_of_sources = field_validator("records", mode="before")(_listed)
    _at_home = field_validator("label_weights", "cache_dir", mode="before")(_home)

    @property
    def sources(self) -> tuple[RecordsSource, ...]:
        """The datasets of the run; none where data.records is not set."""
        if self.records is None:
            return ()
        if isinstance(self.records, str):
            return (RecordsSource(path=self.records, label_weights=self.label_weights),)
        return self.records

    @model_validator(mode="after")
    def _whose_label_weights(self) -> Self:
        if self.label_weights is not None and isinstance(self.records, tuple):
            raise ValueError(
                "label_weights is for one dataset: in a list give {path: ..., label_weights: FILE} for each"
            )
        return self


class AugmentOptions(Options):
    """Augmentation of training images.

    A part is off where both ends of its range are what changes nothing: `[1, 1]` for `brightness`, `contrast`,
    `saturation` and `band_gain`, `[0, 0]` for `hue` and `band_offset`."""

    dihedral: bool = True
    """One of the square's eight symmetries, each equally likely."""
    colour_probability: float = Field(default=0.8, ge=0, le=1)
    """Share of the images whose colours are changed."""
    brightness: Range = (0.7, 1.3)
    """Factor on all values, above 0; red, green and blue of 8 bits only."""
    contrast: Range = (0.5, 1.5)
    """Factor on the distance from the dataset's mean, above 0; red, green and blue of 8 bits only."""
    saturation: Range = (0.5, 1.5)
    """Factor on the distance from grey, 0 or more; red, green and blue of 8 bits only."""
    hue: Range = (-0.05, 0.05)
    """Turn about the grey axis, as a share of the circle; red, green and blue of 8 bits only."""
    band_gain: Range = (0.9, 1.1)
    """Factor drawn for each band, above 0, about its mean over the dataset, where bands are others than `augment.hue`
    is for."""
    band_offset: Range = (-0.1, 0.1)
    """Offset drawn for each band in its standard deviations, where bands are others than `augment.hue` is for."""
    crop_probability: Literal["auto"] | float = 0.0
    """Share, 0 to 1, of the steps up to `augment.crop_until` whose images are cropped, all alike, with the fractions of
    what is left; for records packed with `labels.grid`. Crops keep the scale, so they cost less; a run with them
    records no CUDA graphs. `auto`: 0.5 where squares, images and backbone allow it, else 0."""
    crop_until: float = Field(default=0.7, gt=0, le=1)
    """Share of the run's steps after which all images stay whole, as they will be when the backbone is used."""
    crop_min: float = Field(default=0.5, gt=0, lt=1)
    """Smallest side of a crop as a share of the image's; every side between is equally likely."""

    @field_validator("brightness", "contrast", "saturation", "hue", "band_gain", "band_offset")
    @classmethod
    def _ordered(cls, value: Range, info: ValidationInfo) -> Range:
        neutral = 0 if info.field_name in ("hue", "band_offset") else 1
        off = f"; [{neutral}, {neutral}] switches it off"
        if value[0] > value[1]:
            raise ValueError(f"expected the smaller number first, got {list(value)}{off}")
        if neutral == 1 and value[0] < 0:
            raise ValueError(f"a factor below 0 inverts images, got {list(value)}{off}")
        if neutral == 1 and value[0] == 0 and info.field_name != "saturation":  # grey images are still images
            raise ValueError(f"a factor of 0 leaves nothing of an image, got {list(value)}{off}")
        return value

    @field_validator("crop_probability", mode="before")
    @classmethod
    def _auto_or_share(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != "auto" and not (number and 0 <= value <= 1):
            raise ValueError("expected auto or a number from 0 to 1")
        return value

    progressive: bool = False
    """Images grow with the run: half of their side for 40 % of the steps, three quarters up to 70 %, then whole; in all
    0.57 of the pixels. A run that does so records no CUDA graphs and does not crop."""
    published: bool = False
    """Geometry as in the published code: two flips and, half the time, a quarter turn out of four."""


class ModelOptions(Options):
    backbone: str = "resnet50"
    """Any timm architecture."""
    bands: tuple[str, ...] | None = None
    """Band names the model takes, in this order; null for all of the dataset's."""
    init: str = "random"
    """`random`, `imagenet` (timm's weights), or a weights file. The first convolution's inputs go to the bands of their
    names, where ImageNet's (red, green, blue) or the file's card say them; else it is adapted to other counts."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Stochastic depth of the student, where the architecture has it."""
    normalisation: Literal["dataset", "published"] = "dataset"
    """`dataset`: the training tiles' mean and std. `published`: values scaled to 0..1 and no more."""
    condition_on_colour: bool = False
    """The head is told how augmentation changed each image's colours, by a layer that does nothing where they are as
    packed and that no export holds. So changes of colour need not teach the backbone to ignore what colour says of a
    class, nor does it learn to do without where light and sensors differ."""
    sync_batchnorm: Literal["auto", "on", "off"] = "auto"
    """Batch statistics over all processes. `auto`: on where a process sees fewer than 64 images at once."""

    _at_home = field_validator("init", mode="before")(_home)


class MethodOptions(Options):
    supervision: Literal["kl", "published"] = "kl"
    """`kl`: KL(target || student). `published`: cross-entropy divided by the number of classes."""
    consistency: Literal["kl", "published", "none"] = "kl"
    """`kl`: KL(teacher || student). `published`: cross-entropy of the teacher under the student, over classes. `none`:
    the teacher only averages, and its forward pass is saved."""
    consistency_weight: float = Field(default=0.5, ge=0)
    """Weight of the consistency loss beside the supervision loss."""
    consistency_ramp: float = Field(default=0.4, ge=0, le=1)
    """Share of the steps over which that weight rises from nearly 0: an early teacher knows less than its student."""
    teacher_init: Literal["copy", "random"] = "copy"
    """The teacher at step 0: the student's copy, or a head of its own on the student's backbone weights."""
    teacher_mode: Literal["eval", "train"] = "eval"
    """Whether the teacher's batch norm uses its running statistics or the batch's."""
    teacher_alpha: float = Field(default=0.996, ge=0, lt=1)
    """Share of itself that the teacher keeps at a move."""
    teacher_ramp: bool = True
    """Alpha is at most (1 + t) / (10 + t) at the t-th move: a teacher remembers about the last tenth of the moves, so
    that an early one is not held back by what its students were at the start."""
    teacher_schedule: Literal["every_step", "published"] = "every_step"
    """When the teacher moves."""
    teacher_buffers: bool = True
    """Whether the running statistics of batch norm move with the parameters."""


class OptimOptions(Options):
    name: Literal["adam", "adamw", "sgd", "lamb"] = "adamw"
    """The optimizer."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled for adamw and lamb, added to the gradient for adam and sgd."""
    decay_norm_bias: bool = False
    """Whether norms' parameters and biases decay too."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Moments of adam, adamw and lamb: how much of each stays at a step, from 0 to below 1."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator of adam, adamw and lamb."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Of sgd (Nesterov)."""
    implementation: Literal["fused", "foreach", "apex"] = "fused"
    """`fused`: one launch, torch's own. `apex`: NVIDIA's, built from source. The run says which one ran."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps over which the rate rises linearly from 0."""
    final_lr: float = Field(default=0.0, ge=0, le=1)
    """Of schedule `cosine`: last rate as a share of the peak."""
    gamma: float = Field(default=0.9, gt=0, le=1)
    """Of schedule `step`: factor at each drop."""
    drops: int = Field(default=10, ge=1)
    """Of schedule `step`: number of equal parts the run has, with a drop between any two."""

    @field_validator("betas")
    @classmethod
    def _shares_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError("expected two numbers from 0 to below 1, such as [0.9, 0.999]")
        return betas


class TrainOptions(Options):
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps; this or `train.epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the training records; this or `train.max_steps`."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: the GPU where there is one."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the forward and backward pass; weights, losses and statistics stay fp32. `fp16` scales the loss. `auto`: bf16
    where the device computes in it, else fp16 on a GPU and fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile. `auto`: on CUDA where it works and norms are not fused, else without it and with a word."""
    fused_norm: Literal["auto", "on", "off"] = "auto"
    """Batch norm, residual sum and ReLU as one operation of geokr's own. `auto`: on CUDA, for plain ResNets whose batch
    norm is not synchronised."""
    fold_teacher: Literal["auto", "on", "off"] = "auto"
    """The teacher's batch norms folded into its convolutions, anew after each move. `auto`: where all can be."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """The step recorded once and replayed with one call. `auto`: on CUDA with one process and one part a step."""
    channels_last: bool = True
    """Memory format of images and convolutions: channels-last (NHWC), or NCHW where false."""
    accumulate: int = Field(default=1, ge=1)
    """Parts into which a process cuts its share of a batch, to fit memory."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Gradient norm above which gradients are scaled down."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of torch in each process; null for a share of the cores."""
    collective_timeout_s: float = Field(default=600.0, gt=0)
    """A collective operation that takes longer than this stops every process."""
    ddp_compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """How gradients travel between processes: whole, in half precision, or (`powersgd`) as matrices of rank 2."""
    ddp_bucket_mb: float | None = Field(default=None, gt=0)
    """MB of gradients sent at once; null for torch's 25, with a first bucket of 1."""


class ValidationOptions(Options):
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between validations; null for ten in a run. One always runs at the last step."""
    batch: int = Field(default=256, ge=1)
    """Samples a process sees at once."""
    max_samples: int | None = Field(default=None, ge=1)
    """Validation records used; null for all."""


class LogOptions(Options):
    every_steps: int = Field(default=20, ge=1)
    """Steps between lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard files."""
    panels: int = Field(default=8, ge=0, le=64)
    """Tiles shown at each validation beside target, student and teacher histograms; 0 for none."""


class CheckpointOptions(Options):
    every_steps: int | None = Field(default=None, ge=1)
    """Steps between checkpoints; null for ten in a run. One is always written at the last step."""
    keep: int = Field(default=2, ge=2)
    """Checkpoints kept."""
    resume: Literal["auto", "never", "must"] = "auto"
    """`auto`: go on where run.dir has a checkpoint. `never`: error if it has one. `must`: error if it has none."""


class PretrainOptions(Options):
    exclusive: ClassVar[dict[str, str]] = {
        "train.max_steps": "train.epochs",
        "train.epochs": "train.max_steps",
    }

    run: RunOptions = RunOptions()
    data: DataOptions = DataOptions()
    augment: AugmentOptions = AugmentOptions()
    model: ModelOptions = ModelOptions()
    method: MethodOptions = MethodOptions()
    optim: OptimOptions = OptimOptions()
    train: TrainOptions = TrainOptions()
    validation: ValidationOptions = ValidationOptions()
    log: LogOptions = LogOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.train.max_steps is None) == (self.train.epochs is None):
            raise ValueError("give exactly one of train.max_steps and train.epochs")
        if self.train.ddp_compression == "powersgd" and self.train.precision == "fp16":
            raise ValueError(
                "train.ddp_compression=powersgd with train.precision=fp16: one overflow would stay in what PowerSGD "
                "carries from step to step. Use train.precision=bf16, or train.ddp_compression=fp16"
            )
        return self
