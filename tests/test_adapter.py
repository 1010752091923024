"""A LoRA run written as LLaVA's LoRA releases: trained by the command, on one and on two ranks, and
read back logit for logit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from warm_kernels import vlmbench

from vlmbench.checkpoints.adapter import export_adapter
from vlmbench.checkpoints.load import LoadError, load_vlm
from vlmbench.demo.serve import world_picture
from vlmbench.methods.recipes import get_recipe
from vlmbench.train.scale import get_scale


def run_folder(tmp_path, *options, stages=('region', 'chat')):
    "The folder that a run of ViP-LLaVA would have left, but for its weights."
    recipe = get_recipe('vip_llava', get_scale('tiny'), variant=options)
    for stage in recipe.stages:
        if stage.name in stages:
            (tmp_path / 'run' / 'stages' / stage.name).mkdir(parents=True)
    (tmp_path / 'run' / 'recipe.json').write_text(json.dumps(recipe.to_dict()))
    return tmp_path / 'run'


def test_a_run_without_an_adapter_is_refused_before_anything_loads(tmp_path):
    full = run_folder(tmp_path / 'full')
    with pytest.raises(LoadError, match='stage region trained the decoder .full.*whole model'):
        export_adapter(full, tmp_path / 'out')
    frozen = run_folder(tmp_path / 'frozen', stages=['align'])
    with pytest.raises(LoadError, match='no stage trained the decoder by LoRA'):
        export_adapter(frozen, tmp_path / 'out')
    old = run_folder(tmp_path / 'old', 'llm=lora')
    with pytest.raises(LoadError, match='stage region has left no layers_lora/'):
        export_adapter(old, tmp_path / 'out')
    with pytest.raises(LoadError, match='--adapter needs the folder of a training run'):
        export_adapter(tmp_path, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def logits(folder):
    "What the model in `folder` makes of a picture and a question."
    model, processor = load_vlm(folder)
    asked = [{'type': 'image'}, {'type': 'text', 'text': 'what is this ?'}]
    text = processor.apply_chat_template(
        [dict(role='user', content=asked)], tokenize=False, add_generation_prompt=True
    )
    batch = processor(images=[world_picture()], text=text, return_tensors='pt')
    with torch.no_grad():
        return model.eval()(**batch).logits


def command(cwd, *arguments):
    "What the command prints, started in the folder `cwd`."
    done = vlmbench(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('layout', [['gpus=1'], ['gpus=2', 'parallel=fsdp']], ids=['one', 'fsdp'])
def test_two_stages_of_lora_are_one_adapter_that_reads_back(tmp_path, layout):
    settings = ['recipe=vip_llava', 'variant=["llm=lora"]', 'budget=0.01', 'evaluate=false']
    settings += ['device=cpu', *layout]
    command(tmp_path, 'run', 'train', *settings, 'out=run')
    command(tmp_path, 'export', 'run', 'alone', '--adapter')
    alone = tmp_path / 'alone'
    factors = load_file(alone / 'adapter_model.safetensors')
    ranks = {len(t) for name, t in factors.items() if name.endswith('lora_A.weight')}
    assert ranks == {32}  # 16 of the stage region, 16 of the stage chat
    beside = torch.load(alone / 'non_lora_trainables.bin', weights_only=True)
    assert {name.split('.')[3] for name in beside} == {'mm_projector'}
    assert not any(t.abs().max() == 0 for n, t in factors.items() if n.endswith('lora_B.weight'))
    assert (alone / 'adapter_model.safetensors').stat().st_mode & 0o044 == 0o044
    torch.testing.assert_close(logits(alone), logits(tmp_path / 'run'), rtol=1e-5, atol=2e-5)
    size = sum(file.stat().st_size for file in alone.iterdir())
    assert size < (tmp_path / 'run' / 'model' / 'model.safetensors').stat().st_size / 2
    figure = world_picture().save(tmp_path / 'a.png') or 'a.png'
    said = command(tmp_path, 'chat', 'alone', '--image', figure, '--question', 'what is this ?')
    assert said.strip()
