"""Two-row fakes of the benchmarks' official files: their names, their columns, tiny pictures.
Questions and answers are made up."""

import base64
import csv
import io
import json

import pandas as pd
from PIL import Image

PEOPLE = ['red'] * 3 + ['dark red'] * 7  # ten people, of whom three say red


def png(colour='red'):
    data = io.BytesIO()
    Image.new('RGB', (32, 32), colour).save(data, 'PNG')
    return data.getvalue()


def struct(colour='red'):
    "A picture as parquet files of the Hub hold it."
    return dict(bytes=png(colour), path=None)


def pixels():
    "A picture in base64."
    return base64.b64encode(png()).decode()


def picture(path, colour='red'):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (32, 32), colour).save(path)


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding='utf8')


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(json.dumps(row) for row in rows), encoding='utf8')


def write_tsv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf8') as f:
        table = csv.DictWriter(f, list(rows[0]), delimiter='\t')
        table.writeheader()
        table.writerows(rows)


def write_parquet(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path, index=False)


def people(answers):
    return [dict(answer=a, answer_confidence='yes', answer_id=i) for i, a in enumerate(answers, 1)]


# --------------------------------------------------------------------------------------------------
# open questions
def vqav2(folder):
    asked = [dict(image_id=i, question=f'What is {i}?', question_id=10 * i) for i in (1, 2)]
    given = [PEOPLE, ['cat'] * 10]
    notes = [
        dict(question_id=q['question_id'], image_id=q['image_id'], answers=people(a))
        | dict(answer_type='other', question_type='what is', multiple_choice_answer=a[0])
        for q, a in zip(asked, given)
    ]
    facts = dict(info={}, task_type='Open-Ended', data_type='mscoco', license={})
    write_json(folder / 'v2_OpenEnded_mscoco_val2014_questions.json', dict(facts, questions=asked))
    write_json(folder / 'v2_mscoco_val2014_annotations.json', dict(facts, annotations=notes))
    for i in (1, 2):
        picture(folder / 'val2014' / f'COCO_val2014_{i:012d}.jpg')


def vqav2_test(folder):
    asked = [dict(image_id=i, question=f'What is {i}?', question_id=10 * i) for i in (1, 2)]
    write_json(folder / 'v2_OpenEnded_mscoco_test-dev2015_questions.json', dict(questions=asked))
    for i in (1, 2):
        picture(folder / 'test2015' / f'COCO_test2015_{i:012d}.jpg')


def gqa(folder):
    def row(image, answer, structural):
        types = dict(semantic='attr', structural=structural, detailed='x')
        more = dict(isBalanced=True, types=types, fullAnswer=f'It is {answer}.')
        return dict(question='What is it?', imageId=image, answer=answer, **more)

    rows = {'201307251': row('n1', 'the table', 'query'), '201640614': row('n2', 'yes', 'verify')}
    write_json(folder / 'testdev_balanced_questions.json', rows)
    for name in ('n1', 'n2'):
        picture(folder / 'images' / f'{name}.jpg')


def _vizwiz(folder, split, answers):
    rows = [
        dict(image=f'VizWiz_{split}_0000000{i}.jpg', question='What is this?') | more
        for i, more in enumerate(answers)
    ]
    write_json(folder / f'{split}.json', rows)
    for row in rows:
        picture(folder / split / row['image'])


def vizwiz(folder):
    nobody = dict(answers=people(['unanswerable'] * 10), answer_type='unanswerable', answerable=0)
    _vizwiz(
        folder, 'val', [dict(answers=people(PEOPLE), answer_type='other', answerable=1), nobody]
    )


def vizwiz_test(folder):
    _vizwiz(folder, 'test', [{}, {}])


