"""All ranks of a grid in one pass of the runner: their rows stand one below the other, and the runner cannot tell.

Nothing in a runner's forward may depend on which rank it is, so that one pass does for all of them, ten times as fast as
ranks that wait for each other. Code that asks for its rank is not believed: it raises `AskedForRank`, and the state is
run on ranks apart (`harness.certify.ranks`). The runner is the real one of a really built layer, its kernel decides by the
real transport; only what the kernel returns, and the shared module, are labels.

n ranks, H hidden, P kernel width, K slots of a token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor

from harness.case import Grid, groups_of
from harness.certify.law import Ledger
from harness.certify.states import LayerState, latent_of, settings_of, spec_of
from harness.certify.world import DTYPES, LATENT_LABEL, junk, logits_of, seats, weights_of, world
from harness.comm import Call, Communicator, Group
from harness.runner.layer import FusedMoE, Kernel
from harness.runner.modular_kernel import FusedMoEKernel, Steps
from harness.runner.moe_runner import MoERunner
from harness.runner.placement import Placement
from harness.runner.plan import LayerFacts, OutputPlan, Reduced
from harness.runner.router import FusedMoERouter, ZeroExpertRouter
from harness.runner.shared_experts import SharedExperts


class AskedForRank(BaseException):
    """The code wants to know which rank it is, or calls what cannot be done for all ranks at once."""


class StackedGroup:
    """A group of every rank at once. Writes into the ledger what is called on it."""

    def __init__(self, name: str, sizes: Grid, ledger: list[tuple[str, str]]) -> None:
        self.name = name
        self.calls = 0
        self.size = len(groups_of(sizes)[name][0])
        self._shape = (sizes.dp, sizes.tp, -1) if name == "tp" else None
        self._groups = groups_of(sizes)[name]
        self._ledger = ledger

    def __getattr__(self, name: str) -> NoReturn:
        raise AskedForRank(f"{self.name}.{name}")

    def all_reduce(self, rows_nH: Tensor) -> Tensor:
        """The sum over each group, on each of its ranks."""
        self.calls += 1
        self._ledger.append(("all_reduce", self.name))
        if self.size == 1:
            return rows_nH.clone()
        if self._shape is not None:
            if self._shape[0] == 1:
                return rows_nH.sum(0, keepdim=True).expand_as(rows_nH).clone()
            grouped = rows_nH.reshape(self._shape)
            return grouped.sum(1, keepdim=True).expand_as(grouped).reshape(rows_nH.shape)
        total_nH = torch.empty_like(rows_nH)
        for ranks in self._groups:
            total_nH[list(ranks)] = rows_nH[list(ranks)].sum(0)
        return total_nH


class StackedCommunicator:
    """The communicator of every rank at once."""

    def __init__(self, sizes: Grid) -> None:
        self.ledger: list[tuple[str, str]] = []
        self.world_size = sizes.ranks
        self.tp, self.ep, self.dp = (StackedGroup(name, sizes, self.ledger) for name in ("tp", "ep", "dp"))
        self.all_reduce = self.tp.all_reduce

    def __getattr__(self, name: str) -> NoReturn:
        raise AskedForRank(name)


class _Chosen:
    """What the real router chose for a token, on every rank."""

    def __init__(self, weights_nK: Tensor, ids_nK: Tensor, scales: bool) -> None:
        self.weights_nK, self.ids_nK, self.scales = weights_nK, ids_nK, scales

    def select_experts(self, router_logits_ME: Tensor) -> tuple[Tensor, Tensor]:
        return self.weights_nK, self.ids_nK


class _StackedKernel(FusedMoEKernel):
    """A real kernel that says what it is; what it computes are labels: complete, or of the ranks its combine adds."""

    ledger: list[tuple[str, str]]
    label_nP: Tensor
    owners_KP: Tensor
    ids_nK: dict[torch.dtype, Tensor]
    weights_nK: Tensor  # of a monolithic one, which routes by itself
    usual: dict[torch.dtype, tuple[Tensor, Tensor]]  # the last weights handed over, and the labels times them

    def steps(self, x_MP: Tensor, weights_MK: Tensor, ids_MK: Tensor) -> Steps:
        right = self.ids_nK.get(ids_MK.dtype)
        if right is None or x_MP.shape != self.label_nP.shape or not torch.equal(ids_MK, right):
            raise ValueError(f"kernel called with {list(x_MP.shape)} {ids_MK.dtype} ids {ids_MK.tolist()}")
        if self.scale is not None:
            weights_MK = weights_MK * self.scale
        return self._label(x_MP, weights_MK)

    def monolithic_steps(self, x_MP: Tensor, logits_ME: Tensor) -> Steps:
        weights_MK = self.weights_nK
        return self._label(x_MP, weights_MK if self.scale is None else weights_MK * self.scale)

    def _label(self, x_MP: Tensor, weights_MK: Tensor) -> Steps:
        self.ledger += self.announced
        usual = self.usual.get(x_MP.dtype)
        if usual is None or not torch.equal(usual[0], weights_MK):
            usual = weights_MK.clone(), (weights_MK @ self.owners_KP * self.label_nP).to(x_MP.dtype)
            self.usual[x_MP.dtype] = usual
        out_MP = usual[1] * x_MP[:, :1]
        yield
        return out_MP


class _Remembered(dict[int, Any]):
    """What a runner remembers of a call by micro-batch, for those who ask afterwards. read: somebody asked."""

    read = False

    def __getitem__(self, key: int) -> Any:
        self.read = True
        return super().__getitem__(key)

    def __iter__(self) -> Iterator[int]:
        self.read = True
        return super().__iter__()

    def __len__(self) -> int:
        self.read = True
        return super().__len__()

    def __contains__(self, key: object) -> bool:
        self.read = True
        return super().__contains__(key)


class _WatchedRunner(MoERunner):
    """The runner, told on if a forward reads the plan that an earlier one left behind, or decides outside `plan`.

    decided: the order of shared experts, or a fact of the layer but s itself, was read outside `plan` by any runner since
    this was set back.
    """

    planned: bool
    deciding: bool
    read_history: bool
    decided: ClassVar[bool] = False

    def plan(self, dtype: torch.dtype, width: int) -> OutputPlan:
        self.deciding = True
        try:
            return super().plan(dtype, width)
        finally:
            self.deciding = False

    @property
    def last_plan(self) -> OutputPlan | None:
        if not self.planned:
            self.read_history = True
        plan: OutputPlan | None = self.__dict__["last_plan"]
        return plan

    @last_plan.setter
    def last_plan(self, plan: OutputPlan | None) -> None:
        self.__dict__["last_plan"], self.planned = plan, True

    @property
    def shared_order(self) -> Any:
        if not self.deciding:
            _WatchedRunner.decided = True
        return self.__dict__["shared_order"]

    @shared_order.setter
    def shared_order(self, order: Any) -> None:
        self.__dict__["shared_order"] = order

    @property
    def facts(self) -> LayerFacts:
        facts: LayerFacts = self.__dict__["facts"]
        return facts if self.deciding else _watched(facts)

    @facts.setter
    def facts(self, facts: LayerFacts) -> None:
        self.__dict__["facts"] = facts


class _WatchedFacts(LayerFacts):
    """Facts that tell if more than s is read of them."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        if name in LayerFacts.__slots__ and name != "scale":
            _WatchedRunner.decided = True
        return super().__getattribute__(name)


