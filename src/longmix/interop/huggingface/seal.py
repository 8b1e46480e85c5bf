"""The seal of an exported folder: size and SHA-256 of its files in `longmix.json`, which show any change."""

import logging
from pathlib import Path
from typing import Any

from longmix.checkpoints.verify import facts_of, reason_of
from longmix.errors import CheckpointError
from longmix.files import sha256_of_json
from longmix.interop.huggingface.folder import OWN_FILE
from longmix.reading import read_json, require_regular

MARK = {"exported_by": "longmix"}
"""In `config.json`: tells an exported folder that has lost its `longmix.json` from another's."""

UNREAD = ("README.md", OWN_FILE)
OWN_HASH = "own_sha256"
CURE = f"Export the folder again; or delete {OWN_FILE} to read the other files as they stand."

logger = logging.getLogger(__name__)


def sealed(folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """`about` with the facts of all files of a folder, and with its own hash."""
    files = {path.name: facts_of(path) for path in sorted(folder.iterdir()) if path.name not in UNREAD}
    content = {**about, "files": files}
    return {**content, OWN_HASH: sha256_of_json(content)}


def check_seal(folder: Path) -> None:
    """Refuse an exported folder with a file that is not, byte for byte, the one that was written.

    A folder without `longmix.json` is another's, and nothing is known of its files. One that an earlier version
    exported, or that has lost its `longmix.json`, is read with a warning.

    Args:
        folder: to look at.

    Raises:
        CheckpointError: names the file.
    """
    own = folder / OWN_FILE
    if not own.exists():
        if _is_marked(folder / "config.json"):
            logger.warning(
                "%s was exported by longmix and has lost its %s: nothing tells whether its files are as they were, and "
                "it is read like any other model's folder.",
                folder,
                OWN_FILE,
            )
        return
    content = _read(own)
    files, found = content.get("files"), content.pop(OWN_HASH, None)
    if files is None and found is None and not _is_marked(folder / "config.json"):
        logger.warning("%s holds no SHA-256, as earlier versions wrote it; damage would go unnoticed.", own)
        return
    if found != sha256_of_json(content) or not isinstance(files, dict):
        raise CheckpointError(f"{own} is damaged: its content does not have the SHA-256 it names. {CURE}")
    for name, facts in files.items():
        _check(folder / Path(name).name, facts)


def _check(path: Path, facts: Any) -> None:
    try:
        require_regular(path)
        found = facts_of(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason_of(error)}. {CURE}") from error
    if found != facts:
        raise CheckpointError(f"{path} is not the file that was exported: {OWN_FILE} names another SHA-256. {CURE}")


def _is_marked(config: Path) -> bool:
    try:
        return MARK.items() <= read_json(config).items()
    except (OSError, ValueError, TypeError):
        return False


def _read(own: Path) -> dict[str, Any]:
    try:
        return read_json(own)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{own} cannot be read: {reason_of(error)}. {CURE}") from error
