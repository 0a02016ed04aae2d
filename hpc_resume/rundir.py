"""The run directory: which file lies where, and who the run is.

::

    RUN_DIR/
      run.json                     identity, written once
      configs/DIGEST.yaml          every resolved configuration that was ever used
      data/DIGEST.json             every snapshot of data that was ever trained or validated on
      sources/                     the source that was run: DIGEST.zip, DIGEST.json, and DIGEST/ if jobs run from it
      attempts/0003/               one per allocation
        attempt.json  events.jsonl  metrics-rank-00000.jsonl  rank-00007.log
        staging/0000012000/        a checkpoint that is being written; moved away when committed
      checkpoints/0000012000-3f9a1c2e/   manifest.json, rank-00000-of-00004.h5: committed, immutable
      quarantine/                  what failed verification, kept with the reason
      rollbacks/0001.json          which checkpoints a person has set aside, and why
      lineage.json                 of a fork: which run it comes from, and at which step
      pruned/                      a note of each checkpoint that was deleted on purpose
      probe/DIGEST.safetensors     the batch that run.probe works on
      trackers/                    of experiment trackers: TensorBoard's events, ids of others
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from hpc_resume.errors import CheckpointNotFound, IntegrityError, UsageError
from hpc_resume.files import DISK, Clock, Filesystem, JsonObject
from hpc_resume.untrusted import brief, check_nesting, parse_json, read_regular

SCHEMA = 1
#: A longer run.json is none.
_LONGEST_IDENTITY_BYTES = 1 << 20
_SEALED_LINE = re.compile(
    rb'\{"schema": ([1-9][0-9]{0,8}), "digest": "([0-9a-f]{32})", "seal": "([0-9a-f]{32})",\n'
)
_ATTEMPT = re.compile(r"[0-9]{4,18}")
_CHECKPOINT = re.compile(r"([0-9]{10,20})-([0-9a-f]{8})")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths of one run.

    Parameters
    ----------
    root
        The folder; it need not exist until :meth:`create`.
    """

    root: Path

    @property
    def identity_path(self) -> Path:
        """``run.json``."""
        return self.root / "run.json"

    @property
    def attempts(self) -> Path:
        """Folder of attempts."""
        return self.root / "attempts"

    @property
    def checkpoints(self) -> Path:
        """Folder of committed checkpoints."""
        return self.root / "checkpoints"

    @property
    def quarantine(self) -> Path:
        """Folder of what failed verification."""
        return self.root / "quarantine"

    @property
    def configs(self) -> Path:
        """Folder of resolved configurations."""
        return self.root / "configs"

    @property
    def data(self) -> Path:
        """Folder of data snapshots; in ``cache/`` below it, hashes of files that need not be read again."""
        return self.root / "data"

    @property
    def sources(self) -> Path:
        """Folder of the sources that were run."""
        return self.root / "sources"

    @property
    def pruned(self) -> Path:
        """Folder of what was deleted on purpose: a note of each, and what is just being removed."""
        return self.root / "pruned"

    @property
    def probe(self) -> Path:
        """Folder of the batch that a probe works on."""
        return self.root / "probe"

    @property
    def trackers(self) -> Path:
        """Folder of what experiment trackers keep of the run."""
        return self.root / "trackers"

    def attempt(self, number: int) -> Path:
        """Folder of one attempt."""
        return self.attempts / f"{number:04d}"

    def exit_codes_path(self, job_id: str, restart_count: int) -> Path:
        """Where who started an attempt's ranks leaves their exit codes, until the next attempt has read them."""
        return self.attempts / f".exit-{job_id}-{restart_count}.json"

    def create(
        self,
        name: str,
        *,
        arguments: JsonObject | None = None,
        fs: Filesystem = DISK,
        clock: Clock = time.time,
    ) -> JsonObject:
        """Make the folders and ``run.json`` if they are not there yet.

        Safe when several processes do it at once: the first identity that is linked in place stays.

        Parameters
        ----------
        name
            What the run is called.
        arguments
            Those that tell it from the other runs of its array, if it is one of an array.

        Returns
        -------
        dict
            The identity: ``run_id``, ``name``, ``created`` (Unix seconds), ``schema``, perhaps ``arguments``.

        Raises
        ------
        UsageError
            If the folders can't be made.
        IntegrityError
            If there is an identity, and it is damaged.
        """
        try:
            for folder in (self.attempts, self.checkpoints, self.quarantine, self.configs):
                fs.make_dirs(folder)
        except OSError as error:
            raise UsageError(
                f"{self.root}: can't be made a run directory ({error.strerror}: {error.filename}); "
                "give another run_dir, on a filesystem that all nodes can write to"
            ) from error
        if not self.identity_path.exists():
            identity = {"schema": SCHEMA, "run_id": uuid.uuid4().hex, "name": name, "created": clock()}
            identity |= {} if arguments is None else {"arguments": arguments}
            draft = self.root / f".run.json.{uuid.uuid4().hex}"
            try:
                fs.write_file(draft, sealed(identity))
                fs.link(draft, self.identity_path)
            except FileExistsError:
                pass  # somebody was faster
            finally:
                with contextlib.suppress(OSError):
                    fs.unlink(draft)
            fs.fsync_dir(self.root)
        return self.identity()

    def identity(self) -> JsonObject:
        """Read ``run.json``.

        Raises
        ------
        CheckpointNotFound
            If the folder is no run directory.
        IntegrityError
            If the file is damaged.
        """
        try:
            identity = parse_json(read_regular(self.identity_path, longest_bytes=_LONGEST_IDENTITY_BYTES))
            check_nesting(identity, 8)
        except (FileNotFoundError, NotADirectoryError):
            raise CheckpointNotFound(
                f"{self.root}: no run directory (there is no run.json in it); {_meant(self.root)}"
            ) from None
        except ValueError as error:
            raise IntegrityError(f"{self.identity_path}: damaged ({error!s:.200})") from error
        except OSError as error:
            raise IntegrityError(f"{self.identity_path}: can't be read ({error.strerror})") from error
        if not isinstance(identity, dict) or not isinstance(identity.get("run_id"), str):
            raise IntegrityError(f"{self.identity_path}: damaged (no run_id)")
        if identity.get("digest") != digest(identity):
            raise IntegrityError(f"{self.identity_path}: damaged (its digest differs)")
        if identity.get("schema") != SCHEMA:
            raise IntegrityError(
                f"{self.identity_path}: schema {brief(identity.get('schema'))}, but this version reads {SCHEMA}"
            )
        return identity

    def attempt_numbers(self) -> list[int]:
        """Numbers of the attempts that have begun, ascending."""
        try:
            names = os.listdir(self.attempts)  # noqa: PTH208 - names are all that is needed
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(int(name) for name in names if _ATTEMPT.fullmatch(name))

    def checkpoint_names(self) -> list[str]:
        """Names in ``checkpoints/`` that look like a checkpoint, by ascending step."""
        try:
            names = os.listdir(self.checkpoints)  # noqa: PTH208 - as above
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted((name for name in names if _CHECKPOINT.fullmatch(name)), key=checkpoint_step)


