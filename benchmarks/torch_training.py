"""Training runs in plain PyTorch, written as its users would; started by `benchmarks.end_to_end`.

python -m benchmarks.torch_training SETTINGS.json, a dict:

  data: an .npz of train_image, uint8 [N, H, W, C], and train_label, int [N], and of the same for each split.
  batch_size, rates: number of examples, and learning rate of each step.
  momentum, weight_decay: of SGD.
  splits, every_steps: the splits to evaluate during training, and how often.
  final_splits, eval_batch_size: the splits to evaluate at the end; the batch size of evaluations.
  networks: [the name of a function of `benchmarks.peers`, its arguments, seed], one training run each.
  compiled: whether the step goes through torch.compile.

Prints {"platform": "cpu" or "gpu", split: [error of each network]} as JSON.
"""

import json
import sys

import numpy as np
import torch
from torch.nn import functional

from benchmarks import peers


def main(path):
    """Trains one network after another in this process."""
    with open(path) as file:
        settings = json.load(file)
    with np.load(settings["data"]) as arrays:
        splits = {
            split: (arrays[f"{split}_image"], arrays[f"{split}_label"])
            for split in {"train", *settings["splits"], *settings["final_splits"]}
        }
    # The mean and the standard deviation of each channel of the training images.
    image = splits["train"][0] / np.float32(255)
    mean, std = image.mean((0, 1, 2)), image.std((0, 1, 2))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = {}
    for split, (image, label) in splits.items():
        pixels = np.moveaxis((image / np.float32(255) - mean) / std, -1, 1)
        tensors[split] = (
            torch.tensor(pixels, dtype=torch.float32)
            .to(device)
            .contiguous(memory_format=torch.channels_last),
            torch.tensor(label, dtype=torch.long).to(device),
        )
    errors = {split: [] for split in settings["final_splits"]}
    for name, arguments, seed in settings["networks"]:
        torch.manual_seed(seed)
        network = getattr(peers, name)(**arguments).to(device, memory_format=torch.channels_last)
        train(network, tensors, settings)
        for split, found in errors.items():
            found.append(evaluate(network, *tensors[split], settings["eval_batch_size"]))
    print(json.dumps({"platform": "gpu" if device == "cuda" else "cpu"} | errors))


def train(network, tensors, settings):
    """Trains one network."""
    image, label = tensors["train"]
    sgd = torch.optim.SGD(
        network.parameters(),
        lr=settings["rates"][0],
        momentum=settings["momentum"],
        weight_decay=settings["weight_decay"],
        fused=True,  # PyTorch's fastest implementation
    )

    def loss_of(image, label):
        return functional.cross_entropy(network(image), label)

    if settings["compiled"]:
        loss_of = torch.compile(loss_of)
    network.train()
    order, size = torch.empty(0, dtype=torch.long), settings["batch_size"]
    for step, rate in enumerate(settings["rates"], start=1):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(len(label))])
        chosen, order = order[:size].to(image.device), order[size:]
        for group in sgd.param_groups:
            group["lr"] = rate
        sgd.zero_grad(set_to_none=True)
        loss_of(image[chosen], label[chosen]).backward()
        sgd.step()
        last = step == len(settings["rates"])  # its evaluation follows
        if settings["every_steps"] and step % settings["every_steps"] == 0 and not last:
            for split in settings["splits"]:
                evaluate(network, *tensors[split], settings["eval_batch_size"])


@torch.inference_mode()
def evaluate(network, image, label, batch_size):
    """The fraction of the images that the network classifies wrongly."""
    network.eval()
    parts = zip(image.split(batch_size), label.split(batch_size), strict=True)
    wrong = sum((network(some).argmax(1) != theirs).sum().item() for some, theirs in parts)
    network.train()
    return wrong / len(label)


if __name__ == "__main__":
    main(sys.argv[1])
