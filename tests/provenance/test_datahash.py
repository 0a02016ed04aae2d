"""A snapshot names what has changed, whatever it is, and is the same wherever the data lies."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_resume.errors import UsageError
from hpc_resume.provenance.datachange import compare_data
from hpc_resume.provenance.datafiles import IGNORED, Stamp
from hpc_resume.provenance.datahash import Reading, take_snapshot
from hpc_resume.provenance.datasnapshot import DataSnapshot
from hpc_resume.provenance.hashcache import TICK_NS, HashCache, settled
from hpc_resume.settings import DataSettings
from hpc_resume.untrusted import printable

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8).filter(
    lambda name: name not in {".", ".."} and len(name.encode()) < 100
)
FOLDERS = st.dictionaries(
    st.lists(NAMES.map(lambda name: f"d{name}"), max_size=2).map(lambda parts: "/".join([*parts, ""])),
    st.dictionaries(NAMES.map(lambda name: f"f{name}"), st.binary(max_size=40), max_size=4),
    max_size=4,
)
QUICK = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def put(folder, files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def flat(tree):
    return {f"{folder}{name}": data for folder, files in tree.items() for name, data in files.items()}


def take(*paths, **how):
    return take_snapshot(list(paths), Reading(**how))


def emptied(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


@QUICK
@given(tree=FOLDERS, data=st.data())
def test_any_change_is_told_by_name(tmp_path, tree, data):
    files = flat(tree)
    folder = emptied(tmp_path / "data")
    put(folder, files)
    old = take(folder).snapshot
    assert set(old.files) == set(files)
    kinds = ["add"]
    kinds += ["remove", "rename", "append"] if files else []
    kinds += ["flip"] if any(files.values()) else []
    kind = data.draw(st.sampled_from(kinds))
    if kind == "add":
        put(folder, {"new/file": b"x"})
    else:
        fitting = sorted(name for name in files if kind != "flip" or files[name])
        name = data.draw(st.sampled_from(fitting))
        path = folder / name
    if kind == "remove":
        path.unlink()
    elif kind == "rename":
        put(folder, {"moved/to": files[name]})
        path.unlink()
    elif kind == "append":
        path.write_bytes(files[name] + b"\0")
    elif kind == "flip":
        place = data.draw(st.integers(0, len(files[name]) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        changed = bytearray(files[name])
        changed[place] ^= bit
        path.write_bytes(changed)
    new = take(folder).snapshot
    change = compare_data(old, new)
    assert change
    assert new.digest != old.digest
    if kind == "add":
        assert (change.added, change.removed, change.changed) == (("new/file",), (), ())
    elif kind == "remove":
        assert (change.added, change.removed, change.changed) == ((), (name,), ())
    elif kind == "rename":
        assert (change.renamed, change.added, change.removed) == (((name, "moved/to"),), (), ())
    else:
        assert [each for each, _ in change.changed] == [name]
        assert (change.added, change.removed, change.renamed) == ((), (), ())
    shown = "new/file" if kind == "add" else printable(name).replace("\n", "\\n")
    assert any(shown in line for line in change.lines())
    back = compare_data(new, old)
    assert (back.added, back.removed) == (change.removed, change.added)


@QUICK
@given(tree=FOLDERS, seed=st.randoms())
def test_it_is_the_same_elsewhere_in_any_order_by_any_number_of_threads(tmp_path, tree, seed):
    files = flat(tree)
    one, two = emptied(tmp_path / "one"), emptied(tmp_path / "two")
    put(one, files)
    names = list(files)
    seed.shuffle(names)
    put(two, {name: files[name] for name in names})
    expected = take(one, threads=1).snapshot
    assert take(two, threads=5).snapshot == expected
    assert take(two).snapshot.digest == expected.digest
    assert DataSnapshot.from_bytes(expected.to_bytes()) == expected


def test_a_hash_is_that_of_b3sum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    entry = take(tmp_path).snapshot.files["abc"]
    # Source: `printf abc | b3sum`; the test vector of RFC draft-aumasson-blake3.
    assert entry.digest == "6437b3ac38465133ffb63b75273a8db5"
    assert entry.size_bytes == 3


def test_large_files_are_hashed_as_a_whole(tmp_path):
    from blake3 import blake3

    data = os.urandom((3 << 20) + 17)
    (tmp_path / "large").write_bytes(data)
    (tmp_path / "small").write_bytes(b"")
    taken = take(tmp_path, threads=2)
    assert taken.snapshot.files["large"].digest == blake3(data).hexdigest()[:32]
    assert taken.read_bytes == len(data)


class Clock:
    """Unix time that is moved."""

    def __init__(self, ahead_s=0.0):
        self.ahead_s = ahead_s

    def __call__(self):
        return time.time() + self.ahead_s


LATER = Clock(2 * TICK_NS / 1e9)


def cache(tmp_path, clock=LATER):
    return HashCache([tmp_path / "cache"], clock=clock)


@QUICK
@given(tree=FOLDERS, data=st.data())
def test_what_is_kept_never_hides_a_change(tmp_path, tree, data):
    """Bytes that change in place, with the time of modification put back: everything else is as it was."""
    files = flat(tree)
    folder = emptied(tmp_path / "data")
    put(folder, files)
    how = {"cache": cache(tmp_path), "clock": LATER}
    first = take(folder, **how)
    assert first.read_files == len(files)
    again = take(folder, **how)
    assert (again.read_files, again.snapshot) == (0, first.snapshot)
    fitting = sorted(name for name in files if files[name])
    if not fitting:
        return
    name = data.draw(st.sampled_from(fitting))
    path = folder / name
    before = path.stat()
    tick(path)
    with path.open("r+b") as file:
        file.write(bytes([files[name][0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    last = take(folder, **how)
    assert last.read_files == 1
    assert [each for each, _ in compare_data(first.snapshot, last.snapshot).changed] == [name]


def tick(path):
    """Wait until the filesystem's clock has moved on: LATER says that it has, by two ticks."""
    before = path.stat().st_ctime_ns
    probe = path.parent / ".nfs-probe"
    while True:
        probe.touch()
        now = probe.stat().st_ctime_ns
        probe.unlink()
        if now > before:
            return


