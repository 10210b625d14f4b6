"""How much a call computes at a time; test_loop has the whole way."""

import jax
import jax.numpy as jnp
import pytest

from cnn_cases.models import fast, make_model
from cnn_cases.training import programs

LARGEST_MAP = 28 * 28 * 6 * 4  # LeNet-5's, in bytes


@pytest.mark.parametrize(
    ("platform", "threads", "number", "expected"),
    [
        ("cpu", 1, 65, int(33_000_000 / 2.5 / LARGEST_MAP)),
        ("cpu", 2, 65, int(33_000_000 / 2.5 / LARGEST_MAP)),
        ("cpu", 4, 65, int(64_000_000 / 2.5 / LARGEST_MAP)),
        ("cpu", 1, 64, 64),
        ("gpu", 1, 5_000, 5_000),
    ],
)
def test_on_a_cpu_images_are_evaluated_in_parts_whose_maps_are_small(
    platform, threads, number, expected, monkeypatch
):
    monkeypatch.setattr(programs.provenance, "cpu_threads", lambda: threads)
    model = make_model("lenet5", num_classes=10, dtype="float32")
    image = jax.ShapeDtypeStruct((number, 32, 32, 1), jnp.uint8)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False))
    with fast.written_for(platform):
        assert programs.images_at_once(model.apply)(image, variables) == expected
