"""The secrets of pods: many in one Secret, so that few pods need a write for theirs."""

import asyncio
import base64
import contextlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final

from dayfly import greeting
from dayfly_pool import pods as manifests
from dayfly_pool.cluster.api import SECRET, Api, Exists, NotFound
from dayfly_pool.pods import Key

KEYS: Final = 128
"""Secrets of pods that are kept in one Secret: a write to the API server for so many pods."""

COMPONENT: Final = "sandbox-keys"


class Keys:
    """Those of one shard's pods. Every method that waits raises `ApiError`."""

    def __init__(self, api: Api, shard: str, prefix: str, owner: Mapping[str, Any]) -> None:
        self._api, self._shard, self._prefix, self._owner = api, shard, prefix, owner
        self._unused: list[tuple[Key, bytes]] = []
        self._blocks: dict[str, dict[str, bytes]] = {}
        self._making = asyncio.Lock()

    async def take(self) -> tuple[Key, bytes]:
        """A secret that no pod has had."""
        async with self._making:
            if not self._unused:
                await self._make()
            return self._unused.pop()

    async def _make(self) -> None:
        name = f"{self._prefix}-keys-{secrets.token_hex(5)}"
        block = {f"k{n}": secrets.token_bytes(greeting.SECRET_BYTES_MIN) for n in range(KEYS)}
        labels = manifests.labels(COMPONENT, self._shard)
        data = {entry: base64.b64encode(secret).decode() for entry, secret in block.items()}
        metadata = {"name": name, "labels": labels, "ownerReferences": [dict(self._owner)]}
        with contextlib.suppress(Exists):  # by our first try, whose answer was lost
            await self._api.create(SECRET, {"metadata": metadata, "data": data, "immutable": True})
        self._blocks[name] = block
        self._unused += [(Key(name, entry), secret) for entry, secret in block.items()]

    async def read(self, key: Key) -> bytes | None:
        """The secret of a pod that was there before us; None when there is none any more."""
        if key.secret not in self._blocks:
            try:
                data = (await self._api.get(SECRET, key.secret)).get("data") or {}
            except NotFound:
                data = {}
            self._blocks[key.secret] = {e: base64.b64decode(text) for e, text in data.items()}
        return self._blocks[key.secret].get(key.entry)

    async def drop(self, used: Callable[[], set[str]]) -> None:
        """Delete the Secrets that nobody has a key of; *used* says whose pods have one now."""
        labels = manifests.selector(COMPONENT, self._shard)
        page = await self._api.page(SECRET, labels=labels)
        for name in [obj["metadata"]["name"] for obj in page["items"] or ()]:
            async with self._making:  # what is being made is in nobody's books yet
                if name not in used() | {key.secret for key, _ in self._unused}:
                    self._blocks.pop(name, None)
                    await self._api.delete(SECRET, name)
