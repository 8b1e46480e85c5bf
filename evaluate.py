"""Evaluate a checkpoint.

python evaluate.py checkpoint=runs/NAME     `python evaluate.py -h` lists the words.
"""

import hydra
from omegaconf import DictConfig

from longmix import cli

cli.register()


@hydra.main(version_base="1.3", config_path="configs", config_name="evaluate")
@cli.entry_point
def main(config: DictConfig) -> None:
    """Rebuild the model from the checkpoint alone, then run the tasks."""
    from longmix.evaluation.run import evaluate  # torch takes seconds to import

    evaluate(config)


if __name__ == "__main__":
    main()
