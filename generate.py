"""Generate text from a checkpoint.

python generate.py checkpoint=runs/NAME prompt="..."     `python generate.py -h` lists the words.
"""

from longmix import startup

if __name__ == "__main__":
    startup.begin()  # before the imports, which take seconds

import hydra
from omegaconf import DictConfig

from longmix import cli

cli.register()


@hydra.main(version_base="1.3", config_path="configs", config_name="generate")
@cli.entry_point
def main(config: DictConfig) -> None:
    """Rebuild the model from the checkpoint alone, read the prompt, and write on."""
    from longmix.generation.run import generate  # torch takes seconds to import

    generate(config)


if __name__ == "__main__":
    cli.run(main, "generate")
