import subprocess
import sys
from pathlib import Path

import pytest

from hpc_resume.errors import UsageError
from hpc_resume.provenance import source as module
from hpc_resume.provenance.git import repository_of, revision
from hpc_resume.provenance.source import is_installed, read_source

REPOSITORY = Path(__file__).parents[2]


def git(folder, *words):
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", folder, *name, *words], check=True, capture_output=True)


@pytest.fixture
def project(tmp_path):
    files = {
        "train.py": "print(1)\n",
        "pkg/__init__.py": "",
        "pkg/net.py": "x = 1\n",
        "conf/a.yaml": "lr: 1\n",
        "README": "text\n",
        "data/big.bin": "x" * 100,
        "notes.txt": "text\n",
        "runs/a/run.json": "{}",
        "runs/a/configs/x.yaml": "a: 1\n",
        "env/pyvenv.cfg": "",
        "env/lib/site.py": "",
        "__pycache__/train.pyc": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_without_git_the_code_in_the_folder_and_below_is_the_source(project):
    source = read_source(project / "train.py")
    assert source.root == project
    assert sorted(source.contents) == ["conf/a.yaml", "pkg/__init__.py", "pkg/net.py", "train.py"]
    assert source.contents["train.py"] == (b"print(1)\n", False)
    assert source.left_out == ("README", "data", "env", "notes.txt", "runs")
    assert read_source(project).listing == source.listing


def test_with_git_it_is_what_is_tracked_and_code_that_is_not_ignored(project):
    git(project, "init", "-q", "-b", "main")
    (project / ".gitignore").write_text("data/\nenv/\npkg/_version.py\nignored/\n")
    git(project, "add", "train.py", "README", ".gitignore", "pkg")
    (project / "pkg" / "_version.py").write_text("v = 1\n")
    (project / "ignored").mkdir()
    (project / "ignored" / "x.py").touch()
    (project / "new.py").touch()
    (project / "pkg" / "gone.py").touch()
    git(project, "add", "pkg/gone.py")
    (project / "pkg" / "gone.py").unlink()
    source = read_source(project / "pkg" / "net.py")
    assert sorted(source.contents) == [
        ".gitignore",
        "README",
        "conf/a.yaml",
        "new.py",
        "pkg/__init__.py",
        "pkg/_version.py",
        "pkg/net.py",
        "train.py",
    ]
    assert source.left_out == ("data", "env", "ignored", "notes.txt", "runs")


def test_a_script_that_git_ignores_is_the_source_with_its_folder(project):
    git(project, "init", "-q")
    (project / ".gitignore").write_text("scratch/\n")
    (project / "scratch").mkdir()
    (project / "scratch" / "try.py").touch()
    source = read_source(project / "scratch" / "try.py")
    assert (source.root, list(source.contents)) == (project / "scratch", ["try.py"])


def test_what_git_says(project):
    git(project, "init", "-q", "-b", "main")
    assert revision(project).commit is None
    git(project, "add", "train.py", "pkg")
    git(project, "commit", "-qm", "first")
    found = revision(project)
    assert (found.branch, found.changed, found.patch) == ("main", (), b"")
    assert len(found.commit) == 40
    (project / "train.py").write_text("print(2)\n")
    git(project, "mv", "pkg/net.py", "pkg/a net.py")
    (project / "new.py").touch()
    found = revision(project)
    assert found.changed == ("pkg/a net.py", "train.py")
    assert b"-print(1)\n+print(2)\n" in found.patch
    git(project, "checkout", "-q", "--detach")
    assert revision(project).branch is None
    assert repository_of(project / "pkg") == project


def test_without_git_there_is_no_revision(project, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    (project / ".git").mkdir()
    assert revision(project) is None
    assert "train.py" in read_source(project / "train.py").contents


def test_a_home_folder_that_is_a_repository_is_no_project(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    (project / ".git").mkdir()
    assert repository_of(project / "pkg") is None


def test_installed_software_is_no_project():
    assert is_installed(Path(subprocess.__file__))
    assert is_installed(Path(pytest.__file__))
    assert is_installed(Path(sys.executable))
    assert read_source(Path(pytest.__file__)) is None
    assert read_source(Path("/no/such/script.py")) is None
    assert not is_installed(Path(__file__))


def test_this_package_is_never_part_of_a_project():
    names = read_source(REPOSITORY / "examples" / "gpt.py").contents
    assert "examples/gpt.py" in names
    assert not [name for name in names if name.startswith("hpc_resume/")]


def test_large_files_are_left_out(project, monkeypatch):
    monkeypatch.setattr(module, "_LARGEST_BYTES", 5)
    source = read_source(project)
    assert "conf/a.yaml" not in source.contents
    assert "train.py" in source.contents
    git(project, "init", "-q")
    git(project, "add", ".")
    assert "README" in read_source(project).contents
    (project / "README").write_text("longer text\n")
    assert "README" not in read_source(project).contents
    assert "README" in read_source(project).left_out


def test_a_folder_with_too_much_in_it_counts_without_what_is_below(project, monkeypatch):
    monkeypatch.setattr(module, "_MOST_LOOKED_AT", 10)
    source = read_source(project / "train.py")
    assert list(source.contents) == ["train.py"]
    assert "put the script into a folder of its own" in source.note


def test_a_folder_of_many_files_is_data(project, monkeypatch):
    monkeypatch.setattr(module, "_MOST_ENTRIES", 20)
    for number in range(30):
        (project / "data" / f"{number}.json").touch()
    source = read_source(project / "train.py")
    assert not [name for name in source.contents if name.startswith("data/")]


def test_too_large_a_project_is_refused_with_its_largest_files(project, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 10)
    git(project, "init", "-q")
    with pytest.raises(UsageError, match=r"the largest: train.py, .*environment.source=live"):
        read_source(project / "train.py")
