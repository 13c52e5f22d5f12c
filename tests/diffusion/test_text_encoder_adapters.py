"""Adapters on text encoders: what is encoded when, gradients through it, the reference, and what is saved."""

import logging

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusion_align.diffusion.policy import PROMPT, DenoisingPolicy, LoRAConfig
from diffusion_align.diffusion.rollout import concatenate, replay, rollout, transition
from diffusion_align.diffusion.schedule import build_schedule
from diffusion_align.errors import UserError
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.models.memory import named_text_encoders, text_encoders
from diffusion_align.pipelines.image import ImageAlignmentPipeline

PROMPTS = ["red apple", "a cat", "red apple"]
LORA = LoRAConfig(rank=3, alpha=6, text_encoder=True)
DORA = LORA.model_copy(update={"dora": True})
MODELS = ["tiny_sd", "tiny_sdxl"]
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "blurry"}


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


@pytest.fixture
def policy(model, make_policy):
    return make_policy(model, lora=LORA, noise=0.1, **GUIDED)


def schedule_of(policy, steps=4, eta=1.0):
    return build_schedule(policy.pipeline.scheduler, steps, eta=eta).to("cpu")


def counted(policy):
    """A list that gets the batch size of each pass of a text encoder."""
    passes = []
    for encoder in text_encoders(policy.pipeline):
        encoder.register_forward_pre_hook(lambda _, ids: passes.append(len(ids[0])))
    return passes


def inputs(policy, n=3):
    x_t = torch.randn(n, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([1, 500, 999])[:n]


def gradients(value, parameters):
    """Zeros where SDXL's first encoder has a last layer, whose output is not used."""
    return torch.autograd.grad(value, parameters, materialize_grads=True)


def of_encoders(policy):
    return {name: p for name, p in policy.trainable.items() if name.startswith("text_encoder")}


# -- adapters and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_all_attention_projections_of_all_encoders_are_adapted(lora, model, make_policy):
    policy = make_policy(model, lora=lora)
    plain = make_policy(model, lora=lora.model_copy(update={"text_encoder": False}))
    adapted = {name.partition(".lora_")[0] for name in of_encoders(policy)}
    expected = {
        f"{part}.{name}"
        for part, encoder in named_text_encoders(plain.pipeline).items()
        for name, _ in encoder.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj", "out_proj"))
    }
    assert adapted == expected
    assert {name.partition(".")[0] for name in adapted} == set(named_text_encoders(policy.pipeline))
    assert set(policy.trainable) - set(of_encoders(policy)) == set(plain.trainable)
    for encoder in text_encoders(policy.pipeline):
        trained = [p for p in encoder.parameters() if p.requires_grad]
        assert {id(p) for p in trained} <= {id(p) for p in policy.trainable.values()}
        assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for encoder in text_encoders(plain.pipeline) for p in encoder.parameters())


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_gradients_are_the_finite_differences(lora, model, make_policy):
    """Of a loss of the guided prediction, along a random direction in every encoder's adapter, in float64.

    DoRA's directions have no true gradient, as it takes the size of the weights as given (arXiv:2402.09353, 4.3).
    """
    policy = make_policy(model, lora=lora, noise=0.1, **GUIDED)
    for part in (policy.network, *text_encoders(policy.pipeline)):
        part.double()
    x_t, timestep = inputs(policy)
    x_t, conditioning = x_t.double(), policy.encode(PROMPTS)

    def loss():
        return policy.predict(x_t, timestep, conditioning).square().sum()

    names = [name for name in of_encoders(policy) if "magnitude" in name or not lora.dora]
    found = dict(zip(names, gradients(loss(), [policy.trainable[name] for name in names])))
    for part in named_text_encoders(policy.pipeline):
        own = [name for name in names if name.startswith(f"{part}.")]
        directions = {name: torch.randn_like(found[name]) for name in own}
        along, h = sum((found[name] * directions[name]).sum() for name in own), 1e-5
        sides = []
        with torch.no_grad():
            for sign in (1, -2):  # from the middle to +h, and from there to -h
                for name in own:
                    policy.trainable[name].add_(sign * h * directions[name])
                sides.append(loss())
            for name in own:
                policy.trainable[name].add_(h * directions[name])
        assert abs(along) > 1e-3
        torch.testing.assert_close((sides[0] - sides[1]) / (2 * h), along, rtol=1e-6, atol=0)


