import os
import signal
import subprocess
import sys
import time
from signal import SIGINT, SIGTERM, SIGUSR1, SIGUSR2

import pytest
import torch

from longmix.distributed import signals
from longmix.distributed.signals import SignalWatch
from longmix.errors import Interrupted

CPU = torch.device("cpu")


@pytest.fixture
def watch():
    watch = SignalWatch()
    watch.install()
    yield watch
    watch.remove()


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("sent", "counts"),
    [
        ([SIGTERM], SIGTERM),
        ([SIGTERM, SIGUSR2], SIGUSR2),
        ([SIGUSR1, SIGTERM], SIGUSR1),
        ([SIGINT], SIGINT),
        ([SIGINT, SIGTERM], SIGTERM),
    ],
    ids=lambda value: "+".join(number.name for number in value) if isinstance(value, list) else value.name,
)
def test_the_signal_that_asks_for_a_requeue_counts_most(sent, counts, watch):
    assert not watch.anywhere(CPU)
    send(*sent)
    assert watch.anywhere(CPU)
    assert watch.received == counts


def test_one_press_of_ctrl_c_may_come_twice_and_another_acts_at_once(watch, monkeypatch):
    send(SIGINT, SIGINT)
    assert watch.received == SIGINT
    monkeypatch.setattr(signals, "SAME_PRESS_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        send(SIGINT)


@pytest.mark.parametrize(("number", "is_told"), [(SIGUSR1, True), (SIGUSR2, True), (SIGTERM, False), (SIGINT, False)])
def test_who_had_the_signal_is_told_of_those_that_ask_for_a_requeue_alone(number, is_told):
    told = []
    before = signal.signal(number, lambda *arguments: told.append(arguments))
    try:
        watch = SignalWatch()
        watch.install()
        send(number)
        hand_on = watch.earlier_handler()
        watch.remove()
    finally:
        signal.signal(number, before)
    assert told == []
    if is_told:
        hand_on()
        assert told == [(number, None)]
    else:
        assert hand_on is None


HANGS = """
import os, sys, time
from longmix.distributed import signals
signals.PATIENCE_SECONDS = 0.5
watch = signals.process_watch()
with watch.raising(), watch.noting(worth_saving={worth_saving}):
    print("up", flush=True)
    time.sleep(3)  # in the place of a call that waits for another process
sys.exit(7)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("worth_saving", "code"), [(False, Interrupted.exit_code), (True, 7)])
def test_a_process_that_waits_for_others_with_nothing_to_save_ends(worth_saving, code):
    command = [sys.executable, "-c", HANGS.format(worth_saving=worth_saving)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(SIGUSR1)
        assert process.wait(60) == code
        assert ("SIGUSR1 came before this command's first step" in process.stderr.read()) == (code == 75)


def test_a_watch_that_was_removed_ends_nothing(monkeypatch):
    monkeypatch.setattr(signals, "PATIENCE_SECONDS", 0.05)
    watch = SignalWatch()
    with watch.noting(worth_saving=False):
        send(SIGTERM)
    with watch.noting(worth_saving=False):  # whose descriptors may have the same numbers
        time.sleep(0.3)


def test_nobody_is_told_where_nobody_had_the_signal(watch):
    send(SIGUSR1)
    assert watch.earlier_handler() is None


ENDING = """
import os, signal, sys
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from types import SimpleNamespace
from longmix import cli
from longmix.errors import Interrupted

class Late:
    def __del__(self, kill=os.kill, own=os.getpid(), number=int(sys.argv[1])):
        kill(own, number)

os.late = Late()  # goes when Python takes modules apart, which has given the signals back by then
HydraConfig.get = lambda: SimpleNamespace(mode=RunMode.RUN, runtime=SimpleNamespace(output_dir="."))

@cli.entry_point
def task(config):
    raise Interrupted("saved.")

task(None)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("place", [{}, {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}])
def test_a_signal_on_the_way_out_leaves_the_exit_code(number, place, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ENDING, str(int(number))], env=os.environ | place, cwd=tmp_path, capture_output=True
    )
    assert (done.returncode, done.stderr) == (75, b"Interrupted: saved.\n")