def textvqa(folder):
    rows = [
        dict(question='What does it say?', image_id=f'i{k}', question_id=k, answers=['stop'] * 10)
        | dict(image_classes=['Sign'], set_name='val', image_width=32, image_height=32)
        for k in (1, 2)
    ]
    words = [dict(image_id='i1', ocr_tokens=['STOP', 'HERE']), dict(image_id='i2', ocr_tokens=[])]
    write_json(folder / 'TextVQA_0.5.1_val.json', dict(dataset_type='val', data=rows))
    write_json(folder / 'TextVQA_Rosetta_OCR_v0.2_val.json', dict(data=words))
    for k in (1, 2):
        picture(folder / 'train_images' / f'i{k}.jpg')


# --------------------------------------------------------------------------------------------------
# yes or no
def pope(folder):
    for part in ('adversarial', 'popular', 'random'):
        rows = [
            dict(question_id=i, image='COCO_val2014_000000000001.jpg', label=label)
            | dict(text='Is there a dog in the image?')
            for i, label in ((1, 'yes'), (2, 'no'))
        ]
        write_lines(folder / f'coco_pope_{part}.json', rows)
    picture(folder / 'val2014' / 'COCO_val2014_000000000001.jpg')


def mme(folder):
    "One category with pictures beside the questions, one with both in folders of their own."
    for category, pictures, questions in (
        ('color', '.', '.'),
        ('code_reasoning', 'images', 'questions_answers_YN'),
    ):
        for name in ('0001', '0002'):
            picture(folder / category / pictures / f'{name}.jpg')
            text = folder / category / questions / f'{name}.txt'
            text.parent.mkdir(parents=True, exist_ok=True)
            asked = 'Please answer yes or no.'
            text.write_text(f'Is it red? {asked}\tYes\nIs it blue? {asked}\tNo\n')


def hallusionbench(folder):
    def row(figure, question, answer, file):
        facts = dict(category='VS', subcategory='chart', set_id='0', figure_id=figure)
        more = dict(sample_note='n', gt_answer_details='d', visual_input='1' if file else '0')
        asked = dict(question_id=question, question='Is it so?', gt_answer=answer, filename=file)
        return facts | more | asked

    name = './hallusion_bench/VS/chart/0_1.png'
    rows = [row('0', '0', '1', None), row('1', '0', '0', name), row('1', '1', '1', name)]
    write_json(folder / 'HallusionBench.json', rows)
    picture(folder / 'hallusion_bench' / 'VS' / 'chart' / '0_1.png')


# --------------------------------------------------------------------------------------------------
# multiple choice
def sqa(folder):
    def row(**more):
        facts = dict(answer=1, choices=['north', 'south'], hint='', image=None, split='test')
        return facts | dict(question='Which?', subject='natural science', grade='grade2') | more

    shown = row(hint='Read the map.', image='image.png', answer=0)
    problems = {'7': shown, '8': row(), '9': row(split='train')}
    write_json(folder / 'problems.json', problems)
    write_json(folder / 'pid_splits.json', dict(train=['9'], val=[], test=['7', '8']))
    picture(folder / 'images' / 'test' / '7' / 'image.png')


def _mmbench(path, answers=True, hint='Look closely.'):
    pixels_of = pixels()
    rows = []
    for index, texts, answer in (
        (5, ('red', 'blue', '', ''), 'A'),
        (1_000_005, ('blue', 'red', '', ''), 'B'),
        (6, ('1', '2', '3', '4'), 'D'),
    ):
        row = dict(index=index, question='Which one?', hint=hint if index == 6 else 'nan')
        row |= dict(zip('ABCD', texts)) | (dict(answer=answer) if answers else {})
        image = pixels_of if index != 1_000_005 else '5'  # the copy names the row with the picture
        rows.append(row | {'category': 'color', 'image': image, 'l2-category': 'perception'})
    write_tsv(path, rows)


def mmbench(folder):
    _mmbench(folder / 'mmbench_dev_20230712.tsv')


def mmbench_test(folder):
    _mmbench(folder / 'mmbench_test_20230712.tsv', answers=False)


