import json
import os

import pytest

from cnn_cases.studies import ledger, plan
from configs.studies import depth_digits

CPU = {"commit": "a" * 40, "cpus": 2, "devices": ["cpu"], "versions": {"jax": "0.10.2"}}
GPUS = CPU | {"devices": ["NVIDIA H100", "NVIDIA H100"]}


def outcome(seed, error, depth=20, **changes):
    run = {"model.depth": depth, "seed": seed, "status": "finished", "step": 64_000, "date": "2026-11-25"}
    run |= {"environments": [0]}
    return run | {"metrics": {"train/error": 0.0, "test/error": error}, "curves": {}} | changes


def diverged(seed, depth=20):
    run = {"model.depth": depth, "seed": seed, "status": "diverged", "step": 5, "date": "2026-11-25"}
    return run | {"environments": [0], "curves": {}}


DATA = {
    "name": "cifar10",
    "data_dir": "",
    "splits": {"train": "train", "test": "test"},
    "augment": {"flip": True, "pad": 4},
}


def record(*runs, environments=(CPU,), **base):
    config = {
        "seed": 0,
        "num_steps": 64_000,
        "batch_size": 128,
        "model": {"name": "resnet_cifar", "depth": 20, "plain": False, "shortcut": "A"},
        "data": DATA,
        "evaluation": {"every_steps": 1_000, "protocol": "single"},
        "checkpoint": {"keep_last": 1},
    }
    depths = tuple(dict.fromkeys(run["model.depth"] for run in runs))
    study = {"base": config | base, "grid": [["model.depth", depths]], "seeds": [0, 1]}
    return {"config": study, "environments": list(environments), "runs": list(runs)}


def table(**studies):
    """The ledger's lines as {title: cell}."""
    head, *lines = ledger.table(ledger.collect({f"{name}.json": one for name, one in studies.items()}))
    return [dict(zip(head, line, strict=True)) for line in lines]


def test_seeds_are_averaged_and_set_beside_the_paper():
    (line,) = table(depth=record(outcome(0, 0.08), outcome(1, 0.09)))
    assert line == {
        "network": "resnet_cifar, depth 20, shortcut A",
        "data": "cifar10, flip, pad",
        "steps": "64,000",
        "error": "test",
        "%": "8.50 ± 0.71",
        "seeds": "2",
        "published %": "8.75 (He et al. 2015, table 6)",
        "difference": "-0.25",
        "devices": "cpu (2 threads)",
        "date": "2026-11-25",
        "record": "[depth](results/depth.json)",
    }


def test_dates_are_those_of_the_ends_of_the_runs():
    runs = [outcome(seed, 0.08, date=f"2026-11-{day}") for seed, day in enumerate((27, 25, 26))]
    (line,) = table(depth=record(*runs))
    assert line["date"] == "2026-11-25 to 2026-11-27"
    for run in runs:
        del run["date"]
    (line,) = table(depth=record(*runs))
    assert line["date"] == ""


def test_each_point_of_a_grid_has_its_own_row_and_paper():
    lines = table(depth=record(outcome(0, 0.08), outcome(0, 0.07, depth=110), outcome(0, 0.3, depth=8)))
    assert [line["published %"].split(" ")[0] for line in lines] == ["8.75", "6.61", ""]
    assert [line["difference"] for line in lines] == ["-0.75", "+0.39", ""]


def test_a_training_without_the_papers_augmentation_is_set_beside_nothing():
    (line,) = table(whole=record(outcome(0, 0.08), data=DATA | {"augment": {"flip": True, "pad": 0}}))
    assert line["published %"] == line["difference"] == ""


def test_a_row_of_several_records_links_all_of_them():
    (line,) = table(one=record(outcome(0, 0.08)), two=record(outcome(1, 0.09)))
    assert line["record"] == "[one](results/one.json), [two](results/two.json)"


