"""ImageAlignmentPipeline: align, go on, draw, compare, score, merge, save, upload; what plain diffusers makes of it."""

import copy
import inspect
import os
import re
import signal
import threading

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffusion_align.errors import ConfigError, Interrupted, UserError
from diffusion_align.interrupt import InterruptFlag
from diffusion_align.models.model_ref import check_image_model, image_model_ref
from diffusion_align.pipelines import ImageAlignmentPipeline
from diffusion_align.pipelines.compare import Comparison, compare_models
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.pipelines.image import SampledImages
from diffusion_align.pipelines.run import run
from diffusion_align.pipelines.scoring import as_image_tensor
from diffusion_align.rewards.base import RewardError
from tests.helpers.hard_runs import rows_of
from tests.helpers.problems import assert_problem, problems
from tests.helpers.tiny_runs import TINY

PROMPTS = ["a red apple", "a cat"]
SETTINGS = TINY | {
    "prompts": PROMPTS,
    "samples_per_epoch": 4,
    "sample_batch_size": 4,
    "micro_batch_size": 8,
    "learning_rate": 0.02,
    "advantages": "group",
    "group_size": 2,
    "kl_coef": 0.01,
    "checkpoint_every": 1,
}


def redness(images, prompts, metadata):
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


@pytest.fixture(scope="module")
def base(tiny_sd):
    """The loaded pipeline of a tiny model, not to be changed."""
    return ImageAlignmentPipeline.from_pretrained(tiny_sd, device="cpu")


@pytest.fixture
def load(base):
    """``load()``: the tiny model, a copy of what is in memory; ``load(model, ...)``: from disk."""

    def make(model=None, **options):
        if model is None and not options:
            return copy.deepcopy(base)
        return ImageAlignmentPipeline.from_pretrained(model or base.model, device="cpu", **options)

    return make


@pytest.fixture(scope="module")
def first_run(tiny_sd, tmp_path_factory):
    """A finished run on the tiny model."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    pipe = ImageAlignmentPipeline.from_pretrained(tiny_sd, device="cpu")
    pipe.align(reward=redness, output_dir=folder, **SETTINGS)
    return folder


def plain(model):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(model)


@torch.no_grad()
def predictions(pipeline):
    """What the UNet of a diffusers pipeline, or of ours, says to fixed latents."""
    unet = getattr(pipeline, "pipeline", pipeline).unet.eval()
    noise = torch.Generator().manual_seed(0)
    x_t, states = torch.randn(2, 4, 8, 8, generator=noise), torch.randn(2, 8, 16, generator=noise)
    return unet(x_t, torch.tensor([100, 900]), encoder_hidden_states=states).sample


def assert_same_unet(a, b, tolerance=1e-5):
    torch.testing.assert_close(predictions(a), predictions(b), atol=tolerance, rtol=0)


def weights(pipe):
    return {name: tensor.clone() for name, tensor in pipe.pipeline.unet.state_dict().items()}


def assert_same_weights(pipe, expected):
    found = pipe.pipeline.unet.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def config_of(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


# -- training ----------------------------------------------------------------------------------------------------------

ONLINE_DPO = {k: v for k, v in SETTINGS.items() if k not in ("advantages", "kl_coef")} | {"beta": 1.0}
KINDS = {
    "ddpo, all weights": ("ddpo", SETTINGS | {"lora": None}),
    "ddpo, average": ("ddpo", SETTINGS | {"ema_decay": 0.5, "updates_per_epoch": 2}),
    "diffusion_dpo": ("diffusion_dpo", ONLINE_DPO),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_what_everyone_loads(load, base, tiny_sd, tmp_path, kind):
    """In memory, final/ in plain diffusers, the run folder, and what save_pretrained writes."""
    method, settings = KINDS[kind]
    pipe, folder = load(), tmp_path / "run"
    assert pipe.align(method, reward=redness, output_dir=folder, **settings) is pipe
    assert (predictions(pipe) - predictions(base)).abs().max() > 1e-3, "nothing was learned"
    assert (pipe.run, pipe.model) == (folder, str(tiny_sd))
    if settings["lora"]:
        theirs = plain(tiny_sd)
        theirs.load_lora_weights(folder / "final", weight_name="pytorch_lora_weights.safetensors")
    else:
        theirs = plain(folder / "final")
    assert_same_unet(theirs, pipe)
    again = load(folder)
    assert_same_unet(again, pipe)
    assert (again.run, again.sampler) == (folder, pipe.sampler)
    pipe.save_pretrained(tmp_path / "saved")
    saved = plain(tmp_path / "saved")
    assert set(saved.unet.state_dict()) == set(base.pipeline.unet.state_dict())
    assert_same_unet(saved, pipe)


@pytest.mark.parametrize(("reloaded", "second"), [(False, {"rank": 3}), (True, {"rank": 3}), (True, None)])
def test_a_run_is_trained_on_as_it_ended(load, first_run, tmp_path, reloaded, second):
    """A new adapter, with the first run's weights as the reference: the KL to them is 0 before the first update."""
    pipe = load(first_run) if reloaded else load().align(reward=redness, output_dir=tmp_path / "first", **SETTINGS)
    once, start = predictions(pipe), pipe.run
    pipe.align(reward=redness, output_dir=tmp_path / "second", **SETTINGS | {"lora": second})
    assert (predictions(pipe) - once).abs().max() > 1e-3
    assert config_of(tmp_path / "second")["model"] == str(start)
    assert [row["kl"] for row in rows_of(tmp_path / "second") if "kl" in row] == [pytest.approx(0, abs=1e-6)]
    assert_same_unet(load(tmp_path / "second"), pipe)
    assert_same_unet(load(tmp_path / "second" / "final"), pipe)
    torch.testing.assert_close(predictions(load(start)), once, atol=1e-5, rtol=0)


