"""Kernels and memory traffic of a program that XLA compiled for a GPU, added up from its text.

XLA's own counts leave out what cuDNN and cuBLAS compute.
"""

import math
import re
from typing import NamedTuple

# Instructions of XLA that start no kernel.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_FREE |= {"partition-id", "replica-id"}
_SIZES = {"token": 0, "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2}
_SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}


class Traffic(NamedTuple):
    """The kernels of a program; each array that a kernel reads or writes counts once, with its whole size."""

    kernels: int
    bytes: int


class _Instruction(NamedTuple):
    """A line of a program's text."""

    shape: str
    opcode: str
    operands: list
    called: list


def of_program(text):
    """Returns the Traffic of a program that XLA compiled for a GPU; the body of a loop counts once.

    Args:
      text: from `compiled.as_text()`.
    """
    computations, entry = _parsed(text)
    return _of_computation(computations, entry)


def _parsed(text):
    """Returns {computation: {name: _Instruction}}, and the name of the computation that is the program."""
    computations, current, entry = {}, {}, None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if start := re.match(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$", line):
            current = computations.setdefault(start[2], {})
            entry = start[2] if start[1] else entry
        elif found := re.match(r"\s+(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(.*)", line):
            name, shape, opcode, operands, rest = found.groups()
            called = re.findall(r"(?:body|to_apply|calls)=%?([\w.-]+)", rest)
            current[name] = _Instruction(shape, opcode, re.findall(r"%([\w.-]+)", operands), called)
    return computations, entry


def _of_computation(computations, name):
    kernels = moved = 0
    instructions = computations[name]
    for one in instructions.values():
        if one.opcode in ("while", "call"):
            inner = _of_computation(computations, one.called[0])
            kernels, moved = kernels + inner.kernels, moved + inner.bytes
        elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
            shape = one.shape
            if one.opcode == "custom-call":  # its last result is the workspace, u8 of cuDNN and s8 of cuBLAS
                shape = re.sub(r", [us]8\[\d*\][^,]*\)$", ")", shape)
            read = sum(_size(instructions[operand].shape) for operand in dict.fromkeys(one.operands))
            kernels, moved = kernels + 1, moved + read + _size(shape)
    return Traffic(kernels, moved)


def _size(shape):
    """Returns the bytes of an array or of a tuple: `(bf16[8,4]{1,0}, f32[])` -> 68."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(
        _SIZES[kind] * math.prod(int(side) for side in sides.split(",") if side) for kind, sides in found
    )
