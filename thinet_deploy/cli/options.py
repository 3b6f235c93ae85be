"""The options that commands share, each with the help that `--help` shows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[
    str | None,
    typer.Option(
        "--target", "-t", help="What to build for: see `targets`; NAME@STACK for another stack. \\[default: cpu]"
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="vgg16, vgg16_bn, vgg16-cifar, vgg-small, alexnet, squeezenet1_1, resnet50, resnet20, "
        "ssd300-thinet-tiny, fcn8s-vgg16_bn, … (any other name lists them all), or your own file.py:factory.  "
        "\\[default: vgg-small on the built-in digits]"
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Image folders: DIR/train/CLASS/*.jpg and DIR/val or DIR/test alike. Or VOC's layout, to detect or to "
        "segment: DIR/JPEGImages, ImageSets, and Annotations or SegmentationClass."
    ),
]
Unlabelled = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images without labels, for statistics and for learning from the original; DIR/train of --data "
        "is not needed then. With --weights and the recipe best."
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        help="Trained weights, .safetensors or .pth; or `default`, torchvision's for this network and ImageNet's 1,000 "
        "classes. Without them the network is trained here."
    ),
]
Preprocess = Annotated[
    Path | None,
    typer.Option(help="TOML file with resize, crop, colour, range, mean, std; goes with the model into the bundle."),
]
InputShape = Annotated[
    str | None, typer.Option(help="Channels x height x width, such as 3x224x224, for a model that does not say.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="thinet-conv: prune the convolutions. thinet-gap: also replace the fully connected head by global "
        "average pooling. The papers' widths: thinet-tiny of a VGG-16, thinet-70, thinet-50, thinet-30 of a ResNet-50."
        "  \\[default: thinet-gap where there is such a head]"
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="best: all layers at once, filters chosen by elimination, their consumers refitted without training, "
        "widths where they help most, the original trained on as teacher of the fine-tuning. iccv2017, tpami2019: the "
        "papers', layer by layer with fine-tuning between.  \\[default: best]"
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="How filters are chosen: thinet, thinet-omp, weight-sum, apoz, taylor, random, and in the recipe best "
        "elimination. Several, as in thinet,apoz, are compared, a row each; the first ships.  "
        "\\[default: as the recipe says]"
    ),
]
Reconstruction = Annotated[
    str | None,
    typer.Option(
        help="How their consumers make up for the others: none; scale (the papers' one number per channel); in the "
        "recipe best full (weights and bias).  \\[default: as the recipe says]"
    ),
]
CalibrationImages = Annotated[
    int | None, typer.Option(help="Training images for the statistics of the recipe best.  \\[default: 2000]")
]
Keep = Annotated[
    float | None,
    typer.Option(
        help="As few multiply-accumulates as with this share of the filters in each pruned layer; widths go where they "
        "help most. With the papers' recipes and other methods, just this share in each.  \\[default: 0.5]"
    ),
]
Macs = Annotated[
    str | None,
    typer.Option(help="Budget instead of --keep: 2x for half of the multiply-accumulates, or a number such as 300M."),
]
Size = Annotated[
    str | None,
    typer.Option(help="Budget instead of --keep: of the weights, such as 5MB (2^20 bytes each, as in the papers)."),
]
Latency = Annotated[
    str | None,
    typer.Option(
        help="Budget instead of --keep: milliseconds for one image on the target's first engine that runs here, or on "
        "--device, such as 8ms. Layers are timed there, widths chosen by error per millisecond, and the result is "
        "measured."
    ),
]
SpeedUp = Annotated[
    str | None, typer.Option("--speedup", help="The same as a ratio: 2x is twice as fast as the original.")
]
RoundTo = Annotated[
    str | None,
    typer.Option(
        help="Widths are multiples of this number, or of the target profile's (`target`); budgets are reached all the "
        "same.  \\[default: the target's, finer in narrow layers; the papers': 1]"
    ),
]
TransferTo = Annotated[
    Path | None,
    typer.Option(
        help="Folder of other classes, as --data: prune on --data, then fine-tune to these; compared with fine-tuning "
        "first and pruning there.",
        show_default=False,
    ),
]
TransferEpochs = Annotated[
    int | None, typer.Option(help="Epochs of fine-tuning to --transfer-to.  \\[default: as --finetune-epochs]")
]
KeepLayer = Annotated[
    list[str] | None,
    typer.Option("--keep-layer", help="PATTERN=R: another keep ratio for some layers, such as layer4.*=0.7."),
]
Gcos = Annotated[
    bool | None,
    typer.Option(
        "--gcos",
        help="Group convolutions of the pruned network, with shuffles: 4 groups on the smallest maps, 2 on the next.",
    ),
]
GcosLayer = Annotated[
    list[str] | None,
    typer.Option("--gcos-layer", help="PATTERN=G: group these convolutions instead, such as features.2*=4."),
]
Ignore = Annotated[list[str] | None, typer.Option(help="Pattern of layers that stay whole, such as layer1.*.")]
Shortcuts = Annotated[
    bool | None, typer.Option("--prune-shortcuts", help="Prune residual streams too, not only inside blocks.")
]
Branches = Annotated[
    bool | None,
    typer.Option("--drop-branches", help="Let residual branches vanish where that costs least: they add their mean."),
]
Epochs = Annotated[int | None, typer.Option(help="Epochs of training the original.  \\[default: 20]")]
LayerEpochs = Annotated[
    int | None,
    typer.Option(help="Epochs after each pruned layer, in the papers' recipes.  \\[default: the papers', mostly 1]"),
]
FinetuneEpochs = Annotated[
    int | None,
    typer.Option(
        help="Epochs at the end, for ThiNet-Conv and again for ThiNet-GAP.  \\[default: 15; the papers': 12, ResNets 9]"
    ),
]
Controls = Annotated[
    str | None,
    typer.Option(
        help="What the thin networks stand beside: unpruned (the original, trained as many epochs more as they were, "
        "which is also their teacher), all (also their architecture from scratch, for the epochs of all training "
        "that went into them, the teacher's too), none (the teacher is the original as it is).  "
        "\\[default: unpruned]"
    ),
]
LearningRate = Annotated[
    float | None, typer.Option("--lr", help="Learning rate of training from fresh weights.  \\[default: 0.03]")
]
FinetuneRate = Annotated[
    float | None,
    typer.Option(
        "--finetune-lr",
        help="Learning rate of fine-tuning.  \\[default: tried on a tenth of the training; the papers': 0.001]",
    ),
]
Train = Annotated[
    list[str] | None,
    typer.Option(
        help="NAME=VALUE: a setting of all training: precision=bf16 (or fp16), optimizer=adamw, schedule=steps, "
        "label_smoothing=0.1, ema=0.999, distill=0.9 (default 0.5), inside=0 (default 2), "
        "temperature=2, weight_decay=0.0001, momentum, warmup, clip."
    ),
]
BatchSize = Annotated[int | None, typer.Option(help="Images per training step.  \\[default: 32; the papers': 128]")]
Trainer = Annotated[
    str | None,
    typer.Option(help="file.py:fit, your own training: fit(model, images, epochs=…, lr=…) trains the model in place."),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="fp32, fp16, bf16 or int8: what engines compute in; refused where the target cannot.  "
        "\\[default: fp32; for a device with TensorRT, files in fp16 and int8]"
    ),
]
MaxDrop = Annotated[
    float | None,
    typer.Option(
        help="Points of top-1 that INT8 may cost on training images that were not calibrated on (the table has what it "
        "costs on test images); the layers that cost most go back to fp32 until it does.  \\[default: 1]"
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads of an engine while it is timed.  \\[default: 1]")]
Dla = Annotated[
    int | None,
    typer.Option(
        help="Which of a Jetson's DLAs (0 or 1) takes the layers that it can, one image at a time; the others stay on "
        "the GPU, and are named.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="ssh://user@host:port (user and port may be left out) or, for Android, adb:SERIAL: copy the bundle there, "
        "build its engines there, verify and measure them there, and bring all that back into RUN/device.",
        show_default=False,
    ),
]
TimedOn = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="ssh://user@host:port (user and port may be left out): layers and networks are timed there instead of on "
        "this machine. It needs Python 3.8 or later with numpy and OpenVINO or ONNX Runtime.",
        show_default=False,
    ),
]
DevicePython = Annotated[
    str | None,
    typer.Option(help="Python on the device, with numpy and a runtime; 3.8 or later.  \\[default: python3]"),
]
Require = Annotated[
    list[str] | None,
    typer.Option(
        help="What the network that ships has to reach, judged by 95 % intervals: latency<=8ms, speedup>=2, top1>=75, "
        "top1-drop<=1.0, size<=5MB; accuracy and accuracy-drop are of the figure that decides, "
        "in any task. Exit code 1 when one is not met; RUN/contract (of `compare`: RUN/compared) has junit.xml and "
        "summary.md."
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Same seed, same widths and same kept filters (for a budget of time, of the same times).  \\[default: 0]"
    ),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="The run directory.  \\[default: thinet-run]")]
Config = Annotated[Path | None, typer.Option(help="TOML file with any of these options; the command line wins.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]
