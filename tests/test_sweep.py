"""The table of pipelines: complete, true to what was run, and some run again. `python tests/sweep` runs all."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback, SDXLCFGCutoffCallback

from cfg_parallel import enable_cfg_parallel
from sweep.compare import Row, cases, compare, listed, markdown, run, same
from sweep.session import Session
from tiny import TINY, generate

pytestmark = pytest.mark.timeout(180)

TABLE = Path(__file__).parents[1] / "docs" / "supported_pipelines.json"
# Every way to apply guidance, and to be in the way of sharing.
SOME = [
    "AceStepPipeline",
    "AuraFlowPipeline",
    "Cosmos2TextToImagePipeline",
    "Cosmos3OmniPipeline",
    "IFSuperResolutionPipeline",
    "EasyAnimateControlPipeline",
    "Flux2KleinPipeline",
    "GlmImagePipeline",
    "HiDreamImagePipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideoFramepackPipeline",
    "Ideogram4Pipeline",
    "LEditsPPPipelineStableDiffusion",
    "LTX2Pipeline",
    "Lumina2Pipeline",
    "OmniGenPipeline",
    "PixArtSigmaPAGPipeline",
    "QwenImage21Pipeline",
    "QwenImageEditPlusPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "StableVideoDiffusionPipeline",
    "ZImageControlNetPipeline",
]
# More families, in one of those ways.
MORE = [
    "AnimateDiffControlNetPipeline",
    "AnyFlowFARPipeline",
    "AudioLDM2Pipeline",
    "BriaPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogView4Pipeline",
    "FluxKontextPipeline",
    "HunyuanDiTControlNetPipeline",
    "JoyImageEditPlusPipeline",
    "Kandinsky5T2VPipeline",
    "KandinskyV22ControlnetPipeline",
    "LTXConditionPipeline",
    "ShapEPipeline",
    "SkyReelsV2DiffusionForcingPipeline",
    "StableAudioPipeline",
    "StableDiffusion3ControlNetPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionXLControlNetUnionInpaintPipeline",
    "WanAnimatePipeline",
    "WanVACEPipeline",
]


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session()
    yield session
    session.close()


@pytest.mark.parametrize("name", [*SOME, *(pytest.param(name, marks=pytest.mark.thorough) for name in MORE)])
def test_two_processes_give_what_one_device_gives(session: Session, name: str) -> None:
    answer = session.ask(name)
    row = answer.row
    assert answer.good, f"{row['note']}\n{answer.printed}"
    told = {each["pipeline"]: each for each in json.loads(TABLE.read_text())}[name]
    for key in ("supported", "calls_shipped_per_step", "rule", "note"):
        assert row[key] == told[key], f"docs/supported_pipelines.json is not up to date: {key}"


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("guider", ["AutoGuidance", "SkipLayerGuidance", "ClassifierFreeZeroStarGuidance"])
def test_guiders_that_hook_the_denoiser_for_one_pass(guider: str) -> None:
    """Such a pass runs where the hooks are."""
    skip = diffusers.LayerSkipConfig(indices=[0], fqn="transformer_blocks", skip_ff=True, skip_attention=False)
    settings: dict[str, dict[str, Any]] = {
        "AutoGuidance": {"auto_guidance_config": skip},
        "SkipLayerGuidance": {
            "skip_layer_config": skip,
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 1.0,
        },
        "ClassifierFreeZeroStarGuidance": {},
    }
    case = cases()["HunyuanVideo15Pipeline"]
    made = getattr(diffusers, guider)(**settings[guider])
    case = dataclasses.replace(case, parts={**case.parts, "guider": made})
    compare(case, Row(case.pipeline, "E", False))


# Guidance that comes and goes, and branches that come and go with it.
CHANGING: dict[str, dict[str, Any]] = {
    "Lumina2Pipeline": {"cfg_trunc_ratio": 0.5},
    "ZImagePipeline": {"cfg_truncation": 0.5},
    "WanPipeline": {"guidance_scale_2": 1.0},
    "StableDiffusionPipeline": {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=0.5)},
    "StableDiffusionXLPipeline": {"callback_on_step_end": SDXLCFGCutoffCallback(cutoff_step_ratio=0.5)},
    "StableDiffusion3Pipeline": {"skip_guidance_layers": [0]},  # a third call, in some of the steps
}


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", CHANGING)
def test_guidance_that_changes_on_the_way(name: str) -> None:
    case = cases()[name]
    compare(dataclasses.replace(case, call={**case.call, **CHANGING[name]}), Row(name, "", False))


@pytest.mark.usefixtures("forked")
def test_two_images_without_guidance_are_no_branches() -> None:
    case = cases()["ZImagePipeline"]
    off = {"num_images_per_prompt": 2, "guidance_scale": 0.0}
    expected = run(case.build(), case.arguments(**off))
    pipe = case.build()
    with pytest.warns(UserWarning, match="guidance was off"), enable_cfg_parallel(pipe, devices=["cpu"] * 2) as handle:
        for _ in range(2):
            assert same(run(pipe, case.arguments(**off)), expected)
        assert handle.report.guided_steps == 0


@pytest.mark.usefixtures("forked")
def test_branches_come_and_go_in_any_order() -> None:
    """Whatever the last step had is a wrong guess for the next one."""
    tiny = TINY["wan"]
    plain, enabled = tiny.build(), tiny.build()

    def generated(pipe: Any, guided: tuple[bool, ...]) -> torch.Tensor:
        def on_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            pipe._guidance_scale = 4.0 if guided[step] else 1.0
            return {}

        image: torch.Tensor = generate(pipe, tiny.inputs(num_inference_steps=len(guided), callback_on_step_end=on_step))
        return image

    with enable_cfg_parallel(enabled, devices=["cpu", "cpu"]) as handle:
        for guided in itertools.product([True, False], repeat=4):
            assert torch.equal(generated(enabled, guided), generated(plain, guided)), guided
            assert handle.report.guided_steps == 1 + sum(guided[:3])


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", ["LTX2Pipeline", "StableDiffusionInstructPix2PixPipeline"])
def test_four_devices(name: str) -> None:
    row = compare(cases()[name], Row(name, "", False), ["cpu"] * 4)
    assert row.calls_shipped_per_step == 2


def test_every_case_is_a_listed_pipeline() -> None:
    assert set(cases()) <= set(listed())
    assert {*SOME, *MORE} <= set(cases())
    assert [name for name in listed() if not hasattr(diffusers, name)] == []


def test_the_table_is_of_all_pipelines() -> None:
    table = json.loads(TABLE.read_text())
    assert {row["pipeline"] for row in table} == set(listed())
    assert all(row.keys() == Row("", "", False).to_dict().keys() for row in table)
    assert TABLE.with_suffix(".md").read_text() == markdown(table)


def test_what_is_not_shared_says_why() -> None:
    for row in json.loads(TABLE.read_text()):
        assert row["equal"] is not False, row
        assert row["supported"] or row["equal"] is None or row["note"], row
