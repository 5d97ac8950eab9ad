"""A real Slurm cluster on this machine: each node is a network namespace with its own slurmd.

Everything lives in namespaces of one process. When that process dies, the kernel ends daemons,
jobs, mounts and network with it; only a folder of logs remains.
"""

import contextlib
import itertools
import os
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.slurm import conf, inside

COMMANDS = ("sbatch", "slurmctld", "slurmd", "munged", "shellcheck", "ip", "nsenter", "setpriv")
NAMESPACES = ("--pid", "--mount", "--uts", "--ipc", "--net")
SECONDS = 60.0


def what_is_missing() -> str:
    """Return the reason for which no cluster can be made here; empty if one can."""
    if os.geteuid():
        return "needs root, for namespaces"
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [command for command in COMMANDS if not shutil.which(command, path=path)]
    if missing:
        return f"{', '.join(missing)} not installed; `make slurm-test` does it"
    tried = subprocess.run(
        ["unshare", "--fork", "--mount-proc", *NAMESPACES, "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Cluster:
    """`nodes` nodes and a login node; files under `folder`, which all of them see.

    Use as a context manager. `proctrack` is how Slurm follows a job's processes: "cgroup", as on
    real clusters, or "linuxproc" if the machine has no freezer to write to. The latter signals
    every descendant, so scripts that forward no signals also pass.
    """

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder, self.nodes = folder, nodes
        freezer_ok = os.access(inside.FREEZER / "cgroup.procs", os.W_OK)
        self.proctrack = "cgroup" if freezer_ok else "linuxproc"
        self._freezer = inside.FREEZER / f"lcdist-test-{secrets.token_hex(4)}"
        self._outer: subprocess.Popen[bytes] | None = None
        self._first = 0

    def __enter__(self) -> "Cluster":
        self._write_files()
        spaces = ["--fork", "--kill-child", "--mount-proc", *NAMESPACES]
        program = [sys.executable, inside.__file__, str(self.folder), str(self.nodes)]
        # The cluster ends when the process that runs the tests dies.
        words = ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, *program, self.proctrack]
        if self.proctrack == "cgroup":
            words.insert(words.index("--fork"), "--cgroup")
            self._freezer.mkdir()
            enter = 'echo $$ >"$0" && exec "$@"'
            words = ["sh", "-c", enter, str(self._freezer / "cgroup.procs"), *words]
        with (self.folder / "log" / "inside.out").open("wb") as log:
            path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
            self._outer = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(path)
            )
        try:
            self._wait_until_ready(self._outer)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        assert self._outer is not None
        self._outer.kill()
        self._outer.wait()
        for _ in range(200):
            if not self._freezer.exists() or not (self._freezer / "cgroup.procs").read_text():
                break
            time.sleep(0.05)
        for group in sorted(self._freezer.rglob("*/"), reverse=True):
            group.rmdir()
        if self._freezer.exists():
            self._freezer.rmdir()

    def call(self, *words: str, **variables: str) -> str:
        """Run a command on the login node, in the repository; return its output or raise."""
        done = self.try_call(*words, **variables)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}{done.stderr}"
        return done.stdout

    def try_call(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command as `call` does, but also return after a failure."""
        return subprocess.run(
            [*self._enter(), *words],
            env=environment(os.environ["PATH"]) | variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def kill_node(self, name: str) -> None:
        """Cut a node's power: every process of the node dies at once."""
        self.call("sh", "-c", f"ip netns pids {name} | xargs -r kill -KILL")

    def start_node(self, name: str) -> None:
        """Restore a node's power."""
        code = "import sys, pathlib; from tests.slurm.inside import start_node; "
        code += "start_node(pathlib.Path(sys.argv[1]), sys.argv[2])"
        self.call(sys.executable, "-c", code, str(self.folder), name)
        # A job may still run on the others.
        self.wait_until_idle(name)

    def rank_of(self, run: Path, rank: int) -> psutil.Process:
        """Return the process of a rank of the run in the folder `run`."""
        assert self._outer is not None
        for process in psutil.Process(self._outer.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                launched = f"log.folder={run}" in process.cmdline()
                if launched and process.environ().get("RANK") == str(rank):
                    return process
        raise AssertionError(f"no rank {rank} of {run}")

    def wait_until_idle(self, *nodes: str) -> None:
        """Wait until some nodes, all if none is named, are up and free."""
        deadline = time.monotonic() + SECONDS
        chosen = ["-n", ",".join(nodes)] if nodes else []
        while self.call("sinfo", "-h", "-p", "gpu", *chosen, "-o", "%T").split() != ["idle"]:
            assert time.monotonic() < deadline, self.call("sinfo", "-N", "-l")
            time.sleep(0.2)

    def log(self) -> str:
        """Return the ends of the daemons' logs, for a failing test to show."""
        files = sorted((self.folder / "log").iterdir())
        ends = [file.read_text(errors="replace").splitlines()[-15:] for file in files]
        return "\n".join(
            itertools.chain(*([f"== {f.name}", *end] for f, end in zip(files, ends, strict=True)))
        )

    def _enter(self) -> Sequence[str]:
        here = inside.__file__.rsplit("/", 3)[0]
        return ["nsenter", "-t", str(self._first), *NAMESPACES, f"--wdns={here}", "--"]

    def _write_files(self) -> None:
        for name in ("etc", "state", "log", "run", "dev"):
            (self.folder / name).mkdir(parents=True)
        for name in conf.node_names(self.nodes):
            (self.folder / "spool" / name).mkdir(parents=True)
        devices = [self.folder / "dev" / f"nvidia{number}" for number in range(conf.GPUS)]
        for device in devices:
            # The device numbers of /dev/null.
            os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        files = {
            "hosts": conf.hosts(self.nodes),
            "slurm.conf": conf.slurm(self.folder, self.nodes, self.proctrack),
            "gres.conf": conf.gres(devices, self.nodes),
            "cgroup.conf": conf.cgroup(),
        }
        for name, text in files.items():
            (self.folder / "etc" / name).write_text(text)
        key = self.folder / "etc" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))

    def _wait_until_ready(self, outer: subprocess.Popen[bytes]) -> None:
        children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
        deadline = time.monotonic() + SECONDS
        while not (self.folder / "run" / "ready").exists():
            if outer.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the cluster did not come up:\n{self.log()}")
            time.sleep(0.05)
        self._first = int(children.read_text().split()[0])


def environment(path: str) -> dict[str, str]:
    """Return this process's variables without those that a job or its launcher would use itself."""
    foreign = ("SLURM", "SBATCH", "LCDIST", "TORCHELASTIC")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(foreign)}
    return kept | {"PATH": path, "OMP_NUM_THREADS": "1"}
