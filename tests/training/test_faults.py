"""A fault in one of several processes: all end with one message, or go on, and nothing that was saved is lost."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import faulty
import pytest
import torch
from launched import free_port, together, torchrun_places

from longmix.checkpoints import CheckpointStore, load_checkpoint
from longmix.errors import Interrupted, NonFiniteError, ProcessLost, StorageError

FAULTY = Path(faulty.__file__)
FAKE_SLURM = FAULTY.parent / "fake_slurm"
SETTINGS = [
    "mixer=flash",
    "model.num_layers=1",
    "model.d_model=32",
    "model.mlp_hidden=32",
    "seq_len=64",
    "batch_size=2",
    "trainer.accelerator=cpu",
    "trainer.num_threads=1",
    "max_steps=8",
    "loop.log_every=1",
    "loop.validate_every=4",
    "loop.checkpoint_every=3",
    "data.validation_tokens=256",
    "logger=csv",
]
STRATEGIES = {
    "ddp": ["trainer=ddp"],
    "fsdp": ["trainer=fsdp"],
    "slices": ["trainer=context_parallel"],
    "fsdp-of-slices": ["trainer=context_parallel", "trainer.strategy=fsdp"],
}


@pytest.fixture(scope="module")
def words(shared_cache) -> list[str]:
    return [*SETTINGS, f"data.cache_dir={shared_cache}"]


@pytest.fixture
def run(words, tmp_path):
    """`run("kill:1", "trainer=ddp", ...)`: two processes as torchrun starts them, and what became of them."""

    def begin(fault: str, *more: str, size=2, ends=None, folder=tmp_path, places=None) -> list:
        places = torchrun_places(size) if places is None else places
        return together([*words, "name=run", *more], folder, [{**place, "FAULT": fault} for place in places], ends)

    return begin


@pytest.fixture(scope="module")
def straight(words, tmp_path_factory) -> Path:
    """The folder of a run that met no fault."""
    folder = tmp_path_factory.mktemp("straight")
    codes = [end.code for end in two_processes([*words, "trainer=ddp"], folder, "")]
    assert codes == [0, 0], (folder / "0.txt").read_text()
    return folder


@pytest.fixture(scope="module")
def killed_run(words, tmp_path_factory) -> Path:
    """The folder of a run of which the second process was killed."""
    folder = tmp_path_factory.mktemp("killed")
    codes = [end.code for end in two_processes([*words, "trainer=ddp"], folder, "kill:1")]
    assert codes == [ProcessLost.exit_code, -9], (folder / "0.txt").read_text()
    return folder


@pytest.fixture
def killed(killed_run, tmp_path) -> Path:
    """The same for this test alone."""
    return shutil.copytree(killed_run, tmp_path, dirs_exist_ok=True)


def two_processes(words: list[str], folder: Path, fault: str) -> list:
    return together([*words, "name=run"], folder, [{**place, "FAULT": fault} for place in torchrun_places(2)])


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in CheckpointStore(folder / "runs/run/checkpoints").all()]


def assert_same_model(ours: Path, theirs: Path) -> None:
    ours, theirs = (load_checkpoint(path / "checkpoints/step-00000008") for path in (ours, theirs))
    assert ours["step"] == theirs["step"] == 8
    for name, weight in theirs["model"].items():
        assert torch.equal(ours["model"][name], weight), name
    for one, other in zip(ours["optimizers"], theirs["optimizers"], strict=True):
        for key, values in other["state"].items():
            for name, value in values.items():
                assert torch.equal(torch.as_tensor(one["state"][key][name]), torch.as_tensor(value)), (key, name)


def message(text: str) -> str:
    """The one line that tells the user what went wrong; there is no traceback."""
    lines = says_anything(text)
    assert len(lines) == 1, text
    return lines[0]


def says_anything(text: str) -> list[str]:
    """Lines about errors in what a process wrote."""
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if re.match(r"(\w+Error|ProcessLost|Interrupted): ", line)]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "dead"), [("ddp", 0), ("fsdp-of-slices", 1)])
def test_the_others_end_when_one_is_killed(strategy, dead, run, tmp_path):
    ended = run(f"kill:{dead}", *STRATEGIES[strategy])
    assert ended[dead].code == -9
    alive = ended[1 - dead]
    assert alive.code == ProcessLost.exit_code
    assert f"process {1 - dead} of 2: another process is gone" in message(alive.text)
    assert "runs/run/checkpoints/step-00000003; run the same command with resume=auto" in message(alive.text)
    assert checkpoints(tmp_path) == ["step-00000003"]


@pytest.mark.slow
def test_a_run_of_which_one_was_killed_ends_like_one_that_was_not(killed, run, straight):
    assert checkpoints(killed) == ["step-00000003"]
    assert [end.code for end in run("", "trainer=ddp", "resume=auto")] == [0, 0]
    assert_same_model(killed / "runs/run", straight / "runs/run")


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "silent"), [("ddp", 1), ("fsdp", 0), ("slices", 1)])
def test_the_others_end_when_one_stalls_for_longer_than_the_timeout(strategy, silent, run, tmp_path):
    ended = run(f"stop:{silent}", *STRATEGIES[strategy], "trainer.timeout=10", ends=1)
    assert ended[silent] is None
    alive = ended[1 - silent]
    assert alive.code == ProcessLost.exit_code
    assert "another process gave no sign for trainer.timeout=10 seconds" in message(alive.text)
    assert "resume=auto" in message(alive.text)
    assert checkpoints(tmp_path) == ["step-00000003"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "where", "strategy"),
    [
        ("nan-output", "the output of blocks.0.mlp.down in the forward pass", "ddp"),
        ("nan-output", "the output of blocks.0.mlp.down in the forward pass", "fsdp-of-slices"),
        ("nan-gradient", "the gradient through blocks.0.mlp.down in the backward pass", "fsdp"),
        ("nan-gradient", "the gradient of blocks.0.mlp.down.weight in the backward pass", "slices"),
    ],
)
def test_nan_in_one_process_stops_all_in_the_same_step_and_is_found(fault, where, strategy, run, tmp_path):
    ended = run(f"{fault}:1", *STRATEGIES[strategy], "batch_size=4", "trainer.micro_batch_size=1")
    assert [end.code for end in ended] == [NonFiniteError.exit_code] * 2
    assert f"step 6 gave a loss of {'nan' if fault == 'nan-output' else ''}" in message(ended[0].text)
    assert f"First non-finite: {where}, on process 1." in message(ended[0].text)
    assert not says_anything(ended[1].text)
    assert checkpoints(tmp_path) == ["step-00000003"]


@pytest.mark.slow
def test_a_step_that_is_nan_in_one_process_is_left_out_by_all(run, tmp_path):
    ended = run("nan-output:1", "trainer=ddp", "loop.nonfinite=skip")
    assert [end.code for end in ended] == [0, 0], ended[0].text
    first, second = (re.findall(r"^weights .*", end.text, re.MULTILINE) for end in ended)
    assert len(first) == 1
    assert first == second
    state = load_checkpoint(tmp_path / "runs/run/checkpoints/step-00000008")
    assert state["steps_skipped"] == 1
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


@pytest.mark.slow
def test_a_state_that_is_infinite_in_one_process_is_saved_by_none(run, tmp_path):
    ended = run("inf-state:1", "trainer=ddp", "optimizer=adamw")
    assert [end.code for end in ended] == [NonFiniteError.exit_code] * 2, ended[0].text + ended[1].text
    assert "after step 6, exp_avg_sq of the weight" in message(ended[0].text)
    assert "in the optimizer on process 1 is not finite, and no checkpoint was written." in message(ended[0].text)
    assert "step-00000003; run the same command with resume=auto" in message(ended[0].text)
    assert not says_anything(ended[1].text)
    assert checkpoints(tmp_path) == ["step-00000003"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "slices"])
def test_a_signal_to_one_process_ends_the_last_validation_of_all(strategy, run, tmp_path, straight):
    ended = run("signalled-in-the-last-validation:1", *STRATEGIES[strategy], "data.validation_tokens=2048")
    assert [end.code for end in ended] == [Interrupted.exit_code] * 2, ended[0].text + ended[1].text
    assert "SIGTERM ended the run, before its last validation was done" in ended[0].text
    assert not says_anything(ended[1].text.replace("asked", ""))
    assert re.findall(r"asked \d+", ended[1].text) == ["asked 1", "asked 2"]  # of more batches
    assert checkpoints(tmp_path)[-1] == "step-00000008"
    ended = run("", *STRATEGIES[strategy], "data.validation_tokens=2048", "resume=auto")
    assert [end.code for end in ended] == [0, 0], ended[0].text
    assert "steps    8 to 8" in ended[0].text
    assert "validation loss" in ended[0].text
    assert (tmp_path / "runs/run/summary.json").exists()


@pytest.mark.slow
def test_a_signal_before_the_first_step_of_several_processes(run, tmp_path):
    ended = run("signalled-in-the-data:all", "trainer=ddp")
    assert [end.code for end in ended] == [Interrupted.exit_code] * 2, ended[0].text + ended[1].text
    assert "SIGTERM came before this command's first step; nothing was lost" in message(ended[0].text)
    assert not says_anything(ended[1].text)
    assert "Traceback" not in ended[0].text + ended[1].text
    assert checkpoints(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "full", "more"),
    [
        ("ddp", 0, []),
        ("ddp", 1, ["loop.sharded_checkpoints=true"]),
        ("fsdp", 1, ["loop.async_checkpoints=true"]),
    ],
    ids=["ddp-first", "ddp-sharded", "fsdp-async"],
)
def test_a_full_disk_in_one_process_ends_all_and_keeps_what_was_saved(strategy, full, more, run, tmp_path):
    ended = run(f"full-disk:{full}", *STRATEGIES[strategy], *more)
    assert [end.code for end in ended] == [StorageError.exit_code] * 2, ended[0].text + ended[1].text
    assert "step-00000006" in message(ended[0].text)
    assert f"rank {full}: File too large" in message(ended[0].text)
    assert not says_anything(ended[1].text)
    assert checkpoints(tmp_path) == ["step-00000003"]


@pytest.mark.slow
def test_all_processes_start_where_the_first_decides(killed, run):
    """Each has a folder with the time it began in its name, and the second would find nothing to continue."""
    own = [
        {**place, "OWN_WORDS": f"name='${{now:%Y}}_{folder}'"}
        for place, folder in zip(torchrun_places(2), ["later", "second"], strict=True)
    ]
    ended = run("", "trainer=ddp", "resume=auto", places=own)
    assert [end.code for end in ended] == [0, 0], ended[1].text
    assert "steps    3 to 8" in ended[0].text
    assert [path.name for path in (killed / "runs").iterdir()] == ["run"]


@pytest.mark.slow
def test_an_error_of_all_is_said_once(killed, run):
    ended = run("", "trainer=ddp")
    assert [end.code for end in ended] == [2, 2]
    assert "already holds a run (step-00000003)" in message(ended[0].text)
    assert not says_anything(ended[1].text)


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_processes(killed, run, straight):
    ended = run("", "trainer=ddp", "resume=auto", size=1)
    assert [end.code for end in ended] == [0], ended[0].text
    assert "steps    3 to 8" in ended[0].text
    ours, theirs = (load_checkpoint(path / "runs/run/checkpoints/step-00000008") for path in (killed, straight))
    for name, weight in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], weight, rtol=1e-4, atol=1e-6)


def srun_places(size: int) -> list[dict[str, str]]:
    same = {
        "SLURM_NTASKS": size,
        "SLURM_STEP_NUM_TASKS": size,
        "SLURM_NTASKS_PER_NODE": size,
        "SLURM_NNODES": 1,
        "SLURM_NODEID": 0,
        "SLURM_JOB_ID": 4711,
        "MASTER_PORT": free_port(),  # Slurm's would be 15000 and the last digits of the job's number
    }
    texts = {"SLURM_NODELIST": "localhost", "SLURM_JOB_NAME": "longmix"}
    ranks = ({"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in range(size))
    return [{name: str(number) for name, number in (same | rank).items()} | texts for rank in ranks]


@pytest.mark.slow
def test_tasks_of_srun_save_and_go_on_when_slurm_runs_them_again(run, tmp_path, straight):
    ended = run("sigusr1:1", "trainer=ddp", places=srun_places(2))
    assert [end.code for end in ended] == [Interrupted.exit_code] * 2, ended[0].text + ended[1].text
    assert "SIGUSR1 ended the run after step 6 of 8" in ended[0].text
    assert not says_anything(ended[1].text)
    assert checkpoints(tmp_path) == ["step-00000003", "step-00000006"]
    again = [{**place, "SLURM_RESTART_COUNT": "1"} for place in srun_places(2)]
    ended = run("", "trainer=ddp", places=again)
    assert [end.code for end in ended] == [0, 0], ended[0].text
    assert "steps    6 to 8" in ended[0].text
    assert_same_model(tmp_path / "runs/run", straight / "runs/run")


@pytest.mark.slow
def test_who_had_the_signal_before_is_told_once_the_state_is_saved(run, tmp_path):
    ended = run("sigusr2:all", "trainer=ddp")
    assert [end.code for end in ended] == [0, 0]
    for end in ended:
        assert "handed on SIGUSR2 with ['step-00000003', 'step-00000006']" in end.text
    assert ended[0].text.index("SIGUSR2 ended the run after step 6") < ended[0].text.index("handed on")


def environment(**more: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | more


@pytest.mark.slow
def test_the_process_that_the_user_started_says_who_was_killed(words, tmp_path):
    command = [sys.executable, str(FAULTY), *words, "trainer=ddp", "trainer.devices=2", "name=run"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(FAULT="kill:0"), capture_output=True, text=True, timeout=550
    )
    assert done.returncode == ProcessLost.exit_code, done.stderr
    text = message(done.stderr)
    assert "ProcessLost: process 0 of 2 (pid " in text
    assert "was killed by SIGKILL" in text
    assert "runs/run/checkpoints/step-00000003; run the same command with resume=auto to continue." in text
    assert not [path for path in Path("/proc").glob("[0-9]*") if started_in(path, tmp_path)]


def started_in(process: Path, folder: Path) -> bool:
    try:
        return process.joinpath("cwd").resolve() == folder.resolve()
    except OSError:
        return False


@pytest.mark.slow
def test_torchrun_restarts_all_and_the_run_ends_as_if_none_was_killed(words, tmp_path, straight):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    done = subprocess.run(
        [*command, str(FAULTY), *words, "trainer=ddp", "resume=auto"],
        cwd=tmp_path,
        env=environment(FAULT="kill-once:1"),
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stderr
    assert "steps    0 to 8" in done.stderr + done.stdout
    assert "steps    3 to 8" in done.stderr + done.stdout
    (folder,) = (path.parent for path in tmp_path.glob("runs/*/checkpoints"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [folder.name]
    assert_same_model(folder, straight / "runs/run")


def slurm_environment(folder: Path, number: str) -> dict[str, str]:
    """srun, sbatch, scontrol and sacct that do what Slurm's do, as far as a run can tell."""
    (folder / "slurm").mkdir()
    path = f"{FAKE_SLURM}{os.pathsep}{os.environ['PATH']}"
    return environment(PATH=path, FAKE_SLURM=str(folder / "slurm"), FAKE_SIGNAL=number)


