"""Statistics do not depend on how images are batched, and take no more memory when there are more of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from thinet_deploy.data.dataset import ImageSet
from thinet_deploy.data.preprocess import Augment, Preprocess
from thinet_deploy.errors import ModelError
from thinet_deploy.pruning import calibration, sums
from thinet_deploy.pruning.calibration import Sample, Sampling, observe
from thinet_deploy.pruning.discovery import channel_graph
from thinet_deploy.pruning.layerwise import prunable
from thinet_deploy.pruning.moments import centred
from thinet_deploy.pruning.oneshot import Method, Pruned, prune_once
from thinet_deploy.pruning.repair import Front
from thinet_deploy.pruning.replay import Replay, Values
from thinet_deploy.pruning.sums import Sums
from thinet_deploy.pruning.trace import example_inputs
from thinet_deploy.pruning.wide import Wide

SHAPE = (3, 16, 16)
PIXELS = np.random.default_rng(3).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
IMAGES = ImageSet(
    np.arange(40) % 5, lambda indices: PIXELS[indices], Preprocess(resize=(16, 16), crop=(16, 16), augment=Augment())
)


def network(seed: int = 0) -> nn.Module:
    """Maps of 16×16, 8×8 and 4×4 pixels."""
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 5)),
    ).eval()


def sample(batch: int = 8, count: int = 40) -> Sample:
    return Sample(IMAGES, np.arange(count), batch, 0)


def wide_of(model: nn.Module, batch: int = 8) -> Wide:
    return Wide.of(model, channel_graph(model, example_inputs(model, SHAPE)), SHAPE, batch)


def prune(seed: int = 0, batch: int = 8) -> tuple[nn.Module, Pruned]:
    model = network(seed)
    graph = channel_graph(model, example_inputs(model, SHAPE))
    groups = prunable(graph)
    widths = {group.name: len(group.channels) // 2 for group in groups}
    return model, prune_once(model, graph, groups, lambda _: widths, sample(batch), SHAPE, Method())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=5).map(sorted), st.integers(1, 2))
def test_how_rows_come_makes_no_difference_at_all(steps: list[int], blocks: int) -> None:
    rng = torch.Generator().manual_seed(0)
    rows, targets = torch.randn(100, blocks, 6, generator=rng), torch.randn(100, blocks * 2, generator=rng)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sums, "_PIECE", 17 * 6)
        for each in ([], steps):
            gathered = Sums(blocks, 6, 2, keep=True)
            for some, wanted in zip(rows.tensor_split(each), targets.tensor_split(each), strict=True):
                gathered.add(some, wanted)
            found.append(gathered.moments())
            assert torch.equal(torch.cat(gathered.pieces), rows)
    for name in ("count", "patches", "squares", "targets", "cross"):
        assert np.array_equal(getattr(found[0], name), getattr(found[1], name)), name


def test_inputs_far_from_zero_have_the_covariance_of_those_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums, "_TILE", 48)
    rows = torch.randn(5000, 1, 100, generator=torch.Generator().manual_seed(0))
    rows[..., 1:] += 0.9 * rows[..., :1]
    near, far = Sums(1, 100, 0), Sums(1, 100, 0)
    near.add(rows)
    far.add(rows + 1024)
    one, two = centred(near.moments()).covariance[0], centred(far.moments()).covariance[0]
    assert torch.allclose(one, torch.cov(rows[:, 0].double().T, correction=0), atol=1e-5)
    assert torch.allclose(one, two, atol=1e-3)
    assert torch.allclose(two, two.T)


def test_moments_do_not_depend_on_the_batch_size() -> None:
    found = []
    for batch in (1, 32):
        wide = wide_of(network(), batch)
        moments, original = observe(wide, Sampling.of(wide, sample(batch)), ["2.weight", "5.weight", "8.weight"])
        found.append((moments, original))
    for name in found[0][0]:
        assert found[0][0][name].count == found[1][0][name].count
        assert torch.allclose(found[0][0][name].squares, found[1][0][name].squares, rtol=1e-5, atol=1e-3)
    for key in found[0][1].rows:
        assert torch.allclose(found[0][1].rows[key], found[1][1].rows[key], rtol=1e-4, atol=1e-5)


def test_filters_kept_do_not_depend_on_the_batch_size_but_for_near_ties() -> None:
    for seed in range(4):
        one, two = prune(seed, 1)[1], prune(seed, 32)[1]
        ties = 0
        for name, curve in one.curves.items():
            assert np.allclose(curve.error, two.curves[name].error, rtol=1e-4)
            alike = np.abs(np.diff(curve.error, 2)) < 1e-5 * curve.error[-1]  # two steps cost the same
            ties += int(alike.sum())
        assert (one.kept != two.kept).sum() <= 2 * ties


@pytest.mark.parametrize("count", [50, 1000, 100_000])
def test_rows_and_values_are_bounded_however_many_images_there_are(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_ROWS": 600, "BETWEEN": 64 * 2048, "_FEWEST_IMAGES": 4}.items():
        monkeypatch.setattr(calibration, name, value)
    wide = wide_of(network())
    sampling = Sampling.of(wide, Sample(IMAGES, np.arange(count), 8, 0))
    images = [sampling.images[name] for name in wide.readers]
    assert images == sorted(images)
    for name, reader in wide.readers.items():
        rows = max(600, calibration._ROWS_PER_INPUT * reader.inputs)
        assert rows <= sampling.images[name] * sampling.most[name] < rows + sampling.images[name] <= 2 * rows
        assert sampling.images[name] * wide.replay.held(reader.uses[0].at) <= 64 * 2048


def test_no_image_passes_through_an_operation_twice_and_few_values_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 8 * 16 * 16 * 4 * 12  # twelve images of the largest map
    monkeypatch.setattr(calibration, "BETWEEN", budget)
    monkeypatch.setattr(calibration, "_FEWEST_IMAGES", 1)
    wide = wide_of(network(), 4)
    sampling = Sampling.of(wide, sample(4))
    assert sampling.images["2.weight"] == 12 < sampling.images["8.weight"] == 40
    _, original = observe(wide, sampling, ())
    executed: dict[fx.Node, int] = {}
    execute = Replay._execute

    def counted(replay: Replay, node: fx.Node, values: Values) -> torch.Tensor:
        executed[node] = executed.get(node, 0) + 1
        return execute(replay, node, values)

    monkeypatch.setattr(Replay, "_execute", counted)
    front = Front(wide, sampling, original)
    for reader in wide.readers.values():
        front.collect([reader])
        kept = [value.nbytes for batch in front._batches for value in batch.values.values()]
        assert sum(kept) <= budget
    assert set(executed.values()) == {10}


def test_a_network_that_overflows_is_refused_with_the_layer() -> None:
    model = network()
    with torch.no_grad():
        for name in ("2.weight", "5.weight"):
            model.get_parameter(name).fill_(1e30)
    wide = wide_of(model, 4)
    with pytest.raises(ModelError, match=r"What 5 says of calibration images is not finite") as stop:
        observe(wide, Sampling.of(wide, sample(4)), ["2.weight"])
    assert "--weights" in stop.value.hint


def test_layers_that_few_images_are_looked_at_in_are_repaired_too(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.from_numpy(IMAGES.inputs(np.arange(40)))
    errors = []
    for most in (1 << 30, 8 * 16 * 16 * 4 * 12):
        monkeypatch.setattr(calibration, "BETWEEN", most)
        monkeypatch.setattr(calibration, "_FEWEST_IMAGES", 1)
        model, done = prune()
        with torch.inference_mode():
            errors.append(float((done.model(inputs) - model(inputs)).square().mean()))
    assert errors[1] < 1.5 * errors[0]
