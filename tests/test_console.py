"""Output that cannot be written: the work goes on, and ends with its own exit code and without noise."""

import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longmix.console import protect_output

PROGRAM = """
import logging, sys
from longmix.console import is_gone, protect_output
protect_output()
from rich.console import Console
from rich.progress import track
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
for number in track(range(200), console=Console(stderr=True)):
    print("out", number, "x" * 500)
    print("err", number, "x" * 500, file=sys.stderr, flush=True)
    logging.info("log %s", number)
    Console(stderr=True).print("rich")
with open(sys.argv[1], "w") as stream:
    stream.write("done")
print("left in the buffer")
sys.exit(7)
"""


def run(redirections: str, folder: Path) -> tuple[subprocess.CompletedProcess, bool]:
    """The program under a shell's redirections, and whether its work was done."""
    folder.joinpath("program.py").write_text(PROGRAM)
    command = f"{{ {sys.executable} program.py result; echo $? >&3; }} 3>code {redirections}"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, timeout=550)
    return done, folder.joinpath("result").exists()


@pytest.mark.parametrize(
    "redirections",
    [
        "2>/dev/full",
        ">/dev/full",
        ">/dev/full 2>&1",
        "2>&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
        "| head -n 1 >/dev/null",
        "2>&1 | head -n 1 >/dev/null",
    ],
)
def test_work_goes_on_without_its_output(redirections, tmp_path):
    done, worked = run(redirections, tmp_path)
    assert worked
    assert tmp_path.joinpath("code").read_text() == "7\n"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Logging error" not in done.stderr
    assert tmp_path.joinpath("result").read_text() == "done"  # no message went into a file with its descriptor


def test_output_that_can_be_written_is_written(tmp_path):
    done, _ = run("", tmp_path)
    assert "left in the buffer" in done.stdout
    assert done.stdout.count("out ") == 200
    assert done.stderr.count("err ") == 200


def test_an_early_ctrl_c_and_an_early_signal_are_one_line(tmp_path):
    """Long before torch is imported, as the entry points' first line does it."""
    for resumable, number, code, text in [
        (False, "SIGINT", 130, "Interrupted.\n"),
        (False, "SIGTERM", 143, "Terminated.\n"),
        (True, "SIGINT", 75, "Interrupted: SIGINT came before this command's first step"),
        (True, "SIGTERM", 75, "Interrupted: SIGTERM came before this command's first step"),
        (True, "SIGUSR1", 75, "Interrupted: SIGUSR1 came before this command's first step"),
        (True, "SIGHUP", 75, "Interrupted: SIGHUP came before this command's first step"),
    ]:
        program = f"""
import os, signal, sys
from longmix import startup
startup.begin({resumable})
assert "torch" not in sys.modules
os.kill(os.getpid(), signal.{number})
raise ValueError("went on")
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr[: len(text)]) == (code, text)
        assert done.stderr.count("\n") == 1


def test_a_run_under_nohup_outlives_its_terminal():
    program = """
import os, signal
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from longmix import startup
startup.begin(True)
os.kill(os.getpid(), signal.SIGHUP)
"""
    assert subprocess.run([sys.executable, "-c", program], env=dict(os.environ), timeout=120).returncode == 0


def test_ctrl_c_that_python_drops_in_a_callback_ends_the_process():
    program = """
import os, signal, sys
from longmix import startup
startup.begin()
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(10_000):
            pass
x = Dropped()
del x
sys.exit(5)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (130, "Interrupted.\n")


def test_a_character_that_the_encoding_lacks_is_written_by_its_number(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(logging, "raiseExceptions", True)
    protect_output()
    print("тексты")
    print("after")
    sys.stdout.flush()
    assert written.getvalue().decode() == "\\u0442\\u0435\\u043a\\u0441\\u0442\\u044b\nafter\n"
