"""Whether a warp may overwrite what another has yet to load: found in PTX, and in none of the kernels."""

import pytest
from engine_contract import OWN_TILES, compiles

from longmix_kernels.accelerators import TUNED
from longmix_kernels.attention import report as attention_report
from longmix_kernels.delta import report as delta_report
from longmix_kernels.linear import report as linear_report
from longmix_kernels.races import in_place, unordered_stores
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


@pytest.mark.parametrize(
    ("body", "found"),
    [([LOAD, STORE], [0]), ([STORE, LOAD], [0]), ([COPY, STORE], [0]), ([LOAD, STORE_OTHER], []), ([STORE], [])],
)
def test_arguments_that_are_loaded_and_stored(body, found):
    assert in_place("\n".join([HEAD, ADDRESS, *body, END])) == found


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


IN_PLACE = {
    ("delta", "scan"): "output",
    ("delta", "grad_key_exact"): "grad_log_decay",
    ("delta", "grad_key_head"): "grad_log_decay",
    ("scatter", "merge"): "output",
    ("scatter", "grad_key"): "grad_value",
}
"""The kernels that load and store through one argument, and which one that is."""

EVERY_KERNEL = {
    "attention": attention_report.table_builds((90,), (64,), modes=("bounds",), features=("permuted",)),
    "linear": linear_report.table_builds((90,), ((64, 64),), ("exp",), ("documents-state",)),
    "delta": [
        build
        for decay in delta_report.cost.DECAYS
        for build in delta_report.table_builds((90,), ((64, 64),), (decay,), ("documents-state",))
        if not build.again and (decay == "bounded" or build.kernel in ("grad_query", "grad_key"))
    ],
    "scatter": scatter_report.table_builds((90,), ((64, 64),)),
}
EVERY_ROW = [
    *(
        delta_report.Build("scan", architecture, dtype, dim, dim, "bounded", "documents-state", form, again=again)
        for architecture in OWN_TILES
        for dtype in ("bf16", "fp32")
        for dim in delta_report.launch.WIDTHS
        for form in delta_report.FORMS
        for again in (False, True)
    ),
    *(
        delta_report.Build("grad_key", architecture, dtype, dim, dim, decay, "documents-state")
        for architecture in OWN_TILES
        for dtype in ("bf16", "fp32")
        for dim in delta_report.launch.WIDTHS
        for decay in ("exact", "head")
    ),
    *(
        build
        for dtype in ("bf16", "fp32")
        for build in scatter_report.table_builds(TUNED, ((64, 64), (256, 128), (256, 256)), (64, 256), dtype)
        if ("scatter", build.kernel) in IN_PLACE
    ),
]


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("engine", EVERY_KERNEL)
def test_the_kernels_that_load_and_store_through_one_argument_are_known(engine):
    for build in EVERY_KERNEL[engine]:
        argument = IN_PLACE.get((engine, build.name()))
        assert build.loaded_and_stored() == ([] if argument is None else [argument]), build.kernel


@compiles
@pytest.mark.every_row
@pytest.mark.parametrize(
    "build",
    EVERY_ROW,
    ids=lambda b: f"{b.kernel}-sm{b.architecture}-{b.dtype}-{'-'.join(map(str, b.columns().values()))}",
)
def test_every_row_of_their_tables_orders_stores(build):
    assert build.unordered() == []
