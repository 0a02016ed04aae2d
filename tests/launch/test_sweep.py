"""Arrays of runs on a Slurm that is a few lines of shell: it takes arrays up to a number of elements."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from hpc_resume.config import Config
from hpc_resume.errors import SchedulerError, UsageError
from hpc_resume.launch.grid import grid
from hpc_resume.launch.handle import find_jobs, latest_job
from hpc_resume.launch.sweep import submit_sweep
from hpc_resume.rundir import RunDirectory
from hpc_resume.scheduler.arrays import SlurmArrays
from hpc_resume.scheduler.command import Completed

SBATCH = r"""#!/bin/bash
cd {folder}
size=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$1")
taken=$(cat taken) limit=$(cat limit)
if [ $((taken + size + 1)) -gt "$limit" ]; then
    cat complaint >&2
    exit 1
fi
echo $((taken + size + 1)) >taken
id=$(($(ls script-* | wc -l) + 100))
cp "$1" "script-$id"
echo "Submitted batch job $id"
"""
LIMIT = "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates\n"
#: Runs one element of an array as Slurm would: srun shows what the rank would see.
SRUN = r"""#!/bin/bash
env | grep -E '^HPC_RESUME_(RUN_DIR|CONFIG)='
printf '%s\n' "$@"
"""


class Site:
    """Slurm as it answers; ``states`` are its jobs."""

    def __init__(self, folder):
        self.folder = folder
        self.states = {}
        self.largest = 4

    def run(self, words, timeout_s):
        if words[0] == "scontrol":
            return Completed(code=0, out=f"MaxArraySize            = {self.largest}\n", err="")
        out = "".join(f"{job} {state}\n" for job, state in self.states.items())
        return Completed(code=0, out=out, err="")

    def limit(self, elements, complaint=LIMIT):
        (self.folder / "limit").write_text(str(elements))
        (self.folder / "complaint").write_text(complaint)

    def script(self, array):
        return (self.folder / f"script-{array}").read_text()

    def option(self, array, name):
        match = re.search(rf"^#SBATCH --{name}=(.*)$", self.script(array), re.MULTILINE)
        return None if match is None else match[1]

    def arrays(self):
        return sorted(path.name.removeprefix("script-") for path in self.folder.glob("script-*[0-9]"))


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "slurm"
    tools = folder / "bin"
    tools.mkdir(parents=True)
    (tools / "sbatch").write_text(SBATCH.format(folder=folder))
    (tools / "srun").write_text(SRUN)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (folder / "taken").write_text("0")
    (folder / "script-").touch()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("gpt.py").write_text("def train(lr=1.0, seed=0, steps=5): return lr, seed\n")
    made = Site(folder)
    made.limit(10_000)
    return made


def submit(site, runs, *, target="gpt.py:train", config=None, done=(), run_dir=None, **kwargs):
    return submit_sweep(
        target,
        runs,
        {"scheduler": "slurm", **(config or {})},
        run_dir=run_dir,
        kwargs=kwargs,
        finished=lambda run: run.name in done,
        slurm=SlurmArrays(site.run),
    )


def test_one_array_with_one_run_for_each_element(site):
    found = submit(site, grid(lr=[1e-3, 3e-4], seed=range(2)), steps=7)
    assert found.names == ("lr=0.001,seed=0", "lr=0.001,seed=1", "lr=0.0003,seed=0", "lr=0.0003,seed=1")
    assert [job.job_id for job in found.jobs.values()] == ["101_0", "101_1", "101_2", "101_3"]
    assert (found.done, found.live, found.left) == ((), (), ())
    assert found.sentences() == ["4 runs submitted as job 101"]
    assert site.arrays() == ["101"]
    assert (site.option("101", "array"), site.option("101", "dependency")) == ("0-3", None)
    folder = Path("runs/gpt").resolve()
    assert site.option("101", "output") == f"{folder}/jobs/%A_%a.log"
    for place, name in enumerate(found.names):
        run = RunDirectory(folder / name)
        assert run.identity()["name"] == f"gpt {name}"
        assert latest_job(run.root) == found.jobs[name]
        assert (run.root / "jobs" / f"101_{place}_submitted.pkl").exists()
        config = Config.load(run.configs / f"{found.jobs[name].config}.yaml")
        assert config.run_dir == str(run.root)
        assert config.entry.kwargs == {"steps": 7, **run.identity()["arguments"]}
    assert sorted(path.name for path in (folder / "jobs").iterdir() if path.suffix == ".pkl") == []


def test_each_element_finds_its_run(site, tmp_path):
    folder = tmp_path / "50% of it"
    found = submit(site, grid(seed=range(3)), run_dir=folder)
    subprocess.run(["bash", "-n", site.folder / "script-101"], check=True)
    for place, name in enumerate(found.names):
        environ = {
            "PATH": f"{site.folder}/bin:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "1", "SLURM_ARRAY_JOB_ID": "101",
            "SLURM_ARRAY_TASK_ID": str(place), "SLURM_JOB_ID": "101",
        }  # fmt: skip
        said = subprocess.run(
            ["bash", site.folder / "script-101"], env=environ, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        assert f"HPC_RESUME_RUN_DIR={folder / name}" in said
        assert f"HPC_RESUME_CONFIG={folder / name / 'configs' / found.jobs[name].config}.yaml" in said
        assert f"--output={tmp_path}/50%% of it/{name}/jobs/%A_%a_%t_log.out" in said
        assert said[-1] == f"{folder / name}/jobs"


def test_an_element_that_the_list_does_not_know_runs_nothing(site):
    submit(site, grid(seed=range(3)))
    environ = {"PATH": f"{site.folder}/bin:/usr/bin:/bin", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "101"}
    for element in ("3", "17"):
        done = subprocess.run(
            ["bash", site.folder / "script-101"], env={**environ, "SLURM_ARRAY_TASK_ID": element},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert f"has no lines for element {element}" in done.stderr


def test_more_runs_than_an_array_may_have(site):
    found = submit(site, grid(seed=range(10)))
    assert [site.option(array, "array") for array in site.arrays()] == ["0-3", "0-3", "0-1"]
    assert [site.option(array, "dependency") for array in site.arrays()] == [None] * 3
    ids = [found.jobs[name].job_id for name in found.names]
    assert ids == [*(f"101_{n}" for n in range(4)), *(f"102_{n}" for n in range(4)), "103_0", "103_1"]
    assert found.sentences() == ["10 runs submitted as jobs 101, 102, 103"]


def test_a_limit_on_how_many_run_at_once_holds_over_all_arrays(site):
    config = {"array": {"at_once": 3}, "slurm": {"additional_parameters": {"dependency": "afterok:7"}}}
    submit(site, grid(seed=range(6)), config=config)
    assert [site.option(array, "array") for array in site.arrays()] == ["0-3%3", "0-1%3"]
    assert [site.option(array, "dependency") for array in site.arrays()] == [
        "afterok:7",
        "afterany:101,afterok:7",
    ]


def test_what_is_over_the_limit_is_left_and_submitted_later(site):
    site.largest = 1001
    site.limit(7)
    found = submit(site, grid(seed=range(10)))
    # 10 at once are refused, then 5 of the rest, then 2 and 1
    assert [site.option(array, "array") for array in site.arrays()] == ["0-4", "0-1"]
    assert sorted(found.jobs) == [f"seed={n}" for n in range(7)]
    assert found.left == ("seed=7", "seed=8", "seed=9")
    assert "AssocMaxSubmitJobLimit" in found.why_left
    assert found.sentences()[-1].startswith("3 runs NOT submitted: seed=7, seed=8, seed=9; sbatch refused")
    folder = Path("runs/gpt")
    assert find_jobs(folder / "seed=9") == []
    assert list((folder / "seed=9" / "jobs").iterdir()) == []
    assert len(list((folder / "jobs").glob("*_runs.txt"))) == 2
    assert [path for path in (folder / "jobs").glob(".*") if not path.is_symlink()] == []

    site.limit(100)
    site.states = {job.job_id: "RUNNING" for job in found.jobs.values()}
    again = submit(site, grid(seed=range(10)))
    assert (tuple(again.jobs), again.left) == (found.left, ())
    assert again.live == tuple(found.jobs)


def test_nothing_taken_is_an_error(site):
    site.limit(0)
    with pytest.raises(SchedulerError, match="AssocMaxSubmitJobLimit"):
        submit(site, grid(seed=range(3)))
    site.limit(0, "sbatch: error: Batch job submission failed: Invalid partition name specified\n")
    with pytest.raises(SchedulerError, match="Invalid partition"):
        submit(site, grid(seed=range(3)))
    assert site.arrays() == []
    site.limit(100)
    assert len(submit(site, grid(seed=range(3))).jobs) == 3


def test_only_what_is_neither_done_nor_alive_is_submitted_again(site):
    first = submit(site, grid(seed=range(4)))
    site.states = {
        "101_0": "COMPLETED",
        "101_1": "PENDING",
        "101_2": "CANCELLED",  # 101_3: Slurm has forgotten it
    }
    again = submit(site, grid(seed=range(5)), done=("seed=0",))
    assert (again.done, again.live) == (("seed=0",), ("seed=1",))
    assert list(again.jobs) == ["seed=2", "seed=3", "seed=4"]
    assert [job.job_id for job in again.jobs.values()] == ["102_0", "102_1", "102_2"]
    assert again.sentences()[1:] == [
        "1 run done already, not submitted again: seed=0",
        "1 run in the queue or running, not submitted twice: seed=1",
    ]
    assert again.folder == first.folder
    assert [job.job_id for job in find_jobs(first.folder / "seed=2")] == ["101_2", "102_0"]
    site.states = {f"102_{n}": "RUNNING" for n in range(3)} | {"101_1": "COMPLETING"}
    nothing = submit(site, grid(seed=range(5)), done=("seed=0",))
    assert nothing.jobs == {}
    assert site.arrays() == ["101", "102"]


def test_a_run_that_is_done_goes_on_with_other_arguments(site):
    submit(site, grid(seed=range(2)), steps=100)
    assert submit(site, grid(seed=range(2)), steps=100, done=("seed=0", "seed=1")).jobs == {}
    longer = submit(site, grid(seed=range(2)), steps=200, done=("seed=0", "seed=1"))
    assert list(longer.jobs) == ["seed=0", "seed=1"]


def test_a_smaller_grid_leaves_the_others_alone(site):
    submit(site, grid(seed=range(3)))
    before = {path: path.read_bytes() for path in Path("runs/gpt/seed=2").rglob("*") if path.is_file()}
    found = submit(site, [{"seed": 1}])
    assert (found.names, list(found.jobs)) == (("seed=1",), ["seed=1"])
    after = {path: path.read_bytes() for path in Path("runs/gpt/seed=2").rglob("*") if path.is_file()}
    assert after == before


def test_no_answer_of_the_queue_submits_nothing(site):
    submit(site, grid(seed=range(3)))
    site.run = lambda words, timeout_s: Completed(code=1, out="", err="Unable to contact slurm controller")
    with pytest.raises(SchedulerError, match="Unable to contact"):
        submit(site, grid(seed=range(4)))
    assert site.arrays() == ["101"]
    assert not Path("runs/gpt/seed=3").exists()


@pytest.mark.parametrize(
    ("runs", "options", "message"),
    [
        (grid(lrr=[1, 2]), {}, r"takes no argument 'lrr'; did you mean lr\? \(in lrr=1, lrr=2\)"),
        (
            [{"lrr": 1}, {"sed": 1}, {"lr": 1}],
            {},
            r"(?s)'lrr'; did you mean lr\? \(in lrr=1\).*'sed'; did you mean seed\? \(in sed=1\)$",
        ),
        (grid(lr=[1]), {"lr": 2}, "lr: given for all runs and in the grid"),
        (grid(lr=[1]), {"target": ["true"]}, "a command takes no arguments"),
        ([{}], {"target": ["true"]}, "a command takes no arguments from a grid"),
        (grid(lr=[1]), {"target": "gpt.py:trian"}, "did you mean train"),
        (grid(lr=[1]), {"run_dir": "gpt.py"}, "is a file"),
        (grid(lr=[1]), {"run_dir": "."}, "holds no array of runs"),
        (grid(lr=[1]), {"run_dir": "a\nb"}, "line break"),
        (grid(lr=[1]), {"run_dir": "single"}, "holds a single run"),
        (
            grid(lr=[1]),
            {"config": {"slurm": {"additional_parameters": {"array": "0-3"}}}},
            "additional_parameters.array",
        ),
        (
            grid(lr=[1]),
            {"config": {"node_types": [{"name": "a100"}, {"name": "v100"}]}},
            "node_types: the elements of a job array ask for the same, but there are a100, v100",
        ),
        *(
            (
                grid(lr=[1]),
                {"config": {"continuation": kind}},
                f"{kind} continues a run in other jobs.*requeue or exit",
            )
            for kind in ("chain", "array", "login")
        ),
        (grid(lr=[1]), {"config": {"array": {"at_once": 0}}}, "array.at_once"),
        ([], {}, "has no run"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(site, runs, options, message):
    RunDirectory(Path("single").resolve()).create("single")
    before = sorted(Path().rglob("*"))
    with pytest.raises(UsageError, match=message):
        submit(site, runs, **options)
    assert sorted(Path().rglob("*")) == before
    assert site.arrays() == []


def test_without_sbatch_nothing_is_written(site, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="no sbatch on PATH"):
        submit(site, grid(lr=[1]))
    assert not Path("runs").exists()


def test_a_single_run_does_not_fit_into_the_folder_of_an_array(site):
    from hpc_resume.launch.submit import submit as submit_run

    submit(site, grid(lr=[1]))
    with pytest.raises(UsageError, match="holds an array of runs"):
        submit_run("gpt.py:train", config={"scheduler": "slurm"})


def test_the_records_of_an_element_are_those_of_a_run(site):
    found = submit(site, grid(lr=[1]))
    record = json.loads((found.folder / "lr=1" / "jobs" / "101_0_job.json").read_bytes())
    assert (record["job_id"], record["scheduler"], record["returns"]) == ("101_0", "slurm", True)
