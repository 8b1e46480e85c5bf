"""Work that several processes do together: it succeeds in all, or the same error is raised in all."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from longmix.errors import LongmixError, StorageError
from longmix.files import refusal_of

Result = TypeVar("Result")
Failure = tuple[type[Exception], str]


class Processes:
    """The processes that read or write a checkpoint together.

    Args:
        group: a gloo group that nothing else uses meanwhile; None for one process.

    Attributes:
        rank, size: of this process in the group, and of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that does the work of one, such as writing."""
        return self.rank == 0

    def each(self, work: Callable[[], Result]) -> list[Result]:
        """Run `work` in each process and return all results by rank; all processes must call it.

        Raises:
            LongmixError, OSError, RuntimeError: the error of the lowest rank that had one, in every process; an OSError
                and a RuntimeError name the rank.
        """
        if self.group is None:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, (result, None if error is None else self._failure(error)), group=self.group)
        for _, failure in answers:
            if failure is not None:
                kind, text = failure
                raised: Any = kind(text)
                raised.shared = True
                raise raised from error
        return [result for result, _ in answers]

    def first(self, work: Callable[[], Result]) -> Result:
        """Run `work` in the first process and return its result in all of them; raises what `each` does."""
        return self.each(lambda: work() if self.is_first else None)[0]  # type: ignore[return-value]

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, StorageError | RuntimeError):
            error = refusal_of(error) or error  # whoever writes says it again, with the rank
        if isinstance(error, LongmixError):
            return type(error), str(error)
        if isinstance(error, OSError):
            return OSError, f"rank {self.rank}: {error.strerror or error}"
        return RuntimeError, f"rank {self.rank}: {type(error).__name__}: {error}"