def test_a_shortened_training_says_so_and_is_set_beside_nothing():
    (line,) = table(short=record(outcome(0, 0.08), num_steps=2_000))
    assert line["steps"] == "2,000 (shortened: the paper's are 64,000)"
    assert line["published %"] == line["difference"] == ""
    (line,) = table(long=record(outcome(0, 0.08), num_steps=80_000))
    assert line["steps"] == "80,000 (lengthened: the paper's are 64,000)"
    assert line["published %"] == line["difference"] == ""
    (line,) = table(large=record(outcome(0, 0.08), num_steps=32_000, batch_size=256))
    assert line["difference"] == "-0.75", "as many images in fewer steps are no less"
    for num_steps, word in ((63_999, "shortened"), (67_000, ""), (68_000, "lengthened")):  # by 5 % at most
        (line,) = table(near=record(outcome(0, 0.08), num_steps=num_steps))
        assert (line["difference"] == "") == bool(word)
        assert word in line["steps"]


def test_a_setting_of_zero_is_not_taken_for_one_that_is_off():
    """A network may have another default: a rate of dropout, say, which a record without the key has."""
    model = {"name": "own", "drop": 0.0, "side": False}
    (line,) = table(zero=record(outcome(0, 0.08), model=model))
    assert line["network"] == "own, drop 0.0, depth 20"


def test_a_training_from_another_ones_layers_says_so_and_is_set_beside_nothing():
    start = {"workdir": "runs/mnist", "step": "last", "layers": ("conv*",)}
    (line,) = table(fine=record(outcome(0, 0.08), start=start))
    assert line["network"] == "resnet_cifar, depth 20, shortcut A, conv* of runs/mnist (last)"
    assert line["published %"] == line["difference"] == ""
    (line,) = table(random=record(outcome(0, 0.08), optimizer={"frozen": ("conv1", "norm1")}))
    assert line["network"] == "resnet_cifar, depth 20, shortcut A, conv1 and norm1 frozen"
    assert line["published %"] == line["difference"] == ""


def test_a_record_that_is_older_than_a_key_is_of_the_same_recipe():
    start = {"workdir": "", "step": "best", "layers": ["conv*"]}  # of nothing
    (line,) = table(old=record(outcome(0, 0.08)), new=record(outcome(1, 0.09), start=start))
    assert line["%"] == "8.50 ± 0.71"


def test_a_figure_from_memory_is_labelled(monkeypatch):
    recalled = ledger.Published({"model.name": "resnet_cifar"}, 5.0, 64_000 * 128, "a paper", recalled=True)
    monkeypatch.setattr(ledger, "PUBLISHED", (recalled,))
    (line,) = table(depth=record(outcome(0, 0.08)))
    assert line["published %"] == "5.0 (a paper, as recalled)"


@pytest.mark.parametrize(
    "changes",
    [
        {"environments": [CPU | {"commit": "b" * 40}]},
        {"environments": [CPU | {"data": {"train": [9, 8]}}]},
        {"environments": [GPUS]},
        {"optimizer": {"learning_rate": 0.2}},
        {"evaluation": {"every_steps": 1_000, "protocol": "flip"}},
        {"num_steps": 2_000},
    ],
)
def test_other_commits_machines_and_recipes_are_other_rows(changes):
    lines = table(one=record(outcome(0, 0.08)), two=record(outcome(1, 0.09), **changes))
    assert [line["%"] for line in lines] == ["8.00", "9.00"]
    assert [line["record"][:5] for line in lines] == ["[one]", "[two]"]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 7},
        {"log_every_steps": 10},
        {"evaluation": {"every_steps": 500, "protocol": "single"}},
        {"checkpoint": {"keep_last": 4}},
        {"data": DATA | {"data_dir": "/data"}},
    ],
)
def test_what_no_result_depends_on_parts_no_row(changes):
    (line,) = table(one=record(outcome(0, 0.08)), two=record(outcome(1, 0.09), **changes))
    assert line["seeds"] == "2"


def test_a_run_that_went_on_with_a_package_that_stands_in_for_another_has_its_row():
    versions = [CPU["versions"] | {"opencv-python-headless": version} for version in ("5.0.0", None)]
    environments = [CPU | {"versions": one} for one in versions]
    (line,) = table(one=record(outcome(0, 0.08, environments=[0, 1]), environments=environments))
    assert line["%"] == "8.00"


