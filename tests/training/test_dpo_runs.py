"""Whole runs of Diffusion-DPO: what they log and save, what survives a kill, and when they stop of their own accord."""

import json
import math
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from diffusion_align.diffusion import policy as policies
from diffusion_align.diffusion.dpo import DiffusionDPOTrainer
from diffusion_align.diffusion.policy import DenoisingPolicy
from diffusion_align.errors import TrainingError
from diffusion_align.models.image_pipelines import load_pipeline
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.training.optimization import Optimization
from tests.helpers.hard_runs import HARD_RUN, SIZED, assert_same_run, rows_of
from tests.helpers.kills import HOOK, KILL, QUICK, STEP, STOP, UPDATING, place, renaming, resumed_with
from tests.helpers.noise_pairs import write_noise_pairs
from tests.helpers.problems import assert_problem, problems

PROMPTS = ["a red apple", "a cat", "a dog", "a blue car"]
OF_DDPO = ("reward", "prompts", "history_size", "history_min_count", "model", "output_dir")
CHANGES = {"method": "diffusion_dpo", "beta": 0.5, "epochs": 4, "micro_batch_size": 3, "keep_checkpoints": 1}
SETTINGS = {name: value for name, value in HARD_RUN.items() if name not in OF_DDPO} | CHANGES
OFFLINE = {"pairs": {"source": "emoji_style", "max_pairs": 6}}
ONLINE = {"prompts": PROMPTS, "group_size": 2}
CORRECTED = {
    "variant": "corrected",
    "old_refresh": "epoch",
    "inner_epochs": 2,
    "caption_dropout": 0.3,
    "decisions_per_pair": 2,
    "target": "posterior_sample",
}
# Of the model's 16 x 16 pixels: three buckets in steps of 8.
SIZES = [(16, 16), (8, 24), (12, 36), (20, 20), (48, 16), (9, 30)]
KINDS = {
    "offline": OFFLINE | SIZED,
    "online": ONLINE | SIZED,
    "offline, corrected": OFFLINE | CORRECTED,
    "offline, buckets": CORRECTED | {"bucket_step": 8},
    "buckets of FLUX": {"bucket_step": 8, "resolution": 16, "step_draw": "logit_normal"},
}
# Two pairs per file, so that six pairs take three.
SMALL_FILES = "import diffusion_align.diffusion.latent_cache as cache\ncache._SHARD = 2\n"
CACHE = "diffusion_align.diffusion.latent_cache"
ENCODING = place(f"{CACHE}.LatentCache", "_encode", 1)
ENCODED = {"after latents are renamed": renaming("latents/", after=True)}
READING = {"while reading": place(f"{CACHE}.LatentCache", "read", 2)}
DRAWING = {"while drawing": place("diffusion_align.diffusion.policy.DenoisingPolicy", "decode", 3)}
LOOKING_BACK = {
    "between the two passes over an epoch": place(STEP, "step", 7),
    "while looking back": place("diffusion_align.diffusion.dpo.DiffusionDPOTrainer", "_with_reference_means", 2),
}
MOMENTS = {
    "offline": ENCODED | UPDATING | READING,
    "online": UPDATING | DRAWING,
    "offline, corrected": LOOKING_BACK,
    "offline, buckets": ENCODED | LOOKING_BACK,
    "buckets of FLUX": UPDATING,
}


@pytest.fixture(scope="module")
def calm(left_alone, tiny_sd, tiny_flux):
    def settings(scratch, kind):
        reward = {"reward": f"{scratch}/noisy.py:noisy"} if "online" in kind else {}
        pairs = {"pairs": str(write_noise_pairs(scratch / "pairs", SIZES, PROMPTS))} if "buckets" in kind else {}
        model = tiny_flux if "FLUX" in kind else tiny_sd
        return SETTINGS | {"model": str(model)} | KINDS[kind] | reward | pairs

    return left_alone(settings, SMALL_FILES)


