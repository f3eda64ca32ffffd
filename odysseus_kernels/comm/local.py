"""The transport of a group of one rank: callbacks see its own tensors, and nothing travels."""

from __future__ import annotations

from odysseus_kernels.comm.transport import Call, Transport

__all__ = ["LocalTransport"]


class LocalTransport(Transport):
    """A group of one rank: nothing travels."""

    name = "local"
    serves_tiles = True  # nothing arrives: the callback for its own chunk is all there is
    no_switch = ""  # nor is anything added

    def __init__(self) -> None:
        super().__init__(0, 1)

    def _execute(self, call: Call) -> None:
        if call.scatter is not None:
            call.scatter.produce(0, 0, call.scatter.out.shape[1], call.scatter.out)
        if call.gather is not None:
            call.gather.consume(0, 0, call.gather.shard.shape[1], call.gather.shard)
        if call.exchange is not None:
            call.exchange.visit(0, call.exchange.own_given(0), call.exchange.own_made(0))
        if call.pipeline is not None:
            pipeline = call.pipeline
            for index in range(len(pipeline.spans)):
                own = pipeline.own(index)
                pipeline.consume(index, 0, own[: pipeline.early])
                pipeline.compute(index)
                if pipeline.conclude is not None:
                    pipeline.conclude(index, 0, own[pipeline.early :])
                if pipeline.produce is not None:
                    pipeline.produce(index, 0, pipeline.own_out(index))
