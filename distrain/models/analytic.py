"""The cost of a network from its configuration alone, thousands of times faster than building its layers.

It equals the sum over `complexity.count_complexity`, which tests assert.
"""

from distrain.errors import UserError
from distrain.models.complexity import Cost
from distrain.models.densenet import DenseNetConfig
from distrain.models.regnet import AnyNetConfig, FrameConfig, RegNetConfig, StageConfig


class ImageTooSmallError(UserError):
    """A feature map would have no pixels."""


def network_cost(config: DenseNetConfig | RegNetConfig | AnyNetConfig, num_classes: int, resolution: int) -> Cost:
    """The cost of a network for one image of `resolution` x `resolution` pixels. Raises ImageTooSmallError."""
    tally = _Tally(resolution)
    if isinstance(config, DenseNetConfig):
        width = _densenet(tally, config)
    else:
        width = _anynet(tally, config, config.stages() if isinstance(config, RegNetConfig) else config.stages)
    tally.linear(width, num_classes)
    return Cost(*tally.counts)


class _Tally:
    """Sums the cost of layers that run in sequence, from an image of `size` x `size` pixels on."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.flops = self.params = self.activations = self.conv_activations = 0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        return self.flops, self.params, self.activations, self.conv_activations

    def repeat(self, before: tuple[int, int, int, int], times: int) -> None:
        """Count what has come since `before` so many times more."""
        self.flops, self.params, self.activations, self.conv_activations = (
            now + times * (now - then) for now, then in zip(self.counts, before, strict=True)
        )

    def conv(self, width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        self.size = self._pooled(kernel, stride, (kernel - 1) // 2)
        weights = kernel * kernel * (width_in // groups) * width_out
        elements = width_out * self.size * self.size
        self.flops += weights * self.size * self.size
        self.params += weights
        self.activations += elements
        self.conv_activations += elements

    def conv_norm(self, width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        self.conv(width_in, width_out, kernel, stride, groups)
        self.norm(width_out)

    def norm(self, width: int) -> None:
        self.params += 2 * width

    def squeeze_excitation(self, width: int, inner: int) -> None:
        weights = 2 * width * inner + width + inner
        self.flops += weights
        self.params += weights
        self.activations += width + inner
        self.conv_activations += width + inner

    def max_pool(self, width: int) -> None:
        self.size = self._pooled(3, 2, 1)
        self.activations += width * self.size * self.size

    def average_pool(self) -> None:
        self.size = self._pooled(2, 2, 0)

    def linear(self, width: int, classes: int) -> None:
        self.flops += (width + 1) * classes
        self.params += (width + 1) * classes
        self.activations += classes

    def _pooled(self, kernel: int, stride: int, padding: int) -> int:
        size = (self.size + 2 * padding - kernel) // stride + 1
        if size < 1:
            raise ImageTooSmallError("the image is too small for this network")
        return size


def _anynet(tally: _Tally, config: FrameConfig, stages: tuple[StageConfig, ...]) -> int:
    """Count all but the classifier and return its input width."""
    tally.conv_norm(3, config.stem_width, 7 if config.stem == "resnet" else 3, 1 if config.stem == "cifar" else 2)
    if config.stem == "resnet":
        tally.max_pool(config.stem_width)
    width = config.stem_width
    for stage in stages:
        _bottleneck(tally, width, stage, stage.stride)
        width = stage.width
        if stage.depth > 1:
            before = tally.counts
            _bottleneck(tally, width, stage, 1)
            tally.repeat(before, stage.depth - 2)
    if config.head_width:
        tally.conv_norm(width, config.head_width)
    return config.head_width or width


def _bottleneck(tally: _Tally, width_in: int, stage: StageConfig, stride: int) -> None:
    inner, size = stage.inner_width, tally.size
    if width_in != stage.width or stride > 1:
        tally.conv_norm(width_in, stage.width, 1, stride)
        tally.size = size
    tally.conv_norm(width_in, inner)
    tally.conv_norm(inner, inner, 3, stride, inner // stage.group_width)
    if stage.se_ratio:
        tally.squeeze_excitation(inner, max(1, round(stage.se_ratio * width_in)))
    tally.conv_norm(inner, stage.width)


def _densenet(tally: _Tally, config: DenseNetConfig) -> int:
    """Count all but the classifier and return its input width."""
    width = config.stem_width
    if config.stem == "imagenet":
        tally.conv_norm(3, width, 7, 2)
        tally.max_pool(width)
    else:
        tally.conv(3, width, 3)
    for number, depth in enumerate(config.depths):
        if number:
            kept = max(1, int(config.compression * width))
            tally.norm(width)
            tally.conv(width, kept)
            tally.average_pool()
            width = kept
        for _ in range(depth):
            _dense_layer(tally, width, config)
            width += config.growth_rate
    tally.norm(width)
    return width


def _dense_layer(tally: _Tally, width: int, config: DenseNetConfig) -> None:
    tally.norm(width)
    if config.bottleneck:
        inner = config.bottleneck * config.growth_rate
        tally.conv_norm(width, inner)
        width = inner
    tally.conv(width, config.growth_rate, 3)
