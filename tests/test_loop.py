"""The training loop: loss by global target tokens, guards before the update, metrics, callbacks,
extra loss terms, precision, stages in a row."""

import json
import math
import warnings

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from train_stubs import RowLoader, a_stage, encode, packed_loader, run, tiny_vlm
from vlmbench.data.packing import collate_packed, pack
from vlmbench.data.record import Sample, Turn
from vlmbench.distill.terms import LossTerm
from vlmbench.train.checkpoint import best_state, latest, load_state
from vlmbench.train.guard import NoGradient, NonFiniteLoss
from vlmbench.train.loop import Callback, lr_factor, train
from vlmbench.train.metrics import read_metrics
from vlmbench.train.prepare import lora_modules
from vlmbench.train.recipe import Recipe, RecipeError, Stage, full, lora
from vlmbench.train.stages import BareRecipe, RunState, run_stages


class Rows:
    "The same eight packed rows in every step, `rows` per micro-batch."

    def __init__(self, rows):
        self.rows, self.i, bins = rows, 0, list(pack([encode(i) for i in range(60)], 40))[:8]
        self.batches = [collate_packed(bins[k : k + rows], 0, 40) for k in range(0, 8, rows)]

    def state_dict(self):
        return dict(i=self.i)

    def load_state_dict(self, state):
        self.i = state['i']

    def __iter__(self):
        while True:
            self.i += 1
            yield self.batches[(self.i - 1) % len(self.batches)]


def weights(out):
    return load_state(latest(out)).weights


