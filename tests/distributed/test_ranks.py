import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longmix.distributed.ranks import LAUNCHER_PID, Ranks, own_ranks, process_rank, was_restarted
from longmix.errors import ConfigError
from longmix.training.hardware import TrainerSettings

TORCHRUN = {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}
SRUN = {"SLURM_PROCID": 5, "SLURM_STEP_NUM_TASKS": 8, "SLURM_LOCALID": 1, "SLURM_NTASKS_PER_NODE": 4}
BATCH_SCRIPT = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 8, "SLURM_NTASKS_PER_NODE": 4}


@pytest.fixture
def environment(monkeypatch):
    def set_variables(**variables: int) -> None:
        for name in (*TORCHRUN, *SRUN, *BATCH_SCRIPT, LAUNCHER_PID, "TORCHELASTIC_RESTART_COUNT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    set_variables()
    return set_variables


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, None),
        (TORCHRUN, Ranks(5, 8, 1, 4, "torchrun")),
        (TORCHRUN | {LAUNCHER_PID: 1}, Ranks(5, 8, 1, 4, "longmix")),
        (SRUN, Ranks(5, 8, 1, 4, "srun")),
        (SRUN | TORCHRUN | {"RANK": 2}, Ranks(2, 8, 1, 4, "torchrun")),
        (SRUN | {"SLURM_STEP_NUM_TASKS": 1}, None),
        (BATCH_SCRIPT, None),
        ({"RANK": 1, "WORLD_SIZE": 2}, None),
    ],
    ids=["alone", "torchrun", "longmix", "srun", "torchrun-in-a-task", "one-task", "batch-script", "others"],
)
def test_the_place_is_what_the_launcher_says(variables, ranks, environment):
    environment(**variables)
    assert own_ranks() == ranks
    assert process_rank() == (0 if ranks is None else ranks.rank)


def test_tasks_without_a_number_for_each_machine_are_refused(environment):
    environment(**{name: value for name, value in SRUN.items() if name != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(ConfigError, match="--ntasks-per-node"):
        own_ranks()


@pytest.mark.parametrize(
    ("variables", "again"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": 0}, False),
        ({"TORCHELASTIC_RESTART_COUNT": 1}, True),
        ({"SLURM_RESTART_COUNT": 2}, True),
    ],
)
def test_a_restart_is_what_the_launcher_counts(variables, again, environment):
    environment(**variables)
    assert was_restarted() == again


@pytest.mark.parametrize("variables", [TORCHRUN, SRUN], ids=["torchrun", "srun"])
def test_the_launcher_says_how_many_processes_there_are(variables, environment):
    environment(**variables)
    settings = TrainerSettings(accelerator="cpu", strategy="ddp", context_parallel=None)
    assert (settings.devices_here, settings.world_size, settings.slices) == (4, 8, 8)
    settings = TrainerSettings(accelerator="cpu", strategy="ddp", devices=4, num_nodes=2)
    assert (settings.devices_here, settings.world_size) == (4, 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"strategy": "single"}, "8 processes were started, and trainer.strategy=single"),
        ({"strategy": "ddp", "devices": 2}, "8 processes were started, but trainer.devices=2"),
    ],
)
def test_settings_that_do_not_fit_the_launcher_are_refused(words, message, environment):
    environment(**TORCHRUN)
    with pytest.raises(ConfigError, match=message):
        TrainerSettings(accelerator="cpu", **words)


PARENT = """
import os, subprocess, sys, time
child = "from longmix.distributed.ranks import end_with_parent; end_with_parent(); print(); import time; time.sleep(60)"
environment = os.environ | {"LONGMIX_LAUNCHER_PID": sys.argv[1] if sys.argv[1:] else str(os.getpid())}
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, env=environment)
process.stdout.readline()
print(process.pid, flush=True)
sys.exit(process.wait()) if sys.argv[1:] else time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_a_process_ends_with_the_one_that_started_it():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = Path(f"/proc/{parent.stdout.readline().strip()}/stat")
    assert child.exists()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_process_that_lost_its_launcher_does_not_begin():
    done = subprocess.run([sys.executable, "-c", PARENT, str(os.getpid())], capture_output=True, text=True)
    assert f"ProcessLost: process {os.getpid()}, which started this one, is gone." in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(("variables", "code"), [(TORCHRUN, 0), (TORCHRUN | {LAUNCHER_PID: 1}, 0), (SRUN, 1), ({}, 1)])
def test_who_is_waited_for_ends_before_anything_can_abort_it(variables, code, environment):
    environment(**variables)
    words = "import atexit, sys; from longmix.distributed.ranks import leave; atexit.register(print, 'closed', end='')"
    done = subprocess.run([sys.executable, "-c", f"{words}; leave(); sys.exit(1)"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "closed")


def test_a_process_that_has_lost_another_ends_at_once(compose_config, monkeypatch, tmp_path):
    """The interpreter's own way out takes seconds then, in gloo's threads."""
    from longmix import cli
    from longmix.errors import ProcessLost

    monkeypatch.chdir(tmp_path)
    config = compose_config()
    left = []
    monkeypatch.setattr(cli, "leave", left.append)

    def task(_):
        raise ProcessLost("another process is gone")

    with pytest.raises(SystemExit) as ended:
        cli.entry_point(task)(config)
    assert left == [ended.value.code] == [ProcessLost.exit_code]
