"""From the views of many images to the averaged prediction for each image, and to its scores.

Views may differ in shape. They are gathered by shape into batches of a fixed size, the last one of a shape
padded, so that a function is compiled once for a shape.
"""

import collections

import numpy as np

TOP_K = 5  # of the "top-5 error"


def average_views(examples, views, run, *, batch_size, ahead=0):
    """Averages what a network says over the views of each example.

    Args:
      examples: an iterable of (image, label).
      views: image -> a list of views, uint8 [h, w, C]; equally many for every image.
      run: uint8 [B, h, w, C] -> log-probabilities, float32 [..., K] with the B leading axes of any form; it
        may return before they are computed.
      batch_size: shape -> B, the views of that shape that `run` takes at once.
      ahead: how many calls of `run` may be under way before the host waits for the first of them.

    Returns:
      probabilities float64 [N, K], label int32 [N], in the order of the examples.

    Raises:
      ValueError: there are no examples.
    """
    labels, totals, counts = [], [], []  # of each example
    waiting = collections.defaultdict(list)  # shape -> (number of the example, view)
    under_way = collections.deque()  # (numbers of the examples, log-probabilities)

    def collect(at_most):
        while len(under_way) > at_most:
            numbers, answers = under_way.popleft()
            # In float64 the exponential of a float32 as low as -708 is still a number above zero.
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
        raise ValueError("there is no example to evaluate; data.splits names an empty part")
    for shape in list(waiting):
        start(shape)
    collect(0)
    assert set(counts) == {num_views}, "every example has all of its views"
    return np.stack(totals) / num_views, np.array(labels, np.int32)


def scores(probabilities, label):
    """{"loss", "error", "top_5_error"} of predictions, means over the examples.

    Args:
      probabilities: [N, K].
      label: int [N].

    Returns:
      "loss", the negative logarithm of the right class's probability; "error", the fraction of examples
      whose likeliest class is another; and where there are more than five classes "top_5_error", the fraction
      whose label is not among the five likeliest. Of equal probabilities the first class's counts as larger;
      one that is NaN as the least.
    """
    of_label = np.take_along_axis(probabilities, label[:, None], axis=1)
    before = np.arange(probabilities.shape[1]) < label[:, None]
    larger = (probabilities > of_label) | ((probabilities == of_label) & before) | np.isnan(of_label)
    rank = larger.sum(axis=1)
    # A probability that vanished would make the loss infinite.
    result = {"loss": -np.log(np.maximum(of_label, np.finfo(np.float64).tiny)).mean()}
    result["error"] = (rank > 0).mean()
    if probabilities.shape[1] > TOP_K:
        result["top_5_error"] = (rank >= TOP_K).mean()
    return {name: float(value) for name, value in result.items()}
