"""What tests of rewards share: images, a call, a refusal, finite differences, a small CLIP, a server of JSON."""

import contextlib
import http.server
import json
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn import functional

from diffusion_align.assets import asset_path
from diffusion_align.rewards import RewardError, call_reward

PROMPTS = ["a red apple", "two dogs on a beach", "", "a photograph of a mountain lake at dawn"]


def levels(count, size=8, seed=0):
    """Noise, (count, 3, size, size), in 8-bit levels."""
    return torch.randint(256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)) / 255


def smooth_images(height=32, width=32):
    """Four smooth random images in 8 bits, by PIL and as a reward gets them."""
    coarse = torch.rand(len(PROMPTS), 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = functional.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).round().to(torch.uint8)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels], pixels / 255


def score(reward, images, prompts="", metadata=None, **options):
    prompts = [prompts] * len(images) if isinstance(prompts, str) else prompts
    return call_reward(reward, images, prompts, metadata or [{} for _ in images], **options)


def refusal(function, *arguments, **options):
    """The sentence of the RewardError that a call raises, one line."""
    with pytest.raises(RewardError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_gradient(reward, images, prompts="", *, step, rtol):
    """That the gradient to the pixels is the slope along it, by finite differences."""
    images = images.clone().requires_grad_()
    score(reward, images, prompts, differentiable=True).sum().backward()
    direction = images.grad / images.grad.norm()
    with torch.no_grad():
        ends = [images + sign * step * direction for sign in (1, -1)]
        up, down = (score(reward, end, prompts, differentiable=True).double().sum() for end in ends)
    torch.testing.assert_close((up - down) / (2 * step), images.grad.norm().double(), rtol=rtol, atol=0)


def save_clip(folder, *, projection, layers=1, length=12, **settings):
    """A random CLIPModel of 32 x 32 pixels, saved as transformers does, and emoji-clip's tokenizer beside it."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": layers}
    text = {**tower, "vocab_size": 3538, "max_position_embeddings": length, "bos_token_id": 3536, "eos_token_id": 3537}
    vision = {**tower, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection, **settings))
        torch.nn.init.normal_(model.vision_model.embeddings.patch_embedding.weight, std=0.2)
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(asset_path("emoji-clip") / "tokenizer").save_pretrained(folder)
    return folder


def save_open_clip(name, folder, *, layers):
    """The configuration of a small architecture, which open_clip knows by ``name`` from now on."""
    import open_clip

    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": layers, "head_width": 16}
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "layers": layers, "heads": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{name}.json")
    return config


@contextlib.contextmanager
def serving(server_class, handler):
    """The address of a server in threads of its own."""
    server = server_class(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def json_server(answer):
    """``serving`` the status, object and headers that ``answer(request)`` gives; it has path, body, headers, peer."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = SimpleNamespace(path=self.path, body=body, headers=self.headers, peer=self.client_address)
            status, content, headers = answer(request)
            data = json.dumps(content).encode()
            with contextlib.suppress(OSError):  # a client that has gone
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    return serving(http.server.ThreadingHTTPServer, Handler)
