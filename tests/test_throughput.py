"""The peers are the same networks, and the table says what was measured."""

import pytest

from benchmarks import throughput


@pytest.mark.parametrize("name", throughput.CASES)
def test_a_peer_has_as_many_parameters_and_multiply_adds(name):
    pytest.importorskip("torch", reason="PyTorch is a requirement of the benchmarks alone")
    _, origin = throughput.peer(throughput.CASES[name])  # raises where it has not
    assert origin in ("torchvision", "benchmarks.peers")


def test_the_table_has_a_ratio_for_each_peer():
    def figures(rate, ratio):
        spread = {"median": rate, "lowest": rate - 1, "highest": rate + 1}
        return {"images_a_second": spread, "ratio": {"median": ratio, "lowest": ratio, "highest": ratio}}

    row = {
        "batch_size": 8,
        "image_shape": (32, 32, 3),
        "train": {"cnn_cases": figures(1000, 1), "torch": figures(500, 2)},
        "infer": {"cnn_cases": figures(3000, 1), "torch": figures(6000, 0.5)},
        "first_step_seconds": {"cnn_cases": 2.5, "torch": 0.1},
        "share_of_ceiling": 0.25,
    }
    head, line = throughput.cells({"ResNet-20": row})
    assert dict(zip(head[3:], line[3:], strict=False)) == {
        "training, images/s": "1,000 (999 to 1,001)",
        "beside torch": "0.50",  # of the inference, which has the same title
        "inference, images/s": "3,000 (2,999 to 3,001)",
        "first step, s": "2.5",
        "torch, s": "0.1",
        "share of ceiling": "25%",
    }
    assert line[:3] == ["ResNet-20", "8", "32x32"]
    assert line[4] == "2.00"