def digest(record: JsonObject) -> str:
    """First 16 hex digits of the SHA-256 of a record, whatever its ``digest`` field says."""
    body = {key: value for key, value in record.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def sealed(record: JsonObject) -> bytes:
    """Give a record as the bytes of its file, with its digest as the last field."""
    return json.dumps({**record, "digest": digest(record)}, indent=1).encode()


def seal_lines(schema: int, name: str, rest: bytes) -> bytes:
    """Give a record of many lines as the bytes of its file: the first line holds a digest of all of it.

    Parameters
    ----------
    schema
        Version of what the lines mean.
    name
        32 hex digits that say what it is.
    rest
        All other lines: the fields of a JSON object, and the brace that closes it.
    """
    return b'{"schema": %d, "digest": "%s", "seal": "%s",\n%s' % (
        schema,
        name.encode(),
        _seal(name.encode(), rest),
        rest,
    )


def unseal_lines(data: bytes) -> tuple[int, str, bytes]:
    """Read :func:`seal_lines`: schema, name, and the other lines.

    Raises
    ------
    ValueError
        If it is not what was written.
    """
    match = _SEALED_LINE.match(data)
    if match is None:
        raise ValueError("its first line is no seal")
    rest = data[match.end() :]
    if match[3] != _seal(match[2], rest):
        raise ValueError("its seal differs")
    return int(match[1]), match[2].decode(), rest


def _seal(name: bytes, rest: bytes) -> bytes:
    return hashlib.sha256(name + b"\n" + rest).hexdigest()[:32].encode()


def checkpoint_name(step: int, content_id: str) -> str:
    """Name of a checkpoint's folder: the step, then the first eight digits of the content id."""
    return f"{step:010d}-{content_id[:8]}"


def is_checkpoint_name(name: str) -> bool:
    """Whether a name is that of a checkpoint's folder."""
    return _CHECKPOINT.fullmatch(name) is not None


def checkpoint_step(name: str) -> int:
    """Step of a checkpoint, from its folder's name.

    Raises
    ------
    ValueError
        If it is no such name.
    """
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is no checkpoint name (step, dash, eight hex digits)")
    return int(match[1])


def _meant(root: Path) -> str:
    """Say which run a person may have meant by a folder that is none."""
    inside = sorted(path.parent for path in root.glob("*/run.json"))
    if inside:
        return f"there are runs below it: give one, such as {inside[0]}"
    beside = [path.parent.name for path in root.parent.glob("*/run.json")]
    if near := difflib.get_close_matches(root.name, beside, n=1):
        return f"did you mean {root.parent / near[0]}?"
    return "give the folder that was passed as run_dir, or list one: ls runs/"
