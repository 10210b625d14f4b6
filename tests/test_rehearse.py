"""What a training asks for, known before it begins."""

import os
import re
import subprocess
import sys
import types
from unittest import mock

import jax
import pytest

from cnn_cases import rehearse
from cnn_cases.models import fast
from cnn_cases.training import devices, programs


@pytest.fixture
def libtpu():
    pytest.importorskip("libtpu", reason="the TPU compiler is a requirement of rehearsals for TPUs alone")


def test_a_rehearsal_has_the_programs_of_a_training_and_the_memory_of_one_device(config):
    config.batch_size = 96  # whose activations take more memory than the gradients
    training, evaluation = rehearse.rehearse(config, jax.devices()[:2])
    assert (training.program, training.steps, training.images) == ("training", 1, 48)
    assert (evaluation.program, evaluation.steps, evaluation.images) == ("evaluation", 1, 100)
    whole, _ = rehearse.rehearse(config, jax.devices()[:1])
    for one in (training, evaluation):
        assert one.seconds > 0
    # Both hold all of the state and of the data; half of the images, about half of the activations.
    program = programs.make_program(config, jax.devices()[:1])
    resident = sum(leaf.nbytes for leaf in jax.tree.leaves(program.arrays))
    assert resident < training.arguments < whole.arguments
    assert whole.total - whole.arguments > 1.5 * (training.total - training.arguments) > 0


def test_several_steps_a_call_are_compiled_as_such(config):
    config.steps_per_call = config.log_every_steps = config.evaluation.every_steps = 2
    assert next(rehearse.rehearse(config, jax.devices()[:1])).steps == 2


def test_the_last_evaluation_shows_views_of_several_sizes(config):
    config.evaluation.protocol = "ten_crop"
    _, _, views = rehearse.rehearse(config, jax.devices()[:2])
    assert (views.program, views.steps, views.images) == ("views of 16x16", 1, 100)
    config.model.name, config.evaluation.protocol = "nin", "resnet_dense"
    _, _, *views = rehearse.rehearse(config, jax.devices()[:2])
    assert [one.program for one in views] == [f"views of {side}x{side}" for side in (16, 18, 27, 34, 46)]
    assert [one.images for one in views] == [100, 79, 35, 22, 12]  # as many pixels as 100 of 16x16
    for one in views:
        assert one.total > one.arguments > 0


def test_devices_that_cannot_share_the_batch_are_refused(config):
    config.batch_size = 25
    with pytest.raises(ValueError, match="batch_size = 25 cannot be split evenly over 4 devices"):
        next(rehearse.rehearse(config, jax.devices()[:4]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("start.workdir", "/nonexistent", "there is no checkpoint in /nonexistent"),
        ("evaluation.protocol", "bogus", "evaluation.protocol = 'bogus' is unknown"),
        ("optimizer.frozen", ("bogus",), "optimizer.frozen"),
    ],
)
def test_a_training_that_could_not_begin_is_refused(key, value, message, config):
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=message):
        next(rehearse.rehearse(config, jax.devices()[:1]))


def test_layers_are_written_for_the_devices_and_not_afterwards(config, monkeypatch):
    asked = []
    monkeypatch.setattr(fast, "is_for_cpu", lambda: asked.append(fast.platform()) or False)
    monkeypatch.setattr(rehearse, "_compiled", lambda *_: asked.append(fast.platform()))
    for _ in rehearse.rehearse(config, [types.SimpleNamespace(platform="tpu")]):
        asked.append(f"afterwards {fast.platform()}")
    assert asked[-4:] == ["tpu", "afterwards cpu"] * 2  # the state's layers came before
    assert set(asked[:-4]) == {"tpu"}


