"""Make token files.

python prepare.py data=...     `python prepare.py -h` lists the words.
"""

from longmix import startup

if __name__ == "__main__":
    startup.begin()  # before the imports, which take seconds

import hydra
from omegaconf import DictConfig

from longmix import cli

cli.register()


@hydra.main(version_base="1.3", config_path="configs", config_name="prepare")
@cli.entry_point
def main(config: DictConfig) -> None:
    """Tokenise every split that is not in the cache."""
    from longmix.data.prepare_run import prepare_splits

    prepare_splits(config)


if __name__ == "__main__":
    cli.run(main, "prepare")