def watch(runner: MoERunner) -> None:
    """From now on `read_history` knows."""
    runner.__class__ = _WatchedRunner
    assert isinstance(runner, _WatchedRunner)
    runner.planned = runner.deciding = runner.read_history = False
    for name in _REMEMBERS:
        runner.__dict__[name] = _Remembered()


@functools.lru_cache(maxsize=256)
def _watched(facts: LayerFacts) -> LayerFacts:
    return _WatchedFacts(**asdict(facts))


# of a runner: what it writes down of each call, for those who ask afterwards
_REMEMBERS = ("_told", "_passed")
# of a runner: what `seen` compares, and what no forward reads unless `_WatchedRunner` tells
_KNOWN = {
    "facts", "router", "kernel", "shared_experts", "shared_order", "routed_input_transform", "routed_output_transform",
    "placement", "share", "comm", "last_plan", *_REMEMBERS, "planned", "deciding", "read_history",
}  # fmt: skip


class StackedLayer(FusedMoE):
    """A real layer, built as rank 0 builds it, whose runner then works for all ranks."""

    def __init__(self, layer: LayerState, kernel: str) -> None:
        self._state = layer
        self._world = _worlds(layer.grid)
        super().__init__(spec_of(layer), settings_of(layer, kernel), weights_of(layer), self._world.first)
        runner = self.runner
        watch(runner)
        runner.comm = self._world.comm  # type: ignore[assignment]
        runner.router = self._world.router(self._router, logits_of(layer))
        if runner.shared_experts is not None:
            runner.shared_experts = SharedExperts(self._world.shared, self._world.comm)  # type: ignore[arg-type]

    def make_kernel(self, backend: Kernel, placement: Placement | None) -> FusedMoEKernel:
        """The real one, made once for layers that ask for the same."""
        return self._world.kernel(self, super().make_kernel, backend, placement)

    @property
    def seen(self) -> tuple[Any, ...]:
        """Everything of the layer that a runner's forward can see."""
        return seen(self.runner)

    def planned(self, kernels: tuple[str, ...]) -> list[tuple[Any, ...]]:
        """For each kernel the same, with the plans of its first calls in place of what only plans are made of.

        Two layers that are alike in this do the same with that kernel, if nothing was decided outside of plans
        (`decided`).
        """
        runner, found = self.runner, []
        for kernel in kernels:
            runner.kernel = self.make_kernel(kernel, runner.placement)  # type: ignore[arg-type]  # a word of CALL_AXES
            plans = [runner.plan(dtype, self._latent) for dtype in DTYPES.values()]
            found.append((kernel, runner.facts.scale, *plans, *_parts(runner)))
        return found


