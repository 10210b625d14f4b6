import pytest

from cnn_cases.studies import plan
from cnn_cases.training import programs
from tests.studies.conftest import tiny_study


def test_a_study_runs_each_point_of_its_grid_with_each_seed(data_dir):
    study = tiny_study(data_dir)
    runs = plan.expand(study)
    assert [run.name for run in runs[:3]] == [
        "momentum-0.0_flip-True_seed-0",
        "momentum-0.0_flip-True_seed-1",
        "momentum-0.0_flip-False_seed-0",
    ]
    assert len(runs) == 8
    last = runs[-1].config
    assert (last.optimizer.momentum, last.data.augment.flip, last.seed) == (0.9, False, 1)
    assert study.base.seed == 0, "the base itself is left alone"


def test_a_study_of_one_point_takes_only_seeds(data_dir):
    study = tiny_study(data_dir, grid=())
    assert [(run.name, run.config.seed) for run in plan.expand(study)] == [("seed-0", 0), ("seed-1", 1)]


def test_a_study_can_give_some_points_other_keys_besides(data_dir):
    adjust = ((("data.augment.flip", True), (("schedule.warmup_steps", 1), ("schedule.warmup", "constant"))),)
    for run in plan.expand(tiny_study(data_dir, adjust=adjust)):
        expected = (1, "constant") if run.config.data.augment.flip else (2, "linear")
        assert (run.config.schedule.warmup_steps, run.config.schedule.warmup) == expected
        assert run.point.keys() == {"optimizer.momentum", "data.augment.flip"}


def test_networks_with_settings_of_their_own_can_be_compared(data_dir):
    adjust = ((("model.name", "resnet_cifar"), (("model.depth", 8), ("model.shortcut", "A"))),)
    grid = (("model.name", ("lenet5", "resnet_cifar")),)
    study = tiny_study(data_dir, grid=grid, adjust=adjust)
    for run in plan.expand(study):
        own = {"depth": 8, "shortcut": "A"} if run.point["model.name"] == "resnet_cifar" else {}
        assert run.config.model.to_dict() == {"name": run.point["model.name"]} | own
        programs.check(run.config)
    study.adjust = ((("model.name", "lenet5"), (("model.depth", 8),)),)
    with pytest.raises(ValueError, match=r"model.depth = 8: lenet5 has no such setting"):
        programs.check(plan.expand(study)[0].config)


def test_names_of_runs_tell_keys_apart_and_are_no_paths(data_dir):
    grid = (("optimizer.name", ("sgd",)), ("schedule.name", ("cosine",)), ("data.data_dir", ("a/b",)))
    run = plan.expand(tiny_study(data_dir, grid=grid))[0]
    assert run.name == "optimizer.name-sgd_schedule.name-cosine_data_dir-a-b_seed-0"
    grid = (("data.splits.train", ("train[:10%]",)),)
    assert plan.expand(tiny_study(data_dir, grid=grid))[0].name == "train-train-:10%-_seed-0"


def test_no_value_of_a_grid_takes_a_run_out_of_its_study(data_dir):
    names = ("imagenette/320px-v2", "../../x", "/etc/x")
    runs = plan.expand(tiny_study(data_dir, grid=(("data.name", names),), seeds=(0,)))
    assert [run.name for run in runs] == [
        "name-imagenette-320px-v2_seed-0",
        "name-..-..-x_seed-0",
        "name--etc-x_seed-0",
    ]


def test_a_training_config_is_no_study(config):
    with pytest.raises(ValueError, match="this is no study config: base and grid and seeds missing"):
        plan.expand(config)


def test_a_point_is_configured_as_its_runs_are(data_dir):
    adjust = ((("model.name", "resnet_cifar"), (("num_steps", 9), ("model.depth", 8))),)
    grid = (("model.name", ("lenet5", "resnet_cifar")), ("data.augment.flip", (True, False)))
    study = tiny_study(data_dir, grid=grid, adjust=adjust)
    recorded = study.to_dict()
    for run in plan.expand(study):
        assert plan.config_of(recorded, run.point) | {"seed": run.config.seed} == run.config.to_dict()
    assert recorded == study.to_dict()


def test_values_are_those_of_all_points_with_their_adjustments(record):
    record["config"]["adjust"] = [[["model.depth", 20], [["num_steps", 40], ["model.width", 2]]]]
    assert plan.values_of(record["config"], "num_steps") == (20, 40)
    assert plan.values_of(record["config"], "model.width") == (None, 2)
    assert plan.values_of(record["config"], "model.depth") == (8, 20)
    assert plan.values_of(record["config"], "batch_size") == (32,)


@pytest.mark.parametrize(
    ("compare", "known"), [("model.deep", "model.depth, model.plain"), ([8], "model.depth")]
)
def test_only_a_key_of_the_grid_can_be_compared(record, compare, known):
    record["config"]["compare"] = compare
    with pytest.raises(ValueError, match=rf"^compare = .* must be a key of the grid, which has {known}"):
        plan.compared(record["config"])


@pytest.mark.parametrize(
    ("against", "message"),
    [
        (
            "model.deep",
            "against = 'model.deep' must be a key of the grid, which has model.depth",
        ),
        ("model.plain", r"against = 'model.plain' must have numbers in the grid, not \[True, False\]"),
    ],
)
def test_only_numbers_of_the_grid_can_be_an_axis(record, against, message):
    record["config"]["against"] = against
    with pytest.raises(ValueError, match=message):
        plan.against(record["config"])


def test_one_number_is_no_axis(record):
    record["config"] |= {"against": "model.depth", "grid": [["model.depth", [8]]]}
    assert plan.against(record["config"]) is None


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["model.depth", "seed"], ["depth", "seed"]),
        (["optimizer.name", "schedule.name"], ["optimizer.name", "schedule.name"]),
        (["a.b.c", "b.c", "c"], ["a.b.c", "b.c", "c"]),
        (["data.seed", "seed"], ["data.seed", "seed"]),
    ],
)
def test_short_names_tell_the_keys_apart(keys, names):
    assert list(plan.short_names(keys).values()) == names


def test_titles_say_what_a_name_or_a_split_is_of():
    keys = ["model.name", "model.depth", "data.splits.train", "start.workdir"]
    titles = ["model.name", "depth", "splits.train", "start.workdir"]
    assert list(plan.titles_of(keys).values()) == titles


def test_a_name_that_is_too_long_for_a_directory_is_refused_before_anything_runs(data_dir):
    study = tiny_study(data_dir, grid=(("optimizer.frozen", (("conv1",), ("conv1", "conv2") * 20)),))
    with pytest.raises(ValueError, match="grid: the name of a run would have more than 255 bytes"):
        plan.expand(study)
