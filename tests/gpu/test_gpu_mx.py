"""MxFp8 where there is a GPU: what must hold bit for bit holds there too (test_gpu_matrix.py runs the cases).

Quantisers and folding give the bits of the CPU, and folded weights run.
"""

from __future__ import annotations

import cases
import compare
import mx_properties
import numpy as np
import pytest
from call import Call
from cases import MX, Case
from memory import Cuda
from numpy.typing import NDArray
from results import assert_matches, assert_same_results

from jax_moe.enums import Fp8QuantizationType

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

import torch_calls  # noqa: E402

import torch_facade  # noqa: E402

NAMES = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
CASE = Case("gpu_mx", 53, 384, 256, 8, 3, (2, 5), x_dtype="bfloat16", **MX)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).cpu()


@pytest.fixture
def run(cuda: Cuda) -> mx_properties.Run:
    def call(case: Case, given: cases.Arrays) -> dict[str, NDArray]:
        return Call(case, given, cuda).run()

    return call


@pytest.mark.parametrize("name", [*mx_properties.LAYOUTS, "mx_t257", "mx_h640_i896"])
def test_a_layout_changes_no_bit(run: mx_properties.Run, name: str) -> None:
    mx_properties.a_layout_changes_no_bit(run, name)


@pytest.mark.parametrize("shift", mx_properties.SHIFTS)
@pytest.mark.parametrize("name", [*mx_properties.MOVED, "mx_t129"])
def test_powers_of_two_that_move_from_weights_to_tokens_change_no_bit(
    run: mx_properties.Run, name: str, shift: int
) -> None:
    mx_properties.powers_of_two_may_move_from_weights_to_tokens(run, name, shift)


@pytest.mark.parametrize("check", mx_properties.CHECKS, ids=lambda check: check.__name__)
def test_scales_are_exact(run: mx_properties.Run, check: mx_properties.Check) -> None:
    check(run)


@pytest.mark.parametrize("option", ["mx", "mx_shuffled", "mx_bf16", "mx_block_major", "mx_shuffled_grid"])
def test_numbers_of_tokens_around_the_tiles(cuda: Cuda, option: str) -> None:
    for count in [*range(1, 20), 31, 33, 63, 64, 65, 127, 128, 129, 191, 193, 255, 256, 257, 511, 513, 1025]:
        case = Case(f"t{count}", count, 384, 384, 4, 2, weights="signed", seed=count, **cases.MX_OPTIONS[option])
        call = Call(case, memory=cuda, odd=bool(count % 2))
        first = call.run()
        assert_matches(case, call.given, first, on_hopper=True)
        call.poison(0)
        assert_same_results(call.run(), first)


@pytest.mark.parametrize("swizzled", [False, True])
def test_quantisers_of_torch_give_the_bits_of_the_cpu(gpu: int, swizzled: bool) -> None:
    x = torch.randn(133, 384, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 133)[:, None]
    x[3, 5], x[4, 6], x[5] = float("nan"), float("inf"), 0
    expected, found = (torch_facade.mxfp8_quantize(t, swizzled) for t in (x, x.cuda(gpu)))
    number = ~expected[0].float().isnan()
    assert torch.equal(found[0].float().isnan().cpu(), ~number)
    assert torch.equal(bits(found[0])[number], bits(expected[0])[number])
    assert torch.equal(bits(found[1]), bits(expected[1]))
    values = [torch_facade.mxfp8_dequantize_host(*pair, swizzled).cpu() for pair in (expected, found)]
    assert torch.equal(values[0][number], values[1][number])


@pytest.mark.parametrize("swizzled", [False, True])
def test_quantisers_of_jax_give_the_bits_of_the_cpu(gpu: int, swizzled: bool) -> None:
    jax = pytest.importorskip("jax")
    import jax_moe

    if not any(device.platform == "gpu" for device in jax.devices()):
        pytest.skip("jax sees no GPU")
    x = np.random.default_rng(0).standard_normal((133, 384)).astype(np.float32)
    x *= np.exp2(np.linspace(-90, 90, 133, dtype=np.float32))[:, None]
    with jax.default_device(jax.devices("cpu")[0]):
        expected = [np.asarray(array) for array in jax_moe.mxfp8_quantize(x, swizzled)]
    for a, b in zip(jax_moe.mxfp8_quantize(jax.device_put(x), swizzled), expected, strict=True):
        compare.assert_same_bits(np.asarray(a), b, "quantised")


@pytest.mark.parametrize("shuffled", [False, True])
def test_weights_folded_on_the_gpu_run_there(cuda: Cuda, shuffled: bool) -> None:
    case = cases.dataclasses.replace(CASE, shuffled=shuffled)
    arguments = torch_calls.arguments(case)
    on_gpu = {
        name: value.cuda(cuda.device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    prepared = torch_facade.prepare_mxfp8_weights(*(on_gpu[name] for name in NAMES), use_shuffled_weight=shuffled)
    expected = torch_facade.prepare_mxfp8_weights(*(arguments[name] for name in NAMES), use_shuffled_weight=shuffled)
    assert prepared.report == expected.report
    for found, wanted in zip(prepared[:4], expected[:4], strict=True):
        assert torch.equal(bits(found), bits(wanted))
    changes = {"fp8_quantization_type": Fp8QuantizationType.DeepSeekFp8, "use_shuffled_weight": False}
    on_gpu |= changes | dict(zip(NAMES, prepared[:4], strict=True))
    output = torch_calls.array(torch_calls.function(**on_gpu).cpu())
    exact = cases.expected(case, cases.arrays(case), requantize=False).output
    compare.assert_close(output, exact, "output", compare.UNQUANTIZED_MX)
