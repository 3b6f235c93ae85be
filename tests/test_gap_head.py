"""Global average pooling in place of the fully connected head (ThiNet-GAP)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prunable import SHAPE, images, prune, small_vgg, with_norms
from torch import nn

from thinet_deploy.errors import ModelError
from thinet_deploy.models.weights import save_weights
from thinet_deploy.pruning.plan import GapHead, Plan, empty_plan, load_plan
from thinet_deploy.pruning.surgery import apply, gap_head, load_thin, replace_head


def with_gap(model: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    head = gap_head(model, SHAPE)
    assert head is not None
    return apply(empty_plan(model).model_copy(update={"head": head}), model), plan.model_copy(update={"head": head})


def test_the_gap_head_averages_the_last_map_and_replays(tmp_path: Path) -> None:
    thin, plan = prune("VGG", 0.5)
    assert gap_head(thin, SHAPE) == GapHead(features=3, classes=3)
    gap, plan = with_gap(thin, plan)
    last_map = thin.get_submodule("features")[:-1](images())  # type: ignore[index]
    assert last_map.shape == (3, 3, 4, 4)  # without the last pool
    (linear,) = gap.get_submodule("classifier").children()
    torch.testing.assert_close(gap(images()), linear(last_map.mean((2, 3))))
    assert [module for module in gap.modules() if isinstance(module, nn.Linear)] == [linear]

    plan.save(tmp_path / "plan.json")
    save_weights(gap, tmp_path / "gap.safetensors")
    replayed = load_thin(load_plan(tmp_path / "plan.json"), small_vgg(), tmp_path / "gap.safetensors")
    assert torch.equal(replayed(images()), gap(images()))


class Parts(nn.Module):
    """A network with `features` and `classifier`, flattened by the latter."""

    def __init__(self, *classifier: nn.Module) -> None:
        super().__init__()
        self.features: nn.Module = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2))
        self.classifier = nn.Sequential(*classifier)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))  # type: ignore[no-any-return]


def test_a_head_that_flattens_by_itself_is_replaced_too() -> None:
    model = Parts(nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    gap, _ = with_gap(model, empty_plan(model))
    assert gap(images().double()).shape == (3, 3)
    assert {parameter.dtype for parameter in gap.parameters()} == {torch.float64}


class Written(Parts):
    """The size of the map stands in the code, as in many a tutorial."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).view(-1, 96))  # type: ignore[no-any-return]


class Pooled(Parts):
    """Pools once more between the two parts."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(nn.functional.max_pool2d(self.features(x), 2))  # type: ignore[no-any-return]


class Joined(nn.Module):
    """Two convolutions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(1, 6, 1), nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


def test_features_that_end_in_a_concatenation_are_counted_all() -> None:
    model = Parts(nn.Flatten(), nn.Linear(640, 8), nn.ReLU(), nn.Linear(8, 3))
    model.features = nn.Sequential(Joined(), nn.ReLU())
    assert gap_head(model, SHAPE) == GapHead(features=10, classes=3)
    gap, _ = with_gap(model, empty_plan(model))
    assert gap(images()).shape == (3, 3)


@pytest.mark.parametrize(
    "model",
    [
        *(with_norms(), Parts(nn.Flatten(), nn.Linear(96, 3)), Parts(nn.Conv2d(6, 3, 1)), nn.Linear(2, 2)),
        Written(nn.Linear(96, 8), nn.Linear(8, 3)),
        Pooled(nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 3)),
    ],
    ids=["no features", "one linear layer", "convolutional head", "no network", "a number in view()", "another pool"],
)
def test_where_no_gap_head_fits_there_is_none(model: nn.Module) -> None:
    assert gap_head(model, SHAPE) is None


def test_replacing_a_head_that_is_not_there_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="`features`") as caught:
        replace_head(with_norms(), GapHead(features=5, classes=3))
    assert "thinet-conv" in caught.value.hint
