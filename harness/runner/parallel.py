"""How the ranks share the experts: the sizes and ranks that every part of the layer decides by.

Source: `FusedMoEParallelConfig.make` of vLLM; between its two ends, the rule of SGLang (see `harness.case.Grid`).
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.comm import Communicator


@dataclass(frozen=True, kw_only=True, slots=True)
class FusedMoEParallelConfig:
    """tp, dp: the model's groups.    moe_tp: ranks that cut one expert among them.    ep: ranks, or groups of moe_tp
    ranks, with experts of their own.    sequence_parallel: the tp ranks take different rows through the layer.
    """

    tp_size: int
    tp_rank: int
    dp_size: int
    dp_rank: int
    moe_tp_size: int
    moe_tp_rank: int
    ep_size: int
    ep_rank: int
    sequence_parallel: bool

    @classmethod
    def make(cls, comm: Communicator, *, sequence_parallel: bool = False) -> FusedMoEParallelConfig:
        """Without expert parallelism the experts are cut over all ranks, those of other data-parallel groups too."""
        moe_tp_size = comm.world_size // comm.ep.size
        return cls(
            tp_size=comm.tp.size,
            tp_rank=comm.tp.rank,
            dp_size=comm.dp.size,
            dp_rank=comm.dp.rank,
            moe_tp_size=moe_tp_size,
            moe_tp_rank=comm.rank % moe_tp_size,
            ep_size=comm.ep.size,
            ep_rank=comm.ep.rank,
            sequence_parallel=sequence_parallel,
        )

    @property
    def holds_all(self) -> bool:
        """One rank with whole experts, all of them: nothing is ever partial."""
        return self.moe_tp_size == self.ep_size == 1

    @property
    def shared_size(self) -> int:
        """Ranks that cut the shared experts: tp; under sequence parallelism each holds them whole."""
        return 1 if self.sequence_parallel else self.tp_size

    @property
    def shared_rank(self) -> int:
        return 0 if self.sequence_parallel else self.tp_rank
