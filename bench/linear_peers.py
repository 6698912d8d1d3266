"""int8 linear layers and MLPs: the sides of a comparison, recsys_kernels and every library a user might run instead.

All quantize weights per output channel and activations as they come: recsys_kernels and torchao for each row, torch
(to 7 bits, as its modules do) and onnxruntime for the batch, OpenVINO for groups of a row. Every call gives a result of
its own but OpenVINO's, which is read where its request leaves it. onnxruntime's threads stop spinning when a call ends,
or they would take the other side's time.

Under ONEDNN_MAX_CPU_ISA=AVX2 torchao and OpenVINO fail the gate: torch._int_mm is wrong (for random bytes in 8,191 of
8,192 elements), and OpenVINO gives no rows.

All of them load beside torch 2.13: onnxruntime 1.32 with onnx 1.23, torchao 0.18, openvino 2026.4.
"""

from __future__ import annotations

import importlib
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recsys_kernels as rk
from bench import probe
from bench.levels import cap
from bench.linear_cases import FP32, LinearCase, LinearWorkload
from bench.sides import ONE_THREAD, OURS, AbsentError, Side
from recsys_kernels.backends import selection as _backends
from recsys_kernels.backends.native import native

DYNAMIC = {f"torch dynamic, {engine}": engine for engine in ("fbgemm", "onednn")}
ONNXRUNTIME = "onnxruntime dynamic"
TORCHAO = "torchao"
OPENVINO = "OpenVINO"
# Activations share a scale in groups of so many; the CPU plugin's own choice of 32 is slower.
OPENVINO_GROUP = 128


def _load(*names: str) -> list[ModuleType]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [importlib.import_module(name) for name in names]
    except (ImportError, OSError) as error:  # OSError: a library built for something else
        raise AbsentError(f"{names[0]}: {error}") from error


def ours(work: LinearWorkload) -> Side:
    """The operator on packed layers, or the module that a user would take."""
    case, mlp = work.case, rk.Int8MLP.from_float(work.net)
    layers = [layer for layer in mlp if isinstance(layer, rk.Int8Linear)]
    if case.level == "module":
        return Side(OURS, mlp if len(layers) > 1 else layers[0], threads=case.threads)
    packed = torch.cat([layer.pack() for layer in layers])
    chain, outs = _backends.implementation("int8_chain", packed), case.widths[-1]
    dtype = _backends.dtype_argument(torch.float32)
    return Side(OURS, lambda batch: chain(batch, packed, outs, dtype), threads=case.threads)


def _fp32(work: LinearWorkload) -> Side:
    if work.case.level == "module":
        return Side(FP32, work.net, threads=work.case.threads)
    (weight, bias), rest = work.layers[0], work.layers[1:]

    def layers(batch: Tensor) -> Tensor:
        out = F.linear(batch, weight, bias)
        for following, its_bias in rest:
            out = F.linear(out.relu_(), following, its_bias)
        return out

    return Side(FP32, layers, threads=work.case.threads)


