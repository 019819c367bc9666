"""The benchmarks without a GPU: text encoders, what is counted and compared, both sides of the exchange as threads."""

from __future__ import annotations

import ctypes
import multiprocessing
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import test_program

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_combine, bench_compile, bench_peer_combine, bench_serving, clip_t5_text, models, timing
from benchmarks.model_specs import CLIP_G, CLIP_L, CLIP_L_PROJECTED, SPECS, T5_XXL, UMT5_XXL, TextEncoder
from benchmarks.random_weights import parameters_on_meta

from cfg_parallel import extension
from cfg_parallel.program import DTYPES, interpret

CPU = torch.device("cpu")
FOLDER = Path(bench_combine.__file__).parent


@pytest.mark.parametrize("script", ["bench_combine", "bench_peer_combine"])
def test_without_the_gpus_one_line_and_exit_status_2(script: str) -> None:
    if torch.cuda.device_count() >= 2:
        pytest.skip("there are GPUs")
    code = f"import sys; sys.path.insert(0, {str(FOLDER.parent)!r})\nfrom benchmarks import {script} as script\n"
    code += "sys.exit(script.main(['--quick']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{script}: ") and done.stderr.count("\n") == 1 and "GPU" in done.stderr


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (bench_combine, ["--rules", "cfg,cgf"], "got 'cgf'"),
        (bench_combine, ["--bytes", "1000"], "multiple of 256, but got 1000"),
        (bench_combine, ["--repeat", "0"], "at least 1"),
        (bench_peer_combine, ["--sizes", "1000"], "multiples of 256 up to 64 MiB, but got 1000"),
        (bench_peer_combine, ["--sizes", str(128 << 20)], "up to 64 MiB"),
        (bench_peer_combine, ["--stress", "-1"], "number of exchanges"),
        (bench_serving, ["--devices", "cpu,cpu", "--clients", "0"], "at least 1"),
        (bench_serving, ["--model", "sdxl"], "invalid choice"),
        (bench_compile, ["--processes", "1"], "at least 2 --processes"),
        (bench_compile, ["--models", "wan21-1.3b"], "expected some of"),
    ],
)
def test_wrong_arguments(script: Any, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        script.parse(arguments)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_differing_compares_bits_and_takes_nan_for_nan() -> None:
    nan = float("nan")
    for dtype in DTYPES:
        a = torch.tensor([0.0, 1.0, nan, nan, 2.0], dtype=dtype)
        b = torch.tensor([-0.0, 1.0, nan, 3.0, 2.0], dtype=dtype)
        b[2] = -b[2]
        assert timing.differing(a, b) == 2


def test_spread_and_gbps() -> None:
    assert timing.spread([3.0]) == {"us": 3.0, "us_p10": 3.0, "us_p90": 3.0}
    assert timing.spread([float(x) for x in range(11)]) == {"us": 5.0, "us_p10": 1.0, "us_p90": 9.0}
    assert timing.gbps(64 << 20, 173.0) == 387.9


# The text encoders.

PROMPTS = [models.PROMPT, models.NEGATIVE_PROMPT]
ENCODERS = [CLIP_L, CLIP_L_PROJECTED, CLIP_G, T5_XXL, UMT5_XXL]
PARAMETERS = [123_060_480, 123_650_304, 694_659_840, 4_762_310_656, 5_680_910_336]  # of the checkpoints


@pytest.mark.parametrize(("encoder", "count"), list(zip(ENCODERS, PARAMETERS, strict=True)))
def test_text_encoder_has_the_published_number_of_parameters(encoder: TextEncoder, count: int) -> None:
    with parameters_on_meta():
        model = clip_t5_text.construct_encoder(encoder)
    assert all(param.is_meta for param in model.parameters())
    assert sum(param.numel() for param in model.parameters()) == count


@pytest.mark.parametrize("name", [name for name in SPECS if name != "qwen-image-edit"])  # which makes a megapixel
def test_both_prompts_go_in_as_text_and_change_the_picture(name: str) -> None:
    tiny: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "scale": "tiny", "text_encoders": True}
    pipe = models.build_pipeline(name, **tiny)
    pipe.set_progress_bar_config(disable=True)
    assert not [part for part, value in pipe.components.items() if "text_encoder" in part and value is None]

    def generate(**changes: Any) -> np.ndarray:
        output = pipe(**(models.inputs(name, size=32, steps=2, **tiny) | changes))
        return np.asarray(output.frames if hasattr(output, "frames") else output.images)

    call = models.inputs(name, size=32, **tiny)
    assert all(isinstance(call[key], str) for key in ("prompt", "negative_prompt"))
    assert not [key for key in call if "embeds" in key]
    picture = generate()
    assert np.isfinite(picture).all() and picture.std() > 0.05
    for changes in ({"prompt": "a red dog"}, {"negative_prompt": "ugly"}, models.guidance_off(name)):
        assert (picture != generate(**changes)).mean() > 0.5, changes


