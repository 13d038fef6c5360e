"""What a worker says of one attempt, on its way to the driver of the request. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from front_proxy.request.work import Stage, WorkerOutput
from runtime.failures import Failure

Receiver = Callable[[WorkerOutput | Failure], None]
"""Gets what becomes of one submission. Nothing follows a failure or an output with a finish."""


class Driver(Protocol):
    """Of the request."""

    middle_of: int
    """The attempt whose tokens go straight to the client, until anything else happens to the request. 0: none."""

    def on_word(self, attempt: int, stage: Stage, word: WorkerOutput | Failure) -> None:
        """Any word."""
        ...

    def take_middle(self, token_ids: list[int]) -> None:
        """Tokens of the attempt ``middle_of``, and nothing else."""
        ...


class AttemptWords:
    """A Receiver. Nearly all that it gets are tokens alone, which need neither an object around them nor a decision."""

    __slots__ = ("_attempt", "_decoding", "_driver", "_stage")

    def __init__(self, driver: Driver, attempt: int, stage: Stage) -> None:
        self._driver = driver
        self._attempt = attempt
        self._stage = stage
        self._decoding = attempt if stage is Stage.DECODE else -1

    def __call__(self, word: WorkerOutput | Failure) -> None:
        """Any word."""
        self._driver.on_word(self._attempt, self._stage, word)

    def tokens(self, token_ids: list[int]) -> None:
        """An output that is tokens alone."""
        driver = self._driver
        if driver.middle_of == self._decoding:
            driver.take_middle(token_ids)
        else:
            driver.on_word(self._attempt, self._stage, WorkerOutput(token_ids=token_ids))
