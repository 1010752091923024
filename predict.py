"""ViP-LLaVA 13B behind cog, which makes an image with a web address of it (`cog.yaml`).

    cog predict -i image=@photo.jpg -i prompt='What is the object within the red rectangle?' \\
        -i region=rectangle:100,80,220,240

The environment variable VLMBENCH_MODEL names another model: whatever `vlmbench chat` takes.
"""

import os

from cog import BasePredictor, ConcatenateIterator, Input, Path

import vlmbench

MODEL = 'mucai/vip-llava-13b'


class Predictor(BasePredictor):
    "Answers about a picture and a marked place in it, word by word."

    def setup(self) -> None:
        "Load the model, once; the first start fetches 26 GB into the cache of the Hub."
        self.model = vlmbench.load(os.environ.get('VLMBENCH_MODEL', MODEL))

    def predict(
        self,
        image: Path = Input(description='Picture to ask about'),
        prompt: str = Input(description='Question; <region> in it stands for the marked place'),
        region: str = Input(
            description='Marker drawn on the picture, in pixels of it, such as '
            'rectangle:100,80,220,240 (left,top,right,bottom); empty for none',
            default='',
        ),
        top_p: float = Input(
            description='Words are drawn from the likeliest that have this probability together',
            default=1.0,
            ge=0.0,
            le=1.0,
        ),
        temperature: float = Input(
            description='0 takes the likeliest word each time; above it, words are drawn',
            default=0.2,
            ge=0.0,
        ),
        max_tokens: int = Input(description='Tokens of the answer at most', default=1024, ge=1),
    ) -> ConcatenateIterator[str]:
        "Pieces of the answer up to, and without, what ends one in the model's template."
        yield from self.model.ask(
            image,
            prompt,
            regions=[region] if region else [],
            stream=True,
            max_new_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
        )
