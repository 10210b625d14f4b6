"""Runs a sweep: every point of a grid of config keys with every seed, each a run that can be resumed.

    python -m cnn_cases.studies.sweep --config=configs/studies/seeds.py:lenet5_mnist --workdir=runs/seeds

prints a table of the final metrics and writes it (table.md), with the curves (curves.png, curves.svg and the
page curves.html) and all results of the runs (record.json); and, if the study asks for them, a comparison in
pairs (comparison.md, difference.png) and the final errors against a number of the grid (final_errors.png).
When started again, it skips finished runs and resumes unfinished ones.
"""

import functools
import itertools
import pathlib

import jax
from absl import flags
from ml_collections import config_flags

from cnn_cases import command, settings, tables
from cnn_cases.studies import cluster as clusters
from cnn_cases.studies import comparison, figures, final_errors, jobs, plan, records, report
from cnn_cases.training import checkpoint, disk, logbook, processes, programs


def run_all(study, workdir, num_jobs=1, cluster=None):
    """Runs what is not finished yet, and reports each run as it ends.

    A run that diverges is marked and the sweep continues.

    Args:
      study: see `plan`.
      workdir: the study's directory; the runs are in its `runs/`.
      num_jobs: how many points of the grid, or runs if there are fewer points, to run side by side, each in a
        separate process.
      cluster: a `clusters.Cluster` to which the runs are submitted as jobs; None runs them on this machine.

    Raises:
      ValueError: the study or a run of it is invalid, or the workdir is in use or belongs to another study.
      ChildProcessError: a process of the sweep died, or jobs of the cluster failed.
      InterruptedRun: SIGTERM, SIGINT or SIGUSR2 arrived, and the current runs were saved or continue as jobs
        of the cluster.
    """
    if num_jobs < 1:
        raise ValueError(f"jobs = {num_jobs} must be 1 or more")
    if cluster:
        if num_jobs > 1:
            raise ValueError(f"jobs = {num_jobs}: on a cluster each run is a job; leave --jobs out")
        clusters.check(cluster, workdir)
    workdir = pathlib.Path(workdir)
    checkpoint.check_path(workdir)
    if cluster and cluster.name == "slurm":
        # This process only checks the runs, and the jobs may need the GPUs of this machine.
        jax.config.update("jax_platforms", "cpu")
    elif cluster or num_jobs > 1:
        jobs.share_accelerators()
    runs = plan.expand(study)
    groups = [list(group) for _, group in itertools.groupby(runs, lambda run: run.point)]
    if num_jobs > len(groups):
        groups = [[run] for run in runs]  # seeds share a compilation, but not every job would have a group
    num_jobs = min(num_jobs, len(groups))
    if not _was_checked(study, workdir):
        local = jobs.own_devices(0, num_jobs) if num_jobs > 1 else None
        # Checked now, not after hours of other runs; the seeds are the same for all groups.
        for run in (*groups[0], *(group[0] for group in groups[1:])):
            if not (workdir / "runs" / run.name / "config.json").exists():
                programs.check(run.config, local)
    with disk.lock(workdir):  # two starts at once would both submit the same jobs
        own = logbook.check_owner if _has_more(workdir, runs) else logbook.claim
        own(workdir, study.to_dict(), functools.partial(_is_part, study))
        run_dirs = workdir / "runs"
        if cluster:
            ended = clusters.run_on_cluster(runs, workdir, cluster)
        elif num_jobs == 1:
            ended = jobs.run_here(groups, run_dirs)
        else:
            ended = jobs.run_side_by_side(groups, run_dirs, num_jobs)
        for number, (name, news) in enumerate(ended, start=1):
            processes.tell(f"[{number}/{len(runs)}] {name}: {news}")


def _was_checked(study, workdir):
    """Whether an earlier start had exactly this study: config.json is written once all runs are checked."""
    path = workdir / "config.json"
    if not path.exists():
        return False
    return settings.from_json(disk.read_json(path, dict, logbook.PUT_BACK)) == study.to_dict()


