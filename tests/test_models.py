"""The models of benchmarks/: published geometry, real tables, finite weights, and pictures that guidance changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_pipeline, models
from benchmarks.model_specs import SPECS
from benchmarks.random_weights import build_random, materialize, meta_tensors, parameters_on_meta
from benchmarks.results_file import markdown_table, merge_rows

# Counted from the published checkpoints' configurations; 0.86 B, 2.57 B, 8.06 B, 1.42 B and 20.4 B in the measurements.
PARAMETERS = {
    "qwen-image": 20_430_401_088,
    "qwen-image-edit": 20_430_401_088,
    "sd15": 859_520_964,
    "sdxl": 2_567_463_684,
    "sd35-large": 8_056_627_520,
    "flux1-dev": 11_901_408_320,
    "wan21-1.3b": 1_418_996_800,
    "wan21-14b": 14_288_491_584,
}
VAE_PARAMETERS = {
    "qwen-image-edit": 126_892_531,
    "wan21-1.3b": 126_892_531,
    "sd15": 83_653_863,
    "sdxl": 83_653_863,
    "sd35-large": 83_819_683,
    "flux1-dev": 83_819_683,
}


def count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def build_tiny(name: str) -> Any:
    pipe = models.build_pipeline(name, device="cpu", dtype=torch.float32, scale="tiny")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str, **changes: Any) -> np.ndarray:
    call = models.inputs(name, steps=2, device="cpu", dtype=torch.float32, scale="tiny")
    output = pipe(**(call | changes))
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


@pytest.mark.parametrize("name", SPECS)
def test_denoiser_has_the_published_number_of_parameters(name: str) -> None:
    with parameters_on_meta():
        denoiser = models.construct_denoiser(name)
    assert all(param.device.type == "meta" for param in denoiser.parameters())
    assert count(denoiser) == PARAMETERS[name]


@pytest.mark.parametrize("name", VAE_PARAMETERS)
def test_vae_has_the_published_number_of_parameters(name: str) -> None:
    with parameters_on_meta():
        assert count(models.construct_vae(name)) == VAE_PARAMETERS[name]


def test_text_encoder_is_the_published_7b_and_shares_its_ids_with_the_tokenizer() -> None:
    with parameters_on_meta():
        encoder = models.construct_text_encoder()
    assert count(encoder) == 8_292_166_656
    assert encoder.get_input_embeddings().weight.shape == (152064, 3584)
    config = encoder.config
    assert (config.vision_start_token_id, config.vision_end_token_id, config.image_token_id) == (151652, 151653, 151655)


@pytest.mark.parametrize(("name", "system_tokens"), [("qwen-image", 34), ("qwen-image-edit", 64)])
@pytest.mark.parametrize("scale", ["real", "tiny"])
def test_tokenizer_agrees_with_the_template_and_the_text_encoder(name: str, system_tokens: int, scale: str) -> None:
    pipe = build_tiny(name)
    models._add_tokenizer(pipe, scale)  # the real ids with the tiny models, which are cheap to build
    tokenizer = pipe.tokenizer
    assert pipe.prompt_template_encode_start_idx == system_tokens
    with parameters_on_meta():
        config = models.construct_text_encoder(scale=scale).config
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id
    assert tokenizer.convert_tokens_to_ids("<|vision_start|>") == config.vision_start_token_id
    text = pipe.prompt_template_encode.format(f"{models.PROMPT}, 100 % \u00e9\u4e2d")
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert max(ids) < config.text_config.vocab_size
    assert len(tokenizer(models.PROMPT)["input_ids"]) == len(models.PROMPT.split())


@pytest.mark.parametrize("name", ["qwen-image", "qwen-image-edit"])
def test_prompts_have_even_lengths(name: str) -> None:
    """Else diffusers' Ulysses, which is measured beside us, takes twice its time."""
    pipe = build_tiny(name)
    models._add_tokenizer(pipe, "real")
    inputs = models.inputs(name, device="cpu")
    for prompt in (inputs["prompt"], inputs["negative_prompt"]):
        text = pipe.prompt_template_encode.format(prompt)
        images = {"images": [inputs["image"]]} if "image" in inputs else {}
        tokens = (pipe.processor if images else pipe.tokenizer)(text=[text], **images)["input_ids"][0]
        assert (len(tokens) - pipe.prompt_template_encode_start_idx) % 2 == 0


