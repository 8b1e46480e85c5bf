"""The shared beginning of all commands: words for Hydra, help, one-line errors, exit codes. Imports nothing heavy."""

import contextlib
import functools
import importlib.metadata
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra._internal.hydra as hydra_commands
import hydra._internal.utils as hydra_utils
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException, HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from longmix.allocation import allocation_errors
from longmix.command_line import values
from longmix.command_line.explain import explained, misformed, wrong_sweep
from longmix.command_line.help import help_text, version_text
from longmix.command_line.program import as_called
from longmix.command_line.register import file_name as file_name
from longmix.command_line.register import register_types as register_types
from longmix.command_line.register import windows as windows
from longmix.command_line.schema import Schema, configs_folder
from longmix.command_line.search_path import without_repetition
from longmix.command_line.words import Word, divided, is_sweep
from longmix.distributed.ranks import leave, own_ranks, process_rank
from longmix.distributed.signals import ignore_signals
from longmix.errors import ConfigError, Interrupted, LongmixError, ProcessLost
from longmix.naming import remove_unused_sweeps
from longmix.notices import begin_run
from longmix.printable import LINES, printable
from longmix.startup import INTERRUPTED

DEFECT = 1
REPORT = "run_and_report"  # what Hydra does with every error
VALUE = "return_value"  # what Hydra takes from a run that has ended
PLUGINS = {
    "hydra-optuna-sweeper": ("sweep", {"hydra/sweeper=search", "hydra/sweeper=optuna"}),
    "hydra-submitit-launcher": (
        "slurm",
        {f"hydra/launcher={choice}" for choice in ("processes", "slurm", "submitit_local", "submitit_slurm")},
    ),
}
"""Packages that are not always installed: the extra that brings each, and the choices that need it."""


def register() -> None:
    """Make schemas, resolvers and mixer patterns known to Hydra."""
    register_types()


def run(main: Callable[[], Any], command: str) -> None:
    """Run a function that `hydra.main` made as the command line says; whatever is refused is one line and exit code 2.

    Args:
        main: takes its words from `sys.argv`, which is put right before.
        command: "train", "evaluate", "generate" or "prepare".
    """
    given = sys.argv[1:]
    try:
        schema = Schema(command, configs_folder())
        schema.search(given)
        answer = answered(schema, given)
        if answer is not None:
            print(answer)
            return
        sys.argv[1:] = command_line(schema, given)
        with _refusals_in_one_line(schema, given):
            main()
    except LongmixError as error:
        _end(error)


def answered(schema: Schema, arguments: Sequence[str]) -> str | None:
    """The text that `-h` or `--version` prints; None if the command shall run."""
    if "--version" in arguments:
        return version_text()
    if {"-h", "--help"} & set(arguments):
        return help_text(schema, divided(arguments)[1])
    return None


def check_plugins(arguments: list[str]) -> None:
    """Refuse a sweeper or launcher whose package is not installed; Hydra would only say that it is not there.

    Raises:
        ConfigError: naming the extra to install.
    """
    for package, (extra, choices) in PLUGINS.items():
        for choice in choices & set(arguments):
            try:
                importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                raise ConfigError(f"{choice} needs {package}; pip install 'longmix[{extra}]' brings it.") from None


