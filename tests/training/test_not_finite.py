"""Numbers that are not finite stop a run where they arise, and nothing is written of them; so does training nothing."""

import copy
import json
import math

import pytest
import torch

from diffusion_align.diffusion.ddpo import DDPOTrainer
from diffusion_align.diffusion.policy import DenoisingPolicy, LoRAConfig
from diffusion_align.errors import TrainingError
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.image import ImageAlignmentPipeline
from diffusion_align.training.finite import all_finite, largest, require_finite_loss
from tests.helpers.problems import problem
from tests.helpers.tiny_runs import TINY

SETTINGS = TINY | {
    "reward": "jpeg_compressibility",
    "prompts": ["a red apple", "a cat"],
    "epochs": 5,
    "micro_batch_size": 6,
    "learning_rate": 1e-3,
    "sampler": {"steps": 3, "guidance_scale": 1.0},
}
FP16 = "set dtype=bfloat16 or dtype=float32"


@pytest.fixture
def run(run_here, tiny_sd, tmp_path):
    """``run(damage, **changes)``: the trainer of a run whose pipeline ``damage`` has changed."""

    def train(damage=lambda pipeline: None, also=None, **changes):
        settings = SETTINGS | {"model": str(tiny_sd), "output_dir": str(tmp_path / "run")} | changes
        config = check_config(settings).model_copy(update=also or {})
        pipeline = load_pipeline(str(tiny_sd), dtype=getattr(torch, config.dtype or "float32"))
        damage(pipeline)
        return run_here(config, pipeline=pipeline)

    return train


@torch.no_grad()
def wild_unet(pipeline):
    pipeline.unet.conv_in.weight *= 3e5


@torch.no_grad()
def wild_vae(pipeline):
    pipeline.vae.to(pipeline.unet.dtype)
    pipeline.vae.decoder.conv_in.weight *= 3e6


def test_what_is_finite():
    values = torch.tensor([1.0, -3.0])
    assert all_finite(values, torch.tensor([1.0, math.nan]), torch.tensor(math.inf)) == [True, False, False]
    assert largest([values, torch.tensor([[2e38]]), torch.empty(0)]).item() == pytest.approx(2e38)
    assert math.isnan(largest([values, torch.tensor([math.nan])]).item())
    assert largest([]).item() == 0


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (wild_unet, f"the UNet's latents are not finite in float16: {FP16}$"),
        (wild_vae, "the VAE's results.*upcast_vae=true$"),
    ],
)
@pytest.mark.parametrize(
    "where",
    [{}, {"grid_every": 1}, {"evaluation": {"every": 1, "pictures": 2, "diversity": "pixels"}}],
    ids=["collection", "preview", "evaluation"],
)
def test_images_that_are_not_finite_end_a_run_before_anything_is_written(run, tmp_path, damage, sentence, where):
    with pytest.raises(TrainingError, match=sentence) as error:
        run(damage, dtype="float16", **where)
    assert "\n" not in str(error.value)
    assert not getattr(error.value, "__notes__", [])
    for name in ("final", "best", "samples", "checkpoints"):
        assert not (tmp_path / "run" / name).exists(), name


@pytest.mark.parametrize(("damage", "part"), [(wild_unet, "UNet"), (wild_vae, "VAE")])
def test_drawing_says_so_too(tiny_sd, damage, part):
    pipe = ImageAlignmentPipeline.from_pretrained(str(tiny_sd), dtype=torch.float16, device="cpu")
    hooks = len(pipe.pipeline.vae.decoder._forward_hooks)
    assert pipe(["a cat"], steps=2).images
    damage(pipe.pipeline)
    with pytest.raises(TrainingError, match=f"the {part}'s .* are not finite in float16"):
        pipe(["a cat"], steps=2)
    assert len(pipe.pipeline.vae.decoder._forward_hooks) == hooks


def test_the_remedy_fits_what_overflowed(tiny_sd):
    policy = DenoisingPolicy(load_pipeline(str(tiny_sd)), lora=LoRAConfig(rank=2))
    latents = torch.zeros(2, *policy.latent_shape)
    assert policy.decode(latents).shape == (2, 3, *policy.image_size)
    latents[1, 0, 0, 0] = math.inf
    with pytest.raises(TrainingError, match="the UNet's latents are not finite"):
        policy.decode(latents)
    policy.autocast = lambda: torch.autocast("cpu", torch.float16)
    with pytest.raises(TrainingError, match="set mixed_precision=bf16 or no"):
        policy.decode(latents)
    images = torch.full((1, 3, *policy.image_size), 0.5)
    assert policy.encode_images(images).isfinite().all()
    policy.pipeline.vae.encoder.conv_in.weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="the VAE's results are not finite"):
        policy.encode_images(images)