def test_the_negative_prompt_has_its_gradient(policy):
    """Of guidance's half alone."""
    x_t, timestep = inputs(policy)
    conditioning, found = policy.encode(PROMPTS), []
    for scale in (1.0, 3.0):
        loss = policy.predict(x_t, timestep, conditioning, guidance_scale=scale).sum()
        found.append(torch.cat([g.flatten() for g in gradients(loss, list(of_encoders(policy).values()))]))
    with_prompt, away = found[0], (3 * found[0] - found[1]) / 2
    assert with_prompt.norm() > 1e-3
    assert away.norm() > 1e-3


def test_checkpointing_changes_no_gradient(model, make_policy):
    found = []
    for checkpointing in (False, True):
        policy = make_policy(model, lora=LORA, noise=0.1, gradient_checkpointing=checkpointing, **GUIDED)
        x_t, timestep = inputs(policy)
        passes = []
        for encoder in text_encoders(policy.pipeline):
            layer = next(m for name, m in encoder.named_modules() if name.endswith("layers.0.mlp"))
            layer.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        loss = policy.predict(x_t, timestep, policy.encode(PROMPTS)).square().sum()
        found.append(torch.cat([g.flatten() for g in gradients(loss, list(policy.trainable.values()))]))
        assert len(passes) == (1 + checkpointing) * 3 * len(text_encoders(policy.pipeline))  # 2 prompts, 1 negative
    torch.testing.assert_close(found[0], found[1], atol=1e-6 * float(found[0].abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_frozen_weights_have_wide_adapters(dtype, model, model_path):
    pipeline = load_pipeline(model_path(model), dtype=dtype)
    policy = DenoisingPolicy(pipeline, lora=LORA, **GUIDED)
    assert {p.dtype for p in policy.trainable.values()} == {torch.float32}
    assert {p.dtype for e in text_encoders(pipeline) for p in e.parameters() if not p.requires_grad} == {dtype}
    x_t, timestep = inputs(policy)
    conditioning = policy.encode(PROMPTS)
    with policy.reference(), torch.no_grad():
        reference = policy.predict(x_t, timestep, conditioning)
    now = policy.predict(x_t, timestep, conditioning)
    assert torch.equal(now, reference)
    assert sum(g.norm() for g in gradients(now.square().sum(), list(of_encoders(policy).values()))) > 0


# -- sampling, replay, reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_the_ratio_is_one_whatever_is_replayed_together(lora, autocast, model, make_policy, streams):
    context = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16, enabled=autocast)}
    policy = make_policy(model, lora=lora, noise=0.1, **GUIDED, **context)
    schedule = schedule_of(policy)
    paths = [
        rollout(policy, schedule, policy.encode(texts), streams(3)[: len(texts)])
        for texts in (PROMPTS, ["blue car", "a cat", "tree"])
    ]
    path = concatenate(paths)
    for samples in (torch.tensor([0, 1, 2]), torch.tensor([4, 5, 3])):
        actions = torch.tensor([2, 2, 2])
        logp, _ = replay(policy, schedule, *path.at(samples, actions))
        assert torch.equal(logp, path.logp_old[samples, actions])


