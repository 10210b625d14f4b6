import numpy as np

from cnn_cases.data import order


def test_epochs_and_seeds_do_not_stand_in_for_each_other():
    second_epoch_of_0 = order.examples_at(0, np.arange(50, 100), 50)
    first_epoch_of_1 = order.examples_at(1, np.arange(50), 50)
    assert not np.array_equal(second_epoch_of_0, first_epoch_of_1)
    np.testing.assert_array_equal(np.sort(second_epoch_of_0), np.sort(first_epoch_of_1))


def test_places_are_exact_in_long_runs():
    places = order.places_in_order(2**31, 128, np.arange(128, dtype=np.int32))
    assert places.tolist() == list(range(2**38, 2**38 + 128))