def test_a_file_that_was_changed_just_now_is_read_again(tmp_path):
    folder = tmp_path / "data"
    put(folder, {"a": b"1", "b": b"2"})
    old = time.time() - 3600
    os.utime(folder / "a", (old, old))  # its status change is of just now
    how = {"cache": cache(tmp_path, Clock()), "clock": Clock()}
    assert take(folder, **how).read_files == 2
    assert take(folder, **how).read_files == 2
    how = {"cache": cache(tmp_path), "clock": LATER}
    assert take(folder, **how).read_files == 2
    assert take(folder, **how).read_files == 0


def test_when_a_stamp_is_old_enough_is_told_by_both_times():
    stamp = Stamp(1, 100, 200, 7)
    assert not settled(stamp, 200 + TICK_NS)
    assert settled(stamp, 201 + TICK_NS)
    assert not settled(Stamp(1, 300, 200, 7), 201 + TICK_NS)


def test_a_file_in_place_of_another_is_read(tmp_path):
    folder = tmp_path / "data"
    put(folder, {"a": b"old", "b": b"other"})
    how = {"cache": cache(tmp_path), "clock": LATER}
    take(folder, **how)
    put(tmp_path, {"spare": b"new"})
    shutil.copystat(folder / "a", tmp_path / "spare")
    (tmp_path / "spare").rename(folder / "a")
    assert take(folder, **how).read_files == 1


def damages(data):
    yield b""
    yield b"{}"
    yield data[:-1]
    yield data + b" "
    yield data.replace(b'"files"', b'"filez"')
    yield bytes([*data[:100], data[100] ^ 1, *data[101:]])


