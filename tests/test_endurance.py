"""The growth of a run's memory is that of its process and its workers, over the steps after the warm-up."""

from types import SimpleNamespace

import pytest

from benchmarks import endurance


def test_growth_is_per_thousand_steps_after_the_warm_up():
    samples = [(step, 100 + step / 1000, 5, 3) for step in range(200, 1000, 100)]
    found = endurance.summary([(0, 0.0, 0, 0), *samples, (1000, 0.0, 0, 0)], 1000)
    assert found == {
        "mebibytes": {"first": 100.2, "last": 100.9, "largest": 100.9, "per_1000_steps": 1.0},
        "files": {"first": 5, "last": 5, "largest": 5, "per_1000_steps": 0},
        "threads": {"first": 3, "last": 3, "largest": 3, "per_1000_steps": 0},
    }


@pytest.mark.parametrize(("files_a_step", "code"), [(0.1, "growing: files with the feed resident"), (0, 0)])
def test_files_that_become_more_are_an_error(files_a_step, code, monkeypatch):
    samples = [(step, 100.0, 5 + files_a_step * step, 3) for step in range(0, 1000, 100)]
    monkeypatch.setattr(endurance, "measure", lambda *_: samples)
    monkeypatch.setattr(endurance, "FEEDS", {"resident": {}})
    monkeypatch.setattr("sys.argv", ["endurance", "--steps=1000"])
    with pytest.raises(SystemExit) as leaving:
        endurance.main()
    assert leaving.value.code == code


def test_a_run_that_is_over_too_soon_for_a_slope_is_told():
    with pytest.raises(ValueError, match="steps = 20 are over too soon for samples"):
        endurance.summary([(0, 1.0, 1, 1), (10, 1.0, 1, 1), (20, 1.0, 1, 1)], 20)


def test_sizes_are_in_mebibytes_and_of_all_processes():
    def process(rss, files, threads):
        return SimpleNamespace(
            memory_info=lambda: SimpleNamespace(rss=rss), num_fds=lambda: files, num_threads=lambda: threads
        )

    assert endurance._sizes([process(3 * 2**20, 7, 2), process(2**19, 5, 1)]) == (3.5, 12, 3)
