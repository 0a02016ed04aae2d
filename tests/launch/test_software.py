import os
import shlex
import subprocess
from pathlib import Path

import pytest

from hpc_resume.config import Config
from hpc_resume.errors import ConfigError, UsageError
from hpc_resume.launch.software import container_words, software_lines
from hpc_resume.settings import ContainerSettings, EnvironmentSettings

RUN_DIR = Path("/scratch/eve/my runs/gpt")
#: What Lmod and Environment Modules give a shell: a function. It is not written for strict options.
MODULES = """\
module() { echo "module $*" >> calls; echo "$NOT_SET_ANYWHERE" >/dev/null; [ "$2" != wrong ] || return 1; }
"""


@pytest.fixture
def shell(tmp_path):
    """Run the lines of an environment in a shell, as strict as a person may have made it, then ``env``."""

    def run(options="-euo pipefail", /, environ=None, **settings):
        lines = [
            "set -- ",
            f"set {options}",
            *software_lines(EnvironmentSettings(**settings)),
            "echo $-; env",
        ]
        return subprocess.run(
            ["bash", "--norc", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=False,
            env={"PATH": os.environ["PATH"], **(environ or {})},
        )  # fmt: skip

    return run


def calls(tmp_path):
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_modules_are_loaded_in_order_by_the_function_that_the_site_has(shell, tmp_path):
    (tmp_path / "init").mkdir()
    (tmp_path / "init/bash").write_text(MODULES)
    done = shell(modules=["gcc/13", "cuda/12.4"], environ={"LMOD_PKG": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path) == ["module load gcc/13 cuda/12.4"]
    assert {"e", "u"} <= set(done.stdout.splitlines()[0])  # as strict as before


def test_the_submitting_shells_function_is_used_where_it_is_exported(shell, tmp_path):
    body = MODULES.removeprefix("module").strip()
    assert shell(modules=["a"], environ={"BASH_FUNC_module%%": body}).returncode == 0
    assert calls(tmp_path) == ["module load a"]


def test_a_module_that_is_not_there_ends_the_job(shell, tmp_path):
    (tmp_path / "init").mkdir()
    (tmp_path / "init/bash").write_text(MODULES)
    done = shell("-u", modules=["wrong"], environ={"MODULESHOME": str(tmp_path)})
    assert done.returncode == 1
    assert "no module wrong" in done.stderr


@pytest.mark.parametrize("options", ["-euo pipefail", "+eu"])
def test_a_venv_is_activated(shell, tmp_path, options):
    folder = tmp_path / "my env"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/activate").write_text(
        f'PATH={shlex.quote(str(folder))}/bin:$PATH; echo "$PS1" >/dev/null\n'
    )
    done = shell(options, activate="my env")  # relative to the submitting folder
    assert done.returncode == 0, done.stderr
    assert f"PATH={folder}/bin:" in done.stdout


def test_a_conda_environment_is_activated_by_its_name(shell, tmp_path):
    conda = tmp_path / "conda"
    conda.write_text(
        '#!/bin/sh\necho \'conda() { echo "conda $*" >> calls; export CONDA_IS="$2$NOT_SET"; }\'\n'
    )
    conda.chmod(0o755)
    done = shell(activate="torch-env", environ={"CONDA_EXE": str(conda)})
    assert done.returncode == 0, done.stderr
    assert calls(tmp_path) == ["conda activate torch-env"]
    assert "CONDA_IS=torch-env" in done.stdout


def test_an_environment_that_is_not_there_ends_the_job(shell):
    done = shell(activate="nowhere", environ={"CONDA_EXE": "/no/conda"})
    assert done.returncode == 1
    assert "environment nowhere can't be activated" in done.stderr


def test_setup_lines_come_last_and_alone_are_all(shell, tmp_path):
    (tmp_path / "e/bin").mkdir(parents=True)
    (tmp_path / "e/bin/activate").write_text("A=venv\n")
    assert "B=venv+" in shell(activate="e", setup=["export B=$A+"]).stdout
    assert software_lines(EnvironmentSettings(setup=["one", "two"])) == ["one", "two"]
    assert software_lines(EnvironmentSettings()) == []


def test_an_activated_environment_brings_the_jobs_python():
    assert EnvironmentSettings().interpreter is None
    assert EnvironmentSettings(activate="e").interpreter == "python"
    assert EnvironmentSettings(activate="e", python="/opt/python").interpreter == "/opt/python"


# -- containers -------------------------------------------------------------------------------------------


def test_apptainer_stands_before_the_command_and_sees_the_runs_folder():
    settings = ContainerSettings(image="my image.sif", args=["--nv"], mounts=["/data:/data:ro"])
    options, words = container_words(settings, RUN_DIR)
    assert options == []
    assert shlex.split(" ".join(words)) == [
        "apptainer", "exec", f"--bind={RUN_DIR}", "--bind=/data:/data:ro", "--bind=$PWD", "--pwd=$PWD", "--nv",
        "my image.sif",
    ]  # fmt: skip
    singularity = container_words(ContainerSettings(image="i", runtime="singularity"), RUN_DIR)[1]
    assert singularity[0] == "singularity"


def test_pyxis_is_told_by_options_of_srun():
    settings = ContainerSettings(
        runtime="pyxis",
        image="nvcr.io#nvidia/pytorch:25.01-py3",
        mounts=["/data:/d:ro", "/x"],
        args=["--container-remap-root"],
    )
    options, words = container_words(settings, RUN_DIR)
    assert words == []
    assert shlex.split(" ".join(options)) == [
        "--container-image=nvcr.io#nvidia/pytorch:25.01-py3",
        f"--container-mounts={RUN_DIR}:{RUN_DIR},/data:/d:ro,/x:/x,$PWD:$PWD",
        "--container-workdir=$PWD",
        "--container-remap-root",
    ]


def test_a_list_is_words_before_the_command():
    settings = Config.load(overrides={"slurm.container": ["shifter", "--image=a b"]}).slurm.container
    assert container_words(settings, RUN_DIR) == ([], ["shifter", "'--image=a b'"])
    assert container_words(ContainerSettings(), RUN_DIR) == ([], [])
    assert (settings.used, ContainerSettings().used) == (True, False)


@pytest.mark.parametrize(
    ("container", "problem"),
    [
        ({"image": "a", "words": ["b"]}, "give them, or an image"),
        ({"mounts": ["/a"]}, "give the image, too"),
        ({"image": "a", "args": ["--cleanenv"]}, "--cleanenv keeps the job's variables"),
        ({"image": "a", "runtime": "docker"}, "pyxis"),
    ],
)
def test_what_can_not_be_is_refused(container, problem):
    with pytest.raises(ConfigError, match=problem):
        Config(slurm={"container": container})


def test_pyxis_has_no_way_to_name_a_path_with_a_comma():
    settings = ContainerSettings(runtime="pyxis", image="i")
    with pytest.raises(UsageError, match="comma"):
        container_words(settings, Path("/a,b"))
