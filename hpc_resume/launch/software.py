"""How the processes of a job find their software, as lines and words of shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from hpc_resume.errors import UsageError
from hpc_resume.settings import ContainerSettings, EnvironmentSettings

#: A batch shell is no login shell: on some sites it does not know ``module``.
#: Source: where Lmod and Environment Modules install themselves by default.
_FIND_MODULE = r"""if ! type module >/dev/null 2>&1; then
    for init in "${LMOD_PKG:-/usr/share/lmod/lmod}/init/bash" "${MODULESHOME:-/usr/share/modules}/init/bash" \
        /etc/profile.d/z00_lmod.sh /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do
        # shellcheck disable=SC1090 # the site's
        if [ -r "$init" ]; then . "$init"; break; fi
    done
fi"""

_AS_STRICT_AS_BEFORE = "[[ $strict != *e* ]] || set -e; [[ $strict != *u* ]] || set -u"

_ACTIVATE = r"""activate={name}
if [ -r "$activate/bin/activate" ]; then
    # shellcheck disable=SC1091 # the user's
    . "$activate/bin/activate"
else
    eval "$("${{CONDA_EXE:-conda}}" shell.bash hook)" && conda activate "$activate"
fi || {{ echo "hpc_resume: the environment $activate can't be activated" >&2; exit 1; }}"""


def software_lines(settings: EnvironmentSettings) -> list[str]:
    """Write the lines of bash that load modules, activate an environment, and set up the rest.

    A step that fails ends the shell with exit code 1: ranks without their software fail later, and say less.
    """
    lines: list[str] = []
    if settings.modules:
        names = shlex.join(settings.modules)
        lines += [
            _FIND_MODULE,
            f'module load {names} || {{ echo "hpc_resume: no module" {names} >&2; exit 1; }}',
        ]
    if settings.activate is not None:
        name = settings.activate
        if name.startswith("~"):
            name = str(Path(name).expanduser())  # it will stand in quotes
        lines.append(_ACTIVATE.format(name=shlex.quote(name)))
    if lines:
        # Files of sites and of conda are rarely written for strict shell options.
        lines = ["strict=$-", "set +eu", *lines, _AS_STRICT_AS_BEFORE]
    return [*lines, *settings.setup]


def container_words(settings: ContainerSettings, run_dir: Path) -> tuple[list[str], list[str]]:
    """Say how the ranks get into their container.

    The run's folder and the submitting one, ``$PWD``, are seen under the same paths inside.

    Returns
    -------
    (list of str, list of str)
        Options of ``srun``, and words before the command; both quoted for the shell.
    """
    if settings.image is None:
        return [], [shlex.quote(word) for word in settings.words]
    image, args = shlex.quote(settings.image), [shlex.quote(word) for word in settings.args]
    if settings.runtime == "pyxis":
        pairs = [_pair(str(run_dir)), *map(_pair, settings.mounts)]
        mounts = shlex.quote(",".join(pairs))
        options = [f"--container-image={image}", f'--container-mounts={mounts},"$PWD:$PWD"']
        return [*options, '--container-workdir="$PWD"', *args], []
    binds = [f"--bind={shlex.quote(mount)}" for mount in (str(run_dir), *settings.mounts)]
    return [], [settings.runtime, "exec", *binds, '--bind="$PWD"', '--pwd="$PWD"', *args, image]


def _pair(mount: str) -> str:
    """Write a mount as pyxis wants it, ``SOURCE:TARGET``; its list has no way to quote."""
    if "," in mount:
        raise UsageError(f"{mount}: pyxis can't mount a path with a comma; give it another name")
    return mount if ":" in mount else f"{mount}:{mount}"
