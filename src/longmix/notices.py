"""longmix's own warnings: one line on the terminal, once a run instead of once a layer or process.

Nothing heavy is imported here. Where longmix is used as a library, they are Python warnings like any other.
"""

import sys
import warnings
from typing import Any

from longmix.printable import printable


class LongmixWarning(UserWarning):
    """A setting that works but is probably not what was wanted; the message names it and the cure.

    Attributes:
        one_line: what tells longmix's own warnings from those of libraries; the kernels' package, which stands alone,
            has it in its own.
    """

    one_line = True


_said: set[str] = set()
"""Messages that this run has shown."""


def notice(message: str) -> None:
    """Warn of a setting.

    Args:
        message: one line that names the setting and the cure.
    """
    warnings.warn(message, LongmixWarning, stacklevel=3)


def notice_float32_on_gpu(setting: str, instead: str) -> None:
    """Warn of a precision that was asked for on a GPU, where nothing chooses it by itself.

    Args:
        setting: the words that ask for it.
        instead: the words to give.
    """
    message = (
        f"{setting} on a GPU: longmix's float32 kernels leave tensor cores unused; they are slow, and meant for checks."
        f" Give {instead}, which keeps weights, gates and states in float32."
    )
    warnings.warn(message, LongmixWarning, stacklevel=3)


def begin_run() -> None:
    """Begin another run: every message may be shown again."""
    _said.clear()


def show_in_one_line() -> None:
    """Show longmix's own warnings without file and line; those of libraries stay as Python shows them."""
    show = warnings.showwarning

    def showwarning(message: Any, category: type[Warning], *where: Any, **options: Any) -> None:
        if not getattr(category, "one_line", False):
            show(message, category, *where, **options)
        elif str(message) not in _said:
            _said.add(str(message))
            if _is_first_process():
                print(f"Warning: {printable(message)}", file=sys.stderr)

    warnings.showwarning = showwarning
    warnings.simplefilter("always", LongmixWarning, append=True)  # _said knows better than Python what was shown


def _is_first_process() -> bool:
    from longmix.distributed.ranks import process_rank

    return process_rank() == 0
