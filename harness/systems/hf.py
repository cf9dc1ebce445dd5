"""transformers as a system under test: the released modules of a model's page, built at the size of the case.

The page's `Upstream` says which classes, which configuration and which of our tensors is which of theirs; there is no
code for one model here, but for the two ways in which a decoder layer joins modules that are no block of their own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from harness import models
from harness.case import Case
from harness.errors import CouldNotRun
from harness.models import Upstream
from harness.systems import OUR_OPTIONS, beyond
from harness.weights import DTYPES
from reference.spec import MoESpec, RouterPrecision

if TYPE_CHECKING:
    from harness.comm import Communicator

WRITTEN_FOR = "5.24"


class TransformersSystem:
    """The layer as released in transformers, on one rank, with the loop over experts that needs no kernel ("eager").

    The first build imports transformers, 2 to 4 s; each further model takes 0.01 to 0.06 s, and building one 1 to 3 ms.
    """

    name = "transformers"
    foreign = False

    def load(self) -> None:
        """Import what all models share, so that it does not count as the time of the first case."""
        _import("transformers.models.mixtral.modeling_mixtral:MixtralSparseMoeBlock")

    def supports(self, case: Case) -> str | None:
        if models.load(case.model).upstream is None:
            return "transformers has no such layer"
        if case.grid.ranks > 1:
            return "transformers runs on one rank"
        return beyond(case, OUR_OPTIONS, self.name)

    def precision(self, spec: MoESpec) -> RouterPrecision:
        return spec.routing.precision

    def build(self, case: Case, weights: Mapping[str, Tensor], comm: Communicator) -> TransformersLayer:
        """Raises CouldNotRun if transformers is missing, or if a tensor of one side lacks its like on the other."""
        upstream = models.load(case.model).upstream
        assert upstream is not None  # supports() refuses the case
        # Constructed as `from_pretrained` does it, on no device and under the dtype as default: whatever upstream
        # declares as float32, a correction bias above all, stays float32, and random initial values cost nothing.
        with torch.device("meta"), _default_dtype(DTYPES[case.dtype]):
            module = _construct(upstream, case.spec)
        _load(module, upstream, weights)
        layer = TransformersLayer(module.eval(), upstream.inputs)
        layer.listen(upstream.parameters, gated=case.spec.shared is not None and case.spec.shared.sigmoid_gate)
        return layer


class TransformersLayer:
    """A built module, called with rows of tokens: [M, H] -> [M, H]."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, str]) -> None:
        self.module, self._inputs = module, inputs
        self._told: dict[str, Tensor] = {}

    def stages(self) -> dict[str, Tensor]:
        """What the submodules of the last call gave and took, as far as their shapes tell what it is."""
        return dict(self._told)

    def listen(self, parameters: Mapping[str, str | tuple[str, ...]], *, gated: bool) -> None:
        """Hook the submodules that hold the router's, the routed and the shared experts' weights.

        gated: a sigmoid follows the shared experts' module, whose output then is not S.
        """
        for name, role, above in (("router_weight", "router", 1), ("w13", "experts", 1), ("shared_w13", "shared", 2)):
            stored = parameters.get(name)
            path = stored[0] if isinstance(stored, tuple) else stored
            if path is None or path.count(".") < above or (role == "shared" and gated):
                continue
            try:
                submodule = self.module.get_submodule(path.rsplit(".", above)[0])
            except AttributeError:
                continue
            submodule.register_forward_hook(partial(self._heard, role))

    def _heard(self, role: str, module: nn.Module, taken: tuple[object, ...], given: object) -> None:
        outputs = [each for each in (given if isinstance(given, tuple) else (given,)) if isinstance(each, Tensor)]
        # copies, since some blocks add to what a submodule returned
        flat = [each.reshape(-1, each.shape[-1]).clone() for each in outputs if each.dim() > 1]
        if role == "shared" and flat:
            self._told["shared"] = flat[0]
        elif role == "router" and len(flat) == 1:
            self._told["logits"] = flat[0]
        elif role == "experts" and flat:
            self._told["routed"] = flat[0]
            slots = [each for each in taken[1:] if isinstance(each, Tensor) and each.dim() == 2]
            for each in slots:
                self._told["topk_weights" if each.is_floating_point() else "topk_ids"] = each

    @torch.no_grad()
    def __call__(self, hidden_states: Tensor, **inputs: Tensor) -> Tensor:
        self._told.clear()
        named = {self._inputs[name]: rows[None] for name, rows in inputs.items()}
        out: Tensor | tuple[Tensor, ...] = self.module(hidden_states[None], **named)  # they take [batch, sequence, H]
        output_MH = out[0] if isinstance(out, tuple) else out  # some blocks return their logits too
        return output_MH.reshape(hidden_states.shape)


