"""The doctor on a site that is told by recordings; the real cluster is asked in ``tests/slurm``."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from hpc_resume.cli import main
from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError, UsageError
from hpc_resume.launch.doctor import examine
from hpc_resume.launch.doctorfiles import mount_finding, purge_finding, quota_findings
from hpc_resume.launch.probe import Probe, render_probe, send_probe
from hpc_resume.launch.sitefile import site_file
from hpc_resume.policy.recommendation import Recommendation
from hpc_resume.provenance.filesystem import Mount
from hpc_resume.provenance.finding import Finding
from hpc_resume.scheduler.command import Completed, run_command
from hpc_resume.scheduler.site import NodeKind, read_site

RECORDED = Path(__file__).parents[1] / "scheduler/recorded"
ADVICE = Recommendation(continuation="requeue", reasons=("scontrol works",))


class Login:
    """Answers for Slurm's commands, from recordings and from what a test says; others are run."""

    def __init__(self, **answers):
        self.answers, self.calls = answers, []

    def __call__(self, words, timeout_s):
        self.calls.append(list(words))
        answer = self.answers.get(words[0])
        if answer is not None:
            return answer(words) if callable(answer) else Completed(code=0, out=answer, err="")
        if words[:2] == ["scontrol", "show"]:
            return Completed(code=0, out=(RECORDED / f"{words[2]}.txt").read_text(), err="")
        if words[0] in {"bash", "quota"}:
            return run_command(words, timeout_s)
        raise FileNotFoundError(words[0])


def by_area(diagnosis):
    found = {}
    for area, each in diagnosis.findings:
        found.setdefault(area, {})[each.what] = each
    return found


def config_in(folder, **settings):
    return Config.load(overrides={"run_dir": str(folder / "run"), **settings})


def no_slurm(words, timeout_s):
    if words[0] == "bash":
        return run_command(words, timeout_s)
    raise FileNotFoundError(words[0])


# -- what is found ----------------------------------------------------------------------------------------


def test_a_machine_without_slurm_is_looked_at_for_the_embedded_scheduler(tmp_path):
    looked = Finding(what="memory", level="ok", detail="enough")
    found = examine(config_in(tmp_path), run=no_slurm, machine=lambda: [looked])
    assert (found.fit, found.site, found.advice) == (True, None, None)
    areas = by_area(found)
    assert areas["Slurm"]["scontrol"].level == "note"
    assert "embedded scheduler" in areas["Slurm"]["scontrol"].detail
    assert areas["this machine"]["memory"] == looked
    assert areas["Python"]["packages"].level == "ok"
    assert "probe" not in json.dumps(found.to_json())
    with pytest.raises(SchedulerError, match="no Slurm here"):
        found.write(tmp_path / "site.yaml", None)


def test_where_slurm_is_asked_for_its_absence_is_bad(tmp_path):
    assert not examine(config_in(tmp_path, scheduler="slurm"), run=no_slurm).fit
    assert not examine(config_in(tmp_path), run=no_slurm, probe=True).fit


def test_a_controller_that_is_down_is_bad(tmp_path):
    def down(words):
        return Completed(code=1, out="", err="Unable to contact slurm controller")

    found = examine(config_in(tmp_path), run=Login(scontrol=down))
    assert not found.fit
    assert "Unable to contact" in by_area(found)["Slurm"]["scontrol"].detail


def test_a_python_without_torch_is_bad(tmp_path):
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/bash\necho \'{"executable": "/usr/bin/python", "version": "3.12", "packages": {}}\'\n'
    )
    python.chmod(0o755)
    areas = by_area(examine(config_in(tmp_path, **{"environment.python": str(python)}), run=Login()))
    assert areas["Python"]["packages"].level == "bad"
    assert "torch is missing" in areas["Python"]["packages"].detail
    python.write_text("#!/bin/bash\necho no library >&2; exit 127\n")
    areas = by_area(examine(config_in(tmp_path, **{"environment.python": str(python)}), run=Login()))
    assert areas["Python"]["Python"].detail.endswith("no library")


def test_an_environment_that_can_not_be_activated_is_bad(tmp_path):
    settings = {"environment.activate": str(tmp_path / "gone")}
    areas = by_area(examine(config_in(tmp_path, **settings), run=Login()))
    assert "can't be activated" in areas["Python"]["Python"].detail


@pytest.mark.parametrize(
    ("kind", "visible", "level", "words"),
    [
        ("lustre", None, "ok", "many machines"),
        ("ext4", None, "note", "--probe"),
        ("fuse.new", None, "note", "not known here"),
        ("ext4", True, "ok", "a compute node sees it"),
        ("nfs4", False, "bad", "choose another place"),
    ],
)
def test_whether_compute_nodes_see_a_path(kind, visible, level, words):
    found = mount_finding("run directory", Path("/a"), Mount(point="/", kind=kind), visible=visible)
    assert (found.level, words in found.detail) == (level, True)


