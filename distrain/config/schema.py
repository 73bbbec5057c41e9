"""The schema of a run: one dataclass per section, every field with its default and its meaning."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from distrain.errors import UserError, nearest

NO_MLFLOW = "none"  # track.uri: keep metrics in the run's folder alone


def option(default: Any, help: str, *, free: bool = False, changeable: bool = False) -> Any:
    """A field with its one-line meaning, which `--print-config` prints beside the value.

    A `free` field may differ when a run is resumed, a `changeable` one if `run.change` names it; all others are part
    of what the run is.
    """
    metadata = {"help": help, "free": free, "changeable": changeable}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


def _one_of(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{key}={value} is not known: {nearest(value, known)}")


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{key}={value} is too small: it must be at least {least}")


@dataclass
class RunConfig:
    name: str = option(MISSING, "folder below run.dir and name in MLflow; the same name resumes the run", free=True)
    dir: str = option("runs", "where runs live; keep it on storage that every node shares", free=True)
    seed: int = option(0, "the only source of randomness")
    change: list[str] = option([], "settings that this start changes on purpose, such as [train.epochs]", free=True)

    def __post_init__(self) -> None:
        _at_least("run.seed", self.seed, 0)
        if self.name in ("", ".", "..") or "/" in self.name:
            raise UserError(f"run.name={self.name!r} must be a plain folder name, without '/'")

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


@dataclass
class DataConfig:
    train: str = option(MISSING, "index of the training shards, a .parquet file", free=True)
    val: str = option(MISSING, "index of the validation shards, a .parquet file", free=True)
    loader: str = option("auto", "torch, dali, or auto: the faster one at the first start of the run", free=True)
    shuffle: str = option("auto", "global (any order), window (shard by shard), auto: global where reads are local")
    window_shards: int = option(10, "shuffle=window: shards whose samples are mixed with one another")
    balanced: bool = option(False, "draw every class equally often instead of every sample once per epoch")
    repeats: int = option(1, "copies of a sample in a batch, augmented differently (repeated augmentation)")
    image_size: int = option(224, "side of the square the network is given, pixels")
    size_schedule: list[list[float]] = option(
        [], "progressive resizing: rows [first epoch, side] for training, such as [[0, 128], [60, 224]]; []: image_size"
    )
    crop: str = option("resized", "training crop: resized (RandomResizedCrop), pad (shifted), none (centre)")
    crop_scale: list[float] = option([0.08, 1.0], "crop=resized: smallest and largest share of the area")
    crop_ratio: list[float] = option([0.75, 4 / 3], "crop=resized: narrowest and widest width / height")
    crop_pad: int = option(4, "crop=pad: largest shift in either direction, pixels of the source image")
    flip: float = option(0.5, "probability of a horizontal flip in training")
    interpolation: str = option("bilinear", "bilinear or bicubic, both antialiased")
    auto_augment: str = option("none", "none or ta_wide (TrivialAugment, wide)")
    color_jitter: list[float] = option([0.0, 0.0, 0.0], "largest change of brightness, contrast, saturation")
    lighting: float = option(0.0, "deviation of the shift along the main directions of colour; pycls: 0.1")
    erase: float = option(0.0, "probability of filling a random box with the mean colour")
    val_resize: int = option(256, "validation: short side before the centre crop of image_size, pixels")
    mean: list[float] = option([0.485, 0.456, 0.406], "per channel, of images in 0..1")
    std: list[float] = option([0.229, 0.224, 0.225], "per channel, of images in 0..1")
    max_bad: float = option(0.01, "share of samples that may be unusable before the run ends", free=True)
    threads: int = option(2, "decoding threads of each rank", free=True)
    prefetch: int = option(4, "micro-batches of each rank decoded ahead of the step", free=True)
    cache: str = option("", "folder on the node's disk for downloaded shards; default: below TMPDIR", free=True)
    cache_gb: float = option(100.0, "most that all ranks of a node together keep there, 10^9 bytes", free=True)
    downloads: int = option(2, "shards that each rank downloads at a time ahead of need", free=True)
    retries: int = option(8, "further attempts at a download that fails", free=True)
    retry_wait: float = option(1.0, "seconds before the first of them; doubles with each, up to 60", free=True)
    stall: float = option(60.0, "seconds without a byte after which a download counts as failed", free=True)

    def __post_init__(self) -> None:
        _one_of("data.loader", self.loader, ("auto", "torch", "dali"))
        _one_of("data.shuffle", self.shuffle, ("auto", "global", "window"))
        if self.shuffle == "window" and (self.balanced or self.repeats > 1):
            raise UserError(
                "data.shuffle=window keeps to the order of shards, which data.balanced and data.repeats cannot"
            )
        if self.balanced and self.repeats > 1:
            raise UserError("data.balanced and data.repeats cannot be combined: choose one")
        _one_of("data.crop", self.crop, ("resized", "pad", "none"))
        for key in ("image_size", "threads", "prefetch", "window_shards", "repeats", "downloads"):
            _at_least(f"data.{key}", getattr(self, key), 1)
        self._check_size_schedule()
        for key in ("cache_gb", "retries", "retry_wait"):
            _at_least(f"data.{key}", getattr(self, key), 0)
        _at_least("data.stall", self.stall, 0.1)
        _one_of("data.interpolation", self.interpolation, ("bilinear", "bicubic"))
        _one_of("data.auto_augment", self.auto_augment, ("none", "ta_wide"))
        if len(self.color_jitter) != 3 or not all(0 <= strength <= 1 for strength in self.color_jitter):
            raise UserError(f"data.color_jitter={self.color_jitter} must be three numbers in 0..1")
        _at_least("data.lighting", self.lighting, 0)
        _at_least("data.crop_pad", self.crop_pad, 0)
        for key in ("flip", "erase", "max_bad"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"data.{key}={getattr(self, key)} must lie in 0..1")
        if self.val_resize < self.image_size:
            raise UserError(
                f"data.val_resize={self.val_resize} is smaller than data.image_size={self.image_size}: "
                "the centre crop would leave the image"
            )
        for key in ("mean", "std"):
            if len(getattr(self, key)) != 3:
                raise UserError(f"data.{key} needs three numbers, one per channel")
        if min(self.std) <= 0:
            raise UserError(f"data.std={self.std} must be positive")
        for key in ("crop_scale", "crop_ratio"):
            bounds = getattr(self, key)
            if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
                raise UserError(f"data.{key}={bounds} must be two positive numbers, the smaller one first")

    def _check_size_schedule(self) -> None:
        rows = self.size_schedule
        if not rows:
            return
        if any(len(row) != 2 or row[1] < 1 or row[1] % 1 for row in rows):
            raise UserError(f"data.size_schedule={rows} must be rows of an epoch and a whole number of pixels")
        starts, sizes = zip(*rows, strict=True)
        if starts[0] != 0 or not all(later > earlier for earlier, later in pairwise(starts)):
            raise UserError(f"data.size_schedule={rows} must begin at epoch 0 and go on with ever later epochs")
        if sizes[-1] != self.image_size:
            raise UserError(
                f"data.size_schedule ends at {sizes[-1]:g} pixels, but data.image_size={self.image_size}: end it there"
            )


@dataclass
class ModelConfig:
    name: str = option(MISSING, "a network, as `python -m distrain models` lists them")
    num_classes: int = option(1000, "width of the classifier; must equal the number of classes in the index")
    options: dict[str, Any] = option({}, "further arguments of that network, as `models show NAME` lists them")


@dataclass
class BatchConfig:
    lanes: int = option(8, "streams of samples; one per rank at the planned size, fixed for the run's life")
    per_lane: int = option(32, "images each lane adds to a step; batch.lanes x batch.per_lane = global batch")

    def __post_init__(self) -> None:
        _at_least("batch.lanes", self.lanes, 1)
        _at_least("batch.per_lane", self.per_lane, 2)  # one image has no batch statistics

    @property
    def size(self) -> int:
        return self.lanes * self.per_lane


@dataclass
class TrainConfig:
    epochs: float = option(
        100.0, "length of the run; steps = epochs x samples / global batch, rounded", changeable=True
    )
    precision: str = option("bf16", "bf16, fp16 (both by autocast; fp16 with a loss scale) or fp32")
    tf32: bool = option(True, "on GPUs, TF32 for what is left in fp32", free=True)
    memory_format: str = option("auto", "channels_last, contiguous, or auto: the faster, measured once", free=True)
    recompute: str = option(
        "none", "activations computed again, not kept: none, selective, block, auto (least that fits)", free=True
    )
    activation_gb: float = option(0.0, "recompute=auto: memory a rank's activations may take, 10^9 bytes", free=True)
    compile: bool = option(False, "compile the network's blocks by torch.compile", free=True)
    max_minutes: float = option(0.0, "save and stop after so many minutes of this start; 0: never", free=True)
    deterministic: bool = option(False, "on GPUs, bit-for-bit repeatable at some cost; CPUs always are", free=True)

    def __post_init__(self) -> None:
        _one_of("train.precision", self.precision, ("bf16", "fp16", "fp32"))
        _one_of("train.memory_format", self.memory_format, ("auto", "channels_last", "contiguous"))
        _one_of("train.recompute", self.recompute, ("none", "selective", "block", "auto"))
        if self.recompute == "auto" and self.activation_gb <= 0:
            raise UserError("train.recompute=auto needs train.activation_gb: the memory that activations may take")
        _at_least("train.max_minutes", self.max_minutes, 0)
        if self.epochs <= 0:
            raise UserError(f"train.epochs={self.epochs} must be positive")


@dataclass
class ParallelConfig:
    strategy: str = option("ddp", "ddp, or DeepSpeed's zero0, zero1, zero2, zero3: ever less state per rank", free=True)
    offload: bool = option(False, "zero1 to zero3: keep optimizer state in host memory and update it there", free=True)
    bucket_mb: float = option(25.0, "gradients, and in zero3 weights, that travel together, 2^20 bytes", free=True)
    batch_norm: str = option("lane", "lane: each by its own micro-batch; sync: by those of all ranks (GPUs)")

    def __post_init__(self) -> None:
        _one_of("parallel.strategy", self.strategy, ("ddp", "zero0", "zero1", "zero2", "zero3"))
        _one_of("parallel.batch_norm", self.batch_norm, ("lane", "sync"))
        _at_least("parallel.bucket_mb", self.bucket_mb, 0.1)
        if self.offload and not self.partitions:
            raise UserError(
                f"parallel.offload=true works with parallel.strategy=zero1, zero2 or zero3, not with {self.strategy}"
            )

    @property
    def partitions(self) -> bool:
        """Whether ranks share the optimizer state among them."""
        return self.strategy in ("zero1", "zero2", "zero3")


@dataclass
class OptimizerConfig:
    name: str = option("sgd", "sgd, adamw, lars or lamb")
    lr: float = option(0.1, "peak learning rate at this global batch", changeable=True)
    momentum: float = option(0.9, "sgd, lars: momentum", changeable=True)
    nesterov: bool = option(True, "sgd, lars: Nesterov momentum")
    betas: list[float] = option([0.9, 0.999], "adamw, lamb: decay of the means of gradient and square")
    eps: float = option(1e-8, "adamw, lamb: added to the root of the mean square")
    trust: float = option(0.001, "lars: length of a step / length of the layer's weights, at lr=1")
    weight_decay: float = option(
        5e-5, "sgd, lars: added to the gradient, times the weight; adamw, lamb: to the step", changeable=True
    )
    decay_norms: bool = option(True, "whether normalisation weights and all biases decay too")
    clip_norm: float = option(0.0, "longest gradient, over all parameters; 0: any", changeable=True)

    def __post_init__(self) -> None:
        _one_of("optimizer.name", self.name, ("sgd", "adamw", "lars", "lamb"))
        if self.name in ("sgd", "lars") and self.nesterov and self.momentum <= 0:
            raise UserError("optimizer.nesterov=true needs optimizer.momentum above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={self.betas} must be two numbers in 0..1, 1 excluded")
        for key in ("lr", "momentum", "eps", "trust", "weight_decay", "clip_norm"):
            _at_least(f"optimizer.{key}", getattr(self, key), 0)


@dataclass
class ScheduleConfig:
    name: str = option("cosine", "shape after warm-up: cosine or constant", changeable=True)
    warmup_epochs: float = option(5.0, "linear warm-up", changeable=True)
    warmup_factor: float = option(0.1, "learning rate at the first step, as a share of optimizer.lr", changeable=True)
    final_factor: float = option(0.0, "learning rate at the end of cosine, as a share of optimizer.lr", changeable=True)

    def __post_init__(self) -> None:
        _one_of("schedule.name", self.name, ("cosine", "constant"))
        _at_least("schedule.warmup_epochs", self.warmup_epochs, 0)


@dataclass
class LossConfig:
    label_smoothing: float = option(0.0, "share of the target spread over all classes", changeable=True)

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"loss.label_smoothing={self.label_smoothing} must lie in 0..1, 1 excluded")


@dataclass
class AverageConfig:
    decay: float = option(0.0, "share of the average of weights that each update keeps; 0: no average")
    every_steps: int = option(32, "steps between updates of the average")

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"average.decay={self.decay} must lie in 0..1, 1 excluded")
        _at_least("average.every_steps", self.every_steps, 1)


@dataclass
class EvaluateConfig:
    every_epochs: float = option(1.0, "how often the whole validation set is measured; always at the end", free=True)
    batch: int = option(256, "images in one forward pass; the same batches on any number of ranks", free=True)

    def __post_init__(self) -> None:
        _at_least("evaluate.batch", self.batch, 1)
        if self.every_epochs <= 0:
            raise UserError(f"evaluate.every_epochs={self.every_epochs} must be positive")


@dataclass
class CheckpointConfig:
    every_steps: int = option(
        500, "steps between checkpoints; one is always written at a stop and at the end", free=True
    )
    every_minutes: float = option(0.0, "and at the latest after so many minutes; 0: by steps alone", free=True)
    keep: int = option(3, "newest checkpoints kept", free=True)
    keep_every_steps: int = option(0, "and those of steps that divide by this; 0: none", free=True)
    keep_best: bool = option(True, "and the one with the best validation accuracy", free=True)

    def __post_init__(self) -> None:
        _at_least("checkpoint.every_steps", self.every_steps, 1)
        _at_least("checkpoint.every_minutes", self.every_minutes, 0)
        _at_least("checkpoint.keep", self.keep, 2)  # the one before a damaged one is the way out
        _at_least("checkpoint.keep_every_steps", self.keep_every_steps, 0)


@dataclass
class ResilienceConfig:
    patience: float = option(
        600.0,
        "seconds without a step, or a batch of validation, after which a rank counts as hung; 0: never",
        free=True,
    )
    attempts: int = option(
        3, "starts in a row that may end without a new checkpoint before the run is refused; 0: any number", free=True
    )

    bad_steps: int = option(
        5, "updates in a row without a finite gradient that send the run back to its last checkpoint; 0: never"
    )
    spike: float = option(0.0, "loss / median of the last 100 that does so too, such as 3; 0: never")
    rollbacks: int = option(3, "times a run may be sent back, each time passing over the samples that led there")
    faults: list[str] = option([], "for tests: KIND@PLACE:STEP/RANK, such as sigkill@step:12/1", free=True)

    def __post_init__(self) -> None:
        _at_least("resilience.patience", self.patience, 0)
        for key in ("attempts", "bad_steps", "spike", "rollbacks"):
            _at_least(f"resilience.{key}", getattr(self, key), 0)


@dataclass
class TrackConfig:
    uri: str = option(
        "", "MLflow tracking URI, or none; empty: $MLFLOW_TRACKING_URI, else a database in run.dir", free=True
    )
    experiment: str = option("distrain", "MLflow experiment the run belongs to", free=True)
    every_steps: int = option(10, "steps between reports of loss, accuracy, learning rate and speed", free=True)

    def __post_init__(self) -> None:
        _at_least("track.every_steps", self.every_steps, 1)


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        if self.schedule.warmup_epochs > self.train.epochs:
            raise UserError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs} is longer than "
                f"train.epochs={self.train.epochs}: shorten the warm-up or train longer"
            )
        if self.parallel.partitions and self.optimizer.name in ("lars", "lamb"):
            raise UserError(
                f"optimizer.name={self.optimizer.name} looks at whole layers, which "
                f"parallel.strategy={self.parallel.strategy} cuts up: take ddp or zero0, or optimizer.name=adamw"
            )
        if self.parallel.batch_norm == "sync" and self.train.recompute != "none":
            raise UserError(
                f"train.recompute={self.train.recompute} would gather the statistics of parallel.batch_norm=sync "
                "twice: set train.recompute=none or parallel.batch_norm=lane"
            )
        if self.parallel.strategy == "zero3" and self.train.compile:
            raise UserError(
                "train.compile=true cannot follow the weights that parallel.strategy=zero3 moves: take zero2 or less"
            )