def test_random_weights_depend_on_the_seed_alone_and_keep_activations_finite() -> None:
    def build(seed: int) -> nn.Module:
        return models.build_denoiser("qwen-image", device="cpu", dtype=torch.bfloat16, seed=seed, scale="tiny")

    one, same, other = build(0), build(0), build(1)
    weights = one.state_dict()
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in weights.items())
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in weights.items())
    assert {param.dtype for param in one.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert weights["transformer_blocks.0.attn.norm_q.weight"].unique().tolist() == [1.0]
    assert weights["img_in.bias"].unique().tolist() == [0.0]
    linear = weights["transformer_blocks.0.img_mod.1.weight"].float()
    assert linear.std().item() == pytest.approx(linear.shape[1] ** -0.5, rel=0.05)


def test_tables_that_are_computed_are_the_real_ones() -> None:
    for name in SPECS:
        built = models.build_denoiser(name, device="cpu", scale="tiny", dtype=torch.float32)
        plain = models.construct_denoiser(name, scale="tiny")
        assert not meta_tensors(built)
        for (key, got), (_, expected) in zip(built.named_buffers(), plain.named_buffers(), strict=True):
            assert torch.equal(got, expected), f"{name}: {key}"
        if name.startswith("qwen"):
            assert torch.equal(built.pos_embed.pos_freqs, plain.pos_embed.pos_freqs)
            assert torch.equal(built.pos_embed.neg_freqs, plain.pos_embed.neg_freqs)


def test_dtypes_are_those_of_from_pretrained(tmp_path: Path) -> None:
    for name in (
        "wan21-1.3b",
        "sd35-large",
    ):  # fp32 modules and rotary table; a table in the checkpoint
        built = models.build_denoiser(name, device="cpu", scale="tiny", dtype=torch.bfloat16)
        models.construct_denoiser(name, scale="tiny").save_pretrained(tmp_path / name)
        loaded = type(built).from_pretrained(tmp_path / name, torch_dtype=torch.bfloat16)
        assert {key: value.dtype for key, value in built.state_dict().items()} == {
            key: value.dtype for key, value in loaded.state_dict().items()
        }
        assert [(key, value.dtype) for key, value in built.named_buffers()] == [
            (key, value.dtype) for key, value in loaded.named_buffers()
        ]


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

    model = build_random(Tied, device="cpu", dtype=torch.float32, seed=0)
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("place", ["buffer", "attribute", "container"])
def test_a_table_without_data_is_an_error_that_names_it(place: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    table = torch.empty(2, device="meta")
    if place == "buffer":
        model[0].register_buffer("table", table)
    else:
        model[0].table = table if place == "attribute" else {"cos": [table]}
    with pytest.raises(RuntimeError, match=r"0\.table"):
        materialize(model, device=torch.device("cpu"), dtype=torch.float32, seed=0)


@pytest.mark.parametrize("name", SPECS)
def test_a_prompt_and_a_photo_go_in_and_a_picture_that_guidance_changes_comes_out(name: str) -> None:
    pipe = build_tiny(name)
    assert type(pipe).__name__ == SPECS[name].pipeline
    batches: list[int] = []
    denoiser = getattr(pipe, SPECS[name].denoiser_attribute)
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    picture = generate(pipe, name)
    guided_rows = sum(batches)
    batches.clear()
    hooked_off = generate(pipe, name, **models.guidance_off(name))
    hook.remove()
    assert picture.shape[-3:] == (64, 64, 3)
    assert np.isfinite(picture).all()
    assert picture.std() > 0.05
    assert guided_rows == 2 * sum(batches), "guidance is on: two rows, in one call or in two"
    assert (picture != hooked_off).mean() > 0.5
    assert np.array_equal(picture, generate(pipe, name)), "the same seed gives the same picture"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="some of qwen-image,"):
        models.build_denoiser("sd16", device="cpu")
    with pytest.raises(ValueError, match="'real' or 'tiny'"):
        models.construct_denoiser("sdxl", scale="small")


def test_half_batches_reproduces_the_rows_and_is_undone() -> None:
    denoiser = models.build_denoiser("sdxl", device="cpu", dtype=torch.float32, scale="tiny")
    config = denoiser.config
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    added = {"text_embeds": torch.randn(2, 32, generator=generator), "time_ids": torch.ones(2, 6)}
    latents = torch.randn(2, 4, 8, 8, generator=generator)

    def call(rows: slice) -> torch.Tensor:
        return denoiser(
            latents[rows],
            torch.tensor(500),
            encoder_hidden_states=text[rows],
            added_cond_kwargs={key: value[rows] for key, value in added.items()},
            return_dict=False,
        )[0]

    with torch.no_grad():
        expected = torch.cat([call(slice(0, 1)), call(slice(1, 2))])
        with bench_pipeline.half_batches(denoiser) as split:
            got = call(slice(0, 2))
    assert split["split"] == 1
    assert torch.equal(got, expected)
    assert "forward" not in vars(denoiser)


def test_results_file_replaces_the_rows_of_the_same_configuration(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.json"
    row = {"bench": "pipeline", "model": "m", "size": "1x1", "steps": 4, "mode": "one-gpu-eager", "transport": None}
    merge_rows(path, [row | {"ms": 2.0}])
    merge_rows(path, [row | {"ms": 1.0}, row | {"mode": "two-gpu-eager", "transport": "host", "ms": 0.5}])
    rows = json.loads(path.read_text())
    assert [(item["mode"], item["ms"]) for item in rows] == [("one-gpu-eager", 1.0), ("two-gpu-eager", 0.5)]
    assert [entry.name for entry in path.parent.iterdir()] == ["rows.json"]
    assert markdown_table(rows, ("mode", "transport", "ms")).splitlines()[2] == "| one-gpu-eager | - | 1 |"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "cuda:97,cuda:98"], "is not there"),
        (["--devices", "cpu"], "expected leader,follower"),
        (["--devices", "cpu,cpu", "--steps", "2"], "expected at least 3"),
        (["--devices", "cpu,cpu", "--image", "no-such.png"], "is not a file"),
    ],
)
def test_wrong_arguments_end_before_anything_is_built(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_pipeline.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("value", "message"), [(0.5, "one colour"), (float("nan"), "nan or inf")])
def test_a_picture_that_proves_nothing_fails_the_benchmark(value: float, message: str) -> None:
    bench = bench_pipeline.Bench(
        bench_pipeline.parse(["--model", "sdxl", "--scale", "tiny", "--devices", "cpu,cpu", "--steps", "3"])
    )
    bench.pipe = lambda **call: diffusers.utils.BaseOutput(images=np.full((1, 8, 8, 3), value, dtype=np.float32))
    with pytest.raises(bench_pipeline.BenchmarkError, match=message):
        bench.generate(3)


# Batched branches, sequential branches.
@pytest.mark.parametrize("model", [pytest.param("sdxl", marks=pytest.mark.thorough), "qwen-image"])
def test_dry_run_of_the_benchmark_on_two_cpu_processes(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--scale", "tiny", "--devices", "cpu,cpu", "--model", model, "--steps", "4", "--out", str(out)]
    status = bench_pipeline.main([*arguments, "--pictures", str(tmp_path)])
    captured = capsys.readouterr()
    assert status == 0, captured.out + captured.err
    one, two = json.loads(out.read_text())
    assert (one["mode"], one["transport"], one["speedup"]) == ("one-gpu-eager", None, 1.0)
    assert (two["mode"], two["transport"], two["equal"]) == ("two-gpu-eager", "host", True)
    assert two["report"]["calls_shipped"] == 4
    assert {"bench", "model", "size", "steps", "ms", "speedup", "gpu", "torch", "diffusers", "date"} <= set(two)
    assert two["ms"] > 0
    assert "half-batches" in two["equal_to"] if model == "sdxl" else two["equal_to"] == "one-gpu-eager"
    assert captured.out.count("| two-gpu-eager |") == 1
    assert len(list(tmp_path.glob("*.png"))) == 2
