"""Evaluate a checkpoint.

python evaluate.py checkpoint=runs/NAME     `python evaluate.py -h` lists the words.
"""

from longmix import startup

if __name__ == "__main__":
    startup.begin()  # before the imports, which take seconds

import hydra
from omegaconf import DictConfig

from longmix import cli

cli.register()


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
@cli.entry_point
def main(config: DictConfig) -> None:
    """Rebuild the model from the checkpoint alone, or one after the other those of a sweep, then run the tasks."""
    from longmix.evaluation.sweep import evaluate_all  # torch takes seconds to import

    evaluate_all(config)


if __name__ == "__main__":
    cli.run(main, "evaluate")
