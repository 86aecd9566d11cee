"""Find what makes a copy of a layer silent, from the layer's own autograd graph.

A layer is silent when its output equals its input bit for bit. The graph, walked back from the output, shows how to get there:

    a sum of the input and of branches   leave the input untouched and make each branch 0
    a branch                             make its last factor that is a parameter 0

In pre-norm layers that factor is the output projection (weight and bias). In post-norm layers it is the gain of the norm behind the
projection: a zeroed projection would be silent too, but the norm would amplify its first updates. The graph is recorded with fake tensors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from adept_fast.errors import UnsupportedFamilyError
from adept_fast.models.decoder_layers import decoder_layers, hidden_of, layers_path, replaced_forward, with_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = 4
PRODUCTS = frozenset({"Mul", "Mm", "Bmm", "Mv", "Linear", "GroupedMm", "Convolution"})
BIASED_PRODUCTS = frozenset({"Addmm", "Baddbmm", "Addbmm", "Addmv"})  # bias, factor, factor
NORMS = frozenset({"NativeLayerNorm", "FusedRmsNorm", "NativeGroupNorm"})  # input, gain, bias
SUMS = frozenset({"Add", "Sub", "Cat", "Stack", "IndexAdd", "ScatterAdd", "IndexPut", "IndexCopy", "Scatter", "Where", "CopySlices"})
SAME = frozenset(  # ops that keep the numbers and at most move them
    {"View", "UnsafeView", "ReshapeAlias", "T", "Transpose", "Permute", "Slice", "Squeeze", "Unsqueeze", "Clone", "ToCopy", "Alias"}
    | {"NativeDropout"}
)
ZERO_TO_ZERO = SAME | frozenset(
    {"Div", "Neg", "Sum", "Mean", "Select", "Index", "Gather", "IndexSelect", "Expand", "Repeat", "Split", "SplitWithSizes", "Unbind"}
    | {"AsStrided", "ConstantPadNd", "MaskedFill", "Tanh", "Relu", "Silu", "Gelu", "Copy"}
)
_KIND = re.compile(r"Backward\d*$")
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a name


@dataclass(frozen=True)
class Silence:
    """The values that make a copy of one layer silent.

    fill: name of a parameter or buffer within the layer -> the value to fill it with
    gains: those names in `fill` that are gains of a norm behind a branch (post-norm layers), not projections
    """

    fill: Mapping[str, float] = field(default_factory=dict)
    gains: frozenset[str] = frozenset()

    def __or__(self, other: Silence) -> Silence:
        return Silence({**self.fill, **other.fill}, self.gains | other.gains)


@dataclass(frozen=True)
class Family:
    """A model architecture, as far as silent copies need it.

    name: config.model_type
    layers: path of the module list that holds the decoder layers
    silent, gains: per layer, the fields of `Silence`
    """

    name: str
    layers: str
    silent: tuple[Mapping[str, float], ...]
    gains: tuple[frozenset[str], ...]


class _Refused(Exception):
    """The reason why no fill makes a value 0, or makes it equal to the layer's input."""


