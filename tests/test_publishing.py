"""What a saved model says of where it comes from holds for others too: no path of the machine that
saved it is in any of its files."""

import json

import pytest
import torch
from test_missing_weights import FRONTS, built, quiet  # noqa: F401
from transformers import AutoModelForImageTextToText

from vlmbench.checkpoints.load import convert, find_model, load_vlm
from vlmbench.checkpoints.original import export_text
from vlmbench.demo.batches import Batcher, answer_pieces, question_for
from vlmbench.demo.chat import Chat, ChatError, ChatModel
from vlmbench.data.record import Turn
from vlmbench.data.scene import world_tokenizer
from vlmbench.models.vlm import build_vlm


def written(folder, where):
    "The text files of `folder` that hold the path `where`."
    found = [file for file in folder.rglob('*') if file.suffix in ('.json', '.md', '.jinja', '.py')]
    assert found
    return [file.name for file in found if str(where) in file.read_text(encoding='utf8')]


def bases(folder):
    "A language model and a tower, as folders of their own."
    model, processor = built('llava')
    base = export_text(saved(folder / 'first', (model, processor)), folder / 'llm')
    model.model.vision.tower.save_pretrained(folder / 'vit')
    return base, folder / 'vit'


def saved(folder, parts):
    for part in parts:
        part.save_pretrained(folder)
    return folder


def test_a_saved_model_names_no_place(tmp_path):
    llm, vit = bases(tmp_path)
    both = build_vlm(llm, vit, FRONTS['llava'], None, 'world', 'pad')
    own = saved(tmp_path / 'own', both)
    assert both[0].config.text_config._name_or_path == str(llm)  # so there is something to leave
    again = saved(tmp_path / 'again', load_vlm(own))
    plain = AutoModelForImageTextToText.from_pretrained(own)
    plain.save_pretrained(tmp_path / 'plain')
    places = [llm, own, again, tmp_path / 'plain']
    places += [convert(own, tmp_path / 'theirs'), export_text(own, tmp_path / 'text')]
    for place in places:
        assert not written(place, tmp_path), place


def test_a_name_on_the_hub_stays(tmp_path, hub):
    llm, vit = bases(tmp_path)
    named = hub(llm, 'lmsys/vicuna-7b-v1.5')
    model, processor = build_vlm(
        find_model(named), vit, FRONTS['llava'], world_tokenizer(), 'world', 'pad'
    )
    own = saved(tmp_path / 'own', (model, processor))
    config = json.loads((own / 'config.json').read_text())
    assert config['text_config']['_name_or_path'] == named and not written(own, tmp_path)
    loaded, _ = load_vlm(hub(own, 'me/mine'))
    assert loaded.name_or_path == 'me/mine'  # what peft writes into an adapter


def overflowing():
    "A model whose weights are numbers, and whose logits are none in half precision."
    model, processor = built('llava')
    with torch.no_grad():
        for weight in model.model.language_model.layers[0].mlp.parameters():
            weight.mul_(3e4)
    return ChatModel(model.to(torch.float16), processor, name='mine')


def test_logits_that_are_no_numbers_are_no_answer():
    chat = overflowing()
    with pytest.raises(ChatError, match="mine failed: the logits .* in float16 are NaN.*'x y'"):
        list(Chat(chat).ask('x y'))
    batcher = Batcher(chat)
    try:
        question = question_for(chat, [Turn('user', 'x y')], [])
        with pytest.raises(ChatError, match='mine failed: the logits .*dtype=float32'):
            list(answer_pieces(batcher, question))
    finally:
        batcher.close()
