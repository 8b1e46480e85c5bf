"""The wheel: built from the source distribution, installed into an empty environment, and used in another folder."""

import email
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import longmix

ROOT = Path(__file__).parents[1]
TRAINED = ("max_steps=3", "batch_size=1", "seq_len=64", "model.num_layers=1", "model.d_model=32", "model.mlp_hidden=32")
WORDS = (*TRAINED, "logger=csv", "trainer=cpu", "data.cache_dir=cache", "data.validation_tokens=256", "name=first")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(*command: str | Path, folder: Path) -> str:
    """What a process printed that ended well, with nothing of this checkout on its path."""
    left_out = ("PYTHONPATH", "PYTHONHOME", "COLUMNS", "VIRTUAL_ENV")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", out, folder=ROOT)
    source = next(out.glob("*.tar.gz"))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", out, source, folder=out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def command(tmp_path_factory, wheel) -> Path:
    """The console command of an environment that has the wheel, and what it depends on from this environment."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", home / "bin" / "python")
    run(*pip, "install", "--no-deps", "--no-index", wheel, folder=home)
    packages = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    own = next((home / "lib").glob("*/site-packages"))
    (own / "dependencies.pth").write_text("\n".join(packages) + "\n")
    return home / "bin" / "longmix"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, command) -> Path:
    """A folder with a run of three steps in it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    run(command, "train", *WORDS, folder=folder)
    return folder


@pytest.mark.slow
def test_it_carries_configurations_types_licence_and_metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        head = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(head))
        entries = archive.read(head.replace("METADATA", "entry_points.txt")).decode()
    configs = {f"longmix/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= names
    assert {"longmix/py.typed", "longmix_kernels/py.typed"} <= names
    assert head.replace("METADATA", "licenses/LICENSE") in names
    assert metadata["Version"] == longmix.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"] == "The longmix authors"
    assert "longmix = longmix.__main__:main" in entries
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "examples/"))]


@pytest.mark.slow
def test_what_runs_is_what_was_installed(command, tmp_path):
    assert run(command, "--version", folder=tmp_path).startswith(f"longmix {longmix.__version__} (torch")
    code = "import longmix, longmix_kernels; print(longmix.__file__, longmix_kernels.__file__)"
    for file in run(command.parent / "python", "-c", code, folder=tmp_path).split():
        assert Path(file).is_relative_to(command.parents[1])
    assert "longmix train mixer=flash" in run(command, "train", "-h", folder=tmp_path)


@pytest.mark.slow
def test_trains_evaluates_generates_and_reports_in_another_folder(command, trained):
    assert (trained / "runs/first/summary.json").is_file()
    assert "bits" in run(command, "evaluate", "checkpoint=runs/first", "max_tokens=128", folder=trained)
    assert (trained / "runs/first/evaluation").is_dir()
    words = ("checkpoint=runs/first", "prompt=Fellow", "max_tokens=4", "temperature=0")
    assert run(command, "generate", *words, folder=trained)
    assert "first" in run(command, "report", "runs", "output=compared", folder=trained)
    assert (trained / "compared/report.html").is_file()


@pytest.mark.slow
def test_plans(command, trained):
    assert "1,272,448 parameters" in run(command, "plan", "seq_len=64", "gpu=cpu", folder=trained)


@pytest.mark.slow
def test_trains_on_two_devices_by_its_own_launcher_and_consolidates(command, trained):
    words = [word for word in WORDS if not word.startswith(("trainer=", "batch_size=", "name="))]
    two = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "batch_size=2", "name=two")
    run(command, "train", *words, *two, "loop.sharded_checkpoints=true", folder=trained)
    assert (trained / "runs/two/summary.json").is_file()
    assert "wrote" in run(command, "consolidate", "runs/two", "output=whole", folder=trained)
    assert (trained / "whole").is_dir()
