"""How a map goes live in an engine: vLLM's EPLB moves the weights, and does so only when all ranks have agreed.

At every ``step_interval`` steps EPLB would plan by itself and move. Instead, ranks compare what each has armed, in one
all-reduce of four numbers. If all are equal, EPLB moves to that map, and then its columns are written: EPLB takes equal
columns for each copy, and its router chooses a column by the row, so a copy with more columns gets more tokens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.distributed.parallel_state import get_ep_group, get_eplb_group
from vllm.platforms import current_platform

from engine.expert_map import COLUMNS, Array, ExpertMap
from engine.expert_rank import Command, ExpertRank, RankReport
from engine.vllm.experts import on_cpu, patch


class LivePlacement:
    """This rank's EPLB state and rank machine. The engine's thread and the stream's take turns."""

    def __init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        """Called on the engine's thread when there is something to report."""
        self.apply_s = 0.0
        """How long the last change stopped this rank."""
        self.agreed: ExpertMap | None = None
        """The map that EPLB is about to be given."""
        self._lock = threading.Lock()
        self._rank: ExpertRank | None = None
        self._state: Any = None
        self._map: Any = None
        self._loads: Any = None
        self._counts: Any = None
        self._top_k = 1

    def begin(self, epoch: int, state: Any, top_k: int) -> None:
        """Take part from now on. ``top_k``: experts of each token."""
        with self._lock:
            self._state, self._top_k = state, top_k
            model = self.model
            shape = (model.num_moe_layers, get_ep_group().world_size, model.num_local_physical_experts)
            live = self._map = self.live_map()
            self._rank = ExpertRank(epoch, live.digest, slots_shape=shape, experts=model.num_logical_experts)
            self._counts = np.zeros((model.num_moe_layers, model.num_logical_experts), np.int64)
            self._loads = torch.zeros_like(self.model_state.expert_load_pass, dtype=torch.int64)

    @property
    def model_state(self) -> Any:
        """EPLB's state of the model itself; drafters have their own, which are left alone."""
        return next(iter(self._state.model_states.values()))

    @property
    def model(self) -> Any:
        """The MoE model."""
        return self.model_state.model

    def handle(self, command: Command) -> None:
        """Take a command of the scheduler."""
        with self._lock:
            assert self._rank is not None
            self._rank.handle(command)

    def refuse(self, why: str) -> None:
        """A map came that is none."""
        with self._lock:
            assert self._rank is not None
            self._rank.refuse(why)

    def report(self) -> RankReport:
        """What this rank has."""
        with self._lock:
            assert self._rank is not None
            return self._rank.report()

    def maps(self) -> tuple[ExpertMap, ExpertMap | None]:
        """The live map, and the staged one."""
        with self._lock:
            assert self._rank is not None
            return self._map, self._rank.staged

    def take_counts(self) -> tuple[int, Array]:
        """Tokens and their routed counts [layers, experts] since the last time."""
        with self._lock:
            self._fold()
            counts = self._counts
            self._counts = np.zeros_like(counts)
            return int(counts[0].sum()) // self._top_k, counts

    def live_map(self) -> ExpertMap:
        """What the engine really has: read from the tables that its router uses."""
        state, model = self.model_state, self.model
        shape = (model.num_moe_layers, get_ep_group().world_size, -1)
        slots = state.physical_to_logical_map.cpu().numpy().astype(np.int32)
        copies = state.logical_replica_count.cpu().numpy()
        if (copies != COLUMNS).any():  # as the engine began: equal parts
            return ExpertMap.shared(model.num_logical_experts, slots.reshape(shape))
        table = state.logical_to_physical_map[..., :COLUMNS].cpu().numpy()
        columns = np.stack([np.bincount(layer.ravel(), minlength=slots.shape[1]) for layer in table]).astype(np.int32)
        return ExpertMap(model.num_logical_experts, slots.reshape(shape), columns.reshape(shape))

    def count(self) -> None:
        """Add what the step routed, before EPLB clears it. On the device: nothing waits for it here."""
        with self._lock:
            if self._loads is not None:
                self._loads += self.model_state.expert_load_pass

    def _fold(self) -> None:
        """Count the loads of physical experts for the logical ones that they are, before they become others."""
        loads, slots = self._loads.cpu().numpy(), self.model_state.physical_to_logical_map.cpu().numpy()
        for layer in range(len(loads)):
            self._counts[layer] += np.bincount(slots[layer], loads[layer], self._counts.shape[1]).astype(np.int64)
        # Only now: on CPU the arrays are the tensors' own memory.
        self._loads.zero_()

    def meet(self, rearrange: Any) -> None:
        """All ranks are at this step: agree, and change together. ``rearrange``: EPLB's own, which moves weights.

        The scheduler's commands wait meanwhile: what was voted for must still be there when it is agreed.
        """
        with self._lock:
            group = get_eplb_group()
            mine = self._rank.vote() if self._rank is not None else (0, 0, 0, 0)
            reduced = torch.tensor(mine, dtype=torch.int64)
            dist.all_reduce(reduced, op=dist.ReduceOp.MIN, group=group.cpu_group)
            self.agreed = self._rank.agreed(reduced.tolist()) if self._rank is not None else None
            if self.agreed is None:
                return
            assert self._rank is not None
            began_s = time.perf_counter()
            self._fold()
            rearrange()
            self._write_columns(self.agreed)
            self.apply_s = time.perf_counter() - began_s
            self._map = self.live_map()
            self._rank.applied(self._map.digest)
            self.agreed = None
        self.on_change()

    def _write_columns(self, placed: ExpertMap) -> None:
        """In place: the model's layers look at these very tensors."""
        state = self.model_state
        table = torch.from_numpy(placed.physical().astype(np.int64))
        state.logical_to_physical_map[..., :COLUMNS].copy_(table)
        state.logical_to_physical_map[..., COLUMNS:].fill_(-1)
        state.logical_replica_count.fill_(COLUMNS)


