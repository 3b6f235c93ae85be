"""The loss of each image: from its label, from a teacher, or both (Hinton et al., 2015)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from thinet_deploy.tasks.distillation import Inside, Mix, losses

COUNT, CLASSES = 20, 7
LABELS = torch.arange(COUNT) % CLASSES


def scores(seed: int) -> torch.Tensor:
    return 3 * torch.randn(COUNT, CLASSES, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_a_teacher_it_is_the_cross_entropy(smoothing: float) -> None:
    got = losses(scores(0), LABELS, mix=Mix(smoothing=smoothing))
    assert got.shape == (COUNT,)
    torch.testing.assert_close(got.mean(), F.cross_entropy(scores(0), LABELS, label_smoothing=smoothing))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_it_is_nothing_where_both_agree(temperature: float) -> None:
    """A shift of all outputs of an image changes no probability."""
    got = losses(scores(0), LABELS, scores(0) + torch.arange(COUNT)[:, None], Mix(1, temperature))
    torch.testing.assert_close(got, torch.zeros(COUNT), atol=1e-5, rtol=0)


def test_the_gradient_is_that_of_the_papers_cross_entropy() -> None:
    outputs, heat = scores(0).requires_grad_(), 3.0
    (got,) = torch.autograd.grad(losses(outputs, LABELS, scores(1), Mix(1, heat)).mean(), outputs)
    paper = heat**2 * F.cross_entropy(outputs / heat, (scores(1) / heat).softmax(1))
    (expected,) = torch.autograd.grad(paper, outputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_shares_mix_and_images_without_labels_go_by_the_teacher_alone() -> None:
    labels = torch.where(torch.arange(COUNT) < 5, -1, LABELS)
    hard, soft = losses(scores(0), LABELS), losses(scores(0), LABELS, scores(1), Mix(1))
    got = losses(scores(0), labels, scores(1), Mix(0.3))
    torch.testing.assert_close(got[5:], (0.3 * soft + 0.7 * hard)[5:])
    torch.testing.assert_close(got[:5], soft[:5])


# ---------------------------------------------------------------------------------------------- inside the networks


class Block(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, inner, 3, padding=1), nn.Conv2d(inner, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.norm(self.two(torch.relu(self.one(x)))))


def blocks(*inner: int) -> nn.Module:
    torch.manual_seed(0)
    stage = nn.Sequential(*(Block(width) for width in inner))
    return nn.Sequential(stage, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)))


def test_parts_are_what_pruning_left_alike_and_each_once() -> None:
    model = blocks(2, 3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Inside(model.train(), blocks(6, 6).eval()) as inside:
        inside.find(torch.randn(5, 4, 6, 6))
        assert inside.names == ("0.0", "0.1"), "not the stage, which says what its last block says, nor the outputs"
    assert model.training
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0, msg=f"looking changed {name}")


def test_equal_networks_do_not_differ() -> None:
    x, model, teacher = torch.randn(5, 4, 6, 6), blocks(2, 3).eval(), blocks(2, 3).eval()
    with Inside(model, teacher) as inside:
        inside.find(x)
        model(x), teacher(x)
        differences_n = inside.differences()
        assert differences_n is not None
        torch.testing.assert_close(differences_n, torch.zeros(5))
        differences_n.sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert not any(bool(gradient.any()) for gradient in gradients), "the length of a zero has no gradient of its own"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_differences_are_the_same_in_every_precision(dtype: torch.dtype) -> None:
    x, model, teacher = torch.randn(5, 4, 6, 6), blocks(2).eval(), blocks(4).eval()
    found = []
    for kind in (torch.float32, dtype):
        model, teacher = model.to(kind), teacher.to(kind)
        with Inside(model, teacher) as inside:
            inside.find(x.to(kind))
            model(x.to(kind)), teacher(x.to(kind))
            found.append(inside.differences())
    torch.testing.assert_close(*found, rtol=0.05, atol=0, check_dtype=False)


def test_nothing_is_kept_and_nothing_listens_afterwards() -> None:
    model, teacher = blocks(2), blocks(4)
    with Inside(model, teacher) as inside:
        inside.find(torch.randn(2, 4, 6, 6))
        assert any(each._forward_hooks for each in teacher.modules())
    assert not any(each._forward_hooks for net in (model, teacher) for each in net.modules())


def test_a_plain_network_has_no_parts_in_common() -> None:
    def plain(width: int) -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Conv2d(4, width, 3), nn.ReLU()), nn.Flatten(), nn.LazyLinear(2))

    x = torch.randn(2, 4, 6, 6)
    with Inside(plain(3), plain(5)) as inside:
        inside.find(x)
        assert inside.names == ()
        assert inside.differences() is None


def test_the_difference_is_a_share_of_what_the_teacher_says_image_by_image() -> None:
    x, teacher = torch.randn(3, 4, 6, 6), nn.Sequential(nn.Sequential(nn.Identity(), nn.ReLU()), nn.Flatten())
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1, groups=4, bias=False), nn.ReLU()), nn.Flatten())
    nn.init.constant_(model[0][0].weight, 1.5)  # type: ignore[index]
    with Inside(model, teacher) as inside:
        inside.find(x)
        model(x), teacher(x)
        torch.testing.assert_close(inside.differences(), torch.full((3,), 0.25))


def with_features(*last: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), *last), nn.Flatten(), nn.LazyLinear(2))


def test_grouping_orders_channels_anew_so_that_nothing_inside_is_compared() -> None:
    model = with_features(nn.Conv2d(4, 4, 3, groups=2))
    with Inside(model, with_features(nn.Conv2d(4, 4, 3))) as inside:
        inside.find(torch.randn(2, 4, 6, 6))
        assert inside.names == ()
    with Inside(model, with_features(nn.Conv2d(4, 4, 3, groups=2))) as inside:
        inside.find(torch.randn(2, 4, 6, 6))
        assert inside.names == ("0",), "the original was grouped already"


def test_a_new_head_that_averages_is_not_held_to_the_largest_values() -> None:
    model = with_features(nn.AdaptiveAvgPool2d(1))
    for last, names in ((nn.MaxPool2d(4), ()), (nn.AdaptiveAvgPool2d(1), ("0",))):
        with Inside(model, with_features(last)) as inside:
            inside.find(torch.randn(2, 4, 6, 6))
            assert inside.names == names


class Skips(nn.Module):
    """Leaves its second block out in training."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = blocks(2, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.blocks[0]  # type: ignore[index]
        x = first(x) if self.training else second(first(x))
        return self.head(self.blocks[1](x))  # type: ignore[index, no-any-return]


def test_a_part_that_training_leaves_out_does_not_count() -> None:
    x, model, teacher = torch.randn(2, 4, 6, 6), Skips(), Skips().eval()
    with Inside(model, teacher) as inside:
        inside.find(x)
        assert inside.names
        assert "blocks.0.1" in inside.names
        model.train()(x), teacher(x)
        found = inside.differences()
        assert found is not None
        assert bool(found.isfinite().all())
        model.eval()(x), teacher(x)
        assert inside.differences() is not None
