"""The networks of the zoo, family by family, made with random weights."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

import torch
from _zoo_heads import HEADS
from torch import nn

from thinet_deploy.pruning.trace import Inputs

# Family → names; tv: torchvision, timm: timm, own: _zoo_heads.py.
FAMILIES = {
    "ResNet": (
        "tv:resnet18 tv:resnet50 timm:resnet26d timm:resnet33ts timm:resnetblur18 timm:resnetaa34d timm:resnet50_gn"
    ),
    "ResNet v2, BiT": "timm:resnetv2_50 timm:resnetv2_50x1_bit",
    "ResNeXt, Wide": "tv:resnext50_32x4d tv:wide_resnet50_2 timm:resnext26ts",
    "SE, ECA, GC, SK, attention": (
        "timm:seresnet18 timm:seresnet50 timm:seresnext26d_32x4d timm:legacy_seresnext26_32x4d "
        "timm:ecaresnet26t timm:eca_resnext26ts timm:gcresnet33ts timm:bat_resnext26ts timm:skresnet18 "
        "timm:skresnet50"
    ),
    "ResNeSt": "timm:resnest14d timm:resnest50d_4s2x40d",
    "Res2Net": "timm:res2net50_26w_4s timm:res2net50_14w_8s timm:res2next50 timm:dla60_res2net",
    "DenseNet": "tv:densenet121 timm:densenetblur121d timm:rdnet_tiny",
    "Inception, GoogLeNet": "tv:googlenet tv:inception_v3 timm:inception_v4 timm:inception_resnet_v2",
    "Xception": "timm:legacy_xception timm:xception41 timm:xception41p",
    "MobileNet v1–v4": (
        "timm:mobilenetv1_100 timm:mobilenetv1_125 tv:mobilenet_v2 timm:mobilenetv2_110d "
        "tv:mobilenet_v3_small tv:mobilenet_v3_large timm:mobilenetv3_rw timm:mobilenetv4_conv_small "
        "timm:mobilenetv4_conv_medium timm:mobilenetv4_hybrid_medium timm:mobilenet_edgetpu_100"
    ),
    "EfficientNet": (
        "tv:efficientnet_b0 timm:efficientnet_b1 timm:efficientnet_es timm:efficientnet_lite0 "
        "timm:tf_efficientnet_lite0 timm:efficientnet_b0_gn timm:efficientnet_blur_b0 timm:tinynet_a "
        "timm:tinynet_e"
    ),
    "EfficientNet v2": "timm:efficientnetv2_rw_t timm:gc_efficientnetv2_rw_t timm:tf_efficientnetv2_b0",
    "NAS nets": (
        "tv:mnasnet0_5 timm:mnasnet_100 timm:semnasnet_075 timm:fbnetc_100 timm:fbnetv3_b timm:spnasnet_100 "
        "timm:hardcorenas_a timm:mixnet_s timm:tf_mixnet_m timm:pnasnet5large"
    ),
    "RegNet x, y, z, v": (
        "tv:regnet_x_400mf tv:regnet_y_400mf timm:regnetx_002 timm:regnety_008_tv timm:regnetz_005 "
        "timm:regnetz_b16 timm:regnetv_040"
    ),
    "ShuffleNet": (
        "tv:shufflenet_v2_x0_5 tv:shufflenet_v2_x1_0 tv:shufflenet_v2_x1_5 own:shufflenet_v1_g3 "
        "own:shufflenet_v1_g4 own:shufflenet_v1_g8"
    ),
    "GhostNet": "timm:ghostnet_050 timm:ghostnet_100 timm:ghostnetv2_100 timm:ghostnetv3_050 timm:repghostnet_050",
    "SqueezeNet, AlexNet, VGG": "tv:squeezenet1_0 tv:squeezenet1_1 tv:alexnet tv:vgg11 tv:vgg11_bn timm:vgg16_bn",
    "ConvNeXt": (
        "timm:convnext_atto timm:convnext_tiny timm:convnext_atto_ols timm:convnextv2_atto "
        "timm:inception_next_atto timm:mambaout_femto"
    ),
    "HRNet": "timm:hrnet_w18_small",
    "DLA": "timm:dla34 timm:dla46_c timm:dla46x_c timm:dla60x_c",
    "CSP, DarkNet": (
        "timm:cspresnet50 timm:cspresnext50 timm:cspdarknet53 timm:darknet17 timm:darknet53 timm:darknetaa53 "
        "timm:sedarknet21 timm:cs3darknet_s timm:cs3darknet_focus_s timm:cs3sedarknet_xdw timm:cspnext_tiny"
    ),
    "RepVGG, MobileOne, RepViT": (
        "timm:repvgg_a0 timm:repvgg_b1g4 timm:mobileone_s0 timm:mobileone_s4 timm:repvit_m0_9"
    ),
    "DPN": "timm:dpn68 timm:dpn68b timm:dpn92",
    "VoVNet": "timm:vovnet39a timm:ese_vovnet19b_dw timm:ese_vovnet19b_slim timm:eca_vovnet39b",
    "SelecSLS, TResNet, GENet, ReXNet": (
        "timm:selecsls42 timm:selecsls42b timm:tresnet_m timm:gernet_s timm:gernet_m timm:rexnet_100 timm:rexnetr_100"
    ),
    "LCNet, HGNet, StarNet, FasterNet": (
        "timm:lcnet_050 timm:lcnetv2_small timm:hgnet_tiny timm:hgnetv2_b0 timm:starnet_s1 timm:starnet_s050 "
        "timm:fasternet_t0"
    ),
    "ConvMixer, PoolFormer, mixed": (
        "timm:convmixer_768_32 timm:poolformer_s12 timm:poolformerv2_s12 timm:convformer_s18 "
        "timm:edgenext_xx_small timm:focalnet_tiny_srf timm:swiftformer_xs"
    ),
    "NFNet (weights computed)": ("timm:nfnet_l0 timm:dm_nfnet_f0 timm:eca_nfnet_l0 timm:nf_regnet_b0 timm:nf_resnet50"),
    "Segmentation, 3-D": (
        "tv:lraspp_mobilenet_v3_large tv:deeplabv3_mobilenet_v3_large tv:fcn_resnet50 tv:r3d_18 "
        "tv:r2plus1d_18 tv:mc3_18"
    ),
    "Heads with several outputs": (
        "own:unet_transposed own:unet_bilinear_3_outputs own:linknet_deep_supervision own:fpn_shared_head "
        "own:fpn_own_heads own:panet_shared_head own:ssd_heads own:semantic_fpn_and_classes own:deeplab_aspp "
        "own:hourglass_2_stacks own:super_resolution own:two_streams"
    ),
}
QUICK = ["tv:resnet18", "tv:squeezenet1_1", "timm:lcnet_050", "own:shufflenet_v1_g4", "own:fpn_shared_head"]
NEEDS = {"own": (), "tv": ("torchvision",), "timm": ("timm", "torchvision")}
# Nets that shrink their maps without padding, or have a size in their code, need more than 64 pixels.
_SIZES = {
    **dict.fromkeys(
        ["tv:inception_v3", "timm:inception_v4", "timm:inception_resnet_v2", "timm:pnasnet5large"], (128, 128)
    ),
    **dict.fromkeys(["timm:mobilenetv4_hybrid_medium", "tv:alexnet", "timm:legacy_xception"], (96, 96)),
    "timm:bat_resnext26ts": (256, 256),  # its blocks of eight have to fill the last map
    **dict.fromkeys(["tv:r3d_18", "tv:r2plus1d_18", "tv:mc3_18"], (8, 32, 32)),
}


def make(name: str) -> tuple[nn.Module, Inputs]:
    """A network with random weights, and two random inputs for it."""
    source, _, key = name.partition(":")
    torch.manual_seed(0)
    if source != "own":
        _operators()
    if source == "own":
        model = HEADS[key]()
    elif source == "timm":
        model = importlib.import_module("timm").create_model(key)
    else:
        model = _torchvision(key)
    size = _SIZES.get(name, (64, 64))
    return model.eval(), tuple(torch.rand(2, 3, *size) for _ in range(2 if key == "two_streams" else 1))


def _torchvision(key: str) -> nn.Module:
    options: dict[str, Any] = {}
    if key in {"googlenet", "inception_v3"}:
        options = {"init_weights": False, "aux_logits": False}
    if key.startswith(("deeplab", "fcn", "lraspp")):
        options = {"weights_backbone": None}
    return importlib.import_module("torchvision.models").get_model(key, weights=None, **options)  # type: ignore[no-any-return]


@functools.cache
def _operators() -> torch.library.Library | None:
    """Make a torchvision without its C++ operators importable; no classifier needs them."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
        return library  # cached: the definitions last as long as this
    return None
