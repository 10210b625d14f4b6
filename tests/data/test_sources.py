import importlib.util
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download.util import DownloadError

from cnn_cases.data import prepare, sources, splits


def test_an_unknown_set_is_refused():
    with pytest.raises(
        ValueError,
        match=r"'cifr10' is not a TFDS data set, and none .* in data.data_dir = '/.* known: digits",
    ):
        splits.load_split("cifr10", "train")


def test_a_tilde_is_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", "~/default")  # $TFDS_DATA_DIR
    for data_dir, place in (("~/sets", "sets"), ("", "default")):
        builder = sources.make_builder("digits", data_dir)
        assert pathlib.Path(builder.data_path).is_relative_to(tmp_path / place)


@pytest.mark.parametrize("given", [True, False])
def test_a_bucket_is_no_directory(given, monkeypatch):
    if not given:
        monkeypatch.setattr(tfds.core.constants, "DATA_DIR", "gs://bucket/tfds")  # $TFDS_DATA_DIR
    with pytest.raises(
        ValueError, match=r"data.data_dir = 'gs://bucket/tfds' must be a directory; mount the bucket first"
    ):
        splits.load_split("digits", "train", "gs://bucket/tfds" if given else "")


def test_a_set_that_is_not_prepared_is_refused_without_a_try_at_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", pytest.fail)
    with pytest.raises(ValueError, match="not prepared") as error:
        splits.load_split("mnist", "train", str(tmp_path))
    assert f"{tmp_path}/mnist" in str(error.value)
    assert f"`make data DATASET=mnist DATA_DIR={tmp_path}`" in str(error.value)


@pytest.mark.parametrize("name", ["digits", "digits:1.0.0"])
def test_the_digits_are_prepared_on_first_use(name, tmp_path):
    images, _, _ = splits.load_split(name, "test", str(tmp_path))
    assert len(images) == 355
    assert (tmp_path / "digits" / "1.0.0" / "dataset_info.json").exists()


def test_the_name_of_a_directory_is_no_pattern(tmp_path, monkeypatch):
    directory = str(tmp_path / "sets [1]")
    sources.prepare("digits", directory)
    monkeypatch.setattr(sources, "BUNDLED", ())  # which are prepared on first use
    assert len(splits.load_split("digits", "test", directory)[0]) == 355


