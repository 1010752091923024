"""Two rows of every published data set, laid out as its paper unpacks it: file, picture folder and
row format are the official ones, pictures and words are those of the embedded world."""

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# name -> card, file and picture folder below the data folder
OFFICIAL = {
    'blip_laion_cc_sbu_558k': (
        'llava_pretrain_558k',
        'LLaVA-Pretrain/blip_laion_cc_sbu_558k.json',
        'LLaVA-Pretrain/images/00453',
    ),
    'llava_v1_5_mix665k': ('llava_mix665k', 'llava_v1_5_mix665k.json', 'coco/train2017'),
    'vip-llava_stage2_mix': ('vip_llava_stage2', 'vip-llava_stage2_mix.json', 'gqa/images'),
    'vip-llava_stage3_mix': ('vip_llava_stage3', 'vip-llava_stage3_mix.json', 'vg/VG_100K'),
    'bunny_695k': ('bunny_695k', 'finetune/bunny_695k.json', 'finetune/images'),
    'bunny_pretrain_laion_2m': (
        'bunny_laion_2m',
        'pretrain/bunny_pretrain_laion_2m.json',
        'pretrain/images',
    ),
    'llava-1.5-558k-captions': (
        'llava_pretrain_558k',
        'llava-1.5-558k-captions/blip_laion_cc_sbu_558k.json',
        'llava-1.5-558k-captions/train_split/00453',
    ),
    'llava-1.5-665k-instructions': (
        'llava_665k_pictures',
        'llava-1.5-665k-instructions/llava_v1_5_mix665k_shuffled.json',
        'llava-1.5-665k-instructions/train_split/coco/train2017',
    ),
    'llava_v1_5_mix665k_shuffled_full': (
        'llava_665k_shuffled_full',
        'llava-1.5-665k-instructions/llava_v1_5_mix665k_shuffled_full.json',
        'llava-1.5-665k-instructions/train_split/coco/val2017',
    ),
    'llava-1.5-665k-genqa-500k-instructions': (
        'llava_genqa_mix',
        'llava-1.5-665k-genqa-500k-instructions/llava-665k_genqa-500k_shuffled.json',
        'llava-1.5-665k-instructions/train_split/vg/VG_100K',
    ),
    'eve_instruct_mix1.8m': (
        'eve_instruct_mix1.8m',
        'EVE-Finetune/eve_instruct_mix1.8m.json',
        'EVE-Finetune/ai2d/images',
    ),
}
# where the paths in the rows of a file begin, if not at the folder of the file
ROOTS = {
    'blip_laion_cc_sbu_558k': 'LLaVA-Pretrain/images',
    'bunny_695k': 'finetune/images',
    'bunny_pretrain_laion_2m': 'pretrain/images',
    'llava-1.5-558k-captions': 'llava-1.5-558k-captions/train_split',
    'llava-1.5-665k-instructions': 'llava-1.5-665k-instructions/train_split',
    'llava_v1_5_mix665k_shuffled_full': 'llava-1.5-665k-instructions/train_split',
    'llava-1.5-665k-genqa-500k-instructions': 'llava-1.5-665k-instructions/train_split',
    'eve_instruct_mix1.8m': 'EVE-Finetune',
}
TURNS = [
    {'from': 'human', 'value': '<image>\nwhat is the color of the object ?'},
    {'from': 'gpt', 'value': 'the object is white .'},
]


def write_official(folder, *names):
    "Two rows of each of `names` in `folder`."
    folder = Path(folder)
    for name in names:
        _, file, pictures = OFFICIAL[name]
        root = folder / ROOTS.get(name, '.')
        rows = []
        for number, color in enumerate(('white', 'black')):
            path = folder / pictures / f'{name}-{number}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (40, 24), color).save(path)
            row = dict(id=f'{number}', image=str(path.relative_to(root)), conversations=TURNS)
            rows.append(row)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(rows), encoding='utf8')
    return folder


def write_vora(folder, *names):
    "Two rows of each of VoRA's sets `names`: parquet with the bytes of the pictures inside."
    for name in names:
        rows = []
        for number, color in enumerate(('white', 'black')):
            held = io.BytesIO()
            Image.new('RGB', (40, 24), color).save(held, 'PNG')
            row = dict(id=str(number), conversations=json.dumps(TURNS))
            row['frames'] = [dict(bytes=held.getvalue(), path=None)]
            if name == 'VoRA-TextQA-Mixed':
                words = [
                    dict(turn, value=turn['value'].removeprefix('<image>\n')) for turn in TURNS
                ]
                row = dict(id=str(number), conversations=json.dumps(words))
            rows.append(row)
        place = Path(folder) / name / 'data' / 'train-00000-of-00001.parquet'
        place.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), place)
    return Path(folder)