def _has_more(workdir, runs):
    """Whether the study in `workdir` has these runs and others: a part of it is asked for."""
    path = workdir / "config.json"
    try:
        known = plan.expand_saved(disk.read_json(path, dict, logbook.PUT_BACK)) if path.exists() else []
    except ValueError:  # which `logbook.claim` explains
        return False
    return {run.name for run in runs} < {run.name for run in known}


def _is_part(study, known):
    """Whether a study has all runs of `known`, a study as read from JSON, or is a part of it.

    So a study can grow by seeds, depths or other values of its grid, and a part of it can be drawn.
    """
    try:
        known = plan.expand_saved(known)
    except ValueError:
        return False
    ours, theirs = ({run.name: run.config.to_dict() for run in runs} for runs in (plan.expand(study), known))
    return (ours.keys() <= theirs.keys() or ours.keys() >= theirs.keys()) and not any(
        logbook.differences(theirs[name], settings.completed(ours[name]), aside=logbook.OF_THE_MACHINE)
        for name in ours.keys() & theirs.keys()
    )


def make_record(study, workdir):
    """The results of the runs, as a dict that JSON can hold.

    Args:
      study: see `plan`.
      workdir: the study's directory.

    Returns:
      See `records`.

    Raises:
      ValueError: a run is not finished, or the run or the workdir belongs to another config.
    """
    workdir = pathlib.Path(workdir)
    logbook.check_owner(workdir, study.to_dict(), functools.partial(_is_part, study))
    config = study.to_dict()
    config["base"]["data"]["data_dir"] = ""  # the location of the data is not part of the experiment
    outcomes, environments = [], []
    for run in plan.expand(study):
        run_dir = workdir / "runs" / run.name
        result = logbook.read_result(run_dir)
        if not result:
            raise ValueError(f"{run_dir} is not finished; start the study again, without --figures_only")
        logbook.check_owner(run_dir, run.config.to_dict())
        starts = logbook.read_environments(run_dir)
        if not starts:
            raise ValueError(f"{run_dir} has no environment.json, which identifies its code; put it back")
        for start in starts:
            if start not in environments:
                environments.append(start)
        numbers = sorted({environments.index(start) for start in starts})
        result.pop("examples", None)  # a diverged run has one for each example of a batch
        curves = {}
        for row in logbook.read_rows(run_dir / "metrics.jsonl"):
            for name, value in row.items():
                if name.endswith(("/error", "/loss")):
                    curves.setdefault(name, []).append((row["step"], float(f"{value:.6g}")))
        seed = run.config.seed
        identity = run.point | {"seed": seed, "config_hash": records.config_hash(config, run.point, seed)}
        outcomes.append(identity | result | {"environments": numbers, "curves": curves})
    return {"config": config, "environments": environments, "runs": outcomes}


def table(record, form):
    """The final metrics as text, over the seeds of each point; diverged runs are counted and left out.

    If codes differ, the runs of each code have separate rows.

    Args:
      record: from `make_record`.
      form: "text", "markdown" or "csv". In CSV the mean, the sample standard deviation and the number of
        seeds of each metric have separate cells, and errors are fractions; otherwise a cell has mean and
        standard deviation, with errors in percent.
    """
    keys = [key for key, _ in record["config"]["grid"]]
    parts = records.split_by_code(record)
    finished = records.final_metrics(record["runs"])
    names = list(dict.fromkeys(name for metrics in finished for name in metrics))
    if form == "csv":
        titles = [f"{name} {what}" for name in names for what in ("mean", "std", "seeds")]
    else:
        titles = [f"{name} %" if name.endswith("error") else name for name in names]
    several = len(parts) > 1
    rows = [[*keys, *(["code"] if several else []), "seeds", *titles, "diverged"]]
    for code, part in parts.items():
        for point, runs in records.group_by_point(part).items():
            metrics = records.final_metrics(runs)
            cells = [*map(plan.text_of, point), *([code] if several else []), str(len(runs))]
            for name in names:
                error = name.endswith("error")  # top_5_error, too
                values = [one[name] for one in metrics if name in one]
                if form == "csv":
                    cells += tables.statistics_of(values)
                else:
                    percent = [value * (100 if error else 1) for value in values]
                    cells.append(tables.mean_and_deviation(percent, digits=2 if error else 4))
            rows.append([*cells, str(records.num_diverged(runs))])
    return tables.render(rows, form)


