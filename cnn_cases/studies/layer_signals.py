"""Measures the gradients and responses at each layer of plain nets and of their residual twins.

    python -m cnn_cases.studies.layer_signals --workdir=runs/depth_digits

examines the runs of a depth study (`cnn_cases.studies.depth_curves`) at their initial values and at every
checkpoint that was kept; it trains nothing. To keep more checkpoints, start the study with, say,
`--config.base.checkpoint.every_steps=50 --config.base.checkpoint.keep_last=4`. For each convolution except
the projections, from the input on:

    gradient     norm of the gradient of the loss with respect to the kernel, unscaled and without the weight
                 decay, as in the training step: on the batch that the run took next, with batch statistics
                 and augmentation; the mean over `--num_batches` such batches. For a frozen layer, the
                 gradient that it would have
    kernel       norm of the kernel. Batch normalisation cancels the kernel's scale, so the gradient of a
                 kernel that is twice as large is half as large, and turns it a quarter as far
    response     standard deviation of the output of its batch normalisation, "after BN and before other
                 nonlinearity (ReLU/addition)" (He et al. 2015, section 4.2 and figure 7), over images,
                 positions and channels together: training images in evaluation mode. The initial state has
                 none, since its running statistics have not seen an image

Files in <workdir>/layers/: record.json, table.md, and the figures gradients and responses, PNG and SVG.
"""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import traverse_util
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cnn_cases import command, saved_runs, tables
from cnn_cases.models.layers import BatchNorm
from cnn_cases.studies import depth_curves, figures, plan
from cnn_cases.studies.depth_curves import COLOURS, KINDS
from cnn_cases.training import checkpoint, devices, disk, programs, provenance, steps

NUM_BATCHES = 8

# A layer's convolution and the norm after it have the same number: stage2_block1/conv1, stage2_block1/norm1.
CONVOLUTION = re.compile(r"(stage\d+_block\d+/)?conv\d+/kernel")
NORM = re.compile(r"(stage\d+_block\d+/)?norm\d+/__call__")


def in_forward_order(tree, pattern):
    """The leaves of a tree of modules whose paths match `pattern`, as a list from the input on."""
    flat = traverse_util.flatten_dict(tree, sep="/")
    # conv1 is (1,), stage2_block3/conv1 is (2, 3, 1): the stem comes before the stages.
    paths = sorted(filter(pattern.fullmatch, flat), key=lambda path: [*map(int, re.findall(r"\d+", path))])
    return [flat[path] for path in paths]


