"""Train a language model.

python train.py mixer=flash seq_len=16384     `python train.py -h` lists the words, `--cfg job` prints every setting.
"""

from longmix import startup

if __name__ == "__main__":
    startup.begin(resumable=True)  # before the imports, which take seconds

import hydra
from omegaconf import DictConfig

from longmix import cli
from longmix.distributed.signals import resumable

cli.register()


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@cli.entry_point
@resumable
def main(config: DictConfig) -> float | None:
    """Check the configuration, then train; the validation loss is what a sweep's search makes small."""
    from longmix.allocation import allocation_errors  # torch and lightning take seconds to import
    from longmix.training.run import train

    cure = "make seq_len, batch_size or the model smaller, or trainer.micro_batch_size."
    with allocation_errors("training", cure):
        return train(config).get("validation", {}).get("loss")


if __name__ == "__main__":
    cli.run(main, "train")