@pytest.mark.parametrize("kind", KINDS)
def test_kills_change_nothing(forked, calm, tmp_path, kind):
    """One run, killed once at each of the places; whatever it had written by then is what the calm run wrote."""
    (config, left_alone), harried = calm(kind), tmp_path / "harried"
    expected = rows_of(left_alone)
    for moment, hook in MOMENTS[kind].items():
        run = forked("train", config, f"output_dir={harried}", "resume=true", prelude=SMALL_FILES + KILL + hook + HOOK)
        assert run.status == -signal.SIGKILL, (moment, run)
        written = rows_of(harried) if (harried / "metrics.jsonl").exists() else []
        assert written == expected[: len(written)], moment
    forked.finish("train", config, f"output_dir={harried}", "resume=true", prelude=SMALL_FILES + QUICK)
    assert_same_run(harried, left_alone)
    assert_same_latents(harried, left_alone)
    assert not list(harried.rglob(".*")), "a temporary file was left behind"


def assert_same_latents(folder, other):
    mine, theirs = (sorted((f / "latents").glob("*.safetensors")) for f in (folder, other))
    assert [p.name for p in mine] == [p.name for p in theirs]
    assert [p.read_bytes() for p in mine] == [p.read_bytes() for p in theirs]


def test_a_kill_while_encoding_leaves_nothing_aside(forked, calm, tmp_path):
    (config, _), folder = calm("offline"), tmp_path / "run"
    hook = SMALL_FILES + KILL + renaming("latents/", after=False) + HOOK
    assert forked("train", config, f"output_dir={folder}", prelude=hook).status == -signal.SIGKILL
    forked.finish("train", config, f"output_dir={folder}", "resume=true", prelude=SMALL_FILES + QUICK)
    assert [p.suffix for p in (folder / "latents").iterdir()] == [".safetensors"] * 3