def test_a_damaged_cache_is_as_if_it_were_not_there(tmp_path):
    folder = tmp_path / "data"
    put(folder, {"a": b"1", "b/c": b"2"})
    how = {"cache": cache(tmp_path), "clock": LATER}
    expected = take(folder, **how).snapshot
    (path,) = (tmp_path / "cache").glob("*.json")
    for damage in list(damages(path.read_bytes())):
        path.write_bytes(damage)
        taken = take(folder, **how)
        assert (taken.read_files, taken.snapshot) == (2, expected), damage
        assert take(folder, **how).read_files == 0


def test_a_cache_that_lies_within_its_seal_is_none(tmp_path):
    """Values that are no hashes, sealed: made by another program."""
    from hpc_resume.provenance.hashcache import _key
    from hpc_resume.rundir import seal_lines

    folder = tmp_path / "data"
    put(folder, {"a": b"1"})
    how = {"cache": cache(tmp_path), "clock": LATER}
    expected = take(folder, **how).snapshot
    (path,) = (tmp_path / "cache").glob("*.json")
    stamp = list(Stamp.of((folder / "a").stat()))
    for row in (["a", *stamp, "xyz", True, None], ["a", *stamp[:3], "5f" * 16, True, None], [1], 7):
        import json

        path.write_bytes(seal_lines(1, _key(folder), f'"files": [{json.dumps(row)}]}}'.encode()))
        assert take(folder, **how).snapshot == expected


def test_a_cache_that_can_not_be_written_costs_time_alone(tmp_path):
    folder = tmp_path / "data"
    put(folder, {"a": b"1"})
    (tmp_path / "file").touch()
    how = {"cache": HashCache([tmp_path / "file" / "cache"], clock=LATER), "clock": LATER}
    assert take(folder, **how).read_files == 1
    assert take(folder, **how).read_files == 1


def test_the_second_folder_serves_where_the_first_is_gone(tmp_path):
    folder = tmp_path / "data"
    put(folder, {"a": b"1"})
    both = HashCache([tmp_path / "one", tmp_path / "two"], clock=LATER)
    take(folder, cache=both, clock=LATER)
    shutil.rmtree(tmp_path / "one")
    assert take(folder, cache=both, clock=LATER).read_files == 0


def test_hashes_that_nobody_uses_are_deleted(tmp_path):
    put(tmp_path, {"x/a": b"1", "y/a": b"2"})
    how = {"cache": cache(tmp_path), "clock": LATER}
    take(tmp_path / "x", **how)
    (old,) = (tmp_path / "cache").glob("*.json")
    long_ago = time.time() - 100 * 86400
    os.utime(old, (long_ago, long_ago))
    take(tmp_path / "y", **how)
    assert old not in list((tmp_path / "cache").glob("*.json"))


def test_several_processes_may_use_one_cache(tmp_path):
    put(tmp_path / "data", {str(number): bytes([number]) for number in range(50)})
    found, threads = [], []
    for _ in range(4):
        each = HashCache([tmp_path / "cache"], clock=LATER)
        threads.append(
            threading.Thread(
                target=lambda each=each: found.append(
                    take(tmp_path / "data", cache=each, clock=LATER).snapshot
                )
            )
        )
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len({each.digest for each in found}) == 1
    assert take(tmp_path / "data", cache=cache(tmp_path), clock=LATER).read_files == 0