def mmbench_cn(folder):
    _mmbench(folder / 'mmbench_dev_cn_20231003.tsv', hint='看仔细。')


def seed(folder):
    def row(ident, kind, data_id, data_type, answer):
        texts = {f'choice_{c}': f'{c} thing' for c in 'abcd'}
        facts = dict(question_id=ident, question_type_id=kind, data_id=data_id, answer=answer)
        return facts | texts | dict(data_type=data_type, question='What is shown?')

    rows = [
        row('1', 1, '1454426_2591111986', 'image', 'A'),
        row('2', 5, '1454426_2591111987', 'image', 'B'),
        row('9', 10, '79_clip.webm', 'video', 'C'),
    ]
    types = {'Scene Understanding': 1, 'Instances Counting': 5, 'Action Recognition': 10}
    write_json(folder / 'SEED-Bench.json', dict(question_type=types, questions=rows))
    for row in rows[:2]:  # the official pictures have no ending
        place = folder / 'SEED-Bench-image' / row['data_id']
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(png())
    picture(folder / 'SEED-Bench-video-image' / '10_9.png')


def ai2d(folder):
    texts = ['2', '3', '1', '0']  # the answer is an index, and an option reads like one
    rows = [
        dict(question='How many?', options=texts, answer='1', image=struct()),
        dict(question='Which part?', options=['leaf', 'root'], answer='0', image=struct()),
    ]
    write_parquet(folder / 'data' / 'test-00000-of-00001.parquet', rows)


def ai2d_folder(folder):
    "AI2D as its archive unpacks, with the list of test pictures beside it: 12 is one, 3 is not."
    asked = {
        'What is A?': dict(abcLabel=True, answerTexts=['ear', 'leg'], correctAnswer=1),
        'How many legs?': dict(abcLabel=False, answerTexts=['4', '2', '{}', '4'], correctAnswer=0),
    }
    label = dict(rectangle=[[10, 10], [30, 25]], value='leg', replacementText='A')
    for name, questions in (('12.png', asked), ('3.png', dict(list(asked.items())[1:]))):
        rows = {q: f | dict(questionId=f'{name}-{k}') for k, (q, f) in enumerate(questions.items())}
        home = folder / 'ai2d'
        write_json(home / 'questions' / f'{name}.json', dict(imageName=name, questions=rows))
        write_json(home / 'annotations' / f'{name}.json', dict(imageName=name, text=dict(T0=label)))
        picture(home / 'images' / name)
    write_json(folder / 'ai2d' / 'categories.json', {'12.png': 'partsOfA', '3.png': 'lifeCycles'})
    (folder / 'ai2d_test_ids.csv').write_text('12\n')


def cvbench(folder):
    def row(idx, kind, task, texts, answer):
        letters = '\n'.join(f'({c}) {t}' for c, t in zip('ABCDEF', texts))
        facts = dict(idx=idx, type=kind, task=task, image=struct(), question='How many?')
        prompt = f'How many? Select from the following choices.\n{letters}'
        return facts | dict(choices=texts, answer=answer, prompt=prompt, source='COCO')

    flat = [row(0, '2D', 'Count', ['4', '3', '0'], '(B)'), row(1, '2D', 'Count', ['1', '2'], '(A)')]
    write_parquet(folder / 'test_2d.parquet', flat)
    deep = [row(2, '3D', 'Depth', ['cup', 'box'], '(A)')]
    write_parquet(folder / 'test_3d.parquet', deep)


def qbench(folder):
    rows = [
        dict(img_path=f'{i}.jpg', question='Is it blurred?', question_type=0, type=i, concern=1)
        | dict(candidates=['Yes', 'No'], correct_ans='No')
        for i in (0, 1)
    ]
    write_json(folder / 'llvisionqa_dev.json', rows)
    for row in rows:
        picture(folder / 'images' / row['img_path'])


