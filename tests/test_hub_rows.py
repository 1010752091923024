"""Data sets of the Hub by name, from the cache that `datasets` keeps: no network."""

import io, json, os, pickle

import datasets
import pytest
from datasets.naming import camelcase_to_snakecase
from PIL import Image

from warm_kernels import vlmbench

from vlmbench.data.mixture import StatefulSampler
from vlmbench.data.quarantine import BadRecord, Quarantine
from vlmbench.data.sources import DataError, open_samples, picture_share, prepare_data

N = 7
NAME = 'hub:Hon-Wong/VoRA-Recap-8M'


def png(number):
    data = io.BytesIO()
    Image.new('RGB', (6, 4), (30 * number, 0, 0)).save(data, 'PNG')
    return data.getvalue()


def rows(split):
    talk = [{'from': 'human', 'value': 'Describe.'}, {'from': 'gpt', 'value': f'{split} cat .'}]
    columns = dict(
        id=[f'{split}{i}' for i in range(N)],
        image=[dict(bytes=png(i), path=None) for i in range(N)],
        conversations=[json.dumps(talk)] * N,
    )
    if split == 'blind':
        columns['image'][1] = None
    text = datasets.Value('string')
    features = datasets.Features(dict(id=text, image=datasets.Image(), conversations=text))
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    "What `load_dataset('Hon-Wong/VoRA-Recap-8M')` leaves in its cache."
    root = tmp_path_factory.mktemp('hub')
    (root / 'source').mkdir()
    splits = ('train', 'test', 'blind')
    for split in splits:
        rows(split).to_parquet(root / 'source' / f'{split}.parquet')
    files = {split: str(root / 'source' / f'{split}.parquet') for split in splits}
    datasets.load_dataset('parquet', data_files=files, cache_dir=str(root / 'cache'))
    low = camelcase_to_snakecase('VoRA-Recap-8M')
    (made,) = (root / 'cache' / 'parquet').iterdir()
    for path in made.rglob('*'):
        if path.name.startswith('parquet-'):
            path.rename(path.with_name(path.name.replace('parquet-', f'{low}-', 1)))
        if path.name == 'dataset_info.json':
            about = json.loads(path.read_text())
            path.write_text(json.dumps(about | dict(dataset_name=low, config_name='default')))
    (root / 'cache' / f'Hon-Wong___{low}').mkdir()
    made.rename(root / 'cache' / f'Hon-Wong___{low}' / 'default')
    return root / 'cache'


@pytest.fixture(autouse=True)
def offline(cache, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(cache))
    monkeypatch.chdir(tmp_path)


def test_a_name_reads_its_rows_with_their_pictures(tmp_path):
    samples = open_samples(tmp_path, NAME, Quarantine())
    assert len(samples) == N and picture_share(NAME, tmp_path) == 1
    for i, sample in enumerate(samples):
        assert sample.id == f'train{i}' and sample.source == 'VoRA-Recap-8M'
        assert sample.turns[0].text == '<image>Describe.'
        assert sample.images[0].load().getpixel((1, 1)) == (30 * i, 0, 0)
    assert open_samples(tmp_path, f'{NAME}/test')[0].id == 'test0'
    assert open_samples(tmp_path, f'{NAME}/default/test')[3].id == 'test3'
    mixed = open_samples(tmp_path, f'{NAME}*3+{NAME}/test*1')
    assert len(mixed) == 2 * N


def test_a_caption_without_its_picture_is_a_bad_row(tmp_path):
    samples = open_samples(tmp_path, f'{NAME}/blind')
    assert samples[0].images
    with pytest.raises(BadRecord, match='row 1: no picture'):
        samples[1]


def test_ranks_share_the_rows_and_go_on_by_draw_number(tmp_path):
    samples = open_samples(tmp_path, NAME)

    def drawn(rank=0, ranks=1, start=0, rows=samples):
        sampler = StatefulSampler(N, seed=3, epochs=2, rank=rank, ranks=ranks)
        sampler.position = start
        return [rows[i].id for i in sampler]

    alone = drawn()
    assert sorted(alone[:N]) == [f'train{i}' for i in range(N)]
    assert [one for pair in zip(drawn(0, 2), drawn(1, 2)) for one in pair] == alone
    copied = pickle.loads(pickle.dumps(samples))  # as worker processes get it
    assert drawn(start=5, rows=copied) == alone[5:]


def test_what_cannot_be_loaded_is_said(tmp_path):
    for name, reason in {
        'hub:nobody/nothing': "reach 'nobody/nothing'",
        f'{NAME}/validation': "Unknown split .*'train'",
        f'{NAME}/other/train': 'other',
        'hub:name': 'write hub:ORG/NAME',
    }.items():
        with pytest.raises(ValueError, match=reason):
            open_samples(tmp_path, name)
    with pytest.raises(DataError, match='only a run that trains reads rows by the name'):
        prepare_data(NAME)


@pytest.mark.slow
def test_a_run_trains_on_it(cache, tmp_path):
    words = ['recipe=llava', 'evaluate=false', 'out=run', 'budget=0.001', 'unknown_words=1']
    words += [f'overrides=["stages.{stage}.data={NAME}"]' for stage in ('align',)]
    environment = os.environ | dict(HF_DATASETS_CACHE=str(cache))
    done = vlmbench('run', 'train', *words, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    stage = json.loads((tmp_path / 'run' / 'recipe.json').read_text())['stages'][0]
    assert stage['data'] == NAME
    metrics = (tmp_path / 'run' / 'stages' / 'align' / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(metrics[-1])['step'] >= 1


def test_the_commit_of_a_data_set_is_read_in_the_cache(cache):
    from vlmbench.run.revisions import data_revision, revisions

    (version,) = (cache / 'Hon-Wong___vo_ra-recap-8_m' / 'default').iterdir()
    (prepared,) = [path for path in version.iterdir() if path.is_dir()]
    assert data_revision(NAME) is None  # the test's copy was made from files, not from a commit
    commit = '12ab' * 10
    prepared.rename(prepared.with_name(commit))
    try:
        assert data_revision(f'stream:{NAME}') == commit
        assert revisions(data=[f'{NAME}*3+talk'])['data'] == {NAME: commit}
    finally:
        prepared.with_name(commit).rename(prepared)
