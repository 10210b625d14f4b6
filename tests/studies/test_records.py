import json

import pytest

from cnn_cases.studies import plan, records
from cnn_cases.training import provenance


def test_runs_of_one_code_stay_together(record):
    assert records.split_by_code(record) == {"": record}


def test_runs_of_two_commits_are_parted_and_none_is_lost(mixed):
    parts = records.split_by_code(mixed)
    assert list(parts) == ["aaaaaaa", "bbbbbbb-dirty"]
    for seed, part in enumerate(parts.values()):
        assert part["runs"] == [run for run in mixed["runs"] if run["seed"] == seed]


def test_a_run_that_two_commits_made_is_a_part_of_its_own(mixed):
    mixed["runs"][0]["environments"] = [0, 1]
    assert list(records.split_by_code(mixed)) == ["aaaaaaa then bbbbbbb-dirty", "bbbbbbb-dirty", "aaaaaaa"]


def test_other_versions_are_another_code_and_another_machine_is_not(mixed):
    first, second = mixed["environments"]
    second |= {"commit": first["commit"], "platform": "another"}
    assert list(records.split_by_code(mixed)) == [""]
    second["versions"] = first["versions"] | {"jax": "0.10.1"}
    assert list(records.split_by_code(mixed)) == ["aaaaaaa jax 0.10.2", "aaaaaaa jax 0.10.1"]


def test_a_package_without_a_version_is_no_other_code_than_one_that_is_not_named(mixed):
    first, second = mixed["environments"]
    second |= {"commit": first["commit"], "versions": first["versions"] | {"tensorflow-datasets": None}}
    assert records.split_by_code(mixed) == {"": mixed}


def test_commits_of_one_code_are_not_parted_and_changes_of_one_commit_are(mixed):
    for one in mixed["environments"]:
        one["code"] = "0123456789ab"
    assert list(records.split_by_code(mixed)) == [""]
    mixed["environments"][1]["code"] = "another"
    assert list(records.split_by_code(mixed)) == ["aaaaaaa", "bbbbbbb-dirty"]


def test_devices_of_another_kind_are_told_apart_and_their_number_is_not(mixed):
    first, second = mixed["environments"]
    second |= {"commit": first["commit"], "devices": ["cpu", "cpu"]}
    first["devices"] = ["cpu"]
    assert list(records.split_by_code(mixed)) == [""]
    first["devices"] = ["NVIDIA H100"]
    assert list(records.split_by_code(mixed)) == ["aaaaaaa on NVIDIA H100", "aaaaaaa on cpu"]


def test_runs_of_one_point_with_other_data_are_told_apart(mixed):
    first, second = mixed["environments"]
    second["commit"] = first["commit"]
    first["data"], second["data"] = {"train": [9, 7]}, {"train": [9, 8]}
    one, other = records.split_by_code(mixed)
    assert one.startswith("aaaaaaa data ")
    assert one != other


def test_points_of_one_config_of_the_data_with_other_data_are_told_apart(mixed):
    first, second = mixed["environments"]
    second["commit"] = first["commit"]
    first["data"], second["data"] = {"train": [9, 7]}, {"train": [9, 8]}
    for run in mixed["runs"]:
        run["environments"] = [int(run["model.plain"])]
    assert len(records.split_by_code(mixed)) == 2
    for key in ("data.image_size", "start.workdir"):  # the grid is of the data, or of the start
        other = json.loads(json.dumps(mixed).replace("model.plain", key))
        assert list(records.split_by_code(other)) == [""]


def test_a_run_that_went_on_with_other_data_is_told_apart(mixed):
    first, second = mixed["environments"]
    second["commit"] = first["commit"]
    first["data"], second["data"] = {"train": [9, 7]}, {"train": [9, 8]}
    for run in mixed["runs"]:
        run["environments"] = [0]
    assert list(records.split_by_code(mixed)) == [""]
    mixed["runs"][0]["environments"] = [0, 1]
    gone_on, others = records.split_by_code(mixed).values()
    assert (gone_on["runs"], others["runs"]) == (mixed["runs"][:1], mixed["runs"][1:])