def describe(model: PreTrainedModel) -> Family:
    """Find what makes a copy of each layer silent. Meta tensors are enough.

    Raises UnsupportedFamilyError, with the reason, for a model whose copies cannot be made silent.
    """
    from transformers.initialization import no_init_weights

    own, path, name = list(decoder_layers(model)), layers_path(model), model.config.model_type
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())  # the number of tokens per expert becomes a symbol
    config = copy.deepcopy(model.config)
    if config._attn_implementation not in ("eager", "sdpa"):  # flash attention reads values before it computes
        config._attn_implementation = "eager"
    with torch.device("meta"), no_init_weights():
        twin = type(model)(config).eval()
    with mode:
        twin.to_empty(device="cpu")  # after construction: a module's own .to() swaps parameters, which fake tensors refuse
    twin.set_experts_implementation("batched_mm")  # the one implementation whose control flow reads no values
    layers = twin.get_submodule(path)
    traces: dict[int, tuple[Tensor, Any]] = {}  # input and output of the first layer of each signature
    first: dict[tuple[Any, ...], int] = {}
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(_traced(layer, first.setdefault(_signature(layer), index), traces, name))
        try:
            with mode, torch.enable_grad():
                twin(input_ids=torch.zeros((1, TOKENS), dtype=torch.int64), use_cache=False)
        except (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode):
            raise UnsupportedFamilyError(f"{name}: cannot be expanded: what it computes depends on values, not on shapes alone") from None
    found = {}
    for index in first.values():
        where = f"{name}: cannot be expanded: layer {index}"
        if index not in traces:
            raise UnsupportedFamilyError(f"{where} takes no part when the input is text")
        found[index] = _Walk(own[index], layers[index], traces[index][0]).silence(traces[index][1], where)
    silences = [found[first[_signature(layer)]] for layer in layers]
    return Family(name, path, tuple(silence.fill for silence in silences), tuple(silence.gains for silence in silences))


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    modules = tuple((name, type(module)) for name, module in layer.named_modules())
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in layer.named_parameters())


