"""Files that were made to fool or to hurt whoever reads them; see :mod:`tests.hostile.cases`."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpc_resume.checkpoint import store
from hpc_resume.checkpoint.index import decode_index
from hpc_resume.checkpoint.manifest import Manifest
from hpc_resume.checkpoint.verify import verify_run
from hpc_resume.errors import IntegrityError
from hpc_resume.report.checkpoints import describe, list_checkpoints
from hpc_resume.report.tables import checkpoint_table, contents_table
from hpc_resume.rundir import RunDirectory
from tests.hostile.base import CHANGED, FULL, make_run
from tests.hostile.cases import index_lies, manifest_lies
from tests.hostile.forge import Forge, with_content_id

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("hostile") / "run").root


@pytest.mark.timeout(600)
@pytest.mark.parametrize("share", ["0/2", "1/2"])
def test_every_hostile_run_ends_in_one_clear_error(tmp_path, share):
    """Every way to read it, in 256 MB and 30 s of a slow machine, without a traceback, a write, or a call of HDF5."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.runner", str(tmp_path), "--share", share],
        cwd=REPOSITORY,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) > 100
    assert {result["name"]: result["wrong"] for result in results if result["wrong"]} == {}


def took(function, *args, **kwargs):
    begun = time.process_time()
    try:
        result = function(*args, **kwargs)
    except IntegrityError as error:
        assert 0 < len(str(error)) < 3000  # noqa: PT017 - most must raise it, but not all
        result = None
    assert time.process_time() - begun < 1
    return result


def test_no_field_of_a_manifest_can_lie(base):
    record = Forge(base, CHANGED).record
    believed = set()
    for name, body in manifest_lies(record):
        manifest = took(Manifest.from_bytes, with_content_id(body))
        if manifest is not None:
            believed.add(name)
            shown = contents_table(describe(manifest.name, manifest)).lines()
            assert all(char.isprintable() or char == "\n" for line in shown for char in line)
            json.dumps(describe(manifest.name, manifest), indent=1)
            assert Manifest.from_bytes(manifest.to_bytes()) is not None
    # What is only shown may say anything that can be shown; the objects are read when they are restored; fields
    # that are not known are passed over. Anything else is a number that may be so, or an empty list.
    free = (
        "run_id",
        "reason",
        "note",
        "node_type",
        "config",
        "environment",
        "costs",
        "objects",
        "shards.0.node",
    )
    assert {name for name in believed if not name.startswith((*free, "unknown"))} == {
        *(f"{field}={number}" for field in ("attempt", "samples") for number in ("two-to-62",)),
        "created=float",
        "created=whole-float",
        "differing_ranks=list",
        "missing_ranks=list",
        "layouts.1.splits=list",
        "parent=null",
        "refers=list",
        "step=two-to-62",
        "shards.0.size_bytes=two-to-62",  # compared with the file when it is opened
        "tensors=object",
    }


def test_no_field_of_an_index_can_lie(base):
    believed = set()
    for step in (FULL, CHANGED):
        forge = Forge(base, step)
        for rank in range(2):
            size_bytes = forge.path(rank).stat().st_size
            for name, data in index_lies(forge.index(rank)):
                if took(decode_index, data, forge.table(rank), size_bytes=size_bytes) is not None:
                    believed.add(name)
    # A box may have any name; whether it is the right one is seen when it is looked up.
    assert believed <= {"names.0=string", "names.0=control", "files=list"}


def test_a_damaged_checkpoint_is_listed_beside_sound_ones(base, tmp_path):
    run = RunDirectory(base)
    rows = list_checkpoints(base)
    assert [row.problem for row in rows] == [None, None]
    assert len(checkpoint_table("", rows).lines()) == 3
    assert verify_run(base) == []
    assert store.find(run)[1].step == CHANGED


def test_what_is_quarantined_is_the_link_and_not_what_it_leads_to(tmp_path):
    run = make_run(tmp_path / "run")
    folder = Forge(run.root, CHANGED).folder
    outside = tmp_path / folder.name
    folder.rename(outside)
    folder.symlink_to(outside)
    store.quarantine(run, folder.name, "it is a link")
    assert not folder.exists()
    assert min(path.name for path in outside.iterdir()) == "manifest.json"
    assert [path for path in run.quarantine.iterdir() if path.is_symlink()] != []


def test_the_folder_of_all_checkpoints_may_be_a_link(tmp_path):
    """To another filesystem, say; what is in it may not."""
    run = make_run(tmp_path / "run")
    run.checkpoints.rename(tmp_path / "elsewhere")
    run.checkpoints.symlink_to(tmp_path / "elsewhere")
    assert verify_run(run.root) == []
    assert store.find(run)[1].step == CHANGED