def test_a_directory_without_git_is_a_code(mixed):
    mixed["environments"][1]["commit"] = None
    assert list(records.split_by_code(mixed)) == ["aaaaaaa", "no commit"]
    for one, code in zip(mixed["environments"], ("0123", "4567"), strict=True):
        one |= {"commit": None, "code": code}
    assert list(records.split_by_code(mixed)) == ["no commit (0123)", "no commit (4567)"]


def test_changes_of_one_commit_are_told_apart_by_their_code(mixed):
    for one, code in zip(mixed["environments"], ("0123", "4567"), strict=True):
        one |= {"commit": "a" * 40 + "-dirty", "code": code}
    assert list(records.split_by_code(mixed)) == ["aaaaaaa-dirty (0123)", "aaaaaaa-dirty (4567)"]


@pytest.mark.parametrize(
    ("setting", "default", "other"),
    [
        ("matmul_precision", None, "highest"),
        ("random_numbers", "threefry2x32", "rbg"),
        ("partitionable", True, False),
        ("x64", False, True),
    ],
)
def test_another_setting_of_jax_is_another_code(setting, default, other, mixed):
    first, second = mixed["environments"]
    second |= {"commit": first["commit"], setting: default}
    assert list(records.split_by_code(mixed)) == [""]  # the first is older than the key
    second[setting] = other
    assert list(records.split_by_code(mixed)) == [
        f"aaaaaaa {setting} {default}",
        f"aaaaaaa {setting} {other}",
    ]


def test_the_defaults_of_jax_are_those_of_this_jax():
    here = provenance.environment()
    assert {name: here[name] for name in records.JAX_DEFAULTS} == records.JAX_DEFAULTS


def test_points_hold_their_runs(record):
    points = records.group_by_point(record)
    assert list(points) == [(8, True), (8, False), (20, True), (20, False)]
    assert [run["seed"] for run in points[20, True]] == [0, 1]


def test_points_are_named_by_their_values(record):
    assert records.names_of_points(record)[20, False] == "depth 20, plain False"
    assert records.names_of_points(record, without="model.plain")[20, False] == "depth 20"


def test_a_record_reads_back_with_tuples_and_one_without_metrics_is_refused(record, tmp_path):
    path = tmp_path / "record.json"
    record["config"]["grid"] = [["profile_steps", [[1, 2], [3, 4]]]]
    record["runs"] = record["runs"][2:4]  # of both seeds
    for run in record["runs"]:
        run["profile_steps"] = [1, 2]
    path.write_text(json.dumps(record))
    read = records.read(path)
    assert plan.values_of(read["config"], "profile_steps") == ((1, 2), (3, 4))
    assert set(records.group_by_point(read)) == {((1, 2),)}
    del record["runs"][1]["metrics"]
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"runs\[1\] has no metrics"):
        records.read(path)


def test_a_point_and_a_seed_run_once_by_each_code(mixed, tmp_path):
    path = tmp_path / "record.json"
    again = mixed["runs"][0] | {"environments": [1]}
    path.write_text(json.dumps(mixed | {"runs": [*mixed["runs"], again]}))
    assert len(records.read(path)["runs"]) == len(mixed["runs"]) + 1
    again["environments"] = mixed["runs"][0]["environments"]
    path.write_text(json.dumps(mixed | {"runs": [*mixed["runs"], again]}))
    with pytest.raises(ValueError, match=r"runs\[\d+\] is a duplicate, of the same code and with seed 0"):
        records.read(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda record: record["runs"][0].update(environments=[0.0]), r"runs\[0\]: environments = \[0.0\]"),
        (lambda record: record["runs"][0]["metrics"].update({"test/error": True}), "test/error = True"),
        (lambda record: record["config"]["base"].update(num_steps="20"), r"base.num_steps = '20' \(str\)"),
        (lambda record: record["config"]["base"]["data"].update(augment=5), r"base.data.augment = 5 \(int\)"),
        (lambda record: record["config"]["base"]["data"].update(name={}), r"base.data.name = {} \(dict\)"),
        (lambda record: record["config"]["base"].update(loss=[]), r"base.loss = \(\) \(tuple\)"),
        (lambda record: record["config"]["base"].update(batch_size=0), "batch_size .* must be 1 or more"),
        (lambda record: record["config"]["grid"][0][1].append("x"), "grid: model.depth = 'x' does not fit"),
    ],
)
def test_a_part_of_another_type_is_named(record, damage, message, tmp_path):
    damage(record)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=message):
        records.read(path)
