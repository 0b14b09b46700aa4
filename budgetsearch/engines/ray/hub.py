"""The mailbox of the fleet: an actor on the driver's machine that keeps messages until they are fetched."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]
"""A record of ``messages`` as JSON values."""


class Hub:
    """Orders to lanes and reports to the driver, each fetched once, in their order.

    It decides nothing and keeps nothing big: the driver knows what was asked, and whatever is lost here is
    found out by the lanes' heartbeats.
    """

    def __init__(self) -> None:
        self._orders: dict[str, list[Message]] = defaultdict(list)
        self._told: list[Message] = []
        self._news = asyncio.Condition()
        self._closed = False

    async def order(self, orders: Sequence[Message]) -> None:
        """Keep orders until their lanes fetch them."""
        async with self._news:
            for order in orders:
                self._orders[order["lane"]].append(order)
            self._news.notify_all()

    async def orders(self, lane: str, timeout: float) -> list[Message] | None:
        """The orders for a lane; waits so many seconds for the first. None: the fleet ends."""
        await self._until(lambda: bool(self._orders.get(lane)), timeout)
        return None if self._closed else self._orders.pop(lane, [])

    async def tell(self, messages: Sequence[Message]) -> None:
        """Keep messages until the driver fetches them."""
        async with self._news:
            self._told += messages
            self._news.notify_all()

    async def told(self, timeout: float) -> list[Message]:
        """Messages to the driver; waits so many seconds for the first."""
        await self._until(lambda: bool(self._told), timeout)
        found, self._told = self._told, []
        return found

    async def close(self) -> None:
        """Let every lane end."""
        async with self._news:
            self._closed = True
            self._news.notify_all()

    async def _until(self, arrived: Any, timeout: float) -> None:
        try:
            async with asyncio.timeout(timeout), self._news:
                await self._news.wait_for(lambda: self._closed or arrived())
        except TimeoutError:
            pass