def test_a_run_as_the_model_of_a_configuration_is_the_same(load, first_run, tmp_path):
    raw = SETTINGS | {"method": "ddpo", "reward": redness, "output_dir": tmp_path / "yaml", "model": str(first_run)}
    trainer = run(check_config(raw))
    pipe = load(first_run).align(reward=redness, output_dir=tmp_path / "python", **SETTINGS)
    assert rows_of(tmp_path / "yaml") == rows_of(tmp_path / "python")
    assert_same_unet(trainer.policy.pipeline, pipe, tolerance=0)


def test_rewards_judge_a_run_as_they_judge_its_base(first_run, tiny_sd, tmp_path, monkeypatch):
    seen = []

    def build(spec, *, model, device):
        seen.append(model)
        return redness

    for place in ("image", "image_context"):
        monkeypatch.setattr(f"diffusion_align.pipelines.{place}.build_reward", build)
    pipe = ImageAlignmentPipeline.from_pretrained(first_run, device="cpu")
    pipe.align(reward="jpeg_compressibility", output_dir=tmp_path / "run", **SETTINGS)
    pipe.score([Image.new("RGB", (16, 16))], ["a"], "jpeg_compressibility")
    assert seen == [str(tiny_sd)] * 2


# -- breaking off and going on -----------------------------------------------------------------------------------------


def stops(how, epoch):
    """A reward that breaks off its ``epoch``, once: the calls are a trial before training, then one per epoch."""
    calls = []

    def reward(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) == epoch + 1 and how == "fails":
            return torch.full((len(images),), float("nan"))
        if len(calls) == epoch + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return redness(images, prompts, metadata)

    reward.__name__ = redness.__name__  # what a run is known by
    return reward


@pytest.mark.parametrize(("how", "lora"), [("fails", None), ("interrupted", {"rank": 2})])
def test_a_run_that_breaks_off_leaves_the_pipeline_and_is_gone_on_with(load, tmp_path, lora, how):
    settings = SETTINGS | {"lora": lora, "epochs": 3}
    pipe = load()
    before, handler = weights(pipe), signal.getsignal(signal.SIGINT)
    reward = stops(how, epoch=2)
    with pytest.raises((RewardError, Interrupted), match=r"returned nan|resume with: align"):
        pipe.align(reward=reward, output_dir=tmp_path / "run", **settings)
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_weights(pipe, before)
    assert pipe.run is None
    assert pipe(PROMPTS, steps=2).images
    pipe.align(reward=reward, output_dir=tmp_path / "run", resume=True, **settings)
    calm = load().align(reward=stops("not", epoch=9), output_dir=tmp_path / "calm", **settings)
    assert_same_weights(pipe, weights(calm))
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "calm")


