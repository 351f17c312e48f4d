"""What compiled programs move and take, by memory and by part of the step; what devices send."""

# ruff: noqa: E501 (lines of a program)

import pytest

from ait_jax.compile_check.hlo import (
    Cost,
    find_collectives,
    find_costs,
    part_of,
    summed_by_part,
)

# 200 in the fastest axis is filled up to 256, 3 in the next one to 8.
PADDED = 4 * 32 * 8 * 256
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (a: f32[200,32,3]) -> f32[200,32,3] {
  %a = f32[200,32,3]{0,2,1:T(8,128)} parameter(0)
  ROOT %b = f32[200,32,3]{0,2,1:T(8,128)} multiply(%a, %a)
}

%body (s: (s32[], f32[128])) -> (s32[], f32[128]) {
  %s = (s32[], f32[128]{0:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  %v = f32[128]{0:T(128)S(1)} get-tuple-element(%s), index=1
  %w = f32[128]{0:T(128)S(1)} add(%v, %v), metadata={op_name="jit(f)/student_update/add"}, backend_config={"window_config":{"estimated_cycles":"900"}}
  ROOT %t = (s32[], f32[128]{0:T(128)}) tuple(%i, %w)
}

%condition (s.1: (s32[], f32[128])) -> pred[] {
  %s.1 = (s32[], f32[128]{0:T(128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%s.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%i.1, %i.1), direction=LT
}

ENTRY %main (x: f32[200,32,3], key: u32[2]) -> f32[200,32,3] {
  %x = f32[200,32,3]{0,2,1:T(8,128)} parameter(0)
  %y = f32[200,32,3]{0,2,1:T(8,128)S(1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/jvp(teacher)/Net/mul"}, backend_config={"window_config":{"estimated_cycles":"1831"}}
  %copy-start = (f32[200,32,3]{0,2,1:T(8,128)}, f32[200,32,3]{0,2,1:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%y)
  %copy-done = f32[200,32,3]{0,2,1:T(8,128)} copy-done(%copy-start)
  %slice-start = ((f32[200,32,3]{0,2,1:T(8,128)}), f32[200,8,3]{0,2,1:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%copy-done), slice={[0:200], [0:8], [0:3]}
  %slice-done = f32[200,8,3]{0,2,1:T(8,128)S(1)} slice-done(%slice-start)
  %whole = f32[200,32,3]{0,2,1:T(8,128)S(1)} custom-call(%slice-done, %slice-done), custom_call_target="ConcatBitcast"
  %z = bf16[200,32,3]{0,2,1:T(8,128)(2,1)S(1)} fusion(%whole), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/transpose(jvp(student))/Net/mul"}
  %mask = pred[200]{0:T(512)(128)(4,1)} compare(%z, %z), direction=GT
  %start = (s32[], f32[128]{0:T(128)}) tuple(%x, %x)
  %loop = (s32[], f32[128]{0:T(128)}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[200,32,3]{0,2,1:T(8,128)} copy(%copy-done)
}
"""


def test_each_instruction_is_counted_where_its_arrays_are():
    teacher, student = "jit(f)/jvp(teacher)/Net/mul", "jit(f)/transpose(jvp(student))/Net/mul"
    expected = [
        Cost("fusion", teacher, PADDED, PADDED, 1831, False),
        Cost("copy-start", teacher, PADDED, PADDED, 0, False),  # Out to HBM, and a quarter back.
        Cost("slice-start", teacher, PADDED // 4, PADDED // 4, 0, False),
        Cost("fusion", student, 0, PADDED + PADDED // 2, 0, False),
        Cost("compare", student, 512, PADDED, 0, False),
        Cost("copy", teacher, 2 * PADDED, 0, 0, False),
        Cost("compare", "", 8 + 1, 0, 0, True),
        Cost("add", "jit(f)/student_update/add", 0, 3 * 4 * 128, 900, True),
    ]
    assert sorted(find_costs(PROGRAM)) == sorted(expected)


def test_sums_by_part():
    rows = summed_by_part(find_costs(PROGRAM))
    assert [(row["part"], row["direction"]) for row in rows] == [
        ("teacher", "forward"),
        ("student", "backward"),
        ("student_update", "forward"),
        ("other", "forward"),
    ]
    total = sum(cost.hbm_bytes for cost in find_costs(PROGRAM))
    assert sum(row["hbm_bytes"] for row in rows) == total
    assert [(row["cycles"], row["loop_cycles"]) for row in rows] == [
        (1831, 0),
        (0, 0),
        (0, 900),
        (0, 0),
    ]


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ("jit(f)/shard_map/jvp(student)/CifarResNet/add", ("student", "forward")),
        ("jit(f)/transpose(jvp(generator))/up1/conv", ("generator", "backward")),
        ("jit(f)/student_update/while/body/mul", ("student_update", "forward")),
        ("jit(f)/students/mul", ("other", "forward")),
        ("", ("other", "forward")),
    ],
)
def test_parts_of_a_step(source, part):
    assert part_of(source) == part


def test_what_is_no_program_costs_nothing():
    assert find_costs("") == []


# Collectives --------------------------------------------------------------------------------------

SENDING = """\
HloModule step

%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%nested (x: f32[4]) -> f32[4] {
  ROOT %inner = f32[4]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%sum
}

%body (state: (s32[], f32[4])) -> (s32[], f32[4]) {
  %called = f32[4]{0} call(%v), to_apply=%nested
  ROOT %out = (s32[], f32[4]) tuple(%i, %called)
}

%condition (state: (s32[], f32[4])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (p: f32[8,2]) -> f32[8,2] {
  %both = (f32[8,2]{1,0}, bf16[3]{0}) all-reduce(%p, %q), to_apply=%sum, metadata={op_name="a/psum"}
  %start = (f32[2,2]{1,0}, f32[8,2]{1,0}) all-gather-start(%part), dimensions={0}
  %done = f32[8,2]{1,0} all-gather-done(%start)
  %loop = (s32[], f32[4]) while(%init), condition=%condition, body=%body
  %moved = pred[5]{0} collective-permute(%mask), source_target_pairs={{0,1}}
  ROOT %use = f32[8,2]{1,0} add(%done, %all-reduce.1)
}
"""


def test_collectives_of_a_program():
    found = find_collectives(SENDING)
    assert [(c.kind, c.num_bytes, c.arrays, c.in_loop) for c in found] == [
        ("all-reduce", 16, 1, True),
        ("all-reduce", 70, 2, False),
        ("all-gather", 64, 1, False),
        ("collective-permute", 5, 1, False),
    ]
    assert found[1].source == "a/psum"
