"""The encoder of the world of things: its training, its probes, and the run that makes it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, CLIPVisionModel

from vlmbench.data.things import ThingConfig
from vlmbench.run.engine import run_notebook
from vlmbench.run.manifest import Manifest
from vlmbench.train.pretrain_things import (
    EncoderPlan,
    EncoderRun,
    box_weights,
    cut_outs,
    pretrain_thing_encoder,
    thing_losses,
    train_step,
)
from vlmbench.train.thing_pictures import ThingPictures, moved, thing_batch, thing_names

EASY = ThingConfig.at('easy')
SMALL = EncoderPlan(
    hidden=64, layers=1, mlp=64, pictures=64, batch=16, teacher_pictures=16, feature=0.0
)


@pytest.fixture(scope='module')
def drawn():
    pictures = ThingPictures(EASY)
    return [pictures[i] for i in range(32)]


def test_a_picture_that_moves_takes_its_boxes_along(drawn):
    "What lies in a box is the same before and after, and no box leaves the picture."
    rng = np.random.default_rng(0)
    for picture in drawn[:8]:
        there = moved(picture, rng)
        assert there.boxes.min() >= 0 and there.boxes.max() <= 128
        for before, after in zip(picture.boxes.astype(int), there.boxes.astype(int)):
            a, b = (
                p.pixels[y0:y1, x0:x1]
                for p, (x0, y0, x1, y1) in ((picture, before), (there, after))
            )
            assert (a == b).all()


def test_box_weights_are_the_covered_area():
    "Against counting pixels, for a box off the grid."
    box = torch.tensor([[21.0, 35.0, 60.0, 81.0]])
    mask = torch.zeros(128, 128)
    mask[35:81, 21:60] = 1
    counted = mask.unfold(0, 16, 16).unfold(1, 16, 16).sum((2, 3)).flatten()
    torch.testing.assert_close(box_weights(box, 8, 128)[0], counted / counted.sum())


def test_a_cut_out_is_centred_on_its_thing(drawn):
    batch = thing_batch(drawn[:4])
    squares = cut_outs(batch, torch.zeros(len(batch.names), 2))
    for square, box, owner in zip(squares, batch.boxes, batch.owner):
        x, y = ((box[:2] + box[2:]) / 2).round().long().tolist()
        assert torch.equal(square[:, 24, 24], batch.pixels[owner, :, y, x])


def test_no_weight_of_the_tower_is_left_out(drawn):
    "Every target's gradient reaches the first layer, and every matrix is changed by a step."
    run, batch = EncoderRun(SMALL, len(thing_names(EASY))), thing_batch(drawn[:16])
    for key in ('name', 'mark', 'presence'):
        loss = thing_losses(run.vit, run.heads, None, batch)[key]
        (grad,) = torch.autograd.grad(loss, run.vit.embeddings.patch_embedding.weight)
        assert grad.abs().sum() > 0, key
    before = {n: p.detach().clone() for n, p in run.vit.encoder.named_parameters()}
    for _ in range(2):
        train_step(run, batch)
    same = [n for n, p in run.vit.encoder.named_parameters() if torch.equal(p, before[n])]
    assert not [n for n in same if n.endswith('weight')]


def test_a_folder_of_another_plan_is_refused(drawn, tmp_path):
    quiet = dict(pictures=drawn, workers=0, report_seconds=None)
    run = pretrain_thing_encoder(replace(SMALL, pictures=32), EASY, tmp_path, **quiet)
    assert run.pictures >= 32 and run.done() == 1
    with pytest.raises(ValueError, match='was trained with another lr'):
        pretrain_thing_encoder(replace(SMALL, lr=1e-4), EASY, tmp_path, **quiet)


def test_a_loss_that_is_not_finite_changes_nothing(drawn):
    run, batch = EncoderRun(SMALL, len(thing_names(EASY))), thing_batch(drawn[:4])
    batch.pixels[0, 0, 0, 0] = float('nan')
    before = run.vit.post_layernorm.weight.clone()
    with pytest.raises(FloatingPointError, match='after 0 batches'):
        train_step(run, batch)
    assert torch.equal(before, run.vit.post_layernorm.weight) and run.pictures == 0


def test_the_run_makes_the_bases_of_things(tmp_path):
    "A language model; a CLIP tower, what it saw, its probes beside a random one, and cards."
    settings = dict(
        world='things',
        difficulty='easy',
        vit_pictures=64,
        teacher_pictures=32,
        probe_pictures=24,
        workers=0,
        llm_steps=3,
        warm_steps=2,
        questions=4,
        precision='fp32',
    )
    assert run_notebook('base', settings, tmp_path / 'r', progress=False) == 0, (
        tmp_path / 'r' / 'output.log'
    ).read_text()
    found = Manifest(tmp_path / 'r').read()['results']
    assert found['seen']['pictures'] >= 64 and found['seen']['names'] > 64
    asked = {(row['question'], row['style']) for row in found['probes']}
    assert asked == {(q, s) for q in ('name', 'presence', 'marked') for s in ('seen', 'unseen')}
    by_name = [row for row in found['probes'] if row['question'] != 'presence']
    assert all(0 <= row['score'] <= 1 and 0 <= row['floor'] <= 1 for row in by_name)
    made = tmp_path / 'r' / 'base' / 'vit'
    assert CLIPVisionModel.from_pretrained(made).config.image_size == 128
    assert AutoImageProcessor.from_pretrained(made).do_center_crop is False
    assert 'Below the bar' in (made / 'README.md').read_text(encoding='utf8')
    read = AutoModelForCausalLM.from_pretrained(made.parent / 'llm')
    assert read.config.head_dim == 32 and 0 <= found['text']['all'] <= 1
    assert 'Below the bar' in (made.parent / 'llm' / 'README.md').read_text(encoding='utf8')
