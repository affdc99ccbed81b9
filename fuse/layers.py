"""Archives whose content is not known yet, each opened when somebody first needs to know."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from fetcher.errors import ModelError
from fuse.chunks import Changed

if TYPE_CHECKING:
    from fetcher.modelpack import Layer
    from fuse.agent import Agent
    from fuse.chunks import Blob
    from fuse.tree import Inodes

logger = logging.getLogger(__name__)

_PAUSE: Final = 0.5
"""Seconds before it is tried again what failed, however many ask."""


class OpenLayer:
    """One archive on its way to be known.

    The work is that of its own task, which goes on though everybody who asked has given up.
    """

    def __init__(self, layer: Layer, blob: Blob, inodes: Inodes, agent: Agent) -> None:
        self._layer = layer
        self._blob = blob
        self._inodes = inodes
        self._agent = agent
        self._wanted = trio.Event()
        self._ended = trio.Event()
        self._problem: ModelError | None = None

    async def known(self) -> None:
        """Return once the names and files of the layer are known. Raises :class:`ModelError`."""
        if self._layer.descriptor.digest not in self._inodes.open:
            return
        self._wanted.set()
        await self._ended.wait()
        if self._problem is not None:
            raise self._problem

    async def run(self) -> None:
        """Open the layer when it is wanted, again where that failed; until it is known."""
        while True:
            await self._wanted.wait()
            self._problem = await self._open()
            ended, self._ended = self._ended, trio.Event()
            # who asks from now on asks for the next try
            self._wanted = trio.Event()
            ended.set()
            if self._problem is None:
                # whoever comes later does not wait
                return
            logger.warning("the layer %s cannot be shown: %s", self._blob.name, self._problem)
            await trio.sleep(_PAUSE)

    async def _open(self) -> ModelError | None:
        while True:
            try:
                content = await trio.to_thread.run_sync(self._blob.load)
                await self._inodes.add(self._layer, content)
                return None
            except Changed:
                pass
            except ModelError as error:
                return error
            except OSError as error:
                return ModelError(
                    f"the index of the layer {self._blob.name} cannot be read: {error.strerror}"
                )
            try:
                await self._agent.index(self._blob.name)
            except ModelError as error:
                return error
            await trio.sleep(_PAUSE / 10)
