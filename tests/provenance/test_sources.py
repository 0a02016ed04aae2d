import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_resume.errors import CheckpointNotFound, IntegrityError
from hpc_resume.provenance.source import Source
from hpc_resume.provenance.sources import Chosen, Sources

FILES = {
    "train.py": (b"import model\n", False),
    "model/net.py": (b"class Net: ...\n", False),
    "run.sh": (b"#!/bin/sh\n", True),
    "empty.py": (b"", False),
}


@pytest.fixture
def kept(tmp_path):
    sources = Sources(tmp_path / "sources")
    source = Source(root=tmp_path, contents=FILES)
    digest = sources.keep(source)
    sources.check_out(digest, source)
    sources.choose(Chosen(digest=digest, root=str(tmp_path), taken=1.0))
    sources.keep_patch(b"--- a\n+++ b\n")
    return sources, digest


def test_a_source_comes_back_as_it_was(kept):
    sources, digest = kept
    assert sources.read(digest, list(FILES)) == {path: data for path, (data, _) in FILES.items()}
    tree = sources.folder / digest
    assert {path: (tree / path).read_bytes() for path in FILES} == sources.read(digest, list(FILES))
    assert os.access(tree / "run.sh", os.X_OK)
    assert (tree / "train.py").stat().st_mode & 0o777 == 0o444
    assert sources.altered(tree, digest) == []
    assert list(sources.check()) == []
    assert sources.chosen() == Chosen(digest=digest, root=str(sources.folder.parent), taken=1.0)


def test_the_same_files_are_kept_once_and_give_the_same_bytes(kept, tmp_path):
    sources, digest = kept
    before = {path.name: path.read_bytes() for path in sources.folder.glob("*.*")}
    assert sources.keep(Source(root=Path("/other"), contents=dict(reversed(FILES.items())))) == digest
    assert {path.name: path.read_bytes() for path in sources.folder.glob("*.*")} == before
    other = Sources(tmp_path / "again")
    other.keep(Source(root=tmp_path, contents=FILES))
    assert (other.folder / f"{digest}.zip").read_bytes() == before[f"{digest}.zip"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.data())
def test_any_byte_of_anything_that_is_kept_is_missed_by_its_name(kept, data):
    sources, digest = kept
    everything = sorted(path for path in sources.folder.rglob("*") if path.is_file())
    path = data.draw(st.sampled_from([path for path in everything if path.stat().st_size]))
    good = path.read_bytes()
    place = data.draw(st.integers(0, len(good) - 1))
    bad = bytes([good[place] ^ (1 << data.draw(st.integers(0, 7)))])
    path.chmod(0o644)
    try:
        path.write_bytes(good[:place] + bad + good[place + 1 :])
        found = list(sources.check())
        assert {found_path for found_path, _ in found} == {path}, found
        if path.is_relative_to(sources.folder / digest):
            name = path.relative_to(sources.folder / digest).as_posix()
            assert sources.altered(sources.folder / digest, digest) == [name]
    finally:
        path.write_bytes(good)
        path.chmod(0o444)


def test_a_damaged_file_of_the_archive_is_named(kept):
    sources, digest = kept
    path = sources.folder / f"{digest}.zip"
    path.write_bytes(path.read_bytes().replace(b"class Net", b"class Met"))
    assert [problem for _, problem in sources.check()] == ["model/net.py is not what was written"]
    with pytest.raises(IntegrityError, match=r"model/net\.py is not what was written"):
        sources.read(digest, ["model/net.py"])
    assert sources.read(digest, ["train.py"]) == {"train.py": b"import model\n"}


@pytest.mark.parametrize("suffix", [".zip", ".json"])
def test_what_is_gone_is_named(kept, suffix):
    sources, digest = kept
    (sources.folder / f"{digest}{suffix}").unlink()
    assert [path.name for path, _ in sources.check()] == [f"{digest}{suffix}"]
    with pytest.raises(CheckpointNotFound, match="is gone"):
        sources.read(digest, ["train.py"])


def test_a_file_that_was_put_into_the_folder_is_named_and_links_are_not(kept):
    sources, digest = kept
    tree = sources.folder / digest
    (tree / "model" / "more.py").touch()
    (tree / "__pycache__").mkdir()
    (tree / "__pycache__" / "train.pyc").touch()
    (tree / "data").symlink_to("/tmp")
    assert sources.altered(tree, digest) == ["model/more.py"]


def test_a_file_that_was_replaced_by_a_link_is_named(kept):
    sources, digest = kept
    tree = sources.folder / digest
    (tree / "train.py").rename(sources.folder.parent / "train.py")
    (tree / "train.py").symlink_to(sources.folder.parent / "train.py")
    assert sources.altered(tree, digest) == ["train.py"]


@pytest.mark.parametrize("digest", ["../../etc", "0" * 15, "", "G" * 16])
def test_what_is_no_digest_is_no_path(kept, digest):
    sources, _ = kept
    with pytest.raises(IntegrityError, match="no digest"):
        sources.listing(digest)
    assert not sources.has(digest)


def test_links_lead_to_what_was_left_out(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("1")
    sources = Sources(tmp_path / "sources")
    source = Source(root=tmp_path, contents=FILES, left_out=("data", "model/weights.pt"))
    tree = sources.check_out(sources.keep(source), source)
    assert (tree / "data" / "x").read_text() == "1"
    assert (tree / "model" / "weights.pt").is_symlink()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.pt").write_text("later")
    assert (tree / "model" / "weights.pt").read_text() == "later"
    moved = Source(root=tmp_path / "moved", contents=FILES, left_out=("data",))
    sources.check_out(sources.keep(moved), moved)
    assert (tree / "data").readlink() == tmp_path / "moved" / "data"


def test_nothing_chosen_is_none(tmp_path):
    assert Sources(tmp_path).chosen() is None
    assert list(Sources(tmp_path / "nowhere").check()) == []