def make_gradient_norms(apply, prepare, loss):
    """Makes a function that measures the kernels' gradients on one batch.

    Args:
      apply: `model.apply`.
      prepare: the feed's (arrays, batch, key) -> image, label.
      loss: logits [B, K], label -> [B].

    Returns:
      (state, arrays, batch) -> norms float32 [layers] of the gradient that the training step of
      `state.step` computes on this batch.
    """

    def gradient_norms(state, arrays, batch):
        augment_key, _ = steps.step_keys(state.seed, state.step)
        image, label = prepare(arrays, batch, augment_key)

        def mean_loss(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, _ = apply(variables, image, train=True, mutable=["batch_stats"])
            return loss(logits, label).mean()

        return kernel_norms(jax.grad(mean_loss)(state.params))

    return gradient_norms


def kernel_norms(params):
    """The norms of the convolutions' kernels, or of their gradients: float32 [layers]."""
    return jnp.stack([jnp.sqrt(jnp.square(kernel).sum()) for kernel in in_forward_order(params, CONVOLUTION)])


def make_response_sums(apply, prepare):
    """Makes a function that sums the responses of one evaluation batch.

    Returns:
      (state, arrays, batch) -> float32 [3, layers]: the number, the sum and the sum of squares of the values
      of each layer's response, over the images whose "mask" is 1.
    """

    def response_sums(state, arrays, batch):
        image, _ = prepare(arrays, batch, None)
        _, variables = apply(
            {"params": state.params, "batch_stats": state.batch_stats},
            image,
            train=False,
            mutable=["intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, BatchNorm),
        )
        sums = []
        for (y,) in in_forward_order(variables["intermediates"], NORM):
            y, mask = y.astype(jnp.float32), batch["mask"][:, None, None, None]
            sums.append(jnp.stack([(mask * jnp.ones_like(y)).sum(), (mask * y).sum(), (mask * y**2).sum()]))
        return jnp.stack(sums, axis=1)

    return response_sums


def deviations(sums):
    """Standard deviations float64 [layers] from the sums of `make_response_sums`, added up over batches."""
    count, total, squares = np.asarray(sums, np.float64)
    return np.sqrt(np.maximum(squares / count - (total / count) ** 2, 0))


def measure(workdir, num_batches=NUM_BATCHES, data_dir=""):
    """Measures the layers of all runs of a depth study.

    Args:
      workdir: the study's directory, with its runs in `runs/`.
      num_batches: number of training batches for the gradients, and of evaluation batches for the responses.
      data_dir: where TFDS keeps its data sets; "" for the config's.

    Returns:
      A dict that JSON can hold: {"date", "environment", "data" (name of the set), "num_batches",
      "gradient_batch_size", "response_images", "states": [{"depth", "plain", "seed", "step",
      "gradient_norms", "kernel_norms" and "response_stds", each [layers], the last None at step 0}]}.

    Raises:
      ValueError: there is no depth study or no run of it, its gradients cannot be compared, a checkpoint is
        damaged, or the training images are not those of the runs.
    """
    if num_batches < 1:
        raise ValueError(f"num_batches = {num_batches} must be 1 or more")
    study = saved_runs.load_study(workdir, data_dir)
    depth_curves.check(study)
    runs_dir = pathlib.Path(workdir) / "runs"
    runs = [run for run in plan.expand(study) if (runs_dir / run.name).exists()]
    if not runs:
        raise ValueError(f"workdir = {workdir} holds no runs of a study; start the study first")
    for run in runs:
        if "scan_blocks" in run.config.model and run.config.model.scan_blocks:
            raise ValueError(
                f"{run.name}: model.scan_blocks = True stacks the layers of a stage; "
                "a study with False is needed"
            )
    batch_sizes = {run.config.batch_size: run.name for run in runs}
    if len(batch_sizes) > 1:
        told = "; ".join(f"batch_size = {size} in {name}" for size, name in batch_sizes.items())
        raise ValueError(f"{workdir}: gradients can be compared at one batch size only; these differ: {told}")
    states = []
    for _, group in itertools.groupby(runs, lambda run: run.point):
        seeds = list(group)
        program = programs.make_program(seeds[0].config, jax.local_devices()[:1])
        measure_state = make_measurement(program, num_batches)  # the seeds share a compilation
        for run in seeds:
            run_dir, model = runs_dir / run.name, run.config.model
            saved_runs.check_data(run_dir, saved_runs.read_starts(run_dir), program.feed)
            for step, state in saved_states(program, run.config, run_dir):
                point = {"depth": model.depth, "plain": model.plain, "seed": run.config.seed, "step": step}
                states.append(point | measure_state(state))
    batches = itertools.islice(program.feed.eval_batches("train"), num_batches)
    return {
        **provenance.stamp(),
        "data": study.base.data.name,
        "num_batches": num_batches,
        "gradient_batch_size": runs[0].config.batch_size,
        "response_images": int(sum(batch["mask"].sum() for batch in batches)),
        "states": states,
    }


def saved_states(program, config, run_dir):
    """Yields (step, state) of a run: first its initial state, then those of its checkpoints."""
    initial = saved_runs.initial_state(run_dir, config, program)
    yield 0, initial
    for step in checkpoint.steps(run_dir / "checkpoints"):
        yield step, checkpoint.read(run_dir / "checkpoints", step, initial)


def make_measurement(program, num_batches):
    """Makes a function state -> {"gradient_norms", "kernel_norms", "response_stds"}; see `measure`.

    Args:
      program: a program for one device.
      num_batches: see `measure`.
    """
    feed, apply = program.feed, program.model.apply
    gradients = make_gradient_norms(apply, feed.prepare, program.loss)  # these nets have no side branches
    # Like an evaluation, both take a state and a batch and leave the state unchanged.
    gradients = devices.pmap_eval(gradients, program.devices)
    responses = devices.pmap_eval(make_response_sums(apply, feed.prepare), program.devices)

    def measure_state(state):
        state = devices.replicate(state, program.devices)
        step, norms, sums = int(state.step), [], []
        batches = feed.train_batches(int(state.seed), step)
        for number, batch in enumerate(itertools.islice(batches, num_batches)):
            at_step = state.replace(step=jnp.int32(step + number))
            norms.append(np.asarray(gradients(at_step, program.arrays, devices.shard(batch, 1))))
        for batch in itertools.islice(feed.eval_batches("train"), num_batches if step else 0):
            sums.append(np.asarray(responses(state, program.arrays, devices.shard(batch, 1)), np.float64))
        return {
            "gradient_norms": np.mean(norms, axis=0).tolist(),
            "kernel_norms": np.asarray(kernel_norms(state.params)).tolist(),
            "response_stds": deviations(sum(sums)).tolist() if step else None,
        }

    return measure_state


def pick(record, depth, plain, step, what):
    """[seeds, layers] of `what`, such as "gradient_norms"; a run without this checkpoint has no row."""
    point = {"depth": depth, "plain": plain, "step": step}
    return np.array([state[what] for state in record["states"] if point.items() <= state.items()])


def values_of(record, key):
    """The values of "depth" or "step" in ascending order."""
    return sorted({state[key] for state in record["states"]})


def last_step(record, depth, plain):
    """The last saved step of a net, 0 if none was saved."""
    point = {"depth": depth, "plain": plain}
    return max((s["step"] for s in record["states"] if point.items() <= s.items()), default=0)


def table(record, form):
    """A row for each net and step, as "text" or "markdown"; values are means over the seeds.

    Gradients and kernels have a column each for the first convolution, the largest value, and the last one.
    """
    titles = [f"{what}, {which}" for what in ("gradient", "kernel") for which in ("first", "largest", "last")]
    rows = [["depth", "net", "step", *titles, "response, mean"]]
    for depth, (plain, kind), step in itertools.product(
        values_of(record, "depth"), KINDS.items(), values_of(record, "step")
    ):
        norms = pick(record, depth, plain, step, "gradient_norms")
        if not len(norms):
            continue
        cells = [str(depth), kind, str(step)]
        for seeds in (norms, pick(record, depth, plain, step, "kernel_norms")):
            mean = seeds.mean(axis=0)
            cells += [f"{value:#.3g}".rstrip(".") for value in (mean[0], mean.max(), mean[-1])]
        responses = pick(record, depth, plain, step, "response_stds") if step else None
        rows.append([*cells, f"{responses.mean():.2f}" if step else ""])
    return tables.render(rows, form, words=(1,))


def _draw_layers(axis, seeds, **line):
    """Draws the mean over the seeds by layer, with a band from minimum to maximum. seeds: [seeds, layers]."""
    layers = np.arange(1, seeds.shape[1] + 1)
    (drawn,) = axis.plot(layers, seeds.mean(axis=0), **line)
    axis.fill_between(
        layers, seeds.min(axis=0), seeds.max(axis=0), color=drawn.get_color(), alpha=0.15, linewidth=0
    )


# Lines that cross or coincide differ in more than their colour.
DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 2)))


