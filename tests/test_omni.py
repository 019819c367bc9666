"""The offline engine: each output is the pipeline's own, and what the pipeline does not take is refused in one line."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from cfg_parallel import ConfigurationError, DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams, omni
from forked import forked_ranks
from helpers_demo import demo_model
from scripts import PREAMBLE
from test_composition import START
from tiny import TINY, picture

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked")]

TWO = {"parallel_config": DiffusionParallelConfig(cfg_parallel_size=2), "devices": ["cpu", "cpu"]}


def saved(name: str, folder: Path) -> str:
    pipe = TINY[name].build()
    pipe.save_pretrained(folder / name)
    return str(folder / name)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved("qwen_image", tmp_path_factory.mktemp("models"))


@pytest.fixture
def engine(qwen: str) -> Iterator[Omni]:
    with Omni(qwen, **TWO) as engine:
        engine.pipe.set_progress_bar_config(disable=True)
        yield engine


def params(**changes: Any) -> OmniDiffusionSamplingParams:
    return OmniDiffusionSamplingParams(
        **{"true_cfg_scale": 4.0, "num_inference_steps": 3, "height": 32, "width": 32, "seed": 3} | changes
    )


def alone(model: str, **call: Any) -> Any:
    """What diffusers gives without this package."""
    torch.set_num_threads(1)
    pipe = diffusers.DiffusionPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call)


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


CAT = {"prompt": "a cat", "negative_prompt": "low quality, blurry"}
CALL = {"true_cfg_scale": 4.0, "num_inference_steps": 3, "height": 32, "width": 32}


def test_a_prompt(engine: Omni, qwen: str) -> None:
    (output,) = engine.generate(CAT, params())
    expected = alone(qwen, **CAT, **CALL, generator=torch.Generator().manual_seed(3)).images
    assert isinstance(output.images[0], Image.Image) and same(output.images[0], expected[0])
    assert output.prompt == "a cat" and output.request_id
    assert output.metrics["steps"] == output.metrics["parallel_steps"] == 3
    assert output.metrics["devices"] == ["cpu", "cpu"] and "in parallel" in output.metrics["why"]
    assert 0 < output.metrics["denoising_seconds"] < output.metrics["seconds"] < 60


def test_a_list_of_prompts_is_one_after_the_other(engine: Omni) -> None:
    dog = CAT | {"prompt": "a dog"}
    both = engine.generate([CAT, dog], params())
    assert [output.prompt for output in both] == ["a cat", "a dog"]
    assert len({output.request_id for output in both}) == 2
    for output, prompt in zip(both, (CAT, dog), strict=True):
        assert same(output.images[0], engine.generate(prompt, params())[0].images[0])
    assert not same(both[0].images[0], both[1].images[0])


def test_several_outputs_and_other_types(engine: Omni, qwen: str) -> None:
    (output,) = engine.generate(CAT, params(num_outputs_per_prompt=2, output_type="np"))
    generator = torch.Generator().manual_seed(3)
    expected = alone(qwen, **CAT, **CALL, generator=generator, num_images_per_prompt=2, output_type="np").images
    assert len(output.images) == 2 and same(output.images, expected)
    given = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    (listed,) = engine.generate(CAT, params(num_outputs_per_prompt=2, seed=None, generator=given))
    assert not same(*listed.images)


def test_a_string_has_no_negative_prompt(engine: Omni) -> None:
    with pytest.warns(UserWarning, match="a negative prompt is needed"):
        (output,) = engine.generate("a cat", params())
    assert output.metrics["parallel_steps"] == 0


def test_steps_are_told_and_can_end_the_generation(engine: Omni, qwen: str) -> None:
    told: list[tuple[int, int]] = []
    (output,) = engine.generate(CAT, params(), on_step=lambda step, steps: told.append((step, steps)))
    assert told == [(1, 3), (2, 3), (3, 3)]

    def enough(step: int, steps: int) -> None:
        if step == 2:
            raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        engine.generate(CAT, params(), on_step=enough)
    (again,) = engine.generate(CAT, params())
    assert same(again.images[0], output.images[0]) and again.metrics["parallel_steps"] == 3
    assert not any(follower.lost for follower in engine.handle.followers)


def test_one_device_to_compare_with(engine: Omni) -> None:
    (two,) = engine.generate(CAT, params())
    (one,) = engine.generate(CAT, params(), one_device=True)
    assert same(one.images[0], two.images[0])
    assert one.metrics["devices"] == ["cpu"] and one.metrics["steps"] == 3 and one.metrics["parallel_steps"] == 0
    assert 0 < one.metrics["denoising_seconds"] < one.metrics["seconds"]


def test_a_pipeline_that_is_there_already_and_further_arguments(qwen: str) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(qwen)
    pipe.set_progress_bar_config(disable=True)
    seen: list[int] = []

    def on_step_end(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {}

    with Omni(pipe, **TWO) as mine:
        assert mine.pipe is pipe
        (output,) = mine.generate(CAT, params(), callback_on_step_end=on_step_end)
        with pytest.raises(ConfigurationError, match="takes no eta_of_nothing"):
            mine.generate(CAT, params(), eta_of_nothing=1)
    assert seen == [0, 1, 2] and output.metrics["parallel_steps"] == 3


@pytest.mark.usefixtures("small_photographs")
def test_the_code_of_the_guide() -> None:
    """An image edited, as written for vLLM-Omni but for the import, the steps and the devices."""
    photo = picture(0, 48, 48)
    engine = Omni(model=str(demo_model()), **TWO)
    outputs = engine.generate(
        {
            "prompt": "turn this cat to a dog",
            "negative_prompt": "low quality, blurry",
            "multi_modal_data": {"image": photo},
        },
        OmniDiffusionSamplingParams(true_cfg_scale=4.0, num_inference_steps=2, seed=0, height=64, width=64),
    )
    engine.close()
    expected = alone(
        str(demo_model()),
        prompt="turn this cat to a dog",
        negative_prompt="low quality, blurry",
        image=photo,
        true_cfg_scale=4.0,
        num_inference_steps=2,
        height=64,
        width=64,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert same(outputs[0].images[0], expected)


def test_frames_of_a_video(tmp_path: Path) -> None:
    model = saved("wan", tmp_path)
    with Omni(model, **TWO) as engine:
        wanted = OmniDiffusionSamplingParams(
            guidance_scale=5.0, num_inference_steps=2, height=16, width=16, num_frames=5, seed=0, output_type="np"
        )
        (output,) = engine.generate(CAT, wanted)
    assert np.asarray(output.images[0]).shape == (5, 16, 16, 3)
    assert output.metrics["parallel_steps"] == 2


def test_threads_take_turns(engine: Omni) -> None:
    results: dict[int, Any] = {}

    def work(seed: int) -> None:
        results[seed] = engine.generate(CAT, params(seed=seed))[0].images[0]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for seed in range(4):
        assert same(results[seed], engine.generate(CAT, params(seed=seed))[0].images[0])


def test_closing_ends_its_processes(qwen: str) -> None:
    before = len(psutil.Process().children(recursive=True))
    engine = Omni(qwen, **TWO)
    assert len(psutil.Process().children(recursive=True)) > before
    engine.close()
    engine.close()
    assert len(psutil.Process().children(recursive=True)) == before
    with pytest.raises(ConfigurationError, match="The engine is closed"):
        engine.generate(CAT, params())
    forgotten = Omni(qwen, **TWO)
    with pytest.warns(ResourceWarning, match="was not closed"):
        del forgotten
    assert len(psutil.Process().children(recursive=True)) == before


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        (
            CAT,
            {"num_frames": 5},
            "QwenImagePipeline takes no num_frames; it takes .*true_cfg_scale.*with the prompt neg",
        ),
        (CAT, {"cfg_normalize": True}, "takes no cfg_normalize"),
        (CAT, {"seed": "0"}, "seed to be an integer, but got '0'"),
        (CAT | {"multi_modal_data": {"image": 1}}, {}, "takes no image; it takes"),
        (CAT | {"nagative_prompt": ""}, {}, "takes no nagative_prompt"),
        ({"negative_prompt": "x"}, {}, "Expected a prompt, or a mapping with 'prompt', but got"),
        ([7], {}, "Expected a prompt"),
    ],
)
def test_what_the_pipeline_does_not_take(engine: Omni, prompt: Any, changes: dict[str, Any], message: str) -> None:
    if prompt == [7]:
        prompt = [{"prompt": 7}]
    with pytest.raises(ConfigurationError, match=message) as caught:
        engine.generate(prompt, params(**changes))
    assert "\n" not in str(caught.value)


def test_nothing_is_generated_when_one_prompt_of_a_list_is_refused(engine: Omni) -> None:
    with pytest.raises(ConfigurationError, match="takes no image"):
        engine.generate([CAT, CAT | {"image": 1}], params())
    with pytest.raises(ConfigurationError, match="before the first generation"):
        print(engine._handle.report)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cfg_parallel_size": 0}, "cfg_parallel_size to be an integer of at least 1, but got 0"),
        ({"ulysses_degree": True}, "ulysses_degree to be an integer"),
        ({"tensor_parallel_size": 2, "ring_degree": 2}, "by context or by tensor parallelism, not by both"),
    ],
)
def test_parallel_config(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        DiffusionParallelConfig(**config)


def test_refused_before_weights_are_loaded(qwen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omni, "load_pipeline", lambda *args: pytest.fail("the weights were loaded"))
    with pytest.raises(ConfigurationError, match="torchrun --nproc-per-node=4"):
        Omni(qwen, parallel_config=DiffusionParallelConfig(cfg_parallel_size=2, ulysses_degree=2))
    with pytest.raises(ConfigurationError, match="needs 2 devices, but 1 were given"):
        Omni(qwen, parallel_config=DiffusionParallelConfig(cfg_parallel_size=2), devices=["cpu"])
    with pytest.raises(ConfigurationError, match="devices to be a list such as"):
        Omni(qwen, devices="cpu")
    with pytest.raises(ConfigurationError, match="there is no folder"):
        Omni("/no/such/model", **TWO)


@pytest.mark.parametrize(
    ("processes", "config"),
    [
        (2, {"cfg_parallel_size": 2}),
        (2, {"tensor_parallel_size": 2}),
        (4, {"cfg_parallel_size": 2, "tensor_parallel_size": 2}),
    ],
)
def test_torchrun(qwen: str, tmp_path: Path, processes: int, config: dict[str, int]) -> None:
    """Every rank gets the picture. What tensor parallelism adds up it adds up in another order than one device."""
    script = tmp_path / "script.py"
    script.write_text(
        PREAMBLE.split("tiny = ")[0]
        + START["cpu"]
        + f"""
