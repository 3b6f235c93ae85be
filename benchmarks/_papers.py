"""What the ThiNet papers print (thinet.md, section 4): reference columns, marked as theirs wherever they are shown."""

from __future__ import annotations

# --model → what the papers call it; top-1/top-5 (of a ResNet-50 as in ICCV, and as in TPAMI), #Param, #FLOPs, f./b. in
# ms (a Tesla M40, Caffe, batches of 32).
Printed = tuple[str, str, str, str, tuple[float, float] | None]
COSTS: dict[str, dict[str, Printed]] = {
    "vgg16": {
        "vgg16": ("Original", "68.34/88.44", "138.34M", "30.94B", (189.92, 407.56)),
        "thinet-conv": ("ThiNet-Conv", "69.80/89.53", "131.44M", "9.58B", (76.71, 152.05)),
        "thinet-gap": ("ThiNet-GAP", "67.34/87.92", "8.32M", "9.34B", (71.73, 145.51)),
        "thinet-tiny": ("ThiNet-Tiny", "59.34/81.97", "1.32M", "2.01B", (29.51, 55.83)),
        "squeezenet": ("SqueezeNet", "57.67/80.39", "1.24M", "1.72B", (37.30, 68.62)),
    },
    "resnet50": {
        "resnet50-caffe": ("Original", "72.88/91.14, 75.30/92.20", "25.56M", "7.72B", None),
        "thinet-70": ("ThiNet-70", "72.04/90.67, 74.03/92.11", "16.94M", "4.88B", None),
        "thinet-50": ("ThiNet-50", "71.01/90.02, 72.03/90.99", "12.38M", "3.41B", None),
        "thinet-30": ("ThiNet-30", "68.42/88.30, 68.17/88.86", "8.66M", "2.20B", None),
    },
}

# --model → another row of its architecture, so with its times: what it is called, and top-1/top-5.
ALSO = {"thinet-conv": ("Train from scratch (Conv)", "67.00/87.45")}

# Method → change of top-1/top-5 against each paper's own original, and ↓#Param/↓#FLOPs; VGG-16 on ImageNet.
FILTER_PRUNING = {
    "APoZ-1": ("-2.16/-0.84", "2.04×/≈1×"),
    "APoZ-2": ("+1.81/+1.25", "2.70×/≈1×"),
    "Taylor-1": ("-/-1.44", "≈1×/2.68×"),
    "Taylor-2": ("-/-3.94", "≈1×/3.86×"),
    "ThiNet-WS": ("+1.01/+0.69", "1.05×/3.23×"),
    "ThiNet-Conv": ("+1.46/+1.09", "1.05×/3.23×"),
    "ThiNet-GAP": ("-1.00/-0.52", "16.63×/3.31×"),
}

# Top-1 on CUB-200, Indoor-67; "FT & prune": fine-tuned to these first, then pruned there.
TRANSFER = {
    "VGG-16": (72.30, 72.46),
    "FT & prune": (66.90, 64.70),
    "Train from scratch": (44.27, 38.81),
    "ThiNet-Conv": (70.90, 72.31),
    "ThiNet-GAP": (69.43, 70.22),
    "ThiNet-Tiny": (65.45, 62.84),
    "AlexNet": (57.28, 59.55),
}

# Top-1 of VGG-16-GAP on CUB-200 whose first ten convolutions keep r = 1.0, 0.9 … 0.1, the same schedule for all.
# The value of "random" at 0.5 is an outlier that thinet.md leaves out.
_NONE = float("nan")
CRITERIA = {
    "random": (71.18, 70.23, 69.62, 67.93, 66.66, _NONE, 58.18, 48.95, 28.36, 1.90),
    "weight sum": (71.18, 70.68, 68.10, 63.98, 60.46, 55.16, 49.21, 42.92, 34.12, 4.87),
    "APoZ": (71.18, 70.11, 69.09, 68.14, 66.28, 63.81, 58.32, 51.40, 18.54, 0.91),
    "ThiNet without ŵ": (71.18, 71.42, 70.21, 69.28, 67.62, 65.65, 63.50, 57.04, 48.33, 25.22),
    "ThiNet": (71.18, 71.09, 70.52, 69.49, 68.80, 66.90, 63.39, 61.13, 52.28, 34.54),
}
FLOPS_LEFT = (100, 82.01, 66.37, 52.39, 40.37, 30.43, 21.70, 15.09, 10.23, 7.23)  # percent, of the same
