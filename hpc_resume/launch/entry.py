"""What a job runs: a function, a function of a file or module, or a command. Checked before submission.

Files are read, not run, for the checks: importing a training script on a login node can take a minute.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpc_resume.config import Config
from hpc_resume.errors import UsageError

#: Signals that submitit has taken by the time we are called.
_TAKEN = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)


def usual_signals() -> None:
    """Give signals their usual meaning back, until ``Run`` takes them.

    submitit's handlers ignore SIGTERM, and on a warning pickle the job or raise. A rank that is warned before
    it has a ``Run`` (while it imports, say) has nothing to save: death by the signal is what tells launchers
    that it was interrupted and did not fail.
    """
    for number in _TAKEN:
        signal.signal(number, signal.SIG_DFL)


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionEntry:
    """Calls a function object."""

    function: Callable[..., Any]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        """Run in the job, on every rank."""
        usual_signals()
        return self.function(**self.kwargs)

    def check(self) -> None:
        """Raise UsageError if the function does not take the arguments, or can't be sent to another process."""
        try:
            _check_arguments(self.name, inspect.signature(self.function), self.kwargs)
        except UsageError:
            raise
        except (TypeError, ValueError):
            pass  # built in: it knows best
        import cloudpickle  # type: ignore[import-untyped] # as submitit will

        try:
            cloudpickle.dumps(self)
        except Exception as error:
            raise UsageError(
                f"{self.name}: can't be sent to the job's processes: {error}; make what it uses from the outside "
                "inside it, or put it into a file and give file.py:function"
            ) from error

    @property
    def name(self) -> str:
        """Name of the function, as text for people."""
        return getattr(self.function, "__qualname__", None) or repr(self.function)

    @property
    def run_name(self) -> str:
        """What a run of it is called if nobody says."""
        code = getattr(inspect.unwrap(self.function), "__code__", None)
        file = Path(code.co_filename) if code is not None else Path()
        return _plain_name(file.stem if file.suffix == ".py" and file.exists() else self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetEntry:
    """Imports a file or module in the job, and calls a function of it.

    Parameters
    ----------
    place
        Absolute path of a ``.py`` file, or a module's dotted name.
    function
        Name in it.
    folder
        Where a module is looked for first; by default the current folder.
    """

    place: str
    function: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    folder: str | None = None

    @classmethod
    def parse(cls, target: str, kwargs: Mapping[str, Any]) -> TargetEntry:
        """Read ``file.py:function`` or ``package.module:function``.

        Raises
        ------
        UsageError
            If it is neither.
        """
        place, colon, function = target.rpartition(":")
        if not colon or not function.isidentifier():
            hint = (
                f"file.py:function, such as {target.rstrip(':')}:train; to run the file as it is: -- python {target}"
                if target.rstrip(":").endswith(".py")
                else ("file.py:function or package.module:function; to run a command, put it after --")
            )
            raise UsageError(f"{target}: names no function; write {hint}")
        if place.endswith(".py") or os.sep in place:
            place = str(Path(place).expanduser().absolute())
        return cls(place=place, function=function, kwargs=dict(kwargs))

    def __call__(self) -> Any:
        """Run in the job, on every rank."""
        usual_signals()
        return getattr(self._module(), self.function)(**self.kwargs)

    def check(self) -> None:
        """Raise UsageError if there is no such file, no such function in it, or if it takes other arguments."""
        path = self.source_path()
        try:
            tree = ast.parse(path.read_text(), filename=str(path))
        except SyntaxError as error:
            raise UsageError(f"{path}, line {error.lineno}: no valid Python: {error.msg}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: can't be read: {error}") from None
        functions = {
            each.name: each for each in tree.body if isinstance(each, (ast.FunctionDef, ast.ClassDef))
        }
        found = functions.get(self.function)
        if found is None and not _bound_names(tree) & {self.function, "*"}:
            near = difflib.get_close_matches(self.function, functions, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(functions) or 'none'}"
            raise UsageError(f"{path}: has no function {self.function!r} at its top level; {hint}")
        if isinstance(found, ast.FunctionDef) and not found.decorator_list:
            _check_arguments(self.name, _signature(found.args), self.kwargs)

    @property
    def name(self) -> str:
        """The target, as text for people and for the record."""
        return f"{self.place}:{self.function}"

    @property
    def run_name(self) -> str:
        """What a run of it is called if nobody says."""
        return _plain_name(
            Path(self.place).stem if self.place.endswith(".py") else self.place.rpartition(".")[2]
        )

    def source_path(self) -> Path:
        """Find the file.

        Raises
        ------
        UsageError
            If there is none.
        """
        if self.place.endswith(".py") or os.sep in self.place:
            path = Path(self.place)
            if not path.is_file():
                near = difflib.get_close_matches(
                    path.name, [each.name for each in path.parent.glob("*.py")], n=1
                )
                hint = (
                    f"did you mean {path.parent / near[0]}?"
                    if near
                    else f"the current folder is {Path.cwd()}"
                )
                raise UsageError(f"{path}: no such file; {hint}")
            return path
        with _current_folder_first():
            try:
                spec = importlib.util.find_spec(self.place)
            except (ImportError, ValueError):
                spec = None
        if spec is None or spec.origin is None:
            raise UsageError(
                f"{self.place}: no such module; give a file (path/to/file.py:{self.function}), or install it"
            )
        return Path(spec.origin)

    def _module(self) -> Any:
        if not self.place.endswith(".py"):
            with _current_folder_first(self.folder):
                return importlib.import_module(self.place)
        path = Path(self.place)
        sys.path.insert(0, str(path.parent))  # as `python file.py` does
        name = path.stem if path.stem not in sys.modules else f"hpc_resume_target_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # noqa: PT018 - for mypy
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # so that worker processes can import what it defines
        spec.loader.exec_module(module)
        return module


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandEntry:
    """Becomes a command: its signals and its exit code are the rank's own."""

    command: tuple[str, ...]

    def __call__(self) -> Any:
        """Run in the job, on every rank; does not return."""
        usual_signals()
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            os.execvp(self.command[0], self.command)  # noqa: S606 - no shell is meant
        except OSError as error:
            raise UsageError(f"{self.command[0]}: can't be run: {error.strerror}") from error

    def check(self) -> None:
        """Raise UsageError if there is no such program."""
        if not self.command:
            raise UsageError("no command was given; put it after --, such as: -- python train.py")
        if shutil.which(self.command[0]) is None:
            raise UsageError(f"{self.command[0]}: no such program on PATH; give its path, or install it")

    @property
    def name(self) -> str:
        """The command, as text for people."""
        return " ".join(self.command)

    @property
    def run_name(self) -> str:
        """What a run of it is called if nobody says: after its first Python file, or its program."""
        script = next((word for word in self.command if word.endswith(".py")), self.command[0])
        return _plain_name(Path(script).stem)


Entry = FunctionEntry | TargetEntry | CommandEntry


class _current_folder_first:  # noqa: N801 - reads as what it does
    """Looks modules up as ``python -m`` would, or in another folder first."""

    def __init__(self, folder: str | None = None) -> None:
        self._folder = folder or str(Path.cwd())

    def __enter__(self) -> None:
        sys.path.insert(0, self._folder)

    def __exit__(self, *_: object) -> None:
        sys.path.remove(self._folder)


def make_entry(target: Callable[..., Any] | str | Sequence[str], kwargs: Mapping[str, Any]) -> Entry:
    """Turn what a user wants to run into something that a job can call, and check it.

    Raises
    ------
    UsageError
        If it is not there, or does not take the arguments.
    """
    entry: Entry
    if callable(target):
        entry = FunctionEntry(function=target, kwargs=dict(kwargs))
    elif isinstance(target, str):
        entry = TargetEntry.parse(target, kwargs)
    else:
        entry = CommandEntry(command=tuple(str(word) for word in target))
        if kwargs:
            raise UsageError(
                f"{', '.join(kwargs)}: a command takes no arguments from us; write them into the command itself"
            )
    entry.check()
    return entry


def _check_arguments(name: str, signature: inspect.Signature, kwargs: Mapping[str, Any]) -> None:
    kinds = inspect.Parameter
    parameters = signature.parameters.values()
    by_name = [each for each in parameters if each.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
    names = [each.name for each in by_name]
    takes = f"it takes: {', '.join(names)}" if names else "it takes none"
    if not any(each.kind is kinds.VAR_KEYWORD for each in parameters):
        for key in kwargs:
            if key in names:
                continue
            near = difflib.get_close_matches(key, names, n=1)
            if not near and key.split(".")[0] in Config.model_fields:
                hint = f"it is a setting, so write -o {key}=..., or in Python config={{{key!r}: ...}}"
            else:
                hint = f"did you mean {near[0]}?" if near else takes
            raise UsageError(f"{name}: takes no argument {key!r}; {hint}")
    missing = [
        each.name
        for each in parameters
        if each.default is kinds.empty
        and each.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)
        and each.name not in kwargs
    ]
    if missing:
        raise UsageError(
            f"{name}: needs {', '.join(missing)}; give --set {missing[0]}=..., in Python {missing[0]}=..."
        )


def _signature(arguments: ast.arguments) -> inspect.Signature:
    """Build the signature that a definition would have; a default's value does not matter."""
    kinds = inspect.Parameter
    positional: list[tuple[str, Any]] = [(each.arg, kinds.POSITIONAL_ONLY) for each in arguments.posonlyargs]
    positional += [(each.arg, kinds.POSITIONAL_OR_KEYWORD) for each in arguments.args]
    without = len(positional) - len(arguments.defaults)
    parameters = [
        kinds(name, kind, default=kinds.empty if place < without else None)
        for place, (name, kind) in enumerate(positional)
    ]
    parameters += [kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL)] if arguments.vararg else []
    parameters += [
        kinds(each.arg, kinds.KEYWORD_ONLY, default=kinds.empty if default is None else None)
        for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    parameters += [kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD)] if arguments.kwarg else []
    return inspect.Signature(parameters)


def _bound_names(tree: ast.Module) -> set[str]:
    """Names that running a module may bind besides plain definitions; ``*`` if it may be any."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.If, ast.Try)):
            names |= {each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef)}
    return names


def _plain_name(text: str) -> str:
    """Make a name that can be a folder's."""
    plain = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter == "_") else "-" for letter in text
    ).strip("-")
    return plain or "run"
