"""A resampler behind the encoder: learned queries read the patches, so a picture costs few
tokens."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from vlmbench.distill.terms import LossTerm
from vlmbench.methods.base import Method, option
from vlmbench.methods.llava import LLaVA
from vlmbench.models.vision import EncoderFrontEnd


class ResamplerFrontEnd(EncoderFrontEnd):
    defaults = EncoderFrontEnd.defaults | dict(queries=16)
    projector_parts = ('projector', 'queries', 'reader')

    def __init__(self, config, hidden_size, tower=None):
        super().__init__(config, hidden_size, tower)
        self.queries = nn.Parameter(torch.randn(self.config['queries'], hidden_size))
        self.reader = nn.MultiheadAttention(hidden_size, 4, batch_first=True)

    @classmethod
    def count(cls, config, height, width):
        return config['queries']

    def encode(self, pixels):
        patches = super().encode(pixels)  # [pictures, patches, hidden]
        queries = self.queries.expand(len(patches), -1, -1)
        return self.reader(queries, patches, patches, need_weights=False)[0]


class Diverse(LossTerm):
    def count(self, batch):
        return len(batch['pixel_values']) if 'pixel_values' in batch else 0

    def __call__(self, outputs, batch):
        if not self.count(batch):
            return outputs.loss * 0
        tokens = nn.functional.normalize(outputs.image_hidden_states, dim=-1)
        tokens = tokens.unflatten(0, (self.count(batch), -1))
        return (tokens @ tokens.mT).mean((1, 2)).sum()


@dataclass(frozen=True)
class Resampler(Method):
    "LLaVA with learned queries: few tokens a picture, kept apart by a loss of their own."

    name, settings = 'resampler', LLaVA.settings
    queries: int = option(16, 'tokens a picture')

    def recipe(self, scale):
        control, losses = LLaVA().recipe(scale), ('diverse',)
        front_end = {**control.front_end, 'type': 'resampler', 'queries': self.queries}
        stages = tuple(replace(stage, losses=losses) for stage in control.stages)
        return replace(control, name=self.name, stages=stages, front_end=front_end)

    def terms(self, state):
        state.terms['diverse'] = Diverse()
