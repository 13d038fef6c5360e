"""Maps, reports and commands of expert placement as protobuf messages, for both ends. Decides nothing."""

from __future__ import annotations

import msgspec

from engine.expert_map import BadExpertMap, ExpertMap
from engine.expert_rank import Abort, Arm, Command, RankReport, Stage
from protos.experts.v1 import experts_pb2 as pb

_REPORTED = [name for name in RankReport.__struct_fields__ if name != "epoch"]


def map_message(placed: ExpertMap) -> pb.ExpertMap:
    """A map on the wire."""
    layers, ranks, _ = placed.slots.shape
    return pb.ExpertMap(
        experts=placed.experts, layers=layers, ranks=ranks, slots=placed.slots_bytes, columns=placed.columns_bytes
    )


def read_map(message: pb.ExpertMap) -> ExpertMap:
    """The map. Raises BadExpertMap."""
    return ExpertMap.parse(message.experts, message.layers, message.ranks, message.slots, message.columns)


def report_message(report: RankReport, apply_s: float) -> pb.RankReport:
    """A report on the wire; its epoch is the stream's."""
    return pb.RankReport(apply_ms=apply_s * 1000, **{name: getattr(report, name) for name in _REPORTED})


def read_report(message: pb.RankReport, epoch: int) -> RankReport:
    """The report of a rank of this epoch."""
    return RankReport(epoch=epoch, **{name: getattr(message, name) for name in _REPORTED})


def command_message(command: Command) -> pb.RankCommands:
    """A command on the wire; its epochs are the stream's."""
    match command:
        case Stage():
            told = pb.RankCommand(stage=pb.StageMap(version=command.version, map=map_message(command.placed)))
        case Arm():
            told = pb.RankCommand(arm=pb.ArmMap(version=command.version))
        case _:
            told = pb.RankCommand(abort=pb.AbortMap(version=command.version))
    return pb.RankCommands(messages=[told])


class Unreadable(msgspec.Struct, frozen=True):
    """A map came that cannot be taken."""

    why: str


def read_command(message: pb.RankCommand, *, epoch: int, leader_epoch: int) -> Command | Unreadable | None:
    """The command of a stream of these epochs; None where it is none that this rank knows."""
    match message.WhichOneof("message"):
        case "stage":
            try:
                placed = read_map(message.stage.map)
            except BadExpertMap as error:
                return Unreadable(str(error))
            return Stage(epoch=epoch, leader_epoch=leader_epoch, version=message.stage.version, placed=placed)
        case "arm":
            return Arm(epoch=epoch, leader_epoch=leader_epoch, version=message.arm.version)
        case "abort":
            return Abort(epoch=epoch, leader_epoch=leader_epoch, version=message.abort.version)
        case _:
            return None
