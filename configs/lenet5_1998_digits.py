"""The LeNet-5 of 1998 on scikit-learn's digits, enlarged to 28x28 pixels and padded to 32x32.

Paper: LeCun et al. 1998, section II and appendix C. Kept of its recipe: plain gradient descent with falling
step sizes, the MAP loss (equation 9), and the range of the input. Departures: batches of 16, where the paper
takes one example at a time; no second-order scaling of the step sizes, which are ours. The paper does not
give the constant j of its loss; here it is 1.
Command: python train.py --config=configs/lenet5_1998_digits.py --workdir=runs/lenet5_1998_digits
Result: 2.5, 3.1 and 3.1 % test error with seeds 0, 1 and 2, in 6, 3 and 3 s on two CPU cores, 2026-11-27
(results/digits/lenet5_1998_digits.json).
"""

from configs import common


def get_config():
    """The LeNet-5 of 1998 on digits."""
    config = common.get_config()
    config.num_steps = 1_600
    config.batch_size = 16
    config.model.name = "lenet5_1998"
    config.data.image_size = 28
    config.data.border = 2
    config.data.normalization = "lenet5_1998"
    config.loss.name = "rbf_map"
    config.optimizer.learning_rate = 0.005
    config.optimizer.momentum = 0.0
    config.optimizer.weight_decay = 0.0
    config.schedule.boundaries = (0.1, 0.25, 0.4, 0.6)
    config.schedule.factors = (0.4, 0.5, 0.5, 0.2)
    config.evaluation.every_steps = 400
    config.checkpoint.every_steps = 400
    config.lock()
    return config