def draw_gradients(record):
    """Draws gradient and kernel norms by layer, plain left and residual right.

    First the gradient at the start, for every depth; then, for the deepest net at every saved step, the
    gradient and the kernel.
    """
    depths, all_steps = values_of(record, "depth"), values_of(record, "step")
    deepest = depths[-1]
    of_depths, of_steps = [(depth, 0) for depth in depths], [(deepest, step) for step in all_steps]
    rows = (
        ("gradient norm\nat the start", "gradient_norms", of_depths),
        (f"gradient norm,\n{deepest} layers", "gradient_norms", of_steps),
        (f"kernel norm,\n{deepest} layers", "kernel_norms", of_steps),
    )
    figure = Figure(figsize=(9.5, 8.5), layout="constrained")
    axes = figure.subplots(3, 2, sharey="row")
    for row, (title, what, lines) in zip(axes, rows, strict=True):
        at_start = lines is of_depths
        # Depths and steps have different colours.
        shades = figures.shades(len(lines), "viridis_r" if at_start else "magma_r")
        for axis, (plain, kind) in zip(row, KINDS.items(), strict=True):
            for number, (depth, step) in enumerate(lines):
                seeds = pick(record, depth, plain, step, what)
                label = f"{depth} layers" if at_start else f"step {step}"
                if len(seeds):
                    _draw_layers(
                        axis,
                        seeds,
                        label=label,
                        color=shades[number],
                        linestyle=DASHES[number % len(DASHES)],
                        linewidth=1.6,
                    )
            axis.set(yscale="log", xlabel="convolution, counted from the input", xlim=(1, deepest - 1))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            axis.set_title(f"{kind} nets" if at_start else f"{kind}-{deepest}", fontsize=11)
        row[0].set_ylabel(title)
        # Of both panels, since a study that is not finished may have a line in one of them alone.
        shown = {line.get_label(): line for axis in row for line in axis.lines}
        row[1].legend(
            shown.values(),
            shown,
            loc="center left",
            bbox_to_anchor=(1, 0.5),
            frameon=False,
            handlelength=3,
        )
    figure.suptitle(
        _caption(record, f"mean of {record['num_batches']} batches in training mode"), fontsize=10
    )
    return figure