def test_a_run_counts_once():
    with pytest.raises(ValueError, match=r"seed 0 of resnet_cifar.* is in one\.json and in two\.json"):
        table(one=record(outcome(0, 0.08)), two=record(outcome(0, 0.08)))


def test_runs_say_in_which_of_the_environments_they_were():
    runs = [outcome(0, 0.08, environments=[0]), outcome(1, 0.09, environments=[1])]
    lines = table(depth=record(*runs, environments=[CPU, GPUS]))
    assert [(line["%"], line["devices"]) for line in lines] == [
        ("8.00", "cpu (2 threads)"),
        ("9.00", "2 x NVIDIA H100"),
    ]


def test_a_run_that_went_on_with_other_code_is_a_row_of_its_own():
    runs = [outcome(0, 0.08), outcome(1, 0.09, environments=[0, 1])]
    lines = table(depth=record(*runs, environments=[CPU, CPU | {"commit": "b" * 40}]))
    assert [line["%"] for line in lines] == ["8.00", "9.00"]


def test_a_row_tells_where_numbers_of_threads_differ():
    runs = [outcome(0, 0.08, environments=[0]), outcome(1, 0.09, environments=[1])]
    (line,) = table(depth=record(*runs, environments=[CPU, CPU | {"cpus": 1}]))
    assert (line["%"], line["devices"]) == ("8.50 ± 0.71", "several")


def test_runs_that_diverged_are_counted_and_left_out():
    first, second = table(
        depth=record(outcome(0, 0.08), diverged(1), diverged(0, depth=56), diverged(1, depth=56))
    )
    assert (first["%"], first["seeds"], first["difference"]) == ("8.00", "1 (1 diverged)", "-0.75")
    assert (second["%"], second["seeds"], second["difference"]) == ("", "0 (2 diverged)", "")


def test_an_error_of_the_papers_protocol_goes_first():
    metrics = {"test/error": 0.3, "test/ten_crop/error": 0.28}
    imagenet = {"name": "imagenet2012", "splits": {"train": "train", "test": "validation"}}
    (line,) = table(
        depth=record(
            outcome(0, 0, depth=18, metrics=metrics),
            model={"name": "resnet", "depth": 18, "plain": True, "shortcut": "A"},
            data=imagenet,
            evaluation={"protocol": "ten_crop"},
            num_steps=600_000,
            batch_size=256,
        )
    )
    assert (line["error"], line["%"], line["published %"]) == (
        "test, ten_crop",
        "28.00",
        "27.94 (He et al. 2015, table 2)",
    )


def test_an_error_of_the_test_set_goes_before_all_of_the_validation():
    metrics = {"validation/error": 0.1, "validation/ten_crop/error": 0.2, "test/error": 0.3}
    (line,) = table(
        depth=record(outcome(0, 0, metrics=metrics), evaluation={"every_steps": 1, "protocol": "ten_crop"})
    )
    assert (line["error"], line["%"]) == ("test", "30.00")
    del metrics["test/error"]
    (line,) = table(
        depth=record(outcome(0, 0, metrics=metrics), evaluation={"every_steps": 1, "protocol": "ten_crop"})
    )
    assert (line["error"], line["%"]) == ("validation, ten_crop", "20.00")


def test_every_key_of_a_published_figure_is_one_of_a_config():
    base = json.loads(depth_digits.get_config().base.to_json())
    keys = {key for one in ledger.PUBLISHED for key in one.where}
    keys -= {"model.variant", "model.batch_norm"}  # of other networks
    assert [key for key in keys if plan.lookup(base, key) is None] == []


def test_residual_nets_for_cifar_10_have_the_errors_of_table_6():
    for depth, error in {20: 8.75, 32: 7.51, 44: 7.17, 56: 6.97, 110: 6.61, 1202: 7.93}.items():
        model = {"name": "resnet_cifar", "depth": depth, "plain": False, "shortcut": "A"}
        assert ledger.counterpart({"model": model, "data": DATA}, "test/error").error == error
        assert ledger.counterpart({"model": model, "data": DATA}, "validation/error") is None


