"""The int8 linears of others, each as a function of float activations, so that all are timed on the same task.

What is not installed, or does not run here, is left out and said so once.
"""

import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.ops import int8_quantize

Linear = Callable[[Tensor], Tensor]


def int8_linears(linear: nn.Linear, rows: int) -> dict[str, Linear]:
    """Every peer that runs here, over `linear`'s weight, made for `rows` rows of activations."""
    found = {}
    for name, make in _makers().items():
        try:
            peer = make(linear, rows)
            peer(torch.randn(rows, linear.in_features))
        except Exception as error:  # whatever another library raises: it is out of the race, and we say so
            say_absent(name, first_line(error))
            continue
        found[name] = peer
    return found


def first_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


@functools.cache
def say_absent(name: str, why: str) -> None:
    """Says, once, that a peer is out of the race."""
    print(f"  (without {name}: {why[:160]})", file=sys.stderr)


def _makers() -> dict[str, Callable[[nn.Linear, int], Linear]]:
    engines = [e for e in ("fbgemm", "x86", "onednn", "qnnpack") if e in torch.backends.quantized.supported_engines]
    makers: dict[str, Callable[[nn.Linear, int], Linear]] = {
        f"torch.ao {engine}": functools.partial(_torch_ao, engine) for engine in engines
    }
    makers["_int_mm"] = _int_mm
    makers["_weight_int8pack_mm"] = _weight_int8pack
    for name, package, make in (
        ("torchao eager", "torchao", _torchao),
        ("torchao compiled", "torchao", _torchao_compiled),
        ("onnxruntime int8", "onnxruntime", _onnxruntime_int8),
    ):
        if importlib.util.find_spec(package) is None or (package == "onnxruntime" and not _has("onnx")):
            say_absent(name, "not installed")
        else:
            makers[name] = make
    return makers


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _torch_ao(engine: str, linear: nn.Linear, rows: int) -> Linear:
    if engine == "qnnpack" and rows > 64:
        raise ValueError("made for Arm, and slow beyond 64 rows")
    torch.backends.quantized.engine = engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear}, torch.qint8)[0]

    def run(x: Tensor) -> Tensor:
        torch.backends.quantized.engine = engine
        return module(x)

    return run


def _int_mm(linear: nn.Linear, rows: int) -> Linear:
    """cuBLASLt's or oneDNN's integer product, with our quantisation before and the scales after it."""
    weight, scale = int8_quantize(linear.weight.detach())
    bias, transposed = linear.bias, weight.t()

    def run(x: Tensor) -> Tensor:
        q, row_scale = int8_quantize(x)
        return torch.addcmul(bias, torch._int_mm(q, transposed).float(), row_scale.unsqueeze(-1) * scale)

    return run


def _weight_int8pack(linear: nn.Linear, rows: int) -> Linear:
    """Weights int8, activations float: less is quantised than by the others."""
    weight, scale = int8_quantize(linear.weight.detach())
    bias = linear.bias.detach()
    if rows > 64:
        raise ValueError("slow beyond 64 rows")
    return lambda x: torch._weight_int8pack_mm(x, weight, scale).add_(bias)


def _torchao(linear: nn.Linear, rows: int) -> Linear:
    import copy

    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = nn.Sequential(copy.deepcopy(linear)).eval()
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    return module


def _torchao_compiled(linear: nn.Linear, rows: int) -> Linear:
    return torch.compile(_torchao(linear, rows), mode="max-autotune-no-cudagraphs")


def _onnxruntime_int8(linear: nn.Linear, rows: int) -> Linear:
    """MLAS by the operators that onnxruntime's own dynamic quantisation makes; it fuses them when it loads them."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    weight, scale = int8_quantize(linear.weight.detach())
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["acc"]),
        helper.make_node("Cast", ["acc"], ["accf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["scale"]),
        helper.make_node("Mul", ["accf", "scale"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    constants = {
        "w": np.ascontiguousarray(weight.t().numpy()),
        "wz": np.zeros((), np.int8),
        "ws": scale.numpy(),
        "b": linear.bias.detach().numpy(),
    }
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, linear.in_features])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, linear.out_features])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # else it takes the cores from its rivals
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
