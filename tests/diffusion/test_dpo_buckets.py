"""Diffusion-DPO on pairs of several sizes: an epoch's loss and gradient are the sums over runs of one size each."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.data.image_pairs import PairsConfig, open_pairs
from diffusion_align.data.prompts import items_of_epoch
from diffusion_align.diffusion.dpo import DiffusionDPOConfig, DiffusionDPOTrainer, PairBatch
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.errors import ConfigError
from diffusion_align.training.reading import parse_config
from tests.helpers import exact_terms
from tests.helpers.noise_pairs import write_noise_pairs
from tests.helpers.problems import problem

F64 = torch.float64
PROMPTS = ["red apple", "a cat", "blue car"]
SIZES = [(16, 16), (10, 31), (56, 17), (41, 40), (9, 40), (30, 90), (16, 16), (24, 8)]
BUCKETS = [(16, 16), (8, 24), (24, 8), (16, 16), (8, 32), (8, 24), (16, 16), (24, 8)]  # of 16 x 16, in steps of 8
CORNERS = [(0, 0), (0, 0), (1, 0), (0, 0), (0, 2), (0, 0), (0, 0), (0, 0)]
LATENTS = {(16, 16): (4, 8, 8), (8, 24): (4, 4, 12), (24, 8): (4, 12, 4), (8, 32): (4, 4, 16)}
EPOCH = {"samples_per_epoch": 8, "sample_batch_size": 4, "micro_batch_size": 2, "steps_per_pair": 2, "bucket_step": 8}
CASES = {
    "original": {"beta_dpo": 2000, "weighting": "uniform"},
    "corrected": {"beta_dpo": 2000, "variant": "corrected"},
    "corrected, kept": {"beta": 0.1, "variant": "corrected", "inner_epochs": 2, "old_refresh": "epoch"},
    "a sampled target": {"beta_dpo": 500, "target": "posterior_sample", "kl_coef": 0.01, "inner_epochs": 2},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = write_noise_pairs(tmp_path_factory.mktemp("pairs"), SIZES, PROMPTS)
    return open_pairs(PairsConfig(source=str(folder))).check_images()


@pytest.fixture
def make_trainer(make_policy, pairs, tmp_path):
    """``make_trainer(policy, **settings)`` on pairs of several sizes; ``policy`` may be the name of a model."""

    def make(policy="tiny_sd", **settings):
        policy = make_policy(policy, noise=0.3) if isinstance(policy, str) else policy
        known = {"model": "emoji-sd", "output_dir": tmp_path / "run", "pairs": "emoji_style"}
        known |= {"sampler": {"steps": 2, "guidance_scale": 1.0}}
        known |= {} if "beta_dpo" in settings else {"beta": 0.1}
        config = DiffusionDPOConfig(**(known | EPOCH | settings))
        Path(config.output_dir).mkdir(exist_ok=True)
        return DiffusionDPOTrainer(config, policy, pairs=pairs)

    return make


def in_float64(trainer):
    trainer.policy.network.double()
    return exact_terms.in_float64(trainer)


def collected(trainer):
    batch, _ = trainer.collect()
    in_float64(trainer)
    return replace(batch, x_0=batch.x_0.double(), noise=batch.noise.double())


def drawn_pairs(trainer):
    """The pair of each sample of the epoch."""
    config = trainer.config
    return items_of_epoch(range(len(trainer.pairs)), config.seed, trainer.epoch, config.samples_per_epoch)


def flat_gradient(trainer):
    gradient = torch.cat([p.grad.flatten() for p in trainer.trainable.values()])
    trainer.policy.network.zero_grad()
    return gradient


def everything(batch):
    indices = torch.cartesian_prod(*(torch.arange(n) for n in batch.steps.shape))
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(5))]


def of_one_size(batch, samples, shape):
    """The batch of a run that has only ``samples``, whose latents have one ``shape``."""
    count = len(samples)

    def latents(flat):
        return torch.stack([one[..., : shape.numel()].reshape(*one.shape[:-1], *shape) for one in flat])

    return PairBatch(
        chosen=torch.arange(count),
        rejected=torch.arange(count, 2 * count),
        steps=batch.steps[samples],
        conditioning={name: value[samples] for name, value in batch.conditioning.items()},
        keep=torch.arange(count),
        x_0=latents([*batch.x_0[batch.chosen[samples]], *batch.x_0[batch.rejected[samples]]]),
        noise=latents(list(batch.noise[:, samples].transpose(0, 1))).transpose(0, 1),
    )


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_gradient_and_statistics_are_the_sums_over_runs_of_one_size(settings, model, make_trainer):
    trainer = make_trainer(model, **settings)
    mixed = collected(trainer)
    assert len(set(mixed.shapes)) == 4
    mixed, *_ = trainer.estimate(mixed)
    indices = everything(mixed)
    found = trainer.accumulate(mixed, indices, 7.0).over_processes(trainer.accelerator)
    gradient = flat_gradient(trainer)

    sums, wanted, places = {}, torch.zeros_like(gradient), drawn_pairs(trainer)
    for size, shape in LATENTS.items():
        samples = torch.tensor([i for i, pair in enumerate(places) if BUCKETS[pair] == size])
        # A trainer that knows nothing of buckets, whose model has this size.
        policy = DenoisingPolicy(trainer.policy.pipeline, lora=trainer.policy.lora, height=size[0], width=size[1])
        single = in_float64(make_trainer(policy, bucket_step=None, **settings))
        assert policy.latent_shape == shape
        batch, *_ = single.estimate(of_one_size(mixed, samples, torch.Size(shape)))
        part = single.accumulate(batch, everything(batch), 7.0).over_processes(single.accelerator)
        wanted += flat_gradient(single)
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value * len(samples) / 8
    assert wanted.norm() > 0
    assert (gradient - wanted).norm() <= 1e-9 * wanted.norm()
    for name in found.keys() - {"kl_path_stderr"}:
        assert found[name] == pytest.approx(sums[name], rel=1e-4, abs=1e-6), name  # of sums in float32


def test_the_price_of_a_nat_is_that_of_each_size(make_trainer):
    """``beta_dpo`` is for mean squared errors: the fewer numbers a latent has, the more a nat of it weighs."""
    trainer = make_trainer(beta_dpo=2000, variant="corrected")
    own, tall = (trainer.terms(LATENTS[size]) for size in ((16, 16), (24, 8)))
    assert (own.beta, own.kl_coef) == (trainer.beta, trainer.kl_coef)
    assert tall.beta == pytest.approx(trainer.beta * 256 / 192)
    assert tall.kl_coef == 2 * tall.beta
    assert make_trainer(trainer.policy, beta=0.2).terms((4, 12, 4)).beta == 0.2


def test_a_pass_holds_latents_of_one_shape_and_full_micro_batches(make_trainer, monkeypatch):
    trainer = make_trainer(inner_epochs=2, variant="corrected")
    batch, _ = trainer.collect()
    calls, predict = [], trainer.policy.predict

    def watched(x_t, *given, **settings):
        calls.append(tuple(x_t.shape))
        return predict(x_t, *given, **settings)

    monkeypatch.setattr(trainer.policy, "predict", watched)
    batch, *_ = trainer.estimate(batch)
    counts = {LATENTS[size]: 2 * BUCKETS.count(size) for size in LATENTS}  # actions
    wanted = [(2 * 2, *shape) for shape, count in counts.items() for _ in range(count // 2)]
    assert sorted(calls) == sorted(wanted * 2)  # the reference and, for r, the policy
    calls.clear()
    trainer.accumulate(batch, everything(batch), 1.0)
    assert sorted(calls) == sorted(wanted)
    seen = torch.cat([indices for _, indices in trainer.micro_batches(batch, everything(batch))])
    assert sorted(seen.tolist()) == sorted(everything(batch).tolist())


def cut_by_hand(path, size):
    with Image.open(path) as image:
        scale = max(size[0] / image.height, size[1] / image.width)
        tall, wide = round(scale * image.height), round(scale * image.width)
        whole = np.asarray(image.resize((wide, tall), Image.Resampling.LANCZOS), dtype=np.float32) / 255
    top, left = (tall - size[0]) // 2, (wide - size[1]) // 2
    return torch.from_numpy(whole[top : top + size[0], left : left + size[1]]).permute(2, 0, 1)


def test_a_latent_is_that_of_the_scaled_and_cropped_image(make_trainer, pairs):
    trainer = make_trainer()
    batch, _ = trainer.collect()
    folder = Path(pairs._table.folder)
    assert trainer.latents.sizes == BUCKETS
    names = sorted(path.name for path in trainer.latents.folder.iterdir())
    assert names == [f"0000{i}.safetensors" for i in range(4)]  # one of each size
    for sample, pair in enumerate(drawn_pairs(trainer)):
        size = BUCKETS[pair]
        assert batch.shapes[sample] == LATENTS[size]
        part = batch.of_shape(batch.shapes[sample])
        for side in ("chosen", "rejected"):
            pixels = cut_by_hand(folder / f"{side}_{pair}.png", size)
            latent = trainer.policy.encode_images(pixels[None])[0]
            found = part.x_0[getattr(part, side)[sample]]
            torch.testing.assert_close(found, latent, atol=0.02, rtol=0.02)  # PIL rounds between its passes
            torch.testing.assert_close(found, trainer.policy.encode_images(exactly(pairs, pair, size, side))[0])


def test_a_run_says_how_many_pairs_are_in_which_bucket(make_trainer):
    counts = "3 in 16 x 16, 2 in 8 x 24, 2 in 24 x 8, 1 in 8 x 32"
    assert make_trainer().data_lines() == (f"pairs in buckets of height x width: {counts}",)
    assert make_trainer(bucket_step=None).data_lines() == ()


def exactly(pairs, pair, size, side):
    return pairs.images(pair, size)[int(side == "rejected")][None]


def test_sdxl_is_told_the_size_before_and_where_it_was_cut(make_trainer, pairs):
    """As ``compute_time_ids`` of diffusers' scripts: original size, crop and target size, each height first."""
    trainer = make_trainer("tiny_sdxl", caption_dropout=0.4)
    batch, _ = trainer.collect()
    told = batch.conditioning["time_ids"]
    texts = trainer._captions([pairs.prompts[pair] for pair in drawn_pairs(trainer)])
    assert {""} < set(texts)
    for sample, pair in enumerate(drawn_pairs(trainer)):
        wanted = [*SIZES[pair], *CORNERS[pair], *BUCKETS[pair]]
        assert told[sample].tolist() == wanted
        for name in ("encoder_hidden_states", "text_embeds"):
            plain = trainer.policy.encode(texts[sample : sample + 1])[name][0]
            assert torch.equal(batch.conditioning[name][sample], plain)
    whole = make_trainer(trainer.policy, bucket_step=None).collect()[0]
    assert whole.conditioning["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 8


def test_pairs_of_one_size_are_the_run_without_buckets(make_trainer, make_policy, pairs):
    alike = open_pairs(PairsConfig(source=pairs._config.source, max_pairs=1)).check_images()
    batches = []
    for step in (8, None):
        trainer = make_trainer(make_policy("tiny_sd"), bucket_step=step)
        trainer = DiffusionDPOTrainer(trainer.config, trainer.policy, pairs=alike)
        batches.append(trainer.collect()[0])
    for name in ("x_0", "noise", "steps"):
        assert torch.equal(getattr(batches[0], name), getattr(batches[1], name))
    assert batches[0].shapes is None


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"bucket_step": 12}, "bucket_step=12 must be a multiple of 8"),
        ({"bucket_step": 64}, "bucket_step=64 is too large for buckets of about 64 x 64 pixels"),
        ({"bucket_step": 16, "resolution": 16}, "bucket_step=16 is too large for buckets of about 16 x 16 pixels"),
    ],
)
def test_steps_that_a_model_cannot_have(settings, what):
    offline = {"model": "emoji-sd", "output_dir": "run", "pairs": "emoji_style", "beta": 0.1}
    with pytest.raises(ConfigError, match=problem(what)):
        parse_config(DiffusionDPOConfig, offline | settings)


def test_images_judged_online_have_one_size():
    online = {"model": "emoji-sd", "output_dir": "run", "prompts": ["a"], "reward": "jpeg_compressibility", "beta": 1.0}
    with pytest.raises(ConfigError, match=problem("bucket_step is for given pairs", "leave it out")):
        parse_config(DiffusionDPOConfig, online | {"bucket_step": 8})


def test_other_libraries_names():
    for other in ("bucket_reso_steps", "aspect_bucket_alignment"):
        config = parse_config(
            DiffusionDPOConfig,
            {"model": "emoji-sd", "output_dir": "run", "pairs": "emoji_style", "beta": 0.1, other: 16},
        )
        assert config.bucket_step == 16
