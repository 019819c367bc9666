"""Quantized denoisers: shipped as they are, and the same bits on both sides. Each with the library that a user would
take; what is not installed is skipped (`pip install '.[integrations]'`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cfg_parallel
from cfg_parallel.changes import fingerprint
from cfg_parallel.codec import decode, encode_structure
from reference import reference
from tiny import TINY, generate

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("forked")]


def torchao(module: torch.nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())


def gguf(module: torch.nn.Module) -> None:
    """As from_single_file leaves a GGUF checkpoint: Q8_0, 32 weights and a scale in 34 bytes."""
    library = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is not torch.nn.Linear or child.in_features % 32:
                continue
            packed = library.quantize(child.weight.detach().numpy(), library.GGMLQuantizationType.Q8_0)
            replacement = GGUFLinear(child.in_features, child.out_features, child.bias is not None, torch.float32)
            quant_type = library.GGMLQuantizationType.Q8_0
            replacement.weight = GGUFParameter(torch.from_numpy(packed), quant_type=quant_type)
            replacement.bias = child.bias
            setattr(parent, name, replacement)


def quanto(module: torch.nn.Module) -> None:
    library = pytest.importorskip("optimum.quanto")
    library.quantize(module, weights=library.qint8)
    library.freeze(module)


def bitsandbytes(module: torch.nn.Module) -> None:
    """4 bits a weight (nf4)."""
    library = pytest.importorskip("bitsandbytes")
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Linear:
                replacement = library.nn.Linear4bit(
                    child.in_features, child.out_features, child.bias is not None, quant_type="nf4"
                )
                replacement.load_state_dict(child.state_dict())
                setattr(parent, name, replacement.to("cpu"))


QUANTIZERS: list[Callable[[torch.nn.Module], None]] = [torchao, gguf, quanto, bitsandbytes]


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_quantized_denoisers(quantize: Callable[[Any], None]) -> None:
    tiny = TINY["flux"]
    full = generate(tiny.build(), tiny.inputs())
    plain, enabled = tiny.build(), tiny.build()
    for pipe in (plain, enabled):
        quantize(pipe.transformer)
        pipe.transformer.requires_grad_(False)
    with cfg_parallel.enable_cfg_parallel(enabled, devices=["cpu", "cpu"]) as handle:
        got = generate(enabled, tiny.inputs())
        assert torch.equal(got, reference(tiny, plain, tiny.inputs()))
        assert not torch.equal(got, full)  # it was quantized
        report = handle.report
        assert report.parallel_steps == report.steps > 0
        generate(enabled, tiny.inputs())  # bitsandbytes moves its state in the first forward
        shipped = handle.report.replica_bytes
        generate(enabled, tiny.inputs())
        assert handle.report.replica_bytes == shipped  # nothing looks as if it had changed


@pytest.mark.parametrize("quantize", QUANTIZERS)
def test_a_replica_of_a_quantized_module(quantize: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
    quantize(module)
    module.requires_grad_(False)
    body, tensors = encode_structure(module)
    assert all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)
    replica = decode(body, [tensor.detach().clone() for tensor in tensors])
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(replica(x), module(x))
    assert [type(p) for p in replica.parameters()] == [type(p) for p in module.parameters()]
    before = fingerprint(module)
    assert fingerprint(module) == before
    module[0].weight = replica[0].weight
    assert fingerprint(module) != before
