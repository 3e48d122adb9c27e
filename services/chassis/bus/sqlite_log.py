"""The embedded bus's tables: log, members, leases. Blocking; one instance per thread.

One machine, several processes: SQLite's WAL mode gives one writer at a time and readers that never wait for it.
`synchronous=FULL`: what is committed survives a power cut. Invariants:
- offsets of a partition are dense and rise by one; they are given inside the write lock.
- a partition of a group has at most one owner; an owner that has not beaten for `lease_s` is no member any more, and
  its partitions are free. A commit counts only while the owner still owns.
"""

import json
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from services.chassis.bus.dispatcher import Source
from services.chassis.bus.failures import Record
from services.chassis.errors import Transient

BUSY_TIMEOUT_S = 30.0  # another process holds the write lock for milliseconds; this long means that it hangs

_SCHEMA = """
CREATE TABLE IF NOT EXISTS topics (name TEXT PRIMARY KEY, partitions INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS log (
  topic TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL,
  key TEXT NOT NULL, value BLOB NOT NULL, headers TEXT NOT NULL,
  PRIMARY KEY (topic, partition, offset));
CREATE TABLE IF NOT EXISTS members (
  grp TEXT NOT NULL, topic TEXT NOT NULL, member TEXT NOT NULL, expires REAL NOT NULL,
  PRIMARY KEY (grp, topic, member));
CREATE TABLE IF NOT EXISTS leases (
  grp TEXT NOT NULL, topic TEXT NOT NULL, partition INTEGER NOT NULL, next INTEGER NOT NULL DEFAULT 0, owner TEXT,
  PRIMARY KEY (grp, topic, partition));
"""


class Row(NamedTuple):
    offset: int
    key: str
    value: bytes
    headers: dict[str, str]


class Shares(NamedTuple):
    """owned: partition → next offset, all that this member owns now; surplus: those it should give away to newer
    members."""

    owned: dict[Source, int]
    surplus: set[Source]


class SqliteLog:
    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)
        with _busy_is_transient():
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            with self._writing():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)

    def close(self) -> None:
        self._db.close()

    def create(self, topics: Mapping[str, int]) -> None:
        """topics: name → partitions. Existing ones stay as they are."""
        with self._writing():
            self._db.executemany("INSERT OR IGNORE INTO topics VALUES (?, ?)", topics.items())

    def partitions(self, topic: str) -> int | None:
        row = self._db.execute("SELECT partitions FROM topics WHERE name = ?", (topic,)).fetchone()
        return None if row is None else int(row[0])

    def append(self, records: Sequence[tuple[Record, int]]) -> None:
        """All or none; each with its topic's number of partitions."""
        ends: dict[Source, int] = {}
        rows = []
        with self._writing():
            for record, partitions in records:
                key = record.key.encode("utf-8", "surrogateescape")
                source = Source(record.topic, zlib.crc32(key) % partitions)
                offset = ends[source] if source in ends else self.end(source)
                ends[source] = offset + 1
                rows.append((*source, offset, _text(record.key), record.value, json.dumps(record.headers)))
            self._db.executemany("INSERT INTO log VALUES (?, ?, ?, ?, ?, ?)", rows)

    def end(self, source: Source) -> int:
        """The offset that the next event gets."""
        query = "SELECT COALESCE(MAX(offset) + 1, 0) FROM log WHERE topic = ? AND partition = ?"
        return int(self._db.execute(query, source).fetchone()[0])

    def fetch(self, positions: Mapping[Source, int], limit: int) -> dict[Source, list[Row]]:
        """The next rows of each source, `limit` in all at the most; sources that have none are left out."""
        query = (
            "SELECT offset, key, value, headers FROM log "
            "WHERE topic = ? AND partition = ? AND offset >= ? ORDER BY offset LIMIT ?"
        )
        batches = {}
        for source, start in positions.items():
            rows = self._db.execute(query, (*source, start, limit)).fetchall()
            if rows:
                batches[source] = [
                    Row(offset, _untext(key), value, json.loads(headers)) for offset, key, value, headers in rows
                ]
                limit -= len(rows)
            if not limit:
                break
        return batches

    def beat(self, group: str, member: str, topics: Iterable[str], lease_s: float) -> Shares:
        """Say that `member` lives, bury the dead, and take a fair share of the free partitions of each topic."""
        now = time.time()
        shares = Shares({}, set())
        with self._writing():
            self._db.execute("DELETE FROM members WHERE grp = ? AND expires < ?", (group, now))
            for topic in topics:
                beat = (group, topic, member, now + lease_s)
                self._db.execute("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?)", beat)
                self._share(group, member, topic, shares)
        return shares

    def _share(self, group: str, member: str, topic: str, shares: Shares) -> None:
        """Everyone's share of P partitions among n members: P // n, and one more for the first P % n of them by
        name."""
        count = self.partitions(topic) or 0
        new = [(group, topic, partition) for partition in range(count)]
        self._db.executemany("INSERT OR IGNORE INTO leases (grp, topic, partition) VALUES (?, ?, ?)", new)
        found = self._db.execute("SELECT member FROM members WHERE grp = ? AND topic = ?", (group, topic))
        members = sorted(name for (name,) in found)
        share = count // len(members) + (members.index(member) < count % len(members))
        leases = self._db.execute(
            "SELECT partition, next, owner FROM leases WHERE grp = ? AND topic = ? ORDER BY partition", (group, topic)
        ).fetchall()
        mine = {partition: offset for partition, offset, owner in leases if owner == member}
        free = {partition: offset for partition, offset, owner in leases if owner not in members}
        shares.surplus.update(Source(topic, partition) for partition in list(mine)[share:])
        for partition in list(free)[: max(0, share - len(mine))]:
            take = "UPDATE leases SET owner = ? WHERE grp = ? AND topic = ? AND partition = ?"
            self._db.execute(take, (member, group, topic, partition))
            mine[partition] = free[partition]
        shares.owned.update((Source(topic, partition), offset) for partition, offset in mine.items())

    def commit(self, group: str, member: str, positions: Mapping[Source, int], release: Iterable[Source] = ()) -> None:
        """Store the next offsets of the partitions that `member` still owns; give up those of `release`."""
        where = "WHERE grp = ? AND topic = ? AND partition = ? AND owner = ?"
        with self._writing():
            for source, position in positions.items():
                self._db.execute(f"UPDATE leases SET next = ? {where}", (position, group, *source, member))
            for source in release:
                self._db.execute(f"UPDATE leases SET owner = NULL {where}", (group, *source, member))

    def leave(self, group: str, member: str) -> None:
        with self._writing():
            self._db.execute("DELETE FROM members WHERE grp = ? AND member = ?", (group, member))
            self._db.execute("UPDATE leases SET owner = NULL WHERE grp = ? AND owner = ?", (group, member))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with _busy_is_transient(), self._db:
            self._db.execute("BEGIN IMMEDIATE")  # takes the write lock first: no upgrade from a read can fail half-way
            yield


@contextmanager
def _busy_is_transient() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise Transient(f"the embedded bus is locked by another process: {error}") from error
        raise


def _text(key: str) -> str | bytes:
    """SQLite's text must be UTF-8; a key with surrogate escapes is stored as the bytes it stands for."""
    try:
        key.encode()
    except UnicodeEncodeError:
        return key.encode("utf-8", "surrogateescape")
    return key


def _untext(key: str | bytes) -> str:
    return key if isinstance(key, str) else key.decode("utf-8", "surrogateescape")
