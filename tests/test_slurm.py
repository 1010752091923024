"""Jobs on a real Slurm: two emulated nodes that these tests start and stop. They run with
`make test-slurm` (or `pytest -m slurm`), and say why where Slurm cannot be installed."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import test_runs
from mini_bases import write_bases
from slurm.cluster import Cluster, install, wait_for
from vlmbench.run.engine import run_notebook
from vlmbench.run.manifest import Manifest

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures('real_kernels')]
STEPS = Path(__file__).parent / 'slurm' / 'steps.ipynb'
CLI = 'from vlmbench.run.cli import main; main()'


@pytest.fixture(scope='module')
def cluster():
    "A running cluster; its folder's path is short, because sockets lie in it."
    pytest.importorskip('submitit', reason='submitit is not installed (extra: slurm)')
    missing = install()
    if missing:
        pytest.skip(missing)
    with tempfile.TemporaryDirectory(prefix='slurm-') as home:
        cluster = Cluster(Path(home))
        try:
            if refused := cluster.refusal():
                pytest.skip(refused)
            yield cluster
        finally:
            cluster.stop()


class Desk:
    "Somebody's working folder on the login node."

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder

    @property
    def env(self) -> dict[str, str]:
        "As installed, wherever the folder is; nobody knows an address of the emulated nodes."
        here = {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE', 'HF_HUB_OFFLINE': '1'}
        here['MASTER_ADDR'] = '127.0.0.1'
        paths = [str(STEPS.parents[2]), os.environ.get('PYTHONPATH', '')]
        here['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
        return self.cluster.env | here

    def start(self, *words: str) -> subprocess.Popen:
        "The command in the background; what it prints is in start.log."
        with open(self.folder / 'start.log', 'wb') as said:
            command = [sys.executable, '-c', CLI, *map(str, words)]
            return subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdout=said, stderr=subprocess.STDOUT
            )

    def vlmbench(self, *words: str, code: int = 0, seconds: float = 120) -> str:
        "What the command prints; it must end with `code`."
        done = subprocess.run(
            [sys.executable, '-c', CLI, *map(str, words)],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == code, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def submit(self, notebook, *words: str) -> tuple[list[str], list[Path], str]:
        "The jobs' numbers, their folders and everything that was printed."
        said = self.vlmbench('submit', notebook, *words)
        rows = re.findall(r'^(\d+(?:_\d+)?)\s+(\S+)\s+\S+$', said, re.M)
        return [job for job, _ in rows], [Path(folder) for _, folder in rows], said

    def ended(self, job: str, seconds: float = 90) -> str:
        "Waits for the job's end; its last state."
        over = ('COMPLETED', 'FAILED', 'CANCELLED', 'TIMEOUT', 'NODE_FAIL')

        def state() -> str:
            now = self.cluster.job(job)['JobState']
            return now if now in over else ''

        return wait_for(state, seconds, f'the end of job {job}: {self.cluster.job(job)}')

    def running(self, job: str, folder: Path, step: int = 1, seconds: float = 60) -> None:
        "Waits until the steps notebook of the job has done so many steps."
        saved = folder / 'state.json'
        wait_for(lambda: saved.exists() and reached(folder) >= step, seconds, f'{job} at {step}')


@pytest.fixture
def desk(cluster, tmp_path):
    yield Desk(cluster, tmp_path)
    cluster.call('scancel', '--user', os.environ.get('USER', 'root'), check=False)


def reached(folder: Path) -> int:
    return json.loads((folder / 'state.json').read_text())['step']


def chain(seed: int, steps: int) -> str:
    "What the steps notebook arrives at without any interruption."
    value = str(seed)
    for _ in range(steps):
        value = hashlib.sha256(value.encode()).hexdigest()
    return value


def log(folder: Path) -> str:
    return '\n'.join(p.read_text() for p in (folder / 'slurm').glob('*.out'))


def assert_continued(folder: Path, steps: int, first: str, seed: int = 0) -> dict:
    "The run is complete, its first attempt ended as `first`, and nothing was done twice."
    manifest = Manifest(folder).read()
    assert manifest['status'] == 'completed', (manifest['reason'], log(folder))
    assert manifest['attempts'][0]['status'] == first, manifest['attempts']
    assert manifest['results']['value'] == chain(seed, steps)
    again = re.findall(r'begins at step (\d+)', (folder / 'output.log').read_text())[-1]
    assert int(again) > 0
    return manifest


@pytest.mark.short
def test_a_sweep_is_an_array_with_its_own_folders_exit_codes_and_limit(desk):
    "Four jobs, at most two at once; those that fail are failed jobs with the run's exit code."
    jobs, folders, said = desk.submit(STEPS, 'seed=0..1', 'fail=false,true', '--array', '2')
    assert [f.name for f in folders] == [
        f's{s}-fail_{f}' for s in (0, 1) for f in ('false', 'true')
    ]
    assert f'scancel {jobs[0].split("_")[0]}' in said and 'runs --watch' in said
    assert desk.cluster.job(jobs[3])['ArrayTaskThrottle'] == '2'
    watched = desk.vlmbench('runs', folders[0].parent, '--watch', '--every', '0.5')
    assert re.search(r'running +n[12] ', watched) and watched.endswith(
        'nothing is queued or running\n'
    )
    assert [desk.ended(j) for j in jobs] == ['COMPLETED', 'FAILED'] * 2
    assert [desk.cluster.job(j)['ExitCode'] for j in jobs] == ['0:0', '1:0'] * 2
    values = [Manifest(f).read()['results'].get('value') for f in folders]
    assert values == [chain(0, 5), None, chain(1, 5), None]
    assert 'asked to fail' in Manifest(folders[1]).read()['reason']


def test_nothing_is_submitted_when_anything_is_wrong(desk):
    "A mistyped name, a wrong type, a taken folder, an option that sbatch refuses."
    before = desk.cluster.call('squeue', '-h', '-t', 'all')
    refused = {
        "did you mean 'seed'": (STEPS, 'sead=1'),
        'write a whole number': (STEPS, 'seed=0..1,x'),
        'no parameter `nodes`': (STEPS, '--nodes', '2'),
        'sbatch refused': (STEPS, '--partition', 'nowhere'),
        'no such run notebook': ('stepz',),
        'choose one of slurm': ('claims_markers', 'jobs=slrum'),
    }
    for reason, words in refused.items():
        assert reason in desk.vlmbench('submit', *words, code=2)
    assert desk.cluster.call('squeue', '-h', '-t', 'all') == before
    assert not any((desk.folder / 'runs').glob('*'))


def test_cancelled_is_not_queued_again(desk):
    "The run is told, saves and says so; the job stays cancelled. The folder can be continued."
    (job,), (folder,), _ = desk.submit(STEPS, 'steps=400', 'out=mine')
    desk.running(job, folder)
    assert 'still going there' in desk.vlmbench('submit', STEPS, 'out=mine', code=2)
    desk.cluster.call('scancel', job)
    assert desk.ended(job) == 'CANCELLED'
    manifest = wait_for(
        lambda: Manifest(folder).read()['ended'] and Manifest(folder).read(), 30, 'end'
    )
    assert (manifest['status'], manifest['signals'][0]) == ('preempted', 'SIGTERM')
    at = reached(folder)
    again, (same,), _ = desk.submit(STEPS, f'steps={at + 2}', 'out=mine')
    assert same == folder and desk.ended(again[0]) == 'COMPLETED'
    assert_continued(folder, at + 2, 'preempted')
    assert desk.cluster.job(job)['JobState'] == 'CANCELLED'


def test_a_job_continues_after_its_time_limit(desk):
    "A limit of one minute: warned before it, saved, queued again, continued, complete."
    words = ('steps=60', 'pause=0.7', '--time', '1', '--warning', '25')
    (job,), (folder,), _ = desk.submit(STEPS, *words)
    assert desk.ended(job, 200) == 'COMPLETED'
    assert_continued(folder, 60, 'preempted')
    assert 'received SIGUSR1 at step' in (folder / 'output.log').read_text()
    assert 'is queued again' in log(folder)


bases = test_runs.bases  # a small world and random base models of two layers


def test_a_preempted_training_ends_bit_equal(desk, bases):
    "A job of higher priority takes the node in the middle of a stage; the model is the same."
    settings = test_runs.params(bases, evaluate='false', budget=0.04)
    given = {k: ','.join(v) if isinstance(v, list) else str(v) for k, v in settings.items()}
    words = [f'{name}={value}' for name, value in given.items()]
    (job,), (folder,), _ = desk.submit('train', *words)
    metrics = folder / 'stages' / 'instruct' / 'metrics.jsonl'
    wait_for(lambda: metrics.exists() and metrics.read_text().count('loss') > 5, 90, 'training')
    urgent = desk.cluster.call(
        *('sbatch', '--parsable', '--chdir', str(desk.folder), '--partition', 'high'),
        *('--nodes', '2', '--exclusive', '--wrap', 'sleep 2'),
    )
    assert desk.ended(urgent.strip(), 90) == 'COMPLETED'
    assert desk.ended(job, 150) == 'COMPLETED'
    manifest = Manifest(folder).read()
    assert [a['status'] for a in manifest['attempts']] == ['preempted'], log(folder)
    assert run_notebook('train', given, desk.folder / 'whole', progress=False) == 0
    whole = Manifest(desk.folder / 'whole').read()
    assert manifest['results'] == whole['results']
    ends = [f / 'model' / 'model.safetensors' for f in (folder, desk.folder / 'whole')]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_a_printed_file_works_by_itself(desk):
    "Submitted by hand, both tasks run; one is warned, and comes back."
    words = ('submit', STEPS, 'steps=40', 'seed=3,4', 'out=byhand', '--dry-run')
    (desk.folder / 'job.sh').write_text(desk.vlmbench(*words))
    assert not (desk.folder / 'byhand').exists()
    env = desk.cluster.env | {'PYTHONPATH': os.environ.get('PYTHONPATH', str(STEPS.parents[2]))}
    said = subprocess.run(
        ['sbatch', 'job.sh'], cwd=desk.folder, env=env, capture_output=True, text=True, check=True
    )
    job = said.stdout.split()[-1]
    folders = [desk.folder / 'byhand' / name for name in ('s3', 's4')]
    desk.running(f'{job}_0', folders[0])
    desk.cluster.call('scancel', '--batch', '--signal', 'USR1', f'{job}_0')
    assert [desk.ended(f'{job}_{i}') for i in (0, 1)] == ['COMPLETED'] * 2
    assert_continued(folders[0], 40, 'preempted', seed=3)
    assert Manifest(folders[1]).read()['results']['value'] == chain(4, 40)


def test_a_job_whose_node_is_lost_takes_its_folder_on_another(desk):
    "The power fails: no signal, no last word, a heartbeat of seconds ago."
    (job,), (folder,), _ = desk.submit(STEPS, 'steps=60')
    desk.running(job, folder, 5)
    lost = desk.cluster.job(job)['NodeList']
    desk.cluster.kill_node(lost)
    # both nodes are this machine; on two machines nobody can look for the process
    Manifest(folder).update(host=dict(hostname=lost))
    try:
        beat = (folder / 'heartbeat').stat().st_mtime
        assert desk.ended(job, 120) == 'COMPLETED'
    finally:
        desk.cluster.start_node(lost)
    manifest = assert_continued(folder, 60, 'lost')
    waited = datetime.fromisoformat(manifest['started']).timestamp() - beat
    assert desk.cluster.job(job)['NodeList'] != lost and waited < 60, waited


def test_six_jobs_in_a_fresh_folder_write_one_world(desk):
    words = ('seed=0..5', 'steps=1', 'world=runs/world', '--array', '4')
    jobs, folders, _ = desk.submit(STEPS, *words)
    assert [desk.ended(job, 150) for job in jobs] == ['COMPLETED'] * 6, log(folders[0].parent)
    assert (desk.folder / 'runs/world/world.json').exists()
    assert not list((desk.folder / 'runs').glob('.world*'))


@pytest.fixture
def small_disk(tmp_path):
    "A file system of one megabyte."
    place = tmp_path / 'small'
    place.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('a small disk needs the right to mount one')
    yield place
    subprocess.run(['umount', '--lazy', str(place)], check=True)


def test_a_full_disk_ends_the_job_with_its_reason(desk, small_disk):
    "It is no reason to be queued again; a submission to a full disk is refused."
    words = ('steps=50', 'payload=100000', 'pause=0', f'out={small_disk}/run')
    (job,), (folder,), _ = desk.submit(STEPS, *words)
    assert desk.ended(job) == 'FAILED'
    assert desk.cluster.job(job)['Restarts'] == '0'
    for payload in folder.glob('payload-*'):
        payload.unlink()
    assert 'No space left' in (folder / 'output.log').read_text() + log(folder) + str(
        Manifest(folder).read()['reason']
    )
    (small_disk / 'rest').write_bytes(bytes(900_000))
    with pytest.raises(OSError), open(small_disk / 'more', 'wb', 0) as f:
        while True:
            f.write(bytes(1024))
    said = desk.vlmbench('submit', STEPS, f'out={small_disk}/other', code=2)
    assert 'No space left' in said and 'nothing was submitted' in said


@pytest.mark.short
def test_a_read_only_folder_is_refused_before_anything_is_submitted(desk, small_disk):
    before = desk.cluster.call('squeue', '-h', '-t', 'all')
    fix = ['mount', '-o', 'remount,ro', str(small_disk)]
    fixed = subprocess.run(fix, capture_output=True, text=True, check=False)
    if fixed.returncode:
        pytest.skip(f'a disk cannot be made read-only here: {fixed.stderr.strip()}')
    said = desk.vlmbench('submit', STEPS, 'seed=0..2', f'out={small_disk}/run', code=2)
    assert f'{small_disk} cannot be written, as its file system is read-only' in said
    assert 'Traceback' not in said and len(said.strip().splitlines()) == 1
    assert desk.cluster.call('squeue', '-h', '-t', 'all') == before


@pytest.mark.short
def test_two_nodes_train_as_one_process(desk, bases):
    "srun starts a torchrun on each node, they meet at the first, and the model is one process's."
    settings = test_runs.params(bases, evaluate=False, budget=0.01, blind=False)
    settings['overrides'] += ['stages.align.accumulation=2', 'stages.instruct.accumulation=2']
    given = {k: ','.join(v) if isinstance(v, list) else str(v) for k, v in settings.items()}
    words = [f'{name}={value}' for name, value in given.items()]
    (job,), (folder,), _ = desk.submit('train', *words, 'gpus=1', '--nodes', '2', '--cpus', '1')
    assert desk.ended(job, 150) == 'COMPLETED', log(folder)
    assert desk.cluster.job(job)['NumNodes'] == '2'
    manifest = Manifest(folder).read()
    assert manifest['parameters']['nodes'] == 2 and (folder / 'ranks' / 'rank-1.log').exists()
    watched = desk.vlmbench('runs', folder, '--watch')
    assert 'completed' in watched and 'never started' not in watched
    assert run_notebook('train', given, desk.folder / 'one', progress=False) == 0
    one = Manifest(desk.folder / 'one').read()
    assert manifest['results'] == one['results'] and not one['attempts']
    ours, theirs = (
        load_file(f / 'model' / 'model.safetensors') for f in (folder, desk.folder / 'one')
    )
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm().clamp(min=1e-2), name


def train_words(given: dict) -> list[str]:
    "Parameters of a training as words of the command line."
    return [f'{k}={",".join(v) if isinstance(v, list) else v}' for k, v in given.items()]


@pytest.fixture(scope='module')
def deep_bases(tmp_path_factory):
    "As `bases`, with blocks enough for a surrogate."
    root = tmp_path_factory.mktemp('deep-bases')
    write_bases(root, 4, caption_train=12, vqa_train=12, text_train=8)
    facts = dict(llm=str(root / 'llm'), vision=str(root / 'vit'), image_size=64)
    facts |= dict(name='mini', template='world', like='tiny')
    (root / 'mini.json').write_text(json.dumps(facts))
    return root


def test_a_preempted_graft_over_two_nodes_ends_as_one_process(desk, deep_bases):
    """Zero in shards on two nodes loses both inside stage encoder, is queued again, and goes on
    through the graft: what a job ends with that nobody stopped, bit for bit, and what one process
    ends with."""
    given = test_runs.params(deep_bases, evaluate=False, budget=0.04, blind=False)
    given |= dict(recipe='zero')
    given['overrides'] = []
    for stage in ('adapt', 'encoder'):
        sizes = ('batch_rows=1', 'accumulation=2', 'max_tokens=256', 'eps=1e-5')
        given['overrides'] += [f'stages.{stage}.{size}' for size in sizes]
    words = [*train_words(given), 'gpus=1', 'parallel=fsdp', '--nodes', '2', '--cpus', '1']
    (job,), (folder,), _ = desk.submit('train', *words)
    metrics = folder / 'stages' / 'encoder' / 'metrics.jsonl'
    wait_for(lambda: metrics.exists() and metrics.read_text().count('loss') > 3, 200, 'encoder')
    urgent = ('--nodes', '2', '--exclusive', '--wrap', 'sleep 1')
    place = ('--parsable', '--chdir', str(desk.folder), '--partition', 'high')
    desk.cluster.call('sbatch', *place, *urgent)
    assert desk.ended(job, 240) == 'COMPLETED', log(folder)
    manifest = Manifest(folder).read()
    assert [a['status'] for a in manifest['attempts']] == ['preempted'], log(folder)
    (again,), (_,), _ = desk.submit('train', *words, 'out=whole')
    here = {k: ','.join(v) if isinstance(v, list) else str(v) for k, v in given.items()}
    assert run_notebook('train', here, desk.folder / 'one', progress=False) == 0
    assert desk.ended(again, 240) == 'COMPLETED', log(desk.folder / 'whole')
    ours, whole, one = (
        load_file(f / 'model' / 'model.safetensors')
        for f in (folder, desk.folder / 'whole', desk.folder / 'one')
    )
    assert ours.keys() == whole.keys() == one.keys()
    for name, tensor in one.items():
        assert torch.equal(ours[name], whole[name]), name
        assert (ours[name] - tensor).norm() <= 1e-5 * tensor.norm().clamp(min=2e-2), name


ARMS = ('vip_llava', 'none')


@pytest.fixture(scope='module')
def region_bases(tmp_path_factory):
    "As `bases`, with rows of regions."
    root = tmp_path_factory.mktemp('region-bases')
    rows = dict(caption_train=12, vqa_train=12, vqa_test=4, text_train=8, text_test=4)
    write_bases(root, 2, **rows, region_train=12, region_test=4)
    facts = dict(llm=str(root / 'llm'), vision=str(root / 'vit'), image_size=64)
    facts |= dict(name='mini', template='world', like='tiny')
    (root / 'mini.json').write_text(json.dumps(facts))
    return root


def claims(desk, bases, out: str, **more) -> list[str]:
    "The words of `vlmbench run` for two arms with two seeds."
    given = dict(seeds=2, budget=0.01, arms=','.join(ARMS), limit=4, device='cpu', out=out)
    given |= dict(scale=bases / 'mini.json', data=bases / 'world') | more
    return ['run', 'claims_markers', '--quiet', *(f'{k}={v}' for k, v in given.items())]


def test_arms_of_a_claim_fan_out_and_are_only_collected_again(desk, region_bases):
    """Four trainings as an array, one of them preempted: tables and weights are those of this
    machine alone. Again, only a failed arm is trained; it is named, and the others are kept."""
    words = claims(desk, region_bases, 'fanned', jobs='slurm')
    waiting = desk.start(*words)
    folders = [desk.folder / 'fanned' / f'{arm}-s{seed}' for seed in (0, 1) for arm in ARMS]
    metrics = [folder / 'stages' / 'region' / 'metrics.jsonl' for folder in folders]
    try:
        wait_for(lambda: any(m.exists() and 'loss' in m.read_text() for m in metrics), 120, 'steps')
        jobs = [json.loads((folder / 'job.json').read_text())['job'] for folder in folders]
        urgent = ('--nodes', '1', '--ntasks', '1', '--wrap', 'sleep 2')
        desk.cluster.call(
            'sbatch', '--chdir', str(desk.folder), '--output', 'u.out', '-p', 'high', *urgent
        )
        ended = waiting.wait(240)
    finally:
        waiting.kill()
    assert ended == 0, (desk.folder / 'start.log').read_text()
    assert sum(int(desk.cluster.job(job)['Restarts']) for job in jobs) == 1
    # two at a time have one thread each, as a job has
    desk.vlmbench(*claims(desk, region_bases, 'here', jobs=2), seconds=240)
    for name in ('claims.csv', 'accuracy.csv'):
        tables = [(desk.folder / out / name).read_text() for out in ('fanned', 'here')]
        assert tables[0] == tables[1], name
    for folder in folders:
        ends = [desk.folder / out / folder.name for out in ('fanned', 'here')]
        ours, theirs = ((end / 'model' / 'model.safetensors').read_bytes() for end in ends)
        assert ours == theirs, folder.name
    began = [Manifest(folder).read()['started'] for folder in folders]
    Manifest(folders[1]).update(status='failed', reason='a disk was full')
    (folders[1] / 'recipe.json').write_text('{"name": "another", "stages": []}')
    said = desk.vlmbench(*words, code=1, seconds=120)
    assert '1 of 4 runs failed' in said and f'{folders[1].name} (job' in said, said
    started = [Manifest(folder).read()['started'] for folder in folders]
    assert [a == b for a, b in zip(began, started)] == [True, False, True, True]


def test_a_bench_fans_out_and_is_compared(desk, bases):
    "Two seeds as an array, the comparison after them; a second bench keeps what is completed."
    words = ['bench', '--jobs', 'slurm', '--methods', 'llava', '--seeds', '2', '--out', 'b']
    words += ['--scale', bases / 'mini.json', '--data', bases / 'world', '--budget', '0.004']
    said = desk.vlmbench(*words)
    jobs = re.findall(r'^(\d+(?:_\d+)?) ', said, re.M)
    assert len(jobs) == 3 and f'cancel: scancel {jobs[0].split("_")[0]} {jobs[2]}' in said
    assert desk.ended(jobs[2], 150) == 'COMPLETED', log(desk.folder / 'b' / 'compare')
    assert Manifest(desk.folder / 'b' / 'llava-s1').status() == 'completed'
    assert 'llava' in (desk.folder / 'b' / 'report.html').read_text()
    assert 'completed run' in desk.vlmbench(*words, code=2)
    (again,) = re.findall(r'^(\d+) ', desk.vlmbench(*words, '--resume'), re.M)
    desk.cluster.call('scancel', again)
