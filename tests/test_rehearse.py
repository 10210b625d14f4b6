"""What a training asks for, known before it begins."""

import importlib.util

import jax
import pytest

from cnn_cases import rehearse
from cnn_cases.training import devices, programs

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='the TPU compiler is not installed (pip install "jax[tpu]")',
)


def test_a_rehearsal_has_the_programs_of_a_training_and_the_memory_of_one_device(config):
    training, evaluation = rehearse.rehearse(config, jax.devices()[:2])
    assert (training.program, training.steps, training.images) == ("training", 1, 12)
    assert (evaluation.program, evaluation.steps, evaluation.images) == ("evaluation", 1, 100)
    whole = rehearse.rehearse(config, jax.devices()[:1])[0]
    for one in (training, evaluation):
        assert one.seconds > 0
    # Both hold all of the state and of the data; half of the images, about half of the activations.
    program = programs.make_program(config, jax.devices()[:1])
    resident = sum(leaf.nbytes for leaf in jax.tree.leaves(program.arrays))
    assert resident < training.arguments < whole.arguments
    assert whole.total - whole.arguments > 1.5 * (training.total - training.arguments) > 0


def test_several_steps_a_call_are_compiled_as_such(config):
    config.steps_per_call = config.log_every_steps = config.evaluation.every_steps = 2
    assert rehearse.rehearse(config, jax.devices()[:1])[0].steps == 2


def test_devices_that_cannot_share_the_batch_are_refused(config):
    config.batch_size = 25
    with pytest.raises(ValueError, match="batch_size = 25 cannot be split evenly over 4 devices"):
        rehearse.rehearse(config, jax.devices()[:4])


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "count", "processes"), [("v5e:2x2", 4, 1), ("v5e:4x4", 16, 4), ("v4:2x2x2", 8, 2)]
)
def test_a_topology_has_its_chips(topology, count, processes):
    found = devices.of_topology(topology)
    assert len(found) == count
    assert {device.process_index for device in found} == set(range(processes))


@needs_libtpu
def test_a_training_is_compiled_for_tpus_that_are_not_there(config):
    config.batch_size = config.evaluation.batch_size = 32
    config.log_every_steps = 4
    training, evaluation = rehearse.rehearse(config, devices.of_topology("v5e:4x4"))
    # 12 steps, an evaluation every 4: a call does 4, unlike on a CPU.
    assert (training.steps, training.images, evaluation.images) == (4, 2, 2)
    assert training.total > training.arguments > 0


@needs_libtpu
def test_a_training_that_does_not_fit_is_refused(config):
    config.data.image_size, config.batch_size = 640, 1200
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        rehearse.rehearse(config, devices.of_topology("v5e:2x2")[:1])
    assert "a device has no memory left" in devices.refusal(raised.value)


@needs_libtpu
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e:3x5", "v5e", ""])
def test_a_topology_that_there_is_not_is_refused(topology):
    with pytest.raises(ValueError, match=f"topology = '{topology}' is none that libtpu knows"):
        devices.of_topology(topology)
