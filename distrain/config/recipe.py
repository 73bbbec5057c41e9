"""The part of the schema that decides what a network learns: augmentation, optimizer, schedule, loss, average."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from distrain.config.options import Section, option
from distrain.errors import UserError


@dataclass
class AugmentConfig(Section):
    crop: Literal["resized", "pad", "none"] = option(
        "resized", "training crop: resized (RandomResizedCrop), pad (random shift), none (center)"
    )
    crop_scale: list[float] = option([0.08, 1.0], "crop=resized: range of the crop's fraction of the area", length=2)
    crop_ratio: list[float] = option([0.75, 4 / 3], "crop=resized: range of width / height", length=2)
    crop_pad: int = option(4, "crop=pad: max shift along each axis, pixels of the source image", min=0)
    flip: float = option(0.5, "probability of a horizontal flip", min=0, max=1)
    auto_augment: Literal["none", "ta_wide", "randaugment", "autoaugment", "autoaugment_cifar10", "augmix"] = option(
        "none", "ta_wide: TrivialAugment (wide); autoaugment: the policy learned on ImageNet"
    )
    operations: int = option(2, "randaugment: operations per image", min=1, max=8)
    magnitude: int = option(9, "randaugment: strength of its operations", min=0, max=30)
    color_jitter: list[float] = option(
        [0.0, 0.0, 0.0], "max change of brightness, contrast, saturation", length=3, min=0, max=1
    )
    lighting: float = option(0.0, "std of the shift along the principal components of color; pycls: 0.1", min=0)
    erase: float = option(0.0, "probability of filling a random box with the mean color", min=0, max=1)
    mixup: float = option(0.0, "mixup: alpha of the beta distribution of weights; 0 disables it", min=0, max=4)
    cutmix: float = option(
        0.0,
        "CutMix: alpha of the beta distribution of areas; 0 disables it; with mixup, each in half the batches",
        min=0,
        max=4,
    )
    mix_prob: float = option(1.0, "fraction of the batches to which mixup or CutMix is applied", min=0, max=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("crop_scale", "crop_ratio"):
            bounds = getattr(self, key)
            if not 0 < bounds[0] <= bounds[1]:
                raise UserError(f"augment.{key}={bounds} must be two positive numbers in ascending order")


@dataclass
class OptimizerConfig(Section):
    name: Literal["sgd", "adamw", "lars", "lamb"] = option("sgd", "optimizer")
    lr: float = option(0.1, "peak learning rate", min=0, on_resume="changeable")
    lr_batch: int = option(
        0,
        "global batch that optimizer.lr is meant for, and any other scales it linearly; 0: it is not scaled",
        min=0,
        on_resume="changeable",
    )
    momentum: float = option(0.9, "sgd, lars: momentum", min=0, on_resume="changeable")
    nesterov: bool = option(True, "sgd, lars: Nesterov momentum")
    betas: list[float] = option(
        [0.9, 0.999], "adamw, lamb: decay rates of the moment estimates", length=2, min=0, below=1
    )
    eps: float = option(1e-8, "adamw, lamb: added to the denominator", min=0)
    trust: float = option(0.001, "lars: trust coefficient, step length / weight norm at lr=1", min=0)
    weight_decay: float = option(
        5e-5, "sgd, lars: L2 penalty in the gradient; adamw, lamb: decoupled", min=0, on_resume="changeable"
    )
    decay_norms: bool = option(True, "apply weight decay to normalization weights and all biases too")
    no_decay: list[str] = option([], "parts without weight decay, by name or glob, such as [head, 'stages.*.se']")
    clip_norm: float = option(0.0, "max norm of the whole gradient; 0 disables it", min=0, on_resume="changeable")
    clip_value: float = option(0.0, "max size of each gradient element; 0 disables it", min=0, on_resume="changeable")
    clip_agc: float = option(
        0.0,
        "adaptive gradient clipping: max gradient norm of each output unit, as a fraction of its weights' norm; "
        "0 disables it",
        min=0,
        on_resume="changeable",
    )
    head_lr_factor: float = option(1.0, "learning rate of the classifier, as a multiple of optimizer.lr", above=0)
    layer_decay: float = option(
        1.0, "ratio of the learning rates of a layer and the one after it, for fine-tuning", above=0, max=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name in ("sgd", "lars") and self.nesterov and self.momentum <= 0:
            raise UserError("optimizer.nesterov=true needs optimizer.momentum above 0")
        if sum(value > 0 for value in (self.clip_norm, self.clip_value, self.clip_agc)) > 1:
            raise UserError("optimizer.clip_norm, clip_value and clip_agc cannot be combined: set two of them to 0")


@dataclass
class ScheduleConfig(Section):
    name: Literal[
        "cosine", "constant", "linear", "polynomial", "exponential", "step", "multi_step", "one_cycle", "restarts"
    ] = option(
        "cosine",
        "shape of the learning rate; one_cycle: rises in the warm-up and falls by cosines; restarts: cosine, repeated",
        on_resume="changeable",
    )
    per: Literal["step", "epoch"] = option("step", "how often the learning rate changes", on_resume="changeable")
    warmup_epochs: float = option(5.0, "length of the warm-up", min=0, on_resume="changeable")
    warmup_factor: float = option(
        0.1, "learning rate at the first step, as a fraction of optimizer.lr", on_resume="changeable"
    )
    warmup: Literal["over", "before"] = option(
        "over",
        "over: the warm-up multiplies the beginning of the shape (pycls); before: the shape begins after it "
        "(torchvision)",
        on_resume="changeable",
    )
    final_factor: float = option(
        0.0,
        "cosine, linear, polynomial, one_cycle, restarts: learning rate at the end, as a fraction of optimizer.lr",
        on_resume="changeable",
    )
    power: float = option(
        2.0, "polynomial: exponent of the remaining fraction of the run", above=0, on_resume="changeable"
    )
    gamma: float = option(
        0.1, "exponential: factor per epoch; step, multi_step: factor at each of them", above=0, on_resume="changeable"
    )
    step_epochs: float = option(30.0, "step: epochs between two drops", above=0, on_resume="changeable")
    milestones: list[float] = option([], "multi_step: epochs of the drops, such as [150, 225]", on_resume="changeable")
    cycle_epochs: float = option(10.0, "restarts: length of the first cycle", above=0, on_resume="changeable")
    cycle_factor: float = option(
        2.0, "restarts: each cycle's length relative to the one before", min=1, on_resume="changeable"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.name == "multi_step") != bool(self.milestones):
            raise UserError("schedule.milestones and schedule.name=multi_step need each other: set both or neither")
        if not all(0 < earlier < later for earlier, later in pairwise([*self.milestones, float("inf")])):
            raise UserError(f"schedule.milestones={self.milestones} must be positive epochs in ascending order")


@dataclass
class LossConfig(Section):
    name: Literal["auto", "cross_entropy", "bce"] = option("auto", "auto: bce for multi-label data, else cross_entropy")
    label_smoothing: float = option(
        0.0, "fraction of the target spread over all classes", min=0, below=1, on_resume="changeable"
    )
    class_weights: str = option(
        "",
        "balanced: rare classes weigh more; or a JSON file {CLASS: WEIGHT}; empty: all equal",
        location=True,
        on_resume="free",
    )


@dataclass
class DistillConfig(Section):
    teacher: str = option(
        "",
        "a trained classifier to learn from: a run, weights as for model.init, or a file of `distrain export`, which "
        "runs on the CPU; empty: none",
        location=True,
        on_resume="free",
    )
    network: str = option("", "the teacher's network, if its weights do not say it", on_resume="free")
    options: dict[str, Any] = option({}, "the options of distill.network", on_resume="free")
    weight: float = option(0.5, "share of the teacher in the loss; the labels have the rest", min=0, max=1)
    temperature: float = option(1.0, "by which logits are divided before they are compared", above=0)


@dataclass
class EmaConfig(Section):
    decay: float = option(0.0, "decay of the exponential moving average of weights; 0 disables it", min=0, below=1)
    equal: bool = option(
        False,
        "average the weights since start_epoch equally instead: stochastic weight averaging (SWA), whose authors "
        "recompute running statistics: see evaluate.precise_bn_steps",
    )
    start_epoch: float = option(0.0, "until this epoch the average is the newest weights", min=0)
    every_steps: int = option(32, "steps between updates of the average", min=1)
    warmup: bool = option(False, "begin with a smaller decay: at most (1 + n) / (10 + n) in the n-th update")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.equal and (self.decay or self.warmup):
            raise UserError("ema.equal=true has no decay: set ema.decay=0 and ema.warmup=false")

    @property
    def enabled(self) -> bool:
        return self.decay > 0 or self.equal
