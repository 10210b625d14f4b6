"""Any training config in float32 and in bfloat16, in pairs; the name of its file follows the colon.

Command: python -m cnn_cases.studies.sweep --config=configs/studies/dtypes.py:resnet_digits \
             --workdir=runs/dtypes_resnet_digits --jobs=2

In bfloat16 the layers compute with eight significant bits; parameters, their updates, batch statistics and
losses stay in float32.
Result: on digits, over five seeds, the 95 % interval of the difference in test error contains zero for each
of nine networks (two CPU cores, 2026-12-01). After 1,000 steps on CIFAR-10, ResNet-20's contains zero, too,
but three seeds could show only a difference of 8 points (two CPU cores that ran other jobs too, 2026-11-29).
docs/devices.md has the table (results/dtypes).
"""

from configs.studies import seeds


def get_config(which="resnet_digits"):
    """The grid: both dtypes, with five seeds.

    Args:
      which: as for `seeds.get_config`.
    """
    config = seeds.get_config(which)
    with config.unlocked():
        config.grid = (("dtype", ("float32", "bfloat16")),)
        config.compare = "dtype"
        config.seeds = (0, 1, 2, 3, 4)
    return config
