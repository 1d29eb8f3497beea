"""Real SLURM cluster of two nodes on this machine; it ends with the process that started it.

Each node is a daemon in separate Linux namespaces. It has a name, an address, processes and file systems that are
separate from the other node's, so that a test can lose it like a real machine. Its GPU is a null device.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time

import psutil

from launching import TESTS, environment

ROOT = TESTS.parent
PROGRAMS = {"slurmctld": "slurm-wlm", "munged": "munge", "ip": "iproute2", "setpriv": "util-linux"}
# The spare node starts when a test loses another node.
NODES, SPARE = (1, 2), 3
NETWORK, BRIDGE = "10.99.0", "rbart0"
# End the daemon if its parent process is killed.
DIES_WITH_US = ["setpriv", "--pdeathsig", "KILL"]

SETTINGS = """\
ClusterName=tests
SlurmctldHost={host}({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# a job that is requeued waits so long; less than 5 is taken for 120
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=16817
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=5
SlurmdTimeout=6
MinJobAge=3600
PropagateResourceLimits=NONE
# nodes have what is written here
SlurmdParameters=config_overrides
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def install():
    """Install missing packages; return the reason if this machine cannot run a cluster, else None."""
    if os.geteuid() != 0:
        return "only root starts a SLURM cluster"
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program)})
    if missing and not shutil.which("apt-get"):
        return f"there are no {', '.join(missing)}, and no apt-get to install them"
    options = {"capture_output": True, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    for command in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *missing]):
        if missing and subprocess.run(["apt-get", *command], check=False, timeout=240, **options).returncode:
            return f"apt-get cannot install {', '.join(missing)}"
    return None


