"""Averages the predictions for the views of each image, and scores the results.

Views may differ in shape. They are grouped by shape into batches of a fixed size, and the last batch of each
shape is padded, so that a function is compiled once per shape.
"""

import collections

import numpy as np

TOP_K = 5  # of the "top-5 error"


def average_views(examples, views, run, *, batch_size, ahead=0):
    """Averages a network's predictions over the views of each example.

    Args:
      examples: an iterable of (image, label).
      views: image -> a list of views, uint8 [h, w, C]; the same number for every image.
      run: uint8 [B, h, w, C] -> log-probabilities, float32 [..., K], whose leading axes hold the B views; it
        may return before they are computed.
      batch_size: shape -> B, the number of views of that shape that `run` takes at once.
      ahead: how many calls of `run` may be in flight before the host waits for the oldest.

    Returns:
      probabilities float64 [N, K], label int32 [N], in the order of the examples; [0, 0] and [0] without any,
      as in one of several processes that share a small split.
    """
    labels, totals, counts = [], [], []  # per example
    waiting = collections.defaultdict(list)  # shape -> (example number, view)
    under_way = collections.deque()  # (example numbers, log-probabilities)

    def collect(at_most):
        while len(under_way) > at_most:
            numbers, answers = under_way.popleft()
            # In float64, the exponential of a log-probability as low as -708 is still above zero.
            answers = np.asarray(answers, np.float64)
            answers = np.exp(answers.reshape(-1, answers.shape[-1]))
            for number, answer in zip(numbers, answers, strict=False):  # the padding comes last
                totals[number] = totals[number] + answer
                counts[number] += 1

    def start(shape):
        numbers, images = zip(*waiting.pop(shape), strict=True)
        batch = np.zeros((batch_size(shape), *shape), np.uint8)
        batch[: len(images)] = images
        under_way.append((numbers, run(batch)))
        collect(ahead)

    num_views = 0
    for number, (image, label) in enumerate(examples):
        labels.append(label)
        totals.append(0)
        counts.append(0)
        of_image = views(image)
        num_views = len(of_image)
        for view in of_image:
            waiting[view.shape].append((number, view))
            if len(waiting[view.shape]) == batch_size(view.shape):
                start(view.shape)
    if not labels:
        return np.zeros((0, 0)), np.zeros(0, np.int32)
    for shape in list(waiting):
        start(shape)
    collect(0)
    assert set(counts) == {num_views}, "every example has all of its views"
    return np.stack(totals) / num_views, np.array(labels, np.int32)


def scores(probabilities, label):
    """Returns {"loss", "error", "top_5_error"} of predictions, as means over the examples.

    Args:
      probabilities: [N, K].
      label: int [N].

    Returns:
      "loss", the negative logarithm of the correct class's probability; "error", the fraction of examples
      whose most likely class is not the label; and, with more than five classes, "top_5_error", the fraction
      whose label is not among the five most likely classes. Of equal probabilities, the first class's counts
      as larger; NaN counts as the smallest.
    """
    of_label = np.take_along_axis(probabilities, label[:, None], axis=1)
    before = np.arange(probabilities.shape[1]) < label[:, None]
    larger = (probabilities > of_label) | ((probabilities == of_label) & before) | np.isnan(of_label)
    rank = larger.sum(axis=1)
    # A probability of zero would make the loss infinite. Not -mean, which is -0.0 if all are certain.
    result = {"loss": 0 - np.log(np.maximum(of_label, np.finfo(np.float64).tiny)).mean()}
    result["error"] = (rank > 0).mean()
    if probabilities.shape[1] > TOP_K:
        result["top_5_error"] = (rank >= TOP_K).mean()
    return {name: float(value) for name, value in result.items()}
