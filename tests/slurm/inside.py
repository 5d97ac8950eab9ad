"""The first process of a cluster's namespaces: makes the network, starts the daemons, waits.

    python inside.py FOLDER NODES

`cluster.py` runs it in fresh pid, mount, uts, ipc, network and cgroup namespaces. Its mounts and
processes end with it. It writes FOLDER/run/ready when every node is idle.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.slurm.conf import LOGIN, MUNGE_SOCKET, address, node_names

FREEZER = Path("/sys/fs/cgroup/freezer")
SECONDS_UP = 60.0


def call(line: str) -> None:
    """Run a command whose words contain no blanks; raise if it fails."""
    subprocess.run(line.split(), check=True)


def mount_what_is_private(folder: Path, own_freezer: bool) -> None:
    """Mount private copies of the default places of Slurm's files and sockets."""
    call("mount --make-rprivate /")
    if own_freezer:
        call(f"umount -l {FREEZER}")
        call(f"mount -t cgroup -o freezer none {FREEZER}")
    call(f"mount --bind {folder}/etc/hosts /etc/hosts")
    for place in ("/etc/slurm", "/run/munge", "/run/netns"):
        Path(place).mkdir(parents=True, exist_ok=True)
    call(f"mount --bind {folder}/etc /etc/slurm")
    call("mount -t tmpfs -o mode=755 none /run/munge")
    call("mount -t tmpfs none /run/netns")
    call("mount -t tmpfs -o mode=1777 none /dev/shm")


def make_network(nodes: int) -> None:
    """Make a bridge, and for each node a network namespace with one cable to it."""
    call(f"hostname {LOGIN}")
    call("ip link set lo up")
    call("ip link add br0 type bridge")
    call(f"ip addr add {address(0)}/24 dev br0")
    call("ip link set br0 up")
    for number, name in enumerate(node_names(nodes), start=1):
        call(f"ip netns add {name}")
        call(f"ip link add v{number} type veth peer name eth0 netns {name}")
        call(f"ip link set v{number} master br0")
        call(f"ip link set v{number} up")
        call(f"ip -n {name} link set lo up")
        call(f"ip -n {name} addr add {address(number)}/24 dev eth0")
        call(f"ip -n {name} link set eth0 up")


def start(log: Path, *words: str) -> None:
    """Start a daemon in the foreground of its own process, with its output in `log`."""
    with log.open("ab") as stream:
        subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream)


def start_daemons(folder: Path, nodes: int) -> None:
    """Start munged, slurmctld, and slurmd on every node."""
    log, munge = folder / "log", "/run/munge"
    files = [f"--key-file={folder}/etc/munge.key", f"--socket={MUNGE_SOCKET}"]
    files += [f"--pid-file={munge}/munged.pid", f"--seed-file={munge}/munged.seed"]
    start(log / "munged.out", "munged", "--foreground", *files, f"--log-file={log}/munged.log")
    wait_for(Path(MUNGE_SOCKET).exists, "munged")
    start(log / "slurmctld.out", "slurmctld", "-D", "-c", "-i")
    for name in node_names(nodes):
        start_node(folder, name)


def start_node(folder: Path, name: str) -> None:
    """Start slurmd of one node, with its own hostname, network and /dev/shm."""
    script = (
        f"hostname {name}; mount -t tmpfs -o mode=1777 none /dev/shm; exec slurmd -D -c -N {name}"
    )
    spaces = [f"--net=/run/netns/{name}", "unshare", "--uts", "--mount", "--ipc"]
    start(folder / "log" / f"slurmd-{name}.out", "nsenter", *spaces, "sh", "-c", script)


def all_idle(nodes: int) -> bool:
    """Return whether the controller answers and every node is free."""
    asked = ["timeout", "2", "sinfo", "-h", "-N", "-p", "gpu", "-o", "%T"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.split().count("idle") == nodes


def wait_for(condition, what: str) -> None:
    """Wait until the condition holds. Raises TimeoutError if it does not."""
    deadline = time.monotonic() + SECONDS_UP
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come up in {SECONDS_UP:.0f} s")
        time.sleep(0.05)


def main() -> None:
    folder, nodes, own_freezer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "cgroup"
    mount_what_is_private(folder, own_freezer)
    make_network(nodes)
    start_daemons(folder, nodes)
    wait_for(lambda: all_idle(nodes), "the cluster")
    (folder / "run" / "ready").touch()
    while True:
        # The first process of a pid namespace inherits orphans, and must reap them.
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(1)


if __name__ == "__main__":
    main()
