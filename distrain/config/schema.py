"""The schema of a run: one dataclass per section, every field with its default and its meaning."""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from omegaconf import MISSING

from distrain.config.options import Section, option
from distrain.config.recipe import AugmentConfig, DistillConfig, EmaConfig, LossConfig, OptimizerConfig, ScheduleConfig
from distrain.config.tracking import TrackConfig
from distrain.errors import UserError

_BESIDE_RUNS = ("mlflow.db", "mlartifacts")
_MAX_NAME = 255  # bytes, NAME_MAX of Linux's file systems


@dataclass
class RunConfig(Section):
    name: str = option(
        MISSING, "folder below run.dir and name in MLflow; the same name resumes the run", on_resume="free"
    )
    dir: str = option(
        "runs", "parent folder of all runs; keep it on storage that every node shares", location=True, on_resume="free"
    )
    seed: int = option(0, "the only source of randomness", min=0)
    change: list[str] = option(
        [], "settings that this start changes on purpose, such as [train.epochs]", on_resume="free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name in ("", ".", "..") or "/" in self.name:
            raise UserError(f"run.name={self.name!r} must be a plain folder name, without '/'")
        if self.name in _BESIDE_RUNS:
            raise UserError(f"run.name={self.name} is what MLflow's files in run.dir are called: choose another name")
        if (size := len(self.name.encode())) > _MAX_NAME:
            raise UserError(f"run.name has {size} bytes, a folder name at most {_MAX_NAME}: shorten it")
        if not self.dir:
            raise UserError("run.dir is empty: write . for the working directory")

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


@dataclass
class DataConfig(Section):
    train: str = option(MISSING, "index of the training shards, a .parquet file", location=True, on_resume="free")
    val: str = option(MISSING, "index of the validation shards, a .parquet file", location=True, on_resume="free")
    loader: Literal["auto", "torch", "dali"] = option(
        "auto", "auto: the faster one, measured at the first start of the run", on_resume="free"
    )
    shuffle: Literal["auto", "global", "window"] = option(
        "auto", "global: any order; window: shard by shard; auto: global if the shards are local"
    )
    window_shards: int = option(10, "shuffle=window: shards whose samples are mixed", min=1)
    limit: int = option(
        0, "use only this many images for training and as many for validation, spread evenly; 0: all", min=0
    )
    balanced: bool = option(False, "draw every class equally often instead of every sample once per epoch")
    repeats: int = option(1, "times a sample occurs in a batch, each augmented differently", min=1)
    image_size: int = option(224, "side of the square network input, pixels", min=1)
    size_schedule: list[list[float]] = option(
        [],
        "sides of training images, if others than image_size: rows [first epoch, side], such as [[0, 128], [60, 224]]",
    )
    size_unit: Literal["epoch", "run"] = option(
        "epoch", "how size_schedule counts: in epochs, or in fractions of the run, such as [[0, 128], [0.6, 224]]"
    )
    interpolation: Literal["bilinear", "bicubic"] = option("bilinear", "for resizing; always antialiased")
    val_resize: int = option(256, "validation: short side before the center crop of image_size, pixels")
    mean: list[float] = option([0.485, 0.456, 0.406], "per channel, of images in [0, 1]", length=3)
    std: list[float] = option([0.229, 0.224, 0.225], "per channel, of images in [0, 1]", length=3, above=0)
    max_bad: float = option(
        0.01, "fraction of unusable samples above which the run ends", min=0, max=1, on_resume="free"
    )
    threads: int = option(2, "decoding threads per rank", min=1, on_resume="free")
    prefetch: int = option(4, "micro-batches per rank decoded ahead of the step", min=1, on_resume="free")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shuffle == "window" and (self.balanced or self.repeats > 1):
            raise UserError("data.shuffle=window reads shard by shard, which data.balanced and data.repeats cannot do")
        if self.balanced and self.repeats > 1:
            raise UserError("data.balanced and data.repeats cannot be combined: choose one")
        if self.val_resize < self.image_size:
            raise UserError(
                f"data.val_resize={self.val_resize} is smaller than data.image_size={self.image_size}: "
                "the center crop would exceed the image"
            )
        self._check_size_schedule()

    @property
    def train_sizes(self) -> list[int]:
        """The sides that training images have in the course of a run, pixels."""
        return [int(size) for _, size in self.size_schedule] or [self.image_size]

    def _check_size_schedule(self) -> None:
        rows = self.size_schedule
        if not rows:
            return
        if any(len(row) != 2 or row[1] < 1 or row[1] % 1 for row in rows):
            raise UserError(f"data.size_schedule={rows} must be rows of an epoch and a whole number of pixels")
        starts, sizes = zip(*rows, strict=True)
        if starts[0] != 0 or not all(later > earlier for earlier, later in pairwise(starts)):
            raise UserError(f"data.size_schedule={rows} must start at epoch 0, and epochs must increase")
        if self.size_unit == "run" and starts[-1] >= 1:
            raise UserError(
                f"data.size_schedule={rows} must begin its last size before 1, the end of the run: "
                "write fractions, or set data.size_unit=epoch"
            )
        if sizes[-1] > self.image_size:
            raise UserError(
                f"data.size_schedule ends at {sizes[-1]:g} pixels, but data.image_size={self.image_size}: "
                "the last size must not exceed image_size"
            )


@dataclass
class DownloadConfig(Section):
    cache: str = option(
        "", "folder on the node's disk for downloaded shards; default: under TMPDIR", location=True, on_resume="free"
    )
    cache_gb: float = option(
        100.0, "max size of the cache, shared by all ranks of a node, 10^9 bytes", min=0, on_resume="free"
    )
    parallel: int = option(2, "shards each rank downloads at once, ahead of need", min=1, on_resume="free")
    retries: int = option(8, "retries of a failed download", min=0, on_resume="free")
    retry_wait: float = option(
        1.0, "seconds before the first retry; doubles each time, up to 60", min=0, on_resume="free"
    )
    timeout: float = option(60.0, "seconds without a byte after which a download has failed", min=0.1, on_resume="free")


@dataclass
class ModelConfig(Section):
    name: str = option(MISSING, "a network listed by `python -m distrain models`")
    num_classes: int = option(1000, "width of the classifier; must equal the number of classes in the index")
    options: dict[str, Any] = option({}, "options of that network, as listed by `models show NAME`")
    init: str = option(
        "",
        "weights to start from: a file, a URL, torchvision[:V1|V2], timm:NAME or runs/NAME[:best|last|STEP][:ema|raw]; "
        "empty: random",
        location=True,
        on_resume="free",
    )


@dataclass
class BatchConfig(Section):
    lanes: int = option(8, "deterministic streams of samples, usually one per rank; fixed for the life of a run", min=1)
    # A batch of one image has no variance to normalize by.
    per_lane: int = option(32, "images per lane and step; batch.lanes x batch.per_lane = global batch", min=2)

    @property
    def size(self) -> int:
        return self.lanes * self.per_lane


@dataclass
class TrainConfig(Section):
    epochs: float = option(
        100.0,
        "length of the run; steps = epochs x samples / global batch, rounded",
        above=0,
        on_resume="changeable",
    )
    precision: Literal["bf16", "fp16", "fp32"] = option("bf16", "bf16 and fp16 by autocast; fp16 with a loss scale")
    tf32: bool = option(True, "on GPUs, TF32 for fp32 operations", on_resume="free")
    memory_format: Literal["auto", "channels_last", "contiguous"] = option(
        "auto", "auto: the faster one, measured once", on_resume="free"
    )
    dense_block: Literal["auto", "fused", "triton_1x1", "triton", "plain"] = option(
        "auto",
        "fused: a dense block as one operation, in a quarter of the memory, and stem and transitions likewise; "
        "triton_1x1: on GPUs, its 1x1 convolutions by kernels of our own; triton: all of its convolutions; plain: "
        "layer by layer; auto: on CPUs the faster of fused and plain, measured once; plain on GPUs and with "
        "train.deterministic or train.compile",
        on_resume="free",
    )
    recompute: Literal["none", "selective", "full", "auto"] = option(
        "none", "activation checkpointing; auto: the least that fits activation_gb", on_resume="free"
    )
    activation_gb: float = option(
        0.0, "recompute=auto: memory budget for a rank's activations, 10^9 bytes", on_resume="free"
    )
    freeze: list[str] = option(
        [], "parts that are not trained, by name or glob, such as [stem, stages.0] or ['*', '!head']"
    )
    compile: bool = option(
        False,
        "compile the network's blocks with torch.compile; of fused dense blocks, the passes between convolutions",
        on_resume="free",
    )
    graphs: Literal["auto", "on", "off"] = option(
        "auto", "capture micro-batches as CUDA graphs; auto: on GPUs of one node", on_resume="free"
    )
    dry_run: bool = option(
        False, "print what the run will do and need, take two steps, keep nothing, and exit", on_resume="free"
    )
    overfit_batches: int = option(
        0,
        "train on this many batches again and again, without augmentation, and validate on them: whether a network and "
        "its settings can learn at all; 0 disables it",
        min=0,
    )
    max_minutes: float = option(
        0.0, "save and stop after this many minutes of this start; 0 disables", min=0, on_resume="free"
    )
    stop_epoch: float = option(
        0.0, "validate, save and stop after this many of the epochs; 0: at their end", min=0, on_resume="free"
    )
    deterministic: bool = option(
        False, "on GPUs, bit-for-bit repeatable at some cost; CPUs always are", on_resume="free"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recompute == "auto" and self.activation_gb <= 0:
            raise UserError("train.recompute=auto needs train.activation_gb: the memory budget for activations")


@dataclass
class ParallelConfig(Section):
    strategy: Literal["ddp", "zero0", "zero1", "zero2", "zero3"] = option(
        "ddp", "DistributedDataParallel, or DeepSpeed ZeRO stage 0 to 3", on_resume="free"
    )
    offload: bool = option(
        False, "zero1 to zero3: keep and update the optimizer state in host memory", on_resume="free"
    )
    bucket_mb: float = option(
        25.0, "bucket size of gradients (zero3: and of weights), 2^20 bytes", min=0.1, on_resume="free"
    )
    batch_norm: Literal["lane", "sync"] = option(
        "lane", "lane: statistics of each lane's batch; sync: of all ranks' batches (GPUs only)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload and not self.partitions:
            raise UserError(f"parallel.offload=true needs parallel.strategy=zero1, zero2 or zero3, not {self.strategy}")

    @property
    def partitions(self) -> bool:
        """Whether the optimizer state is partitioned across ranks."""
        return self.strategy in ("zero1", "zero2", "zero3")


@dataclass
class EvaluateConfig(Section):
    every_epochs: float = option(
        1.0, "epochs between validations; the end is always validated", above=0, on_resume="free"
    )
    patience: int = option(
        0,
        "end the run after this many validations in a row without a new best; 0: only at its end",
        min=0,
        on_resume="free",
    )
    metric: Literal["score", "loss", "top5"] = option(
        "score", "what evaluate.patience watches; score: top-1 accuracy, or mAP of multi-label data", on_resume="free"
    )
    precise_bn_steps: int = option(
        0,
        "before validating, recompute BatchNorm's running statistics from the images of so many last steps, which a "
        "stop waits for; 0: keep the running averages",
        min=0,
    )
    flip: bool = option(
        False, "validate by the mean of the logits of each image and its mirror image", on_resume="free"
    )
    batch: int = option(
        256, "images per forward pass; the same batches on any number of ranks", min=1, on_resume="free"
    )


@dataclass
class CheckpointConfig(Section):
    every_steps: int = option(
        500, "steps between checkpoints; one is always saved at a stop and at the end", min=1, on_resume="free"
    )
    every_minutes: float = option(
        0.0, "also save when this many minutes have passed; 0 disables", min=0, on_resume="free"
    )
    # With only one, none would be left if it is damaged.
    keep: int = option(3, "number of newest checkpoints to keep", min=2, on_resume="free")
    keep_every_steps: int = option(
        0, "also keep checkpoints whose step is a multiple of this; 0 disables", min=0, on_resume="free"
    )
    keep_best: bool = option(True, "also keep the one with the best validation accuracy", on_resume="free")


@dataclass
class ResilienceConfig(Section):
    patience: float = option(
        600.0,
        "seconds without a step or a validation batch after which a rank counts as hung; 0 disables",
        min=0,
        on_resume="free",
    )
    attempts: int = option(
        3,
        "refuse to start after this many attempts in a row without a new checkpoint; 0 disables",
        min=0,
        on_resume="free",
    )
    bad_steps: int = option(
        5, "roll back after this many updates in a row with non-finite gradients; 0 disables", min=0
    )
    spike: float = option(
        0.0, "roll back if the loss exceeds this many times the median of the last 100; 0 disables", min=0
    )
    rollbacks: int = option(3, "max rollbacks of a run, each skipping the samples that led to it", min=0)
    faults: list[str] = option(
        [], "for tests: KIND@FAILPOINT:STEP/RANK, such as sigkill@train.step:12/1", on_resume="free"
    )


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    download: DownloadConfig = field(default_factory=DownloadConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        if self.train.overfit_batches:
            self.augment = AugmentConfig(crop="none", flip=0.0)
        mixing = self.augment.mixup > 0 or self.augment.cutmix > 0
        if mixing and self.batch.per_lane < 2 * self.data.repeats:
            raise UserError(
                f"augment.mixup and augment.cutmix mix different images of a lane: set batch.per_lane to at least "
                f"{2 * self.data.repeats}, twice data.repeats"
            )
        if self.schedule.warmup_epochs > self.train.epochs:
            raise UserError(
                f"schedule.warmup_epochs={self.schedule.warmup_epochs} is longer than "
                f"train.epochs={self.train.epochs}: shorten the warm-up or train longer"
            )
        if self.parallel.partitions and self.optimizer.name in ("lars", "lamb"):
            raise UserError(
                f"optimizer.name={self.optimizer.name} needs whole layers, which "
                f"parallel.strategy={self.parallel.strategy} partitions: use ddp or zero0, or optimizer.name=adamw"
            )
        if self.parallel.partitions and (self.optimizer.clip_value or self.optimizer.clip_agc):
            key = "clip_value" if self.optimizer.clip_value else "clip_agc"
            raise UserError(
                f"optimizer.{key} needs whole gradients, which parallel.strategy={self.parallel.strategy} partitions: "
                "use ddp or zero0, or optimizer.clip_norm"
            )
        if self.parallel.batch_norm == "sync" and self.train.recompute != "none":
            raise UserError(
                f"train.recompute={self.train.recompute} would reduce the statistics of parallel.batch_norm=sync "
                "twice: set train.recompute=none or parallel.batch_norm=lane"
            )
        if self.parallel.strategy == "zero3" and self.train.compile:
            raise UserError(
                "train.compile=true does not work with the partitioned weights of parallel.strategy=zero3: "
                "use zero2 or lower"
            )
