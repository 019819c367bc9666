"""The tiny pipelines are good test subjects: finite, repeatable, and guidance, batches and sizes matter in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from reference import reference, run_branches_one_by_one
from tiny import SCHEDULERS, STOCHASTIC_SCHEDULERS, TINY, Tiny, generate, with_scheduler

FLOW = {"flow_euler_stochastic"}
BATCHED = [name for name, tiny in TINY.items() if tiny.pattern != "B"]


@pytest.fixture(scope="module")
def pipes() -> dict[str, DiffusionPipeline]:
    return {}


@pytest.fixture(params=TINY)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return TINY[request.param]


@pytest.fixture
def pipe(tiny: Tiny, pipes: dict[str, DiffusionPipeline]) -> DiffusionPipeline:
    if tiny.name not in pipes:
        pipes[tiny.name] = tiny.build()
    return pipes[tiny.name]


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Far beyond rounding: by a hundredth of the values' spread."""
    return bool((a - b).abs().max() > 0.01 * a.std())


def denoiser_calls(tiny: Tiny, pipe: DiffusionPipeline, inputs: dict[str, Any]) -> list[tuple[tuple, dict[str, Any]]]:
    calls: list[tuple[tuple, dict[str, Any]]] = []
    hook = getattr(pipe, tiny.denoiser).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        generate(pipe, inputs)
    finally:
        hook.remove()
    return calls


def test_finite_and_repeatable(tiny: Tiny, pipe: DiffusionPipeline) -> None:
    first = generate(pipe, tiny.inputs())
    assert torch.isfinite(first).all() and first.std() > 0.1
    assert torch.equal(first, generate(pipe, tiny.inputs()))
    assert torch.equal(first, generate(tiny.build(), tiny.inputs()))
    assert differ(first, generate(pipe, tiny.inputs(seed=1)))


def test_guidance_matters(tiny: Tiny, pipe: DiffusionPipeline) -> None:
    guided = generate(pipe, tiny.inputs())
    assert differ(guided, generate(pipe, tiny.inputs(**{tiny.scale_kwarg: 6.0})))
    assert differ(guided, generate(pipe, tiny.inputs(**{tiny.scale_kwarg: 1.0})))
    assert differ(guided, generate(pipe, tiny.inputs(negative_prompt="a dog on a sofa")))
    assert differ(guided, generate(pipe, tiny.inputs(prompt="a red dog")))
    if tiny.pattern == "C":
        assert differ(guided, generate(pipe, tiny.inputs(image_guidance_scale=3.0)))


def test_decodes(tiny: Tiny, pipe: DiffusionPipeline) -> None:
    decoded = generate(pipe, tiny.inputs(output_type="pt"))
    assert torch.isfinite(decoded).all() and decoded.shape[-2:] == tiny.size


def test_batches_and_sizes(tiny: Tiny, pipe: DiffusionPipeline) -> None:
    one = generate(pipe, tiny.inputs())
    many = [generate(pipe, tiny.inputs(num_images_per_prompt=2))]
    if tiny.max_batch >= 2:
        many.append(generate(pipe, tiny.inputs(batch=2)))
    for result in many:
        assert result.shape == (2, *one.shape[1:])
        assert torch.isfinite(result).all() and differ(result[0], result[1])
    other = generate(pipe, tiny.inputs(size=tiny.other_size))
    assert other.numel() > one.numel() and torch.isfinite(other).all()


def test_pattern(tiny: Tiny, pipe: DiffusionPipeline) -> None:
    """The pattern's number of calls and rows, for each of the steps of a scheduler that makes one call per step."""
    inputs = tiny.inputs(num_images_per_prompt=2)
    calls = denoiser_calls(tiny, pipe, inputs)
    rows = [(args[0] if args else kwargs["hidden_states"]).shape[0] for args, kwargs in calls]
    steps = len(pipe.scheduler.timesteps)
    assert rows == ([2] * steps * 2 if tiny.pattern == "B" else [2 * tiny.num_branches] * steps)
    off = denoiser_calls(tiny, pipe, tiny.inputs(**{tiny.scale_kwarg: 1.0}))
    assert len(off) == steps


