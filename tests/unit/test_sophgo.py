"""The Sophgo table: its text, its numbers bit for bit, a reader that raises FormatError only."""

from __future__ import annotations

import random
import re
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from onnxqat.errors import FormatError
from onnxqat.formats import sophgo
from onnxqat.formats.sophgo import WORK_MODES, read, write
from onnxqat.formats.sophgo_grids import scale_of, span, span_of, threshold
from onnxqat.formats.table import CalibrationTable, Threshold, WeightScales

TABLE = CalibrationTable(
    activations={
        "input": threshold(0.02, 8, signed=True),
        "125_Relu": threshold(0.0125, 8, signed=False),
    },
    int4={"126_Conv": threshold(0.5, 4, signed=True)},
    weights={
        "125_Relu_weight": WeightScales(scales=(1e-9, 0.25), zero_points=(0, -3)),
        "out_Gemm_weight": WeightScales(scales=(0.1,), zero_points=(0,)),
    },
    int4_ops=("126_Conv", "out_Gemm"),
    work_mode="int4_and_int8_mix",
)

TEXT = """\
# work_mode:int4_and_int8_mix #Automatically generated, do not modify, work_mode choice:\
[QAT_all_int8, int4_and_int8_mix, int4_and_int8_mix_no_fc]
# op_name    threshold    min    max
input 2.54 -2.54 2.54
125_Relu 3.1875 0.0 3.1875
#int4_th
126_Conv 3.5 -3.5 3.5
#weight_scale
125_Relu_weight 2 0.000000001 0.25 0 -3
out_Gemm_weight 1 0.1 0
#int4_op
126_Conv
out_Gemm
"""
EMPTY = write(CalibrationTable())

SCALES = st.floats(2.0**-126, float(np.finfo(np.float32).max), width=32)
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)


def bits_of(table: CalibrationTable) -> list[object]:
    """Return everything in the table, numbers as their bits, names in order."""
    acts = [
        (name, e.threshold.hex(), e.low.hex(), e.high.hex())
        for section in (table.activations, table.int4)
        for name, e in section.items()
    ]
    weights = [(n, [s.hex() for s in w.scales], w.zero_points) for n, w in table.weights.items()]
    return [table.work_mode, len(table.int4), acts, weights, table.int4_ops]


def test_the_text_of_a_table() -> None:
    assert write(TABLE) == TEXT


def test_reading_undoes_writing() -> None:
    assert bits_of(TABLE) == bits_of(read(TEXT, "t"))
    assert CalibrationTable() == read(EMPTY, "t")


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda s: not s.startswith("#") and not any(c.isspace() for c in s)
)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)
FINITE = st.floats(allow_infinity=False, allow_nan=False)
THRESHOLDS = st.builds(
    lambda th, ends: Threshold(threshold=th, low=min(ends), high=max(ends)),
    POSITIVE,
    st.tuples(FINITE, FINITE),
)
WEIGHTS = st.lists(st.tuples(POSITIVE, st.integers(-65535, 65535)), min_size=1, max_size=5).map(
    lambda pairs: WeightScales(
        scales=tuple(s for s, _ in pairs), zero_points=tuple(z for _, z in pairs)
    )
)
TABLES = st.builds(
    CalibrationTable,
    activations=st.dictionaries(NAMES, THRESHOLDS, max_size=4),
    int4=st.dictionaries(NAMES, THRESHOLDS, max_size=4),
    weights=st.dictionaries(NAMES, WEIGHTS, max_size=4),
    int4_ops=st.lists(NAMES, max_size=3, unique=True).map(tuple),
    work_mode=st.sampled_from(WORK_MODES),
)


@settings(max_examples=150, deadline=None)
@given(table=TABLES)
def test_round_trip_is_bit_for_bit_and_without_exponents(table: CalibrationTable) -> None:
    text = write(table)
    assert bits_of(table) == bits_of(read(text, "t"))
    assert text == write(read(text, "t"))
    for line in text.split("\n"):
        if not line.startswith("#"):
            assert not any(re.search("[eE]", field) for field in line.split()[1:])