def run(config_file, *flags):
    command = [sys.executable, "-m", "cnn_cases.rehearse", f"--config={config_file}", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_prints_a_row_for_each_program():
    done = run("configs/lenet5_digits.py", "--config.batch_size=16", "--config.evaluation.batch_size=8")
    assert done.returncode == 0, done.stderr
    device, _, *rows = done.stdout.splitlines()
    assert re.match(r"\d+ x cpu", device)
    assert [row.split()[0] for row in rows] == ["program", "training", "evaluation"]
    assert [len(row.split()) for row in rows[1:]] == [6, 6]


def test_a_row_has_the_sizes_in_mib_and_the_time_of_a_compilation_that_no_cache_shortens(monkeypatch, capsys):
    told, gib = [], 2**30

    def rehearsals(_config, _devices):
        assert told == [("jax_enable_compilation_cache", False)]
        yield rehearse.Rehearsal("training", 4, 16, 0.5, gib, 3 * gib)

    monkeypatch.setattr(jax.config, "update", lambda *pair: told.append(pair))
    monkeypatch.setattr(rehearse, "rehearse", rehearsals)
    monkeypatch.setattr(rehearse.flags, "FLAGS", types.SimpleNamespace(config=None, topology=None))
    rehearse.main()
    *_, head, row = capsys.readouterr().out.splitlines()
    assert dict(zip(re.split(r" {2,}", head), row.split(), strict=True)) == {
        "program": "training",
        "batches a call": "4",
        "images a device": "16",
        "compilation s": "0.5",
        "arguments MiB": "1,024.0",
        "in all MiB": "3,072.0",
    }


@pytest.mark.parametrize("topology", ["", "v5e", "v5e-4", "V4:2x2x1", "v4=2x2x1"])
def test_what_is_no_topology_is_refused(topology):
    with pytest.raises(ValueError, match=f"topology = '{topology}' must be a kind of TPU and the layout"):
        rehearse.of_topology(topology)


def test_the_command_takes_no_empty_topology():
    done = run("configs/lenet5_digits.py", "--topology=")
    assert done.returncode == 2
    assert "topology = '' must be a kind of TPU" in done.stderr


def test_tpus_that_are_not_there_need_their_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"topology = 'v5e:2x2' needs the TPU compiler: pip install"):
        rehearse.of_topology("v5e:2x2")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v5e:4x4", {}),
        ("v6e:1x2", {"chips_per_host_bounds": [1, 2, 1]}),
        ("v4:2x2x4", {"chip_config_name": "megacore"}),
        ("v4:1x1x2", {"chip_config_name": "megacore", "chips_per_host_bounds": [1, 1, 2]}),
    ],
)
def test_a_topology_is_asked_of_libtpu_in_its_words(name, options, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: mock.Mock(origin="libtpu/__init__.py"))
    monkeypatch.setattr(os, "environ", {"TPU_WORKER_HOSTNAMES": "mine"})
    asked = mock.Mock()
    monkeypatch.setattr(rehearse.topologies, "get_topology_desc", asked)
    assert rehearse.of_topology(name) is asked.return_value.devices
    asked.assert_called_once_with(name, "tpu", **options)
    assert os.environ["TPU_WORKER_HOSTNAMES"] == "mine"


def test_a_directory_with_the_name_of_the_tpu_compiler_is_not_taken_for_it(tmp_path, monkeypatch):
    (tmp_path / "libtpu").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "libtpu", raising=False)
    with pytest.raises(ValueError, match=r"topology = 'v5e:2x2' needs the TPU compiler"):
        rehearse.of_topology("v5e:2x2")


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize(
    ("topology", "count"), [("v5e:1x1", 1), ("v5e:1x2", 2), ("v5e:4x4", 16), ("v4:2x2x2", 8)]
)
def test_a_topology_has_its_chips(topology, count):
    assert len(rehearse.of_topology(topology)) == count


@pytest.mark.usefixtures("libtpu")
def test_a_training_is_compiled_for_tpus_that_are_not_there(config):
    config.batch_size = config.evaluation.batch_size = 32
    config.log_every_steps = 4
    training, evaluation = rehearse.rehearse(config, rehearse.of_topology("v5e:4x4"))
    # 12 steps, an evaluation every 4: a call does 4, unlike on a CPU.
    assert (training.steps, training.images, evaluation.images) == (4, 2, 2)
    assert training.total > training.arguments > 0


@pytest.mark.usefixtures("libtpu")
def test_a_training_that_does_not_fit_is_refused(config):
    config.data.image_size, config.batch_size = 640, 1200
    with pytest.raises(jax.errors.JaxRuntimeError) as raised:
        next(rehearse.rehearse(config, rehearse.of_topology("v5e:2x2")[:1]))
    assert "a device ran out of memory" in devices.message_for_user(raised.value)


@pytest.mark.usefixtures("libtpu")
@pytest.mark.parametrize("topology", ["v9:2x2", "v5e:3x5"])
def test_a_topology_that_there_is_not_is_refused(topology):
    with pytest.raises(ValueError, match=f"topology = '{topology}' is unknown to libtpu"):
        rehearse.of_topology(topology)
