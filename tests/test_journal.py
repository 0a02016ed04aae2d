"""The journal: whole lines, each with its checksum; older lines are read, damaged ones are found."""

import json
import os
import zlib

import pytest

from hpc_resume.journal import Journal, damaged_lines, read_events, write_line


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


@pytest.fixture
def journal(path):
    opened = Journal(path, clock=iter(range(100)).__next__)
    opened.event("begun")
    opened.event("saved", step=3, loss=float("nan"), text='a "#": "}\n')
    yield opened
    opened.close()


def test_events_come_back_without_their_checksums(journal, path):
    first, second = read_events(path)
    assert first == {"t": 0, "event": "begun"}
    assert (second["step"], second["text"]) == (3, 'a "#": "}\n')
    assert list(damaged_lines(path, sealed=True)) == []


def test_every_line_is_plain_json(journal, path):
    checksum = json.loads(path.read_bytes().split(b"\n")[0])["#"]
    assert int(checksum, 16) == zlib.crc32(b'{"t": 0, "event": "begun"')


def test_any_changed_byte_is_found_and_its_line_left_out(journal, path):
    data = path.read_bytes()
    for place in range(len(data)):
        for mask in (0x01, 0x20, 0x2A, 0x80):
            path.write_bytes(data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :])
            assert list(damaged_lines(path, sealed=True)), (place, mask)
            assert len(read_events(path)) < 2 or place == len(data) - 1, (place, mask)


def test_a_line_that_is_missing_its_checksum_is_found_beside_one_that_has_it(journal, path):
    path.write_bytes(path.read_bytes() + b'{"t": 9, "event": "ended"}\n')
    assert list(damaged_lines(path, sealed=False)) == [(3, "is not what was written")]


def test_older_lines_have_none(path):
    path.write_bytes(b'{"t": 1, "event": "begun"}\n{"t": 2, "event": "fresh"}\n')
    assert [event["event"] for event in read_events(path)] == ["begun", "fresh"]
    assert list(damaged_lines(path, sealed=False)) == []
    assert [number for number, _ in damaged_lines(path, sealed=True)] == [1, 2]


def test_a_torn_last_line_is_no_damage(journal, path):
    whole = path.read_bytes()
    for length in range(len(write_line({"t": 5, "event": "progress"}))):
        path.write_bytes(whole + write_line({"t": 5, "event": "progress"})[:length])
        assert list(damaged_lines(path, sealed=True)) == []


def test_no_file_no_events(path):
    assert read_events(path) == []


def test_a_full_disk_costs_no_event_and_raises_nothing(tmp_path, capfd):
    journal = Journal(tmp_path / "events.jsonl", clock=lambda: 1.0)
    journal.event("first")
    real, full = journal._fd, os.open("/dev/full", os.O_WRONLY)
    journal._fd = full
    journal.event("second", durable=True)
    journal.event("third")
    assert capfd.readouterr().err.count("No space left on device") == 1
    journal._fd = real
    os.close(full)
    journal.event("fourth", durable=True)
    journal.close()
    assert [event["event"] for event in read_events(journal.path)] == ["first", "second", "third", "fourth"]


def test_a_line_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "events.jsonl", clock=lambda: 1.0)
    journal.event("first")
    size_bytes = journal.path.stat().st_size
    real = os.write

    def torn(fd, data):
        if len(data) < 10:
            raise OSError(28, "No space left on device")
        return real(fd, data[: len(data) - 5])

    monkeypatch.setattr("os.write", torn)
    journal.event("second")
    assert journal.path.stat().st_size == size_bytes
    monkeypatch.setattr("os.write", real)
    journal.event("third")
    journal.close()
    assert [event["event"] for event in read_events(journal.path)] == ["first", "second", "third"]