@pytest.mark.parametrize("name", [name for name in SPECS if not name.startswith("qwen")])
def test_random_embeddings_have_the_shapes_of_encoded_prompts(name: str) -> None:
    """Without text encoders, a step costs what it costs with them."""
    tiny: dict[str, Any] = {"device": "cpu", "dtype": torch.float32, "scale": "tiny"}
    denoiser = SPECS[name].denoiser_attribute
    shapes = []
    for text_encoders in (False, True):
        pipe = models.build_pipeline(name, text_encoders=text_encoders, **tiny)
        pipe.set_progress_bar_config(disable=True)
        calls: list[dict[str, Any]] = []
        getattr(pipe, denoiser).register_forward_pre_hook(
            lambda module, args, kwargs, calls=calls: calls.append(kwargs), with_kwargs=True
        )
        pipe(**models.inputs(name, size=32, steps=1, text_encoders=text_encoders, **tiny))
        flat = [call | (call.get("added_cond_kwargs") or {}) for call in calls]
        shapes.append([{key: v.shape for key, v in call.items() if isinstance(v, torch.Tensor)} for call in flat])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoder", [CLIP_G, T5_XXL, UMT5_XXL], ids=lambda encoder: encoder.model)
def test_dtypes_of_a_text_encoder_are_those_of_from_pretrained(
    encoder: TextEncoder, dtype: torch.dtype, tmp_path: Path
) -> None:
    built = clip_t5_text.build_encoder(encoder, device="cpu", dtype=dtype, seed=0, scale="tiny")
    clip_t5_text.construct_encoder(encoder, scale="tiny").save_pretrained(tmp_path)
    loaded = type(built).from_pretrained(tmp_path, dtype=dtype)
    dtypes = [{key: value.dtype for key, value in model.named_parameters()} for model in (built, loaded)]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("size", [{"num_layers": 24}, {"num_heads": 64, "d_kv": 64}])
@pytest.mark.parametrize("encoder", [T5_XXL, UMT5_XXL], ids=lambda encoder: encoder.model)
def test_t5_in_bf16_is_finite_and_tells_prompts_apart(encoder: TextEncoder, size: dict[str, int]) -> None:
    large = replace(encoder, real=encoder.tiny | size)
    model = clip_t5_text.build_encoder(large, device="cpu", dtype=torch.bfloat16, seed=0)
    tokens = clip_t5_text.make_tokenizer(large, PROMPTS)(
        PROMPTS, padding="max_length", max_length=64, return_tensors="pt"
    )
    with torch.no_grad():
        one, two = model(tokens.input_ids).last_hidden_state.float()
    assert 0.5 < one.std() < 2 and torch.isfinite(one).all()
    assert (one - two)[:4].std() > 0.5, "the words of the shorter prompt"


@pytest.mark.parametrize("scale", ["real", "tiny"])
@pytest.mark.parametrize("encoder", ENCODERS, ids=lambda encoder: encoder.model)
def test_tokenizer_goes_with_its_text_encoder(encoder: TextEncoder, scale: str) -> None:
    tokenizer = clip_t5_text.make_tokenizer(encoder, PROMPTS, scale=scale)
    vocab_size = encoder.config(scale)["vocab_size"]
    is_clip = encoder.model.startswith("CLIP")
    assert max(tokenizer.get_vocab().values()) < vocab_size
    if is_clip:
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (vocab_size - 2, vocab_size - 1)
        assert tokenizer.pad_token_id == (0 if encoder is CLIP_G else vocab_size - 1)
    else:
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    ids = tokenizer(models.PROMPT)["input_ids"]
    assert len(ids) == len(models.PROMPT.split()) + 1 + is_clip, "a token for each word"
    assert ids[-1] == tokenizer.eos_token_id
    other = "the owner's 42 xylophones, (very) loud"
    decoded = tokenizer.decode(tokenizer(other)["input_ids"], skip_special_tokens=True)
    assert decoded.replace(" ", "") == other.replace(" ", "")