def test_several_paths_are_told_apart_by_their_last_parts(tmp_path):
    put(tmp_path, {"a/train/x": b"1", "b/train/x": b"2", "val/y": b"3", "table.csv": b"4"})
    named = take(tmp_path / "a/train", tmp_path / "val", tmp_path / "table.csv").snapshot
    assert set(named.files) == {"train/x", "val/y", "table.csv"}
    assert set(take(tmp_path / "a/train", tmp_path / "b/train").snapshot.files) == {"a/train/x", "b/train/x"}
    assert set(take(tmp_path / "table.csv").snapshot.files) == {"table.csv"}
    by_name = take_snapshot({"one": tmp_path / "a/train", "two": tmp_path / "table.csv"}).snapshot
    assert set(by_name.files) == {"one/x", "two"}
    with pytest.raises(UsageError, match="stands twice"):
        take(tmp_path / "val", tmp_path / "val")
    nested = take(tmp_path, tmp_path / "val").snapshot
    assert {f"{tmp_path.name}/val/y", "val/y"} <= set(nested.files)


def test_a_path_may_hold_a_variable(tmp_path, monkeypatch):
    put(tmp_path, {"x": b"1"})
    monkeypatch.setenv("DATA_HERE", str(tmp_path))
    assert set(take("$DATA_HERE").snapshot.files) == {"x"}


def test_links_count_as_what_they_lead_to(tmp_path):
    put(tmp_path, {"store/1": b"1", "store/2": b"2", "data/own": b"0"})
    (tmp_path / "data/a").symlink_to("../store/1")
    (tmp_path / "data/folder").symlink_to(tmp_path / "store")
    old = take(tmp_path / "data").snapshot
    assert set(old.files) == {"own", "a", "folder/1", "folder/2"}
    (tmp_path / "data/a").unlink()
    (tmp_path / "data/a").symlink_to("../store/2")
    assert [name for name, _ in compare_data(old, take(tmp_path / "data").snapshot).changed] == ["a"]


def test_what_has_no_contents_is_refused_by_name(tmp_path):
    folder = tmp_path / "data"
    put(folder, {"x": b"1"})
    for make, words in (
        (lambda: (folder / "gone").symlink_to("nowhere"), "gone: a link to something that is not there"),
        (lambda: os.mkfifo(folder / "pipe"), "pipe: neither a file nor a folder"),
        (lambda: (folder / "loop").symlink_to(folder), "leads back"),
    ):
        make()
        with pytest.raises(UsageError, match=words):
            take(folder)
        for name in ("gone", "pipe", "loop"):
            (folder / name).unlink(missing_ok=True)
    with pytest.raises(UsageError, match="is not there"):
        take(tmp_path / "nix")
    assert take(folder).snapshot.files


@pytest.mark.skipif(os.getuid() == 0, reason="root reads everything")
def test_what_can_not_be_read_is_refused_by_name(tmp_path):
    put(tmp_path, {"x": b"1"})
    (tmp_path / "x").chmod(0)
    with pytest.raises(UsageError, match="x: the data can't be read"):
        take(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    put(tmp_path, {"x": b"1" * 100})
    real = os.preadv

    def preadv(fd, buffers, offset):
        got = real(fd, buffers, offset)
        with (tmp_path / "x").open("ab") as file:
            file.write(b"more")
        monkeypatch.setattr(os, "preadv", real)
        return got

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(UsageError, match="x: was changed while it was read"):
        take(tmp_path)


def test_a_file_that_is_shorter_than_it_says_is_refused(tmp_path, monkeypatch):
    """As on a network filesystem, which remembers the old length for some seconds."""
    put(tmp_path, {"x": b"1" * 100})
    real = os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, offset: 0 if offset else real(fd, [buffers[0][:50]], 0)
    )
    with pytest.raises(UsageError, match="x: was changed while it was read"):
        take(tmp_path)


def test_what_may_pass_is_no_fault_of_the_user(tmp_path, monkeypatch):
    put(tmp_path, {"x": b"1"})

    def preadv(fd, buffers, offset):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(OSError, match="Input/output") as caught:
        take(tmp_path)
    assert not isinstance(caught.value, UsageError)


