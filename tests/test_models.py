"""The networks by name: torchvision's names and outputs, the smallest images, gradients, and the channel shuffle."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from thinet_deploy.errors import ModelError
from thinet_deploy.export import export_onnx
from thinet_deploy.models.loading import MODELS, build_model, input_shape_of
from thinet_deploy.models.presets import PRESETS, build_preset
from thinet_deploy.models.pretrained import NETWORKS
from thinet_deploy.models.shuffle import ShuffledConv2d
from thinet_deploy.models.vgg import VGG
from thinet_deploy.pruning.budget import Wish, some, uniform
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.proof import prove
from thinet_deploy.pruning.retrace import settled_plan
from thinet_deploy.pruning.surgery import apply
from thinet_deploy.pruning.trace import example_inputs

State = dict[str, torch.Tensor]
# Pixels on a side, below which a network has no map left.
LEAST = {
    **dict.fromkeys(("vgg16", "vgg16_bn", "vgg16-cifar", "thinet-conv"), 32),
    **dict.fromkeys(("vgg-small", "thinet-gap", "thinet-tiny"), 16),
    "alexnet": 67,
    "alexnet-owt": 63,
    "squeezenet": 21,
    "squeezenet1_0": 21,
    "squeezenet1_1": 17,
    **{name: 32 for name in MODELS if name.startswith(("ssd300-", "fcn8s-"))},
}


def built(name: str, shape: tuple[int, int, int] | None = None, classes: int | None = None) -> nn.Module:
    return build_model(name, input_shape=shape, num_classes=classes, seed=0)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------- torchvision's


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_shapes_are_torchvisions(name: str, zoo: ModuleType) -> None:
    theirs = on_meta(lambda: zoo.get_model(NETWORKS[name], weights=None, num_classes=7))
    ours = on_meta(lambda: built(name, classes=7))
    assert shapes(ours) == shapes(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    assert input_shape_of(ours) == (3, 224, 224)


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1", "resnet50"])
def test_outputs_are_torchvisions(name: str, zoo: ModuleType) -> None:
    """At another size than 224 too, in eval mode and, where nothing is random, in training."""
    theirs, ours = zoo.get_model(NETWORKS[name], weights=None, num_classes=7), built(name, classes=7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(2, 3, *size, generator=generator) for size in ((224, 224), (97, 130))]
    for module in (*ours.modules(), *theirs.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for training in (True, False):
        for image in images:
            with torch.no_grad():
                pair = ours.train(training)(image), theirs.train(training)(image)
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "alexnet-owt"])
def test_outputs_of_large_heads_are_torchvisions(name: str, zoo: ModuleType) -> None:
    """The hidden layers, half a gigabyte in a VGG, are cut to 16 units in both."""
    theirs = on_meta(lambda: zoo.get_model(NETWORKS[name], weights=None, num_classes=7))
    ours = on_meta(lambda: built(name, classes=7))
    generator = torch.Generator().manual_seed(0)
    for model in (theirs, ours):
        _narrow_head(model)
        model.to_empty(device="cpu")
    state = {
        key: torch.randn(tensor.shape, generator=generator).abs() / max(1, tensor[0].numel() if tensor.dim() else 1)
        if tensor.is_floating_point()
        else torch.zeros_like(tensor)
        for key, tensor in theirs.state_dict().items()
    }
    theirs.load_state_dict(state), ours.load_state_dict(state, strict=True)
    image = torch.rand(1, 3, 224, 224, generator=generator)
    with torch.inference_mode():
        expected, got = theirs.eval()(image), ours.eval()(image)
    assert expected.std() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def _narrow_head(model: nn.Module) -> None:
    before = None
    head = model.get_submodule("classifier")
    assert isinstance(head, nn.Sequential)
    linear = [index for index, module in enumerate(head) if isinstance(module, nn.Linear)]
    for index in linear:
        old = head[index]
        assert isinstance(old, nn.Linear)
        after = 7 if index == linear[-1] else 16
        head[index] = nn.Linear(before or old.in_features, after, device="meta")
        before = after


def test_the_papers_resnet_takes_its_steps_in_the_first_convolution() -> None:
    caffe, torchvision = on_meta(lambda: built("resnet50-caffe")), on_meta(lambda: built("resnet50"))
    assert shapes(caffe) == shapes(torchvision)
    strides = [
        [model.get_submodule(f"layer3.0.{conv}").stride for conv in ("conv1", "conv2", "downsample.0")]
        for model in (caffe, torchvision)
    ]
    assert strides == [[(2, 2), (1, 1), (2, 2)], [(1, 1), (2, 2), (2, 2)]]


# ---------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(("ssd300-", "fcn8s-"))])
def test_any_number_of_classes_any_size_and_gray(name: str) -> None:
    least = LEAST.get(name, 1)
    for shape in ((1, least, least), (3, least + 37, least + 5)):
        model = on_meta(partial(built, name, shape, 3))
        assert input_shape_of(model) == shape
        assert model(torch.zeros(2, *shape, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("name", LEAST)
def test_images_that_are_too_small_are_refused(name: str) -> None:
    small = LEAST[name] - 1
    with pytest.raises(ModelError, match=rf"needs images of at least {LEAST[name]}x{LEAST[name]} pixels") as found:
        on_meta(lambda: built(name, (3, 300, small), 3))
    assert f"3x300x{small} was given" in found.value.what
    assert "--input-shape" in found.value.hint


@pytest.mark.parametrize("name", ["alexnet", "alexnet-owt", "squeezenet1_0", "squeezenet1_1"])
def test_refused_images_are_those_that_would_fail(name: str) -> None:
    """The layers themselves have nothing left of an image one pixel smaller than the smallest."""
    model = on_meta(lambda: built(name))
    features, least = model.get_submodule("features"), LEAST[name]
    features(torch.zeros(1, 3, least, least, device="meta"))
    with pytest.raises(RuntimeError, match=r"too small|Kernel size"):
        features(torch.zeros(1, 3, least, least - 1, device="meta"))


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet20", "vgg-small", "thinet-tiny"])
def test_a_fresh_network_learns(name: str) -> None:
    """Gradients reach every parameter, and the loss of a few images in the colour of their class falls."""
    model = built(name, (3, 32, 32), 4).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    generator, labels, losses = torch.Generator().manual_seed(0), torch.arange(8) % 4, []
    colours = torch.randn(4, 3, 1, 1, generator=generator)
    images = colours[labels] + 0.3 * torch.randn(8, 3, 32, 32, generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# ---------------------------------------------------------------------------------------------- gcos


def test_a_shuffled_convolution_is_one_behind_a_shuffle() -> None:
    torch.manual_seed(0)
    conv, x = ShuffledConv2d(12, 8, 3, padding=1, groups=4, shuffle=3), torch.randn(2, 12, 5, 5)
    plain = nn.Conv2d(12, 8, 3, padding=1, groups=4)
    plain.load_state_dict(conv.state_dict())
    torch.testing.assert_close(conv(x), plain(nn.ChannelShuffle(3)(x)))
    assert "groups=4" in str(conv)
    assert "shuffle=3" in str(conv)


def test_every_output_behind_two_group_convolutions_sees_every_input() -> None:
    """Without the shuffle between them each would see one group's."""
    model = VGG(((4,), (8, 8), (8, 8)), (), input_shape=(3, 16, 16), num_classes=2, gap=True, groups=(1, 2, 4))
    assert [module.shuffle for module in model.features if isinstance(module, ShuffledConv2d)] == [2, 2, 4]
    convs = [index for index, module in enumerate(model.features) if isinstance(module, nn.Conv2d)]
    second, third = convs[1], convs[2]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.1)
    x = torch.rand(1, 4, 8, 8, requires_grad=True)
    out = model.features[second : third + 1](x)
    for channel in range(out.shape[1]):
        (gradient,) = torch.autograd.grad(out[0, channel].sum(), x, retain_graph=True)
        assert bool((gradient.abs().sum((0, 2, 3)) > 0).all())