def test_embeddings_are_those_of_diffusers_pipeline(policy):
    encoded = policy._encoded(policy.encode(["red apple", ""]))
    negative = policy._encode_negative(policy.image_size)
    for i, text in enumerate(("red apple", "")):
        with torch.no_grad():
            if "text_embeds" in encoded:
                theirs = policy.pipeline.encode_prompt(text, negative_prompt="blurry")
            else:
                theirs = policy.pipeline.encode_prompt(text, "cpu", 1, True, negative_prompt="blurry")
        if text:  # of an empty one SDXL's pipeline makes zeros only where it is guided away from
            torch.testing.assert_close(encoded["encoder_hidden_states"][i : i + 1], theirs[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(negative["encoder_hidden_states"], theirs[1], atol=1e-5, rtol=0)
        if "text_embeds" in encoded and text:
            torch.testing.assert_close(encoded["text_embeds"][i : i + 1], theirs[2], atol=1e-5, rtol=0)
            torch.testing.assert_close(negative["text_embeds"], theirs[3], atol=1e-5, rtol=0)


def test_the_reference_is_the_model_without_adapters(model, policy, make_policy, streams):
    plain = make_policy(model, lora=None, needs_reference=False, **GUIDED)
    x_t, timestep = inputs(policy)
    with torch.no_grad():
        expected = plain.predict(x_t, timestep, plain.encode(PROMPTS))
        conditioning = policy.encode(PROMPTS)
        now = policy.predict(x_t, timestep, conditioning)
        with policy.reference():
            torch.testing.assert_close(policy.predict(x_t, timestep, conditioning), expected, atol=1e-5, rtol=0)
            sampled = rollout(policy, schedule_of(policy), conditioning, streams(3)).latents
    assert (now - expected).abs().max() > 0.01
    assert torch.equal(policy.predict(x_t, timestep, conditioning), now)
    torch.testing.assert_close(
        sampled, rollout(plain, schedule_of(plain), plain.encode(PROMPTS), streams(3)).latents, atol=1e-5, rtol=0
    )


def test_the_kl_is_exactly_zero_before_training(model, make_policy):
    policy = make_policy(model, lora=LORA, **GUIDED)
    schedule, (x_t, _) = schedule_of(policy), inputs(policy)
    steps, conditioning = torch.tensor([0, 1, 2]), policy.encode(PROMPTS)
    with torch.no_grad(), policy.reference():
        reference = transition(policy, schedule, x_t, steps, conditioning)
    assert torch.equal(transition(policy, schedule, x_t, steps, conditioning).kl(reference), torch.zeros(3))


def test_encoders_run_once_per_rollout_and_prompt_and_once_per_training_pass(policy, streams):
    passes, encoders = counted(policy), len(text_encoders(policy.pipeline))
    conditioning = policy.encode(PROMPTS)
    assert passes == []
    path = rollout(policy, schedule_of(policy), conditioning, streams(3))
    assert passes == [1] * 3 * encoders  # of two prompts and the negative one, not of every step
    passes.clear()
    replay(policy, schedule_of(policy), *path.at(torch.arange(3), torch.zeros(3, dtype=torch.int64)))
    assert passes == [1] * 3 * encoders
    passes.clear()
    for _ in range(3):
        with policy.reference(), torch.no_grad():
            rollout(policy, schedule_of(policy), conditioning, streams(3))
    assert passes == [1] * 3 * encoders  # the reference does not change


def test_nothing_that_was_encoded_outlives_a_change_of_the_weights(policy, streams):
    x_t, timestep = inputs(policy)
    conditioning = policy.encode(PROMPTS)

    def now():
        with torch.no_grad():
            path = rollout(policy, schedule_of(policy), conditioning, streams(3))
            return policy.predict(x_t, timestep, conditioning), path.latents

    before, kept = now(), {name: p.detach().clone() for name, p in of_encoders(policy).items()}
    for parameter in of_encoders(policy).values():
        parameter.data = parameter.data + 0.1  # which no version counter sees
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(before, now()))
    for name, parameter in of_encoders(policy).items():
        parameter.data = kept[name]
    assert all(torch.equal(a, b) for a, b in zip(before, now()))


def test_that_a_prompt_is_cut_off_is_logged_once(make_policy):
    policy, told = make_policy("tiny_sd", lora=LORA), []
    logger = logging.getLogger("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    logger.addHandler(handler := logging.Handler())
    handler.emit = told.append
    try:
        x_t, timestep = inputs(policy, 1)
        conditioning = policy.encode(["a very long prompt " * 40])
        for _ in range(2):
            policy.predict(x_t, timestep, conditioning)
            with policy.reference(), torch.no_grad():
                policy.predict(x_t, timestep, conditioning)
    finally:
        logger.removeHandler(handler)
    assert len(told) == 1


def test_conditioning_is_numbers_and_what_the_image_is_told(model, policy, make_policy):
    plain = make_policy(model, **GUIDED)
    sizes = [(16, 16), (16, 32), (16, 16)]
    conditioning, theirs = policy.encode(PROMPTS, sizes), plain.encode(PROMPTS, sizes)
    assert conditioning.keys() == {PROMPT, *(["time_ids"] if model == "tiny_sdxl" else [])}
    assert conditioning[PROMPT].tolist() == [0, 1, 0]
    crop = torch.tensor([[30, 20]] * 3), torch.tensor([[4, 2]] * 3)
    cropped = policy._encoded(policy.family.of_cropped(conditioning, *crop))
    theirs = plain.family.of_cropped(theirs, *crop)
    assert cropped.keys() == theirs.keys()
    assert {k: v.shape for k, v in cropped.items()} == {k: v.shape for k, v in theirs.items()}
    if model == "tiny_sdxl":
        assert torch.equal(cropped["time_ids"], theirs["time_ids"])
        assert cropped["time_ids"][1].tolist() == [30, 20, 4, 2, 16, 32]


def test_the_encoders_stay_on_the_device(model, make_policy, model_path):
    policy = DenoisingPolicy(load_pipeline(model_path(model)), lora=LORA, device="meta", offload_text_encoders=True)
    assert {p.device.type for e in text_encoders(policy.pipeline) for p in e.parameters()} == {"meta"}


# -- what is saved -----------------------------------------------------------------------------------------------------


def images_of(policy, streams):
    return policy.decode(rollout(policy, schedule_of(policy, 3, 0.0), policy.encode(PROMPTS), streams(3)).latents)


def plainly(pipeline, streams, **options):
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config({"clip_sample": False, **pipeline.scheduler.config})
    settings = {"num_inference_steps": 3, "generator": streams(3), "output_type": "pt", "guidance_scale": 3.0}
    return pipeline(PROMPTS, negative_prompt=["blurry"] * 3, **settings).images


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_plain_diffusers_reads_all_adapters(lora, model, tmp_path, make_policy, model_path, streams):
    policy = make_policy(model, lora=lora, noise=0.1, **GUIDED)
    policy.save_lora(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(model_path(model))
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    parts = {policy.family.network: policy.network, **named_text_encoders(policy.pipeline)}
    for part, network in parts.items():
        theirs = {k.replace(".default_0.", ".default."): v for k, v in getattr(pipeline, part).state_dict().items()}
        ours = network.state_dict()
        assert theirs.keys() == ours.keys()
        scale = {k: 2.0 if ".lora_B." in k else 1.0 for k in ours}  # alpha / rank is in the file's weights
        assert all(torch.equal(theirs[k], scale[k] * v) for k, v in ours.items())
    torch.testing.assert_close(images_of(policy, streams), plainly(pipeline, streams), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
def test_adapters_that_were_loaded_are_trained_further(lora, model, tmp_path, make_policy, model_path, streams):
    policy = make_policy(model, lora=lora, noise=0.1, **GUIDED)
    policy.save_lora(tmp_path / "a")
    again = ImageAlignmentPipeline.from_pretrained(model_path(model), lora=tmp_path / "a", device="cpu")
    again.save_lora(tmp_path / "b")
    first, second = (tmp_path / name / "pytorch_lora_weights.safetensors" for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    further = DenoisingPolicy(again.pipeline, lora=lora, **GUIDED)
    assert further.trainable.keys() == policy.trainable.keys()
    for name, parameter in further.trainable.items():
        torch.testing.assert_close(parameter, policy.trainable[name], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(images_of(further, streams), images_of(policy, streams), atol=1e-5, rtol=0)


def test_adapters_on_some_of_the_parts_are_refused(model, tmp_path, make_policy, model_path):
    make_policy(model, lora=LORA.model_copy(update={"text_encoder": False})).save_lora(tmp_path)
    loaded = ImageAlignmentPipeline.from_pretrained(model_path(model), lora=tmp_path, device="cpu")
    with pytest.raises(UserError, match=r"carries an adapter, but none on text_encoder.*: merge it first"):
        DenoisingPolicy(loaded.pipeline, lora=LORA)


def test_what_is_merged_samples_the_same(model, tmp_path, policy, streams):
    before = images_of(policy, streams)
    ImageAlignmentPipeline(policy.pipeline, model=model).save_pretrained(tmp_path)
    merged = DiffusionPipeline.from_pretrained(tmp_path)
    torch.testing.assert_close(plainly(merged, streams), before, atol=1e-4, rtol=0)
    assert torch.equal(images_of(policy, streams), before)