def test_weights_that_are_not_finite_are_never_written(run, tmp_path):
    with pytest.raises(TrainingError, match=r"not finite after step 1, .*weight_decay=1e") as error:
        run(also={"weight_decay": 1e300})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "final").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_gradient_that_is_not_finite_is_not_written_either(run, tmp_path, monkeypatch):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf

    loss = DDPOTrainer.loss
    monkeypatch.setattr(DDPOTrainer, "loss", lambda self, *a: (lambda x, s: (Broken.apply(x), s))(*loss(self, *a)))
    with pytest.raises(TrainingError, match=r"not finite after step 1.*lower learning_rate"):
        run()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("metrics", "coefficients", "kind"),
    [
        ({"loss/policy": 0.1, "kl": 0.0}, {"kl_coef": 1e300}, "kl_coef=1e+300 is too large"),
        ({"loss/value": math.inf}, {"value_coef": 0.1}, "(loss/value is inf): lower learning_rate"),
        ({"loss/policy": math.nan}, {}, "(loss/policy is nan): lower learning_rate"),
    ],
)
def test_the_sentence_about_a_loss_names_its_term_and_setting(metrics, coefficients, kind):
    about = {"loss": math.nan, **metrics}
    with pytest.raises(TrainingError, match=problem("the loss became nan at step 3", kind)):
        require_finite_loss({"step": 3} | about, coefficients, mixed_precision="no")
    with pytest.raises(TrainingError, match=r"lower learning_rate or set mixed_precision=no instead of fp16$"):
        require_finite_loss({"loss": math.nan, "step": 3}, {}, mixed_precision="fp16")


def test_a_huge_price_of_kl_is_named(run):
    with pytest.raises(TrainingError, match=problem("the loss became nan at step 1", "kl_coef=1e+300")):
        run(also={"kl_coef": 1e300})


# -- epochs without training -------------------------------------------------------------------------------------------


def flat(images, prompts, metadata):
    return [1.0] * len(images)


class FlatAfter:
    """Different rewards in the first epochs, equal ones afterwards."""

    name = "flat_after"

    def __init__(self, epochs):
        self.calls, self.epochs = -1, epochs  # the first call is the check

    def __call__(self, images, prompts, metadata):
        self.calls += 1
        return [float(i) if self.calls <= self.epochs else 1.0 for i in range(len(images))]


def rows(folder):
    return [row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "time/epoch" in row]


def test_a_run_that_never_trains_fails_and_can_be_gone_on_with(run, tmp_path, capsys):
    with pytest.raises(TrainingError, match="nothing was trained in 3 epochs in a row"):
        run(reward=flat)
    said = capsys.readouterr().err
    assert [f"epoch {n}: nothing was trained, no sample was left" in said for n in (1, 2, 3, 4)] == [True] * 3 + [False]
    assert [row["untrained_epochs"] for row in rows(tmp_path / "run")] == [1, 2, 3]
    assert not (tmp_path / "run" / "final").exists()
    assert len(list((tmp_path / "run" / "checkpoints").glob("step_*"))) == 1
    trainer = run(reward=flat, resume=True)  # as many epochs again, of which it has two left
    assert trainer.epoch == 5
    assert [row["untrained_epochs"] for row in rows(tmp_path / "run")] == [1, 2, 3, 1, 2]


def test_a_run_that_stops_training_ends_with_what_it_has(run, tmp_path):
    trainer = run(reward=FlatAfter(2), epochs=8, advantages="group", group_size=2, prompts=["a cat"])
    assert trainer.epoch == 5
    assert trainer.stopped.startswith("nothing was trained in 3 epochs in a row")
    assert ["untrained_epochs" in row for row in rows(tmp_path / "run")] == [False, False, True, True, True]
    assert (tmp_path / "run" / "final").is_dir()


class Overflowing:
    """A scaler at ``scale``."""

    def __init__(self, scale):
        self.scale = scale

    def get_scale(self):
        return self.scale


@pytest.mark.parametrize(("scale", "ends"), [(2.0**10, False), (0.5, True)])
def test_skipped_steps_of_fp16_end_a_run_when_no_scale_fits(run, scale, ends):
    trainer = copy.copy(run(epochs=1))
    trainer._untrained, trainer._why_untrained = 3, "every step overflowed in fp16 and was skipped"
    trainer.optimization = copy.copy(trainer.optimization)
    trainer.optimization.accelerator = type("Fake", (), {"scaler": Overflowing(scale)})()
    assert bool(trainer._nothing_left_to_train()) == ends
