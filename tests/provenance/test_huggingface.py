"""Hugging Face datasets are known by what they say of themselves; these are their files and attributes, written by hand."""

import json

import pytest

from hpc_resume.errors import UsageError
from hpc_resume.provenance.datachange import compare_data
from hpc_resume.provenance.datahash import take_snapshot
from hpc_resume.provenance.datasnapshot import DataSnapshot
from hpc_resume.provenance.huggingface import fingerprints_of


class Dataset:
    """What counts of a ``datasets.Dataset``."""

    def __init__(self, fingerprint):
        self._fingerprint = fingerprint


def saved(folder, fingerprint="5f3c0a91d2b4e687"):
    folder.mkdir(parents=True)
    (folder / "data-00000-of-00001.arrow").write_bytes(b"table")
    state = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": fingerprint,
        "_split": "train",
    }
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"builder_name": "squad", "config_name": "plain"}))
    (folder / "cache-0123456789abcdef.arrow").write_bytes(b"of a map")


def test_what_a_saved_dataset_says_is_recorded(tmp_path):
    saved(tmp_path / "data" / "train")
    snapshot = take_snapshot([tmp_path / "data"]).snapshot
    facts = {
        "fingerprint": "5f3c0a91d2b4e687",
        "split": "train",
        "builder": "squad",
        "configuration": "plain",
    }
    assert snapshot.saved == {"train": facts}
    assert len(snapshot.files) == 3
    assert DataSnapshot.from_bytes(snapshot.to_bytes()) == snapshot


@pytest.mark.parametrize("text", ["", "[]", '{"_fingerprint": 7}', "{" * 5000])
def test_what_is_no_dataset_is_none(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    assert take_snapshot([tmp_path]).snapshot.saved == {}


def test_a_dataset_in_memory_counts_by_its_fingerprint():
    one, two = (
        take_snapshot([], fingerprints=fingerprints_of(Dataset(each), "data")).snapshot
        for each in ("abc", "abd")
    )
    assert one.digest != two.digest
    assert compare_data(one, two).lines() == ["changed: data (Hugging Face fingerprint abc → abd)"]
    assert DataSnapshot.from_bytes(one.to_bytes()) == one


def test_each_split_counts():
    assert fingerprints_of({"train": Dataset("a"), "test": Dataset("b")}, "data") == {
        "data/train": "a",
        "data/test": "b",
    }
    assert fingerprints_of([1, 2], "data") is None
    assert fingerprints_of({"train": "/a/path"}, "data") is None
    with pytest.raises(UsageError, match="data/test: has no fingerprint"):
        fingerprints_of({"train": Dataset("a"), "test": object()}, "data")