def test_group_convolutions_export_to_what_every_runtime_has_and_can_be_pruned(tmp_path: Path) -> None:
    shape = (3, 32, 32)
    model = VGG(((8,), (8, 8), (16, 16)), (), input_shape=shape, num_classes=5, gap=True, groups=(1, 2, 4)).eval()
    inputs = example_inputs(model, shape)
    graph = channel_graph(model, inputs)
    plan = settled_plan(model, graph, some(graph, graph.groups, uniform(graph.groups, 0.5, Wish())), inputs)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    assert plan.widths
    assert prove(model, graph, plan, (images,), seed=0).passed
    for network in (model, apply(plan, model)):
        export_onnx(network, shape, tmp_path / "net.onnx", opset=20, ir_version=10)
        used = Counter(node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node)
        assert used.keys() == {"Conv", "Relu", "MaxPool", "Reshape", "Transpose", "ReduceMean", "Gemm"}
        assert used["Transpose"] == 3
        session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            expected = network(images)
        got = torch.from_numpy(session.run(None, {"input": images.numpy()})[0])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_group_convolutions_have_a_layout_for_vgg16_only() -> None:
    with pytest.raises(ModelError, match="no layout of group convolutions for resnet50") as found:
        build_preset("thinet-70", network="resnet50", gcos=True)
    assert "vgg16" in found.value.hint


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_goes_with_its_own_networks(preset: str) -> None:
    for network in PRESETS[preset].networks:
        assert build_on_meta(preset, network) is not None
    with pytest.raises(ModelError, match=f"The preset {preset} is made from .*, and squeezenet is none of them"):
        build_preset(preset, network="squeezenet")


def build_on_meta(preset: str, network: str) -> nn.Module:
    return on_meta(lambda: build_preset(preset, network=network))