@pytest.mark.parametrize("reloaded", [False, True])
def test_a_finished_run_goes_on_by_its_own_result(load, tmp_path, reloaded):
    """The same adapter, the same reference, as if there had been no pause."""
    short, folder = SETTINGS | {"epochs": 1}, tmp_path / "run"
    pipe = load().align(reward=redness, output_dir=folder, **short)
    pipe = load(folder) if reloaded else pipe
    ended = weights(pipe)
    with pytest.raises(ConfigError, match="is already used"):
        pipe.align(reward=redness, output_dir=folder, **short | {"epochs": 3})
    with pytest.raises(RewardError, match="returned nan"):
        pipe.align(reward=stops("fails", epoch=1), output_dir=folder, resume=True, **short | {"epochs": 3})
    assert_same_weights(pipe, ended)
    pipe.align(reward=redness, output_dir=folder, resume=True, **short | {"epochs": 3})
    calm = load().align(reward=redness, output_dir=tmp_path / "calm", **short | {"epochs": 3})
    assert rows_of(folder) == rows_of(tmp_path / "calm")
    assert_same_unet(pipe, calm, tolerance=0)
    pipe.merge()
    with pytest.raises(UserError, match="by from_pretrained and align that"):
        pipe.align(reward=redness, output_dir=folder, resume=True, **short | {"epochs": 4})


def test_an_align_that_fails_leaves_the_adapter_of_the_one_before(load, tmp_path):
    pipe = load().align(reward=redness, output_dir=tmp_path / "first", **SETTINGS)
    before, drawn = weights(pipe), pipe(PROMPTS, steps=2).images
    with pytest.raises(RewardError, match="returned nan"):
        pipe.align(reward=stops("fails", epoch=1), output_dir=tmp_path / "second", **SETTINGS)
    assert_same_weights(pipe, before)
    assert [image.tobytes() for image in pipe(PROMPTS, steps=2).images] == [image.tobytes() for image in drawn]
    pipe.save_lora(tmp_path / "lora")
    pipe.align(reward=redness, output_dir=tmp_path / "first", resume=True, **SETTINGS | {"epochs": 3})


def test_nothing_is_saved_in_the_place_of_a_file(load, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pipe = load().align(reward=redness, output_dir=tmp_path / "run", **SETTINGS)
    (tmp_path / "file").touch()
    for save, written in (
        (pipe.save_lora, "pytorch_lora_weights.safetensors"),
        (pipe.save_pretrained, "model_index.json"),
    ):
        with pytest.raises(UserError, match="is a file"):
            save(tmp_path / "file")
        save("~/home/saved")
        assert (tmp_path / "home" / "saved" / written).is_file()
    assert str(tmp_path / "home" / "saved") in (tmp_path / "home" / "saved" / "README.md").read_text()


def test_training_in_another_thread(load, tmp_path):
    """Handlers of signals belong to the main thread: without them it trains all the same."""
    pipe, failures = load(), []

    def work():
        try:
            pipe.align(reward=redness, output_dir=tmp_path / "run", **SETTINGS)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60)
    assert failures == []
    assert pipe.run == tmp_path / "run"


def test_a_handler_from_outside_python_is_no_obstacle(monkeypatch):
    """signal.signal returns None for one, and takes no None."""
    own = signal.getsignal(signal.SIGTERM)
    real = signal.signal
    monkeypatch.setattr(signal, "signal", lambda number, handler: real(number, handler) and None)
    try:
        with InterruptFlag() as flag:
            assert not flag.raised
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        real(signal.SIGTERM, own)
        real(signal.SIGINT, signal.default_int_handler)


# -- adapters ----------------------------------------------------------------------------------------------------------


