"""Every error that hpc_resume raises on purpose.

::

    HpcResumeError                          exit code 1
    ├── UsageError          ValueError      2   something that the user wrote can't be done
    │   ├── ConfigError                     2   a configuration file or setting
    │   ├── StateError      TypeError       2   an object in the tracked state can't be stored
    │   ├── MismatchError                   2   the checkpoint does not fit what is tracked now
    │   ├── Declined                        2   not on these nodes or ranks; another node type may do
    │   ├── DriftError                      2   not on this software: what comes out would be another training
    │   └── TensorNotFound  KeyError        2   the checkpoint has no tensor of this name
    ├── CheckpointNotFound  FileNotFoundError 3 nothing to restore
    ├── IntegrityError                      4   bytes on disk are not the bytes that were committed
    ├── NonFiniteError      ArithmeticError 1   what is trained has become NaN or Inf
    ├── ProbeError          RuntimeError    1   a probe gives something else than before the save
    ├── SaveError           OSError         1   a checkpoint could not be written
    ├── FencedError                         1   a later attempt owns the run
    ├── SchedulerError      RuntimeError    1   a scheduler command failed
    ├── RendezvousError     ConnectionError 1   the ranks could not find each other, or lost one
    └── BudgetSpent         RuntimeError    1   the run makes no progress any more

    Interrupted             SystemExit      75  no error: saved, and to be continued

A message says what, where, why, and what to do.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOTHING = 3
EXIT_CORRUPT = 4
#: "Interrupted, committed, continue me." Source: sysexits.h, EX_TEMPFAIL.
EXIT_CONTINUE = 75


class HpcResumeError(Exception):
    """Base of all errors of this package; ``exit_code`` is what a command line exits with."""

    exit_code = EXIT_FAILED


class UsageError(HpcResumeError, ValueError):
    """Something that the user wrote can't be done."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A configuration file or setting is wrong."""


class StateError(UsageError, TypeError):
    """An object in the tracked state can't be stored; the message names its path in the state."""


class MismatchError(UsageError):
    """The checkpoint does not fit what is tracked now; the message lists every difference."""


class Declined(UsageError):  # noqa: N818 - reads as what happened
    """These nodes or this number of ranks can't go on with the run; another of its node types may."""


class DriftError(UsageError):
    """The run would go on on other software than it began on, and nobody has said why it may."""


class TensorNotFound(UsageError, KeyError):  # noqa: N818 - reads as what happened
    """The checkpoint has no tensor of this name."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class CheckpointNotFound(HpcResumeError, FileNotFoundError):  # noqa: N818 - reads as what happened
    """There is nothing to restore."""

    exit_code = EXIT_NOTHING


class IntegrityError(HpcResumeError):
    """Bytes on disk are not the bytes that were committed."""

    exit_code = EXIT_CORRUPT


class NonFiniteError(HpcResumeError, ArithmeticError):
    """What is trained has become NaN or Inf; older checkpoints are whole."""


class ProbeError(HpcResumeError, RuntimeError):
    """After a restore a probe gives something else than before the save, whichever checkpoint is taken."""


class SaveError(HpcResumeError, OSError):
    """A checkpoint could not be written."""


class FencedError(HpcResumeError):
    """A later attempt owns the run; this one may commit nothing more."""


class SchedulerError(HpcResumeError, RuntimeError):
    """A scheduler command failed."""


class RendezvousError(HpcResumeError, ConnectionError):
    """The ranks could not find each other, or lost one."""


class BudgetSpent(HpcResumeError, RuntimeError):  # noqa: N818 - reads as what happened
    """The run makes no progress any more and must not be continued."""


class Interrupted(SystemExit):
    """The run was saved and is to be continued; leaves the process with exit code 75."""

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_CONTINUE)
        self.message = message

    def __str__(self) -> str:
        return self.message