class _Beside(nn.Module):
    """A shared MLP beside the block, summed by the decoder layer (Granite)."""

    def __init__(self, block: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.block, self.shared = block, shared

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.block(hidden_states) + self.shared(hidden_states)
        return output


class _Apart(nn.Module):
    """Router, experts and shared MLP as three parts of the decoder layer (Gemma 4)."""

    def __init__(self, router: nn.Module, experts: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows_MH = hidden_states.flatten(0, 1)
        _, topk_weights_MK, topk_ids_MK = self.router(rows_MH)
        output_MH: Tensor = self.experts(rows_MH, topk_ids_MK, topk_weights_MK) + self.shared(rows_MH)
        return output_MH


_JOINED: dict[frozenset[str], type[nn.Module]] = {
    frozenset({"block", "shared"}): _Beside,
    frozenset({"router", "experts", "shared"}): _Apart,
}


def _construct(upstream: Upstream, spec: MoESpec) -> nn.Module:
    values = {name: _value(value, spec) for name, value in upstream.fields.items()}
    config = _import(upstream.config)(**values, experts_implementation="eager")
    parts = {}
    for role, path in upstream.modules.items():
        cls = _import(path)
        # the one constructor argument besides the configuration: limits and widths can differ between layers
        layer = {"layer_idx": 0} if "layer_idx" in inspect.signature(cls).parameters else {}
        parts[role] = cls(config, **layer)
    module = parts["block"] if parts.keys() == {"block"} else _JOINED[frozenset(parts)](**parts)
    for path, value in upstream.attributes.items():
        owner, _, name = path.rpartition(".")
        setattr(module.get_submodule(owner), name, _value(value, spec))
    return module


def _value(value: object, spec: MoESpec) -> object:
    if isinstance(value, list):
        return [_value(item, spec) for item in value]
    if isinstance(value, str) and value.startswith("="):
        return operator.attrgetter(value[1:])(spec)
    return value


def _import(path: str) -> type:
    module, _, name = path.partition(":")
    try:
        found: type = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CouldNotRun(
            f"{_installed()}: cannot import {name} from {module} ({error}). The pages follow transformers {WRITTEN_FOR}"
        ) from error
    return found


def _installed() -> str:
    try:
        return f"transformers {importlib.metadata.version('transformers')}"
    except importlib.metadata.PackageNotFoundError:
        return "transformers is not installed"


def _load(module: nn.Module, upstream: Upstream, weights: Mapping[str, Tensor]) -> None:
    """Put our tensors in the place of the module's parameters and buffers, in the dtype that each has there.

    A float32 tensor stays float32: a layer is given the weights as stored. (`from_pretrained(dtype=...)` would round the
    correction bias of minimax_m2 and step3p5 to the dtype, which alone changes choices; the pages say so.)
    """
    theirs = module.state_dict()
    ours: dict[str, Tensor] = {}
    wrong = [f"{name}: has no name in transformers" for name in weights if name not in upstream.parameters]
    for name, path in upstream.parameters.items():
        if name in weights:
            paths = (path,) if isinstance(path, str) else path
            ours |= dict(zip(paths, weights[name].chunk(len(paths)), strict=True))
    for name, tensor in ours.items():
        if name not in theirs:
            wrong.append(f"{name}: the module has no such tensor")
        elif tuple(theirs[name].shape) not in (tuple(tensor.shape), (1, *tensor.shape)):  # ERNIE's bias is [1, E]
            wrong.append(f"{name}: ours is {list(tensor.shape)}, the module's {list(theirs[name].shape)}")
    wrong += [f"{name}: the module has it, the page does not fill it" for name in theirs if name not in ours]
    if wrong:
        raise CouldNotRun(
            f"{_installed()}: {type(module).__name__} is not the one that the page describes, which follows transformers "
            f"{WRITTEN_FOR}: {'; '.join(wrong)}"
        )
    filled = {}
    for name, tensor in ours.items():
        dtype = torch.promote_types(tensor.dtype, theirs[name].dtype)
        filled[name] = tensor.to(dtype).view(theirs[name].shape)
    module.load_state_dict(filled, strict=True, assign=True)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