# The rules on one GPU.


def test_moved_bytes() -> None:
    tensors = {name: bench_combine.moved_bytes(rule, 1, False) for name, rule in bench_combine.RULES.items()}
    assert tensors == {
        **dict.fromkeys(["cfg", "cfg_cond", "lerp", "norm"], 3),
        **dict.fromkeys(["composed", "instruct_pix2pix"], 4),
        **dict.fromkeys(["rescale", "zero_star", "apg"], 5),
        "apg_momentum": 8,
    }
    assert all(bench_combine.moved_bytes(r, 7, True) == 7 * (tensors[n] + 1) for n, r in bench_combine.RULES.items())


@pytest.mark.parametrize("rule", bench_combine.RULES)
def test_wrong_elements_are_counted_and_right_ones_are_not(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    combine = bench_combine.combine

    def damaged(*args: Any, backend: str, **keywords: Any) -> torch.Tensor:
        result = combine(*args, backend="torch", **keywords)
        if backend == "cuda":  # more than any rounding, and what was not written
            result.view(-1)[100] += 0.25
            result.view(-1)[101] = float("nan")
        return result

    monkeypatch.setattr(bench_combine, "combine", damaged)
    for dtype, step, numerics in product([torch.bfloat16, torch.float32], [False, True], ["exact", "fused"]):
        for backend, wrong in {"triton": 0, "cuda": 2}.items():
            tensors = bench_combine.draw(bench_combine.RULES[rule], 1 << 15, dtype, CPU)
            assert bench_combine.count_wrong(rule, tensors, step, backend, numerics) == wrong


def test_the_tolerance_tells_fused_from_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 rounded after every op is outside what one rounding at the end allows."""
    torch.manual_seed(0)
    combine = bench_combine.combine
    exact: Callable[..., torch.Tensor] = lambda *args, **keywords: combine(  # noqa: E731
        *args, **(keywords if args[0].dtype == torch.float64 else keywords | {"numerics": "exact"})
    )
    monkeypatch.setattr(bench_combine, "combine", exact)
    tensors = bench_combine.draw(bench_combine.RULES["cfg"], 1 << 15, torch.bfloat16, CPU)
    assert bench_combine.count_wrong("cfg", tensors, False, "torch", "fused") > 1000


# The programs of the exchange.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", bench_peer_combine.RULES)
def test_programs_are_the_rules(rule: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    p, n, sample = (torch.randn(3, 64).to(dtype) for _ in range(3))
    dt = torch.tensor(bench_peer_combine.DT)
    program = bench_peer_combine.guidance_program(rule, (3, 64), dtype)
    inputs = [sample, dt, n, p] if rule == "cfg_euler" else [n, p]
    result = torch.empty_like(p)
    interpret(program, inputs, [bench_peer_combine.SCALE], [result])
    # On a GPU a tensor without dimensions is cast to the dtype of the others first.
    expected = bench_peer_combine.eager(rule, p, n, sample, dt.to(dtype))
    assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", bench_peer_combine.RULES)
def test_programs_are_those_of_pipelines(rule: str, dtype: torch.dtype) -> None:
    program = bench_peer_combine.guidance_program(rule, (2, 3, 64), dtype)
    branches, fn = test_program.RULES[rule]
    (lowered,) = test_program.traced(fn, [dtype] * branches, True)
    assert (program.code, program.stores) == (lowered.code, lowered.stores)
    assert [o.dtype for o in program.inputs] == [o.dtype for o in lowered.inputs]


# Both sides of the exchange, with queues for NVLink.


class Wire:
    """What one side pushes and the other pulls, two pieces at a time; `flips` a bit of every piece but tokens."""

    def __init__(self, flips: bool) -> None:
        self.flips = flips
        self.pieces: queue.Queue[bytearray] = queue.Queue(2)

    def put(self, segments: list[tuple[int, ...]]) -> None:
        ((pointer, size, *_),) = segments
        piece = bytearray(ctypes.string_at(pointer, size))
        piece[-1] ^= self.flips and size != bench_peer_combine.TOKEN_BYTES
        self.pieces.put(piece, timeout=60)

    def get(self, segments: list[tuple[int, ...]]) -> None:
        ((pointer, size, *_),) = segments
        piece = self.pieces.get(timeout=60)
        assert len(piece) == size
        ctypes.memmove(pointer, bytes(piece), size)


class FakeGraph:
    def __init__(self, calls: list[Callable[[], Any]], count: int) -> None:
        self.replay = lambda: [calls[i % len(calls)]() for i in range(count)]


def both_sides(flips: bool, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The leader's rows of a run with the leader on `cpu` and the follower on `cpu:0`."""
    down, up = Wire(False), Wire(flips)

    class Transport:
        handle = b"handle"

        def __init__(self, device: torch.device) -> None:
            out, into = (down, up) if device.index is None else (up, down)
            fine = SimpleNamespace(name="none")
            self.endpoint = SimpleNamespace(
                push=lambda segments, stream: out.put(segments),
                pull=lambda segments, stream: into.get(segments),
                push_failure=fine,
                pull_failure=fine,
            )
            self.connect = self.set_timeout = lambda value: None
            self.detach = self.close = lambda: None
            self.borrow = lambda nbytes: into

    def launch(program: Any, inputs: Any, scalars: Any, outputs: Any, arrival: Wire, keep: Any = None) -> None:
        operand = program.inputs[-1]
        arrived = torch.empty_strided(program.shape, operand.strides, dtype=operand.dtype)
        arrival.get([(arrived.data_ptr(), arrived.nbytes)])
        interpret(program, [*inputs[:-1], arrived], scalars, outputs)
        if keep is not None:
            keep.copy_(arrived)

    class Comm:
        def __init__(self, unique_id: bytes, rank: int, world_size: int, device: Any) -> None:
            assert (unique_id, world_size) == (b"id", 2)
            self.send = lambda buffers, peer, stream: up.put(buffers)
            self.recv = lambda buffers, peer, stream: up.get(buffers)
            self.abort = lambda: None

    def replay_us(graph: FakeGraph, repeat: int) -> list[float]:
        for _ in range(repeat):
            graph.replay()
        return [2000.0] * repeat

    native = SimpleNamespace(nccl_unique_id=lambda: b"id", NcclComm=Comm)
    copied = {"us": 5.0, "us_p10": 5.0, "us_p90": 5.0, "token_us": None, "wrong": 0}
    replaced = {"PeerTransport": Transport, "launch": launch, "captured": FakeGraph, "replay_us": replay_us}
    replaced |= {"copy_engine": lambda *_: copied, "TOKEN_ROUNDS": 10, "STRESS_ROUNDS": 25, "MEET_S": 60.0}
    for name, value in replaced.items():
        monkeypatch.setattr(bench_peer_combine, name, value)
    monkeypatch.setattr(extension, "load", lambda: native)
    for name in ("synchronize", "set_device", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))

    args = bench_peer_combine.parse(arguments)
    rows: list[dict[str, Any]] = []
    errors: list[BaseException] = []

    def side(is_leader: bool, conn: Any, device: torch.device) -> None:
        try:
            with conn:
                end = bench_peer_combine.Side(is_leader, conn, device)
                bench_peer_combine.work(end, args, rows if is_leader else [])
                end.close()
        except BaseException as error:
            errors.append(error)

    ends = zip((True, False), multiprocessing.Pipe(), (CPU, torch.device("cpu", 0)), strict=True)
    threads = [threading.Thread(target=side, args=end) for end in ends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not errors, errors
    bench_peer_combine.add_shares(rows)
    return rows


@pytest.mark.timeout(180)
@pytest.mark.parametrize("flips", [False, True])
def test_both_sides_of_the_exchange(flips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = both_sides(flips, ["--sizes", "512,1024", "--repeat", "1"], monkeypatch)
    exchanges = [row for row in rows if row["backend"] != "copy-engine"]
    assert len(rows) == 2 + len(exchanges) == 2 + 2 * 4 * 3 * 2
    for row in exchanges:
        assert (row["wrong"] > 0) == flips
        # 2000 us a graph: 200 exchanges, or 10 round trips of a token
        assert (row["us"], row["token_us"]) == ((-90.0, 100.0) if row["mode"] == "latency" else (10.0, None))
        assert row["mode"] == "latency" or row["share"] == 0.5


@pytest.mark.timeout(180)
@pytest.mark.parametrize("flips", [False, True])
def test_stress(flips: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_peer_combine, "STRESS_ELEMENTS", (64, 65, 8))
    (row,) = both_sides(flips, ["--stress", "90"], monkeypatch)
    assert row["exchanges"] == 103 and (row["wrong"] > 0) == flips
