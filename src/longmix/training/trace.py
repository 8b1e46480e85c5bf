"""What a step's time went to, from its trace: shares by class of operation that sum to the whole.

The trace is torch.profiler's Chrome JSON. `longmix.training.profile` marks in it which parts of the model ran, by
ranges named `longmix: CLASS`. An operation belongs to the innermost range around it. One of the backward pass is of
the class of the forward operation that made its node, which autograd's sequence numbers tell. Exchanges between
processes are known by their names, and so are the kernels of compiled blocks, where no range reaches.

    CPU     each instant of the step is in one class: that of the innermost operation then
    GPU     each kernel has the class of the operation that launched it; while none runs, the GPU waits for the CPU
    memory  allocations of the step are followed, so that its peak is told by the class that allocated
"""

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

MARK = "longmix: "
STEP = f"{MARK}step"

MIXER = "attention and recurrence"
CHANNELS = "channel mixing"
LINEAR = "linear layers"
NORMS = "norms"
HEAD = "embedding, head, loss"
OPTIMIZER = "optimizer"
DATA = "data"
COMMUNICATION = "communication"
FUSED = "compiled, fused"
WAITING = "GPU waits"
OTHER = "other"
CLASSES = (MIXER, LINEAR, NORMS, CHANNELS, HEAD, OPTIMIZER, DATA, COMMUNICATION, FUSED, OTHER, WAITING)
"""In the order of tables. Linear layers are those of mixers, too; the optimizer has the clipping of the gradient."""

Event = dict[str, Any]

_BACKWARD = "autograd::engine::evaluate_function"
_EXCHANGES = re.compile(r"(c10d|_c10d_functional|nccl|gloo|FSDP)[:_]|record_param_comms|ncclDevKernel|ncclKernel")
_COMPILED = re.compile(r"Torch-Compiled Region|## Call CompiledFxGraph|CompiledFunction")
_BY_NAME = (
    (LINEAR, re.compile(r"^aten::(linear|mm|addmm|bmm|baddbmm)$|gemm|cutlass|nvjet|extern_kernels", re.IGNORECASE)),
    (NORMS, re.compile(r"norm", re.IGNORECASE)),
    (MIXER, re.compile(r"attention|flash|sdpa|longmix|mlstm|delta|rwkv|recurren|scan", re.IGNORECASE)),
)


@dataclass
class Shares:
    """What a step's time went to.

    Attributes:
        seconds: of the step, from the end of the one before to its own.
        host: seconds of the training thread by class; they sum to `seconds`.
        device: seconds of a GPU by class, its waits among them; empty without one.
        peak_bytes: the most that the step's allocations held together, beyond what was there before.
        peak_by_class: what of it each class had allocated.
        slowest: the GPU's kernels, or the CPU's operations without one, that took longest: seconds and calls.
    """

    seconds: float
    host: dict[str, float]
    device: dict[str, float]
    peak_bytes: int
    peak_by_class: dict[str, int]
    slowest: dict[str, tuple[float, int]]

    @property
    def counted(self) -> dict[str, float]:
        """Seconds by class where the step is computed: on the GPU if there is one."""
        return self.device or self.host

    def rows(self) -> Iterator[tuple[str, float, float]]:
        """(class, seconds, share) of all that took time, in the order of `CLASSES`; the shares sum to 1."""
        total = sum(self.counted.values())
        for name in CLASSES:
            if self.counted.get(name):
                yield name, self.counted[name], self.counted[name] / total


@dataclass
class Timeline:
    """The innermost operation of a thread at each moment: `at[i]` until `at[i + 1]` it is of `classes[i]`."""

    at: list[float] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)

    def then(self, moment: float, name: str) -> None:
        """From `moment` on an operation of class `name` is the innermost."""
        self.at.append(max(moment, self.at[-1]) if self.at else moment)  # ends are rounded
        self.classes.append(name)

    def class_at(self, moment: float) -> str:
        """The class of the innermost operation at a moment."""
        place = bisect_right(self.at, moment) - 1
        return self.classes[place] if place >= 0 else OTHER