def test_the_quota_is_told_where_there_is_a_command_for_it():
    lustre = Mount(point="/scratch", kind="lustre")
    printed = "Disk quotas for usr eve:\n Filesystem used quota limit grace files\n /scratch 1.2T 0k 5T - 80000 0 1000000 -\n"
    run = Login(lfs=printed)
    (found,) = quota_findings(lustre, run)
    assert found.detail == "/scratch 1.2T 0k 5T - 80000 0 1000000 -"
    assert run.calls[0][:3] == ["lfs", "quota", "-hu"]
    assert list(quota_findings(lustre, no_slurm)) == []


def test_files_that_the_site_will_delete(tmp_path):
    old, young = tmp_path / "a/old.h5", tmp_path / "a/young.h5"
    old.parent.mkdir()
    for path, days in ((old, 25), (young, 3)):
        path.write_text("")
        os.utime(path, (1e9 - days * 86400, 1e9 - days * 86400))
    found = purge_finding(tmp_path, 30, now_s=1e9)
    assert (found.level, found.detail[:7]) == ("note", "1 files")
    assert purge_finding(tmp_path, 90, now_s=1e9).level == "ok"


# -- the site file ----------------------------------------------------------------------------------------


def site_with(*kinds, partition="main"):
    site = read_site(Login())
    made = tuple(
        NodeKind(
            **{"partitions": (partition,), "features": (), "gpu": None, "gpus": 0, "cpus": 8, "memory_mb": 8000,
               "names": (f"n{number}",), **kind}
        )
        for number, kind in enumerate(kinds)
    )  # fmt: skip
    return type(site)(settings=site.settings, partitions=site.partitions, node_kinds=made)


def load(text, tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return Config.load(path)


def test_the_recorded_site_as_a_file(tmp_path):
    text = site_file(read_site(Login()), ADVICE)
    config = load(text, tmp_path)
    assert [(each.name, each.constraint, each.ranks, each.gpus_per_node) for each in config.node_types] == [
        ("a100", "a100", 4, 4), ("v100", "v100", 2, 2),
    ]  # fmt: skip
    assert (config.time_limit_s, config.warning_lead_s, config.scheduler) == (3600, 300, "slurm")
    assert "# scontrol works" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("kinds", "constraints"),
    [
        ([{}], [None]),
        ([{"features": ("a", "ib")}, {"features": ("b", "ib")}], ["a", "b"]),
        ([{"features": ("x", "y")}, {"features": ("x",)}], ["y", None]),
        (
            [{"features": ("a", "b")}, {"features": ("b", "c")}, {"features": ("c", "a")}],
            ["a&b", "b&c", "c&a"],
        ),
        ([{"gpus": 2, "gpu": "a"}, {"gpus": 1, "gpu": "b"}], [None, None]),
    ],
)
def test_features_that_tell_node_types_apart(tmp_path, kinds, constraints):
    config = load(site_file(site_with(*kinds), ADVICE), tmp_path)
    assert [each.constraint for each in config.node_types] == constraints


def test_types_of_one_name_get_their_own(tmp_path):
    config = load(site_file(site_with({"gpus": 2, "gpu": "a"}, {"gpus": 1, "gpu": "a"}), ADVICE), tmp_path)
    assert [each.name for each in config.node_types] == ["a", "a-2"]


@pytest.mark.parametrize("way", ["requeue", "chain", "array", "exit", "login"])
def test_the_file_is_one_for_any_continuation(tmp_path, way):
    text = site_file(read_site(Login()), Recommendation(continuation=way, reasons=("because",)))
    config = load(text, tmp_path)
    assert config.continuation == way
    assert len(config.node_types) == (1 if way == "array" else 2)
    assert "name: v100" in text


def test_a_partition_without_nodes_gives_a_file_all_the_same(tmp_path):
    assert [each.name for each in load(site_file(site_with(), ADVICE), tmp_path).node_types] == ["default"]


def test_no_file_is_written_over_another(tmp_path):
    found = examine(config_in(tmp_path), run=Login())
    found.write(tmp_path / "site.yaml", "low")
    before = (tmp_path / "site.yaml").read_text()
    with pytest.raises(UsageError, match="is there already"):
        found.write(tmp_path / "site.yaml", None)
    assert (tmp_path / "site.yaml").read_text() == before
    with pytest.raises(SchedulerError, match="no partition 'gpu'"):
        found.write(tmp_path / "other.yaml", "gpu")


# -- the tiny job -----------------------------------------------------------------------------------------

ANSWERS = {
    "node": "n1",
    "scontrol": "yes",
    "sbatch": "no",
    "rank_scontrol": "no",
    "torch": "yes",
    "end": "yes",
}
PYTHON = json.dumps({"executable": "/p", "version": "3.12", "packages": {}})


class Clock:
    now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def play(tmp_path, *, log=None, state="RUNNING", patience_s=100.0, refuse=False, settings=None):
    """Send a probe to a site whose job leaves ``log``."""
    clock = Clock()

    def sbatch(words):
        if refuse:
            return Completed(code=1, out="", err="Invalid account")
        if log is not None:
            (Path(words[-1]).parent / "probe.log").write_text(log)
        return Completed(code=0, out="12;private\n", err="")

    login = Login(
        sbatch=sbatch,
        scontrol=f"JobId=12\n   JobState={state} Reason=Priority Dependency=(null)\n",
        scancel="",
    )
    try:
        config = config_in(tmp_path, **(settings or {}))
        return login, send_probe(config, run=login, patience_s=patience_s, clock=clock, sleep=clock.sleep)
    finally:
        assert list(tmp_path.iterdir()) == []


