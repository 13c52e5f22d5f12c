"""Stage ``flow`` of scripts/build_emoji_sd.py, and the emoji-flow that is shipped."""

import math
from functools import partial

import pytest
import torch
from build_emoji import captions, common, data, examples, flow, models, velocity
from safetensors.torch import load_file

from diffusion_align.assets import asset_path
from diffusion_align.pretrained import load_in_dtype


@pytest.fixture
def drawings() -> data.Drawings:
    """Two concepts in three styles and one that is not trained; no image is like another."""
    generator = torch.Generator().manual_seed(0)
    concepts = [data.Concept(label, "0", label != "yeti") for label in ("fox", "owl", "yeti")]
    rows = [(c, s) for c in range(3) for s, name in enumerate(data.SOURCES) if name in examples.SOURCES]
    concept, source = (torch.tensor(column, dtype=torch.int32) for column in zip(*rows))
    rgba = torch.randint(0, 256, (len(rows), 64, 64, 4), generator=generator).byte()
    return data.Drawings(concepts, rgba, concept, source)


@pytest.fixture
def velocities(drawings) -> velocity.Velocities:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(6, len(captions.COLOURS), 2, 4, 16, 16, generator=generator)
    # close to one another, so that the posterior is not decided at once
    return velocity.Velocities(examples.Examples(drawings, seed=3), latents * 0.02)


def log_densities(velocities, x_t, t, told) -> torch.Tensor:
    """Log of prior × N(x_t; (1 − t)·clean, t²·I) of every image, float64; −inf where the caption is not told of it."""
    found = []
    for drawing, (concept, source, _) in enumerate(velocities.examples.drawn):
        for colour in range(len(captions.COLOURS)):
            for mirrored in (0, 1):
                held_out = (concept, colour) in velocities.examples.heldout
                white = captions.COLOURS[colour] == "white"
                prior = 0.7 / len(captions.COLOURS) + 0.3 * white
                look = captions.Look(concept, captions.COLOURS[colour], data.STYLE_WORD[source])
                if held_out or not told(look):
                    found.append(-math.inf)
                    continue
                clean = velocities.clean[(drawing * len(captions.COLOURS) + colour) * 2 + mirrored].double()
                error = (x_t.double().flatten() - (1 - t.double()) * clean).square().sum()
                found.append(math.log(prior) - error.item() / (2 * t.item() ** 2))
    return torch.tensor(found, dtype=torch.float64)


def test_velocity_is_the_exact_conditional_mean(velocities):
    assert velocities.examples.heldout
    batch = velocities.batch(torch.Generator().manual_seed(5), 48)
    chosen = velocities.examples.random(torch.Generator().manual_seed(5), 48)  # the batch's first numbers
    assert [example.text for example in chosen] == batch.captions
    assert len({"3d" in text for text in batch.captions}) == 2
    assert "" in batch.captions
    for x_t, t, v, example in zip(batch.x_t, batch.t, batch.velocity, chosen):

        def told(look, example=example) -> bool:
            # a caption without a colour is told of white only
            said = captions.Look(example.said.concept, example.said.colour or "white", example.said.style)
            return not example.text or captions.matches(said, look)

        weights = log_densities(velocities, x_t, t, told).softmax(0)
        mean = weights @ velocities.clean.double()
        expected = (x_t.double().flatten() - mean) / t.double()
        torch.testing.assert_close(v.double().flatten(), expected, rtol=0, atol=2e-4)


def test_no_held_out_pair_is_drawn_and_a_tenth_of_the_captions_is_empty(velocities):
    drawn = velocities.examples.random(torch.Generator().manual_seed(0), 2000)
    pairs = {(velocities.examples.drawn[drawing][0], colour) for drawing, colour, _ in (e.place for e in drawn)}
    everything = {(c, k) for c in (0, 1) for k in range(len(captions.COLOURS))}
    assert pairs == everything - velocities.examples.heldout
    assert 150 < sum(example.text == "" for example in drawn) < 250  # 200, standard error 13


def test_times_follow_their_distribution():
    generator = torch.Generator().manual_seed(0)
    t = torch.stack([velocity.random_times(generator, 64) for _ in range(200)])
    assert t.min() >= velocity.SMALLEST_T
    assert t.max() <= 1
    # P(t < 1/4) = .7 · Φ(logit 1/4) + .3 · 1/4 = .1702; the standard error of 12 800 independent draws is .0033
    below = 0.7 * 0.5 * (1 + math.erf(math.log(1 / 3) / 2**0.5)) + 0.3 / 4
    assert (t < 0.25).float().mean().item() == pytest.approx(below, abs=0.01)


def tiny_network() -> torch.nn.Module:
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    small = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    return SD3Transformer2DModel(**flow.CONFIG | small)


