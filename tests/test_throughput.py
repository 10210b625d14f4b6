"""The peers are the same networks, and the table says what was measured."""

import pytest

from benchmarks import throughput


@pytest.mark.parametrize("name", throughput.CASES)
def test_a_peer_has_as_many_parameters_and_multiply_adds(name):
    pytest.importorskip("torch", reason="PyTorch is a requirement of the benchmarks alone")
    make_network, origin = throughput.peer(throughput.CASES[name])  # raises where it has not
    assert origin in ("torchvision", "benchmarks.peers")
    # Weights are drawn: memory as it comes may hold denormal numbers, with which a CPU takes far longer.
    assert all(0.001 < weight.std() < 1 for weight in make_network().parameters() if weight.ndim > 1)


def test_the_tables_have_a_ratio_and_the_costs_of_each_peer():
    def figures(rate, ratio):
        spread = {"median": rate, "lowest": rate - 1, "highest": rate + 1}
        return {"images_a_second": spread, "ratio": {"median": ratio, "lowest": ratio, "highest": ratio}}

    row = {
        "batch_size": 8,
        "image_shape": (32, 32, 3),
        "train": {"cnn_cases": figures(1000, 1), "torch": figures(500, 2)},
        "infer": {"cnn_cases": figures(30.5, 1), "torch": figures(6000, 0.5)},
        "first_step_seconds": {"cnn_cases": 2.5, "torch": 0.1},
        "peak_bytes": {"cnn_cases": 2_000_000_000, "torch": 3_000_000},
        "flops_a_second": 12.3e9,
        "share_of_ceiling": 0.25,
        "share_of_bound": 0.5,
    }
    assert throughput.cells({"ResNet-20": row}) == [
        [
            "network",
            "batch",
            "pixels",
            "training, images/s",
            "by torch's",
            "inference, images/s",
            "by torch's",
        ],
        ["ResNet-20", "8", "32x32", "1,000 (999 to 1,001)", "2.00", "30.5 (29.5 to 31.5)", "0.50"],
    ]
    head, line = throughput.cost_cells({"ResNet-20": row})
    assert dict(zip(head, line, strict=True)) == {
        "network": "ResNet-20",
        "first step, s: cnn_cases": "2.5",
        "first step, s: torch": "0.1",
        "memory, MB: cnn_cases": "2,000",
        "memory, MB: torch": "3",
        "GFLOP/s": "12.3",
        "share of ceiling": "25%",
        "share of bound": "50%",
    }
