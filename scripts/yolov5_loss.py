"""Write the loss of YOLOv5's training as an ONNX file, for ``onnxqat finetune --loss FILE``.

    python scripts/yolov5_loss.py yolov5s.onnx -o yolov5s-loss.onnx
    python scripts/yolov5_loss.py MODEL.onnx --anchors 8,8,12,12,... --boxes BOXES --count COUNT \
        -o loss.onnx

MODEL is an export of YOLOv5 with its boxes decoded: one output (N, boxes, 5 + classes) of centre
and size in pixels, objectness and classes as probabilities, and an input of fixed size. It needs
opset 16 or higher. The loss reads that output, by its name, and two arrays of the data, which a
folder of images with boxes has (docs/data.md):

``targets``        (N, most, 5 or more) of class, cx, cy, w, h, relative to the model's input. A row
                   whose class is negative does not count. ``--boxes`` gives another name.
``targets_count``  (N,) int64, the number of rows of each image that count; what stands behind them
                   may be anything. ``--count`` gives another name, or none.

The loss is that of ultralytics/yolov5 v7.0, utils/loss.py: ComputeLoss. A box of the model predicts
a target under two conditions. Width and height of the target and of the box's anchor differ by less
than 4 times. And the centre of the target lies in the box's cell, or within half a cell of it to
the left, right, top or bottom. The loss is the sum over the three maps of

- the mean over these boxes of 1 - CIoU (Zheng et al. 2020, https://arxiv.org/abs/1911.08287v1,
  equations 8 to 11; no gradient passes through alpha);
- the mean over all boxes of the binary cross-entropy of the objectness, whose target is the CIoU
  where there is a target, at least 0, and 0 elsewhere. No gradient passes through it;
- the mean over these boxes and the classes of the binary cross-entropy of the classes.

Their weights are those of YOLOv5's train.py: 0.05, (size / 640)^2 times 4, 1 and 0.4 for the maps,
and classes / 160. Three things differ from YOLOv5:

- If a box predicts several targets, their mean CIoU is the target of its objectness; YOLOv5 takes
  the CIoU of one of them.
- The loss reads probabilities, which a chip may round to 0 and 1. Each probability p becomes
  1/512 + p * (1 - 2/512), so that its logarithm is finite.
- YOLOv5 multiplies the sum by the batch size. AdamW does not depend on such a factor.

The script needs onnx and numpy only. The text below is ONNX as `onnx.parser` reads it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.parser
from numpy.typing import NDArray
from onnx import numpy_helper

STRIDES, BALANCE = (8, 16, 32), (4.0, 1.0, 0.4)
COCO = (10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326)
BOX, OBJECTNESS, CLASSES = 0.05, 1.0, 0.5  # YOLOv5's data/hyps/hyp.scratch-low.yaml
# a box may predict a target in its own cell, and in that to the right, below, to the left, above
STEPS = ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1))
DOUBT = 1 / 512

Array = NDArray[Any]

# In comments: N images, M targets of each, B boxes, C classes, and K ways in which a box can
# predict a target: by a map, one of its anchors and a step. Q = M * K.
LOSS = """
<ir_version: 8, opset_import: ["" : 17]>
yolov5_loss (float[N, B, V] prediction, float[N, M, D] boxes{count_input}) => (float loss)
<int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, int64[1] i3 = {{3}},
 int64[1] i4 = {{4}}, int64[1] i5 = {{5}},
 int64[3] candidates = {{0, -1, 2}}, int64[3] columns = {{0, -1, 1}},
 int64[2] ways = {{-1, {ways}}}, int64[3] kinds = {{0, -1, {classes}}},
 int64[1] end = {{9223372036854775807}},
 float zero = {{0}}, float half = {{0.5}}, float one = {{1}},
 float limit = {{4}}, float tiny = {{1e-7}}, float over = {{1.0000001}},
 float turn = {{{turn}}}, float sure = {{{sure}}}, float doubt = {{{doubt}}},
 float box_weight = {{{box}}}, float class_weight = {{{class_weight}}}, double none = {{0}},
 double single = {{1}}>
{{
  label = Slice(boxes, i0, i1, i2)                   # N, M, 1
  place = Slice(boxes, i1, i3, i2)
  length = Slice(boxes, i3, i5, i2)
  pixel_place = Mul(place, size)                     # N, M, 2
  pixel_length = Mul(length, size)
  target_place = Unsqueeze(pixel_place, i2)          # N, M, 1, 2
  target_length = Unsqueeze(pixel_length, i2)
  padding = Less(label, zero)
  labelled = Not(padding)
{count_nodes}
  # anchors of about the target's size
  longer = Div(target_length, anchor)                # N, M, K, 2
  shorter = Div(anchor, target_length)
  ratio = Max(longer, shorter)
  worst = ReduceMax <axes = [3], keepdims = 0> (ratio)
  fits = Less(worst, limit)                          # N, M, K

  # cells: that of the target, and those beside it that its centre is near to
  at = Div(target_place, stride)
  moved = Add(at, half_step)
  beside = Floor(moved)
  not_below = Max(beside, zero)
  cell = Min(not_below, last)                        # N, M, K, 2
  turned = Mul(at, sign)
  along = Add(turned, far)
  whole = Floor(along)
  rest = Sub(along, whole)
  near = Less(rest, half)
  inside = Greater(along, one)
  both = And(near, inside)
  as_number = Cast <to = 1> (both)
  on_both_axes = ReduceMin <axes = [3], keepdims = 0> (as_number)
  reached = Cast <to = 9> (on_both_axes)
  possible = And(fits, reached)
  chosen = And(possible, counts)                     # N, M, K
  taken = Cast <to = 1> (chosen)
  flat_taken = Reshape(taken, ways)                  # N * M, K
  mask = Reshape(taken, columns)                     # N, Q, 1

  # the boxes of these cells
  x, y = Split <axis = 3> (cell)
  column_kept = Cast <to = 7> (x)
  row_kept = Cast <to = 7> (y)
  column = Squeeze(column_kept, i3)
  row = Squeeze(row_kept, i3)
  before = Mul(row, row_length)
  within = Add(before, column)
  index = Add(within, start)                         # N, M, K
  indices = Reshape(index, columns)                  # N, Q, 1
  found = GatherND <batch_dims = 1> (prediction, indices)
  box = Slice(found, i0, i4, i2)
  found_classes = Slice(found, i5, end, i2)
  found_place, found_length = Split <axis = 2> (box)
  wide_place = Mul(target_place, ones)
  wide_length = Mul(target_length, ones)
  true_place = Reshape(wide_place, candidates)       # N, Q, 2
  true_length = Reshape(wide_length, candidates)

  # CIoU
  found_half = Mul(found_length, half)
  true_half = Mul(true_length, half)
  found_low = Sub(found_place, found_half)
  found_high = Add(found_place, found_half)
  true_low = Sub(true_place, true_half)
  true_high = Add(true_place, true_half)
  common_low = Max(found_low, true_low)
  common_high = Min(found_high, true_high)
  common_length = Sub(common_high, common_low)
  common_sides = Relu(common_length)
  common_width, common_height = Split <axis = 2> (common_sides)
  common = Mul(common_width, common_height)
  width, height = Split <axis = 2> (found_length)
  true_width, true_height = Split <axis = 2> (true_length)
  area = Mul(width, height)
  true_area = Mul(true_width, true_height)
  areas = Add(area, true_area)
  union_exact = Sub(areas, common)
  union = Add(union_exact, tiny)
  iou = Div(common, union)
  around_low = Min(found_low, true_low)
  around_high = Max(found_high, true_high)
  around = Sub(around_high, around_low)
  around_squared = Mul(around, around)
  diagonal_exact = ReduceSum(around_squared, i2)
  diagonal = Add(diagonal_exact, tiny)
  apart = Sub(found_place, true_place)
  apart_squared = Mul(apart, apart)
  distance = ReduceSum(apart_squared, i2)
  far_apart = Div(distance, diagonal)
  height_above = Add(height, tiny)
  true_height_above = Add(true_height, tiny)
  aspect = Div(width, height_above)
  true_aspect = Div(true_width, true_height_above)
  angle = Atan(aspect)
  true_angle = Atan(true_aspect)
  difference = Sub(true_angle, angle)
  squared = Mul(difference, difference)
  unlike = Mul(squared, turn)
  missing = Sub(over, iou)
  alpha_below = Add(unlike, missing)
  alpha_passing = Div(unlike, alpha_below)
  alpha_double = Cast <to = 11> (alpha_passing)      # a float64 passes no gradient
  alpha = Cast <to = 1> (alpha_double)
  aspect_part = Mul(unlike, alpha)
  iou_near = Sub(iou, far_apart)
  ciou = Sub(iou_near, aspect_part)                  # N, Q, 1
  loss_of_box = Sub(one, ciou)
  box_masked = Mul(loss_of_box, mask)
  box_ways = Reshape(box_masked, ways)
  box_sums = ReduceSum(box_ways, i0)
  box_maps = MatMul(box_sums, map_of_way)            # 1, maps
  taken_sums = ReduceSum(flat_taken, i0)
  taken_maps = MatMul(taken_sums, map_of_way)
  taken_some = Max(taken_maps, one)
  box_means = Div(box_maps, taken_some)
  box_loss = ReduceSum <keepdims = 0> (box_means)

  # classes
  is_class = Equal(label, class_numbers)             # N, M, C
  class_true = Cast <to = 1> (is_class)
  class_ways = Unsqueeze(class_true, i2)
  class_wide = Mul(class_ways, ones)
  class_target = Reshape(class_wide, kinds)          # N, Q, C
  class_less = Mul(found_classes, sure)
  class_found = Add(class_less, doubt)
  class_not_found = Sub(one, class_found)
  class_log = Log(class_found)
  class_not_log = Log(class_not_found)
  class_not = Sub(one, class_target)
  class_hit = Mul(class_target, class_log)
  class_miss = Mul(class_not, class_not_log)
  class_both = Add(class_hit, class_miss)
  class_mean = ReduceMean <axes = [2]> (class_both)
  class_loss_of_box = Neg(class_mean)
  class_masked = Mul(class_loss_of_box, mask)
  class_by_way = Reshape(class_masked, ways)
  class_sums = ReduceSum(class_by_way, i0)
  class_maps = MatMul(class_sums, map_of_way)
  class_means = Div(class_maps, taken_some)
  class_loss = ReduceSum <keepdims = 0> (class_means)

  # objectness: the mean CIoU of a box's targets is what it should say
  all_objectness = Slice(prediction, i4, i5, i2)       # N, B, 1
  nothing_passing = Cast <to = 11> (all_objectness)
  nothing = Mul(nothing_passing, none)
  ciou_double = Cast <to = 11> (ciou)
  quality = Relu(ciou_double)
  mask_double = Cast <to = 11> (mask)
  quality_masked = Mul(quality, mask_double)
  quality_sum = ScatterElements <axis = 1, reduction = "add"> (nothing, indices, quality_masked)
  hits = ScatterElements <axis = 1, reduction = "add"> (nothing, indices, mask_double)
  hits_some = Max(hits, single)
  quality_mean = Div(quality_sum, hits_some)
  wanted = Cast <to = 1> (quality_mean)
  less = Mul(all_objectness, sure)
  said = Add(less, doubt)
  not_said = Sub(one, said)
  log_said = Log(said)
  log_not_said = Log(not_said)
  not_wanted = Sub(one, wanted)
  hit = Mul(wanted, log_said)
  miss = Mul(not_wanted, log_not_said)
  hit_or_miss = Add(hit, miss)
  weighted = Mul(hit_or_miss, objectness_weight)
  by_image = ReduceSum(weighted, i1)
  objectness_negative = ReduceMean <keepdims = 0> (by_image)

  box_part = Mul(box_loss, box_weight)
  class_part = Mul(class_loss, class_weight)
  boxes_and_classes = Add(box_part, class_part)
  loss = Sub(boxes_and_classes, objectness_negative)
}}
"""
BY_CLASS = "  counts = Identity(labelled)                       # N, M, 1"
BY_COUNT = """
  first = Constant <value_int = 0> ()
  next = Constant <value_int = 1> ()
  lengths = Shape(boxes)
  most = Gather(lengths, next)
  numbers = Range(first, most, next)
  number = Unsqueeze(numbers, i1)                    # M, 1
  count_column = Unsqueeze(count, i1)
  count_of_image = Unsqueeze(count_column, i1)       # N, 1, 1
  before_end = Less(number, count_of_image)          # N, M, 1
  counts = And(before_end, labelled)
