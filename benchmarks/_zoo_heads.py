"""Networks that the model zoos lack: several outputs, decoders, shared heads, shuffles between grouped convolutions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def block(inputs: int, filters: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, filters, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(filters), nn.ReLU(inplace=True))


class Residual(nn.Module):
    """A basic block with a projection where the width or the stride changes."""

    def __init__(self, inputs: int, filters: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            block(inputs, filters, 3, stride), nn.Conv2d(filters, filters, 3, 1, 1, bias=False), nn.BatchNorm2d(filters)
        )
        self.shortcut = nn.Identity() if inputs == filters and stride == 1 else nn.Conv2d(inputs, filters, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


class Backbone(nn.Module):
    """Four stages at strides 4 to 32; all of their maps."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 96, 128)) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, widths[0], 3, 2), nn.MaxPool2d(2))
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.stages = nn.ModuleList(
            nn.Sequential(Residual(inputs, width, 1 if index == 0 else 2), Residual(width, width))
            for index, (inputs, width) in enumerate(pairs)
        )

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class UNet(nn.Module):
    """Concatenated skips; transposed convolutions or bilinear upsampling on the way up."""

    def __init__(self, *, transposed: bool, outputs: int = 1) -> None:
        super().__init__()
        widths = (16, 32, 64, 128)
        self.transposed = transposed
        self.down = nn.ModuleList(
            nn.Sequential(block(inputs, width), block(width, width))
            for inputs, width in zip((3, *widths), widths, strict=False)
        )
        up = [(wide, narrow) for narrow, wide in pairwise(widths)][::-1]
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(wide, narrow, 2, 2) if transposed else nn.Conv2d(wide, narrow, 1) for wide, narrow in up
        )
        self.merge = nn.ModuleList(nn.Sequential(block(2 * narrow, narrow), block(narrow, narrow)) for _, narrow in up)
        self.heads = nn.ModuleList(nn.Conv2d(widths[0], 1 + index, 1) for index in range(outputs))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        skips: list[torch.Tensor] = []
        for index, down in enumerate(self.down):
            x = down(x if index == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = up(x)
            if not self.transposed:
                x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = merge(torch.cat([skip, x], 1))
        return tuple(head(x) for head in self.heads)


class LinkNet(nn.Module):
    """A decoder with added skips, deep supervision at every scale."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 96, 128)
        self.body = Backbone(widths)
        pairs = list(pairwise(widths))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 4, 2, 1) for narrow, wide in pairs)
        self.heads = nn.ModuleList(nn.Conv2d(narrow, 2, 1) for narrow, _ in pairs)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        *skips, x = self.body(x)
        outputs = []
        for up, head, skip in zip(self.up, self.heads, skips[::-1], strict=True):
            x = F.relu(up(x) + skip)
            outputs.append(head(x))
        return outputs


class FPN(nn.Module):
    """A feature pyramid: laterals of one width, added top-down; shared or own towers; two outputs per level."""

    def __init__(self, *, bottom_up: bool = False, shared: bool = True, width: int = 48) -> None:
        super().__init__()
        widths = (32, 64, 96, 128)
        self.body = Backbone(widths)
        self.lateral = nn.ModuleList(nn.Conv2d(each, width, 1) for each in widths)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in widths)
        self.down = nn.ModuleList(block(width, width, 3, 2) for _ in widths[1:]) if bottom_up else None
        towers = 1 if shared else len(widths)
        self.towers = nn.ModuleList(nn.Sequential(block(width, 40), block(40, 40)) for _ in range(towers))
        self.classes, self.boxes = nn.Conv2d(40, 3 * 5, 3, 1, 1), nn.Conv2d(40, 3 * 4, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = [lateral(each) for lateral, each in zip(self.lateral, self.body(x), strict=True)]
        for index in range(len(maps) - 1, 0, -1):
            maps[index - 1] = maps[index - 1] + F.interpolate(maps[index], scale_factor=2.0, mode="nearest")
        maps = [smooth(each) for smooth, each in zip(self.smooth, maps, strict=True)]
        if self.down is not None:
            for index, down in enumerate(self.down):
                maps[index + 1] = maps[index + 1] + down(maps[index])
        outputs = []
        for index, each in enumerate(maps):
            tower = self.towers[index % len(self.towers)](each)
            boxes = self.boxes(tower)
            outputs += [self.classes(tower), boxes.reshape(boxes.shape[0], 3, 4, -1).permute(0, 3, 1, 2)]
        return outputs


class SSD(nn.Module):
    """Heads on several maps, flattened and joined along positions."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 96, 128)
        self.body = Backbone(widths)
        self.classes = nn.ModuleList(nn.Conv2d(each, 4 * 6, 3, 1, 1) for each in widths)
        self.boxes = nn.ModuleList(nn.Conv2d(each, 4 * 4, 3, 1, 1) for each in widths)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = self.body(x)
        return _flat(self.classes, maps, 6), _flat(self.boxes, maps, 4)


def _flat(heads: nn.ModuleList, maps: list[torch.Tensor], numbers: int) -> torch.Tensor:
    outputs = [head(each).permute(0, 2, 3, 1).flatten(1) for head, each in zip(heads, maps, strict=True)]
    return torch.cat(outputs, 1).reshape(len(maps[0]), -1, numbers)


class Panoptic(nn.Module):
    """Semantic-FPN: branches of every scale brought to one size and added, and a classifier on pooled features."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 64, 96, 128)
        self.body = Backbone(widths)
        self.branches = nn.ModuleList(block(each, 32) for each in widths)
        self.mask, self.image = nn.Conv2d(32, 4, 1), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(x)
        size = maps[0].shape[-2:]
        scaled = [
            F.interpolate(branch(each), size, mode="bilinear") for branch, each in zip(self.branches, maps, strict=True)
        ]
        return {"mask": self.mask(torch.stack(scaled).sum(0)), "image": self.image(maps[-1].mean((2, 3)))}


class ASPP(nn.Module):
    """DeepLab's head: dilated branches and image pooling, concatenated, with a low-level skip."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Backbone()
        self.branches = nn.ModuleList(nn.Conv2d(128, 32, 3, 1, rate, rate) for rate in (1, 2, 4))
        self.pool, self.low = block(128, 32, 1), block(32, 12, 1)
        self.join, self.head = block(4 * 32, 64, 1), nn.Sequential(block(64 + 12, 64), nn.Conv2d(64, 5, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.body(x)
        high = maps[-1]
        pooled = F.interpolate(self.pool(F.adaptive_avg_pool2d(high, 1)), high.shape[-2:], mode="bilinear")
        joined = self.join(torch.cat([*(F.relu(branch(high)) for branch in self.branches), pooled], 1))
        up = F.interpolate(joined, maps[0].shape[-2:], mode="bilinear")
        mask: torch.Tensor = self.head(torch.cat([up, self.low(maps[0])], 1))
        return F.interpolate(mask, x.shape[-2:], mode="bilinear")


class Hourglass(nn.Module):
    """Two stacked hourglasses with intermediate supervision that is added back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 48, 3, 2)
        self.down = nn.ModuleList(Residual(48, 48) for _ in range(6))
        self.up = nn.ModuleList(Residual(48, 48) for _ in range(6))
        self.heads = nn.ModuleList(nn.Conv2d(48, 7, 1) for _ in range(2))
        self.back = nn.Conv2d(7, 48, 1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        x, outputs = self.stem(x), []
        for stack, head in enumerate(self.heads):
            y, skips = x, []
            for index in range(3):
                skips.append(y)
                y = self.down[3 * stack + index](F.max_pool2d(y, 2))
            for index in range(3):
                y = F.interpolate(self.up[3 * stack + index](y), scale_factor=2.0) + skips.pop()
            outputs.append(head(y))
            x = x + y + self.back(outputs[-1])
        return outputs


class SuperResolution(nn.Module):
    """EDSR-like: residual blocks without batch norm, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, 1, 1)
        self.body = nn.ModuleList(
            nn.Sequential(nn.Conv2d(32, 48, 3, 1, 1), nn.PReLU(48), nn.Conv2d(48, 32, 3, 1, 1)) for _ in range(4)
        )
        self.up = nn.Sequential(
            nn.Conv2d(32, 128, 3, 1, 1), nn.PixelShuffle(2), nn.PReLU(32), nn.Conv2d(32, 12, 3, 1, 1)
        )
        self.last = nn.PixelShuffle(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = y = self.first(x)
        for body in self.body:
            y = y + 0.1 * body(y)
        image: torch.Tensor = self.last(self.up(x + y))
        return image


class ShuffleUnit(nn.Module):
    """ShuffleNet v1: grouped 1×1, shuffle, depthwise, grouped 1×1; added, or concatenated where the stride is 2."""

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.groups, self.stride = groups, stride
        middle, grown = outputs // 4, outputs - inputs if stride == 2 else outputs
        self.squeeze = block(inputs, middle, 1, groups=1 if first else groups)
        self.spatial = nn.Sequential(nn.Conv2d(middle, middle, 3, stride, 1, groups=middle), nn.BatchNorm2d(middle))
        self.widen = nn.Sequential(nn.Conv2d(middle, grown, 1, groups=groups), nn.BatchNorm2d(grown))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.squeeze(x)
        n, c, h, w = y.shape
        y = y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = self.widen(self.spatial(y))
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1) if self.stride == 2 else x + y)


class ShuffleNetV1(nn.Module):
    """Zhang et al. 2017, shorter stages."""

    def __init__(self, groups: int, widths: tuple[int, ...], units: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(block(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1))
        stages, inputs = [], 24
        for width in widths:
            for index in range(units):
                stages.append(ShuffleUnit(inputs, width, groups, 2 if index == 0 else 1, first=inputs == 24))
                inputs = width
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(inputs, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.stages(self.stem(x)).mean((2, 3)))
        return out


class TwoStreams(nn.Module):
    """Two inputs through one shared trunk, compared and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = Backbone()
        self.join, self.head = block(3 * 128, 64, 1), nn.Linear(64, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        one, other = self.trunk(x)[-1], self.trunk(y)[-1]
        joined = self.join(torch.cat([one, other, (one - other).abs()], 1)).mean((2, 3))
        return self.head(joined), one.mean((1, 2, 3))


HEADS: dict[str, Callable[[], nn.Module]] = {
    "unet_transposed": lambda: UNet(transposed=True),
    "unet_bilinear_3_outputs": lambda: UNet(transposed=False, outputs=3),
    "linknet_deep_supervision": LinkNet,
    "fpn_shared_head": FPN,
    "fpn_own_heads": lambda: FPN(shared=False),
    "panet_shared_head": lambda: FPN(bottom_up=True),
    "ssd_heads": SSD,
    "semantic_fpn_and_classes": Panoptic,
    "deeplab_aspp": ASPP,
    "hourglass_2_stacks": Hourglass,
    "super_resolution": SuperResolution,
    "shufflenet_v1_g3": lambda: ShuffleNetV1(3, (240, 480)),
    "shufflenet_v1_g4": lambda: ShuffleNetV1(4, (272, 544)),
    "shufflenet_v1_g8": lambda: ShuffleNetV1(8, (384, 768)),
    "two_streams": TwoStreams,
}