@settings(max_examples=300, deadline=None)
@given(scale=SCALES, bits=st.sampled_from([4, 8, 16]), signed=st.booleans())
@example(scale=2.0**-126, bits=8, signed=True)
@example(scale=SMALLEST, bits=16, signed=False)
@example(scale=float(np.finfo(np.float32).max), bits=16, signed=False)
def test_a_scale_survives_its_threshold_bit_for_bit(scale: float, bits: int, signed: bool) -> None:
    entry = threshold(scale, bits, signed)
    table = CalibrationTable(activations={"x": entry})
    largest = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    got, got_signed = scale_of(read(write(table), "t").activations["x"], bits)
    assert (np.float32(scale), np.float32) == (got, type(got))
    assert signed == got_signed
    assert float(entry.threshold) / largest == scale
    assert (entry.low, entry.high) == (-entry.threshold if signed else 0.0, entry.threshold)


@pytest.mark.parametrize(
    ("bits", "signed", "factor"),
    [(8, True, 127), (8, False, 255), (4, True, 7), (4, False, 15), (16, True, 32767)],
)
def test_threshold_is_the_scale_times_the_largest_level(
    bits: int, signed: bool, factor: int
) -> None:
    assert factor * 0.5 == threshold(0.5, bits, signed).threshold


@settings(max_examples=100, deadline=None)
@given(scale=SCALES, zero_point=st.integers(0, 255), signed=st.booleans())
@example(scale=2.0**-126, zero_point=255, signed=False)
def test_an_asymmetric_grid_survives_its_range_bit_for_bit(
    scale: float, zero_point: int, signed: bool
) -> None:
    zero_point -= 128 if signed else 0
    entry = read(write(CalibrationTable(activations={"x": span(scale, zero_point, signed)})), "t")
    line = entry.activations["x"]
    assert span_of(line, signed) == (np.float32(scale), zero_point)
    least = -128 if signed else 0
    assert (line.low, line.high) == (
        (least - zero_point) * scale,
        (least + 255 - zero_point) * scale,
    )
    assert line.threshold == max(-line.low, line.high)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (1.0, 2.0), (-2.0, -1.0)])
def test_a_range_without_zero_is_refused(low: float, high: float) -> None:
    with pytest.raises(FormatError, match="is empty or does not contain 0"):
        span_of(Threshold(threshold=2.0, low=low, high=high), signed=True)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale: float) -> None:
    with pytest.raises(FormatError, match=r"is not positive and finite\. Calibrate again"):
        threshold(scale, 8, signed=True)


@pytest.mark.parametrize("th", [1e-60, 1e300, 0.0])
def test_a_threshold_outside_float32_is_refused(th: float) -> None:
    with pytest.raises(FormatError, match="does not give a positive float32 scale"):
        scale_of(Threshold(threshold=th, low=-th, high=th), 8)


@pytest.mark.parametrize("bits", [0, 2, 5, 32])
def test_widths_the_chips_lack_are_refused(bits: int) -> None:
    with pytest.raises(FormatError, match=rf"4, 8 or 16 bits, not {bits}"):
        threshold(1.0, bits, signed=True)
    with pytest.raises(FormatError, match=rf"4, 8 or 16 bits, not {bits}"):
        scale_of(Threshold(threshold=1.0, low=0.0, high=1.0), bits)


ONE = Threshold(threshold=1.0, low=0.0, high=1.0)