"""


class Export(NamedTuple):
    """What a loss needs to know of a model: name of its output, and sizes in pixels and values."""

    output: str
    height: int
    width: int
    boxes: int
    classes: int


def read_export(path: Path) -> Export:
    """Return what the file says; leave with a message where it is no export of YOLOv5."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {weight.name for weight in graph.initializer}
    (image, *_) = [value for value in graph.input if value.name not in constants]
    height, width = (d.dim_value for d in image.type.tensor_type.shape.dim[2:])
    output = graph.output[0]
    _, boxes, values = (d.dim_value for d in output.type.tensor_type.shape.dim)
    cells = sum((height // stride) * (width // stride) for stride in STRIDES)
    if boxes != 3 * cells or values < 6:
        raise SystemExit(
            f"{path}: the output '{output.name}' has {boxes} boxes of {values} values for an input "
            f"of {height} x {width}, where a YOLOv5 of three maps has {3 * cells} boxes. Export "
            "it with its boxes decoded, for a fixed size of the image."
        )
    return Export(output.name, height, width, boxes, values - 5)


def constants(model: Export, anchors: Array) -> dict[str, Array]:
    """Return the arrays that the text reads; (1, 1, K, 2) is x and y of each way."""
    sides = [(model.width // stride, model.height // stride) for stride in STRIDES]
    starts = np.cumsum([0, *(3 * columns * rows for columns, rows in sides)])
    ways = [(m, a, step) for m in range(3) for a in range(3) for step in STEPS]
    by_axis: dict[str, list[Any]] = {name: [] for name in ("anchor", "stride", "last", "half_step",
                                                          "sign", "far")}  # fmt: skip
    for m, a, step in ways:
        side = np.array(sides[m])
        by_axis["anchor"].append(anchors[m, a])
        by_axis["stride"].append((STRIDES[m], STRIDES[m]))
        by_axis["last"].append(side - 1)
        by_axis["half_step"].append([direction / 2 for direction in step])
        # where a step leads on, the distance from the edge that it leads to; elsewhere what passes
        by_axis["sign"].append([-direction for direction in step])
        by_axis["far"].append([(2, side[i], 0)[direction] for i, direction in enumerate(step)])
    found = {name: np.array(rows, np.float32)[None, None] for name, rows in by_axis.items()}
    cells = [columns * rows for columns, rows in sides]
    start = [starts[m] + a * cells[m] for m, a, _ in ways]
    gain = OBJECTNESS * model.width * model.height / 640**2
    weights = [np.full(3 * n, gain * b / (3 * n)) for n, b in zip(cells, BALANCE, strict=True)]
    return found | {
        "size": np.array([model.width, model.height], np.float32),
        "start": np.array(start, np.int64)[None, None],
        "row_length": np.array([sides[m][0] for m, _, _ in ways], np.int64)[None, None],
        "map_of_way": np.eye(3, dtype=np.float32)[[m for m, _, _ in ways]],
        "ones": np.ones((1, 1, len(ways), 1), np.float32),
        "class_numbers": np.arange(model.classes, dtype=np.float32),
        "objectness_weight": np.concatenate(weights).astype(np.float32)[None, :, None],
    }


def loss_of(model: Export, anchors: Array, boxes: str, count: str | None) -> onnx.ModelProto:
    """Return the loss of a model.

    Parameters
    ----------
    model : Export
        What it is of.
    anchors : array of shape (3, 3, 2)
        Width and height in pixels of the anchors of each map.
    boxes, count : str, str or None
        Names of the arrays of the data.
    """
    arrays = constants(model, anchors)
    # one class is never wrong: YOLOv5 leaves its loss out
    class_weight = CLASSES * model.classes / 80 if model.classes > 1 else 0.0
    text = LOSS.format(
        count_input=", int64[N] count" if count else "",
        count_nodes=BY_COUNT if count else BY_CLASS,
        classes=model.classes,
        ways=arrays["start"].size,
        turn=repr(4 / np.pi**2),
        sure=1 - 2 * DOUBT,
        doubt=DOUBT,
        box=BOX,
        class_weight=class_weight,
    )
    lines = (line.partition("#")[0].rstrip() for line in text.splitlines())
    loss = onnx.parser.parse_model("\n".join(filter(None, lines)))
    for name, array in arrays.items():
        loss.graph.initializer.append(numpy_helper.from_array(array, name))
    outside = {"prediction": model.output, "boxes": boxes, "count": count or "", "loss": "loss"}
    _rename(loss.graph, outside)
    onnx.checker.check_model(loss, full_check=True)
    return loss


def _rename(graph: onnx.GraphProto, outside: dict[str, str]) -> None:
    """Give inputs the names of what they read, and a prefix to what is inside."""

    def renamed(name: str) -> str:
        return outside.get(name) or f"yolov5/{name}"

    for value in (*graph.input, *graph.initializer):
        value.name = renamed(value.name)
    for node in graph.node:
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="an export of YOLOv5, its boxes decoded")
    parser.add_argument(
        "--anchors",
        default=",".join(map(str, COCO)),
        help="width,height,... in pixels of the three anchors of each map (default: YOLOv5's)",
    )
    parser.add_argument("--boxes", default="targets", help="array of the data (default: targets)")
    parser.add_argument(
        "--count", default="targets_count", help="array of the data, or none (default: %(default)s)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the loss file")
    given = parser.parse_args()
    numbers = [float(number) for number in given.anchors.split(",")]
    if len(numbers) != 18:
        parser.error(f"--anchors: {len(numbers)} numbers; give 3 maps x 3 anchors x 2")
    anchors = np.array(numbers, np.float32).reshape(3, 3, 2)
    count = None if given.count == "none" else given.count
    loss = loss_of(read_export(given.model), anchors, given.boxes, count)
    onnx.save(loss, given.output)


if __name__ == "__main__":
    main()