# --------------------------------------------------------------------------------------------------
# options and words
def mmmu(folder):
    empty = {f'image_{i}': None for i in range(1, 8)}

    def row(ident, options, answer, question_type, **pictures):
        facts = dict(id=f'validation_Art_{ident}', subfield='Drawing', topic_difficulty='Easy')
        asked = dict(question='Is <image 1> like <image 2>?' if 'image_2' in pictures else 'Why?')
        more = dict(options=options, answer=answer, question_type=question_type, explanation='')
        return facts | asked | more | empty | pictures

    rows = [
        row(1, "['yes', 'no']", 'B', 'multiple-choice', image_1=struct(), image_2=struct('blue')),
        row(2, '[]', "['7.50', '15/2']", 'open', image_1=struct()),
    ]
    write_parquet(folder / 'Art' / 'validation-00000-of-00001.parquet', rows)
    write_parquet(
        folder / 'Music' / 'validation-00000-of-00001.parquet',
        [row(3, "['high', 'low']", 'A', 'multiple-choice', image_1=struct())],
    )


def cmmmu(folder):
    def row(ident, kind, answer, texts):
        facts = dict(id=ident, type=kind, answer=answer, category='艺术与设计', subfield='音乐')
        asked = dict(question='看图<img="tb_2.png">，对吗？')
        pictures = {f'image_{i}': struct() if i < 3 else None for i in range(1, 6)}
        pictures |= {f'image_{i}_filename': f'tb_{3 - i}.png' for i in (1, 2)}
        return facts | asked | pictures | {f'option{i}': t for i, t in enumerate(texts, 1)}

    rows = [
        row(1, '选择', 'B', ['<img="tb_1.png">', '蓝', '绿', '黄']),
        row(2, '判断', '对', ['-'] * 4),
        row(3, '选择', 'AC', ['红', '蓝', '绿', '黄']),
    ]
    write_parquet(folder / 'art_and_design' / 'val-00000-of-00001.parquet', rows)


def realworldqa(folder):
    letter = 'Which way?\n\nA. left\nB. right\nPlease answer directly with only the letter.'
    rows = [
        dict(image=struct(), question=letter, answer='A'),
        dict(image=struct(), question='How many cars?', answer='3'),
        dict(image=struct(), question='Is it wet?', answer='Yes'),
    ]
    write_parquet(folder / 'data' / 'test-00000-of-00001.parquet', rows)


# --------------------------------------------------------------------------------------------------
# reading
def docvqa(folder):
    rows = [
        dict(questionId=i, question='What is the date?', question_types=['handwritten', 'form'])
        | dict(image=f'documents/x{i}.png', docId=i, answers=answers, data_split='val')
        for i, answers in ((49153, ['hello world']), (49154, ['1990', '90']))
    ]
    facts = dict(dataset_name='SP-DocVQA', dataset_version='1.0', dataset_split='val')
    write_json(folder / 'val_v1.0_withQT.json', dict(facts, data=rows))
    for i in (49153, 49154):
        picture(folder / 'spdocvqa_images' / f'x{i}.png')


def docvqa_test(folder):
    rows = [
        dict(questionId=7, question='Who?', image='documents/x7.png', docId=1, data_split='test')
    ]
    write_json(folder / 'test_v1.0.json', dict(dataset_split='test', data=rows))
    picture(folder / 'documents' / 'x7.png')


def infovqa(folder):
    rows = [
        dict(questionId=i, question='How many?', image_local_name=f'{i}.jpeg', ocr_output_file='x')
        | dict(image_url='u', answers=['21'], data_split='val', answer_type=['single span'])
        for i in (1, 2)
    ]
    facts = dict(dataset_name='infographicVQA', dataset_split='val')
    write_json(folder / 'infographicsVQA_val_v1.0_withQT.json', dict(facts, data=rows))
    for i in (1, 2):
        picture(folder / 'infographicsvqa_images' / f'{i}.jpeg')