LIVE = LivePlacement()
"""Of this process: a vLLM worker process is one rank."""


class AgreedPolicy:
    """What EPLB asks for a new map: the one that all ranks have agreed on."""

    @classmethod
    def rebalance_experts(cls, _weight: Any, *_: Any) -> torch.Tensor:
        """[layers, physical experts]: logical ids."""
        assert LIVE.agreed is not None
        return torch.from_numpy(LIVE.agreed.slots.reshape(len(LIVE.agreed.slots), -1).astype(np.int64))


def objection() -> str:
    """Why experts cannot be placed in this vLLM; empty where they can."""
    try:
        for owner, name, digest, _ in _patches():
            patch.check(owner, name, digest)
    except patch.Unknown as error:
        return str(error)
    return ""


def take_over() -> None:
    """Decide in EPLB's place, in this process. Raises patch.Unknown."""
    for owner, name, digest, make in _patches():
        patch.replace(owner, name, digest, make)


def _patches() -> list[patch.Patch]:
    own: list[patch.Patch] = [
        (EplbState, "step", "4eaa96f6976b", _counting_step),
        (EplbState, "_should_record_current_step", "b0ebcc32312a", _always),
        (EplbState, "rearrange", "362f542f3a5e", _agreed_rearrange),
    ]
    return own + (on_cpu.eplb_patches() if current_platform.is_cpu() else [])


def _agreed_rearrange(original: Any) -> Any:
    def rearrange(self: Any, is_profile: bool = False, *arguments: Any, **named: Any) -> Any:
        if current_platform.is_cpu():
            # In data-parallel workers vLLM's own stand-in is here, which measures nothing.
            torch.Event = on_cpu.ClockEvent
        if is_profile or arguments or named:
            return original(self, is_profile, *arguments, **named)
        self.policy = AgreedPolicy
        LIVE.meet(lambda: original(self))
        return None

    return rearrange


def _always(_: Any) -> Any:
    """Without it EPLB counts the last steps before a change alone."""

    def should_record(self: Any, log_stats: bool = False) -> bool:  # noqa: ARG001 - as EPLB calls it
        return True

    return should_record


def _counting_step(original: Any) -> Any:
    def step(self: Any, is_dummy: bool = False, is_profile: bool = False, log_stats: bool = False) -> None:
        if not is_dummy and not is_profile:
            LIVE.count()
        original(self, is_dummy, is_profile, log_stats=log_stats)

    return step
