import os

from hpc_resume.journal import Journal, read_events


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
