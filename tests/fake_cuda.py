"""CUDA without a GPU: tensors with a device, shapes and dtypes but no numbers, on which the trainers' own code runs.

    with fake_cuda() as fake:
        model = fake.to_cuda(build_model(cfg))
        with fake.recorder() as seen:
            loss = model(fake.empty(4, 3, 256, 256)).sum()
            loss.backward()
        assert seen.syncs == [] and seen.traffic < 2**30

A wrong device raises, as on a GPU. What waits for the device, or copies to it, is recorded with the line that did it
(a copy to it waits unless it is told not to); operations whose result's shape depends on data are taken to select
everything. Autocast is CUDA's. Backward runs node
by node in Python: the engine of torch wants a driver.
"""

import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch
from places import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
GIB = 2**30
# Waits for the device: the host must know a number or a shape.
_SYNCS = {aten._local_scalar_dense.default, aten.item.default, aten.nonzero.default, aten.masked_select.default,
          aten.equal.default, aten._unique2.default, aten.unique_consecutive.default, aten.bincount.default,
          aten.is_nonzero.default, aten.repeat_interleave.Tensor}
_INDEXED = {aten.index.Tensor: 1, aten.index_put.default: 1, aten.index_put_.default: 1}


def _bytes(value):
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


class Recorder(TorchDispatchMode):
    """syncs, copies: lines of the project, each as often as it was met. traffic: bytes read and written on the GPU by
    operations one after another, as eager execution does; an estimate from below, without caches and workspaces."""

    def __init__(self):
        super().__init__()
        self.syncs, self.copies, self.operations = [], [], Counter()
        self.traffic = 0

    def _where(self):
        lines = [f"{frame.filename.removeprefix(f'{ROOT}/')}:{frame.lineno}" for frame in traceback.extract_stack()
                 if frame.filename.startswith(f"{ROOT}/") and "/tests/fake_" not in frame.filename
                 and "site-packages" not in frame.filename]
        return " <- ".join(lines[::-1][:3])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_gpu = any(t.is_cuda for t in tensors)
        self.operations[str(func)] += 1
        if func in _INDEXED:
            args, masked = _without_masks(args)
            if masked:
                self.syncs.append(f"{func} by a mask @ {self._where()}")
            if on_gpu and any(t is not None and not t.is_cuda for t in args[1]):
                self.syncs.append(f"{func} by indices of the host @ {self._where()}")
        if func in _SYNCS:
            if on_gpu:
                self.syncs.append(f"{func} @ {self._where()}")
            return _everything(func, *args, **kwargs)
        source, target, waits = _copied(func, args, kwargs)
        if source == "cuda" and target == "cpu":
            self.syncs.append(f"copy to the host @ {self._where()}")
        elif source == "cpu" and target == "cuda":
            self.copies.append(f"{tuple(tensors[-1].shape)} @ {self._where()}")
            if waits:
                self.syncs.append(f"copy to the device @ {self._where()}")
        out = func(*args, **kwargs)
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        moved = [a for a in args if not isinstance(a, (int, float))]
        if not view and "empty" not in str(func) and (on_gpu or _bytes(out)):
            self.traffic += _bytes(moved) + _bytes(out)
        return out


def _copied(func, args, kwargs):
    """(kind of device, kind of device) that func copies between, and whether it waits; (None, None, False): none."""
    if func is aten.copy_.default:
        return args[1].device.type, args[0].device.type, not any(args[2:3])
    if func is aten._to_copy.default:
        target = torch.device(kwargs.get("device") or args[0].device)
        return args[0].device.type, target.type, not kwargs.get("non_blocking")
    return None, None, False


def _without_masks(args):
    """Masks among the indices as the indices of everything."""
    x, indices, *rest = args
    found, masked = [], False
    for index in indices:
        if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
            masked = True
            found += [index.new_empty(index.numel(), dtype=torch.int64) for _ in range(index.dim())]
        else:
            found.append(index)
    return (x, found, *rest), masked


def _everything(func, x, *args, **kwargs):
    """What an operation with a result that depends on data gives at most."""
    if func in (aten._local_scalar_dense.default, aten.item.default):
        return 1.0 if x.is_floating_point() else 1
    if func is aten.nonzero.default:
        return x.new_empty(x.numel(), x.dim(), dtype=torch.int64)
    if func is aten.masked_select.default:
        return x.new_empty(x.numel())
    if func is aten.bincount.default:
        return x.new_empty(max(1, kwargs.get("minlength", 0), *args[1:2]), dtype=torch.int64)
    if func in (aten.equal.default, aten.is_nonzero.default):
        return True
    return func(x, *args, **kwargs)


# ------------------------------------------------------------------------------------------------------------ backward

