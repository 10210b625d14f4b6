import pytest

from cnn_cases.data import sources, splits
from tests.data import photos  # registers the builder


@pytest.fixture(scope="session")
def photos_dir(tmp_path_factory):
    """A TFDS directory with the pictures of `photos` in it."""
    directory = str(tmp_path_factory.mktemp("photos"))
    sources.prepare(photos.TinyPhotos.name, directory)
    return directory


@pytest.fixture
def prepared(tmp_path):
    """A directory of its own with the digits, read once."""
    splits.load_split("digits", "train", str(tmp_path))
    splits.load_split.cache_clear()
    return tmp_path
