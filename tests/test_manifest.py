"""Run manifests: always there, never torn, never with a secret, and true about how a run ended."""

import json, os, subprocess, sys, threading

import pytest

from vlmbench.data.fingerprint import data_hashes
from vlmbench.run.manifest import (
    EXIT_CODES,
    Manifest,
    Preempted,
    Run,
    RunFolderError,
    default_folder,
    git_state,
    read_runs,
    redact,
    write_json,
)


def test_a_run_is_recorded_from_start_to_end(tmp_path):
    with Run(tmp_path / 'r', 'demo', dict(seed=3)) as run:
        assert Manifest(run.folder).status() == 'running'
        run.record(data={'train.json': 'ab'}, results=dict(score=0.5))
        run.record(results=dict(blind=0.2))
        with run.phase('train'):
            pass
    m = json.loads((tmp_path / 'r' / 'manifest.json').read_text())
    assert (
        m['status'] == 'completed'
        and m['exit_code'] == 0
        and m['seconds'] >= 0
        and m['ended'] > m['started']
    )
    assert m['results'] == dict(score=0.5, blind=0.2) and [p['name'] for p in m['phases']] == [
        'train'
    ]
    assert {
        'versions',
        'code',
        'host',
        'environment',
        'command',
        'parameters',
        'seeds',
        'data',
        'reason',
    } <= set(m)
    assert m['versions']['torch'] and not (tmp_path / 'r' / 'heartbeat').exists()


def test_no_secret_of_the_environment_reaches_a_manifest(tmp_path):
    token = 'hf_ThisIsAVerySecretToken'
    code = (
        'import os; from vlmbench.run.manifest import Run\n'
        "with Run(os.environ['OUT'], 'demo', dict(note='uses ' + os.environ['HF_TOKEN'])) as run:\n"
        "    run.record(results={'url': 'https://me:pass@word.org'}, "
        'x=dict(env=dict(os.environ)))\n'
        "    raise ValueError('bad token ' + os.environ['HF_TOKEN'])"
    )
    env = os.environ | dict(
        HF_TOKEN=token, MY_PASSWORD='open-sesame', OUT=str(tmp_path / 'r'), OMP_NUM_THREADS='1'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, f'--hub-token={token}'],
        env=env,
        capture_output=True,
        text=True,
    )
    assert 'ValueError' in done.stderr
    text = (tmp_path / 'r' / 'manifest.json').read_text()
    assert token not in text and 'open-sesame' not in text and 'me:pass@' not in text
    assert (
        'ValueError: bad token <redacted>' in text
        and json.loads(text)['environment']['OMP_NUM_THREADS'] == '1'
    )


@pytest.mark.parametrize(
    'key, hidden',
    [
        ('hub_token', True),
        ('api_key', True),
        ('wandb_api_key', True),
        ('password', True),
        ('max_tokens', False),
        ('token_budget', False),
        ('batch_tokens', False),
    ],
)
def test_redaction_goes_by_whole_words(key, hidden):
    assert (redact({key: 'value'}, {})[key] == '<redacted>') == hidden
    assert redact({'max_tokens': 5, 'token': 5}, {}) == {
        'max_tokens': 5,
        'token': 5,
    }  # numbers are no secrets


@pytest.mark.parametrize(
    'name',
    ['PGPASSWORD', 'GITHUB_PAT', 'MYSQL_PWD', 'HF_TOKEN', 'GHTOKEN', 'OPENAI_API_KEY', 'SMTP_PASS'],
)
def test_values_of_secret_variables_are_blanked_anywhere(name):
    assert redact(
        dict(reason='refused: swordfish1', command=['x=swordfish1']), {name: 'swordfish1'}
    ) == dict(reason='refused: <redacted>', command=['x=<redacted>'])
    assert redact({name: 'swordfish1'}, {}) == {name: '<redacted>'}


def test_secrets_on_a_command_line_are_blanked_and_special_tokens_are_not():
    line = [
        'run',
        '--token',
        'abc',
        '--api-key',
        'k',
        '--out',
        'x',
        '-v',
        'token',
        'note=token=abc',
        '--password',
        '--force',
    ]
    assert redact(line, {}) == [
        'run',
        '--token',
        '<redacted>',
        '--api-key',
        '<redacted>',
        '--out',
        'x',
        '-v',
        'token',
        'note=token=<redacted>',
        '--password',
        '--force',
    ]
    assert redact('push --hub-token abc --dry and password: hunter2', {}) == (
        'push --hub-token <redacted> --dry and password: <redacted>'
    )
    kept = dict(
        image_token='<image>',
        pad_token='<pad>',
        text='image_token=<image> --pad-token <pad> unknown token: foo',
        path='a/b',
        forward_path='x',
    )
    assert redact(kept, {}) == kept
    assert redact('cloned with ghp_' + 'a1' * 18, {}) == 'cloned with <redacted>'