@pytest.mark.parametrize('rows', [4, 2, 1])
def test_accumulation_equals_one_batch(tmp_path, rows):
    """1 x 8 = 2 x 4 = 4 x 2 = 8 x 1 although rows hold different numbers of targets, and some
    micro-batches no image."""
    counts = {int((b['labels'][:, 1:] != -100).sum()) for b in Rows(1).batches}
    assert len(counts) > 3
    _, a = run(
        tmp_path / 'one', dropout=0.0, stage=a_stage(steps=3, accumulation=1), loader=Rows(8)
    )
    _, b = run(
        tmp_path / 'many',
        dropout=0.0,
        stage=a_stage(steps=3, accumulation=8 // rows),
        loader=Rows(rows),
    )
    assert list(a.history.targets) == list(b.history.targets)
    assert a.history.loss.to_numpy() == pytest.approx(b.history.loss.to_numpy(), rel=1e-5)
    for (n, x), y in zip(weights(tmp_path / 'one').items(), weights(tmp_path / 'many').values()):
        assert torch.allclose(x, y, atol=2e-5), n


def test_reported_loss_is_the_mean_over_all_targets(tmp_path):
    model = tiny_vlm()
    batches, total, n = Rows(2).batches, 0.0, 0
    for b in batches:
        with torch.no_grad():
            logits = model.eval()(
                **{k: v for k, v in b.items() if isinstance(v, torch.Tensor)}
            ).logits
        keep = b['labels'][:, 1:] != -100
        total += float(
            nn.functional.cross_entropy(
                logits[:, :-1][keep], b['labels'][:, 1:][keep], reduction='sum'
            )
        )
        n += int(keep.sum())
    _, result = run(tmp_path, dropout=0.0, stage=a_stage(steps=1, accumulation=4), loader=Rows(2))
    assert (
        result.history.loss[0] == pytest.approx(total / n, rel=1e-5)
        and result.history.targets[0] == n
    )


class FeatureNorm(nn.Module, LossTerm):
    """A stand-in for distillation: squared error of a trained head on the image features, one
    element per image token."""

    forward_kwargs = {}

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Linear(16, 4)

    def count(self, batch):
        return int((batch['image_ids'] >= 0).sum())

    def forward(self, outputs, batch):
        if outputs.image_hidden_states is None:
            return outputs.loss * 0
        return (self.head(outputs.image_hidden_states) - 1).square().mean(-1).sum()


def test_extra_term_is_normalised_globally_and_its_head_trains_and_resumes(tmp_path):
    stage = a_stage(steps=3, accumulation=1, losses=[('norm', 0.5)])
    first, term = FeatureNorm(), FeatureNorm()
    _, a = run(
        tmp_path / 'one', dropout=0.0, stage=stage, loader=Rows(8), extra_losses=dict(norm=term)
    )
    assert not torch.equal(first.head.weight, term.head.weight)
    assert a.history['loss'].to_numpy() == pytest.approx(
        (a.history['losses/target'] + 0.5 * a.history['losses/norm']).to_numpy(), rel=1e-5
    )
    four = a_stage(steps=3, accumulation=4, losses=[('norm', 0.5)])
    _, b = run(
        tmp_path / 'four',
        dropout=0.0,
        stage=four,
        loader=Rows(2),
        extra_losses=dict(norm=FeatureNorm()),
    )
    assert a.history['losses/norm'].to_numpy() == pytest.approx(
        b.history['losses/norm'].to_numpy(), rel=1e-5
    )
    assert 'losses.norm.head.weight' in weights(tmp_path / 'one')
    again = FeatureNorm()
    run(tmp_path / 'one', dropout=0.0, stage=stage, loader=Rows(8), extra_losses=dict(norm=again))
    assert torch.equal(again.head.weight, term.head.weight)


def test_terms_must_match_the_stage(tmp_path):
    with pytest.raises(
        RecipeError, match=r"declares losses \['norm'\] and extra_losses holds \[\]"
    ):
        run(tmp_path, stage=a_stage(losses=['norm']))


class Poisoned:
    "A loader whose batch number `at` has one pixel of the sample `name` set to NaN."

    def __init__(self, at):
        self.loader, self.at, self.name = packed_loader(prefetch=0), at, None

    def state_dict(self):
        return self.loader.state_dict()

    def load_state_dict(self, state):
        self.loader.load_state_dict(state)

    def __iter__(self):
        for i, b in enumerate(self.loader):
            if i == self.at:
                image = 1
                b['pixel_values'][image, 0, 3, 3] = float('nan')
                row = int((b['image_ids'] == image).any(1).nonzero()[0, 0])
                doc = int(b['document_ids'][row][b['image_ids'][row] == image][0])
                before = sum(len(torch.unique(d[d >= 0])) for d in b['document_ids'][:row])
                self.name = b['sample_ids'][before + doc]
            yield b


def test_non_finite_loss_names_tensor_and_sample_before_the_update(tmp_path):
    loader = Poisoned(at=5)  # step 3, second micro-batch
    with pytest.raises(NonFiniteLoss) as e:
        run(tmp_path, dropout=0.0, loader=loader, save_every=1, model=(model := tiny_vlm()))
    assert (
        e.value.step == 3
        and e.value.samples == [loader.name]
        and e.value.tensors == ['input pixel_values']
    )
    assert loader.name in str(e.value) and 'The update was not applied' in str(e.value)
    saved = weights(tmp_path)  # the state after step 2
    assert latest(tmp_path).name == 'step-00000002'
    for n, p in model.named_parameters():
        if n in saved:
            assert torch.equal(p, saved[n]) and torch.isfinite(p).all(), n
    assert json.loads((tmp_path / 'nonfinite.json').read_text())['report'][0]['samples'] == [
        loader.name
    ]


def test_non_finite_gradient_with_a_finite_loss(tmp_path):
    model = tiny_vlm()

    def explode(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda g: g * float('inf'))

    model.model.language_model.layers[1].mlp.down_proj.register_forward_hook(explode)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NonFiniteLoss, match='gradient of model.'):
        run(tmp_path, model=model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_broken_weight_is_named(tmp_path):
    model = tiny_vlm()
    with torch.no_grad():
        model.model.language_model.layers[2].mlp.up_proj.weight[0, 0] = float('inf')
    with pytest.raises(
        NonFiniteLoss, match='weight model.language_model.layers.2.mlp.up_proj.weight'
    ):
        run(tmp_path, model=model)


def test_audit_lists_silent_parameters(tmp_path):
    """With features of the last but one block the tower's last block cannot learn: it is listed,
    not hidden."""
    model = tiny_vlm()
    model.model.vision.config['select_layers'] = [-2]
    _, result = run(tmp_path, model=model, steps=1)
    assert result.audit.missing and all(
        'tower' in n and ('layers.1.' in n or 'post_layernorm' in n) for n in result.audit.missing
    )
    assert read_metrics(tmp_path, 'audit').step[0] == 1


def test_audit_waits_for_images_and_refuses_a_dead_group(tmp_path):
    dead = pytest.raises(NoGradient, match=r"'projector' never .* else trained \(embed, layers")
    with pytest.warns(UserWarning, match='had no images'), dead:
        train(
            tiny_vlm(),
            None,
            a_stage(steps=1),
            None,
            tmp_path / 'a',
            loader=packed_loader(images=False),
            device='cpu',
            progress_seconds=None,
        )
    assert load_state(latest(tmp_path / 'a')).step == 1
    model = tiny_vlm()
    layer = model.model.language_model.layers[1]
    layer.forward = lambda hidden_states, *a, _f=layer.forward, **k: _f(
        hidden_states, *a, **k
    ).detach()
    with pytest.raises(NoGradient, match="group 'projector' should train"):
        run(tmp_path / 'b', 'frozen', model=model)


@pytest.mark.fault('stage-without-gradient')
def test_a_text_only_step_leaves_a_lone_projector_alone(tmp_path):
    """Nothing that trains is reached: no gradient, no update, no decay; the run goes on to the end
    of its budget and says there that it trained nothing."""
    model = tiny_vlm()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(NoGradient, match="no step had a picture, so group 'projector' never"):
        run(
            tmp_path,
            model=model,
            stage=a_stage('frozen', 2, weight_decay=0.5),
            loader=packed_loader(images=False),
        )
    state = load_state(latest(tmp_path))
    assert state.step == 2 and state.shared['audit']['waiting'] == ['projector']
    assert list(read_metrics(tmp_path).grad_norm) == [0, 0]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_metrics_are_complete_and_plausible(tmp_path):
    _, result = run(tmp_path, steps=3, save_every=None)
    h = result.history
    for k in (
        'loss',
        'losses/target',
        'grad_norm',
        'lr/layers',
        'lr/vision',
        'tokens_per_s',
        'targets_per_s',
        'images_per_s',
        'mfu',
        'data_wait',
        'memory_mb/rss',
        'eta_s',
        'seen_targets',
    ):
        assert k in h and h[k].notna().all(), k
    assert (
        (h.data_wait.between(0, 1)).all()
        and (h.mfu > 0).all()
        and (h.mfu < 1.5).all()
        and h.eta_s.iloc[-1] == 0
    )
    assert list(h.seen_targets) == list(h.targets.cumsum()) and result.targets == h.targets.sum()
    assert h['lr/vision'].iloc[0] < h['lr/layers'].iloc[0]
    start = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
    assert (
        start['event'] == 'run'
        and 'per multiply-add' in start['flop_convention']
        and start['peak_flops'] > 0
    )


def test_every_recipe_gets_the_same_target_tokens(tmp_path):
    seen = {
        v: run(tmp_path / v, stage=a_stage(v, budget_targets=200))[1].targets
        for v in ('full', 'lora', 'frozen')
    }
    assert len(set(seen.values())) == 1 and min(seen.values()) >= 200


def test_schedule_follows_target_tokens(tmp_path):
    stage = a_stage('frozen', budget_targets=400, schedule='linear', warmup_ratio=0.2)
    h = run(tmp_path, stage=stage)[1].history
    start = (h.seen_targets - h.targets) / 400
    expected = [3e-3 * lr_factor(stage, s, e / 400) for s, e in zip(start, h.seen_targets)]
    assert h['lr/projector'].to_numpy() == pytest.approx(expected) and max(expected) <= 3e-3


def test_callbacks_do_not_change_training_and_best_is_kept(tmp_path):
    modes = []

    def score(moment):
        torch.rand(7)
        modes.append(moment.model.training)
        return dict(score=-abs(moment.step - 2))

    _, plain = run(tmp_path / 'a', steps=6, save_every=1)
    model, watched = run(
        tmp_path / 'b',
        steps=6,
        save_every=1,
        keep_last=1,
        callbacks=[Callback(score, every=1)],
        monitor='eval/score',
        best='max',
    )
    assert list(plain.history.loss) == list(watched.history.loss) and modes == [False] * 6
    assert sorted(p.name for p in (tmp_path / 'b' / 'checkpoints').iterdir()) == [
        'step-00000002',
        'step-00000006',
    ]
    assert best_state(tmp_path / 'b', 'max').name == 'step-00000002' and list(
        read_metrics(tmp_path / 'b', 'eval').score
    ) == [-1, 0, -1, -2, -3, -4]
    with pytest.raises(RecipeError, match="monitor='eval/acc', but callback 'eval' returned"):
        run(tmp_path / 'c', steps=1, callbacks=[Callback(score, every=1)], monitor='eval/acc')


def test_bf16_computes_in_bf16_over_fp32_weights(tmp_path):
    seen = set()
    model = tiny_vlm()
    model.model.language_model.layers[0].mlp.down_proj.register_forward_hook(
        lambda m, a, out: seen.add(out.dtype)
    )
    _, half = run(tmp_path / 'b', model=model, precision='bf16', steps=4)
    _, whole = run(tmp_path / 'f', dropout=0.0, steps=4)
    assert seen == {torch.bfloat16} and all(
        t.dtype == torch.float32 for t in weights(tmp_path / 'b').values()
    )
    assert half.history.loss.to_numpy() == pytest.approx(whole.history.loss.to_numpy(), rel=0.05)
    assert list(half.history.loss) != list(whole.history.loss)


def test_half_precision_storage(tmp_path):
    with pytest.raises(RecipeError, match="precision='fp32', but .* stored in half precision"):
        run(tmp_path / 'a', 'frozen', model=tiny_vlm().bfloat16())
    with pytest.warns(UserWarning, match='fp32 master weights'):
        model = tiny_vlm().bfloat16()
        train(
            model,
            None,
            a_stage('frozen', 2),
            None,
            tmp_path / 'b',
            loader=packed_loader(),
            device='cpu',
            progress_seconds=None,
            precision='bf16',
        )
    # masters last as long as the stage: what comes next meets one dtype
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_gradient_checkpointing_changes_nothing(tmp_path):
    _, a = run(tmp_path / 'a', dropout=0.0, steps=2)
    _, b = run(tmp_path / 'b', dropout=0.0, stage=a_stage(steps=2, gradient_checkpointing=True))
    assert a.history.loss.to_numpy() == pytest.approx(b.history.loss.to_numpy(), rel=1e-5)


def test_data_that_ends_early_is_announced_and_saved(tmp_path):
    from vlmbench.data.mixture import StatefulSampler
    from vlmbench.data.packing import BatchLoader

    loader = BatchLoader(range(12), encode, StatefulSampler(12, epochs=1), 48, 2, buffer=8)
    with pytest.warns(UserWarning, match='the data ended at'):
        _, result = run(tmp_path, 'frozen', stage=a_stage('frozen', 50), loader=loader)
    assert (
        not result.done and result.step < 50 and result.checkpoint.name == f'step-{result.step:08d}'
    )


def test_settings_that_cannot_work(tmp_path):
    with pytest.raises(RecipeError, match='trains nothing'):
        run(tmp_path, stage=Stage('s', {}, data='x', steps=1))
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    with pytest.raises(RecipeError, match='takes no document_ids'):
        run(
            tmp_path,
            model=llama,
            stage=Stage('s', dict(layers=full()), data='x', lr=1e-3, steps=1),
            loader=packed_loader(images=False),
            groups=dict(layers=[(n, p) for n, p in llama.named_parameters() if '.layers.' in n]),
        )

    class NoTargets(RowLoader):
        def __iter__(self):
            for b in super().__iter__():
                b['labels'].fill_(-100)
                yield b

    with pytest.raises(RecipeError, match='no sample of .* has a target token'):
        run(tmp_path / 't', loader=NoTargets(0, 1))


def test_tensorboard_and_missing_trackers(tmp_path):
    pytest.importorskip('tensorboard')
    run(tmp_path, 'frozen', steps=1, trackers=['tensorboard'])
    assert list((tmp_path / 'tensorboard').glob('events.*'))
    with pytest.raises(ValueError, match="unknown tracker 'tb'"):
        run(tmp_path / 'b', 'frozen', steps=1, trackers=['tb'])


def test_missing_tracker_package_names_the_extra(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ImportError, match=r'vlmbench\[serve\]'):
        run(tmp_path, 'frozen', steps=1, trackers=['wandb'])


def test_stages_in_a_row_merge_lora_and_skip_what_is_done(tmp_path):
    recipe = Recipe(
        'r',
        (
            Stage('align', dict(projector=full()), data='a', lr=1e-3, steps=2),
            Stage('tune', dict(layers=lora(2, 4)), data='b', lr=1e-3, steps=2),
        ),
    )

    seen = [Sample('a', [Turn('user', '<image>')], [Image.new('RGB', (4, 4))])]

    def go():
        model = tiny_vlm()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            done = run_stages(
                BareRecipe(),
                RunState(recipe, model=model, device='cpu'),
                dict(a=seen, b=seen),
                tmp_path,
                loader=packed_loader(),
                progress_seconds=None,
            )
        return model, done.stages

    one, results = go()
    assert [p.name for p in sorted((tmp_path / 'stages').iterdir())] == ['align', 'tune']
    assert not lora_modules(one)
    changed = {
        n
        for (n, p), q in zip(one.named_parameters(), tiny_vlm().parameters())
        if not torch.equal(p, q)
    }
    assert {n.split('.')[1] for n in changed} == {'vision', 'language_model'} and all(
        'projector' in n or '.layers.' in n for n in changed
    )
    two, again = go()
    assert all(
        torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters())
    ) and math.isclose(again[1].history.loss.iloc[-1], results[1].history.loss.iloc[-1])


def test_the_loop_takes_the_global_batch(tmp_path):
    "One optimizer step over as many micro-batches as make the rows."
    _, result = run(
        tmp_path,
        stage=a_stage(steps=1, batch_rows=2, global_rows=6, accumulation=1),
        loader=Rows(2),
    )
    _, want = run(
        tmp_path / 'b', stage=a_stage(steps=1, batch_rows=2, accumulation=3), loader=Rows(2)
    )
    assert result.stage.accumulation == 3 and result.targets == want.targets > 0
    odd = a_stage(steps=1, batch_rows=2, global_rows=7).over(1)  # no row more, no row less
    assert (odd.batch_rows, odd.accumulation) == (1, 7)
