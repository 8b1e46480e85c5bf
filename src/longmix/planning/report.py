"""A plan as a table, and as a picture of memory over the context length."""

from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from longmix.planning.memory import CONTEXT_BYTES, GIB, USABLE
from longmix.planning.plan import Advice, Plan, Planner
from longmix.planning.traffic import ASSUMPTIONS
from longmix.wording import counted

KEPT = {
    "none": "everything kept",
    "selective": "products and engines kept, the rest recomputed",
    "block": "blocks recomputed",
}
"""What each kind of activation checkpointing does."""

LENGTHS = 6
"""Number of context lengths in the picture. Each is twice the one before; the planned one is the last but one."""


def shown(planner: Planner, plan: Plan, advice: Advice | None, singles: list[Advice]) -> Group:
    """The plan as text for a terminal."""
    request, memory = planner.request, plan.memory
    table = Table(title=_title(planner, plan), title_justify="left", box=None, show_header=False, padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for name, size in memory.parts.items():
        table.add_row(name, _gib(size), "")
    verdict = "fits" if memory.fits else "does not fit"
    table.add_row("all", _gib(memory.total), f"of {_gib(memory.limit)}: {verdict}; most is held at: {memory.moment}")
    state = planner.model.state_bytes(plan.variant.seq_len)
    if memory.host:
        table.add_row("host", _gib(memory.host), "of the host's memory for the activations of this device")
    table.add_row("states", _gib(state), "that a window of this length leaves for generation; not held in training")
    table.add_row("", "", "")
    for name, sent in (("gradients", plan.traffic.gradients), ("weights", plan.traffic.weights)):
        if sent:
            table.add_row(f"{name} sent", _gib(sent), "by a device in a step")
    if plan.traffic.context:
        table.add_row("context sent", _gib(plan.traffic.context), "by a device in a step")
    if plan.traffic.host:
        table.add_row("offloaded", _gib(plan.traffic.host), "to the host's memory in a step, and as much back")
    for row in _time_rows(planner, plan):
        table.add_row(*row)
    lines = [Text(f"note: {note}") for note in request.notes]
    return Group(table, *_advice(plan, advice, singles), *lines, *_assumptions(plan, request.accelerator is None))


def stages(planners: list[Planner], plans: list[Plan], dearest: int) -> Group:
    """Each stage of a run in a line; the one that takes the most memory is planned in full behind them."""
    table = Table(box=None, padding=(0, 2), title="stages", title_justify="left")
    for column in ("stage", "seq_len", "windows a step", "memory of a device", "step", ""):
        table.add_column(column, justify="left" if column == "" else "right", no_wrap=True)
    for number, (planner, plan) in enumerate(zip(planners, plans, strict=True)):
        table.add_row(
            str(number + 1),
            f"{plan.variant.seq_len:,}",
            f"{planner.request.batch_size(plan.variant):,}",
            f"{_gib(plan.memory.total)}, {'fits' if plan.memory.fits else 'does not fit'}",
            "unknown" if plan.time is None else f"{plan.time.total:,.3f} s",
            "the dearest: what follows is of this stage, and so are the words" if number == dearest else "",
        )
    return Group(table, Text())


def _title(planner: Planner, plan: Plan) -> str:
    request, variant = planner.request, plan.variant
    device = "CPU" if request.accelerator is None else request.accelerator.name
    parameters = planner.model.parameter_counts()["total"]
    divided = f", {variant.context_parallel} share a window" if variant.context_parallel > 1 else ""
    return (
        f"model={request.labels[1]} mixer={request.labels[0]} ({parameters:,} parameters), "
        f"seq_len={variant.seq_len:,}, on {request.gpus} x {device}, {variant.strategy}{divided}, {request.precision}: "
        f"{counted(request.batch_size(variant), 'window')} a step, "
        f"{variant.micro_batch_size} at a time on each device, "
        f"{KEPT[variant.activation_checkpointing]} for the backward pass"
    )


def _time_rows(planner: Planner, plan: Plan) -> list[tuple[str, str, str]]:
    rows = [
        (
            "arithmetic",
            f"{plan.flops[1] / 1e12:,.1f} TFLOP",
            f"{plan.flops[0] / plan.flops[1]:.0%} of it asked for by the model",
        )
    ]
    time = plan.time
    if time is None:
        return [*rows, ("step", "unknown", "the table has no CPUs")]
    tokens = planner.request.batch_size(plan.variant) * plan.variant.seq_len
    rows.append(
        (
            "step",
            f"{time.total:,.3f} s",
            f"{tokens / time.total:,.0f} tokens/s, MFU {time.utilisation:.0%}; an estimate",
        )
    )
    rows.append(("", "", f"products {time.products:,.3f} s, other operators {time.others:,.3f} s"))
    if planner.request.gpus > 1:
        rows.append(("", "", f"exchange {time.exchange:,.3f} s beside them, of divided windows {time.context:,.3f} s"))
    if plan.traffic.host:
        rows.append(("", "", f"waiting for the host's memory {time.host:,.3f} s"))
    return rows


def _advice(plan: Plan, advice: Advice | None, singles: list[Advice]) -> list[Text]:
    if plan.memory.fits:
        return []
    lines = [Text()]
    if advice is None:
        lines.append(Text("no change of micro-batch, recomputing, FSDP, context parallelism and seq_len fits", "bold"))
    else:
        lines.append(
            Text(f"smallest change that fits: {' '.join(advice.words)}: {_gib(advice.plan.memory.total)}", "bold")
        )
    for single in singles:
        verdict = "fits" if single.plan.memory.fits else "does not"
        lines.append(Text(f"  alone, {' '.join(single.words)}: {_gib(single.plan.memory.total)}, {verdict}"))
    return lines


def _assumptions(plan: Plan, on_cpu: bool) -> list[Text]:
    if on_cpu:
        return []
    memory = (
        f"{_gib(CONTEXT_BYTES)} for the CUDA context, as much for NCCL, and {1 - USABLE:.0%} of the rest for the "
        "allocator are taken off the sheet's memory; what kernels take within a call is left out"
    )
    return [Text(), *(Text(f"assumed: {text}", "dim") for text in (memory, *ASSUMPTIONS))]


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:,.2f} MiB"