def shares_of(trace: dict[str, Any]) -> Shares:
    """The shares of a trace that has one step.

    Args:
        trace: what torch.profiler exported.
    """
    events = _events(trace)
    whole = next(event for event in events if event["name"] == STEP and event.get("cat") == "user_annotation")
    start, end = whole["ts"], whole["ts"] + whole["dur"]
    lines = timelines(trace)
    line = lines[whole["tid"]]
    device = _device(events, lines, line, start, end)
    peak, by_class = _peak(events, lines)
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if device else ("cpu_op",)
    host = _host(line, start, end)
    return Shares((end - start) / 1e6, host, device, peak, by_class, _slowest(events, kinds))


def timelines(trace: dict[str, Any]) -> dict[Any, Timeline]:
    """What each thread did, by its id, in a trace that has one step."""
    events = _events(trace)
    thread = next(event["tid"] for event in events if event["name"] == STEP and event.get("cat") == "user_annotation")
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver"):
            threads[event["tid"]].append(event)
    for each in threads.values():
        each.sort(key=lambda event: (event["ts"], -event["dur"]))
    nodes = _classes_of_nodes(threads[thread])
    ends = (event["ts"] + event["dur"] for each in threads.values() for event in each if _is_backward(event))
    backward_end = max(ends, default=float("inf"))
    return {tid: _timeline(each, nodes, backward_end) for tid, each in threads.items()}


def _events(trace: dict[str, Any]) -> list[Event]:
    return [event for event in trace["traceEvents"] if event.get("ph") in ("X", "i") and "ts" in event]


def _is_backward(event: Event) -> bool:
    return bool(event["name"].startswith(_BACKWARD))


def _walk(events: list[Event]) -> Iterator[tuple[float, Event | None, list[Event]]]:
    """Each moment at which a thread's innermost operation changes: the one that begins, and those around it.

    None begins where one ends; then the innermost is the last of those around.
    """
    around: list[Event] = []
    for event in events:
        while around and around[-1]["ts"] + around[-1]["dur"] <= event["ts"]:
            ended = around.pop()
            yield ended["ts"] + ended["dur"], None, around
        yield event["ts"], event, around
        around.append(event)
    while around:
        ended = around.pop()
        yield ended["ts"] + ended["dur"], None, around


def _classes_of_nodes(events: list[Event]) -> dict[int, str]:
    """The class of each node of the graph by its sequence number, from the forward pass.

    An operation has the number that the next node gets. So the last one that begins with a number makes its node.
    """
    classes: dict[int, str] = {}
    found: list[str] = []
    for _, event, around in _walk(events):
        del found[len(around) :]
        if event is None:
            continue
        found.append(_class(event, found[-1] if found else OTHER, {}, OTHER))
        number = event["args"].get("Sequence number", -1) if "args" in event else -1
        if number >= 0 and not _is_backward(event) and not any(map(_is_backward, around)):
            classes[number] = found[-1]
    return classes


def _timeline(events: list[Event], nodes: dict[int, str], backward_end: float) -> Timeline:
    line, found = Timeline(), list[str]()
    last = OTHER  # of the backward pass: a gradient is added to a weight's right after the node that gave it
    for moment, event, around in _walk(events):
        del found[len(around) :]
        outside = OPTIMIZER if moment >= backward_end else OTHER
        innermost = found[-1] if around and around[-1]["name"] != STEP else outside
        if event is not None:
            innermost = _class(event, innermost, nodes, last)
            found.append(innermost)
            if _is_backward(event):
                last = innermost
        line.then(moment, innermost)
    return line