LONGER = ["max_steps=120", "loop.checkpoint_every=10", "loop.validate_every=100", "loop.log_every=20"]


def assert_requeued_and_went_on(folder: Path) -> None:
    assert (folder / "slurm/scontrol.log").read_text() == "scontrol requeue 4711\n"
    log = (folder / "slurm/task0.log").read_text()
    stopped = re.search(r"Interrupted: SIGUSR\d ended the run after step (\d+) of 120", log)
    assert stopped is not None, log
    assert f"steps    {stopped[1]} to 120" in log
    (found,) = folder.glob("**/checkpoints/step-00000120")
    assert load_checkpoint(found)["step"] == 120


@pytest.mark.slow
def test_a_batch_script_puts_a_run_that_was_told_to_end_back_into_the_queue(words, tmp_path):
    command = shlex.join([sys.executable, str(faulty.TRAIN), *words, *LONGER, "trainer=ddp", "resume=auto"])
    script = tmp_path / "train.sbatch"
    script.write_text(
        "#!/bin/bash\n"
        "#SBATCH --ntasks-per-node=2 --requeue --signal=USR1@120\n"
        f"srun {command}\n"
        "[ $? -eq 75 ] && scontrol requeue $SLURM_JOB_ID\n"
    )
    subprocess.run(
        ["sbatch", str(script)], cwd=tmp_path, env=slurm_environment(tmp_path, "USR1"), check=True, capture_output=True
    )
    deadline = time.monotonic() + 550
    while not (tmp_path / "slurm/over").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert_requeued_and_went_on(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="needs the extra `slurm`")
def test_submitit_puts_a_run_of_a_sweep_back_into_the_queue(words, tmp_path):
    launcher = ["-m", "hydra/launcher=slurm", "hydra.launcher.tasks_per_node=2", "hydra.launcher.gpus_per_node=null"]
    command = [sys.executable, str(faulty.TRAIN), *launcher, *words, *LONGER, "trainer=ddp"]
    done = subprocess.run(
        command, cwd=tmp_path, env=slurm_environment(tmp_path, "USR2"), capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr
    assert_requeued_and_went_on(tmp_path)
