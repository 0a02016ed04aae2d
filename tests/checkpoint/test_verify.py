"""Verification: every byte, and nothing but reading."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.flips import CHAIN, Flipper, make_chain
from hpc_resume import cli
from hpc_resume.checkpoint.manifest import MANIFEST, read_manifest
from hpc_resume.checkpoint.shardfile import ShardFile
from hpc_resume.checkpoint.verify import verify_run
from tests.checkpoint.fakes import Part, make_run, save_as
from tests.hostile.forge import Forge

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path):
    return make_chain(tmp_path / "run")


def files(run):
    return sorted(path for path in run.checkpoints.rglob("*") if path.is_file())


def tree(root):
    return sorted(
        (
            str(path),
            *path.lstat()[:4],
            path.lstat().st_size,
            path.lstat().st_mtime_ns,
            path.lstat().st_ctime_ns,
        )
        for path in root.rglob("*")
    )


def test_a_chain_refers_to_all_before_it(run):
    newest = read_manifest(run.checkpoints / run.checkpoint_names()[-1])
    assert len(newest.refers) == CHAIN
    assert verify_run(run.root) == []


def test_flipped_bits_are_all_found_and_never_loaded(run):
    flips = list(Flipper(run, seed=1).flips(400))
    assert [flip for flip in flips if not flip.found] == []
    assert [flip for flip in flips if flip.loaded] == []
    assert {flip.path.name for flip in flips} >= {MANIFEST, "rank-00000-of-00001.h5"}


def test_every_bit_of_some_bytes_of_every_file_counts(run):
    flipper = Flipper(run)
    for path in files(run):
        size_bytes = path.stat().st_size
        for offset in (0, size_bytes // 3, size_bytes - 1):
            for bit in range(8):
                flip = flipper.flip(path, offset, bit)
                assert flip.found, flip
                assert not flip.loaded, flip


def test_a_restore_refuses_a_flipped_bit_wherever_it_reads(run):
    """In the index, in the checksums that it uses, and in every block, its own or one that it refers to."""
    flipper = Flipper(run)
    folder = run.checkpoints / run.checkpoint_names()[-1]
    manifest = read_manifest(folder)
    shard = ShardFile.open(folder, manifest, 0)
    places = [
        (shard.path, at)
        for offset, length in (manifest.shards[0].index,)
        for at in (offset, offset + length - 1)
    ]
    files_seen = set()
    for entry in shard.index.entries:
        for piece in entry.runs:
            path = shard._path(piece.file)
            files_seen.add(path)
            places += [(path, at) for at in (piece.offset, piece.offset + piece.length - 1)]
    shard.close()
    assert len(files_seen) == CHAIN + 1
    for path, at in places:
        assert flipper.flip(path, at, 3).refused, (path, at)


def test_progress_ends_where_all_is_done(run):
    told = []
    assert verify_run(run.root, threads=3, progress=lambda done, total: told.append((done, total))) == []
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert (
        told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in files(run) if path.suffix == ".h5")
    )


def test_threads_and_json(run):
    shown = CliRunner().invoke(cli.main, ["verify", str(run.root), "--threads", "4", "--json"])
    assert (shown.exit_code, json.loads(shown.stdout)) == (0, [])
    assert CliRunner().invoke(cli.main, ["verify", str(run.root), "--threads", "0"]).exit_code == 2


_READ_ONLY = """
import os, sys
root = os.path.realpath(sys.argv[1])
seen = []
def hook(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)) and os.path.realpath(os.fsdecode(args[0])).startswith(root):
        flags = args[2] or 0
        assert not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), args
        seen.append(args[0])
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
                   "os.utime", "os.truncate", "os.setxattr"):
        assert not os.path.realpath(os.fsdecode(args[0])).startswith(root), (event, args)
sys.addaudithook(hook)
from hpc_resume import cli
try:
    cli.main(["verify", sys.argv[1]])
finally:
    assert len(seen) > 4, seen
"""


def test_it_only_reads(run):
    for path in sorted(run.root.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    run.root.chmod(0o555)
    before = tree(run.root)
    words = [sys.executable, "-c", _READ_ONLY, str(run.root)]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    # No terminal, no progress: the last word is all there is.
    assert done.stderr == f"{CHAIN + 1} checkpoints: every byte as committed\n"
    assert tree(run.root) == before


def test_progress_is_shown_on_a_terminal(run):
    ours, theirs = pty.openpty()
    words = [
        sys.executable,
        "-c",
        "from hpc_resume.cli import main; main()",
        "verify",
        str(run.root),
        "--json",
    ]
    done = subprocess.run(
        words,
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        check=False,
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:
        pass  # what a closed terminal says
    os.close(ours)
    assert (done.returncode, json.loads(done.stdout)) == (0, [])
    assert b"verifying" in shown
    assert b"kB" in shown


def test_of_very_many_missing_boxes_some_are_told(tmp_path):
    """A manifest that promises more than its shards hold, in every shard."""
    run = make_run(tmp_path / "run")
    save_as(run, 12, lambda rank: {"state": {"w": Part("rows", rank, 12).dtensor(torch.ones(24, 4))}})
    assert verify_run(run.root) == []
    forge = Forge(run.root, 1)
    kind = forge.record["tensors"]["state/w"]
    forge.record["tensors"] |= {f"state/x{n:05d}": kind for n in range(5_000)}
    forge.seal()
    problems = [(finding.path.name, finding.problem) for finding in verify_run(run.root)]
    assert [name for name, _ in problems[:9]] == ["rank-00000-of-00012.h5"] * 9
    assert problems[0][1] == "state/x00000: the box at [0, 0] of [2, 4] is not in its index"
    assert problems[8][1] == "and more boxes are not in its index"
    assert len(problems) == 8 * 9 + 1
    assert problems[-1] == (forge.folder.name, "and boxes are missing in 4 more shards")


def test_of_very_many_damaged_boxes_some_are_told(tmp_path):
    run = make_run(tmp_path / "run")
    save_as(run, 1, lambda rank: {"state": {f"x{n}": torch.ones(8) for n in range(300)}})
    forge = Forge(run.root, 1)
    forge.put_index(0, forge.index(0), bytes(len(forge.table(0))))
    forge.seal()
    problems = [finding.problem for finding in verify_run(run.root)]
    assert len(problems) == 101
    assert problems[-1] == "and 200 more boxes are not what was written"