def test_merging_changes_no_image_and_leaves_a_plain_pipeline(load, base, first_run, tmp_path):
    pipe = load(first_run)
    before, drawn = predictions(pipe), pipe(PROMPTS, steps=2, eta=0.0).images
    assert pipe.merge() is pipe
    assert list(pipe.pipeline.unet.state_dict()) == list(base.pipeline.unet.state_dict())
    torch.testing.assert_close(predictions(pipe), before, atol=1e-5, rtol=0)
    for a, b in zip(drawn, pipe(PROMPTS, steps=2, eta=0.0).images, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1
    merged = weights(pipe)
    assert_same_weights(pipe.merge(), merged)
    with pytest.raises(UserError, match="there is no trained adapter to save"):
        pipe.save_lora(tmp_path)
    pipe.align(reward=redness, output_dir=tmp_path / "run", **SETTINGS)
    assert config_of(tmp_path / "run")["model"] == str(first_run)


def test_an_adapter_of_a_run_is_saved_again(load, tiny_sd, first_run, tmp_path):
    load(first_run).save_lora(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    saved, original = (
        load_file(folder / "pytorch_lora_weights.safetensors") for folder in (tmp_path, first_run / "final")
    )
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in saved)
    with pytest.raises(UserError, match="there is no trained adapter to save"):
        load().save_lora(tmp_path)


def test_a_given_lora_is_trained_further_itself(load, tiny_sd, first_run, tmp_path):
    """The reference is the model without it, so the run's adapter alone gives the result."""
    pipe = load(lora=first_run / "final")
    start = weights(pipe)
    with pytest.raises(RewardError, match="returned nan"):
        pipe.align(reward=stops("fails", epoch=2), output_dir=tmp_path / "bad", **SETTINGS | {"epochs": 2})
    assert_same_weights(pipe, start)
    pipe.align(reward=redness, output_dir=tmp_path / "run", **SETTINGS)
    assert config_of(tmp_path / "run")["model"] == str(tiny_sd)
    assert next(row["kl"] for row in rows_of(tmp_path / "run") if "kl" in row) > 1e-4
    assert_same_unet(load(tmp_path / "run"), pipe)


def test_a_lora_on_a_run(load, first_run, tmp_path):
    """What the run is, is under it."""
    pipe = load(first_run, lora=first_run / "final")
    assert (predictions(pipe) - predictions(load(first_run))).abs().max() > 1e-3
    pipe.align(reward=redness, output_dir=tmp_path / "run", **SETTINGS)
    assert config_of(tmp_path / "run")["model"] == str(first_run)
    assert_same_unet(load(tmp_path / "run"), pipe)


def test_weights_that_no_folder_holds_are_written_beside_the_run(load, first_run, tmp_path):
    pipe = load(lora=first_run / "final").merge()
    pipe.align(reward=redness, output_dir=tmp_path / "run", **SETTINGS)
    assert config_of(tmp_path / "run")["model"] == str(tmp_path / "run" / "base")
    assert_same_unet(load(tmp_path / "run"), pipe)


def test_what_was_loaded_narrow_is_said_in_the_run(load, tmp_path):
    pipe = load(dtype=torch.bfloat16)
    pipe.align(reward=redness, output_dir=tmp_path / "run", **SETTINGS)
    assert config_of(tmp_path / "run")["dtype"] == "bfloat16"
    saved = load_file(tmp_path / "run" / "final" / "pytorch_lora_weights.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


# -- runs as models ----------------------------------------------------------------------------------------------------


def written(folder, *, final=(), **settings):
    (folder / "final").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    for name in final:
        (folder / "final" / name).touch()
    return folder


def test_what_lies_under_a_run_of_runs(tmp_path):
    lora = "pytorch_lora_weights.safetensors"
    a = written(tmp_path / "a", final=[lora], model="base.safetensors", weights_variant="fp16", base_config="owner/sd")
    b = written(tmp_path / "b", final=[lora], model=str(a))
    plan = image_model_ref(str(b))
    assert (plan.base, plan.variant, plan.base_config) == ("base.safetensors", "fp16", "owner/sd")
    assert plan.adapters == (a / "final", b / "final")
    assert (plan.below, plan.run) == (str(a), b)
    assert image_model_ref(str(b / "final")) == plan
    c = written(tmp_path / "c", final=["model_index.json"], model=str(b))
    assert (image_model_ref(str(c)).base, image_model_ref(str(c)).adapters) == (str(c / "final"), ())
    d = written(tmp_path / "d", final=[lora], model=str(c))
    assert (image_model_ref(str(d)).base, image_model_ref(str(d)).adapters) == (str(c / "final"), (d / "final",))
    for model in ("emoji-sd", "owner/name", "anywhere/else/at/all", str(tmp_path)):
        assert image_model_ref(model).base == model


def test_runs_that_cannot_be_models(golden, tmp_path, tiny_sd):
    lora = "pytorch_lora_weights.safetensors"
    unfinished = written(tmp_path / "unfinished", model="emoji-sd")
    (unfinished / "final").rmdir()
    written(tmp_path / "own", final=[lora], model=str(tmp_path / "own"))
    written(tmp_path / "text", final=["adapter_config.json"], method="grpo", model="tiny-lm")
    written(tmp_path / "nameless", final=[lora])
    written(tmp_path / "lost", final=[lora], model="./gone")
    for name in ("unfinished", "text", "nameless", "own", "lost"):
        for read in (check_image_model, ImageAlignmentPipeline.from_pretrained):
            with pytest.raises(UserError) as caught:
                read(str(tmp_path / name))
            golden(f"a run as a model: {name}", problems(caught))
    for model in (written(tmp_path / "good", final=[lora], model=str(tiny_sd)), "emoji-sd", tiny_sd):
        check_image_model(str(model))
    with pytest.raises(UserError, match="is neither an embedded model"):
        check_image_model("emojisd")


# -- wrong arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "dppo"},
        {"method": "grpo"},
        {"model": "emoji-sd"},
        {"dtype": "bfloat16"},
        {"weights_variant": "fp16"},
        {"base_config": "a/b"},
        {"group_sise": 4},
        {"reward": len},
    ],
    ids=str,
)
def test_what_cannot_be_aligned(load, golden, tmp_path, arguments):
    pipe = load()
    before = weights(pipe)
    with pytest.raises((UserError, RewardError)) as caught:
        pipe.align(**{"method": "ddpo", "reward": redness, "output_dir": tmp_path / "run"} | SETTINGS | arguments)
    golden(f"align: {arguments}", problems(caught))
    assert not (tmp_path / "run").exists()
    assert_same_weights(pipe, before)


