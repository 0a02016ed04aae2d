import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.errors import IntegrityError
from hpc_resume.provenance.listing import FileChanges, Listing, SourceFile, enumerated, is_plain_path

names = st.lists(st.sampled_from(["a", "b.py", "c d", "é"]), min_size=1, max_size=3).map("/".join)
contents = st.dictionaries(names, st.tuples(st.binary(max_size=20), st.booleans()), min_size=1, max_size=6)


def listing(files):
    return Listing(
        {path: SourceFile.of(data, executable=executable) for path, (data, executable) in files.items()}
    )


def plain(files):
    folders = {"/".join(path.split("/")[:end]) for path in files for end in range(1, path.count("/") + 1)}
    return {path: value for path, value in files.items() if path not in folders}


@given(contents, st.data())
def test_any_other_byte_is_another_source_and_named(files, data):
    files = plain(files)
    before = listing(files)
    path = data.draw(st.sampled_from(sorted(files)))
    old, executable = files[path]
    place = data.draw(st.integers(0, len(old)))
    new = old[:place] + bytes([((old[place] + 1) % 256) if place < len(old) else 0]) + old[place + 1 :]
    after = listing({**files, path: (new, executable)})
    assert after.digest != before.digest
    assert FileChanges.between(before, after) == FileChanges(added=(), removed=(), changed=(path,))
    toggled = listing({**files, path: (old, not executable)})
    assert FileChanges.between(before, toggled).changed == (path,)
    assert toggled.digest != before.digest


@given(contents)
def test_order_does_not_matter_and_json_gives_it_back(files):
    files = plain(files)
    mine = listing(files)
    assert listing(dict(reversed(files.items()))).digest == mine.digest
    assert Listing.from_json(mine.to_json()) == mine
    assert not FileChanges.between(mine, Listing.from_json(mine.to_json()))


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../b", "a//b", "a/", "", ".", "a\0b", "a\nb", "x" * 5000, 3]
)
def test_a_path_that_leads_elsewhere_is_none(path):
    assert not is_plain_path(path)
    with pytest.raises(IntegrityError):
        Listing.from_json({path: [0, False, "0" * 64]})


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {"a": 1},
        {"a": [1, False]},
        {"a": [-1, False, "0" * 64]},
        {"a": [1.0, False, "0" * 64]},
        {"a": [1, 0, "0" * 64]},
        {"a": [1, False, "g" * 64]},
        {"a": [1, False, None]},
        {"a": [1, False, "0" * 64], "a/b": [1, False, "0" * 64]},
        {str(number): [0, False, "0" * 64] for number in range(20_001)},
    ],
)
def test_what_is_no_listing_is_refused(record):
    with pytest.raises(IntegrityError):
        Listing.from_json(record)


def test_many_names_are_cut_short():
    assert enumerated("abc") == "a, b, c"
    assert enumerated("abcdefgh", most=3) == "a, b and 6 more"
