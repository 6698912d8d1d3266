"""int8 linear layers and MLPs: the sides of a comparison, recsys_kernels and every library a user might run instead.

All sides quantize weights per output channel and activations as they come: recsys_kernels and torchao for each row,
torch (to 7 bits, as torch's modules do) and onnxruntime for the batch, OpenVINO for groups of a row. Every call gives a
new result, but OpenVINO's result is read where the request leaves it. onnxruntime's threads stop spinning when a call
ends, or the threads would take the other side's time.

Under ONEDNN_MAX_CPU_ISA=AVX2 torchao and OpenVINO fail the gate: torch._int_mm is wrong (for random bytes in 8,191 of
8,192 elements), and OpenVINO gives no rows.

All peers load beside torch 2.13: onnxruntime 1.32 with onnx 1.23, torchao 0.18, openvino 2026.4.
"""

from __future__ import annotations

import importlib
import io
import logging
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recsys_kernels as rk
from bench.core import probe
from bench.core.levels import cap
from bench.core.sides import ONE_THREAD, OURS, AbsentError, Side, import_peer
from bench.ops.linear.int8.cases import FP32, Int8LinearCase, Int8LinearWorkload
from bench.ops.linear.layers import numpy_copy, product_limit, quantized_engine
from recsys_kernels.backends import selection

DYNAMIC = {f"torch dynamic, {engine}": engine for engine in ("fbgemm", "onednn")}
ONNXRUNTIME = "onnxruntime dynamic"
TORCHAO = "torchao"
OPENVINO = "OpenVINO"
# Activations share a scale in groups of so many; the CPU plugin's own choice of 32 is slower.
OPENVINO_GROUP = 128


def ours(work: Int8LinearWorkload) -> Side:
    """The operator on packed layers, or the module that a user would take."""
    case, mlp = work.case, rk.Int8MLP.from_float(work.net)
    layers = [layer for layer in mlp if isinstance(layer, rk.Int8Linear)]
    if case.level == "module":
        return Side(OURS, mlp if len(layers) > 1 else layers[0], threads=case.threads)
    packed = torch.cat([layer.pack() for layer in layers])
    chain, outs = selection.implementation("int8_chain", packed), case.widths[-1]
    dtype = selection.dtype_argument(torch.float32)
    return Side(OURS, lambda batch: chain(batch, packed, outs, dtype), threads=case.threads)


def _fp32(work: Int8LinearWorkload) -> Side:
    if work.case.level == "module":
        return Side(FP32, work.net, threads=work.case.threads)
    (weight, bias), rest = work.layers[0], work.layers[1:]

    def layers(batch: Tensor) -> Tensor:
        out = F.linear(batch, weight, bias)
        for following, its_bias in rest:
            out = F.linear(out.relu_(), following, its_bias)
        return out

    return Side(FP32, layers, threads=work.case.threads)


def _torch_dynamic(work: Int8LinearWorkload, name: str) -> Side:
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


def _onnx_model(work: Int8LinearWorkload) -> bytes:
    """The float network as ONNX, quantized by onnxruntime."""
    onnx, quantization = import_peer("onnx", "onnxruntime.quantization")
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


def _onnxruntime(work: Int8LinearWorkload) -> Side:
    if cap():
        raise AbsentError(f"onnxruntime has no switch that holds it to {cap()}")
    (runtime,) = import_peer("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = work.case.threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(_onnx_model(work), options, providers=["CPUExecutionProvider"])
    return Side(
        ONNXRUNTIME, lambda batch: session.run(None, {"input": batch})[0], numpy_copy, threads=work.case.threads
    )


def _torchao(work: Int8LinearWorkload) -> Side:
    """Compiled, as torchao asks for; but not in a quick run, because that takes 10 s a case."""
    logging.disable(logging.WARNING)  # it lists its GPU libraries, which do not load
    try:
        (quantization,) = import_peer("torchao.quantization")
    finally:
        logging.disable(logging.NOTSET)
    warnings.filterwarnings("ignore", "Int8Tensor does not implement")  # a hash for the cache of compiled code
    net = deepcopy(work.net)
    quantization.quantize_(net, quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    run = net if work.quick else torch.compile(net)
    # Its tensors have no operators for inference mode.
    return Side(TORCHAO, run, threads=work.case.threads, context=torch.no_grad)


def _openvino(work: Int8LinearWorkload) -> Side:
    """Weights as compressed constants, which make the CPU plugin quantize activations as they come."""
    openvino, ops = import_peer("openvino", "openvino.opset13")
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
        return openvino.Tensor(numpy_copy(batch), shared_memory=True)

    return Side(OPENVINO, infer, tensor, threads=work.case.threads)


PEERS: dict[str, Callable[[Int8LinearWorkload], Side]] = {
    FP32: _fp32,
    **{name: partial(_torch_dynamic, name=name) for name in DYNAMIC},
    ONNXRUNTIME: _onnxruntime,
    TORCHAO: _torchao,
    OPENVINO: _openvino,
}


def sides_of(case: Int8LinearCase) -> list[str]:
    """The names of the sides that a case is compared with."""
    return [*PEERS, *([ONE_THREAD] if case.threads > 1 else [])]


def limit(work: Int8LinearWorkload) -> probe.ProductLimit:
    """What the CPU's int8 instructions could do. Raises ProbeUnavailableError where there are none."""
    return product_limit(probe.probe_int8, work.case.threads)
