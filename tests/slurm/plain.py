"""Functions without torch, which submitted jobs import by reference: that takes a second less each time."""

import os
import time
from pathlib import Path


def count_to(seed, file):
    """Write down that this seed was there, and in which run directory."""
    with Path(file).open("a") as out:
        out.write(f"{seed} {os.environ['HPC_RESUME_RUN_DIR']}\n")
    return seed


def hold_on(seed):
    """Do nothing for long."""
    time.sleep(1000)
