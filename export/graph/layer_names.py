"""Names that say where a layer is: receipts and plans name it by the module that it was."""

import ast
import re

import onnx_ir as ir

from cnngru_edge.calibration.ranges.collect import FRONTEND_NODES
from cnngru_edge.export.graph.files import RECURRENT_OPS

_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where torch's newer exporter says which modules a node is in: "['', 'head', 'linear']"."""
_MADE_UP = re.compile(r"(onnx::\w+|val|const|_val|_inlfunc\w*)?[_\d]*")
"""Names that exporters give to what has none."""
_ROLES = {
    "Conv": (None, "weight", "bias"),
    "ConvTranspose": (None, "weight", "bias"),
    "MatMul": (None, "weight"),
    "Gemm": (None, "weight", "bias"),
    "Gather": ("weight",),
    "GRU": (None, "W", "R", "B"),
    "LSTM": (None, "W", "R", "B"),
    "RNN": (None, "W", "R", "B"),
}


def name_nodes(graph: ir.Graph) -> None:
    """Give every node a name, and those of layers one below their module: `/convs.0/Conv`."""
    taken: set[str] = set()
    for number, node in enumerate(graph.all_nodes()):
        name = node.name or f"{node.op_type.lower()}_{number}"
        if _is_layer(node):
            module = _module(node) or name.strip("/")
            if _path_of(name) != module:
                name = f"/{module}/{node.op_type}"
        elif (scopes := scopes_of(node)) and not name.startswith("/"):
            name = f"/{scopes}/{node.op_type}"
        if not (node.name or "").startswith(FRONTEND_NODES):
            name = outside_front_end(name)
        node.name = _free(name, taken)
        taken.add(node.name)


def outside_front_end(name: str) -> str:
    """The name of a node of somebody else, another one where it is as those of our front-end."""
    if not name.startswith(FRONTEND_NODES):
        return name
    return f"{FRONTEND_NODES.rstrip('/')}_of_module/{name.removeprefix(FRONTEND_NODES)}"


def name_weights(graph: ir.Graph) -> None:
    """Call the weights of layers `<module>.weight`; one that several read keeps one name."""
    renamed: set[ir.Value] = set()
    for node in graph:
        if not _is_layer(node):
            continue
        module = _path_of(node.name or "")
        for role, value in zip(_ROLES[node.op_type], node.inputs, strict=False):
            if role is None or value is None or not value.is_initializer() or value in renamed:
                continue
            renamed.add(value)
            if (value.name or "").endswith(f".{role}"):
                continue
            name = f"{module}.{role}"
            count = 1
            while name in graph.initializers:
                count += 1
                name = f"{module}_{count}.{role}"
            rename_initializer(graph, value, name)


def rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    """Give an initializer another name, unless another one has it."""
    if name not in graph.initializers:
        assert value.name is not None
        del graph.initializers[value.name]
        value.name = name
        graph.initializers[name] = value


def _is_layer(node: ir.Node) -> bool:
    """Whether a node has weights that are worth a name."""
    roles = _ROLES.get(node.op_type)
    if roles is None or node.domain or (node.name or "").startswith(FRONTEND_NODES):
        return False
    return _weight(node) is not None


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant of a layer, on whichever side of a product it is."""
    index = next(i for i, role in enumerate(_ROLES[node.op_type]) if role)
    for value in node.inputs[:2] if node.op_type == "MatMul" else node.inputs[index : index + 1]:
        if value is not None and value.is_initializer() and len(value.shape or ()) > 1:
            return value
    return None


def _module(node: ir.Node) -> str:
    """The module that a layer was, as far as anything tells."""
    weight = _weight(node)
    name = (weight.name or "") if weight is not None else ""
    if name.endswith(".weight"):
        return name.removesuffix(".weight")
    path = scopes_of(node) or _path_of(node.name or "")
    if path:
        return path
    if not _MADE_UP.fullmatch(name) and node.op_type not in RECURRENT_OPS:
        return re.sub(r"[^\w.]+", "_", name)
    return ""


def scopes_of(node: ir.Node) -> str:
    """The innermost module that torch's newer exporter names; the last of all is the operator."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _path_of(name: str) -> str:
    """The path in a node's name; a part that its successor spells out again is left out."""
    parts = name.strip("/").split("/")[:-1]
    kept = [
        part
        for part, following in zip(parts, [*parts[1:], ""], strict=False)
        if not following.startswith(f"{part}.")
    ]
    return ".".join(kept)


def _free(name: str, taken: set[str]) -> str:
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    return free
