"""Make broken and odd inputs from valid ones: models, Q/DQ files, external data, data, options.

Every function takes a `random.Random` and returns a short description of its change. The functions
respect the structure of what they change, so that most mutants get past the parser.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = [
    "change_arrays",
    "change_bytes",
    "change_external",
    "change_images",
    "change_metadata",
    "change_model",
    "random_options",
]

Random = random.Random
Change = Callable[[onnx.ModelProto, Random], str]

NUMBERS = (0, 1, -1, 2, 3, 7, 64, -(2**31), 2**31, 2**40, 2**62, -(2**63), 2**63 - 1)
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, -1e30, float("inf"), float("-inf"), float("nan"))
NAMES = (
    *(
        "",
        " ",
        "a b",
        "a:b",
        "a,b",
        "a/b",
        "../x",
        "x\ny",
        "x\ty",
        "\x1b[31mred\x1b[0m",
        "%s",
        "{0}",
    ),
    *("ünï", "量化", "\u202egnp.x", '"', "'", "\\", "x" * 70_000, "x/dequantized", "x/scale"),
)
OPS = tuple(schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain)
DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "nobody.knows")
DTYPES = tuple(TensorProto.DataType.values())


def number(rng: Random) -> int:
    return rng.choice(NUMBERS) if rng.random() < 0.5 else rng.randint(-4, 300)


def all_names(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    names = [v.name for v in (*graph.input, *graph.output)] + [t.name for t in graph.initializer]
    return names + [name for node in graph.node for name in (*node.input, *node.output)]


def random_name(model: onnx.ModelProto, rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.3 else rng.choice(all_names(model) or [""])


# --- nodes ----------------------------------------------------------------------------------------


def node_of(model: onnx.ModelProto, rng: Random) -> onnx.NodeProto:
    if not model.graph.node:
        model.graph.node.add(op_type="Relu", input=[""], output=["y"])
    return rng.choice(model.graph.node)


def drop_node(model: onnx.ModelProto, rng: Random) -> str:
    node = node_of(model, rng)
    model.graph.node.remove(node)
    return f"dropped a {node.op_type}"


def repeat_node(model: onnx.ModelProto, rng: Random) -> str:
    node = node_of(model, rng)
    copy = model.graph.node.add()
    copy.CopyFrom(node)
    return f"repeated a {node.op_type}"


def shuffle_nodes(model: onnx.ModelProto, rng: Random) -> str:
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return "shuffled the nodes"


def change_edge(model: onnx.ModelProto, rng: Random) -> str:
    node = node_of(model, rng)
    kind = rng.choice(("input", "input", "output"))
    names = getattr(node, kind)
    if not names or rng.random() < 0.2:
        names.append(random_name(model, rng))
        return f"gave a {node.op_type} one more {kind}"
    place = rng.randrange(len(names))
    if rng.random() < 0.3:
        del names[place]
        return f"took {kind} {place} from a {node.op_type}"
    names[place] = random_name(model, rng)
    return f"{kind} {place} of a {node.op_type} is {names[place][:40]!r}"


def change_op(model: onnx.ModelProto, rng: Random) -> str:
    node = node_of(model, rng)
    old, node.op_type = node.op_type, rng.choice(OPS)
    return f"{old} is {node.op_type} now"


def change_domain(model: onnx.ModelProto, rng: Random) -> str:
    node = node_of(model, rng)
    node.domain = rng.choice(DOMAINS)
    if rng.random() < 0.5 and node.domain:
        model.opset_import.append(helper.make_opsetid(node.domain, rng.choice((1, 2, 13))))
    return f"domain of a {node.op_type} is {node.domain!r}"


def change_node_name(model: onnx.ModelProto, rng: Random) -> str:
    node = node_of(model, rng)
    node.name = rng.choice(NAMES) if rng.random() < 0.5 else rng.choice(model.graph.node).name
    return f"renamed a {node.op_type} to {node.name[:40]!r}"


def change_attribute(model: onnx.ModelProto, rng: Random) -> str:
    nodes = [n for n in model.graph.node if n.attribute]
    node = rng.choice(nodes) if nodes else node_of(model, rng)
    if not node.attribute or rng.random() < 0.15:
        name = rng.choice(("axis", "axes", "perm", "to", "group", "kernel_shape", "value", "pads"))
        node.attribute.append(helper.make_attribute(name, random_value(rng)))
        return f"gave a {node.op_type} '{name}'"
    attribute = rng.choice(node.attribute)
    name = attribute.name
    draw = rng.random()
    if draw < 0.2:
        node.attribute.remove(attribute)
        return f"took '{name}' from a {node.op_type}"
    if draw < 0.5 and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = number(rng)
    elif draw < 0.6 and attribute.ints:
        attribute.ints.append(number(rng))
    elif draw < 0.7 and attribute.type == onnx.AttributeProto.INT:
        attribute.i = number(rng)
    elif draw < 0.75:
        attribute.type = rng.choice(tuple(onnx.AttributeProto.AttributeType.values()))
    else:
        node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute(name, random_value(rng)))
    return f"changed '{name}' of a {node.op_type}"


def random_value(rng: Random) -> Any:
    makers: Sequence[Callable[[], Any]] = (
        lambda: number(rng),
        lambda: [number(rng) for _ in range(rng.randint(1, 5))],
        lambda: rng.choice(FLOATS),
        lambda: [rng.choice(FLOATS) for _ in range(rng.randint(1, 3))],
        lambda: rng.choice(NAMES)[:100] or "x",
        lambda: b"\xff\xfe",
        lambda: random_tensor("value", rng),
    )
    return rng.choice(makers)()


def random_tensor(name: str, rng: Random) -> TensorProto:
    shape = [rng.randint(0, 4) for _ in range(rng.randint(0, 4))]
    values = np.random.default_rng(rng.randrange(2**32)).normal(size=shape)
    dtype = rng.choice((np.float32, np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_))
    return numpy_helper.from_array(values.astype(dtype), name)


# --- tensors --------------------------------------------------------------------------------------


def initializer_of(model: onnx.ModelProto, rng: Random) -> TensorProto:
    if not model.graph.initializer:
        model.graph.initializer.append(random_tensor("w", rng))
    return rng.choice(model.graph.initializer)


def change_tensor_dims(model: onnx.ModelProto, rng: Random) -> str:
    tensor = initializer_of(model, rng)
    if not tensor.dims or rng.random() < 0.3:
        tensor.dims.append(rng.choice((1, 1, 0, 2, -1, 2**40)))
    elif rng.random() < 0.4:
        dims = list(tensor.dims)
        rng.shuffle(dims)
        tensor.dims[:] = dims
    else:
        tensor.dims[rng.randrange(len(tensor.dims))] = number(rng)
    return f"dims of '{tensor.name[:40]}' are {list(tensor.dims)}"


def change_tensor_type(model: onnx.ModelProto, rng: Random) -> str:
    tensor = initializer_of(model, rng)
    tensor.data_type = rng.choice(DTYPES)
    return f"'{tensor.name[:40]}' is of type {tensor.data_type}"


def cast_tensor(model: onnx.ModelProto, rng: Random) -> str:
    tensor = initializer_of(model, rng)
    dtype = rng.choice((np.float64, np.float16, np.int64, np.int8, np.bool_))
    try:
        values = numpy_helper.to_array(tensor).astype(dtype)
    except (ValueError, TypeError):
        return "nothing"
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return f"cast '{tensor.name[:40]}' to {np.dtype(dtype)}"


def change_tensor_data(model: onnx.ModelProto, rng: Random) -> str:
    tensor = initializer_of(model, rng)
    draw = rng.random()
    if draw < 0.3:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
        return f"cut the data of '{tensor.name[:40]}'"
    try:
        values = np.array(numpy_helper.to_array(tensor))
    except (ValueError, TypeError):
        return "nothing"
    if values.size and values.dtype.kind == "f":
        with np.errstate(all="ignore"):
            values.reshape(-1)[rng.randrange(values.size)] = rng.choice(FLOATS)
            if draw > 0.7:
                values[...] = rng.choice(FLOATS)
    elif values.size and values.dtype.kind in "iu":
        values.reshape(-1)[rng.randrange(values.size)] = number(rng) % np.iinfo(values.dtype).max
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return f"other values in '{tensor.name[:40]}'"


def change_tensor_place(model: onnx.ModelProto, rng: Random) -> str:
    tensor = initializer_of(model, rng)
    if rng.random() < 0.3:
        model.graph.initializer.remove(tensor)
        return f"dropped initializer '{tensor.name[:40]}'"
    if rng.random() < 0.5:
        model.graph.initializer.add().CopyFrom(tensor)
        return f"repeated initializer '{tensor.name[:40]}'"
    node = helper.make_node("Constant", [], [tensor.name], value=tensor)
    model.graph.initializer.remove(tensor)
    model.graph.node.insert(0, node)
    return f"'{tensor.name[:40]}' is a Constant node"


def change_strings(model: onnx.ModelProto, rng: Random) -> str:
    tensor = initializer_of(model, rng)
    name = tensor.name
    tensor.CopyFrom(TensorProto(name=name, data_type=TensorProto.STRING, dims=[2]))
    tensor.string_data.extend([b"a", b"\xff"])
    return f"'{name[:40]}' holds strings"


# --- inputs, outputs, the file --------------------------------------------------------------------


def change_value(model: onnx.ModelProto, rng: Random) -> str:
    graph = model.graph
    value = rng.choice([*graph.input, *graph.output, *graph.value_info] or [graph.output.add()])
    kind = value.type.tensor_type
    draw = rng.random()
    if draw < 0.15:
        value.ClearField("type")
        return f"'{value.name[:40]}' has no type"
    if draw < 0.3:
        kind.elem_type = rng.choice(DTYPES)
    elif draw < 0.4:
        kind.ClearField("shape")
    elif draw < 0.5:
        value.type.sequence_type.elem_type.tensor_type.elem_type = 1
    elif draw < 0.6:
        value.name = random_name(model, rng)
    elif kind.shape.dim and draw < 0.9:
        dim = rng.choice(kind.shape.dim)
        if rng.random() < 0.4:
            dim.dim_param = rng.choice(NAMES)[:100]
        else:
            dim.dim_value = number(rng)
    else:
        kind.shape.dim.add().dim_value = number(rng)
    return f"another type of '{value.name[:40]}'"


def change_interface(model: onnx.ModelProto, rng: Random) -> str:
    values = rng.choice((model.graph.input, model.graph.output))
    if values and rng.random() < 0.5:
        del values[rng.randrange(len(values))]
        return "dropped an input or output"
    info = helper.make_tensor_value_info(random_name(model, rng), rng.choice((1, 7, 11)), ["N", 3])
    values.append(info)
    return f"one more input or output, '{info.name[:40]}'"


def change_versions(model: onnx.ModelProto, rng: Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        model.ir_version = rng.choice((0, 3, 7, 10, 11, 13, 99, -1))
    elif draw < 0.5 and model.opset_import:
        del model.opset_import[:]
    elif draw < 0.6:
        model.opset_import.append(helper.make_opsetid("", rng.randint(1, 30)))
    elif model.opset_import:
        model.opset_import[0].version = rng.choice((*range(7, 29), 0, -1, 10**6))
    return f"ir {model.ir_version}, opsets {[o.version for o in model.opset_import]}"


def rename_everywhere(model: onnx.ModelProto, rng: Random) -> str:
    old, new = rng.choice(all_names(model) or [""]), rng.choice(NAMES) + str(rng.randrange(9))
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    graph = model.graph
    for item in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        if item.name == old:
            item.name = new
    return f"renamed '{old[:40]}' to {new[:40]!r}"


def add_cycle(model: onnx.ModelProto, rng: Random) -> str:
    first, last = node_of(model, rng), node_of(model, rng)
    if first.input and last.output:
        first.input[0] = last.output[0]
    return f"a {first.op_type} reads a {last.op_type}"


def add_bomb(model: onnx.ModelProto, rng: Random) -> str:
    """Add nodes that compute very large tensors from small ones."""
    kind = rng.choice(("concat", "range", "expand", "tile", "functions", "pad", "subgraphs"))
    graph = model.graph
    size = helper.make_tensor("bomb.n", TensorProto.INT64, [1], [2 ** rng.choice((20, 30, 40))])
    graph.initializer.append(size)
    graph.initializer.append(helper.make_tensor("bomb.x", TensorProto.FLOAT, [1], [1.0]))
    if kind == "concat":
        name = "bomb.x"
        for step in range(rng.choice((12, 28, 60))):
            graph.node.append(helper.make_node("Concat", [name, name], [f"bomb{step}"], axis=0))
            name = f"bomb{step}"
    elif kind == "range":
        ends = [helper.make_tensor(f"bomb.{k}", TensorProto.INT64, [], [v])
                for k, v in (("a", 0), ("b", 10**11), ("c", 1))]  # fmt: skip
        graph.initializer.extend(ends)
        graph.node.append(helper.make_node("Range", ["bomb.a", "bomb.b", "bomb.c"], ["bomb0"]))
    elif kind == "functions":
        _nested_functions(model, rng.choice((5, 18, 40)))
    elif kind == "subgraphs":
        inner = helper.make_graph([helper.make_node("Relu", ["bomb.x"], ["y"])], "g", [],
                                  [helper.make_tensor_value_info("y", 1, None)])  # fmt: skip
        graph.initializer.append(helper.make_tensor("bomb.t", TensorProto.BOOL, [], [True]))
        for step in range(rng.choice((3, 20, 24))):  # deeper ones cannot be written
            branches = {"then_branch": inner} | ({"else_branch": inner} if step < 6 else {})
            node = helper.make_node("If", ["bomb.t"], ["y"], **branches)
            inner = helper.make_graph(
                [node], "g", [], [helper.make_tensor_value_info("y", 1, None)]
            )
        graph.node.extend(inner.node)
    else:
        op = {"expand": "Expand", "tile": "Tile", "pad": "ConstantOfShape"}[kind]
        for step in range(rng.choice((1, 60))):
            inputs = ["bomb.n"] if kind == "pad" else ["bomb.x", "bomb.n"]
            graph.node.append(helper.make_node(op, inputs, [f"bomb{step}"]))
    target = rng.choice(
        [n for n in graph.node if len(n.input) > 1 and n.op_type == "Add"] or [None]
    )
    if target is not None:
        target.input[1] = graph.node[-1].output[0]
    else:
        graph.output.append(helper.make_tensor_value_info(graph.node[-1].output[0], 1, None))
    return f"a bomb of {kind}"


def _nested_functions(model: onnx.ModelProto, depth: int) -> None:
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("bomb", 1)]
    for level in range(depth):
        op, domain = ("Relu", "") if not level else (f"f{level - 1}", "bomb")
        nodes = [helper.make_node(op, ["x"], ["m"], domain=domain),
                 helper.make_node(op, ["m"], ["y"], domain=domain)]  # fmt: skip
        model.functions.append(
            helper.make_function("bomb", f"f{level}", ["x"], ["y"], nodes, opsets)
        )
    if all(opset.domain != "bomb" for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid("bomb", 1))
    model.graph.node.append(
        helper.make_node(f"f{depth - 1}", ["bomb.x"], ["bomb.y"], domain="bomb")
    )


NODE_CHANGES: tuple[Change, ...] = (
    *(drop_node, repeat_node, shuffle_nodes, change_edge, change_edge, change_edge, change_op),
    *(change_op, change_domain, change_node_name, change_attribute, change_attribute, add_cycle),
)
TENSOR_CHANGES: tuple[Change, ...] = (
    *(change_tensor_dims, change_tensor_type, cast_tensor, change_tensor_data),
    *(change_tensor_place, change_strings),
)
FILE_CHANGES: tuple[Change, ...] = (
    *(change_value, change_value, change_interface, change_versions, rename_everywhere, add_bomb),
)


def change_model(model: onnx.ModelProto, rng: Random) -> str:
    """Change a model in one to three places."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        changes = rng.choice((NODE_CHANGES, NODE_CHANGES, TENSOR_CHANGES, FILE_CHANGES))
        done.append(rng.choice(changes)(model, rng))
    return "; ".join(done)