@contextmanager
def _traced(layer: nn.Module, first: int, traces: dict[int, tuple[Tensor, Any]], family: str) -> Iterator[None]:
    """Record the layer's computation, once per signature; later layers pass their input through. The next layer always gets the input."""
    forward = layer.forward

    def traced(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if first not in traces:
            entry = hidden.detach().requires_grad_()
            traces[first] = entry, forward(entry, *args[1:], **kwargs) if args else forward(**{**kwargs, "hidden_states": entry})
            kind = type(traces[first][1])
            if (issubclass(kind, tuple) and kind is not tuple) or not isinstance(hidden_of(traces[first][1]), Tensor):
                raise UnsupportedFamilyError(f"{family}: cannot be expanded: its layers return {kind.__name__}s")
        return with_hidden(traces[first][1], hidden)

    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.requires_grad_(True)
    with replaced_forward(layer, traced):
        yield


class _Walk:
    """Walk the graph of one layer from its output to its entry (a leaf). own: the layer with values, to probe its norms."""

    def __init__(self, own: nn.Module, layer: nn.Module, entry: Tensor) -> None:
        self.own, self.entry = own, entry
        self.parameters = {id(parameter): name for name, parameter in layer.named_parameters()}
        self.shapes = {name: tensor.shape for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}
        self.names = {**self.parameters, **{id(buffer): name for name, buffer in layer.named_buffers()}}

    def silence(self, output: Any, where: str) -> Silence:
        try:
            found = self.unchanged(getattr(hidden_of(output), "grad_fn", None))
        except _Refused as reason:
            raise UnsupportedFamilyError(f"{where}: {reason}") from None
        if not found.fill:
            raise UnsupportedFamilyError(f"{where}: it has no branch")
        return Silence({twin: value for name, value in found.fill.items() for twin in self._alike(name)}, found.gains)

    def unchanged(self, node: Any) -> Silence:
        """Find the fills that make a value equal to the layer's input."""
        kind = _kind(node)
        if kind == "AccumulateGrad" and node.variable is self.entry:
            return Silence()
        if kind == "Add":
            for kept, branch in ((0, 1), (1, 0)):
                try:
                    stream = self.unchanged(node.next_functions[kept][0])
                except _Refused as reason:
                    refused = reason
                    continue
                return stream | self.zero(node.next_functions[branch][0])
            raise refused
        if kind in SAME:
            return self.unchanged(_inputs(node)[0])
        if kind == "Mul":
            return self._unscaled(node)
        raise _Refused(f"its output is not its input plus branches (found {kind or 'a constant'} on the way)")

    def _unscaled(self, node: Any) -> Silence:
        functions = [function for function, _ in node.next_functions]
        for stream, factor in (functions, functions[::-1]):
            if factor is None and stream is not None and _constant(node) == 1:
                return self.unchanged(stream)
            if stream is not None and (name := self._leaf(factor)[0]):
                return self.unchanged(stream) | Silence({name: 1.0})
        raise _Refused("it scales the residual stream")

    def zero(self, node: Any) -> Silence:
        """Find the fills that make a value 0."""
        kind, inputs = _kind(node), _inputs(node)
        if node is None:  # a constant: the zeros that sums start from; the check of logits finds any other
            return Silence()
        if kind == "AccumulateGrad":
            if id(node.variable) not in self.parameters:
                raise _Refused("its input reaches its output on two ways" if node.variable is self.entry else "a branch ends in a buffer")
            return Silence({self.parameters[id(node.variable)]: 0.0})
        if kind in NORMS and len(inputs) > 1:
            affine = self._all(inputs[1:])
            return Silence(affine.fill, frozenset(affine.fill))
        if kind in BIASED_PRODUCTS:
            return self.zero(node.next_functions[0][0]) | self._product(_inputs(node, 1), kind)
        if kind in PRODUCTS:
            return self._product(inputs, kind)
        if kind in SUMS:
            return self._all(inputs)
        if kind in ZERO_TO_ZERO or kind in NORMS:
            return self.zero(inputs[0])
        raise _Refused(f"a branch ends in {kind}, not in a projection or a gain")

    def _all(self, nodes: list[Any]) -> Silence:
        found = Silence()
        for node in nodes:
            found |= self.zero(node)
        return found

    def _product(self, factors: list[Any], kind: str) -> Silence:
        for factor in factors:
            name, shifted = self._leaf(factor)
            if name is not None and name in self.parameters.values():
                bias = self._all(factors[2:]) if kind in ("Convolution", "Linear") else Silence()
                value = self._vanishing(name) if shifted else 0.0
                return bias | Silence({name: value}, frozenset({name}) if kind == "Mul" else frozenset())
        refused = _Refused("a branch ends in a product of constants")
        for factor in factors:
            try:
                return self.zero(factor)
            except _Refused as reason:
                refused = reason
        raise refused

    def _leaf(self, node: Any) -> tuple[str | None, bool]:
        """Return the name of the parameter or buffer behind a value, if it is one, and whether a constant is added to it."""
        shifted = False
        while _kind(node) in ZERO_TO_ZERO or (_kind(node) == "Add" and len(_inputs(node)) == 1):
            shifted |= _kind(node) == "Add"
            node = _inputs(node)[0]
        return (self.names.get(id(node.variable)) if _kind(node) == "AccumulateGrad" else None), shifted

    def _vanishing(self, name: str) -> float:
        """Find, by trying, the gain with which a norm outputs 0: 0, or -1 if the norm multiplies by 1 + gain."""
        path, _, gain = name.rpartition(".")
        norm = copy.deepcopy(self.own.get_submodule(path))
        norm = (norm.to_empty(device="cpu") if norm.get_parameter(gain).is_meta else norm.cpu()).float()
        shape = norm.get_parameter(gain).shape
        with torch.no_grad():
            for value in (0.0, -1.0):
                norm.get_parameter(gain).fill_(value)
                if not norm(torch.linspace(-1, 2, 2 * shape.numel()).view(2, *shape)).any():
                    return value
        raise _Refused(f"neither 0 nor -1 for the gain {name} makes its norm give 0")

    def _alike(self, name: str) -> list[str]:
        """Return all names that differ from this one in indices only: the traced tokens need not have reached every expert of a list."""
        pattern = re.compile(r"\d+".join(map(re.escape, _INDEX.split(name))))
        return [other for other in self.shapes if pattern.fullmatch(other) and self.shapes[other] == self.shapes[name]]


def _kind(node: Any) -> str:
    return "" if node is None else _KIND.sub("", type(node).__name__)


def _inputs(node: Any, start: int = 0) -> list[Any]:
    return [] if node is None else [function for function, _ in node.next_functions[start:] if function is not None]


def _constant(node: Any) -> float | None:
    """Return the scalar constant that a Mul multiplies by, or None."""
    other = getattr(node, "_saved_other", None)
    return float(other) if isinstance(other, Tensor) and other.ndim == 0 else None
