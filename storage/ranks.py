"""What the processes of a multi-slot trial, its ranks, do together."""

from collections.abc import Callable

from determined import core

from errors import UserError


def once_per_node(distributed: core.DistributedContext, work: Callable[[], object]) -> None:
    """Run `work` on the first rank of each node while the others wait; its `UserError` is raised on all of them."""
    mistake = None
    if distributed.local_rank == 0:
        try:
            work()
        except UserError as error:
            mistake = error
    mistake = distributed.broadcast_local(mistake)
    if mistake is not None:
        raise mistake