class Cluster:
    """Cluster that tests can start, stop, query and take a node from."""

    def __init__(self, folder):
        self.folder, self.daemons, self.nodes = folder, [], {}
        self.settings = folder / "slurm.conf"

    def __enter__(self):
        self.write_settings()
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for daemon in [*self.nodes.values(), *reversed(self.daemons)]:
            daemon.kill()
            daemon.wait()
        for number in (*NODES, SPARE):
            delete_link(f"rbart{number}")
        delete_link(BRIDGE)

    def write_settings(self):
        """Write all configuration files of the daemons."""
        host = socket.gethostname().split(".")[0]
        nodes, devices, hosts = [], [], ["127.0.0.1 localhost", f"{NETWORK}.1 {host}"]
        os.mknod(self.folder / "gpu", 0o20666, os.makedev(1, 3))
        for number in (*NODES, SPARE):
            place = f"NodeHostname={host} NodeAddr={address(number)} Port={17000 + number}"
            nodes.append(f"NodeName=node{number} {place} CPUs=8 RealMemory=64000 Gres=gpu:1 State=UNKNOWN")
            devices.append(f"NodeName=node{number} Name=gpu File={self.folder}/gpu")
            hosts.append(f"{address(number)} node{number}")
            (self.folder / f"spool.node{number}").mkdir()
        (self.folder / "state").mkdir()
        (self.folder / "hosts").write_text("\n".join(hosts) + "\n")
        (self.folder / "gres.conf").write_text("\n".join(devices) + "\n")
        values = {"host": host, "network": NETWORK, "folder": self.folder, "nodes": "\n".join(nodes)}
        self.settings.write_text(SETTINGS.format(**values))

    def _start(self):
        # Remove the bridge of a killed cluster.
        delete_link(BRIDGE)
        ip(f"link add {BRIDGE} type bridge")
        ip(f"address add {address(0)}/24 dev {BRIDGE}")
        ip(f"link set {BRIDGE} up")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o400)
        places = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        munge = [f"--{option}={self.folder}/munge.{ending}" for option, ending in places.items()]
        self.daemons.append(self._popen(["munged", "--foreground", "--force", *munge], "munged"))
        wait_until((self.folder / "munge.socket").exists, 20, "munged is there")
        self.daemons.append(self._popen(["slurmctld", "-D", "-i"], "slurmctld"))
        for number in NODES:
            self.start_node(number)

    def _popen(self, command, name):
        with (self.folder / f"{name}.printed").open("ab") as printed:
            given = environment(SLURM_CONF=str(self.settings))
            return subprocess.Popen([*DIES_WITH_US, *command], env=given, stdout=printed, stderr=printed)

    def start_node(self, number):
        """Start a node, and wait until it accepts jobs."""
        program = f"""
        hostname node{number}; mount --bind {self.folder}/hosts /etc/hosts
        until ip link show eth0; do sleep 0.02; done
        ip link set lo up; ip address add {address(number)}/24 dev eth0; ip link set eth0 up
        slurmd -D -N node{number}; exit"""
        kinds = ["--uts", "--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        node = self._popen(["unshare", *kinds, "bash", "-c", program], f"node{number}")
        self.nodes[number] = node
        wait_until(psutil.Process(node.pid).children, 10, "the node's first process is there")
        (first,) = psutil.Process(node.pid).children()
        # The kernel removes the link of a lost node with a delay.
        delete_link(f"rbart{number}")
        ip(f"link add rbart{number} type veth peer name eth0 netns {first.pid}")
        ip(f"link set rbart{number} master {BRIDGE} up")
        wait_until(lambda: "idle" in self.ask("sinfo", "-h", "-n", f"node{number}", "-o", "%T"), 30, "the node is idle")

    def lose_node(self, number):
        """Kill every process of a node at once, as after a power failure."""
        self.nodes[number].kill()
        self.nodes.pop(number).wait()

    @contextlib.contextmanager
    def spare_node(self):
        """Replace a lost node by the spare node in a `with` block; restart the lost node afterwards."""
        self.start_node(SPARE)
        try:
            yield
        finally:
            self.lose_node(SPARE)
            self.ask("scontrol", "update", f"nodename=node{SPARE}", "state=down", "reason=over")
            for number in set(NODES) - set(self.nodes):
                self.start_node(number)

    def inside(self, number, *command):
        """Run a command in the namespaces of a node."""
        (first,) = psutil.Process(self.nodes[number].pid).children()
        subprocess.run(["nsenter", "--target", str(first.pid), "--all", *command], check=True)

    def ask(self, *command):
        """Return the output of a SLURM command."""
        given = environment(SLURM_CONF=str(self.settings))
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=given, capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    def submit(self, script, *arguments, options=(), **variables):
        """Submit a batch script as a user does; return the job."""
        return Job(self, script, arguments, options, variables)


class Job:
    """Submitted job."""

    def __init__(self, cluster, script, arguments, options, variables):
        self.cluster = cluster
        self.output = cluster.folder / f"output-{time.monotonic_ns()}.txt"
        # Use the interpreter of the tests, not the checkout's virtual environment.
        given = environment(SLURM_CONF=str(cluster.settings), VIRTUAL_ENV="tests", CUDA_VISIBLE_DEVICES="", **variables)
        command = ["sbatch", "--parsable", "--gpus-per-node=1", f"--output={self.output}", *options, script, *arguments]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def shown(self):
        """Return SLURM's properties of the job by name."""
        words = self.cluster.ask("scontrol", "--oneliner", "show", "job", self.id).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self):
        return self.shown()["JobState"]

    def restarts(self):
        return int(self.shown()["Restarts"])

    def printed(self):
        return self.output.read_text() if self.output.exists() else ""

    def wait(self, timeout, state=None):
        """Wait until the job has ended or has the given state; return its state."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        wait_until(lambda: self.state() in ({state} if state else over), timeout, f"the job is {state or 'over'}", self)
        return self.state()

    def signal(self, name):
        """Send a signal as SLURM does before the time limit."""
        self.cluster.ask("scancel", "--batch", f"--signal={name}", self.id)

    def cancel(self):
        self.cluster.ask("scancel", self.id)


def ip(command):
    """Run an `ip` command, which changes the network of this machine."""
    subprocess.run(["ip", *command.split()], check=True)


def delete_link(name):
    """Delete a network link if it exists."""
    subprocess.run(["ip", "link", "delete", name], capture_output=True, check=False)


def address(number):
    """Return the address of a node; node 0 is the machine itself."""
    return f"{NETWORK}.{number + 1}" if number == 0 else f"{NETWORK}.{number + 10}"


def wait_until(condition, timeout, what, job=None):
    """Wait until a condition holds; raise AssertionError after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not condition():
        told = f"\n{job.shown()}\n{job.printed()}" if job else ""
        assert time.monotonic() < end, f"not so after {timeout} s: {what}{told}"
        time.sleep(0.1)
