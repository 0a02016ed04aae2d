"""What ``scontrol`` printed on the private cluster (Slurm 22.05.8), and lines as other sites have them."""

import subprocess
from pathlib import Path

import pytest

from hpc_resume.errors import SchedulerError
from hpc_resume.scheduler.command import Completed
from hpc_resume.scheduler.site import parse_config, parse_nodes, parse_partitions, read_site

RECORDED = Path(__file__).parent / "recorded"


def recorded(words, timeout_s):
    assert words[:2] == ["scontrol", "show"]
    return Completed(code=0, out=(RECORDED / f"{words[2]}.txt").read_text(), err="")


@pytest.fixture
def site():
    return read_site(recorded)


def changed(**settings):
    """The recorded site with other settings."""
    lines = "".join(f"\n{name} = {value}" for name, value in settings.items())

    def run(words, timeout_s):
        done = recorded(words, timeout_s)
        return Completed(code=0, out=done.out + (lines if words[2] == "config" else ""), err="")

    return read_site(run)


def test_the_private_cluster(site):
    assert (site.name, site.version, site.number("KillWait"), site.number("SlurmdTimeout")) == (
        "private",
        "22.05.8",
        5,
        10,
    )
    assert site.requeue_delay_s == 5
    assert site.setting("PreemptType") == "preempt/partition_prio"
    assert site.setting("RequeueExit") is None
    assert (site.accounting, site.warns_of_preemption, site.most_requeues, site.requeue_codes) == (
        False,
        False,
        None,
        (),
    )
    low = site.partition("low")
    assert (low.grace_s, low.preempt_mode, low.max_time_s, low.default_time_s) == (20, "REQUEUE", 3600, 600)
    assert (low.default, low.up, low.nodes, low.submit_hosts) == (False, True, 4, None)
    assert site.partition().name == "main"
    a100, v100 = site.node_kinds
    assert (a100.names, a100.features, a100.gpu, a100.gpus, a100.cpus, a100.memory_mb) == (
        ("big1", "big2"), ("a100",), "a100", 4, 16, 4000,
    )  # fmt: skip
    assert (v100.names, v100.gpus, v100.partitions) == (
        ("small1", "small2"),
        2,
        ("main", "low", "low0", "high"),
    )


@pytest.mark.parametrize(
    ("info", "delay_s"),
    [("(null)", 120), ("cred_expire=4", 120), ("socket=/run/munge,cred_expire=30", 30), ("ttl=5", 120)],
)
def test_the_delay_of_a_requeue(info, delay_s):
    assert changed(AuthInfo=info).requeue_delay_s == delay_s


def test_settings_that_other_sites_have():
    assert changed(SlurmctldParameters="a,preempt_send_user_signal").warns_of_preemption
    assert changed(PreemptParameters="send_user_signal").warns_of_preemption
    assert changed(SchedulerParameters="defer,max_batch_requeue=7").most_requeues == 7
    assert changed(MaxBatchRequeue="9").most_requeues == 9
    assert changed(RequeueExit="75,99").requeue_codes == ("75", "99")
    assert changed(AccountingStorageType="accounting_storage/slurmdbd").accounting


def test_a_partition_that_is_not_there(site):
    with pytest.raises(SchedulerError, match="private has no partition 'gpu'; it has: main, low, low0, high"):
        site.partition("gpu")


def test_lines_as_other_sites_have_them():
    (one,) = parse_partitions(
        "PartitionName=gpu\n   AllocNodes=login[1-2] Default=NO QoS=N/A\n   DefaultTime=NONE GraceTime=0 Hidden=NO\n"
        "   MaxTime=7-00:00:00 MinNodes=0\n   OverTimeLimit=NONE PreemptMode=GANG,SUSPEND\n   State=DOWN TotalNodes=12\n"
    )
    assert (one.max_time_s, one.default_time_s, one.submit_hosts, one.up) == (
        604800,
        None,
        "login[1-2]",
        False,
    )
    assert one.preempt_mode == "GANG,SUSPEND"
    (endless,) = parse_partitions("PartitionName=a\n   MaxTime=UNLIMITED TotalNodes=1 AllocNodes=ALL\n")
    assert endless.max_time_s is None
    nodes = (
        "NodeName=g1 Arch=x86_64 CoresPerSocket=32\n   CPUAlloc=0 CPUTot=128\n   AvailableFeatures=a100,ib\n"
        "   ActiveFeatures=a100,ib\n   Gres=gpu:a100:4(S:0-1),craynetwork:2\n   OS=Linux 5.14 #1 SMP a=b\n"
        "   RealMemory=515000 AllocMem=0\n   Partitions=gpu,debug \n\n"
        "NodeName=c1\n   CPUTot=64\n   AvailableFeatures=(null)\n   Gres=(null)\n   RealMemory=1\n"
        "NodeName=m1\n   Gres=gpu:2\n   CPUTot=8\n"
        "NodeName=x1\n   Gres=gpu:a100:1,gpu:v100:3\n"
    )
    found = [(kind.features, kind.gpu, kind.gpus, kind.cpus, kind.partitions) for kind in parse_nodes(nodes)]
    assert found == [
        (("a100", "ib"), "a100", 4, 128, ("gpu", "debug")),
        ((), None, 0, 64, ()),
        ((), None, 2, 8, ()),
        ((), "a100", 4, 0, ()),
    ]


def test_a_value_may_hold_an_equals_sign():
    assert parse_config("SlurmctldHost[0]        = vm(127.0.0.1)\nAuthInfo = a=b,c=d\n\nSlurmctld(primary) is UP\n") == {
        "SlurmctldHost[0]": "vm(127.0.0.1)", "AuthInfo": "a=b,c=d",
    }  # fmt: skip


def test_a_controller_that_does_not_answer():
    def refuse(words, timeout_s):
        return Completed(code=1, out="", err="Unable to contact slurm controller (connect failure)\n")

    def hang(words, timeout_s):
        raise subprocess.TimeoutExpired(words, timeout_s)

    for run, why in ((refuse, "connect failure"), (hang, "is slurmctld up")):
        with pytest.raises(SchedulerError, match=why):
            read_site(run)