def lines(answers):
    return "".join(f"probe: {name}={answer}\n" for name, answer in answers.items())


def test_what_a_compute_node_answers(tmp_path):
    _, probe = play(tmp_path, log=lines({**ANSWERS, "python": PYTHON}))
    assert (probe.can("scontrol"), probe.can("sbatch"), probe.can("rank_scontrol")) == (True, False, False)
    found = {each.what: each for each in probe.findings()}
    assert (found["job"].detail, found["sbatch"].level, found["Python"].level) == ("ran on n1", "note", "ok")
    assert found["sbatch"].detail == "does not work there: jobs can't submit a successor"


def test_a_run_directory_that_compute_nodes_do_not_see(tmp_path):
    _, probe = play(tmp_path, state="FAILED")
    assert not probe.visible
    (found,) = probe.findings()
    assert (found.level, "JobState=FAILED Reason=Priority" in found.detail) == ("bad", True)


def test_a_python_that_compute_nodes_have_not(tmp_path):
    _, probe = play(tmp_path, log=lines({**ANSWERS, "python": "srun: error: /p: No such file or directory"}))
    found = {each.what: each for each in probe.findings()}
    assert found["Python"].detail.endswith("/p: No such file or directory")
    _, probe = play(tmp_path, log=lines({**ANSWERS, "python": PYTHON, "torch": "ImportError: libcuda"}))
    assert "ImportError: libcuda" in {each.what: each for each in probe.findings()}["Python"].detail


def test_a_job_that_breaks_off_tells_its_last_line(tmp_path):
    log = "probe: node=n1\nhpc_resume: no module cuda\n"
    _, probe = play(tmp_path, log=log, state="FAILED")
    found = {each.what: each for each in probe.findings()}
    assert (found["end"].level, found["end"].detail.endswith("hpc_resume: no module cuda")) == ("bad", True)


def test_a_job_that_does_not_start_is_cancelled(tmp_path):
    with pytest.raises(SchedulerError, match=r"job 12, did not end in time \(JobState=PENDING"):
        play(tmp_path, state="PENDING")


def test_a_job_that_is_refused_is_told(tmp_path):
    with pytest.raises(SchedulerError, match="Invalid account"):
        play(tmp_path, refuse=True)


def test_the_advice_follows_what_the_compute_node_said(tmp_path):
    def sbatch(words):
        (Path(words[-1]).parent / "probe.log").write_text(lines({**ANSWERS, "python": PYTHON}))
        return Completed(code=0, out="12\n", err="")

    found = examine(config_in(tmp_path), probe=True, run=Login(sbatch=sbatch))
    assert found.advice.continuation == "exit"  # the batch script has scontrol, ranks have not
    assert "a compute node sees it" in by_area(found)["files"]["run directory"].detail


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {
            "node_types.0": {
                "partition": "gpu",
                "nodes": 8,
                "gpus_per_node": 4,
                "mem_gb": 500,
                "time_limit_s": 999,
            },
            "slurm": {"account": "lab", "container": {"image": "a b.sif"}, "check_nodes": True},
            "environment": {"modules": ["cuda"], "activate": "env", "setup": ["true"]},
        },
    ],
)
def test_the_jobs_script_is_small_and_right(tmp_path, settings):
    text = render_probe(config_in(tmp_path, **settings), tmp_path)
    (tmp_path / "probe").write_text(text)
    subprocess.run(["bash", "-n", tmp_path / "probe"], check=True)
    assert text.index("export SLURM_EXPORT_ENV=ALL") < text.index("srun ")
    asked = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {
        "#SBATCH --nodes=1",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --time=00:05:00",
        "#SBATCH --no-requeue",
    } <= set(asked)
    if settings:
        assert {"#SBATCH --gpus-per-node=1", "#SBATCH --mem=4G", "#SBATCH --account=lab"} <= set(asked)
        assert "'a b.sif' \"$@\"; }" in text


# -- the verb ---------------------------------------------------------------------------------------------


def test_the_verb_prints_a_table(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # whatever Slurm there may be elsewhere
    done = CliRunner().invoke(main, ["doctor", "--run-dir", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[0] == "nothing stands in the way"
    assert "embedded scheduler" in done.stdout
    assert sys.executable in done.stdout


def test_probe_answers_that_nobody_understands_are_bad():
    probe = Probe(answers={"python": "[1]", "health": "{]", "end": "yes"}, log="", job="")
    assert [each.what for each in probe.findings() if each.level == "bad"] == ["Python"]


def test_the_written_file_is_plain_yaml(tmp_path):
    assert yaml.safe_load(site_file(read_site(Login()), ADVICE, "low"))["node_types"][0]["partition"] == "low"