@pytest.mark.parametrize(
    ("plain", "shortcut", "errors"),
    [
        (True, "A", {18: 27.94, 34: 28.54}),
        (False, "A", {18: 27.88, 34: 25.03}),
        (False, "B", {34: 24.52, 50: 22.85, 101: 21.75, 152: 21.43}),
        (False, "C", {34: 24.19}),
    ],
)
def test_nets_for_imagenet_have_the_errors_of_tables_2_and_3(plain, shortcut, errors):
    for depth, error in errors.items():
        model = {"name": "resnet", "depth": depth, "plain": plain, "shortcut": shortcut}
        config = {"model": model, "data": {"name": "imagenet2012"}}
        # Papers report on ImageNet's validation images.
        for split in ("test", "validation"):
            assert ledger.counterpart(config, f"{split}/ten_crop/error").error == error


@pytest.mark.parametrize(
    ("model", "data", "batch_size", "metric", "error", "examples"),
    [
        ({"name": "resnet_preact_cifar", "depth": 164}, DATA, 128, "test", 5.46, 64_000 * 128),
        ({"name": "resnet_preact_cifar", "depth": 1001}, DATA, 128, "test", 4.92, 64_000 * 128),
        ({"name": "resnet_preact_cifar", "depth": 1001}, DATA, 64, "test", 4.62, 200 * 50_000),
        ({"name": "nin", "variant": "cifar"}, DATA, 128, "test", 8.81, 80_000 * 128),
        ({"name": "nin", "variant": "cifar"}, {"name": "cifar10"}, 128, "test", 10.41, 80_000 * 128),
        ({"name": "alexnet", "variant": "two_groups"}, {}, 128, "test/ten_crop", 40.7, 90 * 1_281_167),
        ({"name": "vgg", "variant": "D"}, {}, 256, "test/multi_scale_dense", 24.8, 74 * 1_281_167),
        ({"name": "vgg", "variant": "E"}, {}, 256, "test/multi_scale_dense", 24.8, 74 * 1_281_167),
    ],
)
def test_figures_from_memory_are_those_of_their_papers_and_say_so(
    model, data, batch_size, metric, error, examples
):
    config = {"model": model, "data": data or {"name": "imagenet2012"}, "batch_size": batch_size}
    found = ledger.counterpart(config, f"{metric}/error")
    assert (found.error, found.examples, found.recalled) == (error, examples, True)


@pytest.mark.parametrize("shortcut", ["A", "B"])  # of tables 2 and 3
def test_nets_for_imagenet_were_trained_for_600_000_steps(shortcut):
    model = {"name": "resnet", "depth": 34, "plain": False, "shortcut": shortcut}
    config = {"model": model, "data": {"name": "imagenet2012"}}
    assert ledger.counterpart(config, "test/ten_crop/error").examples == 600_000 * 256


def test_no_two_published_figures_are_of_the_same_runs():
    points = [(one.metric, *sorted(map(str, one.where.items()))) for one in ledger.PUBLISHED]
    assert len(set(points)) == len(points)


# Files.


@pytest.fixture
def results(tmp_path):
    directory = tmp_path / "results"
    directory.mkdir()
    (directory / "depth.json").write_text(json.dumps(record(outcome(0, 0.08), outcome(1, 0.09))))
    return directory