@pytest.mark.parametrize("tiny", [TINY["qwen_image"], TINY["qwen_image_edit"]], ids=lambda tiny: tiny.name)
def test_qwen_prompts_differ_in_length(tiny: Tiny, pipe: DiffusionPipeline) -> None:
    """The branches' embeddings differ in length, and start at the prompt: the pipeline drops just the template."""
    (_, cond), (_, uncond) = denoiser_calls(tiny, pipe, tiny.inputs())[:2]
    assert cond["encoder_hidden_states"].shape[1] > uncond["encoder_hidden_states"].shape[1]
    assert cond["encoder_hidden_states_mask"] is None
    head = pipe.prompt_template_encode.split("{}")[0].split("<|vision_start|>")[0]
    assert len(pipe.tokenizer(head).input_ids) == pipe.prompt_template_encode_start_idx
    (_, cond), _ = denoiser_calls(tiny, pipe, tiny.inputs(batch=2))[:2]
    assert not cond["encoder_hidden_states_mask"].all()


def test_edit_sizes_are_small_only_inside_the_call() -> None:
    tiny = TINY["qwen_image_edit"]
    (_, kwargs), *_ = denoiser_calls(tiny, tiny.build(), tiny.inputs())
    assert kwargs["img_shapes"] == [[(1, 4, 4), (1, 4, 4)]]  # 4 pixels to a latent, 2 latents to a patch
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        assert module.calculate_dimensions(1024 * 1024, 1.0)[:2] == (1024, 1024)


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"num_images_per_prompt": 2}], ids=["1", "batch", "per-prompt"])
def test_reference(tiny: Tiny, pipe: DiffusionPipeline, options: dict[str, int]) -> None:
    """One by one is the pipeline's own result but for the rounding of a matmul of another size."""
    if options.get("batch", 1) > tiny.max_batch:
        pytest.skip(f"{tiny.name} takes one prompt")
    expected = reference(tiny, pipe, tiny.inputs(**options))
    assert torch.equal(expected, reference(tiny, pipe, tiny.inputs(**options)))
    torch.testing.assert_close(generate(pipe, tiny.inputs(**options)), expected, rtol=1e-3, atol=1e-3)
    assert "forward" not in vars(getattr(pipe, tiny.denoiser))


@pytest.mark.parametrize("name", BATCHED)
def test_reference_splits_rows(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.build()
    denoiser = getattr(pipe, tiny.denoiser)
    seen: list[int] = []
    next(denoiser.children()).register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    run_branches_one_by_one(
        pipe, tiny.inputs(batch=2), tiny.num_branches, rows=2 * tiny.num_branches, denoiser=tiny.denoiser
    )
    assert seen == [2] * tiny.num_branches * len(pipe.scheduler.timesteps)


@pytest.mark.parametrize(
    ("pipeline", "scheduler"),
    [("sd15", name) for name in sorted(SCHEDULERS.keys() - FLOW)]
    + [(pipeline, name) for pipeline in ("sd3", "flux", "qwen_image") for name in sorted(FLOW)],
)
def test_schedulers(pipeline: str, scheduler: str) -> None:
    tiny = TINY[pipeline]
    pipe = tiny.build()
    before = pipe.scheduler.config
    extra = with_scheduler(pipe, scheduler)
    assert pipe.scheduler.config != before or type(pipe.scheduler).__name__ != before._class_name
    result = generate(pipe, tiny.inputs(**extra))
    assert torch.isfinite(result).all()
    assert torch.equal(result, generate(pipe, tiny.inputs(**extra)))
    expected = reference(tiny, pipe, tiny.inputs(**extra))
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-3)
    latents = {"latents": start(tiny, pipe)}
    noises = [generate(pipe, tiny.inputs(seed, **latents, **extra), seed) for seed in (1, 2)]
    assert torch.equal(*noises) == (scheduler not in STOCHASTIC_SCHEDULERS)


def start(tiny: Tiny, pipe: DiffusionPipeline) -> torch.Tensor:
    """First latents, so that only a scheduler's own noise differs between two seeds."""
    return torch.randn(generate(pipe, tiny.inputs()).shape, generator=torch.Generator().manual_seed(3))