def test_a_shells_own_variables_hide_nothing():
    names = (
        'PWD',
        'OLDPWD',
        'PATH',
        'PYTHONPATH',
        'HOME',
        'SSH_AUTH_SOCK',
        'GIT_ASKPASS',
        'XAUTHORITY',
        'SSL_CERT_FILE',
        'HF_HOME',
    )
    shell = {name: f'/home/me/{name.lower()}-folder' for name in names}
    kept = dict(compared=[f'{v}/runs/a-s0' for v in shell.values()], out=shell['PWD'])
    assert redact(kept, shell) == kept


def test_under_the_engine_the_notebook_says_its_parameters(tmp_path, monkeypatch):
    Manifest(tmp_path / 'r').start('evaluate', dict(recipe='', limit=3))
    monkeypatch.setenv('VLMBENCH_RUN_FOLDER', str(tmp_path / 'r'))
    monkeypatch.setenv('VLMBENCH_NOTEBOOK', 'evaluate')
    run = Run('', 'evaluate', dict(recipe='llava-s0', limit=3, tasks=['a']))
    assert run.manifest.read()['parameters'] == dict(recipe='llava-s0', limit=3, tasks=['a'])
    run.finish()


def test_a_script_that_just_ends_is_failed_and_a_killed_one_is_lost(tmp_path):
    code = (
        'import os, sys, signal; from vlmbench.run.manifest import Run\n'
        "run = Run(sys.argv[1], 'demo', {})\n"
        "if sys.argv[2] == 'kill': os.kill(os.getpid(), signal.SIGKILL)"
    )
    for how, status in (('end', 'failed'), ('kill', 'lost')):
        subprocess.run([sys.executable, '-c', code, str(tmp_path / how), how], capture_output=True)
        assert Manifest(tmp_path / how).status() == status
    found = {os.path.basename(r['folder']): r['status'] for r in read_runs(tmp_path)}
    assert found == {'end': 'failed', 'kill': 'lost'}


def test_preempted_and_failed_runs_are_continued_with_their_history(tmp_path):
    with pytest.raises(SystemExit) as e:
        with Run(tmp_path / 'r', 'demo', {}) as run:
            run.stop.set()
            run.check()
    assert e.value.code == 75 == EXIT_CODES['preempted'] and isinstance(e.value, Preempted)
    with pytest.raises(OSError):
        with Run(tmp_path / 'r', 'demo', {}):
            raise OSError('disk full')
    with Run(tmp_path / 'r', 'demo', {}) as run:
        (run.folder / 'result').write_text('x')
    assert [a['status'] for a in Manifest(tmp_path / 'r').read()['attempts']] == [
        'preempted',
        'failed',
    ]
    with pytest.raises(RunFolderError, match='completed run'):
        Run(tmp_path / 'r', 'demo', {})
    with Run(tmp_path / 'r', 'demo', {}, overwrite=True):
        pass
    assert not (tmp_path / 'r' / 'result').exists()


def test_a_living_run_is_not_joined_and_the_current_folder_is_not_emptied(tmp_path, monkeypatch):
    with Run(tmp_path / 'r', 'demo', {}):
        with pytest.raises(RunFolderError, match='still going'):
            Run(tmp_path / 'r', 'demo', {}, overwrite=True)
    monkeypatch.chdir(tmp_path / 'r')
    with pytest.raises(RunFolderError, match='not emptied'):
        Run('.', 'demo', {}, overwrite=True)
    assert Manifest('.').read()['status'] == 'completed'


BEGIN = """
import sys, time
from vlmbench.run.manifest import Manifest, RunFolderError
run = Manifest(sys.argv[1])
sys.stdin.readline()
try:
    print(run.start('demo', dict(seed=int(sys.argv[2])))['id'], flush=True)
    time.sleep(60)
except RunFolderError as e:
    print('refused:', e)
"""