def test_every_argument_is_documented():
    """Each parameter of each public method is named at the start of a line of its "Args:"."""
    methods = {name for name, found in inspect.getmembers(ImageAlignmentPipeline) if callable(found)}
    public = {"__init__", "__call__"} | {name for name in methods if not name.startswith("_")}
    functions = [compare_models, SampledImages.grid, SampledImages.save]
    functions += [getattr(ImageAlignmentPipeline, name) for name in sorted(public)]
    assert {"align", "compare", "push_to_hub", "merge"} <= public
    for function in functions:
        assert inspect.getdoc(function), function
        wanted = set(inspect.signature(function).parameters) - {"self"}
        section = re.search(r"^Args:\n((?:    .*\n?|\n)*)", inspect.getdoc(function), re.MULTILINE)
        named = re.findall(r"^    ([\w*, ]+):", section.group(1) if section else "", re.MULTILINE)
        assert wanted == {name.strip(" *") for line in named for name in line.split(",")}, function.__qualname__


# -- drawing, comparing, scoring ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:invalid value")
@pytest.mark.parametrize("steps", [3, 50])
def test_no_number_of_steps_gives_black_images(steps):
    """diffusers' DDIM with eta=1 does, for these, on a schedule that begins in pure noise."""
    pipe = ImageAlignmentPipeline.from_pretrained("emoji-sd", device="cpu")
    pipe.pipeline.unet.forward = lambda x, *_, **__: (0.1 * x,)  # quick, and finite
    image = pipe("a cat", steps=steps, guidance_scale=1.0, eta=1.0).images[0]
    assert np.asarray(image).std() > 1


@pytest.mark.parametrize(
    "arguments", [{"steps": 0}, {"steps": 2.5}, {"batch_size": 0}, {"eta": 2.0}, {"guidance_scale": -3.0}], ids=str
)
def test_what_cannot_be_drawn(base, golden, arguments):
    with pytest.raises(UserError) as caught:
        base(PROMPTS, **arguments)
    golden(f"pipe: {arguments}", problems(caught))


def test_drawn_images_show_and_save_themselves(base, tmp_path):
    from io import BytesIO

    from diffusion_align.report import image_grid

    drawn = base(PROMPTS, steps=1)
    assert drawn.prompts == PROMPTS
    grid = drawn.grid()
    assert grid.tobytes() == image_grid(drawn.images, captions=PROMPTS).tobytes()
    assert drawn.grid(columns=1).height > grid.height
    shown = Image.open(BytesIO(drawn._repr_png_()))
    assert (shown.format, shown.tobytes()) == ("PNG", grid.tobytes())
    assert drawn.save(tmp_path / "new" / "images") == tmp_path / "new" / "images"
    assert sorted(p.name for p in (tmp_path / "new" / "images").iterdir()) == ["0000.png", "0001.png", "grid.png"]
    assert Image.open(tmp_path / "new" / "images" / "0001.png").tobytes() == drawn.images[1].tobytes()
    none = base([])
    assert none.images == []
    assert none._repr_png_() is None
    with pytest.raises(UserError, match="there are no images to show"):
        none.save(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="File exists"):
        drawn.save(tmp_path / "file")


