"""Names of other libraries lead to the setting that does their work here."""

import pytest

from diffusion_align.methods import SHIPPED, method_of
from diffusion_align.training import hints
from diffusion_align.training.annotations import section_of


def settings(method):
    """Those of a method, and those of its sections."""
    fields = method_of(method).config_class.model_fields
    sections = {key: section_of(field.annotation) for key, field in fields.items()}
    return list(fields), [
        f"{key}.{inner}" for key, section in sections.items() if section for inner in section.model_fields
    ]


SETTINGS = {method: settings(method) for method in SHIPPED}


@pytest.mark.parametrize(
    ("word", "images", "text"),
    [
        ("lr", "set learning_rate", "set learning_rate"),
        ("num_train_epochs", "set epochs", "set epochs"),
        ("num_epochs", "set epochs", "set epochs"),
        ("report_to", "set trackers", "set trackers"),
        ("r", "set lora.rank", "set lora.rank"),
        ("target_modules", "set lora.layers", "set lora.layers"),
        ("batch_size", "set micro_batch_size or samples_per_epoch", "set micro_batch_size or samples_per_epoch"),
        ("per_device_train_batch_size", "set micro_batch_size", "set micro_batch_size"),
        ("num_inference_steps", "set sampler.steps", "`diffusion-align list settings` shows what can be set"),
        ("cliprange", "set clip_range", "set clip_range"),
        ("device", "the GPU is used where there is one; CUDA_VISIBLE_DEVICES says which", None),
        ("optim", "set optimizer", None),
        ("image_size", "set resolution or height or width", "`diffusion-align list settings` shows what can be set"),
        ("negative_prompts", "set negative_prompt", "`diffusion-align list settings` shows what can be set"),
        ("vf_coef", "`diffusion-align list settings` shows what can be set", None),
        ("ref_model", "`diffusion-align list settings` shows what can be set", "set reference_model"),
        ("epoch", "did you mean 'epochs'?", None),
        ("zzzz", "`diffusion-align list settings` shows what can be set", None),
        ("dreambooth", "`diffusion-align list settings` shows what can be set", None),
    ],
)
def test_what_people_type(word, images, text):
    assert hints.hint(word, *SETTINGS["ddpo"]) == images
    assert hints.hint(word, *SETTINGS["grpo"]) == (text or images)


def test_a_section_is_searched_for_what_another_library_has_beside_it():
    known = ["eta", "guidance_scale", "name", "options", "steps"]
    assert hints.hint("num_inference_steps", known) == "set sampler.steps"
    assert hints.hint("rank", known) == "known are eta, guidance_scale, name, options, steps"


def test_few_settings_are_named():
    assert hints.hint("zzz", ["b", "a"]) == "known are a, b"


def test_every_hint_is_a_setting_and_no_sentence_is_about_one():
    ours = {name for pair in SETTINGS.values() for names in pair for name in names}
    assert {name for names in hints.HERE.values() for name in names.split()} <= ours
    assert not ours & hints.ELSEWHERE.keys()