@pytest.mark.parametrize('overwrite', [False, True])
def test_of_two_runs_that_begin_at_once_one_is_refused(overwrite, tmp_path):
    "In a fresh folder, and in one that holds a completed run which is to be emptied."
    if overwrite:
        with Run(tmp_path / 'r', 'demo', {}):
            pass
    code = BEGIN.replace('))[', f'), overwrite={overwrite})[')
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    both = [
        subprocess.Popen([sys.executable, '-c', code, str(tmp_path / 'r'), seed], **pipes)
        for seed in '01'
    ]
    try:
        for process in both:
            process.stdin.write('go\n')
            process.stdin.flush()
        said = [process.stdout.readline().strip() for process in both]
        refused = [line for line in said if line.startswith('refused:')]
        assert len(refused) == 1 and 'a run is still going there' in refused[0], said
        assert Manifest(tmp_path / 'r').read()['id'] in said
    finally:
        for process in both:
            process.kill()
            process.wait()


def test_two_writers_lose_nothing(tmp_path):
    Manifest(tmp_path).start('demo', {})

    def add(who):
        [Manifest(tmp_path).update(results={f'{who}{i}': i}) for i in range(15)]

    threads = [threading.Thread(target=add, args=(w,)) for w in 'ab']
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(Manifest(tmp_path).read()['results']) == 30 and not list(tmp_path.glob('*.tmp'))


def test_an_unwritable_value_leaves_the_old_file(tmp_path):
    write_json(tmp_path / 'x.json', dict(a=1))
    loop: list = []
    loop.append(loop)
    with pytest.raises((ValueError, RecursionError)):
        write_json(tmp_path / 'x.json', loop)
    assert (
        json.loads((tmp_path / 'x.json').read_text()) == dict(a=1)
        and len(list(tmp_path.iterdir())) == 1
    )


def test_data_and_git_fingerprints_move_with_their_content(tmp_path):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'rows.jsonl').write_text('{}\n')
    before = data_hashes(tmp_path / 'd')
    (tmp_path / 'd' / 'rows.jsonl').write_text('{} \n')
    after = data_hashes(tmp_path / 'd')
    assert before['files'] != after['files'] and before['others'] == after['others']
    assert git_state(tmp_path) is None
    git = lambda *w: subprocess.run(
        ['git', '-C', str(tmp_path), *w], check=True, capture_output=True
    )
    git('init', '-q')
    (tmp_path / 'a.txt').write_text('1')
    git('add', 'a.txt')
    git('-c', 'user.name=a', '-c', 'user.email=a@b', 'commit', '-qm', 'x')
    clean = git_state(tmp_path)
    (tmp_path / 'a.txt').write_text('2')
    assert (
        not clean['dirty']
        and git_state(tmp_path)['dirty']
        and len(git_state(tmp_path)['diff_sha256']) == 64
    )


def test_default_folders_are_readable_and_fresh(tmp_path):
    a = default_folder('train', dict(recipe='llava', scale='tiny', seed=0, lr=1), tmp_path)
    assert a.name.startswith('train-llava-tiny-s0-')
    a.mkdir()
    assert default_folder('train', dict(recipe='a/../b', seed=None), tmp_path).parent == tmp_path
    assert not default_folder(
        'train', dict(recipe='llava', scale='tiny', seed=0), tmp_path
    ).exists()


def test_only_a_later_start_of_the_same_job_takes_a_folder_that_looks_alive(tmp_path, monkeypatch):
    "The first attempt's heartbeat is fresh, its process even alive."
    folder = Manifest(tmp_path / 'r')
    monkeypatch.setenv('SLURM_JOB_ID', '41')
    monkeypatch.delenv('SLURM_RESTART_COUNT', raising=False)
    first = folder.start('demo', {})
    for job, restarts in (('41', '0'), ('42', '1')):
        monkeypatch.setenv('SLURM_JOB_ID', job)
        monkeypatch.setenv('SLURM_RESTART_COUNT', restarts)
        with pytest.raises(RunFolderError, match='still going'):
            folder.start('demo', {})
    monkeypatch.setenv('SLURM_JOB_ID', '41')
    second = folder.start('demo', {})
    assert [(a['id'], a['status']) for a in second['attempts']] == [(first['id'], 'lost')]
    with pytest.raises(RunFolderError, match='still going'):
        folder.start('demo', {})