@pytest.mark.parametrize(
    ("table", "match"),
    [
        (
            CalibrationTable(activations={"ok": ONE, "a b": ONE}),
            r"'a b' has white space",
        ),
        (CalibrationTable(activations={"": ONE}), "'' is empty"),
        (CalibrationTable(activations={"a\u2028b": ONE}), "has white space"),
        (CalibrationTable(activations={"a\x00b": ONE}), "has white space or a control character"),
        (CalibrationTable(int4={"#a": ONE}), r"starts with '#'"),
        (CalibrationTable(int4={"\ud800": ONE}), "cannot be written as UTF-8"),
        (
            CalibrationTable(int4={"a": Threshold(threshold=float("nan"), low=0.0, high=1.0)}),
            "^a: .* is not finite",
        ),
        (
            CalibrationTable(int4={"a": Threshold(threshold=0.0, low=0.0, high=1.0)}),
            "threshold 0.0 is not positive",
        ),
        (
            CalibrationTable(int4={"a": Threshold(threshold=1.0, low=2.0, high=1.0)}),
            "min 2.0 lies above max 1.0",
        ),
        (CalibrationTable(weights={"w": WeightScales(scales=(), zero_points=())}), "0 scales"),
        (
            CalibrationTable(weights={"w": WeightScales(scales=(1.0, 2.0), zero_points=(0,))}),
            "2 scales but 1 zero_points",
        ),
        (
            CalibrationTable(weights={"w": WeightScales(scales=(1.0, -2.0), zero_points=(0, 0))}),
            "weight scale -2.0 is not positive",
        ),
        (
            CalibrationTable(weights={"w": WeightScales(scales=(1.0,), zero_points=(70000,))}),
            "zero_point 70000 is not a 16-bit",
        ),
        (CalibrationTable(work_mode="int3"), "Work mode 'int3' is unknown"),
    ],
)
def test_the_writer_refuses(table: CalibrationTable, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        write(table)


@pytest.mark.parametrize(
    ("old", "new", "line", "match"),
    [
        ("input 2.54 -2.54 2.54", "input 2.54 -2.54", 3, "3 fields, expected 4"),
        ("input 2.54 -2.54 2.54", "input 2.54 -2.54 2.54 7", 3, "5 fields, expected 4"),
        ("input 2.54", "input 2.54e0", 3, "'2.54e0' has an exponent, which makes the compiler"),
        ("input 2.54", "input 2.5E+1", 3, "has an exponent"),
        ("input 2.54", "input nan", 3, "'nan' is not a plain decimal"),
        ("input 2.54", "input inf", 3, "'inf' is not a plain decimal"),
        ("input 2.54", "input 1_0", 3, "'1_0' is not a plain decimal"),
        ("input 2.54", "input ٣", 3, "'٣' is not a plain decimal"),
        ("input 2.54", "input 0x1p3", 3, "'0x1p3' is not a plain decimal"),
        ("input 2.54", f"input {'9' * 400}", 3, "is not finite"),
        ("input 2.54", "input 0.0000000", 3, "threshold 0.0 is not positive"),
        ("input 2.54", "input -1.0", 3, "threshold -1.0 is not positive"),
        ("input 2.54 -2.54", "input 2.54 99.0", 3, "min 99.0 lies above max 2.54"),
        ("125_Relu 3", "input 3", 4, "'input' appears twice in this section"),
        ("126_Conv 3.5 -3.5", "126_Conv x -3.5", 6, "'x' is not a plain decimal"),
        ("weight 2 0.000000001", "weight 3 0.000000001", 8, "4 numbers after N = 3, expected 6"),
        ("weight 2 0.000000001 0.25", "weight 2 0.25", 8, "3 numbers after N = 2, expected 4"),
        ("weight 2 0.000000001", "weight 2 0.0000000", 8, "weight scale 0.0 is not positive"),
        ("weight 2 0.000000001", "weight 2 -0.1", 8, "weight scale -0.1 is not positive"),
        ("0.25 0 -3", "0.25 0 0.5", 8, "'0.5' is not an integer of at most 9 digits"),
        ("0.25 0 -3", "0.25 0 99999", 8, "zero_point 99999 is not a 16-bit"),
        ("weight 2", "weight 0", 8, "0 scales, expected 1 to 1048576"),
        ("weight 2", "weight -2", 8, "-2 scales, expected 1 to 1048576"),
        ("weight 2", "weight 99999999", 8, "99999999 scales, expected 1 to 1048576"),
        ("weight 2", f"weight {'9' * 5000}", 8, "is not an integer of at most 9"),
        ("out_Gemm_weight 1 0.1 0", "out_Gemm_weight", 9, "a name without numbers"),
        ("out_Gemm_weight", "125_Relu_weight", 9, "'125_Relu_weight' appears twice"),
        ("#int4_th\n", "", 6, "section '#weight_scale', expected '#int4_th'"),
        ("#int4_th", "#asym_op", 5, "section '#asym_op', expected '#int4_th'"),
        ("#weight_scale", "#weight_scale_fp8", 7, "expected '#weight_scale'"),
        ("out_Gemm_weight 1 0.1 0", "#int4_th", 9, "section '#int4_th', expected '#int4_op'"),
        ("out_Gemm_weight 1 0.1 0", "#int4_op\na b", 10, "2 fields, expected 1"),
        ("out_Gemm_weight 1 0.1 0", "#int4_op\na\na", 11, "'a' appears twice"),
        ("out_Gemm_weight 1 0.1 0", "#int4_op\n#int4_op", 10, "expected no further section"),
        ("# work_mode", "# mlir version", 1, "expected the header '# work_mode:...'"),
        ("int4_and_int8_mix #", "int2 #", 1, "unknown work mode 'int2'. Choose one of QAT_all"),
        ("# op_name    threshold", "# op_name    scale", 2, "expected the column header"),
    ],
)
def test_the_reader_says_where_and_what(old: str, new: str, line: int, match: str) -> None:
    assert TEXT.count(old) >= 1
    with pytest.raises(FormatError, match=f"^dir/t:{line}: .*{re.escape(match)}.*\\. ?[A-Z]?"):
        read(TEXT.replace(old, new, 1), "dir/t")


@pytest.mark.parametrize(
    ("text", "line", "match"),
    [
        ("", 1, "expected the header"),
        ("\n\n", 1, "expected the header"),
        (TEXT.split("\n")[0], 1, "section '#int4_th' is missing"),
        (TEXT.partition("#weight_scale")[0], 7, "section '#weight_scale' is missing"),
    ],
)
def test_a_cut_off_table(text: str, line: int, match: str) -> None:
    with pytest.raises(FormatError, match=f"^t:{line}: .*{match}"):
        read(text, "t")


def test_gaps_blank_lines_and_windows_line_ends_are_free() -> None:
    text = TEXT.replace(" 2.54", "   2.54\t").replace("#int4_th", "\n#int4_th \n")
    assert bits_of(TABLE) == bits_of(read(text.replace("\n", "\r\n"), "t"))


def test_a_tensor_may_stand_in_both_widths() -> None:
    table = CalibrationTable(activations={"x": ONE}, int4={"x": ONE})
    assert table == read(write(table), "t")


def test_an_enormous_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sophgo, "_MAX_SIZE", 100)
    with pytest.raises(FormatError, match=r"^t:1: larger than 256 MiB"):
        read(TEXT, "t")


