"""Checks that images fit into the memory of this machine, or into the part that this process may use."""

import contextlib
import math
import os
import pathlib

OWN_GROUPS, GROUPS = pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")
SHARED = pathlib.Path("/dev/shm")  # on Linux


def check(num_images, shape, keys, twice=False):
    """Raises ValueError if uint8 images do not fit into memory.

    Args:
      num_images, shape: the number of images, and (H, W, C) of each.
      keys: the config keys that the message says to change.
      twice: whether two copies of them are held.
    """
    wanted, there = (1 + twice) * num_images * math.prod(shape), available()
    if wanted > there:
        held = ", held twice," if twice else ""
        raise ValueError(
            f"{num_images:,} images of {'x'.join(map(str, shape))}{held} take {wanted / 1e9:,.1f} GB, and "
            f"this machine, container or job has {there / 1e9:,.1f} GB of memory; change {keys}"
        )


def check_shared(num_images, shape, keys):
    """Raises ValueError if uint8 images do not fit into shared memory; see `check`.

    Its size counts, not what is free: what a killed run has left there may be about to be freed.
    """
    wanted, there = num_images * math.prod(shape), shared()
    if there is not None and wanted > there:
        raise ValueError(
            f"{num_images:,} images of {'x'.join(map(str, shape))} take {wanted / 1e6:,.1f} MB of shared "
            f"memory, and {SHARED} has {there / 1e6:,.1f} MB; enlarge it (`docker run --shm-size`), or "
            f"change {keys}"
        )


def shared():
    """The size of the shared memory of this machine or container, in bytes; None if it is not limited."""
    if not SHARED.is_dir():
        return None
    system = os.statvfs(SHARED)
    return system.f_blocks * system.f_frsize or None  # 0: no limit of its own


def available():
    """The memory of the machine, or of this process's container or job if that is less, in bytes."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    lines = OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else []  # on Linux
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if not controllers:  # version 2 of control groups
            limits, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            limits, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        own = limits / group.strip("/")
        for place in (own, *own.parents):
            with contextlib.suppress(OSError, ValueError):  # there is no limit, or it is the word "max"
                sizes.append(int((place / name).read_text()))
    return min(sizes)
