"""Each script in examples/ as a process, with tiny sizes."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = [
    *("batch_size=2", "max_steps=2", "seq_len=16", "data.validation_tokens=256", "trainer=cpu"),
    *("model.num_layers=1", "model.d_model=32", "model.mlp_hidden=32"),
]
CASES = {
    "mixer_in_own_model.py": (False, ["loss ", "largest difference to decoding "]),
    "kernel_alone.py": (False, ["output [2, 256, 4, 64]", "largest difference in two parts "]),
    "train_load_generate.py": (True, ["bits per byte", "report: "]),
    "new_mixer.py": (True, ["recall ", "Loaded("]),
    "sweep_in_pandas.py": (True, ["validation.bits_per_byte", "retention"]),
}


def test_every_example_has_a_case():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_example_runs(name, tmp_path, shared_cache):
    takes_words, said = CASES[name]
    cache = [] if name == "new_mixer.py" else [f"data.cache_dir={shared_cache}"]
    words = [*TINY, *cache] if takes_words else []
    command = [sys.executable, str(EXAMPLES / name), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert [text for text in said if text not in done.stdout] == [], done.stdout
    for line in done.stdout.splitlines():
        if "largest difference" in line:
            assert float(line.split()[-1]) < 1e-4
