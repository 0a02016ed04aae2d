"""Makes the golden checkpoints of the present schema: one that is whole, and one that refers to it.

    $ python -m tests.golden.make      # writes tests/golden/schema-N.zip, once for each schema

What is in an archive that was committed once stays readable for ever, so there is never a reason to make one anew
under the same number.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpc_resume.checkpoint.manifest import SCHEMA
from hpc_resume.checkpoint.state import TrackedState
from tests.hostile.base import Writer

FOLDER = Path(__file__).parent
RANKS = 2
FULL, CHANGED = 3, 5


def state(step: int) -> dict[str, Any]:
    """What was saved at a step; the same for ever."""
    matrix = (torch.arange(384 * 128) % 11).reshape(384, 128).float()
    if step == CHANGED:
        matrix[:10] += 100
    tied = torch.arange(5.0)
    return {
        "tensors": {
            "matrix": matrix,
            "columns": {"inside": matrix.t().contiguous()},
            "tied": [tied, tied],
            "scalar": torch.tensor(step),
            "empty": torch.zeros(0, 3),
            "slash/and%": torch.ones(3, dtype=torch.bool),
            **{
                name: torch.arange(7).to(getattr(torch, name))
                for name in ("bfloat16", "float16", "float64", "int8", "uint8", "int16", "int64", "complex64")
            },
            "float8": [torch.arange(7.0).to(torch.float8_e5m2), torch.arange(7.0).to(torch.float8_e4m3fn)],
        },
        "objects": {
            "plain": [None, True, -7, 2**70, 0.1, "é\0\U0001f600", {"a": {"b": []}}],
            "floats": (float("inf"), float("-inf")),
            "sets": {"set": {1, 2}, "frozen": frozenset({"x"})},
            "keys": {1: "one", (1, 2): "pair", b"b": "bytes", "$dollar": None},
            "maps": [OrderedDict(z=1, a=2), Counter("aab")],
            "complex": 1 + 2j,
            "bytes": b"\x00\xff",
            "numpy": np.float32(1.5),
            "array": np.arange(6, dtype=np.int16).reshape(2, 3),
            "torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
        },
    }


def make(root: Path) -> None:
    """Save both."""
    objects = state(FULL)
    tracked = TrackedState(objects, rank=0, world_size=1)
    writer = Writer(root, ranks=RANKS)
    writer.save(FULL, tracked)
    with torch.no_grad():
        for name in ("matrix", "scalar"):
            objects["tensors"][name].copy_(state(CHANGED)["tensors"][name])
        objects["tensors"]["columns"]["inside"].copy_(state(CHANGED)["tensors"]["columns"]["inside"])
    writer.save(CHANGED, tracked, only_changed=True)
    writer.close()


def main() -> None:
    archive = FOLDER / f"schema-{SCHEMA}.zip"
    if archive.exists():
        sys.exit(f"{archive} is there already, and is to stay as it is")
    with (
        tempfile.TemporaryDirectory() as folder,
        zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        make(Path(folder) / "run")
        for path in sorted(Path(folder).rglob("*")):
            packed.write(path, path.relative_to(folder))


if __name__ == "__main__":
    main()
