"""The library's PlannedCalls alone: what it tells apart, when it forgets, and what it does with arrays on GPUs."""

from __future__ import annotations

import ctypes
from typing import Any

import finalizing
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="reads torch's tensors")

from jax_moe import native  # noqa: E402
from torch_facade import eager  # noqa: E402

needs_table = pytest.mark.skipif(eager.EXCHANGE_TABLE is None, reason="this torch has no DLPack exchange table")
NOTHING = finalizing.Case(tokens=0, rows=0).problem()


def nothing_to_do() -> Any:
    """A plan that writes nothing and returns what it was given."""
    return native.plan_finalize(NOTHING, [0] * 4, [-1] * 4, [], [0], False)


def planned_calls() -> Any:
    return native.load().PlannedCalls(eager.EXCHANGE_TABLE, eager.TYPES, [], torch.is_grad_enabled, None)


@needs_table
def test_plans_are_forgotten_before_there_are_too_many() -> None:
    tensors = [torch.zeros(1, n) for n in range(1, 4098)]
    calls = planned_calls()
    for tensor in tensors:
        calls.keep((tensor,), (), nothing_to_do)
        assert calls.run((tensor,), ()) is tensor
    assert calls.run((tensors[0],), ()) is None


@needs_table
def test_options_are_told_apart_by_type_and_value() -> None:
    calls = planned_calls()
    tensor, one = torch.zeros(1), 10**9
    calls.keep((tensor,), (one,), nothing_to_do)
    assert calls.run((tensor,), (int("1000000000"),)) is tensor
    for other in (one + 1, float(one), -one, None, True, np.int64(one), "1000000000", 2**64 + one):
        assert calls.run((tensor,), (other,)) is None
    for other in (None, torch.zeros(2), torch.zeros(1, 1), torch.zeros(1, dtype=torch.int32), 3):
        assert calls.run((other,), (one,)) is None


# ---- GPUs, of which there need be none -------------------------------------------------------------------------------
class DlTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("type", ctypes.c_uint8 * 4),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class ExchangeTable(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("pointers", ctypes.c_void_p * 4),
        ("tensor", ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.POINTER(DlTensor))),
        (
            "stream",
            ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)),
        ),
    )


NAME = b"dlpack_exchange_api"  # a capsule keeps its address only


class OnGpu:
    """A scalar of a library whose arrays are all on GPU number 63."""


def gpu_table(version: tuple[int, int], asked: list[Any]) -> tuple[ExchangeTable, Any]:
    """An exchange table for OnGpu, and its capsule, which does not keep it alive."""

    def tensor(_: Any, out: Any) -> int:
        out[0] = DlTensor(16, (ctypes.c_int32 * 2)(2, 63))
        return 0

    def stream(device_type: int, device_id: int, out: Any) -> int:
        asked.append((device_type, device_id))
        out[0] = 0
        return 0

    fields = dict((name, kind) for name, kind, *_ in ExchangeTable._fields_)
    table = ExchangeTable(version, (None,) * 4, fields["tensor"](tensor), fields["stream"](stream))
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return table, new(ctypes.addressof(table), NAME, None)


@pytest.mark.parametrize("version", [(1, 3), (1, 9), (1, 2), (2, 0)])
def test_calls_on_a_gpu_run_there_while_it_is_the_current_one(version: tuple[int, int]) -> None:
    asked: list[Any] = []
    _table, capsule = gpu_table(version, asked)
    current = 63
    calls = native.load().PlannedCalls(capsule, (OnGpu,), [], lambda: False, lambda: current)
    given = (OnGpu(),)
    calls.keep(given, (), nothing_to_do)
    if version not in ((1, 3), (1, 9)):  # tables of another layout, or none yet
        assert calls.run(given, ()) is None
        return
    with pytest.raises((NotImplementedError, ValueError), match="CUDA"):
        calls.run(given, ())
    assert asked == [(2, 63)]
    current = 0
    assert calls.run(given, ()) is None
    without = native.load().PlannedCalls(capsule, (OnGpu,), [], lambda: False, None)
    without.keep(given, (), nothing_to_do)
    assert without.run(given, ()) is None