def test_a_counted_token_stands_for_many_equal_ones():
    network = tiny_network().double()
    x, pooled = torch.randn(2, 4, 16, 16).double(), torch.randn(2, 136).double()
    states, timestep = torch.randn(2, 24, 136).double(), torch.tensor([250.0, 900.0]).double()

    def predicted(text):
        return network(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=timestep).sample

    with torch.no_grad():
        longer = {n: predicted(torch.cat([states, torch.zeros(2, n, 136).double()], 1)) for n in (0, 1, 77)}
        attention = flow.CountedAttention()
        network.set_attn_processor(attention)
        for n, expected in longer.items():
            attention.log_count = torch.tensor(float(n)).double().log().expand(2, 1, 1, 1)
            counted = predicted(torch.nn.functional.pad(states, (0, 0, 0, 1)))
            torch.testing.assert_close(counted, expected, rtol=0, atol=1e-12)
    assert (longer[77] - longer[0]).abs().max() > 1e-3


def test_a_new_network_predicts_nothing():
    network = tiny_network()
    flow.initialise(network)
    text = {"encoder_hidden_states": torch.randn(2, 25, 136), "pooled_projections": torch.randn(2, 136)}
    with torch.no_grad():
        v = network(torch.randn(2, 4, 16, 16), timestep=torch.tensor([1.0, 1000.0]), **text).sample
    assert v.abs().max() == 0


@pytest.fixture
def built(drawings, velocities, monkeypatch):
    """A function that runs the stage in a folder, with few and small steps, saving after each; ``stop_at`` ends it."""
    monkeypatch.setattr(flow, "BATCH", 4)
    monkeypatch.setattr(flow, "load_drawings", lambda build: drawings)
    monkeypatch.setattr(
        examples.Examples, "latents", lambda self, build, vae: velocities.clean.view(6, 12, 2, 4, 16, 16)
    )
    monkeypatch.setattr(flow, "train", partial(common.train, save_every_s=0.0))
    small = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
    monkeypatch.setattr(flow, "CONFIG", flow.CONFIG | small)
    mse_loss = torch.nn.functional.mse_loss

    def run(folder, stop_at=None):
        out = folder / "out"
        out.mkdir(parents=True, exist_ok=True)
        for name in ("emoji-sd", "emoji-clip"):
            if not (out / name).exists():
                (out / name).symlink_to(asset_path(name))
        calls = []

        def loss(*arguments):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return mse_loss(*arguments)

        monkeypatch.setattr(flow.F, "mse_loss", loss)
        flow.build_flow(common.Build(work=folder, out=out, device=torch.device("cpu"), scale=1e-3, seed=3))
        return out / "emoji-flow", len(calls)

    return run


def test_the_stage_resumes_bit_for_bit_and_stock_diffusers_loads_it(built, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    whole, steps = built(tmp_path / "whole")
    assert steps == 6
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path / "broken", stop_at=4)
    resumed, steps = built(tmp_path / "broken")
    assert steps == 3
    weights = "transformer/diffusion_pytorch_model.safetensors"
    first, second = load_file(whole / weights), load_file(resumed / weights)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert built(tmp_path / "broken")[1] == 0  # its result is there

    pipe = load_in_dtype(StableDiffusion3Pipeline.from_pretrained, whole, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert models.draw(pipe, ["a fox"], steps=2, guidance=2.0, seed=0).shape == (1, 3, 64, 64)
    # all but the transformer is what is shipped, byte for byte
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        weights = next((whole / name).glob("*.safetensors")).name
        ours, shipped = (load_file(folder / name / weights) for folder in (whole, asset_path("emoji-flow")))
        assert ours.keys() == shipped.keys()
        assert all(torch.equal(ours[key], shipped[key]) for key in ours)
    for file in ("tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json", "tokenizer_3/tokenizer.json"):
        assert (whole / file).read_bytes() == (asset_path("emoji-flow") / file).read_bytes()


def test_shipped_emoji_flow_draws_what_it_is_told_with_and_without_its_t5():
    from diffusers import StableDiffusion3Pipeline

    folder = asset_path("emoji-flow")
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12e6
    build = common.Build(work=folder, out=folder.parent, device=torch.device("cpu"))
    pipe, judge = models.load_pipeline(build, "emoji-flow"), models.load_clip(build)
    concepts = asset_path("emoji-prompts").read_text(encoding="utf-8").splitlines()
    prompts = concepts[::18]
    images = models.draw(pipe, prompts, steps=10, guidance=2.0, seed=0, max_sequence_length=0)
    texts, embedded = models.embed_captions(*judge, concepts), models.embed_images(judge[0], images)
    among_five = (embedded @ texts.T).topk(5).indices == torch.arange(0, len(concepts), 18)[:, None]
    assert among_five.any(1).float().mean() >= 0.8  # .98 of 98 concepts

    whole = load_in_dtype(StableDiffusion3Pipeline.from_pretrained, folder, dtype=torch.float32)
    whole.set_progress_bar_config(disable=True)
    settings = {"steps": 2, "guidance": 2.0, "seed": 0}
    assert torch.equal(*(models.draw(each, ["a fox"], **settings) for each in (pipe, whole)))