import numpy as np
from cfg_parallel import Omni, DiffusionParallelConfig, OmniDiffusionSamplingParams
with Omni({qwen!r}, parallel_config=DiffusionParallelConfig(**{config!r})) as engine:
    params = OmniDiffusionSamplingParams(
        true_cfg_scale=4.0, num_inference_steps=3, height=32, width=32, seed=3, output_type="np"
    )
    for _ in range(2):
        (output,) = engine.generate({CAT!r}, params)
    np.save({str(tmp_path)!r} + f"/image{{rank}}.npy", np.stack(output.images))
    expected = 3 if {config.get("cfg_parallel_size", 1)} == 2 else 0
    assert output.metrics.get("parallel_steps", expected) == expected, output.metrics
dist.destroy_process_group()
"""
    )
    status, output = forked_ranks(script, processes)
    assert status == 0, output[-3000:]
    expected = np.stack(alone(qwen, **CAT, **CALL, generator=torch.Generator().manual_seed(3), output_type="np").images)
    images = [np.load(tmp_path / f"image{rank}.npy") for rank in range(processes)]
    assert all(same(image, images[0]) for image in images)
    if "tensor_parallel_size" in config:
        np.testing.assert_allclose(images[0], expected, atol=1e-3)
    else:
        assert same(images[0], expected)
