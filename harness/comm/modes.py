"""Torch's mode state, kept apart for ranks that share one: gradients, inference, autocast, default dtype, mode stacks.

Torch holds all of this for each thread (the default dtype for the process), so a rank that stops inside `no_grad`
would switch gradients off for the next one. Between two ranks the state is therefore always that of the caller, "home":
a rank leaves for home when it stops and comes back to its own state when it goes on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """autocast: device and dtype of each device that has it on.    dispatch, function: stacks, the innermost last."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    default_dtype: torch.dtype
    dispatch: tuple[Any, ...]
    function: tuple[Any, ...]


def current() -> State:
    """The state of this thread now."""
    return State(*_read())


def _read() -> tuple[Any, ...]:
    """The fields of State as a plain tuple, which every collective of every rank reads and compares: 0.3 us."""
    dispatch, function = _dispatch_depth(), _function_depth()
    return (
        _grad(),
        _inference(),
        _autocast() if _any_autocast() else (),
        _default_dtype(),
        tuple(map(torch._C._get_dispatch_stack_at, range(dispatch))) if dispatch else (),
        tuple(map(torch._C._get_function_stack_at, range(function))) if function else (),
    )


_grad, _inference, _default_dtype = torch.is_grad_enabled, torch.is_inference_mode_enabled, torch.get_default_dtype
_dispatch_depth, _function_depth = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_any_autocast = torch._C._is_any_autocast_enabled


class Away:
    """A rank's state, put aside until `back`; this thread is in `home` meanwhile.

    Only an inference guard sets all that inference mode consists of, and its exit restores exactly what its entry
    found, in whatever order guards end. Modes leave their stacks before the guard moves: it saves the keys they set.
    """

    def __init__(self, own: State, home: State) -> None:
        self.own, self.home = own, home
        inference_mode: Any = torch._C._InferenceMode
        self.guard = inference_mode(home.inference) if own.inference != home.inference else None
        _pop_modes(own)
        if self.guard is not None:
            self.guard.__enter__()
        _set(own, home)

    def back(self) -> None:
        _pop_modes(self.home)
        if self.guard is not None:
            self.guard.__exit__(None, None, None)
        _set(self.home, self.own)

    def stay(self) -> None:
        """The rank has ended and stays at home: as garbage, its guard would turn its inference mode on again."""
        if self.guard is not None:
            _STAYED.append(self.guard)


_STAYED: list[Any] = []


def leave_for(home: State) -> Away | None:
    """Changes from this rank's state to home; None if they are the same."""
    own = _read()
    return Away(State(*own), home) if own != home else None


def owned(tensors: tuple[Tensor, ...], away: Away) -> tuple[Tensor, ...]:
    """Results made at home, as a rank needs them that is in inference mode while home is not, or the reverse."""
    return tuple(tensor.clone() for tensor in tensors) if away.guard is not None else tensors


def _set(was: State, wanted: State) -> None:
    """All but inference mode; the stacks are empty before."""
    torch._C._set_grad_enabled(wanted.grad)
    if was.default_dtype != wanted.default_dtype:
        torch.set_default_dtype(wanted.default_dtype)
    if was.autocast != wanted.autocast:
        for device, _ in was.autocast:
            torch.set_autocast_enabled(device, False)
        for device, dtype in wanted.autocast:
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, dtype)
    for mode in wanted.dispatch:
        torch._C._push_on_torch_dispatch_stack(mode)
    for mode in wanted.function:
        torch._C._push_on_torch_function_stack(mode)


def _pop_modes(state: State) -> None:
    for _ in state.dispatch:
        torch._C._pop_torch_dispatch_stack(None)
    for _ in state.function:
        torch._C._pop_torch_function_stack()


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    devices = ("cpu", "cuda")
    return tuple((name, torch.get_autocast_dtype(name)) for name in devices if torch.is_autocast_enabled(name))
