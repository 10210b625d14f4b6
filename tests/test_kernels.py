"""What the kernels of a GPU's program read and write."""

import pytest

from benchmarks import kernels

# Lines as XLA writes them, without most of their metadata; sizes are written next to the kernels.
PROGRAM = """HloModule jit_step, is_scheduled=true

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused_max (param_0: bf16[8,4]) -> (bf16[8,4], f32[8]) {
  %param_0 = bf16[8,4]{1,0} parameter(0)
  %maximum.1 = bf16[8,4]{1,0} maximum(%param_0, %param_0)
  %reduce.1 = f32[8]{0} reduce(%maximum.1), dimensions={1}, to_apply=%region_0.1
  ROOT %tuple.1 = (bf16[8,4]{1,0}, f32[8]{0}) tuple(%maximum.1, %reduce.1)
}

%body.1 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %gte.1 = s32[] get-tuple-element(%state), index=0
  %gte.2 = f32[8]{0} get-tuple-element(%state), index=1
  %copy.1 = f32[8]{0} copy(%gte.2), metadata={op_name="jit(step)/while/body/copy"}
  ROOT %tuple.2 = (s32[], f32[8]{0}) tuple(%gte.1, %copy.1)
}

ENTRY %main.9 (x: bf16[8,4], kernel: bf16[4,4]) -> (bf16[8,4], /*index=1*/f32[8]) {
  %x = bf16[8,4]{1,0} parameter(0)
  %kernel = bf16[4,4]{1,0} parameter(1)
  %constant.1 = s32[] constant(0)
  %cudnn-conv.1 = (bf16[8,4]{1,0}, u8[1048576]{0}) custom-call(%x, %kernel), custom_call_target="__cudnn$conv"
  %gte.3 = bf16[8,4]{1,0} get-tuple-element(%cudnn-conv.1), index=0
  %bitcast.1 = bf16[8,4]{1,0} bitcast(%gte.3)
  %fusion.1 = (bf16[8,4]{1,0}, /*index=1*/f32[8]{0}) fusion(%bitcast.1, %gte.3), kind=kLoop, calls=%fused_max
  %gte.4 = f32[8]{0} get-tuple-element(%fusion.1), index=1
  %square.1 = bf16[8,4]{1,0} multiply(%x, %x)
  %tuple.3 = (s32[], f32[8]{0}) tuple(%constant.1, %gte.4)
  %while.1 = (s32[], f32[8]{0}) while(%tuple.3), condition=%condition.1, body=%body.1
  %gte.5 = f32[8]{0} get-tuple-element(%while.1), index=1
  ROOT %tuple.4 = (bf16[8,4]{1,0}, f32[8]{0}) tuple(%square.1, %gte.5)
}
"""
CONV = 64 + 32 + 64  # both arguments and the map; not the workspace
FUSION = 2 * 64 + 64 + 32  # a bitcast is another name of its array, which this reads, too
SQUARE = 64 + 64  # x is read once
COPY = 32 + 32  # the loop's body, once


def test_each_array_of_each_kernel_counts_once():
    assert kernels.of_program(PROGRAM) == (4, CONV + FUSION + SQUARE + COPY)


def test_the_workspace_of_cublas_does_not_count_either():
    conv = 'u8[1048576]{0}) custom-call(%x, %kernel), custom_call_target="__cudnn$conv"'
    product = 's8[4194304]{0}) custom-call(%x, %kernel), custom_call_target="__cublas$lt$matmul"'
    assert conv in PROGRAM
    assert kernels.of_program(PROGRAM.replace(conv, product)) == kernels.of_program(PROGRAM)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("  %square.1 = bf16[8,4]{1,0} multiply(%x, %x)\n", (3, CONV + FUSION + COPY)),
        (
            "  %while.1 = (s32[], f32[8]{0}) while(%tuple.3), condition=%condition.1, body=%body.1\n",
            (3, CONV + FUSION + SQUARE),
        ),
    ],
    ids=["square", "while"],
)
def test_what_is_missing_is_not_counted(line, expected):
    assert line in PROGRAM
    assert kernels.of_program(PROGRAM.replace(line, "")) == expected
