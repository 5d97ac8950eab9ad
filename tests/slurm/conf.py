"""Configuration files of a small Slurm cluster, as text: slurm.conf, gres.conf and others.

Every node claims eight GPUs, so that the scripts' own requests can be met. The devices count as
GPUs in Slurm's accounts only and are never opened.
"""

from collections.abc import Sequence
from pathlib import Path

LOGIN = "login"
GPUS = 8
CPUS = 64
MEMORY_MB = 512_000
MUNGE_SOCKET = "/run/munge/munge.socket.2"
# Preemption by partition: jobs in `grace` and `abrupt` give way to the others.
PARTITIONS = {
    "gpu": "Default=YES PriorityTier=10 PreemptMode=OFF",
    "grace": "PriorityTier=1 PreemptMode=REQUEUE GraceTime=60",
    "abrupt": "PriorityTier=1 PreemptMode=REQUEUE GraceTime=0",
    "urgent": "PriorityTier=20 PreemptMode=OFF",
}


def address(number: int) -> str:
    """Return the address of node `number`, counted from 1; 0 is the login node."""
    return f"10.77.0.{10 + number if number else 1}"


def node_names(nodes: int) -> list[str]:
    """Return node1, node2, ..."""
    return [f"node{number}" for number in range(1, nodes + 1)]


def hosts(nodes: int) -> str:
    """Return /etc/hosts: one address a name, or torchrun would not find the rendezvous host."""
    lines = ["127.0.0.1 localhost", f"{address(0)} {LOGIN}"]
    names = enumerate(node_names(nodes), start=1)
    return "\n".join([*lines, *(f"{address(number)} {name}" for number, name in names)]) + "\n"


def slurm(folder: Path, nodes: int, proctrack: str) -> str:
    """Return slurm.conf; state, spool and logs are under `folder`."""
    settings = {
        "ClusterName": "test",
        "SlurmctldHost": LOGIN,
        "SlurmUser": "root",
        "SlurmdUser": "root",
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        "AuthInfo": f"socket={MUNGE_SOCKET},cred_expire=5",
        "MpiDefault": "none",
        "MailProg": "/bin/true",
        "ProctrackType": f"proctrack/{proctrack}",
        "TaskPlugin": "task/none",
        "SwitchType": "switch/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "GresTypes": "gpu",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_min_interval=0,sched_interval=2,"
        "bf_interval=2,bf_resolution=1",
        "PriorityType": "priority/basic",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "JobRequeue": 1,
        # Slurm's default, and so the time that a checkpoint has on most clusters.
        "KillWait": 30,
        "MinJobAge": 3600,
        "MessageTimeout": 10,
        "SlurmdTimeout": 5,
        "SlurmctldTimeout": 10,
        "InactiveLimit": 0,
        "Waittime": 0,
        "ReturnToService": 2,
        "EnforcePartLimits": "ALL",
        # Nodes claim more than this machine has.
        "SlurmdParameters": "config_overrides",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool" / "%n",
        "SlurmctldPidFile": folder / "run" / "slurmctld.pid",
        "SlurmdPidFile": folder / "run" / "slurmd-%n.pid",
        "SlurmctldLogFile": folder / "log" / "slurmctld.log",
        "SlurmdLogFile": folder / "log" / "slurmd-%n.log",
    }
    shape = f"CPUs={CPUS} Boards=1 SocketsPerBoard=1 CoresPerSocket={CPUS} ThreadsPerCore=1"
    lines = [f"{key}={value}" for key, value in settings.items()]
    lines += [
        f"NodeName={name} NodeHostname={name} NodeAddr={name} Port=6818 {shape} "
        f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN"
        for name in node_names(nodes)
    ]
    lines += [
        f"PartitionName={name} Nodes=ALL MaxTime=7-0 DefMemPerCPU=100 State=UP {more}"
        for name, more in PARTITIONS.items()
    ]
    return "\n".join(lines) + "\n"


def gres(devices: Sequence[Path], nodes: int) -> str:
    """Return gres.conf: slurmd counts character devices only."""
    names = ",".join(node_names(nodes))
    files = ",".join(map(str, devices))
    return f"NodeName={names} Name=gpu File={files}\n"


def cgroup() -> str:
    """Return cgroup.conf: processes are tracked, nothing is limited."""
    return (
        "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
        "ConstrainRAMSpace=no\nConstrainCores=no\nConstrainDevices=no\n"
    )