def test_comparing_with_a_model_and_with_a_pipeline(load, base, tiny_sd, first_run, tmp_path):
    pipe = load(first_run)
    before = base.sampler
    result = pipe.compare(base, PROMPTS, redness, seed=3, per_prompt=2, output=tmp_path / "pairs.png")
    assert base.sampler is before
    assert result == pipe.compare(tiny_sd, PROMPTS, redness, seed=3, per_prompt=2)
    mine, theirs = ([], [])
    for k in range(2):
        mine += pipe(PROMPTS, seed=3 + 2 * k).images
        theirs += base(PROMPTS, seed=3 + 2 * k, steps=2, guidance_scale=1.0, eta=1.0).images
    scores = [pipe.score(images, PROMPTS * 2, redness).double() for images in (theirs, mine)]
    assert result.mean_first == pytest.approx(scores[0].mean().item(), abs=1e-3)
    assert result.mean_second == pytest.approx(scores[1].mean().item(), abs=1e-3)
    assert result.mean_second != result.mean_first
    assert result.image.tobytes() == Image.open(tmp_path / "pairs.png").tobytes()
    assert result.picture is result.image  # the former name


def test_a_comparison_reads_as_a_sentence():
    result = Comparison(0.25, 0.5, 0.75, 0.6, 0.85, 40, 10.0, 0.25, 0.05, Image.new("RGB", (3, 2)))
    assert str(result) == (
        "A 0.2500, B 0.5000, B - A 0.2500 (standard error 0.05); B wins 75.0% of 40 pairs "
        "(95 % interval 60.0% to 85.0%, Wilson for 10 independent pairs)"
    )
    assert "image" not in repr(result)
    page = result._repr_html_()
    assert page.startswith(f"<p>{result}</p><img ")
    assert 'src="data:image/png;base64,iVBOR' in page


def image_forms():
    """One image in every accepted form: the left half red, the right half white."""
    array = np.full((16, 16, 3), 255, dtype=np.uint8)
    array[:, :8, 1:] = 0
    opaque = Image.fromarray(array)
    clear = Image.new("RGBA", (16, 16), (0, 0, 255, 0))
    clear.paste(opaque.crop((0, 0, 8, 16)), (0, 0))
    return {
        "RGB": opaque,
        "palette": opaque.quantize(4),
        "CMYK": opaque.convert("CMYK"),
        "transparent is white": clear,
        "array": array,
        "array with alpha": np.asarray(clear),
        "tensor": torch.from_numpy(array).permute(2, 0, 1) / 255,
        "float64 tensor": torch.from_numpy(array).permute(2, 0, 1).double() / 255,
    }


def test_images_in_every_form_get_the_same_score(base):
    forms = image_forms()
    scores = base.score(list(forms.values()), ["a"] * len(forms), redness)
    torch.testing.assert_close(scores, torch.full((len(forms),), 0.5))
    batch = torch.stack([forms["tensor"], 0 * forms["tensor"]])
    assert base.score(batch, ["a", "b"], redness).tolist() == pytest.approx([0.5, 0.0])
    assert base.score([np.zeros((4, 5), np.uint8), Image.new("L", (9, 7), 255)], ["a", "b"], redness).tolist() == [0, 0]
    assert base.score([], [], redness).shape == (0,)


def test_metadata_reaches_the_reward(base):
    def count(images, prompts, metadata):
        return [float(row["count"]) for row in metadata]

    image = image_forms()["RGB"]
    assert base.score([image] * 2, ["a", "b"], count, metadata=[{"count": 3}, {"count": 5}]).tolist() == [3, 5]


WHITE = Image.new("RGB", (4, 4), "white")


