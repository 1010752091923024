"""The trainers of TRL take one of our folders as it is: two steps each, with pictures where the
trainer has them, and what they save opens again."""

import warnings

import pytest
import torch
from PIL import Image

import vlmbench  # noqa: F401
from test_auto_classes import save
from vlmbench.checkpoints.load import load_vlm

datasets = pytest.importorskip('datasets')
trl = pytest.importorskip('trl')
pytestmark = pytest.mark.slow

COLORS = ('red', 'blue', 'green', 'white')


def said(role, text):
    return [dict(role=role, content=text)]


def rows(**columns):
    "Four rows with a picture and a question; `columns`: name -> the value of the i-th row."
    made = []
    for i, color in enumerate(COLORS):
        row = dict(
            images=[Image.new('RGB', (64, 64), color)],
            prompt=said('user', 'what color is it ?'),
        )
        made.append(row | {name: value(i) for name, value in columns.items()})
    return datasets.Dataset.from_list(made)


def options(config, out, **settings):
    return config(
        str(out),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        bf16=False,
        **settings,
    )


def sft(folder, out):
    data = rows(completion=lambda i: said('assistant', COLORS[i]))
    return trl.SFTTrainer(
        folder, args=options(trl.SFTConfig, out, max_length=None), train_dataset=data
    )


def sft_lora(folder, out):
    from peft import LoraConfig

    data = rows(completion=lambda i: said('assistant', COLORS[i]))
    return trl.SFTTrainer(
        folder,
        args=options(trl.SFTConfig, out, max_length=None),
        train_dataset=data,
        peft_config=LoraConfig(target_modules='all-linear', task_type='CAUSAL_LM'),
    )


def dpo(folder, out):
    "Without a reference model, which TRL makes by itself."
    data = rows(
        chosen=lambda i: said('assistant', COLORS[i]),
        rejected=lambda i: said('assistant', COLORS[i - 1]),
    )
    return trl.DPOTrainer(
        folder, args=options(trl.DPOConfig, out, max_length=None), train_dataset=data
    )


def kto(folder, out):
    data = rows(completion=lambda i: said('assistant', COLORS[i // 2]), label=lambda i: i % 2 == 0)
    return trl.KTOTrainer(
        folder, args=options(trl.KTOConfig, out, max_length=None), train_dataset=data
    )


def grpo(folder, out):
    def length(completions, **kwargs):
        return [float(len(str(completion))) for completion in completions]

    settings = options(trl.GRPOConfig, out, num_generations=2, max_completion_length=4)
    return trl.GRPOTrainer(folder, reward_funcs=length, args=settings, train_dataset=rows())


def gkd(folder, out):
    "The one of these trainers that knows no pictures: text, by the tokenizer."
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    model, processor = load_vlm(folder)
    teacher, _ = load_vlm(folder)
    with torch.no_grad():
        teacher.lm_head.weight.mul_(0.5)
    talk = said('user', 'what color is it ?') + said('assistant', 'red')
    return GKDTrainer(
        model,
        teacher_model=teacher,
        processing_class=processor.tokenizer,
        args=options(GKDConfig, out, max_new_tokens=4, max_length=None),
        train_dataset=datasets.Dataset.from_list([dict(messages=talk)] * 4),
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return save('llava', tmp_path_factory.mktemp('llava'))


@pytest.mark.parametrize('make', [sft, sft_lora, dpo, kto, grpo, gkd])
def test_two_steps_and_a_folder_that_opens(folder, tmp_path, make):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = make(folder, tmp_path / 'out')
        trainer.model.train()
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])]
    assert moved and all(torch.isfinite(p).all() for p in trainer.model.parameters())
    if make is not gkd:  # which has no picture to learn from
        assert any('vision' in name for name in moved)
    trainer.save_model(tmp_path / 'saved')
    if make is gkd:  # which saves the tokenizer alone
        with pytest.raises(ValueError, match='no processor_config.json'):
            load_vlm(tmp_path / 'saved')
        load_vlm(folder)[1].save_pretrained(tmp_path / 'saved')
    if make is not sft_lora:  # an adapter, which peft opens
        assert load_vlm(tmp_path / 'saved')[1].transform is not None
