"""A real, tiny sentencepiece model, trained where it is needed."""

import json
import random
from pathlib import Path

from sentencepiece import SentencePieceTrainer

WORDS = """what is the color of object where small red circle left answer picture describe image
detail please a chat between curious user and assistant""".split()


def write_tokenizer_model(folder):
    "`tokenizer.model` and the file that names its class in `folder`, nothing else."
    folder, draw = Path(folder), random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [' '.join(draw.choices(WORDS, k=8)) for _ in range(300)]
    SentencePieceTrainer.train(
        sentence_iterator=iter(rows),
        model_prefix=str(folder / 'tokenizer'),
        vocab_size=200,
        model_type='bpe',
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / 'tokenizer.vocab').unlink()
    special = dict(bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    named = dict(tokenizer_class='LlamaTokenizer', legacy=True, **special)
    (folder / 'tokenizer_config.json').write_text(json.dumps(named))
    return folder
