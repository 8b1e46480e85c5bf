"""Turns a sharded checkpoint into a whole one."""

from pathlib import Path

from longmix.checkpoints.load import load_checkpoint
from longmix.checkpoints.verify import INFO_FILE, WHOLE, read_info
from longmix.checkpoints.whole import write_whole
from longmix.errors import ConfigError
from longmix.files import atomic_directory, write_json
from longmix.progress import bytes_bar


def consolidate(checkpoint: Path | str, target: Path | str) -> None:
    """Write the whole form of a sharded checkpoint, in one process; it takes as much memory as the state.

    Args:
        checkpoint: its folder, which stays.
        target: the folder to make, which is a checkpoint then.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: it is whole already, or the target is there.
        StorageError: the target cannot be written.
    """
    checkpoint, target = Path(checkpoint), Path(target)
    info = read_info(checkpoint)
    if info.get("format") == WHOLE:
        raise ConfigError(f"{checkpoint} is in one file already.")
    if target.exists():
        raise ConfigError(f"{target} is there already; give another folder.")
    state = load_checkpoint(checkpoint)
    about = {key: value for key, value in info.items() if key not in ("files", "processes")}
    size = sum(facts["bytes"] for facts in info["files"].values())
    with atomic_directory(target) as folder, bytes_bar(f"writing {target}", size) as advance:
        facts = write_whole(folder, state, advance)
        write_json(folder / INFO_FILE, about | {"format": WHOLE} | facts)