def test_documents_are_rewritten_between_the_markers_alone(results, tmp_path, capsys):
    (results / "shallow.json").write_text(json.dumps(record(outcome(0, 0.2, depth=8))))
    (tmp_path / "docs").mkdir()
    documents = [tmp_path / "README.md", tmp_path / "docs/results.md"]
    for document, beginning in zip(documents, ledger.BEGINNINGS, strict=True):
        document.write_text(f"Before.\n\n{beginning}\n\nOld.\n\n{ledger.END}\n\nAfter.\n")
    arguments = [f"--results={results}", "--write", "--documents", *map(str, documents)]
    ledger.main(arguments)
    texts = [document.read_text() for document in documents]
    assert "| date |" in texts[1]
    assert "| date |" not in texts[0]
    for text, beginning in zip(texts, ledger.BEGINNINGS, strict=True):
        assert text.startswith(f"Before.\n\n{beginning}\n\n| network |")
        assert text.endswith(f" |\n\n{ledger.END}\n\nAfter.\n")
        assert "Old." not in text
    assert "| [depth](results/depth.json) |" in texts[0]
    assert "shallow" not in texts[0], "no paper has a figure of it"
    assert "| [depth](../results/depth.json) |" in texts[1]
    assert "| [shallow](../results/shallow.json) |" in texts[1]
    ledger.main(arguments)
    assert [document.read_text() for document in documents] == texts
    assert capsys.readouterr().out == ""


def test_without_writing_the_table_is_printed_and_others_are_named(results, capsys):
    for name, value in {"pipeline": [1], "bottleneck": {"environment": {}, "networks": []}}.items():
        (results / f"{name}.json").write_text(json.dumps(value))
    ledger.main([f"--results={results}"])
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 3
    assert f"]({os.path.relpath(results)}/depth.json)" in printed.out
    assert printed.err == "left out, as no studies: bottleneck.json, pipeline.json\n"


def test_bad_input_is_one_message(results, tmp_path, capsys):
    beginning, other = ledger.BEGINNINGS
    texts = ["No markers.", beginning, f"{ledger.END} {beginning}", f"{beginning} {other} {ledger.END}"]
    good = tmp_path / "good.md"
    good.write_text(f"{beginning} {ledger.END}")
    document = tmp_path / "README.md"
    for text in (None, *texts):
        document.write_text(text or "")
        arguments, message = (
            [f"--results={tmp_path / 'nowhere'}"],
            "nowhere holds no records; name a directory",
        )
        if text:
            arguments = [f"--results={results}", "--write", "--documents", str(good), str(document)]
            message = "README.md must have one of these lines"
        with pytest.raises(SystemExit) as stop:
            ledger.main(arguments)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
        assert document.read_text() == (text or "")
        assert good.read_text() == f"{beginning} {ledger.END}"
    (results / "torn.json").write_text('{"config": ')
    with pytest.raises(ValueError, match=r"torn\.json is no JSON: .*; repair or remove it"):
        ledger.read_records(results)


def test_distorted_images_are_not_set_beside_the_paper_without_distortions():
    model = {"name": "lenet5_1998"}
    where = {"name": "mnist", "augment": dict.fromkeys(("shift", "scale", "shear", "squeeze", "elastic"), 0)}
    assert ledger.counterpart({"model": model, "data": where}, "test/error").error == 0.95
    where["augment"]["shear"] = 0.1
    assert ledger.counterpart({"model": model, "data": where}, "test/error") is None


def test_a_key_that_a_record_lacks_counts_as_zero():
    lenet = {"model": {"name": "lenet5_1998"}, "data": {"name": "mnist"}}
    assert ledger.counterpart(lenet, "test/error").error == 0.95, "without distortions"
    model = {"name": "resnet_cifar", "depth": 20, "plain": False, "shortcut": "A"}
    for augment in ({"flip": True, "pad": 4}, {"flip": True}, {"pad": 4}):
        found = ledger.counterpart({"model": model, "data": DATA | {"augment": augment}}, "test/error")
        assert (found is not None) == (len(augment) == 2)


def test_a_record_whose_grid_no_result_depends_on_is_told_so():
    one = record(outcome(0, 0.08))
    one["config"]["grid"] = [["log_every_steps", [5, 10]]]
    one["runs"] = [one["runs"][0] | {"log_every_steps": every} for every in (5, 10)]
    with pytest.raises(ValueError, match=r"^one\.json: seed 0 of resnet_cifar.* ran more than once"):
        table(one=one)


def test_a_link_to_a_record_holds_no_space():
    (line,) = ledger.table(ledger.collect({"my study.json": record(outcome(0, 0.08))}))[1:]
    assert line[-1] == "[my study](results/my%20study.json)"