def test_it_can_be_left_and_what_was_read_is_kept(tmp_path):
    put(tmp_path / "data", {f"{number:03}": os.urandom(1 << 16) for number in range(200)})

    class Leave(BaseException):
        pass

    def tell(taking):
        if taking.done_bytes:
            raise Leave

    real = os.preadv

    def slow(fd, buffers, offset):
        time.sleep(0.01)
        return real(fd, buffers, offset)

    reading = Reading(cache=cache(tmp_path), clock=LATER, threads=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", slow)
        with pytest.raises(Leave):
            take_snapshot([tmp_path / "data"], reading, tell=tell)
    rest = take(tmp_path / "data", cache=cache(tmp_path), clock=LATER)
    assert 0 < rest.read_files < 200
    assert rest.snapshot == take(tmp_path / "data").snapshot


def test_names_and_sizes_alone(tmp_path):
    put(tmp_path, {"a": b"1", "b": b"22"})
    whole = take(tmp_path).snapshot
    taken = take(tmp_path, contents=False)
    assert (taken.read_files, taken.read_bytes) == (0, 0)
    assert not taken.snapshot.read
    assert not compare_data(whole, taken.snapshot)
    (tmp_path / "b").write_bytes(b"33")
    same_size = compare_data(whole, take(tmp_path, contents=False).snapshot)
    assert (bool(same_size), same_size.unread) == (False, 2)
    (tmp_path / "b").write_bytes(b"3")
    assert compare_data(whole, take(tmp_path, contents=False).snapshot).changed == (("b", "2 → 1 bytes"),)


def test_what_does_not_count(tmp_path):
    put(tmp_path, {"x": b"1", ".nfs000123": b"", "a/__pycache__/m.pyc": b"", "cache-5f3c.arrow": b"2"})
    assert set(take(tmp_path).snapshot.files) == {"x"}
    assert len(take(tmp_path, ignore=()).snapshot.files) == 4
    assert DataSettings().ignore == IGNORED


@pytest.mark.parametrize("change", [lambda data: data[:-2], lambda data: data.replace(b'["a",1', b'["b",1')])
def test_a_damaged_snapshot_is_none(tmp_path, change):
    put(tmp_path, {"a": b"1"})
    data = take(tmp_path).snapshot.to_bytes()
    with pytest.raises(ValueError, match="seal differs"):
        DataSnapshot.from_bytes(change(data))


def test_any_flipped_byte_of_a_snapshot_is_found(tmp_path):
    put(tmp_path, {"a": b"1", "b": b"2"})
    data = take(tmp_path).snapshot.to_bytes()
    for place in range(len(data)):
        for mask in (1, 0x20):
            flipped = data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]
            try:
                found = DataSnapshot.from_bytes(flipped)
            except ValueError:
                continue
            raise AssertionError((place, mask, found))


def test_sealed_by_another_hand_it_must_still_be_a_snapshot(tmp_path):
    from hpc_resume.rundir import seal_lines

    rest = '"rest": {"fingerprints": {}, "inside": {}, "saved": {}}}'
    for files in (
        '[["a", 1]]',
        '[["a", -1, null]]',
        "[[1, 1, null]]",
        '[["a", 1, "x"]]',
        "7",
        '[["a", 1, null]]',
    ):
        with pytest.raises(ValueError, match=r"snapshot|digest|size"):
            DataSnapshot.from_bytes(seal_lines(1, "0" * 32, f'"files": {files}, {rest}'.encode()))
    with pytest.raises(ValueError, match="schema 2"):
        DataSnapshot.from_bytes(seal_lines(2, "0" * 32, b"}"))


def test_many_changes_are_told_in_a_few_lines(tmp_path):
    put(tmp_path / "old", {f"{number:02}": bytes([number]) for number in range(30)})
    Path(tmp_path / "new").mkdir()
    change = compare_data(take(tmp_path / "old").snapshot, take(tmp_path / "new").snapshot)
    assert len(change.lines()) == 21
    assert change.lines()[-1] == "and 10 more"
    assert change.counts() == "30 removed"
    assert len(change.lines(None)) == 30
