"""What a run has told a tracker that forgets nothing: under which id, and up to which step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hpc_resume.files import DISK, Filesystem
from hpc_resume.run.tracking.trackers import Row
from hpc_resume.untrusted import parse_json, read_regular

_LONGEST_BYTES = 1 << 16


class Ledger:
    """Keeps it in the run directory; a copy of the folder in another run counts for nothing there.

    Trackers like these append: a step that is done again after a resume would stand there twice. So what has been
    told once is not told again.

    Parameters
    ----------
    path
        The file.
    run_id
        Of the run.
    fs
        Filesystem.
    """

    def __init__(self, path: Path, run_id: str, *, fs: Filesystem = DISK) -> None:
        self._path = path
        self._run_id = run_id
        self._fs = fs
        #: The run's id at the tracker.
        self.id: str | None = None
        #: The last step that was told; -1: none.
        self.told = -1
        try:
            record = parse_json(read_regular(path, longest_bytes=_LONGEST_BYTES))
            if record["run_id"] == run_id and isinstance(record["id"], str) and type(record["told"]) is int:
                self.id, self.told = record["id"], record["told"]
        except (OSError, ValueError, TypeError, LookupError):
            pass  # there is none, or nothing to be made of it

    def keep(self, tracker_id: str, told: int | None = None) -> None:
        """Write down the id, and perhaps that more was told than is known here."""
        self.id = tracker_id
        self.told = max(self.told, -1 if told is None else told)
        self._write()

    def fresh(self, rows: Sequence[Row]) -> list[Row]:
        """Give the rows that were not told yet, and write down that they are.

        Before they are: after a crash in between they are missing there, instead of being there twice.
        """
        found = [row for row in rows if row[0] > self.told]
        if found:
            self.told = max(row[0] for row in found)
            self._write()
        return found

    def _write(self) -> None:
        record = {"run_id": self._run_id, "id": self.id, "told": self.told}
        self._fs.make_dirs(self._path.parent)
        draft = self._path.with_suffix(".tmp")
        draft.write_text(json.dumps(record), encoding="utf-8")
        self._fs.rename(draft, self._path)  # once a second, so without waiting for the disk
