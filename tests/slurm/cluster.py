"""A Slurm of its own for the tests: one controller and two emulated nodes on this machine, without
systemd and cgroups, everything below one folder and gone with it."""

import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

PACKAGES = ('slurm-wlm', 'slurm-client', 'munge')
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'scontrol', 'scancel')
NODES = ('n1', 'n2')

# Times are short: a lost node is called lost after 10 seconds, a requeued job waits as long as its
# credential lives, a preempted one has 20 seconds.
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge/socket,cred_expire=5
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldLogFile={home}/log/slurmctld
SlurmdLogFile={home}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=2,sched_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout=10
KillWait=10
MinJobAge=3600
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000
PartitionName=low Nodes=n1,n2 Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes=n1,n2 State=UP PriorityTier=10 PreemptMode=OFF
"""


def install() -> str:
    "Installs Slurm where that is possible; returns why not, or nothing."
    if all(map(shutil.which, PROGRAMS)):
        return ''
    command = ['apt-get', 'install', '-y', '--no-install-recommends', *PACKAGES]
    if shutil.which('apt-get') and os.geteuid() == 0:
        try:
            subprocess.run(['apt-get', 'update'], capture_output=True, timeout=60, check=False)
            subprocess.run(command, capture_output=True, timeout=120, check=False)
        except subprocess.TimeoutExpired as e:
            return f'{" ".join(e.cmd[:2])} did not end within {e.timeout:.0f} s'
    missing = [p for p in PROGRAMS if not shutil.which(p)]
    return f'{", ".join(missing)} not installed: {" ".join(command)}' if missing else ''


def wait_for(condition, seconds: float, what: str):
    "The first true value of `condition()`; AssertionError saying `what` after so many seconds."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = condition()
        if found:
            return found
        time.sleep(0.3)
    raise AssertionError(f'waited {seconds} s for {what}')


def free_ports(count: int) -> list[int]:
    "Ports that nobody listens on."
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


class Cluster:
    "The cluster below `home`, a new folder with a short path."

    def __init__(self, home: Path):
        self.home, self.config = home, home / 'slurm.conf'
        self.env = os.environ | dict(SLURM_CONF=str(self.config))

    def start(self) -> None:
        "Starts all daemons and returns once both nodes are idle."
        for name in ('state', 'spool', 'log', 'munge'):
            (self.home / name).mkdir(mode=0o755)
        facts = dict(host=socket.gethostname().split('.')[0], user=getpass.getuser())
        self.config.write_text(CONFIG.format(home=self.home, ports=free_ports(3), **facts))
        munge = self.home / 'munge'
        (munge / 'key').write_bytes(os.urandom(1024))
        (munge / 'key').chmod(0o600)
        files = dict(key='key', socket='socket', pid='pid', log='log', seed='seed')
        names = {'key': 'key-file', 'pid': 'pid-file', 'log': 'log-file', 'seed': 'seed-file'}
        options = [f'--{names.get(k, k)}={munge / v}' for k, v in files.items()]
        self.call('munged', '--force', *options)
        self.call('slurmctld', '-f', str(self.config))
        for node in NODES:
            self.start_node(node)

    def refusal(self) -> str:
        "Starts all daemons; why they do not start on this machine, or nothing."
        try:
            self.start()
        except (AssertionError, OSError, subprocess.TimeoutExpired) as e:
            return f'Slurm is installed and does not start here: {" ".join(str(e).split())[:300]}'
        return ''

    def call(self, *command: str, check: bool = True) -> str:
        "Standard output of a command that talks to this cluster."
        done = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0 or not check, (command, done.stdout, done.stderr)
        return done.stdout

    def start_node(self, node: str) -> None:
        self.call('slurmd', '-N', node, '-f', str(self.config))
        wait_for(lambda: 'idle' in self.state(node), 40, f'node {node} to be idle')

    def state(self, node: str) -> str:
        return self.call('sinfo', '-h', '-p', 'low', '-n', node, '-o', '%T', check=False).strip()

    def kill_node(self, node: str) -> None:
        "What a power cut does: the daemon, its job steps and all their processes end at once."
        daemon = psutil.Process(int((self.home / f'slurmd-{node}.pid').read_text()))
        steps = [p for p in psutil.process_iter() if self._is_step(p, node)]
        lost = [daemon, *steps]
        for step in steps:
            lost += step.children(recursive=True)
        for process in lost:
            process.send_signal(signal.SIGSTOP)  # nobody sees another one end
        for process in lost:
            process.kill()

    def _is_step(self, process: psutil.Process, node: str) -> bool:
        "Whether a process manages a step on this cluster's node: its own processes say so."
        try:
            if process.name() != 'slurmstepd':
                return False
            told = [child.environ() for child in process.children(recursive=True)]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False
        here = (node, str(self.config))
        return any((e.get('SLURMD_NODENAME'), e.get('SLURM_CONF')) == here for e in told)

    def job(self, number: str) -> dict[str, str]:
        "What the controller says about a job, as names and values."
        text = self.call('scontrol', '-o', 'show', 'job', number)
        return dict(re.findall(r'(\w[\w:/]*)=(\S*)', text))

    def stop(self) -> None:
        "Cancels what runs and ends every daemon."
        self.call('scancel', '--user', getpass.getuser(), check=False)
        time.sleep(1)
        files = [*self.home.glob('slurmd-*.pid'), self.home / 'slurmctld.pid']
        for file in [*files, self.home / 'munge' / 'pid']:
            try:
                process = psutil.Process(int(file.read_text()))
                process.terminate()
                process.wait(10)
            except (OSError, ValueError, psutil.Error):
                continue
