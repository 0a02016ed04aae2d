import functools
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from hpc_resume.errors import UsageError
from hpc_resume.launch.entry import CommandEntry, FunctionEntry, TargetEntry, make_entry

REPOSITORY = Path(__file__).parents[2]

SCRIPT = """
import json
from helpers import double
if True:
    def conditional(): return 1
alias = double

def train(lr=1.0, *, steps=3):
    return double(lr) * steps

def needs(data, lr=1.0): ...
def anything(**kwargs): return kwargs
def none(): ...
class Trainer:
    def __init__(self, lr=1.0): self.lr = lr

@staticmethod
def decorated(): ...
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "helpers.py").write_text("def double(x): return 2 * x\n")
    path = tmp_path / "gpt.py"
    path.write_text(SCRIPT)
    return path


def run_entry(code: str, **options) -> subprocess.CompletedProcess:
    """Run an entry in a process of its own: it changes sys.path, signals, or the whole process."""
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    prelude = "from hpc_resume.launch.entry import *\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env=environ,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_a_function_of_a_file_is_called_with_its_neighbours_importable(script):
    entry = make_entry(f"{script}:train", {"lr": 2.0, "steps": 5})
    assert (entry.name, entry.run_name) == (f"{script}:train", "gpt")
    done = run_entry(f"print(make_entry({str(script)!r} + ':train', dict(lr=2.0, steps=5))())")
    assert done.stdout == "20.0\n", done.stderr


def test_a_relative_file_is_the_same_file_in_the_job(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    assert make_entry("gpt.py:train", {}).place == str(script)


def test_checking_a_file_does_not_run_it(tmp_path):
    path = tmp_path / "loud.py"
    path.write_text("open('ran', 'w')\nimport nonexistent_package\ndef train(): ...\n")
    make_entry(f"{path}:train", {})
    assert not Path("ran").exists()


def test_a_module_is_found_without_importing_it(script, monkeypatch):
    monkeypatch.chdir(script.parent)
    entry = make_entry("gpt:train", {"lr": 1.0})
    assert (entry.name, entry.run_name) == ("gpt:train", "gpt")
    assert "gpt" not in sys.modules
    assert str(Path.cwd()) not in sys.path
    done = run_entry("print(make_entry('gpt:train', {})())", cwd=script.parent)
    assert done.stdout == "6.0\n", done.stderr


@pytest.mark.parametrize(
    "name", ["train", "conditional", "alias", "double", "Trainer", "decorated", "anything", "none"]
)
def test_whatever_a_file_defines_can_be_called(script, name):
    make_entry(f"{script}:{name}", {})


@pytest.mark.parametrize(
    ("target", "kwargs", "words"),
    [
        ("{script}:trian", {}, ["has no function 'trian'", "did you mean train?"]),
        ("{script}:zzz", {}, ["has no function 'zzz'", "it has: train, needs"]),
        ("{script}", {}, ["names no function", "gpt.py:train"]),
        ("{script}:", {}, ["names no function", "gpt.py:train"]),
        ("train", {}, ["names no function", "put it after --"]),
        ("{folder}/gtp.py:train", {}, ["gtp.py: no such file", "did you mean", "gpt.py?"]),
        ("{folder}/zzzzzzzz.py:train", {}, ["no such file", "the current folder is"]),
        ("no.such.module:train", {}, ["no.such.module: no such module"]),
        ("{script}:train", {"lrr": 1}, ["takes no argument 'lrr'", "did you mean lr?"]),
        ("{script}:train", {"time_limit_s": 1}, ["it is a setting", "-o time_limit_s="]),
        ("{script}:train", {"zzz": 1}, ["takes no argument 'zzz'", "it takes: lr, steps"]),
        ("{script}:none", {"zzz": 1}, ["takes no argument 'zzz'", "it takes none"]),
        ("{script}:needs", {}, ["needs data", "--set data="]),
    ],
)
def test_what_is_not_there_is_said_with_what_is(script, target, kwargs, words):
    with pytest.raises(UsageError) as caught:
        make_entry(target.format(script=script, folder=script.parent), kwargs)
    for word in words:
        assert word in str(caught.value)


def test_any_argument_goes_where_any_is_taken(script):
    make_entry(f"{script}:anything", {"x": 1})


def test_a_file_that_is_no_python_is_named_with_the_line(tmp_path):
    path = tmp_path / "a.py"
    path.write_text("x = 1\ndef train(:\n")
    with pytest.raises(UsageError, match=r"a\.py, line 2: no valid Python"):
        make_entry(f"{path}:train", {})


def test_a_function_object_is_checked_and_called():
    def train(lr, steps=2):
        return lr * steps

    entry = make_entry(train, {"lr": 3})
    assert isinstance(entry, FunctionEntry)
    assert entry.run_name == "test_entry"
    with pytest.raises(UsageError, match="did you mean steps"):
        make_entry(train, {"lr": 1, "step": 2})
    with pytest.raises(UsageError, match="needs lr"):
        make_entry(train, {})
    assert make_entry(functools.partial(train, 3), {"steps": 4}).kwargs == {"steps": 4}


def test_a_function_that_can_not_travel_is_refused():
    lock = threading.Lock()

    def train():
        return lock

    with pytest.raises(UsageError, match="can't be sent to the job's processes"):
        make_entry(train, {})


def test_a_command_is_checked():
    assert make_entry([sys.executable, "train.py"], {}).run_name == "train"
    assert make_entry([sys.executable, "-c", "1"], {}).run_name == Path(sys.executable).stem.replace(".", "-")
    with pytest.raises(UsageError, match="no-such-program-xyz: no such program"):
        make_entry(["no-such-program-xyz"], {})
    with pytest.raises(UsageError, match="no command"):
        make_entry([], {})
    with pytest.raises(UsageError, match="lr: a command takes no arguments from us"):
        make_entry(["true"], {"lr": 1})


@pytest.mark.parametrize(
    ("script", "code"), [("exit 75", 75), ("exit 3", 3), ("kill -USR2 $$", -signal.SIGUSR2)]
)
def test_a_command_leaves_as_itself(script, code):
    done = run_entry(f"print('first'); CommandEntry(command=('bash', '-c', {script!r}))()")
    assert done.returncode == code
    assert done.stdout == "first\n"


def test_a_signal_before_run_has_taken_it_kills_as_usual():
    """submitit's handlers would ignore SIGTERM, and turn the warning into a failure."""
    code = """
import signal, os
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda *_: print("bypassed", flush=True))
FunctionEntry(function=lambda: os.kill(os.getpid(), signal.{name}))()
print("survived")
"""
    for name in ("SIGTERM", "SIGUSR2"):
        done = run_entry(code.format(name=name))
        assert (done.returncode, done.stdout) == (-getattr(signal, name), "")


def test_a_target_may_be_named_like_a_module_that_is_loaded(tmp_path):
    path = tmp_path / "json.py"
    path.write_text("def train(): return __name__\n")
    done = run_entry(f"import json; print(make_entry({str(path)!r} + ':train', dict())()); json.dumps")
    assert done.stdout == "hpc_resume_target_json\n", done.stderr


def test_entries_compare_by_what_they_run():
    assert CommandEntry(command=("a",)) == CommandEntry(command=("a",))
    assert TargetEntry.parse("a.b:c", {}) == TargetEntry(place="a.b", function="c")