def chartqa(folder):
    for part, label in (('human', '20'), ('augmented', 'Peru')):
        rows = [dict(imgname=f'{part}.png', query='Which?', label=label)]
        write_json(folder / 'test' / f'test_{part}.json', rows)
        picture(folder / 'test' / 'png' / f'{part}.png')


def ocrvqa(folder):
    def book(split):
        asked = dict(questions=['What is the title?', 'Who wrote it?'], split=split)
        given = dict(answers=['The Art of Sailing', 'Ann Bee'], title='t', authorName='a')
        return asked | given | dict(imageURL='u', genre='g')

    write_json(folder / 'dataset.json', {'0001': book(3), '0002': book(1)})
    picture(folder / 'images' / '0001.jpg')


def tdiuc(folder):
    kinds = ['color', 'absurd', 'counting']
    asked = [dict(image_id=1, question='What?', question_id=i) for i in range(3)]
    notes = [
        dict(question_id=i, image_id=1, question_type=kind, answers=people([answer]))
        for i, (kind, answer) in enumerate(zip(kinds, ['red', 'doesnotapply', '2']))
    ]
    write_json(
        folder / 'Questions' / 'OpenEnded_mscoco_val2014_questions.json', dict(questions=asked)
    )
    write_json(folder / 'Annotations' / 'mscoco_val2014_annotations.json', dict(annotations=notes))
    picture(folder / 'Images' / 'val2014' / 'COCO_val2014_000000000001.jpg')


# --------------------------------------------------------------------------------------------------
# free answers
def mmvet(folder):
    rows = {
        f'v1_{i}': dict(imagename=f'v1_{i}.png', question='What is x?', answer=answer)
        | dict(capability=['ocr', 'math'], imagesource='web')
        for i, answer in enumerate(['-1<AND>-5', 'red<OR>dark red'])
    }
    write_json(folder / 'mm-vet.json', rows)
    for i in range(2):
        picture(folder / 'images' / f'v1_{i}.png')


def llava_wild(folder):
    kinds = ('conv', 'detail')
    asked = [dict(question_id=i, image=f'00{i}.jpg', text='What is it?') for i in (0, 1)]
    write_lines(folder / 'questions.jsonl', [a | dict(category=k) for a, k in zip(asked, kinds)])
    told = [dict(id=f'00{i}', image=f'00{i}.jpg', caption=f'picture {i}') for i in (0, 1)]
    write_lines(folder / 'context.jsonl', told)
    said = [a | dict(prompt='What is it?', text=f'A boat, {a["image"]}.') for a in asked]
    said = [a | dict(answer_id=f'a{i}', model_id='gpt-4-0314') for i, a in enumerate(said)]
    write_lines(folder / 'answers_gpt4.jsonl', said)
    for i in (0, 1):
        picture(folder / 'images' / f'00{i}.jpg')


def questions(folder):
    rows = [dict(question_id=i, image='a.jpg', text='What is it?', category='x') for i in (0, 1)]
    write_lines(folder / 'questions.jsonl', rows)
    picture(folder / 'images' / 'a.jpg')


# --------------------------------------------------------------------------------------------------
# the same questions as the Hub's copies have them
def hub_pope(folder):
    rows = [
        dict(id='0', question_id=str(q), question='Is there a dog?', answer=a, category=part)
        | dict(image=struct(), image_source='COCO_val2014_1')
        for part in ('adversarial', 'popular', 'random')
        for q, a in ((1, 'yes'), (2, 'no'))
    ]
    write_parquet(folder / 'data' / 'test-00000-of-00001.parquet', rows)


def hub_mme(folder):
    rows = [
        dict(question_id=f'{category}/{name}.png', image=struct(), category=category)
        | dict(question='Is it red? Please answer yes or no.', answer=answer)
        for category in ('code_reasoning', 'color')
        for name in ('0001', '0002')
        for answer in ('Yes', 'No')
    ]
    write_parquet(folder / 'data' / 'test-00000-of-00002.parquet', rows[:5])
    write_parquet(folder / 'data' / 'test-00001-of-00002.parquet', rows[5:])