def lengths(planner: Planner) -> list[Plan]:
    """Plans at a few context lengths around the requested one, where the settings divide."""
    variant = planner.request.variant
    found = []
    for power in range(2 - LENGTHS, 2):
        length = variant.seq_len << power if power >= 0 else variant.seq_len >> -power
        if length >= variant.context_parallel and length % variant.context_parallel == 0:
            found.append(planner.at_length(length))
    return found


def draw(planner: Planner, plans: list[Plan], path: Path) -> Path:
    """Stacked bars of memory over the context length, and the device's limit as a line."""
    from longmix.reporting.plots import drawing, new_figure, save_figure, set_title
    from longmix.reporting.style import INK, nth_style

    with drawing():
        figure, (axes,) = new_figure(1, width=620, height=320)
        names = list(dict.fromkeys(name for plan in plans for name in plan.memory.parts))
        labels = [f"{plan.variant.seq_len:,}" for plan in plans]
        bottom = [0.0] * len(plans)
        for number, name in enumerate(names):
            heights = [plan.memory.parts.get(name, 0) / GIB for plan in plans]
            hatch = "" if nth_style(number).dash == () else "//"
            axes.bar(labels, heights, bottom=bottom, label=name, color=nth_style(number).light, hatch=hatch)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axes.axhline(plans[0].memory.limit / GIB, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label="limit")
        request, variant = planner.request, planner.request.variant
        device = "CPU" if request.accelerator is None else request.accelerator.name
        set_title(axes, f"{request.labels[1]}, {request.labels[0]}, {request.gpus} x {device}, {variant.strategy}")
        axes.set_xlabel("context length, tokens")
        axes.set_ylabel("GiB per device")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), reverse=True)
        return save_figure(figure, path)


def as_json(
    planner: Planner, plan: Plan, advice: Advice | None, singles: list[Advice], plans: list[Plan]
) -> dict[str, Any]:
    """The whole report as plain values, for JSON."""
    return {
        **planner.report(plan),
        "notes": list(planner.request.notes),
        "smallest_change": None if advice is None else {"words": list(advice.words), **planner.report(advice.plan)},
        "single_changes": [{"words": list(single.words), **planner.report(single.plan)} for single in singles],
        "by_length": [planner.report(plan) for plan in plans],
    }
