"""Leases of the embedded bus, by its tables alone."""

import time
from pathlib import Path

import pytest

from services.chassis.bus.dispatcher import Source
from services.chassis.bus.failures import Record
from services.chassis.bus.sqlite_log import SqliteLog

LEASE_S = 60.0


@pytest.fixture
def log(tmp_path: Path) -> SqliteLog:
    log = SqliteLog(tmp_path / "new" / "bus.db")
    log.create({"t": 4, "u": 1})
    return log


def test_a_lone_member_owns_everything(log: SqliteLog) -> None:
    owned, surplus = log.beat("g", "a", ["t", "u"], LEASE_S)
    assert owned == {Source("t", 0): 0, Source("t", 1): 0, Source("t", 2): 0, Source("t", 3): 0, Source("u", 0): 0}
    assert not surplus


def test_a_second_member_waits_for_what_it_is_due(log: SqliteLog) -> None:
    log.beat("g", "a", ["t"], LEASE_S)
    assert not log.beat("g", "b", ["t"], LEASE_S).owned
    surplus = log.beat("g", "a", ["t"], LEASE_S).surplus
    assert surplus == {Source("t", 2), Source("t", 3)}
    log.commit("g", "a", {Source("t", 2): 7}, release=surplus)
    assert log.beat("g", "b", ["t"], LEASE_S).owned == {Source("t", 2): 7, Source("t", 3): 0}
    assert log.beat("g", "a", ["t"], LEASE_S).surplus == set()


def test_groups_do_not_share(log: SqliteLog) -> None:
    assert len(log.beat("g", "a", ["t"], LEASE_S).owned) == 4
    assert len(log.beat("h", "b", ["t"], LEASE_S).owned) == 4


def test_a_dead_members_partitions_are_free(log: SqliteLog) -> None:
    log.beat("g", "a", ["t"], lease_s=0.0)
    log.commit("g", "a", {Source("t", 0): 5})
    time.sleep(0.001)  # a lease of no length ends at the next instant
    assert log.beat("g", "b", ["t"], LEASE_S).owned[Source("t", 0)] == 5


def test_only_the_owner_commits(log: SqliteLog) -> None:
    log.beat("g", "a", ["t"], LEASE_S)
    log.commit("g", "stranger", {Source("t", 0): 5}, release=[Source("t", 1)])
    assert log.beat("g", "a", ["t"], LEASE_S).owned[Source("t", 0)] == 0
    assert len(log.beat("g", "a", ["t"], LEASE_S).owned) == 4


def test_who_leaves_lets_go(log: SqliteLog) -> None:
    log.beat("g", "a", ["t"], LEASE_S)
    log.leave("g", "a")
    assert len(log.beat("g", "b", ["t"], LEASE_S).owned) == 4


def test_a_batch_is_written_whole_or_not_at_all(log: SqliteLog) -> None:
    good, bad = Record("u", "k", b"v", {}), Record("u", "k", None, {})  # type: ignore[arg-type]
    with pytest.raises(Exception, match="NOT NULL"):
        log.append([(good, 1), (bad, 1)])
    assert log.end(Source("u", 0)) == 0
    log.append([(good, 1), (good, 1)])
    assert log.end(Source("u", 0)) == 2


def test_limit_is_over_all_partitions(log: SqliteLog) -> None:
    log.append([(Record("t", f"k{number}", b"v", {}), 4) for number in range(40)])
    positions = {Source("t", partition): 0 for partition in range(4)}
    assert sum(len(rows) for rows in log.fetch(positions, 15).values()) == 15
    assert sum(len(rows) for rows in log.fetch(positions, 100).values()) == 40
