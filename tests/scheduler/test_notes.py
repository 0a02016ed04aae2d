import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from hpc_resume.scheduler.notes import Notes


@pytest.fixture
def notes(tmp_path):
    return Notes(tmp_path)


def test_a_note_is_read_as_it_was_written_last(notes):
    assert notes.read("over", "12") == ""
    notes.write("over", "12", "first")
    notes.write("over", "12", "second")
    assert notes.read("over", "12") == "second"
    assert notes.read("over", "12_1") == ""


def test_what_is_no_job_id_has_no_notes(notes):
    with pytest.raises(ValueError, match="no job id"):
        notes.write("over", "../12", "x")
    assert notes.read("over", "../12") == ""


def test_ids_are_read_only_if_they_are_ids(notes):
    notes.write("after", "12", "13 14_2 --all x/1")
    notes.write("latest", "12", "--all")
    notes.write("from", "12", "-1")
    assert notes.after("12") == ["13", "14_2"]
    assert notes.latest("12") == "12"
    assert notes.first_type("12") == 0


def test_the_first_job_is_the_latest_until_another_has_begun(notes):
    assert notes.latest("12") == "12"
    notes.write("latest", "12", "13")
    assert notes.latest("12") == "13"


def test_one_of_many_gets_a_claim_and_one_of_many_drops_it(notes):
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: notes.claim("after", "12"), range(8))) == [False] * 7 + [True]
    assert notes.drop("after", "12")
    assert not notes.drop("after", "12")
    assert notes.claim("after", "12")


def test_the_age_of_a_note(notes):
    assert notes.age_s("after", "12", 1000.0) == 0
    notes.write("after", "12", "")
    os.utime(notes.path("after", "12"), (940.0, 940.0))
    assert notes.age_s("after", "12", 1000.0) == 60


def test_a_note_that_is_no_file_is_not_read(notes):
    notes.write("over", "12", "x")
    os.mkfifo(notes.path("after", "12"))
    assert notes.after("12") == []
