"""A whole model as others compress or compile it, each as a function without arguments: end to end, the same task.

What is not installed, or does not run here, is left out and said so once.
"""

import copy
import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.bench.peers import say_absent

Model = Callable[[], Tensor]


def models(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Model]:
    """Every peer that runs here, over `inputs`, the model's keyword arguments; each gives its first output."""
    found = {}
    for name, (package, make) in _makers().items():
        if package and importlib.util.find_spec(package) is None:
            say_absent(name, "not installed")
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other libraries, about themselves
                peer = make(model, inputs)
                peer()
        except Exception as error:  # whatever another library raises: it is out of the race, and we say so
            say_absent(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        found[name] = peer
    return found


def _makers() -> dict[str, tuple[str | None, Callable[[nn.Module, dict[str, Tensor]], Model]]]:
    engines = [e for e in ("fbgemm", "x86", "onednn") if e in torch.backends.quantized.supported_engines]
    return {
        "fp32 compiled": (None, _compiled),
        **{f"torch.ao {engine}": (None, functools.partial(_torch_ao, engine)) for engine in engines},
        "torchao eager": ("torchao", _torchao),
        "torchao compiled": ("torchao", _torchao_compiled),
        "onnxruntime fp32": ("onnxruntime", functools.partial(_onnxruntime, False)),
        "onnxruntime int8": ("onnxruntime", functools.partial(_onnxruntime, True)),
    }


def eager(model: nn.Module, inputs: dict[str, Tensor]) -> Model:
    """The model itself."""
    return lambda: model(**inputs)[0]


def _compiled(model: nn.Module, inputs: dict[str, Tensor]) -> Model:
    return eager(torch.compile(copy.deepcopy(model)), inputs)  # type: ignore[arg-type]


def _torch_ao(engine: str, model: nn.Module, inputs: dict[str, Tensor]) -> Model:
    torch.backends.quantized.engine = engine
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)

    def run() -> Tensor:
        torch.backends.quantized.engine = engine
        return quantized(**inputs)[0]

    return run


def _quantized_by_torchao(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantized = copy.deepcopy(model)
    quantize_(quantized, Int8DynamicActivationInt8WeightConfig())
    return quantized


def _torchao(model: nn.Module, inputs: dict[str, Tensor]) -> Model:
    return eager(_quantized_by_torchao(model), inputs)


def _torchao_compiled(model: nn.Module, inputs: dict[str, Tensor]) -> Model:
    return eager(torch.compile(_quantized_by_torchao(model)), inputs)  # type: ignore[arg-type]


def _onnxruntime(int8: bool, model: nn.Module, inputs: dict[str, Tensor]) -> Model:
    """By onnxruntime's own steps: export, its optimiser for transformers, and dynamic quantisation by channel."""
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        exported = _FirstOutput(model, tuple(inputs)).eval()
        torch.onnx.export(
            exported, tuple(inputs.values()), path, input_names=list(inputs), external_data=False, verbose=False
        )
        if int8:  # of the float model a session makes as much itself
            optimizer.optimize_model(str(path), model_type="bert").save_model_to_file(str(path))
            quantize_dynamic(path, path, weight_type=QuantType.QInt8, per_channel=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Its threads would otherwise wait for work at full speed, and take the cores from its rivals.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


class _FirstOutput(nn.Module):
    """The model with positional arguments, in the order of `names`, and one output: what an exporter wants."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, values, strict=True)))[0]