def test_preparing_and_reading_load_no_tensorflow(tmp_path):
    code = (
        "import sys\n"
        "from cnn_cases.data import sources, splits\n"
        f"sources.prepare('digits', {str(tmp_path)!r})\n"
        f"images, _, _ = splits.load_split('digits', 'train', {str(tmp_path)!r})\n"
        "print(len(images), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-2:] == ["1257", "False"]


def test_the_preparation_command_says_where_the_set_lies(tmp_path, capsys):
    prepare.main(["digits", f"--data_dir={tmp_path}"])
    prepare.main(["digits", f"--data_dir={tmp_path}"])  # a second time it finds the set prepared
    assert capsys.readouterr().out.count(f"digits is prepared in {tmp_path}") == 2


def test_preparing_needs_nothing_but_its_own_requirements():
    """`make data` installs requirements-data.txt alone."""
    missing = ("cv2", "simplejpeg", "grain", "jax", "flax", "optax", "orbax", "ml_collections", "sklearn")
    code = f"import sys; sys.modules.update(dict.fromkeys({missing})); import cnn_cases.data.prepare"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_preparation_command_ends_with_one_message(capsys):
    with pytest.raises(SystemExit) as end:
        prepare.main(["cifr10"])
    assert end.value.code == 2
    assert re.match(r"error: .*'cifr10' is not a TFDS data set", capsys.readouterr().err)


@pytest.fixture
def tensorflow(monkeypatch):
    """Makes it seem installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "tensorflow" or find_spec(name, *rest)
    )


@pytest.mark.usefixtures("tensorflow")
@pytest.mark.parametrize(
    ("raised", "becomes", "message"),
    [
        (ConnectionError("no route to host"), ConnectionError, "'mnist' could not be prepared in .*no route"),
        (OSError("disk full"), ConnectionError, "'mnist' could not be prepared in .*disk full"),
        (
            RuntimeError("write() failed: No space left on device"),  # array_record's
            ConnectionError,
            "'mnist' could not be prepared in .*No space left",
        ),
        (DownloadError("404"), ConnectionError, "'mnist' could not be prepared in .*DownloadError: 404"),
        (
            AssertionError("Manual directory x"),
            ValueError,
            "'mnist' cannot be prepared in .*Manual directory x",
        ),
        (
            ImportError("Please install scipy"),
            ValueError,
            "'mnist' cannot be prepared in .*Please install scipy",
        ),
    ],
)
def test_a_failed_preparation_names_the_set_and_the_directory(
    raised, becomes, message, tmp_path, monkeypatch
):
    def fail(_):
        raise raised

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(becomes, match=message) as error:
        sources.prepare("mnist", str(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_a_set_that_another_process_prepares_meanwhile_will_do(tmp_path, monkeypatch):
    prepare_it = tfds.core.DatasetBuilder.download_and_prepare

    def come_second(builder):
        prepare_it(builder)
        raise OSError("Directory not empty")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", come_second)
    assert sources.is_prepared(sources.prepare("digits", str(tmp_path)))


def test_a_missing_tensorflow_is_told_before_anything_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", pytest.fail)
    with pytest.raises(ValueError, match=r"make data DATASET=mnist.*pip install tensorflow-cpu"):
        sources.prepare("mnist", str(tmp_path))


def test_an_interrupted_preparation_has_a_message_and_an_exit_code(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "prepare", interrupt)
    with pytest.raises(SystemExit) as stop:
        prepare.main(["mnist"])
    assert stop.value.code == 130
    assert "mnist is not prepared; the same command goes on with it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/etc/x",
        "digits/..",
        "digits/../x",
        "huggingface:mnist",
        "name_space:set",
        "digits/data_dir=x",
        "",
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_before_tfds_sees_it(name, monkeypatch):
    monkeypatch.setattr(tfds, "builder", pytest.fail)
    with pytest.raises(
        ValueError, match=rf"data.name = '{re.escape(name)}' is not a name of a TFDS data set"
    ):
        splits.load_split(name, "train")


@pytest.fixture
def strange(prepared):
    """A prepared set of a stranger's: the digits under a name that no code knows. Their directory."""
    directory = prepared / "strange" / "1.0.0"
    shutil.copytree(prepared / "digits" / "1.0.0", directory)
    shutil.rmtree(directory / "decoded")
    for file in directory.glob("digits-*"):
        file.rename(file.with_name(file.name.replace("digits-", "strange-")))
    info = json.loads((directory / "dataset_info.json").read_text())
    (directory / "dataset_info.json").write_text(json.dumps(info | {"name": "strange"}))
    return directory


def test_a_set_without_code_of_its_own_can_be_read(strange, prepared):
    images, _, _ = splits.load_split("strange", "test", str(prepared))
    assert len(images) == 355
    assert (strange / "decoded").exists()


def test_no_module_is_imported_that_a_set_names(strange, prepared, monkeypatch):
    (prepared / "stranger.py").write_text("raise SystemExit('the module was imported')")
    monkeypatch.syspath_prepend(str(prepared))
    features = strange / "features.json"
    ours = "tensorflow_datasets.core.features.class_label_feature"
    assert ours in features.read_text()
    features.write_text(features.read_text().replace(ours, "stranger"))
    with pytest.raises(ValueError, match=r"data\.name = 'strange' .* names the class stranger.ClassLabel"):
        splits.load_split("strange", "test", str(prepared))


def test_no_split_of_a_set_leads_out_of_its_directory(strange, prepared):
    info = json.loads((strange / "dataset_info.json").read_text())
    info["splits"][0]["name"] = "../../x"
    (strange / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"has a split named '\.\./\.\./x', which is not a word"):
        splits.load_split("strange", "all", str(prepared))


def test_what_was_computed_of_a_set_is_kept_with_it(prepared):
    def compute():
        return {"matrix": np.eye(3), "mean": np.arange(2.0)}

    first = sources.computed_once("digits", str(prepared), "statistics", compute)
    again = sources.computed_once("digits", str(prepared), "statistics", pytest.fail)
    assert first.keys() == again.keys() == {"matrix", "mean"}
    np.testing.assert_array_equal(again["matrix"], np.eye(3))
    (copy,) = prepared.rglob("statistics.npz")
    whole = copy.read_bytes()
    flag = whole.index(b"PK\1\2") + 8  # which says that the file is encrypted
    encrypted = whole[:flag] + b"\1" + whole[flag + 1 :]
    for damage in (whole[:100], b"", whole[:60] + b"damage" + whole[66:], encrypted):
        copy.write_bytes(damage)
        mended = sources.computed_once("digits", str(prepared), "statistics", compute)
        np.testing.assert_array_equal(mended["matrix"], np.eye(3))
        assert copy.read_bytes() == whole
