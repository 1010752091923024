"""Block-wise distillation: what it averages, towers, sizes in one batch, packing, and what is
refused."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlmbench.distill.blockwise import BlockwiseDistillation, check_grid, pairs_of, teacher_states

SHAPE = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
TOWERS = dict(
    aimv2=lambda: Aimv2VisionModel(Aimv2VisionConfig(**SHAPE, use_head=False)),
    clip=lambda: CLIPVisionModel(CLIPVisionConfig(**SHAPE)),
    siglip=lambda: SiglipVisionModel(SiglipVisionConfig(**SHAPE, vision_use_head=False)),
)


def tower(kind):
    torch.manual_seed(0)
    return TOWERS[kind]().eval()


def batch_of(sizes, seed=0):
    torch.manual_seed(seed)
    h, w = max(s[0] for s in sizes), max(s[1] for s in sizes)
    counts = [s[0] * s[1] // 64 for s in sizes]
    ids = torch.cat(
        [torch.cat([torch.full((2,), -1), torch.full((n,), i)]) for i, n in enumerate(counts)]
    )[None]
    return dict(
        pixel_values=torch.randn(len(sizes), 3, h, w),
        image_sizes=torch.tensor(sizes),
        image_ids=ids,
    )


def states(batch, depth=4, width=20):
    return [torch.randn(*batch['image_ids'].shape, width) for _ in range(depth + 1)]


@pytest.mark.parametrize('kind', TOWERS)
@pytest.mark.parametrize('mode', ['block_wise', 'last_block'])
@pytest.mark.parametrize('pairing', ['aligned', 'reference'])
def test_the_formula(kind, mode, pairing):
    term, batch = (
        BlockwiseDistillation(tower(kind), 20, 4, mode, pairing),
        batch_of([(32, 32), (32, 32)]),
    )
    h, at = states(batch), batch['image_ids'] >= 0
    seen = tower(kind)(batch['pixel_values'], output_hidden_states=True).hidden_states
    want = 0.0
    for (s, t), head in zip(pairs_of(3, term.teacher.config.model_type, mode, pairing), term.heads):
        target = seen[t][:, -16:].flatten(0, 1)
        want += (1 - torch.cosine_similarity(head(h[s][at]), target, dim=-1)).sum()
    torch.testing.assert_close(
        term(SimpleNamespace(hidden_states=h), batch), want / len(term.heads), atol=1e-4, rtol=1e-5
    )
    assert len(term.heads) == (3 if mode == 'block_wise' else 1) and term.count(batch) == 32


@pytest.mark.parametrize('kind', TOWERS)
def test_images_of_several_sizes_are_seen_alone(kind):
    term, batch = (
        BlockwiseDistillation(tower(kind), 20, 4),
        batch_of([(16, 32), (32, 24), (16, 32)]),
    )
    whole, at = term.of_teacher(batch), 0
    for i, (h, w) in enumerate(batch['image_sizes'].tolist()):
        alone, n = (
            teacher_states(term.teacher, batch['pixel_values'][i : i + 1, :, :h, :w]),
            h * w // 64,
        )
        for k, (_, t) in enumerate(term.pairs):
            torch.testing.assert_close(whole[k][at : at + n], alone[t][0], atol=1e-5, rtol=1e-5)
        at += n
    assert at == len(whole[0])


def test_only_heads_train_and_the_teacher_stays_in_evaluation():
    term = BlockwiseDistillation(tower('clip'), 20, 4).train()
    assert {n.split('.')[0] for n, p in term.named_parameters() if p.requires_grad} == {
        'heads'
    } and not term.teacher.training
    again = BlockwiseDistillation(tower('clip'), 20, 4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(term.heads.state_dict().values(), again.heads.state_dict().values())
    )


def test_text_only_adds_nothing():
    term, ids = BlockwiseDistillation(tower('clip'), 20, 4), torch.full((1, 9), -1)
    out = term(SimpleNamespace(hidden_states=states(dict(image_ids=ids))), dict(image_ids=ids))
    assert out.item() == 0 and not out.requires_grad and term.count(dict(image_ids=ids)) == 0


def test_refused():
    with pytest.raises(ValueError, match='teacher has 3 blocks'):
        BlockwiseDistillation(tower('clip'), 20, depth=3)
    with pytest.raises(ValueError, match='pairing'):
        BlockwiseDistillation(tower('clip'), 20, 4, pairing='shifted')
    with pytest.raises(ValueError, match="teacher's patches are 8"):
        check_grid(dict(patch_size=14), tower('clip'), 28)
    term, batch = BlockwiseDistillation(tower('clip'), 20, 4), batch_of([(32, 32)])
    batch['image_ids'][0, -1] = -1
    with pytest.raises(ValueError, match='15 image tokens'):
        term(SimpleNamespace(hidden_states=states(batch)), batch)
