"""A model that points is trained on ten rows of one's own, with their regions, and answers."""

import json

import pytest

from warm_kernels import vlmbench
from vlmbench.data.world import WorldConfig, render, scene_samples


def write_rows(folder):
    "Ten rows as the tutorial about one's own regions writes them."
    (folder / 'pictures').mkdir(parents=True)
    config, rows = WorldConfig(), []
    for number in range(10):
        scene, (found, *_) = scene_samples('region', 'train', number, config)
        render(scene, config).save(folder / 'pictures' / f'{number}.png')
        question, answer = (turn.text for turn in found.turns[-2:])
        asked = question.replace('<region>', '<bbox0>')
        talk = [{'from': 'human', 'value': asked}, {'from': 'gpt', 'value': answer}]
        box = [round(side) for side in found.regions[0].bounds]
        name = f'pictures/{number}.png'
        rows.append(dict(id=f'mine-{number}', image=name, bboxes=[box], conversations=talk))
    (folder / 'own.json').write_text(json.dumps(rows))


@pytest.mark.slow
def test_a_stage_on_ones_own_regions_goes_on_from_a_model(tmp_path):
    write_rows(tmp_path / 'mine')
    first = ['recipe=vip_llava', 'budget=0.005', 'evaluate=false', 'out=first', 'device=cpu']
    done = vlmbench('run', 'train', *first, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    words = ['recipe=vip_llava', 'model=first', 'stages=["region"]', 'data=mine', 'device=cpu']
    own = ['data=own', 'lr=2e-6', 'steps=3', 'global_rows=4', 'batch_rows=4']
    words += [f'overrides={json.dumps([f"stages.region.{one}" for one in own])}']
    words += ['evaluate=false', 'out=second', 'precision=bf16']
    done = vlmbench('run', 'train', *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-1000:]
    stages = [path.name for path in (tmp_path / 'second' / 'stages').iterdir()]
    metrics = (tmp_path / 'second' / 'stages' / 'region' / 'metrics.jsonl').read_text()
    steps = [row for row in map(json.loads, metrics.splitlines()) if row['event'] == 'step']
    assert stages == ['region'] and len(steps) == 3
    asked = ['--image', 'mine/pictures/0.png', '--region', 'rectangle:10,10,40,40']
    done = vlmbench('chat', 'second', *asked, '--question', 'what is <region> ?', cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]
