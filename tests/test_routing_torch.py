"""torch_facade.trtllm_fp8_block_scale_moe and its op: results, compiled graphs, the replayed ids, refusals."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import cases
import logits
import pytest
from logits import Case

torch = pytest.importorskip("torch", reason="the torch facade needs torch")

import torch_calls  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import torch_facade  # noqa: E402
from jax_moe.enums import RoutingMethodType as Method  # noqa: E402
from jax_moe.routing_problem import METHODS  # noqa: E402
from torch_facade import trtllm_fp8_block_scale_moe as function  # noqa: E402
from torch_facade.logits import OPTIONS, route_logits  # noqa: E402

GROUPED = Case(Method.DeepSeekV3, 6, 64, 4, 8, 4, "bfloat16", "float32", 2.5)
EACH = [Case(method, top_k=1 if method is Method.Llama4 else 4) for method in METHODS] + [GROUPED]
LAYER = cases.Case("layer", tokens=6, hidden=256, inter=128, experts=8, top_k=2, window=(2, 4))
MX_LAYER = dataclasses.replace(LAYER, name="mx_layer", shuffled=True, **cases.MX)
ROUTING = Case(Method.DeepSeekV3, LAYER.tokens, LAYER.experts, LAYER.top_k, 2, 1, routed_scaling_factor=2.5)


def route(case: Case, routing_logits: Any, bias: Any) -> Any:
    options = {"num_experts": case.num_experts, "enable_pdl": True, **case.options()}
    integers = [int(options[name] or 0) for name in OPTIONS]
    return route_logits(routing_logits, bias, integers, case.routed_scaling_factor)


def tensors(case: Case, seed: int = 0) -> list[Any]:
    return [None if array is None else torch_calls.tensor(array) for array in case.arrays(seed)]


def layer_arguments(layer: cases.Case = LAYER, **changes: Any) -> dict[str, Any]:
    routing_logits, bias = tensors(ROUTING)
    arguments = torch_calls.arguments(layer, **ROUTING.options())
    del arguments["topk_ids"]
    return arguments | {"routing_logits": routing_logits, "routing_bias": bias} | changes


@pytest.mark.parametrize("case", EACH, ids=lambda case: case.name)
def test_the_op_routes_as_the_reference(case: Case) -> None:
    ids, weights = route(case, *tensors(case))
    logits.assert_routed(case, case.arrays(), (ids.numpy(), weights.numpy()))


def test_the_op_passes_torchs_own_checks() -> None:
    routing_logits, bias = tensors(GROUPED)
    torch.library.opcheck(route_logits, (routing_logits, bias, [64, 4, 8, 4, 2, 1, 1], 2.5))


def test_names_order_and_defaults_are_the_documented_ones() -> None:
    parameters = inspect.signature(function).parameters
    by_position = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    documented = (
        "routing_logits routing_bias hidden_states hidden_states_scale gemm1_weights gemm1_weights_scale gemm2_weights "
        "gemm2_weights_scale num_experts top_k n_group topk_group intermediate_size local_expert_offset "
        "local_num_experts routed_scaling_factor routing_method_type use_shuffled_weight weight_layout do_finalize "
        "enable_pdl tune_max_num_tokens fp8_quantization_type activation_type norm_topk_prob routing_replay_out"
    )
    assert by_position == documented.split()
    assert [name for name in parameters if name not in by_position] == [
        "gemm1_alpha",
        "gemm1_beta",
        "gemm1_clamp_limit",
        "output",
        "batch_invariant",
    ]
    defaults = [p.default for p in parameters.values() if p.default is not p.empty]
    assert defaults == [0, False, 0, True, None, 8192, 1, 3, True, None, None, None, None, None, None]


@pytest.mark.parametrize("layer", [LAYER, MX_LAYER], ids=lambda layer: layer.name)
@pytest.mark.parametrize("do_finalize", [True, False])
def test_the_layer_is_routing_and_the_routed_layer(do_finalize: bool, layer: cases.Case) -> None:
    arguments = layer_arguments(layer, do_finalize=do_finalize)
    got = function(**arguments)
    pair = route(ROUTING, arguments.pop("routing_logits"), arguments["routing_bias"])
    arguments |= {"topk_ids": pair}
    del arguments["norm_topk_prob"]
    expected = torch_facade.trtllm_fp8_block_scale_routed_moe(**arguments)
    if do_finalize:
        assert got.abs().sum() > 0
        assert torch.equal(got, expected)
    else:
        assert got[1].dtype == torch.float32 and torch.equal(got[1], expected[1])
        assert torch.equal(got[2], expected[2])


def test_output_is_written_in_place_and_replayed_ids_are_those_chosen() -> None:
    arguments = layer_arguments()
    output = torch.empty(LAYER.tokens, LAYER.hidden, dtype=torch.bfloat16)
    replay = torch.full((LAYER.tokens + 3, LAYER.top_k), -7, dtype=torch.int16)
    got = function(**arguments, output=output, routing_replay_out=replay)
    assert got is output and torch.equal(output, function(**arguments))
    ids, _ = route(ROUTING, arguments["routing_logits"], arguments["routing_bias"])
    assert torch.equal(replay[: LAYER.tokens], ids.to(torch.int16))
    assert (replay[LAYER.tokens :] == -7).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_calls_are_one_graph_with_the_same_results(dynamic: bool) -> None:
    torch._dynamo.reset()
    arguments = layer_arguments()
    names = ("routing_logits", "hidden_states", "hidden_states_scale")
    rest = {name: value for name, value in arguments.items() if name not in names}

    def layer(routing_logits: Any, x: Any, scale: Any, replay: Any) -> Any:
        return function(routing_logits, hidden_states=x, hidden_states_scale=scale, routing_replay_out=replay, **rest)

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for tokens in (6, 4):
        given = [arguments["routing_logits"][:tokens], arguments["hidden_states"][:tokens]]
        given.append(arguments["hidden_states_scale"][:, :tokens].contiguous())
        replays = [torch.zeros(tokens, LAYER.top_k, dtype=torch.int16) for _ in range(2)]
        assert torch.equal(compiled(*given, replays[0]), layer(*given, replays[1]))
        assert torch.equal(*replays)


def test_fake_tensors_have_the_real_shapes() -> None:
    with FakeTensorMode() as mode:
        routing_logits, bias = (mode.from_tensor(x) for x in tensors(GROUPED))
        ids, weights = route(GROUPED, routing_logits, bias)
    assert (ids.shape, ids.dtype, weights.shape, weights.dtype) == ((6, 4), torch.int32, (6, 4), torch.float32)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"routing_logits": [1.0]}, "routing_logits must be a torch.Tensor, got list"),
    ({"routing_logits": torch.zeros(8, 6).t()}, "routing_logits must be contiguous"),
    ({"routing_logits": torch.zeros(6, 8).half()}, "routing_logits must be float32 or bfloat16"),
    (
        {"routing_logits": torch.zeros(6, 8, device="meta")},
        "routing_logits must be on cpu like hidden_states, got meta",
    ),
    ({"routing_bias": torch.zeros(7)}, r"routing_bias must be None, bfloat16 or float32 \[num_experts\] = \[8\]"),
    ({"num_experts": 9}, "num_experts must be 8, the number of logits of a token, got 9"),
    ({"top_k": 2.5}, "top_k must be an integer, got 2.5"),
    ({"top_k": True}, "top_k must be an integer, got True"),
    ({"top_k": 9}, "top_k must be an integer in"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob must be True or False, got 'yes'"),
    ({"norm_topk_prob": 3}, "norm_topk_prob must be True or False, got 3"),
    ({"enable_pdl": 2}, "enable_pdl must be None, True or False, got 2"),
    ({"routed_scaling_factor": "2"}, "routed_scaling_factor must be None or a finite number, got '2'"),
    ({"routing_method_type": 9}, "routing_method_type must be one of the methods"),
    ({"n_group": 3}, "n_group must be a positive divisor"),
    ({"routing_replay_out": 1}, "routing_replay_out must be int16 .* got int"),
    ({"routing_replay_out": torch.zeros(6, 2)}, r"routing_replay_out must be int16 .* got float32\[6,2\] on cpu"),
    ({"routing_replay_out": torch.zeros(5, 2).short()}, r"routing_replay_out must be int16 .* got int16\[5,2\]"),
]


@pytest.mark.parametrize(("changed", "words"), REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_what_does_not_fit_is_refused_in_words(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^trtllm_fp8_block_scale_moe: {words}"):
        function(**layer_arguments(**changed))


def test_gradients_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="routing_logits must not require grad"):
        function(**layer_arguments(routing_logits=torch.zeros(6, 8, requires_grad=True)))