def mutated(rng: random.Random, text: str) -> str:
    """Return ``text`` after a few random cuts, swaps, repeats and insertions."""
    for _ in range(rng.randint(1, 4)):
        a, b = sorted((rng.randrange(len(text) + 1), rng.randrange(len(text) + 1)))
        insert = rng.choice(
            ["", " ", "\n", "#", "-", ".", "e9", "nan", "\0", "\u2028", "9" * 30, "0.0", text[a:b]]
        )
        b = rng.choice([a, min(a + 3, len(text)), b])
        text = text[:a] + insert + text[b:]
    return text


def test_random_damage_raises_nothing_but_format_errors() -> None:
    rng = random.Random(0)
    refused = []
    for _ in range(1000):
        text = mutated(rng, TEXT)
        try:
            table = read(text, "t")
        except FormatError as error:
            refused.append(str(error))
        else:
            assert bits_of(table) == bits_of(read(write(table), "t"))
    assert len(refused) > 500
    for message in refused:
        assert re.match(r"t:[0-9]+: .*\.", message)


@settings(max_examples=200, deadline=None)
@given(lines=st.lists(st.text(max_size=20), max_size=4))
def test_random_lines_raise_nothing_but_format_errors(lines: list[str]) -> None:
    for head in ("# op_name    threshold    min    max", "#int4_th", "#weight_scale"):
        with suppress(FormatError):
            read(EMPTY.replace(head, "\n".join([head, *lines]), 1), "t")
