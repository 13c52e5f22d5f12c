"""A flow model whose network is linear, so that losses and gradients have closed forms; and pairs of given latents."""

import contextlib
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn

from diffusion_align.models.families.flow_matching import set_linear_timesteps

CHANNELS = 2
TEXT = 3


class LinearFlow:
    """v = A x_t + u B x_t + C c: matrices A, B and C, u = timestep / 1000 and a text c; a token is of two latents."""

    lora, has_reference, dropout, device = None, True, None, torch.device("cpu")
    latent_shape, image_size, family = (CHANNELS, 4, 4), (8, 8), SimpleNamespace(guidance="free")

    def __init__(self, scheduler, seed=0):
        self.pipeline = SimpleNamespace(scheduler=scheduler)
        stream = torch.Generator().manual_seed(seed)
        widths = {"A": CHANNELS, "B": CHANNELS, "C": TEXT}
        draw = {name: torch.randn(2, CHANNELS, width, generator=stream) for name, width in widths.items()}
        self.network = nn.ParameterDict({name: nn.Parameter(value[0]) for name, value in draw.items()})
        self.frozen = {name: self.network[name].detach() + 0.1 * value[1] for name, value in draw.items()}
        self.is_reference, self.seen = False, []

    @property
    def trainable(self):
        return dict(self.network.items())

    @contextlib.contextmanager
    def reference(self):
        self.is_reference = True
        yield
        self.is_reference = False

    def double(self):
        self.network.double()
        self.frozen = {name: value.double() for name, value in self.frozen.items()}

    def timesteps_setter(self, latent_size=None):
        height, width = latent_size or self.latent_shape[1:]
        return partial(set_linear_timesteps, tokens=height * width // 2)

    @staticmethod
    def encode(prompts):
        return {"text": torch.tensor([[len(text) / 10, text.count("a") / 3, 1.0] for text in prompts])}

    def return_text_encoders(self):
        pass

    def prepare(self, conditioning):
        return conditioning

    def weights_cast_once(self):
        return contextlib.nullcontext()

    def weights_kept(self):
        return contextlib.nullcontext()

    def velocity(self, weights, x_t, u, text):
        """``u`` (B,)."""
        mixed = [torch.einsum("ij,bjhw->bihw", weights[name], x_t) for name in "AB"]
        return mixed[0] + u.view(-1, 1, 1, 1) * mixed[1] + (text.to(x_t) @ weights["C"].T)[:, :, None, None]

    def predict(self, x_t, timestep, conditioning, *, guidance_scale=None):
        assert guidance_scale in (None, 1)
        self.seen.append((x_t, timestep))
        weights = self.frozen if self.is_reference else self.network
        return self.velocity(weights, x_t, timestep.to(x_t.dtype) / 1000, conditioning["text"])

    def decode(self, latents):
        return latents[:, :1].repeat(1, 3, 1, 1).sigmoid()


class GivenLatents:
    """In place of a ``LatentCache``: pairs of latents of ``shapes``, and the pairs themselves."""

    def __init__(self, shapes, texts=("a cat", "moon", "a banana")):
        stream = torch.Generator().manual_seed(5)
        self.x_0 = [torch.randn(2, *shape, generator=stream) for shape in shapes]
        self.prompts = [texts[i % len(texts)] for i in range(len(shapes))]
        self.pairs, self.ties, self.skipped = self, 0, {}

    def __len__(self):
        return len(self.x_0)

    def fill(self, identity, **options):
        pass

    def read(self, indices):
        return [self.x_0[i][0] for i in indices], [self.x_0[i][1] for i in indices]

    def conditioning(self, indices, texts):
        return LinearFlow.encode(texts)
