"""The Python of README and docs runs: the blocks of a page one after the other, on tiny models and two CPU processes.

What is put in place of what a reader has: `SMALLER` in the text, tiny pipelines for models of the Hub, `GIVEN` names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import cfg_parallel
from cfg_parallel import demo
from forked import forked_ranks
from scripts import PREAMBLE
from serving import serving_small
from test_composition import START
from test_docs import PAGES
from tiny import TINY
from tiny_models import small_images

pytestmark = [pytest.mark.timeout(280), pytest.mark.usefixtures("forked")]

SMALLER = {
    "num_inference_steps=50": "num_inference_steps=2",
    "num_inference_steps=20": "num_inference_steps=2",
    '.to("cuda")': '.to("cpu")',
    "torch_dtype=torch.bfloat16": "torch_dtype=torch.float32",
    "enable_model_cpu_offload()": 'enable_model_cpu_offload(device="cpu")',
    "compile=True)": 'compile=True, compile_options={"backend": "eager"})',  # Inductor takes minutes for two CPUs
    "torch.compile(fullgraph=True)": 'torch.compile(fullgraph=True, backend="eager")',
    '"seed": 0}': '"seed": 0, "size": "64x64", "num_inference_steps": 2}',
}
RANKS = "parallelism.md"  # for torchrun
FOLDERS = ("Qwen/Qwen-Image-Edit",)  # loaded from disk by commands and engines; others by their class
TINY_OF = {"QwenImagePipeline": "qwen_image", "DiffusionPipeline": "qwen_image"}


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def tiny_pipeline(name: str) -> Any:
    pipe = TINY[name].build()
    pipe.default_sample_size = 4  # pictures of 32 x 32
    return pipe


class Scheduler:
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])
    timesteps = sigmas[:-1] * 1000


def transformer(latents: torch.Tensor, t: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    return latents * 0.5 + embeds.mean() * t / 1000


def given(name: str, folder: Path) -> dict[str, Any]:
    """What a page takes for granted."""
    photo = demo.demo_photo()
    from PIL import Image

    cat = Image.open(photo).convert("RGB").resize((64, 64))
    if name == "README.md":
        return {"photo": cat, "input_image": cat}
    if name == "guidance.md":
        draw = torch.Generator().manual_seed(0)
        names = ("latents", "prompt_embeds", "negative_embeds")
        tensors: dict[str, Any] = {key: torch.randn(1, 4, 8, 8, generator=draw) for key in names}
        return tensors | {"scheduler": Scheduler, "transformer": transformer, "torch": torch}
    if name == "combining.md":
        peft = pytest.importorskip("peft", reason="LoRAs need peft (the extra `integrations`)")
        assert peft
        from test_lora import save_lora

        call = {"prompt": "a cat", "negative_prompt": "blurry", "true_cfg_scale": 4.0, "num_inference_steps": 4}
        lora = save_lora("qwen_image", folder, seed=1)
        pipe = tiny_pipeline("qwen_image")
        return {"pipe": pipe, "call": call, "lora_folder": lora, "cfg_parallel": cfg_parallel}
    if name == "serving.md":
        cat.save(folder / "cat.png")
    return {}


@pytest.fixture
def from_the_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`from_pretrained` of a model that is not a folder gives a tiny one of its class."""
    original: Callable[..., Any] = diffusers.DiffusionPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, model: str, **kwargs: Any) -> Any:
        if Path(model).is_dir():
            return original(cls, model, **kwargs)
        return tiny_pipeline(TINY_OF[cls.__name__])

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    yield


@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page) and page.name != RANKS], ids=lambda page: page.name
)
def test_python_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, from_the_hub: None, request: pytest.FixtureRequest
) -> None:
    edit = str(demo.ensure_demo_model(tmp_path / "edit"))
    names = given(page.name, tmp_path) | {"__name__": "snippet"}
    monkeypatch.chdir(tmp_path)
    torch.compiler.reset()
    options = ("--devices", "cpu,cpu", "--served-model-name", FOLDERS[0])
    with serving_small(edit, *options) if page.name == "serving.md" else nullcontext() as served, small_images():
        for code in blocks(page):
            for text, smaller in SMALLER.items():
                code = code.replace(text, smaller)
            if served is None:
                code = code.replace(FOLDERS[0], edit)
            else:
                code = code.replace("http://127.0.0.1:8091", served.url)
            exec(compile(code, f"{page.name}", "exec"), names)
            checks(page.name, code, names)
    for value in names.values():
        if isinstance(value, diffusers.DiffusionPipeline):
            cfg_parallel.disable_cfg_parallel(value)


ON_CPUS = {
    'dist.init_process_group("nccl")': "",  # START has done it
    "pipe.to(f\"cuda:{os.environ['LOCAL_RANK']}\")": "",
    'init_device_mesh("cuda"': 'init_device_mesh("cpu"',
    "guidance_scale=5.0)": "guidance_scale=5.0, height=32, width=32, num_frames=5, num_inference_steps=3)",
}
CALLS = ["", "pipe(**tiny.inputs())\n"]  # what the page leaves to the reader


@pytest.mark.parametrize(("number", "model"), [(0, "wan"), (1, "qwen_image")], ids=["context", "tensor"])
def test_python_runs_in_four_ranks(number: int, model: str, tmp_path: Path) -> None:
    (page,) = (page for page in PAGES if page.name == RANKS)
    code = blocks(page)[number]
    for text, on_cpus in ON_CPUS.items():
        assert text in "".join(blocks(page)), f"the page has no {text} any more"
        code = code.replace(text, on_cpus)
    script = tmp_path / "script.py"
    script.write_text(
        PREAMBLE.replace("qwen_image", model)
        + START["cpu"]
        + "import diffusers\ndiffusers.WanPipeline.from_pretrained = lambda *args, **kwargs: pipe\n"
        + "pipe.set_progress_bar_config(disable=True)\n"
        + code
        + CALLS[number]
        + "if rank < 2:\n    report = cfg_parallel.last_report(pipe)\n"
        + "    assert report.parallel_steps == report.steps == 3, report\n"
        + "dist.destroy_process_group()\n"
    )
    status, output = forked_ranks(script, 4)
    assert status == 0, output[-4000:]


def checks(page: str, code: str, names: dict[str, Any]) -> None:
    """What a block has left is what the page says of it."""
    if page == "quick_start.md" and "print(handle.report)" in code:
        assert names["handle"].report.parallel_steps == 2
    if page == "README.md" and "omni" in names:
        assert (Path.cwd() / "edited.png").is_file()
    if page == "README.md" and "image" in names:
        assert cfg_parallel.last_report(names["pipe"]).parallel_steps == 2
    if page == "combining.md" and not code.endswith("handle.disable()\n") and "enable_cfg_parallel" in code:
        assert names["handle"].report.parallel_steps >= 3, names["handle"].report
    if page == "guidance.md":
        assert names["latents"].isfinite().all()
        if "denoise" in names:
            dt = torch.tensor(-0.1)
            assert names["denoise"](names["latents"], torch.tensor(500.0), dt).isfinite().all()
    if page == "serving.md" and "answer" in names:
        assert names["answer"].data[0].b64_json
    if page == "serving.md" and "dog" in names:
        assert names["dog"].startswith("data:image/png;base64,")