def seen(runner: MoERunner) -> tuple[Any, ...]:
    """Everything that a runner's forward can see, but for what calls before it left behind."""
    now = runner.__dict__
    return now["facts"], now["shared_order"], *_parts(runner)


def _parts(runner: MoERunner) -> tuple[Any, ...]:
    now, shared = runner.__dict__, runner.shared_experts
    more: tuple[Any, ...] = ()
    if now.keys() != _KNOWN:
        more = tuple(_named(name, each) for name, each in now.items() if name not in _KNOWN)
    transforms = (now["routed_input_transform"], now["routed_output_transform"])
    return (
        id(now["router"]), id(now["kernel"]), now["share"], now["placement"], more,
        shared and (type(shared), len(shared.__dict__), len(shared._outputs)),
        *(each and (id(each.weight), each.bias is None or id(each.bias)) for each in transforms),
    )  # fmt: skip


def _named(name: str, value: object) -> tuple[str, object]:
    """Hashable: by value where that can be."""
    return name, value if isinstance(value, str | int | float | bool | None) else id(value)


class _World:
    """What all layers of a grid share."""

    def __init__(self, grid: str) -> None:
        self.grid = world(grid)
        sizes = self.grid.sizes
        self.sizes = sizes
        mine = {name: groups[0] for name, groups in groups_of(sizes).items()}
        self.first = Communicator(
            0, sizes.ranks, *(Group(name, mine[name], 0, _nothing_yet) for name in ("tp", "ep", "dp"))
        )
        self.comm = StackedCommunicator(sizes)
        self._routers: dict[tuple[Any, ...], FusedMoERouter] = {}
        self._kernels: dict[tuple[Any, ...], FusedMoEKernel] = {}
        labels_nH = torch.zeros(sizes.ranks, self.grid.hidden)
        labels_nH[:, seats(sizes.ranks)[2]] = torch.eye(sizes.ranks)
        self._shared_nH = {dtype: labels_nH.to(dtype) for dtype in DTYPES.values()}

    def shared(self, x_nH: Tensor) -> Tensor:
        """Each rank's shard of the shared experts, or under sequence parallelism all of it."""
        return self._shared_nH[x_nH.dtype] * x_nH[:, :1]

    def router(self, real: FusedMoERouter, logits_1E: Tensor) -> FusedMoERouter:
        """What a router like this chose once."""
        key = described(real)
        if key not in self._routers:
            weights_1K, ids_1K = real.select_experts(logits_1E)
            order = ids_1K[0].argsort()  # ties: any order is right
            rows = torch.zeros(self.sizes.ranks, 1)
            chosen = _Chosen(rows + weights_1K[:, order], rows.long() + ids_1K[:, order], real.scales)
            if isinstance(real, ZeroExpertRouter):
                self._routers[key] = ZeroExpertRouter(chosen, real.num_experts)
            else:
                self._routers[key] = chosen
        return self._routers[key]

    def kernel(self, layer: StackedLayer, make: Any, backend: str, placement: Placement | None) -> FusedMoEKernel:
        state, settings = layer._state, layer._settings
        fused, latent = settings.fuse_shared_experts, state.latent != "none"
        router = self.router(layer._router, logits_of(state)) if settings.experts == "monolithic" else None
        key = (backend, settings.experts, layer._kernel_scale, fused, latent, state.pad, state.zero, id(router))
        if key not in self._kernels:
            kernel = make(backend, placement)
            kernel.__class__ = _StackedKernel
            kernel.ledger, kernel.usual = self.comm.ledger, {}
            kernel.label_nP, kernel.owners_KP = self._labels(
                backend, fused, latent, int(state.pad), state.zero == "yes"
            )
            experts = list(range(self.sizes.ep + fused)) + [-1] * (state.zero == "yes")
            ids_nK = torch.tensor(experts).expand(self.sizes.ranks, -1)
            kernel.ids_nK = {kernel.topk_indices_dtype: ids_nK.to(kernel.topk_indices_dtype)}
            if isinstance(router, _Chosen):
                kernel.weights_nK = router.weights_nK
            self._kernels[key] = kernel
        return self._kernels[key]

    def _labels(self, backend: str, fused: bool, latent: bool, pad: int, zero: bool) -> tuple[Tensor, Tensor]:
        """[n, P]: what each rank gets of each column; [K, P]: which slot's weight multiplies it."""
        sizes, ranks = self.sizes, self.sizes.ranks
        width = latent_of(ranks) if latent else self.grid.hidden
        complete = backend != "partial" or sizes.sp > 1
        mine_nn = torch.ones(ranks, ranks)
        if not complete:  # the combine adds over dp at most
            place = torch.arange(ranks) % sizes.tp
            mine_nn = (place[:, None] == place).float()
        owner_n = torch.arange(ranks) // sizes.moe_tp
        slots_Kn = torch.nn.functional.one_hot(owner_n, sizes.ep).T.float()
        label_nP, owners_KP = torch.zeros(ranks, width), torch.zeros(sizes.ep + fused + zero, width)
        routed, bias, shared = seats(ranks)
        keeps_n = (torch.arange(ranks) % sizes.moe_tp == 0).float()
        label_nP[:, routed], label_nP[:, bias] = mine_nn, mine_nn * keeps_n
        owners_KP[: sizes.ep, routed] = owners_KP[: sizes.ep, bias] = slots_Kn
        if fused:
            label_nP[:, shared], owners_KP[sizes.ep, shared] = mine_nn, 1.0
        return junk(label_nP / LATENT_LABEL if latent else label_nP, pad), junk(owners_KP, pad).nan_to_num(1.0)


