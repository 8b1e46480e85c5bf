"""`python -m benchmarks.gpu --budget SECONDS --out FOLDER`: prove and measure everything within a budget.

Stages follow each other: the machine, correctness, what only a GPU shows, peers made ready, speed, training. Each
result is a line in `FOLDER/gpu.jsonl` at once, and `summary.json` and `summary.txt` are written anew after each stage,
so that whatever ends the command keeps what there is. `--resume` leaves out what passed. `--plan` prints the cases with
their estimated seconds, and does nothing. `--tune` times the neighbours of the launch tables' rows instead, and writes
the better ones as `tables.patch`. Without a GPU, Triton's interpreter runs the kernels at tiny sizes.
"""

import argparse
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.command import Parser, positive
from benchmarks.gpu.case import PASSED, SKIPPED, Case, Result
from benchmarks.gpu.catalogue import PARALLEL, SHARES, STAGES, every_case
from benchmarks.gpu.journal import FILE, Journal
from benchmarks.gpu.pool import Pool
from benchmarks.gpu.summary import summary_text, write_summary
from benchmarks.gpu.tuning import tuning_cases
from longmix.wording import counted

MOST_WORKERS = 10
SUMMARY_SECONDS = 3.0
PEERS = {
    "fla-core": "fla",
    "mlstm-kernels": "mlstm_kernels",
    "flash_attn_interface (FlashAttention 3)": "flash_attn_interface",
    "flash-attn-4": "flash_attn",
}
"""What a speed is compared with besides torch, and the module of each."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; exits with 2 and one line if something is not allowed."""
    parser = Parser(prog="python -m benchmarks.gpu", description="Prove and measure everything within a budget.")
    add = parser.add_argument
    add("--budget", type=positive(float), default=470.0, metavar="SECONDS", help="for everything (default 470)")
    add("--out", type=Path, required=True, metavar="FOLDER", help="for results, a log and compiled kernels")
    add("--only", nargs="+", metavar="NAME", help=f"cases whose names begin so: {', '.join(STAGES)}, or longer")
    add("--resume", action="store_true", help="leave out what passed before in the same folder")
    add("--plan", action="store_true", help="print the cases and their estimated seconds, and do nothing")
    add("--tune", action="store_true", help="time the neighbours of the launch tables' rows, and nothing else")
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 4))
    add("--workers", type=positive(int, 64), default=workers, help=f"processes that share the device ({workers})")
    options = parser.parse_args(arguments)
    parser.make_folder(options.out)
    if (options.out / FILE).exists() and not options.resume and not options.plan:
        parser.error(f"{options.out / FILE} is there; give --resume to go on from it, or another --out")
    return options


def selected(cases: Sequence[Case], only: Sequence[str] | None) -> list[Case]:
    """The cases whose names begin with one of `only`; all without it."""
    return [case for case in cases if only is None or case.name.startswith(tuple(only))]


def print_plan(cases: Sequence[Case], workers: int) -> None:
    """Print every case with its estimate, and the seconds of each stage."""
    for stage in STAGES:
        here = [case for case in cases if case.stage == stage]
        if not here:
            continue
        total = sum(case.seconds for case in here)
        shared = workers if stage in PARALLEL else 1
        print(f"{stage}: {len(here)} cases, {total:.0f} s, {total / shared:.0f} s in {shared} processes")
        for case in here:
            print(f"  {case.seconds:4.0f} s  {case.name}")


def print_peers() -> None:
    """Say which packages to compare with are not installed; their cases are left out."""
    lacking = [package for package, module in PEERS.items() if importlib.util.find_spec(module) is None]
    if lacking:
        print(f"not installed, so nothing is compared with {counted(len(lacking), 'package')}: {', '.join(lacking)}")


class Run:
    """The command, as far as it has come.

    Args:
        cases: what is to be done.
        journal: where results go.
        pool: that carries cases out.
        options: of the command line.
    """

    def __init__(self, cases: Sequence[Case], journal: Journal, pool: Pool, options: argparse.Namespace) -> None:
        self._cases, self._journal, self._pool, self._options = cases, journal, pool, options
        self._began = time.monotonic()

    def carry_out(self) -> None:
        """Do all stages."""
        for stage in STAGES:
            here = [c for c in self._cases if c.stage == stage and not self._journal.is_done(c.name)]
            if not here:
                continue
            end = self._began + SHARES[stage] * (self._options.budget - SUMMARY_SECONDS)
            self._say(f"{stage}: {len(here)} cases, until {end - self._began:.0f} s")
            together = [case for case in here if not case.alone and stage in PARALLEL]
            alone = [case for case in here if case not in together]
            for cases, count in ((together, self._options.workers), (alone, 1)):
                if left := self._pool.run(cases, count, end, self._report):
                    self._say(f"{stage}: no time for {counted(len(left), 'case')}")
            write_summary(self._options.out, self._cases, self._journal)

    def _report(self, result: Result) -> None:
        self._journal.add(result)
        note = f": {result.note}" if result.note else ""
        self._say(f"{result.status:<7} {result.case} {result.seconds:.1f} s{note}")

    def _say(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the options say; 1 if a check failed, a process crashed or nothing was done."""
    options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.plan:
        print_plan(selected(tuning_cases() if options.tune else every_case("cuda"), options.only), options.workers)
        print_peers()
        return 0
    if options.tune and device == "cpu":
        print("python -m benchmarks.gpu: --tune needs a CUDA device", file=sys.stderr)
        return 2
    cases = selected(tuning_cases() if options.tune else every_case(device), options.only)
    if not cases:
        print(f"python -m benchmarks.gpu: no case begins with {' or '.join(options.only)}", file=sys.stderr)
        return 2
    os.environ.update(_environment(options.out, device))
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    journal = Journal(options.out / FILE)
    journal.begin(results.environment(torch.device(device), "bf16" if device == "cuda" else "fp32"))
    pool = Pool(options.out / "workers.log")
    run = Run(cases, journal, pool, options)
    try:
        run.carry_out()
    except KeyboardInterrupt:
        print("interrupted; what follows was found before", flush=True)
    finally:
        pool.close()
        write_summary(options.out, cases, journal)
    print(summary_text(cases, journal))
    if device == "cpu":
        print("a CUDA device would be asked for this:")
        print_plan(selected(every_case("cuda"), options.only), MOST_WORKERS)
    print_peers()
    statuses = {journal.results[case.name].status for case in cases if case.name in journal.results}
    return int(not statuses or not statuses <= {PASSED, SKIPPED})


def _environment(out: Path, device: str) -> dict[str, str]:
    """Variables of the processes: caches that all share, and the interpreter where there is no GPU."""
    caches = {"TRITON_CACHE_DIR": out / "cache" / "triton", "TORCHINDUCTOR_CACHE_DIR": out / "cache" / "inductor"}
    found = {name: str(path.resolve()) for name, path in caches.items()}
    # Searches of peers are kept on disk, so that one process searches for all.
    found["TRITON_CACHE_AUTOTUNING"] = "1"
    found["TORCHINDUCTOR_COMPILE_THREADS"] = "4"
    if device == "cpu":
        found |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return found


if __name__ == "__main__":
    sys.exit(main())
