"""What the terminal shows while the model trains: a live bar, or plain lines where output goes to a file."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from longmix.metrics import Metrics


class ProgressDisplay:
    """Steps done, loss, tokens per second and time left.

    Args:
        total_steps: steps of the whole run.
        first_step: steps done before this process began.
        enabled: False on all processes but the first.
    """

    def __init__(self, total_steps: int, first_step: int, enabled: bool = True) -> None:
        self.total_steps, self.first_step = total_steps, first_step
        self.console = Console(stderr=True, quiet=not enabled)
        self.started = time.monotonic()
        self.bar: Progress | None = None

    def open(self) -> None:
        """Show the bar; without a terminal nothing is shown until the first line."""
        self.started = time.monotonic()
        if not self.console.is_terminal:
            return
        self.bar = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self.bar.add_task("training", total=self.total_steps, completed=self.first_step, figures="")
        self.bar.start()

    @property
    def is_live(self) -> bool:
        """Whether a bar is shown, which has something to say after each step."""
        return self.bar is not None

    def advance(self, step: int, loss: float, rate: float) -> None:
        """Move the bar by a step, with its loss and the tokens per second since the last figures."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step, figures=_figures(loss, rate))

    def show(self, step: int, metrics: Metrics) -> None:
        """Show new training figures: in the bar, or as a line without one."""
        if self.bar is None:
            figures = _figures(metrics["train/loss"], metrics["throughput/tokens_per_second"])
            if "train/recall" in metrics:
                figures += f"  recall {metrics['train/recall']:.3f}"
            self.console.print(f"step {step}/{self.total_steps}  {figures}  left {self._left(step)}", highlight=False)

    def message(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _left(self, step: int) -> str:
        done = max(1, step - self.first_step)
        return duration((time.monotonic() - self.started) / done * (self.total_steps - step))


def _figures(loss: float, rate: float) -> str:
    return f"loss {loss:.3f}  {rate:,.0f} tokens/s"


def duration(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