def write_report(record, workdir):
    """Writes the report of a record into a directory, and returns its tables as text.

    Files:
      record.json; table.csv, table.md; curves.html (the page); curves as CSV, PNG and SVG. If the study has
      `compare`: comparison.csv, comparison.md, and difference as PNG and SVG. If its grid then has other keys
      too, curves and page have panels for each compared value, if these are few, and loss is a separate
      figure. If it has `against`: final_errors as PNG and SVG.
    """
    key = figures.key_of_panels(record)
    texts, drawings = {"table": table}, {"curves": figures.draw_curves}
    if plan.against(record["config"]) and comparison.final_errors(record):
        drawings["final_errors"] = final_errors.draw_study
    if plan.compared(record["config"]):
        texts["comparison"] = comparison.study_table
        if comparison.final_errors(record):
            drawings["difference"] = comparison.draw_study
    if key:
        drawings["curves"] = functools.partial(figures.draw_errors_by, key=key)
        drawings["loss"] = functools.partial(figures.draw_loss_by, key=key)
    titles = figures.panels(record, key) if key else None
    return report.write(record, workdir, texts, drawings, key, titles)


def define_flags():
    """Defines the flags of the commands that run a study."""
    config_flags.DEFINE_config_file("config", help_string="A file of configs/studies/.")
    flags.DEFINE_string("workdir", None, "The directory of the study.")
    flags.DEFINE_bool("figures_only", False, "Train nothing: draw a finished study again.")
    flags.DEFINE_integer("jobs", 1, "How many points of the grid to train side by side, in processes.")
    flags.DEFINE_string("cluster", None, f"Submit each run as a job to {' or '.join(clusters.COMMANDS)}.")
    flags.DEFINE_string("partition", None, "The partition of the cluster to submit the jobs to.")
    flags.DEFINE_string("time", None, "The time limit of a job, in minutes or as hh:mm; default: 1:00.")
    flags.DEFINE_integer("gpus_per_run", None, "GPUs of a job.")
    flags.DEFINE_integer("cpus_per_run", None, "CPU cores of a job.")
    flags.mark_flags_as_required(["config", "workdir"])


def cluster_of_flags():
    """The `clusters.Cluster` that the flags of `define_flags` define, or None.

    Raises:
      ValueError: there are flags for a cluster, but --cluster is missing.
    """
    keys = [key for key in clusters.Cluster._fields if key != "name"]
    given = {key: flags.FLAGS[key].value for key in keys if flags.FLAGS[key].value is not None}
    if flags.FLAGS.cluster is not None:
        return clusters.Cluster(flags.FLAGS.cluster, **given)
    for key, value in given.items():
        raise ValueError(f"{key} = {value!r} is for jobs of a cluster; name one with --cluster")
    return None


def run_study(write):
    """Runs the study of the flags of `define_flags`, writes its report and prints the tables.

    Args:
      write: `write_report` of the study's module.

    Raises:
      ValueError: a flag sets a key of the base that the grid or the seeds set for every run, or see
        `run_all` and `make_record`.
    """
    study, workdir = flags.FLAGS.config, pathlib.Path(flags.FLAGS.workdir)
    plan.expand(study)
    set_by = {"base.seed": "seeds"} | {f"base.{key}": "grid" for key, _ in study.grid}
    for key, value in config_flags.get_override_values(flags.FLAGS["config"]).items():
        if key in set_by:
            raise ValueError(
                f"--config.{key} = {value!r} would change no run; set its values with --config.{set_by[key]}"
            )
    if not flags.FLAGS.figures_only:
        run_all(study, workdir, flags.FLAGS.jobs, cluster_of_flags())
    for text in write(make_record(study, workdir), workdir):
        print(text)
    print(f"record, tables, figures and the page curves.html: {workdir}")


if __name__ == "__main__":
    define_flags()
    command.run(functools.partial(run_study, write_report))
