"""Whether a warp may overwrite what another has yet to load: found in PTX, and in none of the kernels."""

import pytest
from engine_contract import compiles

from longmix_kernels.delta import report as delta_report
from longmix_kernels.races import unordered_stores
from longmix_kernels.scatter import report as scatter_report

HEAD = """
.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 kernel_param_1)
{
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b64 	%rd2, [kernel_param_1];
	mad.wide.s32 	%rd3, %r1, 4, %rd1;
	add.s64 	%rd4, %rd2, %rd9;
"""
LOAD, STORE = "@%p1 ld.global.v4.b32 { %r1, %r2 }, [ %rd3 + 0 ];", "@%p2 st.global.b32 [ %rd5 + 0 ], { %r4 };"
STORE_OTHER = "st.global.b32 [%rd4], %r4;"
COPY, WAIT = "cp.async.cg.shared.global [ %r7 + 0 ], [ %rd5 + 0 ], 0x10, %r8;", "cp.async.wait_group 0;"
MEET, ADDRESS, END = "bar.sync \t0;", "add.s64 \t%rd5, %rd3, 16;", "ret; }"


def loop(*body: str) -> list[str]:
    return ["$L__BB0_1:", *body, "@%p3 bra \t$L__BB0_1;"]


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ([LOAD, STORE], [0]),
        ([LOAD, MEET, STORE], []),
        ([LOAD, "// bar.sync 0;", STORE], [0]),
        ([STORE, LOAD], []),
        ([LOAD, STORE_OTHER], []),
        ([LOAD, "@%p3 bra \t$L__BB0_1;", MEET, "$L__BB0_1:", STORE], [0]),
        ([LOAD, "bra.uni \t$L__BB0_1;", "$L__BB0_2:", MEET, "$L__BB0_1:", STORE], [0]),
        (loop(LOAD, STORE), [0]),
        (loop(LOAD, MEET, STORE), []),
        (loop(STORE, LOAD), [0]),
        (loop(STORE, MEET, LOAD), [0]),
        (loop(MEET, STORE, LOAD), []),
        ([COPY, WAIT, MEET, STORE], []),
        ([COPY, MEET, STORE], [0]),
        ([COPY, MEET, WAIT, STORE], [0]),
        ([COPY, *loop(WAIT, MEET, STORE, COPY)], []),
        ([COPY, *loop(WAIT, STORE, COPY)], [0]),
    ],
)
def test_paths_without_a_meeting_of_all_warps(body, found):
    ptx = "\n".join([HEAD, ADDRESS, *body, END])
    assert unordered_stores(ptx) == found


# What loads and stores through one argument without a step ahead: all but the bf16 scans of scatter raced.
DEFAULT = [
    *(scatter_report.Build(kernel, 90, "fp32", 64, 64) for kernel in ("scan", "grad_scan", "merge", "grad_key")),
    *(scatter_report.Build(kernel, 90, "bf16", 64, 64) for kernel in ("scan", "grad_scan")),
    delta_report.Build("scan", 90, "fp32", 64, 64, feature="documents-state"),
    delta_report.Build("scan", 90, "bf16", 128, 128, form="diagonal"),
    delta_report.Build("scan", 90, "bf16", 128, 128, form="diagonal", again=True),
]


@compiles
@pytest.mark.parametrize("build", DEFAULT, ids=lambda b: f"{b.kernel}-{b.dtype}-{b.columns()}")
def test_all_warps_have_loaded_what_one_overwrites(build):
    assert build.compile().unordered == ()
