"""torch_facade.finalize and its ops: results, compiled and exported graphs, fakes, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import cases
import compare
import finalizing
import pytest
from finalizing import CASES, Case

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

import torch_calls  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from torch_facade import finalize  # noqa: E402
from torch_facade.finalization import finalized, finalized_out  # noqa: E402

CASE = Case(weights="float32")


def tensors(case: Case, seed: int = 0) -> list[Any]:
    return [torch_calls.tensor(array) for array in case.arrays(seed)]


def empty(case: Case) -> Any:
    return torch.full((case.tokens, case.hidden), torch.nan, dtype=torch.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_sums_as_the_backend(case: Case) -> None:
    given = case.arrays()
    for _ in range(2):
        got = torch_calls.array(finalize(*map(torch_calls.tensor, given)))
        compare.assert_same_bits(got, finalizing.run(case, given), "output")


@pytest.mark.parametrize("name", ["t7", "k32", "routing_mixed_window", "apart_bf16", "apart_f32", "extreme_nan_x"])
def test_the_parts_of_a_layer_give_the_bits_of_the_whole(name: str) -> None:
    layer = cases.CASES[name]
    parts = torch_calls.call(dataclasses.replace(layer, do_finalize=False))
    assert torch.equal(finalize(*parts).view(torch.int16), torch_calls.call(layer).view(torch.int16))


def test_output_is_written_in_place_and_returned() -> None:
    given, output = tensors(CASE), empty(CASE)
    for expected_version in (1, 2):
        assert finalize(*given, output=output) is output
        assert output._version == expected_version
        assert torch.equal(output, finalize(*given))


def test_output_may_be_an_inference_tensor() -> None:
    given = tensors(CASE)
    with torch.inference_mode():
        output = empty(CASE)
        assert torch.equal(finalize(*given, output), finalize(*given))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_are_one_graph_with_the_same_results(dynamic: bool) -> None:
    torch._dynamo.reset()

    def function(rows: Any, weights: Any, row_of: Any, output: Any) -> Any:
        return finalize(rows, weights, row_of), finalize(rows, weights, row_of, output)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for case in (CASE, dataclasses.replace(CASE, tokens=3, rows=5)):
        given, output = tensors(case), empty(case)
        fresh, written = compiled(*given, output)
        assert written is output
        assert torch.equal(fresh, finalize(*given)) and torch.equal(output, fresh)


class Module(torch.nn.Module):
    def forward(self, rows: Any, weights: Any, row_of: Any) -> Any:
        return finalize(rows, weights, row_of)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_serves_any_number_of_tokens(strict: bool) -> None:
    tokens, rows = torch.export.Dim("tokens", max=1 << 20), torch.export.Dim("rows", max=1 << 20)
    shapes = {"rows": {0: rows}, "weights": {0: tokens}, "row_of": {0: CASE.top_k * tokens}}
    exported = torch.export.export(Module(), tuple(tensors(CASE)), dynamic_shapes=shapes, strict=strict)
    for count, num_rows in ((2, 3), (6, 9), (70, 100)):
        given = tensors(Case(count, CASE.top_k, CASE.hidden, num_rows, "float32"))
        assert torch.equal(exported.module()(*given), finalize(*given))


def test_fake_and_meta_tensors_have_the_real_shapes() -> None:
    with FakeTensorMode() as mode:
        fake = finalize(*(mode.from_tensor(x) for x in tensors(CASE)))
    meta = finalize(*(x.to("meta") for x in tensors(CASE)))
    assert meta.device.type == "meta"
    for got in (fake, meta):
        assert (tuple(got.shape), got.dtype, got.stride()) == ((6, 256), torch.bfloat16, (256, 1))


def test_the_ops_pass_torchs_own_checks() -> None:
    given = tensors(Case(rows=12, weights="float32"))
    given[0].nan_to_num_()
    torch.library.opcheck(finalized, given)
    torch.library.opcheck(finalized_out, [*given, torch.zeros(6, 256, dtype=torch.bfloat16)])


ROWS, WEIGHTS, ROW_OF = tensors(CASE)
REFUSED: list[tuple[dict[int, Any], str]] = [
    ({0: [[1.0]]}, "gemm2_output must be a torch.Tensor, got list"),
    ({1: None}, "expert_weights must be a torch.Tensor, got NoneType"),
    ({2: 3}, "expanded_idx_to_permuted_idx must be a torch.Tensor, got int"),
    ({3: 3}, "output must be a torch.Tensor, got int"),
    ({0: ROWS.float()}, "gemm2_output must be bfloat16"),
    ({0: ROWS[:, ::2].contiguous()[:, :64]}, "gemm2_output must be of a hidden_size that is a multiple of 128"),
    ({0: ROWS.t().contiguous().t()}, r"gemm2_output must be contiguous \(call .contiguous\(\)\), got strides \[1, 9\]"),
    ({1: WEIGHTS.double()}, "expert_weights must be bfloat16 or float32"),
    ({1: WEIGHTS.to("meta")}, "expert_weights must be on cpu like gemm2_output, got meta"),
    ({2: ROW_OF.long()}, r"expanded_idx_to_permuted_idx must be int32\[24\], .* got int64\[24\]"),
    ({2: ROW_OF[:-1]}, r"expanded_idx_to_permuted_idx must be int32\[24\]"),
    ({3: torch.zeros(6, 256)}, r"output must be bfloat16\[6,256\], got float32\[6,256\]"),
    ({3: empty(CASE)[:5]}, r"output must be bfloat16\[6,256\], got bfloat16\[5,256\]"),
    ({3: torch.zeros(256, 6, dtype=torch.bfloat16).t()}, r"output must be contiguous, got strides \[1, 6\]"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED)
def test_what_does_not_fit_is_refused(changed: dict[int, Any], words: str) -> None:
    given = dict(enumerate([ROWS, WEIGHTS, ROW_OF])) | changed
    finalize(ROWS, WEIGHTS, ROW_OF)
    with pytest.raises(ValueError, match=f"^finalize: {words}"):
        finalize(*given.values())


def test_gradients_are_refused() -> None:
    given = [ROWS, WEIGHTS.clone().requires_grad_(), ROW_OF]
    with pytest.raises(NotImplementedError, match="finalize: expert_weights must not require grad"):
        finalize(*given)
    with torch.no_grad():
        assert torch.equal(finalize(*given), finalize(ROWS, WEIGHTS, ROW_OF))


def test_another_kind_of_device_is_refused() -> None:
    with FakeTensorMode():
        rows = torch.empty(9, 256, dtype=torch.bfloat16, device="xpu:0")
        with pytest.raises(NotImplementedError, match="gemm2_output must be on a cpu or cuda device, got xpu:0"):
            finalize(rows, WEIGHTS, ROW_OF)
