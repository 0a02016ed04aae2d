import pytest

import hpc_resume as hr
from hpc_resume.config import Config
from hpc_resume.run.settling import settle


@pytest.fixture(autouse=True)
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["/somewhere/a b.py"])
    for variable in ("HPC_RESUME_CONFIG", "HPC_RESUME_REHEARSAL"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def test_a_run_that_nobody_named_has_the_scripts_name(monkeypatch):
    assert settle(None, {}).name == settle(Config(), {}).name == settle(Config(seed=3), {}).name == "a-b"
    monkeypatch.setattr("sys.argv", [""])
    assert settle(None, {}).name == "run"


@pytest.mark.parametrize("name", ["gpt", "run"])
def test_a_name_stays_however_it_was_given(script, monkeypatch, name):
    path = script / "run.yaml"
    path.write_text(f"name: {name}\n")
    for config, settings in (
        (Config(name=name), {}),
        (Config(name=name), {"seed": 1}),
        (Config(), {"name": name}),
        (Config(name="other"), {"name": name}),
        (Config().replace(name=name), {}),
        (path, {}),
        (None, {"name": name}),
    ):
        assert settle(config, settings).name == name
    monkeypatch.setenv("HPC_RESUME_NAME", name)
    assert settle(None, {}).name == name


def test_two_experiments_of_one_script_have_a_folder_each(script):
    runs = [hr.Run(config=hr.Config(name=name)) for name in ("A", "B")]
    assert [run.directory.root for run in runs] == [script / "runs" / "A", script / "runs" / "B"]


def test_single_settings_lie_over_a_config_as_over_a_file(script):
    group = {"longest_chain": 0, "every_s": 60}
    path = script / "run.yaml"
    path.write_text(Config(checkpoint=group).to_yaml())
    single = {"checkpoint": {"every_steps": 5}, "slurm.account": "lab"}
    for config in (Config(checkpoint=group), Config.load(path), path, str(path)):
        settled = settle(config, single)
        checkpoint = settled.checkpoint
        assert (checkpoint.every_steps, checkpoint.every_s, checkpoint.longest_chain) == (5, 60, 0)
        assert settled.slurm.account == "lab"


def test_a_rehearsal_keeps_out_of_the_runs_folder(script, monkeypatch):
    monkeypatch.setenv("HPC_RESUME_REHEARSAL", str(script / "rehearsal"))
    settled = settle(Config(name="gpt", run_dir="real", seed=3), {"run_dir": "real"})
    assert (settled.run_dir, settled.name, settled.seed) == (str(script / "rehearsal"), "gpt", 3)