def hub_sqa(folder):
    facts = dict(question='Which?', choices=['north', 'south'], grade='grade2', task='x')
    rows = [
        facts | dict(image=struct(), answer=0, hint='Read the map.', subject='natural science'),
        facts | dict(image=None, answer=1, hint='', subject='natural science'),
    ]
    write_parquet(folder / 'data' / 'test-00000-of-00001.parquet', rows)


def hub_seed(folder):
    def row(ident, kind, data_type, answer, frames):
        texts = {f'choice_{c}': f'{c} thing' for c in 'abcd'}
        facts = dict(question_id=ident, question_type_id=kind, data_id=f'x{ident}', answer=answer)
        asked = dict(data_type=data_type, question='What is shown?', segment=None)
        return facts | texts | asked | dict(image=[struct()] * frames)

    rows = [row('1', 1, 'image', 'A', 1), row('2', 5, 'image', 'B', 1)]
    rows.append(row('9', 10, 'video', 'C', 3))
    write_parquet(folder / 'data' / 'test-00000-of-00001.parquet', rows)


def hub_hallusionbench(folder):
    def row(figure, question, answer, picture):
        facts = dict(category='VS', subcategory='chart', set_id='0', figure_id=figure)
        asked = dict(question_id=question, question='Is it so?', gt_answer=answer)
        file = dict(filename='./hallusion_bench/VS/chart/0_1.png' if picture else None)
        return facts | asked | file | dict(visual_input='1', image=picture)

    rows = [row('1', '0', '0', struct()), row('1', '1', '1', struct())]
    write_parquet(folder / 'data' / 'image-00000-of-00001.parquet', rows)
    write_parquet(folder / 'data' / 'non_image-00000-of-00001.parquet', [row('0', '0', '1', None)])


def hub_docvqa(folder):
    rows = [
        dict(questionId=str(i), question='What is the date?', question_types=['form'], docId=i)
        | dict(image=struct(), answers=answers, data_split='val')
        for i, answers in ((49153, ['hello world']), (49154, ['1990', '90']))
    ]
    write_parquet(folder / 'DocVQA' / 'validation-00000-of-00001.parquet', rows)


def hub_textvqa(folder):
    rows = [
        dict(image_id=f'i{k}', question_id=k, question='What does it say?', image=struct())
        | dict(ocr_tokens=words, answers=['stop'] * 10)
        for k, words in ((1, ['STOP', 'HERE']), (2, []))
    ]
    write_parquet(folder / 'data' / 'validation-00000-of-00001.parquet', rows)


def hub_chartqa(folder):
    rows = [
        dict(type=part, question='Which?', answer=label, image=struct())
        for part, label in (('human', '20'), ('augmented', 'Peru'))
    ]
    write_parquet(folder / 'data' / 'test-00000-of-00001.parquet', rows)


HUB = {
    writer.__name__.removeprefix('hub_'): writer
    for writer in (
        *(hub_pope, hub_mme, hub_sqa, hub_seed, hub_hallusionbench, hub_docvqa, hub_textvqa),
        hub_chartqa,
    )
}
WRITERS = {
    writer.__name__: writer
    for writer in (
        *(vqav2, gqa, vizwiz, textvqa, pope, mme, hallusionbench, sqa, mmbench, mmbench_cn, seed),
        *(ai2d, cvbench, qbench, mmmu, cmmmu, realworldqa, docvqa, infovqa, chartqa, ocrvqa),
        *(tdiuc, mmvet, llava_wild, questions),
    )
}


def write_kind(kind, root):
    "The fake of a kind in a folder of its name below `root`; returns the folder."
    folder = root / kind
    folder.mkdir(parents=True)
    WRITERS[kind](folder)
    return folder