NOT_SCORED = {
    "two images, one prompt": ([WHITE] * 2, ["a"]),
    "a single prompt": ([WHITE], "a"),
    "a single image": (WHITE, ["a"]),
    "a path": ([WHITE, "x.png"], ["a", "b"]),
    "an image of floats": ([Image.new("F", (4, 4))], ["a"]),
    "an image of 16 bits": ([Image.new("I;16", (4, 4), 999)], ["a"]),
    "an array of floats": ([np.zeros((4, 4, 3))], ["a"]),
    "an array of another layout": ([np.zeros((3, 4, 5), np.uint8)], ["a"]),
    "a tensor of another layout": ([torch.zeros(4, 4, 3)], ["a"]),
    "a tensor of integers": ([torch.zeros(3, 4, 4, dtype=torch.uint8)], ["a"]),
    "a tensor up to 255": ([torch.full((3, 4, 4), 255.0)], ["a"]),
    "a tensor of nan": ([torch.full((3, 4, 4), float("nan"))], ["a"]),
}


@pytest.mark.parametrize("case", NOT_SCORED)
def test_what_cannot_be_scored(base, golden, case):
    with pytest.raises(UserError) as caught:
        base.score(*NOT_SCORED[case], redness)
    golden(f"score: {case}", problems(caught))


def test_metadata_of_another_length(base):
    with pytest.raises(
        UserError, match="images, prompts and metadata must be lists of the same length: got 1, 1 and 2"
    ):
        base.score([WHITE], ["a"], redness, metadata=[{}, {}])


def test_an_image_keeps_its_levels():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = torch.arange(256).view(16, 16).expand(3, 16, 16) / 255
    for image in (Image.fromarray(levels), levels, np.repeat(levels[..., None], 3, axis=2)):
        torch.testing.assert_close(as_image_tensor(image), expected, atol=1e-7, rtol=0)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def test_an_adapter_is_uploaded_with_its_card(load, tiny_sd, first_run, tmp_path, hub):
    pipe = load(first_run)
    assert pipe.push_to_hub("me/red", token="hf_x") == "https://example.org/me/red"
    options = {"private": True, "exist_ok": True, "repo_type": "model"}
    assert hub == [("token", "hf_x"), ("create", "me/red", options), ("upload", "me/red", "model")]
    files = sorted(str(p.relative_to(tmp_path / "hub")) for p in (tmp_path / "hub").rglob("*") if p.is_file())
    assert files == ["README.md", "before_after.png", "pytorch_lora_weights.safetensors"]
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'pipeline.load_lora_weights("me/red", weight_name=' in card
    assert "hf_x" not in card
    theirs = plain(tiny_sd)
    theirs.load_lora_weights(tmp_path / "hub", weight_name="pytorch_lora_weights.safetensors")
    assert_same_unet(theirs, pipe)


def test_a_whole_pipeline_is_uploaded(load, first_run, tmp_path, hub):
    pipe = load(first_run)
    pipe.push_to_hub("me/red", private=False, merged=True)
    assert hub[1][2]["private"] is False
    files = {p.name for p in (tmp_path / "hub").iterdir()}
    assert {"README.md", "before_after.png", "model_index.json", "unet"} <= files
    line = 'StableDiffusionPipeline.from_pretrained("me/red", torch_dtype=torch.float32)'
    assert line in (tmp_path / "hub" / "README.md").read_text()
    assert all(str(tmp_path.parent) not in file.read_text() for file in (tmp_path / "hub").rglob("*config.json"))
    assert "_name_or_path" not in (tmp_path / "hub" / "model_index.json").read_text()
    assert_same_unet(plain(tmp_path / "hub"), pipe)
    assert pipe.pipeline.unet.peft_config, "the live pipeline keeps its adapter"


def test_what_is_not_uploaded(load, base, first_run, tmp_path, hub, monkeypatch):
    with pytest.raises(UserError, match="no adapter to upload"):
        base.push_to_hub("me/red")
    chained = load(first_run).align(reward=redness, output_dir=tmp_path / "second", **SETTINGS)
    with pytest.raises(UserError, match="not on the Hub"):
        chained.push_to_hub("me/red")
    assert hub == []

    def refuse(*arguments, **options):
        raise ValueError("Repo id must be in the form 'name'\nor something else")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse, raising=False)
    with pytest.raises(UserError) as caught:
        load(first_run).push_to_hub("a/b/c", token="hf_secret")
    assert_problem(caught, "repo_id", "Repo id must be in the form 'name'")
    assert not (tmp_path / "hub").exists()
