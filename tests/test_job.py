"""What a build starts from: the identity of its stages, and what is found out before any work begins."""

from collections.abc import Callable
from pathlib import Path

import pytest

from thinet_deploy.errors import ModelError
from thinet_deploy.options import Options
from thinet_deploy.stages.job import load_job

MakeOptions = Callable[..., Options]


def test_two_factories_of_one_file_do_not_share_results(tiny_options: MakeOptions, tmp_path: Path) -> None:
    one, other, again = (load_job(tiny_options(tmp_path, name)).identity for name in ("plain", "residual", "plain"))
    assert one == again
    assert one != other
    assert load_job(Options(out=tmp_path)).identity["model"] == "vgg-small"


def test_a_network_that_cannot_train_on_one_image_needs_larger_batches(
    tiny_options: MakeOptions, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError, match=r"norm_of_points cannot take a training batch of 1 of 1x8x8: Expected more"
    ) as no:
        load_job(tiny_options(tmp_path, "norm_of_points", batch_size=1))
    assert "--batch-size 2" in no.value.hint
    load_job(tiny_options(tmp_path, "norm_of_points", batch_size=2))
    load_job(tiny_options(tmp_path, "plain", batch_size=1))
