"""The command line: bad input ends with one line and status 2 before any weight is loaded; good input gives a
picture."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import cfg_parallel
from cfg_parallel.cli import main
from cfg_parallel.errors import ConfigurationError
from cfg_parallel.images import check_output, load_image
from helpers_demo import demo_model, gradient, save_photo

Run = Callable[..., str]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    return save_photo(tmp_path / "photo.png")


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], photo: Path) -> Run:
    """Runs `edit` with arguments that cannot work and returns the one line it ends with. Loading a model fails the
    test."""

    def load(*args: object, **kwargs: object) -> None:
        pytest.fail("a model was loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)

    def run(*extra: str, model: Path | str | None = None, image: Path | None = photo, output: str = "out.png") -> str:
        model = demo_model() if model is None else model
        images = [] if image is None else [f"--image={image}"]
        output = str(photo.parent / output)
        capsys.readouterr()  # building the demo model, the first time, shows a progress bar
        assert main(["edit", f"--model={model}", *images, "--prompt=p", f"--output={output}", *extra]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("cfg-parallel: error: ")
        assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
        return printed.err

    return run


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"cfg-parallel {cfg_parallel.__version__}\n"


def test_what_needs_no_torch_is_checked_without_it(tmp_path: Path, photo: Path) -> None:
    """So that help and the commonest mistakes answer at once."""
    base = ["edit", "--prompt=p", "--model", str(tmp_path), "--output", str(tmp_path / "out.png")]
    cases = [
        ["edit"],
        [*base, "--image", str(tmp_path / "missing.png")],
        [*base, "--image", str(photo)],  # no model_index.json
        [*base, "--image", str(photo), "--output", str(tmp_path / "none" / "out.png")],
        [*base, "--num-inference-steps", "0"],
    ]
    program = (
        "import sys, json\n"
        "from cfg_parallel.cli import main\n"
        "codes = [main(case) for case in json.loads(sys.argv[1])]\n"
        "heavy = {'torch', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "print(json.dumps([codes, sorted(heavy)]))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [[2] * len(cases), []]
    lines = done.stderr.splitlines()
    assert len(lines) == len(cases)
    assert all(line.startswith("cfg-parallel: error: ") for line in lines)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--num-inference-steps", "0"], "at least 1"),
        (["--num-inference-steps", "many"], "at least 1"),
        (["--cfg-parallel-size", "0"], "at least 1"),
        (["--height", "-8"], "at least 1"),
        (["--width", "0"], "at least 1"),
        (["--seed", "-1"], "from 0"),
        (["--cfg-scale", "nan"], "a number"),
        (["--dtype", "int8"], "bfloat16"),
        (["--devices", "tpu:0,tpu:1"], "cuda:0,cuda:1"),
        (["--devices", "cpu"], "--cfg-parallel-size"),
        (["--compare", "--cfg-parallel-size", "1"], "--compare"),
        (["--no-such-flag"], "--help"),
    ],
)
def test_a_bad_argument(refused: Run, extra: list[str], said: str) -> None:
    assert said in refused(*extra)


def test_a_missing_image(refused: Run, tmp_path: Path) -> None:
    assert "missing.png" in refused(image=tmp_path / "missing.png")


def test_a_folder_as_image(refused: Run, tmp_path: Path) -> None:
    assert "folder" in refused(image=tmp_path)


def test_a_file_that_is_no_image(refused: Run, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_text("not a picture")
    assert "notes.png" in refused(image=path)
    path.write_bytes(b"")
    assert "notes.png" in refused(image=path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_a_truncated_image(refused: Run, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"photo.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    assert path.name in refused(image=path)


def test_a_folder_without_a_model(refused: Run, tmp_path: Path, photo: Path) -> None:
    assert "model_index.json" in refused(model=tmp_path)
    assert "model_index.json" in refused(model=photo)
    assert "no folder" in refused(model=tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"_class_name": ["a", "b"]}'])
def test_a_damaged_model_index(refused: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "model_index.json").write_text(text)
    assert "model_index.json" in refused(model=tmp_path)


@pytest.mark.parametrize("name", ["NoSuchPipeline", "AutoencoderKL", "utils"])
def test_an_unknown_pipeline_class(refused: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    assert name in refused(model=tmp_path)


@pytest.mark.parametrize("entry", [["diffusers", "NoSuchTransformer"], ["no_such_library", "Transformer"]])
def test_an_unknown_component_class(refused: Run, tmp_path: Path, entry: list[str]) -> None:
    index = json.loads((demo_model() / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer": entry}))
    line = refused(model=tmp_path)
    assert entry[1] in line and entry[0] in line


def test_damaged_weights_end_with_one_line(tmp_path: Path, photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(demo_model(), model)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    status = main(
        [
            "edit",
            f"--model={model}",
            f"--image={photo}",
            "--prompt=p",
            f"--output={tmp_path / 'o.png'}",
            "--devices=cpu,cpu",
        ]
    )
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cfg-parallel: error: ")]
    assert status == 2
    assert len(lines) == 1 and str(model) in lines[0]


def _index_of(folder: Path, pipeline: str) -> Path:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


def test_how_many_images_a_pipeline_takes(refused: Run, tmp_path: Path, photo: Path) -> None:
    assert "--image" in refused(image=None)
    assert "one picture" in refused(f"--image={photo}")
    assert "no picture" in refused(model=_index_of(tmp_path, "QwenImagePipeline"))
    assert "--image" in refused(model=_index_of(tmp_path, "QwenImageEditPlusPipeline"), image=None)
    assert "video" in refused(model=_index_of(tmp_path, "WanPipeline"), image=None)
    assert "mask_image" in refused(model=_index_of(tmp_path, "QwenImageInpaintPipeline"))
    assert "control_image" in refused(model=_index_of(tmp_path, "QwenImageControlNetPipeline"), image=None)


def test_call_arguments_are_the_pipelines_own(photo: Path) -> None:
    from cfg_parallel.cli import _parser
    from cfg_parallel.preflight import call_arguments

    args = _parser().parse_args(
        ["edit", "--model=m", "--prompt=p", "--negative-prompt=n", "--output=o.png", "--cfg-scale=3", "--height=512"]
    )
    image = load_image(photo)
    call = call_arguments(diffusers.QwenImageEditPipeline, args, [image])
    assert call == {
        "prompt": "p",
        "negative_prompt": "n",
        "num_inference_steps": 50,
        "true_cfg_scale": 3.0,
        "height": 512,
        "image": image,
    }
    assert call_arguments(diffusers.QwenImageEditPlusPipeline, args, [image, image])["image"] == [image, image]
    sd = call_arguments(diffusers.StableDiffusionPipeline, args, [])
    assert sd["guidance_scale"] == 3.0 and "true_cfg_scale" not in sd and "image" not in sd
    assert "image" not in call_arguments(diffusers.FluxKontextPipeline, args, [])


@pytest.mark.parametrize(
    ("gpus", "extra", "said"),
    [
        (1, [], "cpu,cpu"),
        (2, ["--cfg-parallel-size", "3"], "3 GPUs"),
        (0, ["--devices", "cuda:0,cuda:1"], "no GPU is visible"),
        (2, ["--devices", "cuda:1,cuda:2"], "cuda:2"),
        (2, ["--devices", "cuda:0,cuda:0"], "twice"),
        (2, ["--devices", "cpu,cuda:0"], "mixes"),
        (0, ["--transport", "nccl"], "nccl"),
        (0, ["--cuda-graphs", "on"], "--cuda-graphs on needs GPUs, but would run on cpu,cpu"),
    ],
)
def test_devices_that_are_not_there(
    refused: Run, monkeypatch: pytest.MonkeyPatch, gpus: int, extra: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert said in refused(*extra)


def test_default_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    from cfg_parallel.preflight import choose_devices

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_devices(2, None, "auto") == ["cpu", "cpu"]
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_devices(2, None, "auto") == ["cuda:0", "cuda:1"]
    assert choose_devices(1, ["cuda"], "auto") == ["cuda:0"]


def test_an_output_that_cannot_be_written(refused: Run, tmp_path: Path) -> None:
    assert "does not exist" in refused(output="missing/out.png")
    assert ".xyz" in refused(output="out.xyz")
    assert "suffix" in refused(output="out")
    assert ".psd" in refused(output="out.psd")  # Pillow reads it and does not write it
    assert ".xbm" in refused(output="out.xbm")  # Pillow writes it, though not in colour
    (tmp_path / "folder.png").mkdir()
    assert "folder" in refused(output="folder.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.png", "photo.png"]


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG", "webp", "tiff", "bmp"])
def test_usual_outputs_are_accepted(tmp_path: Path, suffix: str) -> None:
    check_output(tmp_path / f"out.{suffix}")


# ----------------------------------------------------------------------------------------------------- reading pictures


def _values(path: Path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"])
def test_every_mode_gives_the_same_picture(tmp_path: Path, mode: str) -> None:
    grey = gradient()
    if mode == "1":
        grey = np.where(grey < 128, 0, 255).astype(np.uint8)
        image = Image.fromarray(grey).convert("1")
    elif mode in ("I;16", "I"):
        image = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode == "LAB":
        image = Image.merge("LAB", [Image.fromarray(grey), *[Image.new("L", (64, 48), 128)] * 2])
    elif mode == "P":
        image = Image.fromarray(grey).quantize(256)
    else:
        image = Image.fromarray(grey).convert("RGB").convert(mode)
    assert image.mode == mode
    path = tmp_path / ("image.png" if mode in ("1", "L", "P", "RGB", "RGBA", "LA", "I;16") else "image.tif")
    image.save(path)
    values = _values(path).astype(int)
    if mode == "LAB":  # lightness is not linear in grey: only the direction and the ends are known
        assert (np.diff(values[0, :, 0]) >= 0).all() and values.min() <= 2 and values.max() >= 253
    else:
        assert np.abs(values - grey[..., None].astype(int)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = Image.fromarray(gradient()).convert("RGB")
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(_values(tmp_path / "photo.png"), np.asarray(upright))


def test_transparent_parts_become_white(tmp_path: Path) -> None:
    for mode, clear in (("RGBA", (10, 20, 30, 0)), ("LA", (10, 0))):
        Image.new(mode, (8, 8), clear).save(tmp_path / "clear.png")
        assert (_values(tmp_path / "clear.png") == 255).all()
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    half.save(tmp_path / "half.png")
    assert (np.abs(_values(tmp_path / "half.png").astype(int) - 127) <= 1).all()
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([0, 0, 0] * 4)
    palette.save(tmp_path / "palette.png", transparency=3)
    assert (_values(tmp_path / "palette.png") == 255).all()


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "both.gif", save_all=True, append_images=frames[1:])
    assert (_values(tmp_path / "both.gif") == (255, 0, 0)).all()


def test_grey_values_without_a_usual_range_are_refused(tmp_path: Path) -> None:
    for low, high in ((-1.0, 1.0), (0.0, float("nan")), (0.0, 1e6)):
        Image.fromarray(np.array([[low, high]], dtype=np.float32)).save(tmp_path / "float.tif")
        with pytest.raises(ConfigurationError, match="grey values"):
            load_image(tmp_path / "float.tif")


# ------------------------------------------------------------------------------------------------------------- main job


def _edit(photo: Path, output: Path, *extra: str) -> list[str]:
    return [
        "edit", f"--model={demo_model()}", f"--image={photo}", "--prompt=turn it into a painting",
        "--negative-prompt=low quality, blurry", "--cfg-scale=4.0", f"--output={output}", "--num-inference-steps=2",
        "--height=256", "--width=256", *extra,
    ]  # fmt: skip


@pytest.mark.usefixtures("small_photographs")
def test_edit_on_two_processes_gives_the_picture_of_one(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.png"
    assert main(_edit(photo, output, "--devices=cpu,cpu", "--compare")) == 0
    printed = capsys.readouterr().out
    assert "equal, element for element" in printed
    assert "2 with guidance" in printed and "host" in printed and "speed-up" in printed
    with Image.open(output) as image:
        assert image.size == (256, 256)
        assert np.asarray(image).std() > 10, "a picture, not one colour"

    other = tmp_path / "other.png"
    assert main(_edit(photo, other, "--cfg-parallel-size=1", "--devices=cpu", "--seed=1")) == 0
    assert not np.array_equal(np.asarray(Image.open(other)), np.asarray(Image.open(output)))


def test_compare_says_when_the_pictures_differ(capsys: pytest.CaptureFixture[str]) -> None:
    from cfg_parallel.edit import _compare, _Run

    black = _Run([Image.new("RGB", (4, 4))], steps=2, denoising_s=2.0, total_s=3.0)
    grey = _Run([Image.new("RGB", (4, 4), (0, 7, 0))], steps=2, denoising_s=1.0, total_s=2.0)
    assert _compare(black, grey, ["cpu", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "DIFFERENT: 16 of 48 values, by at most 7" in printed and "2.00x" in printed
    assert _compare(black, black, ["cpu", "cpu"]) == 0


def test_what_the_pipeline_refuses_is_one_line(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own check of the arguments is bad input; any other ValueError would be a defect and keeps its traceback."""
    from cfg_parallel.edit import _generate

    class Strict:
        def check_inputs(self) -> None:
            raise ValueError("`height` has to be divisible by 8.\nmore")

        def progress_bar(self, total: int) -> None: ...

        def __call__(self, num_inference_steps: int) -> None:
            self.check_inputs()

    class Broken(Strict):
        def check_inputs(self) -> None: ...

        def __call__(self, num_inference_steps: int) -> None:
            raise ValueError("a defect")

    from argparse import Namespace

    args = Namespace(seed=0, num_inference_steps=1)
    with pytest.raises(ConfigurationError, match="divisible by 8"):
        _generate(Strict(), {"num_inference_steps": 1}, args, "cpu")
    with pytest.raises(ValueError, match="a defect") as caught:
        _generate(Broken(), {"num_inference_steps": 1}, args, "cpu")
    assert not isinstance(caught.value, ConfigurationError)


