"""EfficientNet-Lite 0 to 2 (Tan and Le 2019, arXiv:1905.11946; the Lite variants of their repository), by timm's names.

timm has these networks and is what they are tested against, to the bit; every other trunk is timm's own. Importing timm
takes seconds, since it imports torchvision and with it PyTorch's compiler, and the shipped towers look at each picture
that is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

# name: how many times as wide and as deep as Lite0
LITE_SCALES = {
    "tf_efficientnet_lite0": (1.0, 1.0),
    "tf_efficientnet_lite1": (1.0, 1.1),
    "tf_efficientnet_lite2": (1.1, 1.2),
}
# blocks, kernel, stride, times wider inside, channels
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # fmt: skip
STEM, HEAD = 32, 1280  # channels, which do not scale
EPS = 1e-3  # TensorFlow's, of batch normalisation


class LiteNetwork(nn.Module):
    """Pictures -> a map of each resolution, the last map, class scores. Weights start at random, as timm's do."""

    def __init__(self, name: str, classes: int) -> None:
        super().__init__()
        wide, deep = LITE_SCALES[name]
        self.num_features, self.grad_checkpointing = HEAD, False
        self.conv_stem = _SameConv(3, STEM, 3, 2)
        self.bn1 = _Norm(STEM)
        stages: list[nn.Module] = []
        self.feature_info: list[dict[str, int]] = []  # of the last stage of each resolution
        inward, shrunk = STEM, 2
        for number, (count, kernel, stride, wider, channels) in enumerate(STAGES):
            if stride > 1:
                self.feature_info.append({"stage": number, "num_chs": inward, "reduction": shrunk})
            outward, shrunk = _rounded(channels * wide), shrunk * stride
            # the first and the last stage keep their depth
            blocks = math.ceil(count * deep) if 0 < number < len(STAGES) - 1 else count
            stage: list[nn.Module] = []
            for block in range(blocks):
                step = stride if block == 0 else 1
                stage.append(_Block(inward, outward, kernel, step, wider))
                inward = outward
            stages.append(nn.Sequential(*stage))
        self.feature_info.append({"stage": len(STAGES), "num_chs": inward, "reduction": shrunk})
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _SameConv(inward, HEAD, 1)
        self.bn2 = _Norm(HEAD)
        self.classifier = nn.Linear(HEAD, classes) if classes else nn.Identity()
        self.apply(_start)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each stage again in the backward pass instead of keeping what it computed."""
        self.grad_checkpointing = enable

    def forward_intermediates(
        self, x: Tensor, indices: Sequence[int] | None = None, stop_early: bool = False, intermediates_only: bool = True
    ) -> list[Tensor]:
        """Maps [N, C, H, W] of the resolutions with these numbers, from 0; all without them."""
        assert intermediates_only, "the last map is that of `forward_features`"
        ends = [int(info["stage"]) for info in self.feature_info]
        wanted = ends if indices is None else [ends[index] for index in indices]
        x, maps = self.bn1(self.conv_stem(x)), []
        for number, stage in enumerate(self.blocks, start=1):
            if stop_early and number > max(wanted):
                break
            x = self._stage(stage, x)
            if number in wanted:
                maps.append(x)
        return maps

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map [N, 1280, h, w]."""
        x = self.bn1(self.conv_stem(x))
        for stage in self.blocks:
            x = self._stage(stage, x)
        found: Tensor = self.bn2(self.conv_head(x))
        return found

    def forward_head(self, x: Tensor) -> Tensor:
        """Class scores [N, classes] of the last map."""
        found: Tensor = self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Class scores [N, classes]."""
        return self.forward_head(self.forward_features(x))

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if not self.grad_checkpointing:
            found: Tensor = stage(x)
            return found
        from torch.utils.checkpoint import checkpoint

        again: Any = checkpoint(stage, x, use_reentrant=False)
        return again


class _Block(nn.Module):
    """Widens, mixes space in each channel, narrows; one that does not widen has timm's other names for its layers."""

    def __init__(self, inward: int, outward: int, kernel: int, stride: int, wider: int) -> None:
        super().__init__()
        inside = inward * wider
        mixing = _SameConv(inside, inside, kernel, stride, groups=inside)
        if wider == 1:
            layers = [("conv_dw", mixing), ("bn1", _Norm(inside))]
            layers += [("conv_pw", _SameConv(inside, outward, 1)), ("bn2", _Norm(outward, acts=False))]
        else:
            layers = [("conv_pw", _SameConv(inward, inside, 1)), ("bn1", _Norm(inside))]
            layers += [("conv_dw", mixing), ("bn2", _Norm(inside))]
            layers += [("conv_pwl", _SameConv(inside, outward, 1)), ("bn3", _Norm(outward, acts=False))]
        for name, layer in layers:
            self.add_module(name, layer)
        self.skips = stride == 1 and inward == outward

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for layer in self.children():
            x = layer(x)
        return x + before if self.skips else x


class _SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow pads: at a stride of 2 more below and to the right than above and left."""

    def __init__(self, inward: int, outward: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(inward, outward, kernel, stride, padding, groups=groups, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.stride[0] > 1:
            sides = []
            for size in (input.shape[3], input.shape[2]):
                missing = (math.ceil(size / self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size
                sides += [max(0, missing) // 2, max(0, missing) - max(0, missing) // 2]
            input = F.pad(input, sides)
        return super().forward(input)


class _Norm(nn.BatchNorm2d):
    """Batch normalisation, and ReLU6 where the block acts."""

    def __init__(self, channels: int, acts: bool = True) -> None:
        super().__init__(channels, eps=EPS)
        self.acts = acts

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input)
        return F.relu6(found, inplace=True) if self.acts else found


def _rounded(channels: float) -> int:
    """The nearest multiple of 8 that is not below nine tenths of it."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def _start(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        outward = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2 / outward))
    elif isinstance(module, nn.Linear):
        reach = 1 / math.sqrt(module.out_features)
        nn.init.uniform_(module.weight, -reach, reach)
        nn.init.zeros_(module.bias)
