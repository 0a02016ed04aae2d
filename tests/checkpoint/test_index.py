import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_resume.checkpoint.blocks import count_checksums
from hpc_resume.checkpoint.boxes import Box
from hpc_resume.checkpoint.index import (
    Entry,
    Run,
    decode_index,
    encode_index,
    index_digest,
    shard_file,
)
from hpc_resume.errors import IntegrityError
from tests.checkpoint.shapes import dtypes, quick

SIZE = 1 << 40
FILES = [("0000000012-3f9a1c2e", shard_file(1, 4)), ("0000000014-3f9a1c2f", shard_file(1, 4, by=2))]


@st.composite
def indexes(draw):
    files = FILES[: draw(st.integers(0, 2))]
    entries = []
    for number in range(draw(st.integers(0, 5))):
        shape = (draw(st.integers(1, 90)), draw(st.integers(1, 3000)))
        first = draw(st.integers(0, shape[0] - 1))
        box = Box((first, 0), (draw(st.integers(1, shape[0] - first)), shape[1]))
        entry = Entry(f"t/{number}", draw(dtypes), shape, box, ())
        cuts = sorted({0, entry.length, *draw(st.lists(st.sampled_from(entry.cut[0]), max_size=3))})
        runs = tuple(
            Run(draw(st.integers(0, len(files))), draw(st.integers(0, SIZE // 2)), high - low)
            for low, high in itertools.pairwise(cuts)
        )
        entries.append(Entry(entry.name, entry.dtype, shape, box, runs))
    sums = sum(count_checksums(entry.cut) for entry in entries)
    return entries, files, draw(st.binary(min_size=8 * sums, max_size=8 * sums))


@quick
@given(indexes())
def test_indexes_survive_their_bytes(case):
    entries, files, table = case
    data = encode_index(entries, files)
    index = decode_index(data, table, size_bytes=SIZE)
    assert list(index.entries) == entries
    assert list(index.files) == files
    for number, entry in enumerate(entries):
        assert index.find(entry.name, entry.box) == number
        low, high = index.first_checksum[number], index.first_checksum[number] + count_checksums(entry.cut)
        assert bytes(index.table[low:high]) == table[8 * low : 8 * high]
    own = sum(run.length for entry in entries for run in entry.runs if run.file == 0)
    assert sum(length for _, length in index.own_extents()) == own
    assert index_digest(data, table) != index_digest(data + b" ", table)


def test_another_box_is_not_found():
    entry = Entry("a", "uint8", (4,), Box((0,), (4,)), (Run(0, 0, 4),))
    index = decode_index(encode_index([entry]), bytes(8), size_bytes=4)
    for name, box in (("a", Box((0,), (3,))), ("a", Box((1,), (3,))), ("b", Box((0,), (4,)))):
        with pytest.raises(IntegrityError, match="is not in its index"):
            index.find(name, box)