@functools.cache
def _worlds(grid: str) -> _World:
    return _World(grid)


def _nothing_yet(call: Call) -> NoReturn:
    raise AskedForRank(f"{call} while the layer is built")


def described(router: FusedMoERouter) -> tuple[Any, ...]:
    """Its class and the numbers in it, down to the innermost."""
    parts: list[Any] = [type(router)]
    for name in _fields(type(router)):
        value = getattr(router, name)
        if name == "inner":
            parts.append(described(value))
        elif not isinstance(value, Tensor):
            parts.append(value)
    return tuple(parts)


@functools.cache
def _fields(kind: type[Any]) -> tuple[str, ...]:
    return tuple(kind.__dataclass_fields__)


class Kept:
    """What a layer remembers, to be put back: the calls after it start from the same history."""

    def __init__(self, layer: FusedMoE) -> None:
        self._kept = []
        for owner in (layer, layer.runner, layer.runner.shared_experts):
            if owner is not None:
                state = dict(owner.__dict__)
                inner = [(name, type(each), dict.copy(each)) for name, each in state.items() if isinstance(each, dict)]
                self._kept.append((owner.__dict__, state, inner))

    def restore(self) -> None:
        for attributes, state, inner in self._kept:
            attributes.clear()
            attributes.update(state)
            for name, kind, each in inner:
                attributes[name] = kind(each)


def call(layer: StackedLayer, x_nH: tuple[Tensor, ...]) -> tuple[list[Tensor], Ledger]:
    """One call, or as many micro-batches as there are; what comes out of it, after the caller's reduction if it is his."""
    comm, runner = layer._world.comm, layer.runner
    comm.ledger.clear()
    runner.planned = False  # type: ignore[attr-defined]
    if len(x_nH) == 1:
        out_nH = [runner.forward(x_nH[0], _LOGITS)]
    else:
        out_nH = runner.forward_micro_batches([(each, _LOGITS) for each in x_nH])
    assert runner.last_plan is not None
    if runner.last_plan.routed_reduced is Reduced.BY_CALLER:
        out_nH = [comm.tp.all_reduce(each) for each in out_nH]
    return out_nH, tuple(comm.ledger)


def decided() -> bool:
    """Whether any runner has read outside its plan what plans are made of; forgets it, to be asked again."""
    found, _WatchedRunner.decided = _WatchedRunner.decided, False
    return found


def read_history(layer: FusedMoE) -> bool:
    """Whether the last call has looked at what calls before it left behind; of a runner that is watched."""
    now: dict[str, Any] = layer.runner.__dict__
    return now["read_history"] or any(now[name].read for name in _REMEMBERS)


_LOGITS = torch.empty(0)  # nobody reads them: what the router chose is known
