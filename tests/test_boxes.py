"""Box algebra of detectors: what is encoded is decoded, matching and suppression keep their promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from thinet_deploy.models.ssd import SSD, default_boxes, ssd300
from thinet_deploy.on_device import detections
from thinet_deploy.tasks.detection import NONE, Detection
from thinet_deploy.tasks.matching import encoded, intersection_over_union, matched

Floats = NDArray[np.float32]
DEFAULTS = default_boxes([(3, 4), (2, 2), (1, 1)], [(2.0,), (2.0, 3.0), (2.0,)])
COUNT = len(DEFAULTS)


@st.composite
def corners(draw: st.DrawFn, count: int) -> Floats:
    """Boxes whose sides are longer than 0."""
    start = draw(hnp.arrays(np.float32, (count, 2), elements=st.floats(0, 0.75, width=32)))
    size = draw(hnp.arrays(np.float32, (count, 2), elements=st.floats(0.0625, 0.25, width=32)))
    return np.concatenate([start, start + size], 1)


def as_corners(boxes: Floats) -> Floats:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1)


@given(corners(COUNT))
def test_what_training_encodes_the_device_decodes(boxes: Floats) -> None:
    """torch encodes, numpy decodes: two files that share no arithmetic."""
    coded = encoded(torch.from_numpy(boxes)[None], torch.from_numpy(DEFAULTS)).numpy()
    assert coded.shape == (1, 4, COUNT)
    np.testing.assert_allclose(detections.decode(coded, DEFAULTS)[0], boxes, atol=1e-5)


def test_a_default_box_is_coded_as_zeros() -> None:
    own = torch.from_numpy(as_corners(DEFAULTS))[None]
    np.testing.assert_allclose(encoded(own, torch.from_numpy(DEFAULTS)).numpy(), 0, atol=1e-5)


def test_sizes_without_bound_are_decoded_to_numbers() -> None:
    wild = np.full((1, 4, COUNT), 1e6, np.float32)
    assert np.isfinite(detections.decode(wild, DEFAULTS)).all()


@given(corners(5), corners(7))
def test_overlap_is_symmetric_from_0_to_1_and_the_same_in_torch(one: Floats, other: Floats) -> None:
    overlap = detections.intersection_over_union(one, other)
    assert ((overlap >= 0) & (overlap <= 1 + 1e-6)).all()
    np.testing.assert_allclose(overlap, detections.intersection_over_union(other, one).T, rtol=1e-6)
    np.testing.assert_allclose(np.diag(detections.intersection_over_union(one, one)), 1, rtol=1e-5)
    theirs = intersection_over_union(torch.from_numpy(one)[None], torch.from_numpy(other)[None])
    np.testing.assert_allclose(theirs[0].numpy(), overlap, rtol=1e-5, atol=1e-6)


@given(corners(4), st.integers(0, 4))
def test_every_object_is_learnt_and_every_half_overlap_too(boxes: Floats, there: int) -> None:
    present = torch.arange(4)[None] < there
    found = matched(torch.from_numpy(boxes)[None], present, torch.from_numpy(DEFAULTS))[0].numpy()
    overlap = detections.intersection_over_union(as_corners(DEFAULTS), boxes[:there])
    assert found.max() < there or there == 0
    if there:
        best = overlap.argmax(0)
        last = {int(place): number for number, place in enumerate(best)}  # of two with the same best, the later one
        for place, number in last.items():
            assert found[place] == number
        for place in set(range(COUNT)) - set(last):
            most = overlap[place].max()
            if abs(most - 0.5) > 1e-5:
                assert (found[place] != -1) == (most > 0.5)
            if found[place] != -1:
                assert overlap[place, found[place]] == pytest.approx(most, rel=1e-5)
    else:
        assert (found == -1).all()


@given(corners(12), st.sampled_from([0.1, 0.45, 0.7]))
def test_suppression_keeps_the_surest_and_nothing_that_it_covers(boxes: Floats, most: float) -> None:
    kept = detections.keep(boxes, most)
    overlap = detections.intersection_over_union(boxes, boxes)
    assert kept[0] == 0
    for index in range(len(boxes)):
        surer = kept[kept < index]
        assert (index in kept) == bool((overlap[index, surer] <= most).all())
    np.testing.assert_array_equal(detections.keep(boxes[kept], most), np.arange(len(kept)))


def test_what_is_found_is_what_the_outputs_say() -> None:
    """Two objects of two classes, each said by one default box; the background nowhere else in doubt."""
    logits = np.full((1, 3, COUNT), -9, np.float32)
    logits[:, 0] = 9
    coded = np.zeros((1, 4, COUNT), np.float32)
    for place, label, score in ((2, 1, 9.0), (COUNT - 1, 2, 5.0)):
        logits[0, :, place] = -9
        logits[0, label, place], logits[0, 3 - label, place] = score, -9.0
    (found,) = detections.find(logits, coded, DEFAULTS, least=0.5)
    assert found.classes.tolist() == [1, 2]
    assert found.scores[0] >= found.scores[1] > 0.99
    np.testing.assert_allclose(found.boxes, as_corners(DEFAULTS)[[2, COUNT - 1]], atol=1e-6)
    background = np.where(np.arange(3)[None, :, None] == 0, logits.max(), -9.0)
    (none,) = detections.find(background, coded, DEFAULTS, least=0.5)
    assert (none.boxes.shape, none.classes.shape, none.scores.shape) == ((0, 4), (0,), (0,))


# ---------------------------------------------------------------------------------------------- network and loss


def test_ssd300_has_the_papers_boxes() -> None:
    with torch.device("meta"):
        net = ssd300()
    assert net.default_boxes.shape == (8732, 4)
    sizes = sorted({round(300 * float(min(side)), 1) for side in net.default_boxes[:, 2:] if side[0] == side[1]})
    expected = [30, 60, 111, 162, 213, 264]  # and in between √(s·s'), (Liu et al., section 2.2; their code's rounding)
    assert {float(size) for size in expected} <= set(sizes)
    ones = [300 * (a * b) ** 0.5 for a, b in zip((0.1, 0.2), (0.2, 0.37), strict=True)]
    assert all(any(abs(one - size) < 0.1 for size in sizes) for one in ones)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 69, 37), (3, 100, 300)])
def test_every_prediction_has_its_default_box(shape: tuple[int, int, int]) -> None:
    stages = ((4,), (4,), (4,), (4,), (8,))
    net = SSD(stages, input_shape=shape, num_classes=3).eval()
    with torch.inference_mode():
        logits, boxes = net(torch.zeros(2, *shape))
    count = len(net.default_boxes)
    assert (logits.shape, boxes.shape) == ((2, 3, count), (2, 4, count))
    centres = net.default_boxes[:, :2]
    assert ((centres > 0) & (centres < 1)).all()


def test_predictions_stand_where_their_default_boxes_are() -> None:
    """A change of the image moves only predictions whose default box is near."""
    net = SSD(((4,), (4,), (4,), (4,), (8,)), input_shape=(3, 128, 128), num_classes=2).eval()
    image = torch.zeros(1, 3, 128, 128)
    with torch.inference_mode():
        before = net(image)[0]
        image[:, :, :16, 112:] = 1  # the upper right corner
        moved = (net(image)[0] - before).abs().sum(1)[0].numpy() > 0
    early = np.isclose(net.default_boxes[:, 2], 0.1) & np.isclose(net.default_boxes[:, 3], 0.1)
    centres = net.default_boxes[early & moved][:, :2]
    assert len(centres)
    assert ((centres[:, 0] > 0.5) & (centres[:, 1] < 0.5)).all()


def targets(*rows: list[float]) -> torch.Tensor:
    known = torch.full((1, 3, 6), float(NONE))
    for index, row in enumerate(rows):
        known[0, index] = torch.tensor(row)
    return known


def perfect(known: torch.Tensor, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """What a detector would say that knows the answer."""
    default = torch.from_numpy(DEFAULTS)
    found = matched(known[..., 1:5], known[..., 0] != NONE, default)
    rows = known.gather(1, found.clamp_min(0)[..., None].expand(-1, -1, 6))
    labels = torch.where(found >= 0, rows[..., 0], 0).long()
    logits = 40 * torch.nn.functional.one_hot(labels, classes).float().mT
    boxes = torch.where((found >= 0)[:, None], encoded(rows[..., 1:5], default), 0.0)
    return logits, boxes


def test_the_answer_has_no_loss_and_no_fault() -> None:
    task, known = Detection(DEFAULTS), targets([1, 0.1, 0.1, 0.4, 0.5, 0], [2, 0.5, 0.4, 0.9, 0.95, 0])
    outputs = perfect(known)
    assert float(task.losses(outputs, known)) == pytest.approx(0, abs=1e-5)
    assert float(task.losses(outputs, known, taught=outputs)) == pytest.approx(0, abs=1e-5)
    pytest.importorskip("pycocotools", reason="pycocotools is not installed")
    meter = task.meter()
    for _ in range(3):
        meter.add([each.numpy() for each in outputs], known.numpy())
    assert meter.judge().accuracy.figures["mAP@50"].value == pytest.approx(100)


def test_a_wrong_class_a_wrong_box_and_a_false_alarm_cost() -> None:
    task, known = Detection(DEFAULTS), targets([1, 0.1, 0.1, 0.4, 0.5, 0])
    logits, boxes = perfect(known)
    place = int(logits[0, 1].argmax())
    swapped, alarm = logits[:, [0, 2, 1]], logits.clone()
    alarm[0, 2, (place + 1) % COUNT] = 99
    for outputs in ((swapped, boxes), (logits, boxes + 1), (alarm, boxes)):
        assert float(task.losses(outputs, known)) > 0.5


def test_three_of_the_background_are_learnt_for_each_object_and_the_hardest() -> None:
    task, known = Detection(DEFAULTS), targets([1, 0.1, 0.1, 0.4, 0.5, 0])
    logits, boxes = perfect(known)
    positive = logits[0].argmax(0) > 0
    logits = torch.where(positive, logits, torch.zeros(()))
    logits[0, 1, ~positive] = torch.linspace(0, 5, int((~positive).sum()))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(task.losses((logits, boxes), known).sum(), logits)
    learnt = (gradient.abs().sum(1)[0] > 1e-4) & ~positive
    assert int(learnt.sum()) == 3 * int(positive.sum())
    assert learnt[~positive][-int(learnt.sum()) :].all(), "the background that is most taken for an object"


def test_an_image_without_objects_is_learnt_from_too() -> None:
    task, known = Detection(DEFAULTS), targets()
    outputs = (torch.zeros(1, 3, COUNT), torch.randn(1, 4, COUNT))
    assert float(task.losses(outputs, known)) == pytest.approx(3 * np.log(3), rel=1e-5)


def test_the_loss_of_an_image_does_not_depend_on_its_batch() -> None:
    random = torch.Generator().manual_seed(0)
    task = Detection(DEFAULTS)
    known = torch.cat([targets([1, 0.1, 0.1, 0.4, 0.5, 0], [2, 0.5, 0.4, 0.9, 0.95, 0]), targets()])
    outputs = (torch.randn(2, 3, COUNT, generator=random), torch.randn(2, 4, COUNT, generator=random))
    together = task.losses(outputs, known)
    alone = [task.losses((outputs[0][[i]], outputs[1][[i]]), known[[i]]) for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone))
