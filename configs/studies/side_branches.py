"""GoogLeNet with and without its side branches, on Imagenette.

Paper: Szegedy et al. 2014, section 5, and Szegedy et al. 2015 ("Rethinking the Inception architecture for
computer vision"), section 4.
Command: make data DATASET=imagenette/320px-v2
         python -m cnn_cases.studies.sweep --config=configs/studies/side_branches.py \
             --workdir=runs/side_branches --jobs=2

The recipe is that of `googlenet_imagenette`, twice as long. With the same seed both nets start from the same
values, see the same crops and drop the same activations; only the gradient that the side branches send into
the trunk differs.
Result: mean validation errors of 59.27 % without and of 60.23 % with side branches, on 600 images, after ten
epochs of a subset of 2,000 training images. The difference of 0.97 points has a 95 % interval of 0.20 to
1.73; 8 to 10 minutes a run, two at a time, on two CPU cores that ran other jobs too, 2026-11-28
(results/side_branches_imagenette.json).
"""

from ml_collections import ConfigDict

from configs import googlenet_imagenette


def get_config():
    """The grid: without and with side branches."""
    config = ConfigDict()
    config.base = googlenet_imagenette.get_config()
    with config.base.unlocked():
        config.base.num_steps = 620
        config.base.evaluation.final_splits = ("train", "validation")
    config.grid = (("model.side_branches", (False, True)),)
    config.compare = "model.side_branches"
    config.seeds = (0, 1, 2, 3, 4)
    config.lock()
    return config
