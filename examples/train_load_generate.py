"""Train, load, generate and evaluate from Python: python examples/train_load_generate.py [WORD=VALUE...]."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import longmix

WORDS = ["mixer=gated_deltanet", "seq_len=256", "max_steps=100", "logger=none", *sys.argv[1:]]

if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        run = longmix.train(WORDS, folder=Path(folder) / "first")
        print(f"validation: {run.summary['validation']['bits_per_byte']:.3f} bits per byte")

        model = longmix.load(run.folder)
        for text in model.generate("Fellow citizens", max_tokens=32, temperature=0.8, samples=2):
            print(repr(text))
        report = model.evaluate(task="loss", max_tokens=1024)
        print("report:", ", ".join(report))
