"""Published cost figures beside the planner's, without weights: zero's training time, EVE's and
VoRA's answers.

    python benchmarks/paper_cost.py [FOLDER]     prints the tables; with FOLDER also writes
    table.md and cost.png there

Zero (Llama-3.1-70B) trains adapter and translator, then the encoder, on the surrogate, then the
whole decoder on 20% of the images; its baseline trains the adapter on the full model, then the
decoder on all of them. Published are hours: 9.36 + 4.25 + 5.56 against 7.01 + 27.78, 44.9% less.
EVE publishes FLOPs of the vision part and of the language model.
"""

import sys
from pathlib import Path

from vlmbench.lab.plots import save_png
from vlmbench.cost.planner import Data, cost_figure, inference, plan, si

TEXT, IMAGES, MIX = 300, 624_610, 1_124_610  # tokens of text a sample (assumed); published rows


def rows(head, body):
    return '\n'.join(
        ['| ' + ' | '.join(map(str, r)) + ' |' for r in (head, ['---'] * len(head), *body)]
    )


def training():
    """The two ways of training the 70B model, and the saving under both readings of the baseline's
    first stage."""
    kw = dict(scale='llama-3.1-70b', data=Data(text_tokens=TEXT), ranks=4)
    ours = plan('zero', variant=['stages=("adapt","encoder","decoder")'], **kw)
    base = plan('zero', variant=['stages=("adapt","decoder")', 'ranges=()'], **kw)
    hours = dict(ours=(9.36, 4.25, 5.56), base=(7.01, 27.78))
    share = dict(ours=(1.0, 1.0, 0.2), base=(1.0, 1.0))
    body = [
        [
            name,
            r.stage,
            si(r.parameters),
            si(r.trained),
            si(r.total * s, 'FLOP'),
            si(r.peak, 'B'),
            h,
        ]
        for (name, t), k in zip((('surrogate', ours), ('full model', base)), ('ours', 'base'))
        for r, s, h in zip(t.itertuples(), share[k], hours[k])
    ]
    print(
        one := rows(
            [
                'decoder',
                'stage',
                'parameters',
                'trained',
                'FLOPs',
                'peak memory, one device',
                'published hours',
            ],
            body,
        )
    )
    mine = sum(t * s for t, s in zip(ours.total, share['ours']))
    first = {
        f'all {MIX:,} rows': base.total[0],
        f'the {IMAGES:,} rows with a picture': image_rows(),
    }
    body = [[what, f'{1 - mine / (f + base.total[1]):.1%}'] for what, f in first.items()]
    saved = 1 - sum(hours['ours']) / sum(hours['base'])
    print(
        two := rows(
            ['baseline aligns its adapter on', 'FLOPs saved'],
            [*body, ['published, hours', f'{saved:.1%}']],
        )
    )
    return [one, two], {'surrogate': ours, 'full model': base}


def image_rows():
    """FLOPs of the baseline's first stage on the rows with a picture alone: that many steps, every
    sample with one."""
    table = plan(
        'zero',
        'llama-3.1-70b',
        ['stages=("adapt",)', 'ranges=()'],
        ranks=4,
        budget=IMAGES / MIX,
        data=Data(text_tokens=TEXT, images=1.0),
    )
    return table.total[0]


def answers():
    "One picture, one token of prompt: what EVE's table counts; VoRA publishes nothing."
    published = dict(llava=('372 G', '15.2 T'), eve=('42 G', '15.2 T'), vora=('-', '-'))
    body = []
    for name, scale in (('llava', 'paper'), ('eve', 'paper'), ('vora', 'vora_paper')):
        c = inference(name, scale, prompt_tokens=1)
        body.append(
            [
                name,
                c.image_tokens,
                si(c.vision),
                published[name][0],
                si(c.prefill),
                published[name][1],
                si(c.per_token),
                si(c.cache, 'B'),
            ]
        )
    print(
        out := rows(
            [
                'recipe',
                'image tokens',
                'vision FLOPs',
                'published',
                'language model, prefill',
                'published',
                'each new token',
                'cache after the prompt',
            ],
            body,
        )
    )
    return out


if __name__ == '__main__':
    tables, plans = training()
    tables.append(answers())
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        save_png(cost_figure(plans), folder / 'cost.png', dpi=100)
        (folder / 'table.md').write_text('\n\n'.join(tables) + '\n', encoding='utf8')
