"""Runs a module as ``python -m`` does, from the source that the job was submitted with.

``python -m hpc_resume.launch.module FOLDER NAME …`` stands for ``python -m NAME …``, for which Python looks into the
current folder first; what stands in ``PYTHONPATH`` comes second, so a snapshot there would come too late.
"""

from __future__ import annotations

import runpy
import sys


def main() -> None:
    """Run the module that the second argument names, looked up in the folder that the first one names."""
    _, folder, name, *rest = sys.argv
    sys.argv = [name, *rest]
    sys.path.insert(0, folder)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