def change_bytes(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Change the bytes of a file: cut it, or insert bytes, also some that are not UTF-8."""
    if not data or rng.random() < 0.2:
        length = rng.randrange(len(data) + 1)
        return data[:length], f"cut to {length} bytes"
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        changed[rng.randrange(len(changed))] = rng.choice((0, 0xFF, 0x80, rng.randrange(256)))
    return bytes(changed), "other bytes"


def change_metadata(model: onnx.ModelProto, rng: Random) -> str:
    """Change the metadata of a Q/DQ file: the text, or one value somewhere in its JSON."""
    entry = rng.choice(model.metadata_props or [model.metadata_props.add(key="onnxqat.plan")])
    draw = rng.random()
    if draw < 0.15:
        model.metadata_props.remove(entry)
        return f"dropped '{entry.key}'"
    if draw < 0.3:
        entry.value = rng.choice(("", "{}", "[]", "null", "1e999", "[" * 5000, *NAMES))
        return f"'{entry.key}' is {entry.value[:40]!r}"
    try:
        document = json.loads(entry.value)
    except ValueError:
        entry.value += "x"
        return f"'{entry.key}' ends with x"
    path = _replace_somewhere(document, rng)
    entry.value = json.dumps(document)
    return f"'{entry.key}' has another value at {path}"


def _replace_somewhere(document: Any, rng: Random) -> str:
    value, path = document, ""
    while isinstance(value, dict | list) and value:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        path += f"/{key}"
        if not isinstance(value[key], dict | list) or not value[key] or rng.random() < 0.1:
            if rng.random() < 0.2 and isinstance(value, dict):
                del value[key]
            else:
                value[key] = rng.choice((None, [], {}, True, -1, 0, 99, 0.5, "", "int8", "x y"))
            break
        value = value[key]
    return path[:80]


def change_external(model: onnx.ModelProto, rng: Random) -> str:
    """Change the location of tensors' external data."""
    tensors = [t for t in model.graph.initializer if t.external_data]
    tensor = rng.choice(tensors)
    entry = rng.choice(tensor.external_data)
    values = {
        "location": (
            "",
            ".",
            "..",
            "../secret",
            "/etc/passwd",
            "no such",
            "a\0b",
            "x" * 5000,
            "link",
        ),
        "offset": ("-1", "1", "x", str(2**63), "1e3", "", "9" * 5000),
        "length": ("-1", "0", "1", "x", str(2**63), ""),
    }
    draw = rng.random()
    if draw < 0.2:
        tensor.external_data.remove(entry)
        return f"dropped '{entry.key}'"
    if draw < 0.3:
        entry.key = rng.choice(("location", "checksum", "", "offset"))
        return f"key is '{entry.key}'"
    if draw < 0.4:
        return change_tensor_dims(model, rng)
    entry.value = rng.choice(values.get(entry.key, ("x",)))
    return f"'{entry.key}' is {entry.value[:40]!r}"


# --- data and options -----------------------------------------------------------------------------


def change_arrays(path: Path, rng: Random) -> str:
    """Change an .npz file: its bytes, the header of a member, an array, or the set of arrays."""
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = rng.choice(list(arrays))
    array, done = arrays[name], f"'{name}': "
    draw = rng.random()
    if draw < 0.25:
        data, what = change_bytes(path.read_bytes(), rng)
        path.write_bytes(data)
        return what
    if draw < 0.35:
        with zipfile.ZipFile(path, "w") as archive:
            buffer = io.BytesIO()
            np.save(buffer, array)
            length = rng.choice(("99999999999", "-1", "()", "1e3"))
            header = buffer.getvalue().replace(str(len(array)).encode(), length.encode(), 1)
            archive.writestr(f"{name}.npy", header)
        return done + f"its header says {length}"
    if draw < 0.5:
        del arrays[name]
        done += "dropped"
    elif draw < 0.7:
        dtype = rng.choice((np.float64, np.int8, np.bool_, np.complex64, np.str_, np.uint64))
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(dtype)
        done += f"of {np.dtype(dtype)}"
    elif draw < 0.85:
        changed = array[..., None] if rng.random() < 0.5 else array[: rng.randrange(4)]
        arrays[name] = changed
        done += f"of shape {changed.shape}"
    else:
        changed = np.array(array)
        if changed.dtype.kind == "f" and changed.size:
            changed.reshape(-1)[rng.randrange(changed.size)] = rng.choice(FLOATS)
        elif changed.size:
            with np.errstate(all="ignore"):
                changed.reshape(-1)[rng.randrange(changed.size)] = np.int64(number(rng) % 200)
        arrays[name] = changed
        done += "other values"
    np.savez(path, **arrays)
    return done


def change_images(folder: Path, rng: Random) -> str:
    """Change a folder of images: bytes, names, folders."""
    images = sorted(p for p in folder.rglob("*") if p.is_file())
    image = rng.choice(images)
    draw = rng.random()
    if draw < 0.6:
        data, done = change_bytes(image.read_bytes(), rng)
        image.write_bytes(data)
        return f"{image.name}: {done}"
    if draw < 0.7:
        image.unlink()
        image.symlink_to(rng.choice(("/dev/zero", "nowhere", image.name)))
        return f"{image.name} is a link"
    if draw < 0.85:
        name = rng.choice([n for n in NAMES if n and "/" not in n and len(n) < 200])
        image.rename(image.with_name(f"{name}{rng.choice(('.png', '.jpg', '.gif', '.txt', ''))}"))
        return f"renamed {image.name} to {name!r}"
    target = folder / rng.choice(("train", "0", "x y", "val", "n01440000", "-1", "99999999999"))
    if not target.exists():
        image.parent.rename(target)
    return f"folder {target.name}"


VALUES = (
    "",
    "0",
    "-1",
    "1",
    "2.5",
    "nan",
    "inf",
    "1,2,3",
    "x",
    "1e400",
    "none",
    "true",
    "[",
    "a=b",
)
# Valid values, by option.
OPTIONS = {
    "--mean": ("128", "1,2,3", "0"),
    "--scale": ("0.0078125", "1", "0.01,0.02,0.03"),
    "--resize-dims": ("32,32", "256,256", "1,1"),
    "--crop": ("28,28", "16,16"),
    "--pad-value": ("114", "0"),
    "--pixel-format": ("rgb", "bgr", "gray"),
    "--layout": ("nchw", "nhwc"),
    "--label": ("none", "label", "input"),
    "--input": ("input=input", "x=images"),
    "--batch-size": ("1", "3", "1000000"),
    "--threads": ("1", "2"),
    "--seed": ("7",),
    "--samples": ("1", "5", "100000"),
    "--observer": ("minmax", "mse", "percentile"),
    "--rules": ("tensorrt", "ascend", "/dev/zero", "."),
    "--overrides": ("/dev/null", ".", "no.toml"),
}
TRAINING = {
    "--loss": ("mse", "kl", "kl:output", "mse+0.5*l1", "/dev/null", "1e30*mse"),
    "--lr": ("0.001", "1e30"),
    "--epochs": ("2",),
    "--accumulate": ("2", "1000"),
    "--clip-norm": ("1",),
    "--schedule": ("step", "one-cycle"),
    "--warmup": ("0.5", "1"),
    "--ema": ("0.9",),
    "--select": ("loss", "agreement", "top1"),
    "--patience": ("1",),
    "--augment": ("flip", "flip,crop"),
    "--method": ("lsq+", "pact", "dsq", "moving-average", "ste"),
    "--group": ("weight.lr=0.1", "bias.freeze=true", "tensor:.*.freeze_from=1"),
    "--weight-decay": ("0.1",),
    "--optimizer": ("sgd", "adam"),
    "--checkpoint-every": ("1steps", "never", "1min"),
    "--quant-delay": ("1", "1000"),
    "--label-smoothing": ("0.1",),
    "--momentum": ("0.5",),
}
SELECTORS = (
    "weight",
    "activation",
    "bias",
    "first",
    "last",
    "op:Conv",
    "name:.*",
    "tensor:(",
    "op:",
)
KEYS = {
    "bits": ("2", "4", "16", "1", "99"),
    "symmetric": ("true", "false"),
    "axis": ("none", "0", "1", "-1", "9"),
    "quantize": ("false", "true"),
    "observer": ("mse", "minmax"),
    "range": ("[0, 1]", "1"),
    "method": ("lsq", "pact"),
    "no_such": ("1",),
}


def random_options(rng: Random, *, training: bool) -> list[str]:
    """Return one to three options with values that may or may not be valid."""
    words: list[str] = []
    known = TRAINING if training else OPTIONS
    for _ in range(rng.randint(1, 3)):
        options = KEYS if not training and rng.random() < 0.4 else known
        name = rng.choice(list(options))
        value = rng.choice(options[name] if rng.random() < 0.7 else (*VALUES, *NAMES))
        if options is KEYS:
            words += ["--set", f"{rng.choice(SELECTORS)}.{name}={value}"]
        else:
            words += [name, value]
    return words