def command_line(schema: Schema, arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra should see them: values by their type, and `--cfg job` prints values.

    Raises:
        ConfigError: an option, or the form of a word, is wrong.
    """
    if {"-sc", "--shell-completion"} & set(arguments):
        return list(arguments)
    options, given = divided(arguments)
    if given and "--cfg" not in options:
        check_plugins(given)
    words = [Word.read(argument) for argument in given]
    sweep = is_sweep(options, given)
    problem = misformed(schema, words, sweep) or (wrong_sweep(schema, words) if sweep else None)
    if problem:
        raise ConfigError(problem)
    written = as_hydra_reads(schema, words, sweep)
    asks_for_job = re.search(r"(^| )(--cfg|-c)[ =]?job( |$)", " ".join(options))
    return [*options, *(["--resolve"] if asks_for_job and "--resolve" not in options else []), *written]


def as_hydra_reads(schema: Schema, words: Sequence[Word], sweep: bool = False) -> list[str]:
    """The words with each value in Hydra's grammar, by what the word takes."""
    written = []
    for word in without_repetition(_without_null(schema, words)):
        # Hydra composes another mixer than the checkpoint's, which may lack the setting.
        sign = "++" if schema.changes_checkpoint(word, words) else word.sign
        takes = schema.takes(word, words) if word.value is not None and word.sign != "~" else None
        if takes is None or word.value is None:
            written.append(f"{sign}{word.given[len(word.sign) :]}")
        else:
            written.append(f"{sign}{word.name}={values.as_hydra_reads(word.value, takes, sweep)}")
    return written


def _without_null(schema: Schema, words: Sequence[Word]) -> list[Word]:
    """The words without those of a group whose last choice is null, if that is its default: Hydra takes no null."""
    last = {word.name: word.value for word in words if not word.sign}
    unset = {
        name
        for name, value in last.items()
        if name in schema.groups and schema.groups[name] is None and (value or "").lower() == "null"
    }
    return [word for word in words if word.sign or word.name not in unset]


_hydras_value: property = vars(JobReturn)[VALUE]


def _return_value(done: JobReturn) -> Any:
    """The result of a run; of one that was refused, and has said why, Hydra's own would print the words."""
    if isinstance(done._return_value, RunFailed | LongmixError):
        raise done._return_value
    return _hydras_value.__get__(done)


@contextlib.contextmanager
def _refusals_in_one_line(schema: Schema, given: Sequence[str]) -> Iterator[None]:
    """Turn errors of Hydra before the task into a `ConfigError`; a defect keeps its traceback from the task on."""

    def call(function: Callable[[], Any]) -> Any:
        return function()

    modules = (hydra_utils, hydra_commands)
    originals = [vars(module)[REPORT] for module in modules]
    for module in modules:  # Hydra's own prints every error at length, and exits with 1
        setattr(module, REPORT, call)
    setattr(JobReturn, VALUE, property(_return_value, _hydras_value.fset))
    try:
        yield
    except LongmixError:
        raise
    except SystemExit as end:
        if end.code == DEFECT and "--cfg" in given:  # an unknown --package, of which Hydra has told
            raise SystemExit(ConfigError.exit_code) from end
        raise
    except RunFailed as failed:
        if failed.elsewhere:
            print(printable(failed, keep=LINES), file=sys.stderr)
        sys.exit(failed.exit_code)
    except Exception as error:
        frames = _frames_of_task(error)
        if frames is not None:
            traceback.print_exception(type(error), error, frames)
            sys.exit(DEFECT)
        raise ConfigError(_refusal(schema, given, error)) from error
    finally:
        for module, original in zip(modules, originals, strict=True):
            setattr(module, REPORT, original)
        setattr(JobReturn, VALUE, _hydras_value)
        GlobalHydra.instance().clear()
        remove_unused_sweeps()


def _refusal(schema: Schema, given: Sequence[str], error: Exception) -> str:
    options, words = divided(given)
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        key = "hydra.sweep.dir" if is_sweep(options, words) else "hydra.run.dir"
        return f"{key}={error.filename} cannot be made: {error.strerror}."
    if not isinstance(error, HydraException | OmegaConfBaseException | YAMLError | ValueError | TypeError):
        raise error
    return explained(schema, words, is_sweep(options, words), error)


def _frames_of_task(error: BaseException) -> Any:
    """The traceback from the task on; None if the task had not begun."""
    frames = error.__traceback__
    while frames is not None:
        code = frames.tb_frame.f_code
        if code.co_filename == __file__ and code.co_qualname == "entry_point.<locals>.run":
            return frames.tb_next or frames
        frames = frames.tb_next
    return None


def _end(error: LongmixError) -> NoReturn:
    print(f"{type(error).__name__}: {printable(error, keep=LINES)}", file=sys.stderr)
    sys.exit(error.exit_code)


class RunFailed(CompactHydraException):
    """A run of a sweep that was refused or failed.

    Attributes:
        exit_code: the run's.
        elsewhere: it ran in a launcher's process, which printed the message to a log; here it is not printed yet.
    """

    def __init__(self, message: str, exit_code: int, elsewhere: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.elsewhere = exit_code, elsewhere

    def __reduce__(self) -> tuple[type["RunFailed"], tuple[str, int, bool]]:  # a launcher's process hands it on
        return RunFailed, (str(self), self.exit_code, True)


NEEDS_LESS = "give a smaller model, seq_len or batch_size; python -m longmix.planning tells how much is needed."


def entry_point(task: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Run a Hydra task; an error meant for the user is printed alone and ends the process with its exit code.

    In a sweep the other runs still take place, unless a signal asked for the end; Hydra reports the failure after them.
    """

    @functools.wraps(task)
    def run(config: Any) -> Any:
        begin_run()
        try:
            with allocation_errors("this", as_called(NEEDS_LESS)):
                result = task(config)
        except LongmixError as error:
            message = f"{type(error).__name__}: {error}"
            if _speaks(error):
                print(printable(message, keep=LINES), file=sys.stderr)
            if not isinstance(error, Interrupted) or process_rank() == 0:  # the first may be about to use the folder
                _remove_unused_folder()
            if isinstance(error, Interrupted) and error.hand_on is not None:
                return error.hand_on()
            if isinstance(error, Interrupted):
                ignore_signals(of_terminal=own_ranks() is not None)  # Ctrl-C still ends a lone one that hangs
            if HydraConfig.get().mode == RunMode.MULTIRUN and not isinstance(error, Interrupted):
                raise RunFailed(message, error.exit_code) from None
            if isinstance(error, ProcessLost):
                leave(error.exit_code)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            sys.exit(INTERRUPTED)
        if own_ranks() is not None and HydraConfig.get().mode == RunMode.RUN:
            leave()
        return result

    return run


def _speaks(error: LongmixError) -> bool:
    """Whether this process, of several, reports the error to the user."""
    ranks = own_ranks()
    if ranks is None:
        return True
    if isinstance(error, ProcessLost) and ranks.launcher == "longmix":
        return False  # the launcher knows more
    return ranks.rank == 0 or not error.shared


def _remove_unused_folder() -> None:
    """Remove the folder that Hydra made before the task, so that a refused run leaves nothing behind."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    if folder != Path.cwd():
        with contextlib.suppress(OSError):  # it holds something, and stays
            folder.rmdir()