def test_demo_model_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--model-only", f"--model-dir={tmp_path / 'model'}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'model'}\n"
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_demo_refuses_what_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"--output={tmp_path / 'out.png'}"
    (tmp_path / "diary.txt").write_text("dear diary")
    for extra in (
        ["--num-inference-steps=1"],
        [f"--model-dir={tmp_path}"],
        [f"--output={tmp_path / 'no' / 'out.png'}"],
    ):
        assert main(["demo", output, *extra]) == 2
        error = capsys.readouterr().err
        assert error.startswith("cfg-parallel: error: ") and error.count("\n") == 1
    assert (tmp_path / "diary.txt").is_file()


def test_the_example_is_the_command(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "examples/offline_inference/image_to_image/image_edit.py"
    flags = ["--model", str(tmp_path), "--prompt", "p", "--output", str(tmp_path / "o.png")]
    done = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("cfg-parallel: error: ") and "model_index.json" in done.stderr


# models


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from cfg_parallel import cli

    assert cli.main(["models"]) == 0
    everything = capsys.readouterr().out.splitlines()
    assert len(everything) > 200 and everything[0].split() == ["pipeline", "pattern", "result", "rule", "graph", "note"]
    assert cli.main(["models", "stablediffusionimg", "LDMText", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["pipeline"] for row in rows] == ["LDMTextToImagePipeline", "StableDiffusionImg2ImgPipeline"]
    assert cli.main(["models", "nothing"]) == 2
    assert "No pipeline with guidance is named like nothing" in capsys.readouterr().err