def draw_responses(record):
    """Draws the responses at the last saved step: by layer left, sorted right (He et al. 2015, figure 7)."""
    depths = values_of(record, "depth")
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    original, ranked = figure.subplots(1, 2, sharey=True)
    # Deeper is darker and wider.
    looks = dict(zip(depths, np.linspace((0.35, 1), (1, 2.4), len(depths)), strict=True))
    for (plain, kind), depth in itertools.product(KINDS.items(), depths):
        step = last_step(record, depth, plain)
        if not step:
            continue
        seeds = pick(record, depth, plain, step, "response_stds")
        alpha, width = looks[depth]
        line = {"color": COLOURS[kind], "alpha": alpha, "linestyle": "--" if plain else "-"}
        line |= {"linewidth": width, "label": f"{kind}-{depth}"}
        line |= {"zorder": 3 - depth / max(depths)}  # a wide line would hide the thin ones
        _draw_layers(original, seeds, **line)
        _draw_layers(ranked, -np.sort(-seeds, axis=1), **line)
    original.set(ylabel="standard deviation of the response", xlabel="convolution, counted from the input")
    ranked.set(xlabel="convolution, from the largest response to the smallest")
    for axis in (original, ranked):
        axis.set_xlim(1, depths[-1] - 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figures.set_log_scale(axis)
        axis.grid(alpha=0.3)
    figure.legend(*original.get_legend_handles_labels(), loc="outside right center", frameon=False)
    steps_drawn = sorted({last_step(record, depth, plain) for depth in depths for plain in KINDS} - {0})
    how = f"after step {' or '.join(map(str, steps_drawn))}, {record['response_images']:,} training images"
    figure.suptitle(_caption(record, how), fontsize=10)
    return figure


def _caption(record, how):
    seeds = len({state["seed"] for state in record["states"]})
    over = f"; mean over {seeds} seeds, band: minimum to maximum" if seeds > 1 else ""
    return f"{record['data']}, {how}{over}"


def write_report(record, out):
    """Writes record.json, table.md and the figures (gradients, responses: .png and .svg) into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    disk.write_json(out / "record.json", record)
    disk.write_text(out / "table.md", table(record, "markdown"))
    drawn = {"gradients": draw_gradients(record)}
    if values_of(record, "step") != [0]:
        drawn["responses"] = draw_responses(record)
    for name, figure in drawn.items():
        figures.save(figure, out / name)


def main():
    """Measures the layers, prints the table and draws the figures."""
    workdir = pathlib.Path(flags.FLAGS.workdir)
    record = measure(workdir, flags.FLAGS.num_batches, flags.FLAGS.data_dir)
    write_report(record, workdir / "layers")
    print(table(record, "text"))
    print(f"record, table and figures: {workdir / 'layers'}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The directory of a depth study.", required=True)
    flags.DEFINE_integer("num_batches", NUM_BATCHES, "Batches to measure on.")
    saved_runs.define_data_dir()
    command.run(main)
