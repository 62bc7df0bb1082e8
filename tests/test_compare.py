"""The comparison sees every kind of wrong result, and names the place; the guards see a write beside a buffer."""

from __future__ import annotations

import cases
import compare
import ml_dtypes
import numpy as np
import pytest
from call import Call
from memory import Block, Host


def output():
    return np.random.default_rng(0).standard_normal((40, 256)).astype(np.float32)


def changed(place, value):
    result = output()
    result[place] = value
    return result


DEFECTS = {
    "a NaN too many": (changed((3, 5), np.nan), output(), r"NaN: missing at 0 .* unexpected at 1 \(first \(3, 5\)\)"),
    "a NaN too few": (output(), changed((3, 5), np.nan), r"NaN: missing at 1 places \(first \(3, 5\)\)"),
    "an Inf": (changed((39, 255), np.inf), output(), r"Inf: .* unexpected at 1 \(first \(39, 255\)\)"),
    "another row": (changed(7, output()[8]), output(), "relative L2"),
    "a small wrong row": (changed(7, 0.97 * output()[7]), output(), "row 7 has relative L2 0.03"),
    "a wrong factor": (1.006 * output(), output(), "relative L2 0.006"),
    "one column off": (changed((slice(None), 3), output()[:, 3] + 0.05), output(), r"0.391 % of the elements"),
    "a value where zero belongs": (changed(4, 1e-30), changed(4, 0), "a value in a row of zeros: .* at 256"),
    "another shape": (output()[:, :128], output(), "shape"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(defect):
    actual, expected, words = DEFECTS[defect]
    with pytest.raises(AssertionError, match=f"^output: {words}"):
        compare.assert_close(actual, expected, "output")


def test_roundings_pass():
    expected = output()
    expected[5] = 0
    expected[6, 7] = np.nan
    compare.assert_close(expected.astype(ml_dtypes.bfloat16), expected, "output")
    compare.assert_close(np.zeros((0, 128), np.float32), np.zeros((0, 128), np.float32), "output")


def test_bits_are_compared_one_by_one():
    compare.assert_same_bits(changed((1, 2), np.nan), changed((1, 2), np.nan), "output")
    with pytest.raises(AssertionError, match=r"output: 1 of 10240 elements differ in their bits, first at \(1, 2\)"):
        compare.assert_same_bits(changed((1, 2), 0.0), changed((1, 2), -0.0), "output")


@pytest.mark.parametrize(("index", "words"), [(-1, "1 bytes before it were written, the first at -1"), (10, "after")])
def test_a_write_beside_a_buffer_is_seen(index, words):
    block = Block(Host(), 10, 3, 0xA5)
    assert block.pointer % 256 == 3
    block.fill(0)
    block.check_guards("x")
    block.raw[block.start + index] = 0
    with pytest.raises(AssertionError, match=f"x: .*{words}"):
        block.check_guards("x")


def test_a_strided_input_keeps_its_gaps():
    call = Call(cases.CASES["scale_padded_t7"], odd=True)
    scale = call.given["hidden_states_scale"]
    memory = call.inputs["hidden_states_scale"].read(np.float32, (-1,), "scale")
    assert memory.size == (scale.shape[0] - 1) * scale.strides[0] // 4 + 2 * (scale.shape[1] - 1) + 1
    assert np.isnan(memory[1]) and np.array_equal(memory[: 2 * scale.shape[1] : 2], scale[0])
