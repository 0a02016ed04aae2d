"""``python -m hpc_resume.cli``: for an interpreter whose scripts are not on PATH."""

from hpc_resume.cli import main

main()
