"""The table of docs/slurm.md: what becomes of a run, by what ends its job and by its way to go on.

The tests make it from what they have seen, and compare it with the page. To write it anew::

    $ HPC_RESUME_WRITE_TABLE=1 python -m pytest tests/slurm/test_continuation.py
"""

import os
import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "slurm.md"
_PLACE = re.compile(r"(<!-- table -->\n).*?(<!-- end of table -->)", re.DOTALL)


def check(rows, ways):
    """Compare rows with the page, or write them into it.

    Parameters
    ----------
    rows
        What happened, in words, and what came of it for each way.
    ways
        In the order of the columns.
    """
    lines = [
        "| what happens | " + " | ".join(f"`{way}`" for way in ways) + " |",
        "|---" * (len(ways) + 1) + "|",
    ]
    lines += [f"| {what} | " + " | ".join(cells.get(way, "-") for way in ways) + " |" for what, cells in rows]
    table = "\n".join(lines) + "\n"
    text = PAGE.read_text()
    written = _PLACE.sub(lambda match: match[1] + table + match[2], text)
    if os.environ.get("HPC_RESUME_WRITE_TABLE"):
        PAGE.write_text(written)
    assert written == text or os.environ.get("HPC_RESUME_WRITE_TABLE"), f"docs/slurm.md should say\n{table}"
