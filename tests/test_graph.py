"""Channel groups: what they say, and networks that have none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from graphs import graph_of, passes, two
from nets import Forward, conv
from torch import nn

from thinet_deploy.errors import ModelError
from thinet_deploy.models.vgg import vgg16
from thinet_deploy.pruning.discovery import channel_graph


def test_groups_come_in_the_order_of_execution_and_know_their_maps_and_consumers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4, stride=2), nn.ReLU(), nn.MaxPool2d(2), conv(4, 4), nn.Flatten(), nn.Linear(24, 2))
    graph = graph_of(model, (3, 12, 8))
    assert [group.name for group in graph.groups] == ["0", "3"]
    assert [group.map_size for group in graph.groups] == [(6, 4), (3, 2)]
    assert [(each.weight, each.dim, each.spread) for group in graph.groups for each in group.consumers] == [
        ("3.weight", 1, 1),
        ("5.weight", 1, 6),
    ]
    assert [group.shortcut for group in graph.groups] == [False, False]
    assert not graph.joins
    assert graph.group("3") is graph.groups[1]


def test_shortcuts_are_told() -> None:
    graph = graph_of(two(lambda m, x: m.b((y := m.other(x)) + m.c(m.a(y))), c=conv(6, 6)))
    assert [(group.producers, group.shortcut) for group in graph.groups] == [(("other", "c"), True), (("a",), False)]
    assert graph.joins


def test_producers_side_by_side_in_a_concatenation_share_consumers() -> None:
    """The same producer is read through several concatenations, at several places."""
    model = two(
        lambda m, x: m.b(torch.cat([y := m.other(x), z := m.a(y), m.c(torch.cat([z, y], 1))], 1)),
        c=conv(12, 5),
        b=conv(17, 4),
    )
    graph = graph_of(model)
    assert [group.name for group in graph.groups] == ["other", "a", "c"]
    first = graph.group("other")
    assert [each.weight for each in first.consumers] == ["a.weight", "b.weight", "c.weight"] or len(
        first.consumers
    ) == 3
    places = {each.weight: np.flatnonzero(np.isin(each.channels, first.channels)).tolist() for each in first.consumers}
    assert places == {"a.weight": [*range(6)], "c.weight": [*range(6, 12)], "b.weight": [*range(6)]}
    for seed in range(4):
        assert passes(model, graph, np.random.default_rng(seed).random(graph.channels) < 0.6)


@pytest.mark.parametrize("dim", [2, 3])
def test_a_concatenation_along_rows_or_columns_ties_the_two(dim: int) -> None:
    model = two(lambda m, x: m.b(torch.cat([m.other(x), m.c(x)], dim)), c=conv(3, 6))
    graph = graph_of(model)
    assert [group.producers for group in graph.groups] == [("other", "c")]
    assert passes(model, graph)


def test_finding_groups_changes_nothing() -> None:
    model = two(lambda m, x: m.b(m.n(m.a(m.other(x)))), n=nn.BatchNorm2d(6))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert graph_of(model).groups
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_all_convolutions_of_vgg16_are_free() -> None:
    with torch.device("meta"):
        model = vgg16()
    graph = channel_graph(model, (torch.zeros(2, 3, 224, 224, device="meta"),))
    convs = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    assert [group.name for group in graph.groups if group.map_size] == convs
    assert graph.group(convs[-1]).consumers[0].spread == 49
    assert set(graph.whole) == {"classifier.6"}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.b(m.a(x)) if x.sum() > 0 else m.b(m.a(x) * 2),
        lambda m, x: m.b(m.other(x))[: int(x.max())],
        lambda m, x: m.b(m.b(m.other(x))),
        lambda m, x: m.missing(x),
        lambda m, x: (_ for _ in ()).throw(ValueError),
    ],
    ids=["branch on data", "size from data", "wrong channels", "bug", "error without words"],
)
def test_a_network_that_cannot_be_traced_is_a_model_error(forward: Forward) -> None:
    with pytest.raises(ModelError, match="cannot trace the network for inputs of 3x8x8") as caught:
        graph_of(two(forward))
    assert "forward()" in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_wrong_input_shape_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="1x8x8"):
        graph_of(two(lambda m, x: m.b(m.other(x))), (1, 8, 8))


@pytest.mark.parametrize("layers", [[nn.Flatten(), nn.Linear(192, 2)], [nn.ReLU()]], ids=["linear", "no parameters"])
def test_a_network_without_convolutions_is_a_model_error(layers: list[nn.Module]) -> None:
    with pytest.raises(ModelError, match="no convolution"):
        graph_of(nn.Sequential(*layers))
