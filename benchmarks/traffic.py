"""Memory traffic of training on a GPU that need not be there: `python -m benchmarks.traffic [--gpu=h100]`.

XLA compiles a step of each network of `benchmarks.throughput` for a GPU of which it knows a description, and
`benchmarks.kernels` adds up what the step's kernels read and write. Nothing is timed: where XLA and cuDNN
would choose kernels by timing them, they take their defaults, and workspaces of cuDNN are unknown. This needs
JAX for CUDA (`pip install "jax[cuda12]"`), on any Linux machine on x86.
"""

import argparse
import importlib.util
import time

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from benchmarks import kernels, record, throughput
from cnn_cases import tables
from cnn_cases.models import fast
from cnn_cases.training import devices as devices_lib
from cnn_cases.training.state import shapes_of_state

# What XLA knows of a GPU, by NVIDIA's device query and data sheets.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: 9 }}
  memory_bandwidth: {bandwidth} device_memory_size: {memory}
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
GPUS = {
    "h100": _HOPPER.format(name="NVIDIA H100 80GB HBM3", bandwidth=3_352_320_000_000, memory=85_045_477_376),
    "h200": _HOPPER.format(name="NVIDIA H200", bandwidth=4_800_000_000_000, memory=150_754_820_096),
}


def has_compiler():
    """Returns whether JAX for CUDA is installed."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def measure(case, dtype, device):
    """Compiles the training step of one of `throughput.CASES`; returns a dict that JSON can hold."""
    with fast.written_for("gpu"):
        model, tx, train_steps = throughput.training(case, dtype)
        state = devices_lib.shapes(shapes_of_state(model, tx, case.image_shape), [device])
        batch = {
            "image": jax.ShapeDtypeStruct((case.gpu_batch, *case.image_shape), jnp.float32),
            "label": jax.ShapeDtypeStruct((case.gpu_batch,), jnp.int32),
        }
        arrays = devices_lib.shapes(batch, [device])
        nothing = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
        began = time.monotonic()
        compiled = devices_lib.pmap_train(train_steps, [device]).lower(state, arrays, nothing).compile()
    traffic = kernels.of_program(compiled.as_text())
    return {
        "batch_size": case.gpu_batch,
        "dtype": dtype,
        "kernels_a_step": traffic.kernels,
        "bytes_a_step": traffic.bytes,
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "compile_seconds": round(time.monotonic() - began, 1),
    }


def cells(rows):
    """The table of {case: row}: lists of cells, the header first."""
    lines = [["network", "batch", "kernels", "memory traffic, GB", "temporary memory, MB"]]
    for name, row in rows.items():
        sizes = [f"{row['bytes_a_step'] / 1e9:.3g}", f"{row['temporary_bytes'] / 1e6:,.0f}"]
        lines.append([name, str(row["batch_size"]), str(row["kernels_a_step"]), *sizes])
    return lines


def main():
    """Counts, prints the results, and writes them to --out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument(
        "--cases", nargs="+", choices=throughput.CASES, metavar="CASE", default=list(throughput.CASES)
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--out", type=record.output, help="a JSON file, of which each case is a section")
    options = parser.parse_args()
    if not has_compiler():
        parser.error(f'this needs the compiler for GPUs: pip install "jax[cuda12]=={jax.__version__}"')
    jax.config.update("jax_platforms", "cpu")  # for all but the compiler
    (device,) = topologies.get_topology_desc(
        platform="cuda", target_config=GPUS[options.gpu], topology="1x1x1"
    ).devices
    flags = f"--gpu={options.gpu} --dtype={options.dtype}"
    commands = {name: f"python -m benchmarks.traffic {flags} --cases {name!r}" for name in options.cases}
    described = [f"{device.device_kind}, by its description"]
    record.check(parser, options.out, commands, lambda: described)
    rows = {}
    for name, command in commands.items():
        rows[name] = measure(throughput.CASES[name], options.dtype, device)
        print(tables.markdown(cells({name: rows[name]}), words=(0,)), flush=True)
        if options.out:
            record.write_section(options.out, name, command, rows[name], devices=described)
    if len(rows) > 1:
        print(tables.markdown(cells(rows), words=(0,)))


if __name__ == "__main__":
    main()
