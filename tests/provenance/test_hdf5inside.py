"""What has changed inside of an HDF5 file is told by name; how it is laid out does not count."""

import h5py
import numpy as np
import pytest

from hpc_resume.provenance.datachange import compare_data
from hpc_resume.provenance.datahash import Reading, take_snapshot
from hpc_resume.provenance.hdf5inside import look_inside

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 255, (100, 8, 8), dtype=np.uint8)


def write(path, *, chunks=None, edit=lambda file: None, libver=None, **options):
    with h5py.File(path, "w", libver=libver) as file:
        file.attrs["made"] = "by hand"
        train = file.create_group("train")
        train.create_dataset("x", data=IMAGES, chunks=chunks, **options)
        train.create_dataset("y", data=np.arange(100))
        train["y"].attrs["classes"] = ["cat", "dog"]
        file.create_dataset("names", data=["Zoë", "b", ""], dtype=h5py.string_dtype())
        file.create_dataset("lists", (2,), dtype=h5py.vlen_dtype(np.int32))
        file["lists"][0] = [1, 2]
        file["lists"][1] = [3]
        file.create_dataset("table", data=np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "u1"), ("b", "f8")]))
        file.create_dataset("scalar", data=3.5)
        file.create_dataset("nothing", data=h5py.Empty("f4"))
        file.create_dataset("none", (0, 3), dtype="f4")
        file["soft"] = h5py.SoftLink("/train/x")
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/x")
        file["twice"] = train["y"]
        train["up"] = file
        edit(file)
    return path


def change_of(tmp_path, **how):
    folder = tmp_path / "data"
    folder.mkdir(exist_ok=True)
    write(folder / "images.h5")
    old = take_snapshot([folder]).snapshot
    write(folder / "images.h5", **how)
    return compare_data(old, take_snapshot([folder]).snapshot)


def test_everything_in_it_is_looked_at(tmp_path):
    found = look_inside(write(tmp_path / "a.h5"))
    assert {"/", "/train", "/train/x", "/train/y", "/names", "/lists", "/table", "/scalar", "/nothing"} < set(
        found
    )
    assert found["/train/x"][:2] == ("|u1", "(100, 8, 8)")
    assert [found[name][0] for name in ("/elsewhere", "/soft", "/train/up")] == ["link"] * 3
    assert found["/twice"] == found["/train/y"]


@pytest.mark.parametrize(
    "how",
    [
        {"chunks": (7, 3, 8)},
        {"chunks": (100, 1, 1), "compression": "gzip"},
        {"chunks": True, "shuffle": True, "compression": "gzip"},
        {"libver": "latest"},
    ],
    ids=["chunks", "columns", "gzip", "format"],
)
def test_another_layout_of_the_same_contents_is_no_change(tmp_path, how):
    change = change_of(tmp_path, **how)
    assert not change
    assert change.rewritten == ("images.h5",)
    assert change.lines() == ["rewritten: images.h5 (other bytes, the same contents)"]


def put(name, place, value):
    def edit(file):
        file[name][place] = value

    return edit


def attribute(file):
    file["train/y"].attrs["classes"] = ["cat", "cow"]


def grow(file):
    del file["train/y"]
    file["train"].create_dataset("y", data=np.arange(101))


def retype(file):
    del file["scalar"]
    file.create_dataset("scalar", data=np.float32(3.5))


def relink(file):
    del file["soft"]
    file["soft"] = h5py.SoftLink("/train/y")


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (put("train/x", (99, 7, 7), IMAGES[99, 7, 7] ^ 1), {"/train/x": "contents"}),
        (put("names", 1, "c"), {"/names": "contents"}),
        (put("lists", 1, [3, 4]), {"/lists": "contents"}),
        (put("table", 1, (3, 4.25)), {"/table": "contents"}),
        (put("scalar", (), 3.25), {"/scalar": "contents"}),
        (attribute, {"/train/y": "attributes", "/twice": "attributes"}),
        (grow, {"/train/y": "shape (100,) → (101,), attributes, contents"}),
        (retype, {"/scalar": "type <f8 → <f4, contents"}),
        (relink, {"/soft": "contents"}),
        (lambda file: file.create_dataset("more", data=1), {"/more": "added"}),
        (lambda file: file.__delitem__("none"), {"/none": "removed"}),
    ],
    ids=[
        "contents",
        "strings",
        "lists",
        "table",
        "scalar",
        "attributes",
        "shape",
        "type",
        "link",
        "add",
        "del",
    ],
)
def test_what_changed_is_named(tmp_path, edit, told):
    change = change_of(tmp_path, edit=edit)
    assert {name.removeprefix("images.h5:"): what for name, what in change.changed} == told


def test_large_rows_are_read_in_pieces(tmp_path, monkeypatch):
    from hpc_resume.provenance import hdf5inside

    whole = look_inside(write(tmp_path / "a.h5"))
    for piece_bytes in (1, 7, 64, 1000):
        monkeypatch.setattr(hdf5inside, "_PIECE_BYTES", piece_bytes)
        assert look_inside(tmp_path / "a.h5") == whole


def test_what_h5py_can_not_read_counts_by_its_bytes(tmp_path):
    path = write(tmp_path / "a.h5")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert look_inside(path) is None
    (tmp_path / "b.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 100)
    (tmp_path / "c.h5").write_bytes(b"no HDF5 at all")
    taken = take_snapshot([tmp_path])
    assert taken.snapshot.inside == {}
    assert len(taken.snapshot.files) == 3


def test_files_are_looked_into_only_if_that_is_wanted(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "a.h5")
    without = take_snapshot([folder], Reading(inside=False)).snapshot
    assert without.inside == {}
    assert without.digest == take_snapshot([folder]).snapshot.digest