def _class(event: Event, above: str, nodes: dict[int, str], last: str) -> str:
    """The class of an operation inside one of class `above`."""
    name = event["name"]
    if _EXCHANGES.match(name):
        return COMMUNICATION
    if name.startswith(MARK) and name != STEP:
        return str(name.removeprefix(MARK))
    if name.startswith("Optimizer."):
        return OPTIMIZER
    if _is_backward(event):
        return nodes.get(event["args"].get("Sequence number", -1), last)
    if _COMPILED.search(name):
        return FUSED
    if name == "aten::linear" and above != HEAD:
        return LINEAR
    return _by_name(name) or above if above == FUSED else above


def _by_name(name: str) -> str | None:
    return next((found for found, pattern in _BY_NAME if pattern.search(name)), None)


def _host(line: Timeline, start: float, end: float) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for place, (begin, name) in enumerate(zip(line.at, line.classes, strict=True)):
        until = line.at[place + 1] if place + 1 < len(line.at) else end
        inside = min(until, end) - max(begin, start)
        if inside > 0:
            seconds[name] += inside / 1e6
    return dict(seconds)


def _device(
    events: list[Event], lines: dict[Any, Timeline], host: Timeline, start: float, end: float
) -> dict[str, float]:
    """Seconds of kernels by class, and those without any: of the data while the training thread is there."""
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if not kernels:
        return {}
    launches = {
        event["args"]["correlation"]: event
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
    }
    seconds: dict[str, float] = defaultdict(float)
    free = start
    for kernel in sorted(kernels, key=lambda event: event["ts"]):
        begin, until = max(kernel["ts"], start), min(kernel["ts"] + kernel["dur"], end)
        if until <= begin:
            continue
        launch = launches.get(kernel["args"].get("correlation"))
        name = OTHER
        if launch is not None and launch["tid"] in lines:
            name = lines[launch["tid"]].class_at(launch["ts"])
        if _EXCHANGES.match(kernel["name"]):
            name = COMMUNICATION
        elif name == FUSED:
            name = _by_name(kernel["name"]) or FUSED
        seconds[name] += (until - begin) / 1e6
        _wait(seconds, host, free, begin)
        free = max(free, until)
    _wait(seconds, host, free, end)
    return dict(seconds)


def _wait(seconds: dict[str, float], host: Timeline, begin: float, end: float) -> None:
    for name, waited in _host(host, begin, end).items() if end > begin else ():
        seconds[DATA if name == DATA else WAITING] += waited


def _peak(events: list[Event], lines: dict[Any, Timeline]) -> tuple[int, dict[str, int]]:
    """The most bytes that are held of what the step allocated, and by which classes; on the GPU if there is one."""
    changes = [event for event in events if event["name"] == "[memory]"]
    on_gpu = any(event["args"].get("Device Type") == 1 for event in changes)
    held: dict[Any, tuple[str, int]] = {}
    classes: dict[str, int] = defaultdict(int)
    total, peak, by_class = 0, 0, dict[str, int]()
    for event in sorted(changes, key=lambda event: event["ts"]):
        args = event["args"]
        if on_gpu != (args.get("Device Type") == 1):
            continue
        if args["Bytes"] > 0:
            line = lines.get(event["tid"])
            name = OTHER if line is None else line.class_at(event["ts"])
            held[args["Addr"]] = name, args["Bytes"]
            classes[name] += args["Bytes"]
            total += args["Bytes"]
        elif args["Addr"] in held:
            name, size = held.pop(args["Addr"])
            classes[name] -= size
            total -= size
        if total > peak:
            peak, by_class = total, {name: size for name, size in classes.items() if size}
    return peak, by_class


def _slowest(events: list[Event], kinds: tuple[str, ...], most: int = 20) -> dict[str, tuple[float, int]]:
    """Of the kernels, or of operations with all that they call, those that took longest."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        if event.get("cat") in kinds and not _is_backward(event):
            seconds[event["name"]] += event["dur"] / 1e6
            calls[event["name"]] += 1
    names = sorted(seconds, key=lambda name: -seconds[name])[:most]
    return {name: (seconds[name], calls[name]) for name in names}
