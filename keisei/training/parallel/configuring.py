"""What a manager can say about its slots' settings."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

from keisei.exceptions import CommandError, CommandTimeout, WorkerError
from keisei.training.parallel.lifecycle import Lifecycle
from keisei.training.parallel.pool import Pool
from keisei.training.parallel.settings import packed_aside, unpacked


class Configuring(Lifecycle):
    """A manager whose slots have settings that outlive processes."""

    async def configure(
        self,
        settings: Mapping[str, Any],
        worker_ids: Iterable[int] | None = None,
        *,
        timeout: float | None = None,
    ) -> int:
        """Change settings of slots, and return their new version when the workers have them.

        They are merged into what each slot is set to, name by name, and stay with it: a process
        that takes the place of another begins with them, as ``context.settings``, and so does a
        worker that ``scale`` adds later if they are for all. A running worker takes them between
        two collects, by ``Worker.configure``; every batch says with which version it was
        collected. In sync mode a round that is being collected is waited for, and none begins
        meanwhile.

        It is waited for the workers that are ready. One that dies meanwhile counts as done, and
        one that is starting takes them before its first experience. After a timeout or an error,
        or when cancelled, the settings stay those of the slots whose workers did not refuse them,
        and workers that have not answered take them still; cancelled while a round is waited for,
        or before, nothing has changed.

        Args:
            settings: Values by name; picklable, tensors are copied. Names that are left out keep
                their values.
            worker_ids: Whose; ``None`` is all, those of later slots too.
            timeout: Seconds; ``None`` takes ``command_timeout``.

        Returns:
            The version: 1 for the first change, counted over all slots.

        Raises:
            TypeError: They are no mapping with names that are text.
            SerializationError: A value cannot be pickled; nothing was changed.
            ValueError: There is no such worker; nothing was changed.
            CommandError: A worker's ``configure`` raised: it and its slot keep the former settings.
                This error and the next have ``errors`` by worker id.
            CommandTimeout: A worker has not taken them in time; or a round was not complete in
                time, and nothing was changed.
            ManagerStateError: The manager is not running.
            PoolExhausted: The restart policy was exceeded.
        """
        pool = self._usable()
        limit = self.config.command_timeout if timeout is None else timeout
        deadline = asyncio.get_running_loop().time() + limit
        values = await packed_aside(settings)
        await self._hold_rounds_until(pool, limit, deadline)
        try:
            pool = self._usable()
            chosen = None if worker_ids is None else pool.known(worker_ids)
            if chosen == frozenset():
                return pool.settings.book.version
            version, answers = pool.settings.change(values, chosen)
            late: set[asyncio.Future[None]] = set()
            if answers:
                left = deadline - asyncio.get_running_loop().time()
                _, late = await asyncio.wait(answers.values(), timeout=max(0.0, left))
        finally:
            pool.flow.release_rounds()
        self._usable()
        _raise_first(version, limit, answers, late, pool)
        return version

    async def _hold_rounds_until(self, pool: Pool, limit: float, deadline: float) -> None:
        try:
            async with asyncio.timeout_at(deadline):
                await self._hold_rounds(pool)
        except TimeoutError:
            raise CommandTimeout(
                f"the round that is being collected was not complete within {limit:g} s; no "
                "settings were changed"
            ) from None

    @property
    def settings_version(self) -> int:
        """The newest version of settings; 0 before the first ``configure``."""
        return self._settings.version

    def settings_of(self, worker_id: int) -> dict[str, Any]:
        """Return a copy of what a slot is set to; changing it changes nothing.

        Raises:
            ValueError: There was never such a worker.
        """
        try:
            values = self._settings.packed_of(worker_id)
        except KeyError:
            raise ValueError(f"no such worker: {worker_id}") from None
        return unpacked(values)


def _raise_first(
    version: int,
    limit: float,
    answers: Mapping[int, asyncio.Future[None]],
    late: set[asyncio.Future[None]],
    pool: Pool,
) -> None:
    """Raise the error of the first worker that has one; it tells of the others."""
    errors: dict[int, WorkerError] = {}
    for worker_id, answer in answers.items():
        if answer in late:
            line = pool.supervisor.lines.get(worker_id)
            where = f"it is in {line.phase.name.lower()}" if line is not None else "it is gone"
            errors[worker_id] = CommandTimeout(
                f"worker {worker_id} has not taken settings version {version} within {limit:g} s; "
                f"{where}",
                worker_id,
                line.incarnation if line is not None else -1,
            )
            continue
        error = answer.exception()
        if isinstance(error, CommandError):  # where it was lost, its successor begins with them
            errors[worker_id] = error
    if not errors:
        return
    first, *others = errors.values()
    first.errors = errors
    for other in others:
        first.add_note(f"also: {other.message}")
    raise first


__all__ = ["Configuring"]