@pytest.mark.parametrize("kind", ["offline", "online", "offline, corrected"])
def test_signals_change_nothing(forked, calm, tmp_path, kind):
    """Ctrl-C at several places, with checkpoints far apart, so that only the signal can have written one."""
    (config, left_alone), stopped = calm(kind), tmp_path / "stopped"
    arguments = ["train", config, f"output_dir={stopped}", "resume=true", "checkpoint_every=100"]
    collecting = {"encoding": ENCODING} if "offline" in kind else DRAWING
    updates = 4 if "corrected" in kind else 2
    places = collecting | {"updating": UPDATING["between two updates"]}
    for finished, (moment, hook) in zip(((0, 1) if "offline" in kind else (1, 2)), places.items()):
        run = forked(*arguments, prelude=SMALL_FILES + STOP + hook + HOOK)
        assert run.status == 130, (moment, run)
        assert "Traceback" not in run.error
        sentence = f"stopped after epoch {finished} of 4" if finished else "stopped before epoch 1 ended"
        assert run.error.strip().splitlines()[-2:] == [sentence, resumed_with(*arguments)]
        assert [p.name for p in (stopped / "checkpoints").iterdir()] == [f"step_{updates * finished:08d}"]
        if moment == "encoding":  # the file that was begun is finished, the others wait
            assert [p.name for p in (stopped / "latents").iterdir()] == ["00000.safetensors"]
    forked.finish(*arguments, prelude=SMALL_FILES + QUICK)
    assert_same_run(stopped, left_alone)


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("pairs.max_pairs=5", "accept_changed=[pairs]"),
        ("beta=0.6", "beta was 0.5 and is 0.6"),
        ("variant=corrected", "variant was 'original' and is 'corrected'"),
        ("caption_dropout=0.1", "caption_dropout was 0.0 and is 0.1"),
        ("bucket_step=8", "bucket_step was None and is 8"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(forked, calm, override, kind):
    config, folder = calm("offline")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run = forked("train", config, f"output_dir={folder}", "resume=true", override)
    assert run.status == 2
    assert_problem(run.error, f"{folder}/checkpoints/step_00000008 belongs to another run", kind)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_finished_run_holds_all_its_files(calm):
    for kind in KINDS:
        folder = calm(kind)[1]
        assert (folder / "report.html").stat().st_size > 1000
        with Image.open(folder / "samples" / "before_after.png") as image:
            assert image.height > 2 * 16
        assert (folder / "latents").is_dir() == (kind != "online")


# -- in this process ---------------------------------------------------------------------------------------------------

QUIET = {"epochs": 2, "lr_schedule": "constant", "warmup_steps": 0, "ema_decay": None, "checkpoint_every": 10}


def brightness(images, prompts, metadata):
    return images.mean(dim=(1, 2, 3))


@pytest.fixture(scope="module")
def image_pairs(tmp_path_factory):
    """A folder with six pairs of noise images as files; the chosen ones are bright."""
    return write_noise_pairs(tmp_path_factory.mktemp("pairs"), [(16, 16)] * 6, PROMPTS)


@pytest.fixture
def train(train, model_path, image_pairs):
    """``train(model, name, **changes)``: the finished trainer and its rows."""

    def run(model="tiny_sd", name="run", **changes):
        source = {} if "prompts" in changes else {"pairs": str(image_pairs)}
        return train(SETTINGS | QUIET | source, name, **{"model": model_path(model)} | changes)

    return run


def updates(rows):
    return [row for row in rows if "loss" in row]


OF_REWARDS = {f"rewards/{name}" for name in ("accuracies", "margins", "chosen", "rejected")}
OF_ERRORS = {"error/winner", "error/loser", "error/winner_ratio", "kl/winner", "kl/loser"}
EVERY_UPDATE = {"loss", "weight", "grad_norm"} | OF_REWARDS | OF_ERRORS


@pytest.mark.parametrize("source", ["offline", "online"])
@pytest.mark.parametrize("variant", ["original", "corrected"])
def test_rows_hold_what_there_is_to_know(train, source, variant):
    changes = {"prompts": PROMPTS, "group_size": 2, "reward": brightness} if source == "online" else {}
    _, rows = train(variant=variant, **changes)
    assert all(row.keys() >= EVERY_UPDATE for row in updates(rows))
    epochs = [row for row in rows if "beta_nats" in row]
    assert [row["epoch"] for row in epochs] == [1, 2]
    assert {row["beta_nats"] for row in epochs} == {0.5}
    for row in epochs:
        assert row.keys() >= ({"reward", "reward_gap"} if source == "online" else {"pairs", "data_epochs"})
        assert row["samples_used"] == (2 if source == "online" else 4)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    first, last = updates(rows)[0], updates(rows)[-1]
    assert first["rewards/accuracies"] == 0.5
    assert first["weight"] == pytest.approx(0.5, abs=1e-7)
    for zero in ("rewards/margins", "error/winner", "error/loser", "kl/winner", "kl/loser"):
        assert first[zero] == 0, zero
    if variant == "original":
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["grad_norm"] > 0
    assert last["kl/winner"] > 0
    assert last["rewards/margins"] != 0


def test_the_chosen_images_are_learned_and_not_the_rejected_ones(train):
    """The whole UNet, all pairs in an update, several passes over an epoch's steps."""
    pace = {"samples_per_epoch": 6, "updates_per_epoch": 1, "inner_epochs": 4, "epochs": 8, "micro_batch_size": 24}
    settings = {"lora": None, "learning_rate": 2e-3, "beta": None, "beta_dpo": 500, "max_winner_error": 1e9}
    trainer, rows = train(decisions_per_pair=4, **pace, **settings)
    last = updates(rows)[-1]
    assert last["rewards/accuracies"] > 0.9
    assert last["rewards/margins"] > 0
    assert last["error/winner"] < last["error/loser"]
    assert last["loss"] < math.log(2)
    # Measured again with other steps and noises, and without the trainer, on what the files call chosen and rejected.
    sides = [[trainer.pairs.images(i, (16, 16))[side] for i in range(6)] for side in (0, 1)]
    chosen, rejected = (gain(trainer, side) for side in sides)
    assert chosen - rejected > 0.05, (chosen, rejected)


@torch.no_grad()
def gain(trainer, images):
    """How much less the policy's squared error of the noise is than the reference's, on average."""
    policy, draw = trainer.policy, torch.Generator().manual_seed(1)
    x_0 = policy.encode_images(torch.stack(images)).repeat(50, 1, 1, 1)
    t = torch.randint(1000, (len(x_0),), generator=draw)
    eps = torch.randn(x_0.shape, generator=draw)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # scaled linear, as in tiny_sd
    signal = (1 - betas).cumprod(0)[t].view(-1, 1, 1, 1)
    x_t, conditioning = signal.sqrt() * x_0 + (1 - signal).sqrt() * eps, policy.encode(trainer.pairs.prompts * 50)
    error = (policy.predict(x_t, t, conditioning, guidance_scale=1.0) - eps).square().mean()
    with policy.reference():
        return ((policy.predict(x_t, t, conditioning, guidance_scale=1.0) - eps).square().mean() - error).item()


@pytest.mark.parametrize("model", ["tiny_sd", "tiny_sd2", "tiny_sdxl"])
def test_an_adapter_loads_in_plain_diffusers(train, model_path, tmp_path, model):
    """What is on disk predicts what the trained policy predicts; the base weights have not moved."""
    from diffusers import DiffusionPipeline

    trainer, rows = train(model, learning_rate=0.02)
    assert (trainer.epoch, trainer.step) == (2, 4)
    plain = DiffusionPipeline.from_pretrained(model_path(model))
    named = dict(trainer.policy.network.named_parameters())
    for name, original in plain.unet.state_dict().items():
        stem, _, end = name.rpartition(".")
        assert torch.equal(named.get(name, named.get(f"{stem}.base_layer.{end}")), original), name
    for part in ("vae", "text_encoder", "text_encoder_2"):
        if getattr(plain, part, None) is not None:
            mine = getattr(trainer.policy.pipeline, part).state_dict()
            assert all(torch.equal(mine[k], v) for k, v in getattr(plain, part).state_dict().items()), part
    moved = [p for name, p in trainer.trainable.items() if "lora_B" in name]
    assert all(p.dtype == torch.float32 and p.abs().max() > 0 for p in moved)

    before = predict_plainly(plain)
    plain.load_lora_weights(tmp_path / "run" / "final", weight_name="pytorch_lora_weights.safetensors")
    after = predict_plainly(plain)
    ours = predict(trainer.policy)
    torch.testing.assert_close(ours, after, atol=1e-5, rtol=0)
    assert (after - before).abs().max() > 1e-3
    with trainer.policy.reference():
        torch.testing.assert_close(predict(trainer.policy), before, atol=1e-5, rtol=0)
    assert [row["grad_norm"] > 0 for row in updates(rows)] == [True] * 4


def noised():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([10, 700])


@torch.no_grad()
def predict(policy):
    return policy.predict(*noised(), policy.encode(PROMPTS[:2]), guidance_scale=1.0)


@torch.no_grad()
def predict_plainly(pipeline):
    """The network's output with the conditioning that diffusers makes of prompts and image size."""
    x_t, timestep = noised()
    pooled = None
    if hasattr(pipeline, "text_encoder_2"):
        embeds, _, pooled, _ = pipeline.encode_prompt(PROMPTS[:2], device="cpu", do_classifier_free_guidance=False)
        sizes = pipeline._get_add_time_ids((16, 16), (0, 0), (16, 16), embeds.dtype, pooled.shape[-1])
        added = {"text_embeds": pooled, "time_ids": sizes.repeat(2, 1)}
    else:
        embeds, _ = pipeline.encode_prompt(PROMPTS[:2], "cpu", 1, do_classifier_free_guidance=False)
        added = None
    return pipeline.unet(x_t, timestep, encoder_hidden_states=embeds, added_cond_kwargs=added).sample


@pytest.mark.parametrize("name", ["text_embeds", "time_ids"])
def test_every_conditioning_of_sdxl_counts_in_training(train, monkeypatch, name):
    """Without the second encoder's embedding, or with other sizes, the run is another."""
    _, rows = train("tiny_sdxl", epochs=1)
    encode = DenoisingPolicy.encode

    def without(self, prompts, *size):
        conditioning = encode(self, prompts, *size)
        return conditioning | {name: conditioning[name] + 1}

    monkeypatch.setattr(DenoisingPolicy, "encode", without)
    _, other = train("tiny_sdxl", "other", epochs=1)
    assert other[0]["error/reference"] != rows[0]["error/reference"]


def test_the_whole_unet_is_trained_and_saved(train, model_path, tmp_path):
    from diffusers import StableDiffusionPipeline

    trainer, _ = train(lora=None, learning_rate=1e-3)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "final")
    torch.testing.assert_close(predict(trainer.policy), predict_plainly(plain), atol=1e-5, rtol=0)
    original = load_pipeline(model_path("tiny_sd"))
    assert (predict_plainly(original) - predict_plainly(plain)).abs().max() > 1e-3
    with trainer.policy.reference():
        torch.testing.assert_close(predict(trainer.policy), predict_plainly(original), atol=1e-5, rtol=0)
    for mine, theirs in zip(trainer.trainable.values(), original.unet.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert not torch.equal(mine, theirs)


def test_prediction_types_agree_where_the_latents_are_the_same(train, tmp_path):
    """The latents of a run are the VAE's of its images, whatever the UNet predicts."""
    for model in ("tiny_sd", "tiny_sd2"):
        trainer, _ = train(model, model, epochs=1)
        stored = load_file(tmp_path / model / "latents" / "00000.safetensors")
        for i, side in enumerate(("chosen", "rejected")):
            pixels = torch.stack([trainer.pairs.images(pair, (16, 16))[i] for pair in range(6)])
            torch.testing.assert_close(stored[side], trainer.policy.encode_images(pixels), atol=1e-6, rtol=0)
        assert not torch.equal(stored["chosen"], stored["rejected"])


def test_captions_on_disk_and_encoded_again_give_the_same_run(train, tmp_path, monkeypatch):
    """With fewer embeddings in memory than there are captions; narrow latents are another run."""
    monkeypatch.setattr(policies, "CACHED_PROMPTS", 3)
    weights = {}
    for name, changes in {
        "disk": {"prompts_on_disk": True},
        "memory": {"prompts_on_disk": False},
        "narrow": {"latent_cache_dtype": "bfloat16"},
    }.items():
        train(name=name, **changes)
        weights[name] = (tmp_path / name / "final" / "pytorch_lora_weights.safetensors").read_bytes()
        assert (tmp_path / name / "prompts").is_dir() == (name != "memory")
    assert weights["disk"] == weights["memory"] != weights["narrow"]


def test_captions_that_are_seen_once_are_not_kept(train, tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "CACHED_PROMPTS", 3)
    train(epochs=1)
    assert not (tmp_path / "run" / "prompts").exists()


@pytest.mark.parametrize("reward", [None, brightness])
def test_a_reward_is_optional_where_pairs_are_given(train, tmp_path, reward, monkeypatch):
    from diffusion_align.diffusion import evaluation

    shown = []
    draw = evaluation.before_after
    monkeypatch.setattr(evaluation, "before_after", lambda *a, **k: shown.append(k) or draw(*a, **k))
    train(epochs=1, reward=reward)
    assert (shown[0]["rewards_after"] is None) == (reward is None)
    assert shown[0]["captions"] == PROMPTS
    assert (tmp_path / "run" / "samples" / "before_after.png").is_file()


def test_captions_are_dropped_from_their_share_of_pairs(train, monkeypatch):
    seen = []
    captions = DiffusionDPOTrainer._captions
    monkeypatch.setattr(
        DiffusionDPOTrainer, "_captions", lambda *given: seen.extend(found := captions(*given)) or found
    )
    train(caption_dropout=0.4, samples_per_epoch=200, sample_batch_size=50, micro_batch_size=50, epochs=1)
    assert 0.28 < seen.count("") / 200 < 0.52  # 3.5 standard errors
    assert set(seen) - {""} == set(PROMPTS)


def test_kept_reference_means_are_those_of_the_reference(train):
    """Looking back at the epoch's beginning changes no number of the original loss."""
    _, rows = train("tiny_sd", "once", epochs=2)
    again, other = train("tiny_sd", "twice", epochs=2, inner_epochs=2, micro_batch_size=2)
    first, second = updates(rows)[:2], updates(other)[:2]
    for a, b in zip(first, second):
        for key in EVERY_UPDATE - {"grad_norm"}:
            assert a[key] == pytest.approx(b[key], abs=1e-5, rel=1e-4), key
    assert again.step == 8


def test_align_from_python_then_draws_other_images(tiny_sd, image_pairs, tmp_path):
    pipe = ImageAlignmentPipeline.from_pretrained(tiny_sd, device="cpu")
    drawing = {"seed": 0, "steps": 3, "guidance_scale": 1.0, "eta": 0.0}
    before = pipe(PROMPTS[:2], **drawing).images
    settings = {k: v for k, v in (SETTINGS | QUIET).items() if k != "method"} | {"learning_rate": 0.05}
    try:
        pipe.align(method="diffusion_dpo", pairs=image_pairs, output_dir=tmp_path / "run", **settings)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    after = pipe(PROMPTS[:2], **drawing).images
    assert all(a.tobytes() != b.tobytes() for a, b in zip(before, after))
    again = ImageAlignmentPipeline.from_pretrained(tmp_path / "run", device="cpu")
    for a, b in zip(after, again(PROMPTS[:2], **drawing).images):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1
    assert (tmp_path / "run" / "report.html").is_file()


# -- the guard ---------------------------------------------------------------------------------------------------------

DIVERGES = {"variant": "corrected", "kl_coef": 0, "learning_rate": 1.0, "max_winner_error": 1.05, "lora": None}


@pytest.mark.parametrize("updates_per_epoch", [1, 2])
def test_a_run_that_diverges_stops_with_a_sentence(forked, calm, tmp_path, updates_per_epoch):
    """With one update an epoch the first epoch is finished and its checkpoint stands; with two it is not."""
    config = tmp_path / "tiny.yaml"
    settings = yaml.safe_load(calm("offline")[0].read_text())
    config.write_text(yaml.safe_dump(settings | QUIET | DIVERGES | {"checkpoint_every": 1}))
    folder = tmp_path / "run"
    for resume in ([], ["resume=true"]):
        run = forked(
            "train", config, f"output_dir={folder}", f"updates_per_epoch={updates_per_epoch}", *resume, prelude=QUICK
        )
        assert run.status == 2, run
        assert_problem(problems(run.error)[-1:], "the policy diverges", "raise kl_coef")
        assert "Traceback" not in run.error
        checkpoints = [p.name for p in folder.glob("checkpoints/*")]
        assert checkpoints == (["step_00000001"] if updates_per_epoch == 1 else [])
        assert [row["step"] for row in rows_of(folder) if "loss" in row] == [1]
        assert not (folder / "final").exists()


def test_the_guard_names_what_helps_each_variant(train):
    with pytest.raises(TrainingError, match="lower learning_rate"):
        train(**DIVERGES | {"variant": "original"}, updates_per_epoch=2, epochs=3)


def test_the_weights_are_those_before_the_diverging_update(train, monkeypatch):
    steps = []
    step = Optimization.step
    monkeypatch.setattr(Optimization, "step", lambda self, number: steps.append(number) or step(self, number))
    with pytest.raises(TrainingError, match="the policy diverges"):
        train(**DIVERGES)
    assert steps == [1]


def swapped(line):
    row = json.loads(line)
    return json.dumps(row | {"chosen": row["rejected"], "rejected": row["chosen"]}) + "\n"


@pytest.mark.parametrize("change", [lambda lines: lines[:3], lambda lines: [swapped(lines[0]), *lines[1:]]])
def test_a_changed_list_of_pairs_is_not_taken_for_the_old_one(change, forked, calm, image_pairs, tmp_path):
    """The latents in the run folder are of the pairs the run began with: other pairs must not be mixed with them."""
    source = Path(shutil.copytree(image_pairs, tmp_path / "pairs"))
    lines = (source / "pairs.jsonl").read_text().splitlines(keepends=True)
    settings = yaml.safe_load(calm("offline")[0].read_text()) | QUIET | {"pairs": str(source), "epochs": 1}
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings))
    forked.finish("train", config, f"output_dir={tmp_path}/run", prelude=QUICK)
    (source / "pairs.jsonl").write_text("".join(change(lines)))
    run = forked("train", config, f"output_dir={tmp_path}/run", "resume=true", "epochs=2", prelude=QUICK)
    assert "Traceback" not in run.error
    assert run.status == 2
    assert len(run.error.splitlines()) == 1
    assert f"belongs to a run with other content of pairs ({source}): put it back" in run.error