@torch.no_grad()
def run_backward(outputs, gradients, inputs=None):
    """Backward from outputs, node by node. Gradients are added to leaves, or with inputs (tensors) returned."""
    wanted = {} if inputs is None else {_node(t): i for i, t in enumerate(inputs)}
    found = [None] * len(wanted)
    pending, users = {}, Counter()
    stack, seen = [_node(out) for out in outputs], set()
    for node in stack:
        if node[0] in seen:
            continue
        seen.add(node[0])
        for after in node[0].next_functions:
            if after[0] is not None:
                users[after[0]] += 1
                stack.append(after)
    for out, gradient in zip(outputs, gradients, strict=True):
        _add(pending, _node(out), torch.ones_like(out) if gradient is None else gradient)
    ready = [node for node in {_node(out)[0] for out in outputs} if not users[node]]
    while ready:
        node = ready.pop()
        parts = pending.pop(node, {})
        for (other, number), place in wanted.items():
            if other is node:
                found[place] = parts.get(number)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            if inputs is None and 0 in parts:
                leaf.grad = parts[0] if leaf.grad is None else leaf.grad + parts[0]
            continue
        results = _apply(node, parts) if parts else ()
        for after, gradient in zip(node.next_functions, results or [None] * len(node.next_functions), strict=True):
            if after[0] is not None:
                if gradient is not None:
                    _add(pending, after, gradient)
                users[after[0]] -= 1
                if not users[after[0]]:
                    ready.append(after[0])
    return tuple(found)


def _node(tensor):
    edge = torch.autograd.graph.get_gradient_edge(tensor)  # of a leaf: what adds up its gradient
    return edge.node, edge.output_nr


def _add(pending, key, gradient):
    parts = pending.setdefault(key[0], {})
    like = getattr(key[0], "variable", None)
    like = key[0]._input_metadata[key[1]] if like is None else like
    if gradient.shape != like.shape:  # nodes leave it to the engine to undo a broadcast, or a change of dtype
        gradient = gradient.sum_to_size(like.shape)
    gradient = gradient.to(like.dtype)
    parts[key[1]] = gradient if key[1] not in parts else parts[key[1]] + gradient


def _apply(node, parts):
    metadata = node._input_metadata
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # ours: they are given zeros, not None
        grads = [parts.get(i) if i in parts else torch.zeros(m.shape, dtype=m.dtype, device=m.device)
                 for i, m in enumerate(metadata)]
        out = node.apply(*grads)
        out = out if isinstance(out, tuple) else (out,)
        needed = iter([value for value, needs in zip(out, node.needs_input_grad, strict=True) if needs])
        return tuple(None if after[0] is None else next(needed) for after in node.next_functions)  # of tensors only
    out = node(*(parts.get(i) for i in range(max(1, len(metadata)))))
    return out if isinstance(out, tuple) else (out,)


# ----------------------------------------------------------------------------------------------------------- the device

class FakeCuda:
    def __init__(self, mode):
        self.mode, self.device = mode, torch.device("cuda")

    def recorder(self):
        return Recorder()

    def empty(self, *shape, dtype=torch.float32, device="cuda"):
        return torch.empty(shape, dtype=dtype, device=device)

    def to_cuda(self, module):
        """Replace all tensors of a module, plain attributes too, by empty ones on the device."""
        return self._replace(module, "cuda")

    def _replace(self, module, device):
        def empty(t):
            return torch.empty(t.shape, dtype=t.dtype, device=device)

        for part in module.modules():
            for name, p in list(part._parameters.items()):
                if p is not None:
                    part._parameters[name] = nn.Parameter(empty(p), requires_grad=p.requires_grad)
            for name, b in list(part._buffers.items()):
                if b is not None:
                    part._buffers[name] = empty(b)
            for name, value in list(vars(part).items()):
                if isinstance(value, torch.Tensor):
                    setattr(part, name, empty(value))
        return module

    @contextmanager
    def saved(self):
        """-> a list with one number at the end: bytes that autograd keeps for backward, each storage once."""
        sizes, total = {}, []

        def pack(t):
            if not isinstance(t, nn.Parameter):
                sizes[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            keep.append(t)
            return t

        keep = []  # storages must not be reused while they are counted
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            yield total
        total.append(sum(sizes.values()))


@contextmanager
def fake_cuda():
    def engine(tensors, gradients=(), *args, inputs=None, accumulate_grad=True, **_):
        given = inputs if inputs is not None else (args[2] if len(args) > 2 else ())
        found = run_backward(tensors, gradients, None if accumulate_grad else given)
        return None if accumulate_grad else found

    patches = [
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch("torch.autograd._engine_run_backward", engine),
        mock.patch("torch.autograd.graph._engine_run_backward", engine),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for patch in patches:
            patch.start()
        try:
            with FakeTensorMode(allow_non_fake_inputs=False) as mode:
                yield FakeCuda(mode)
        finally:
            for patch in patches:
                patch.stop()
