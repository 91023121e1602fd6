"""tensor_parallel_, pipelines and FSDP2 among real processes: bits, values, gradients; what is refused."""

import pytest
import torch.distributed as dist
from ranks import run

from engine import backends

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"),
    pytest.mark.skipif(backends._library("_native") is None, reason="needs the native libraries"),
]


EVERYTHING = (
    "3:integer_layers,large_sums,float_layers,gradients,models,copies,codec,frees_layer_by_layer,refusals;"
    "2:models,files,codec,pipeline,fsdp;"
    "1:models,files"
)


def test_sharded_layers(tmp_path):
    run("parallel_worker.py", EVERYTHING, 3, tmp_path)