@contextmanager
def quantized_engine(name: str) -> Iterator[None]:
    """torch's quantized engine, which is one for the whole process."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.quantized.engine = before


def _torch_dynamic(work: LinearWorkload, name: str) -> Side:
    engine = DYNAMIC[name]
    if engine not in torch.backends.quantized.supported_engines:
        raise AbsentError(f"this torch has no engine {engine}")
    quantization: Any = importlib.import_module("torch.ao.quantization")
    with quantized_engine(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated in favour of torchao
        net = quantization.quantize_dynamic(work.net, {nn.Linear: quantization.per_channel_dynamic_qconfig})
    if work.case.level == "module":
        return Side(name, net, threads=work.case.threads, context=partial(quantized_engine, engine))
    packed = [layer._packed_params._packed_params for layer in net if not isinstance(layer, nn.ReLU)]
    hidden, last = torch.ops.quantized.linear_relu_dynamic.default, torch.ops.quantized.linear_dynamic.default

    def layers(batch: Tensor) -> Tensor:
        for layer in packed[:-1]:
            batch = hidden(batch, layer, True)  # 7 bits for activations, as the module has it
        return last(batch, packed[-1], True)

    return Side(name, layers, threads=work.case.threads, context=partial(quantized_engine, engine))


def _onnx_model(work: LinearWorkload) -> bytes:
    """The float network as ONNX, quantized by onnxruntime."""
    onnx, quantization = _load("onnx", "onnxruntime.quantization")
    helper, array = onnx.helper, onnx.numpy_helper.from_array
    nodes, weights, flow = [], [], "input"
    for number, (weight, bias) in enumerate(work.layers):
        weights += [array(weight.T.contiguous().numpy(), f"weight{number}"), array(bias.numpy(), f"bias{number}")]
        if number:
            nodes.append(helper.make_node("Relu", [flow], [f"relu{number}"]))
            flow = f"relu{number}"
        nodes.append(helper.make_node("MatMul", [flow, f"weight{number}"], [f"product{number}"]))
        nodes.append(helper.make_node("Add", [f"product{number}", f"bias{number}"], [f"sum{number}"]))
        flow = f"sum{number}"
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", width])
        for name, width in (("input", work.case.widths[0]), (flow, work.case.widths[-1]))
    ]
    graph = helper.make_graph(nodes, "layers", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    quantized = io.BytesIO()
    logging.disable(logging.WARNING)  # it recommends a pass over the graph that changes nothing in this one
    try:
        quantization.quantize_dynamic(model, quantized, per_channel=True, weight_type=quantization.QuantType.QInt8)
    finally:
        logging.disable(logging.NOTSET)
    return quantized.getvalue()


def _numpy(batch: Tensor) -> Any:
    return batch.numpy().copy()


def _onnxruntime(work: LinearWorkload) -> Side:
    if cap():
        raise AbsentError(f"onnxruntime has no switch that holds it to {cap()}")
    (runtime,) = _load("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = work.case.threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(_onnx_model(work), options, providers=["CPUExecutionProvider"])
    return Side(ONNXRUNTIME, lambda batch: session.run(None, {"input": batch})[0], _numpy, threads=work.case.threads)


def _torchao(work: LinearWorkload) -> Side:
    """Compiled, as torchao asks for; but not in a quick run, because that takes 10 s a case."""
    logging.disable(logging.WARNING)  # it lists its GPU libraries, which do not load
    try:
        (quantization,) = _load("torchao.quantization")
    finally:
        logging.disable(logging.NOTSET)
    warnings.filterwarnings("ignore", "Int8Tensor does not implement")  # a hash for the cache of compiled code
    net = deepcopy(work.net)
    quantization.quantize_(net, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    run = net if work.quick else torch.compile(net)
    # Its tensors have no operators for inference mode.
    return Side(TORCHAO, run, threads=work.case.threads, context=torch.no_grad)


def _openvino(work: LinearWorkload) -> Side:
    """Weights as compressed constants, which make the CPU plugin quantize activations as they come."""
    openvino, ops = _load("openvino", "openvino.opset13")
    source = flow = ops.parameter([-1, work.case.widths[0]], np.float32)
    for number, (weight, bias) in enumerate(work.layers):
        scale = weight.abs().amax(1, keepdim=True) / 127
        integers = ops.constant((weight / scale).round().to(torch.int8).numpy())
        floats = ops.multiply(ops.convert(integers, np.float32), ops.constant(scale.numpy()))
        product = ops.matmul(ops.relu(flow) if number else flow, floats, False, True)
        flow = ops.add(product, ops.constant(bias[None].numpy()))
    options = {
        "INFERENCE_NUM_THREADS": work.case.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": OPENVINO_GROUP,
        "ENABLE_CPU_PINNING": False,
    }
    model = openvino.Model([flow], [source], "layers")
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def infer(batch: Any) -> Any:
        request.set_input_tensor(batch)
        request.infer()
        return request.get_output_tensor().data

    def tensor(batch: Tensor) -> Any:
        return openvino.Tensor(_numpy(batch), shared_memory=True)

    return Side(OPENVINO, infer, tensor, threads=work.case.threads)


_PEERS: dict[str, Callable[[LinearWorkload], Side]] = {
    FP32: _fp32,
    **{name: partial(_torch_dynamic, name=name) for name in DYNAMIC},
    ONNXRUNTIME: _onnxruntime,
    TORCHAO: _torchao,
    OPENVINO: _openvino,
}


def sides_of(case: LinearCase) -> list[str]:
    """Names of the sides to compare `case` with. ONE_THREAD is a variant of our own side, not a peer."""
    return [*_PEERS, *([ONE_THREAD] if case.threads > 1 else [])]


def build(name: str, work: LinearWorkload, own: Side) -> Side:
    """Side `name` of a case; `own` is what `ours` returned for it. Raises AbsentError where it cannot run."""
    if name == ONE_THREAD:
        return replace(own, name=name, threads=1)
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        # Pools of threads that a library starts stay on the CPUs that the comparison is pinned to.
        torch.set_num_threads(work.case.threads)
        os.sched_setaffinity(0, sorted(before)[: work.case.threads])
        return _PEERS[name](work)
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def limit(work: LinearWorkload) -> probe.ProductLimit:
    """What the CPU's int8 instructions could do. Raises ProbeUnavailableError where there are none."""
    level = native.isa()
    if level is None:
        raise probe.ProbeUnavailableError(f"no native library, hence no level to probe: {native.reason}")
    return probe.probe_int8(level, work.case.threads)
