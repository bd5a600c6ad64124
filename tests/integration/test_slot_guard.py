"""The slot's guard on real servers: what stops a bridge, what does not, and what the operator is told."""

import contextlib
import threading
from collections.abc import Sequence
from functools import partial
from importlib import resources
from typing import Any

import psycopg
import pytest
import structlog

from figbridge import canary, provision
from figbridge.change import Lsn
from figbridge.config import Config
from figbridge.demo.postgres import EmbeddedPostgres, installations
from figbridge.errors import LegacyUnavailable, SlotLost, SourceError
from figbridge.forward.guard import SlotGuard, place_of
from figbridge.forward.guarded import GuardedSource, Recreate
from figbridge.forward.source import ReplicationSource
from figbridge.forward.watch import SlotWatch
from figbridge.preflight import stream
from figbridge.preflight.catalogue import Name
from figbridge.provision import backfill
from fixtures.checked import config_of, inspected, role
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database, Server

NOISE = "SELECT pg_logical_emit_message(false, 'noise', repeat('x', 100000)) FROM generate_series(1, %s)"
CONFIRMED = "SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = %s"


class Guarded(Forward):
    """The forward path as the service wires it, with its guard and its watch."""

    def __init__(
        self,
        database: Database,
        *,
        table: bool = True,
        dsn: str | None = None,
        every: float = 0.3,
        buffer_bytes: int = 1 << 26,
        recreate: Recreate | None = None,
        reverse: bool = False,
    ) -> None:
        self._recreate = recreate
        self.guard = SlotGuard(dsn or database.dsn, database.slot, table=table)
        super().__init__(database, *(("pub", "inb") if reverse else ()), dsn=dsn, buffer_bytes=buffer_bytes)
        assert isinstance(self.source, GuardedSource)
        published: dict[str, tuple[Sequence[Name], Sequence[str]]] = {
            "pub": ([("public", "thing")], stream.PUBLISHED),
            **({"inb": ([canary.INBOX], stream.MARKS)} if reverse else {}),
        }
        self._loops.append(SlotWatch(self.guard, self.source, published, self.metrics, every=every))

    def make_source(self, dsn: str, publications: tuple[str, ...]) -> ReplicationSource:
        return GuardedSource(dsn, self.database.slot, publications, self.guard, recreate=self._recreate)

    def until_remembered(self) -> None:
        """Until the watch has looked at the publications."""
        with self.database.connect() as connection:
            until(lambda: self.guard.held(connection), 20)

    def until_confirmed(self) -> None:
        end = self.wal_end()
        until(lambda: self.confirmed() >= end, 20, lambda: f"confirmed {end}; failed: {self.failure}")


def prepare(database: Database, *, table: bool = True) -> None:
    if table:
        database.execute((resources.files("figbridge") / "schema.sql").read_text())
    database.execute("CREATE TABLE thing (id int PRIMARY KEY); CREATE PUBLICATION pub FOR TABLE thing")
    database.create_slot()


@pytest.fixture
def prepared(database: Database) -> Database:
    prepare(database)
    return database


def note(database: Database) -> tuple[Lsn, Lsn]:
    """(acknowledged, bound) of the row."""
    query = "SELECT acknowledged::text, bound::text FROM figbridge.slot_guard WHERE slot = %s"
    ((acknowledged, bound),) = database.execute(query, [database.slot])
    return Lsn.parse(acknowledged), Lsn.parse(bound)


def remade(database: Database) -> None:
    database.execute("SELECT pg_drop_replication_slot(%s)", [database.slot])
    database.execute(NOISE, [1])
    database.create_slot()


def failed(forward: Forward, kind: type[Exception], text: str) -> str:
    """The hint of the failure with which the forward path ends by itself."""
    failure = forward.ended(30)
    assert isinstance(failure, kind), failure
    assert text in str(failure)
    return str(getattr(failure, "hint", ""))


# --- where nothing is wrong


def test_what_is_confirmed_never_passes_the_row_and_a_soft_stop_makes_it_exact(each_database: Database) -> None:
    prepare(each_database)
    with Guarded(each_database) as forward:
        forward.until_streaming()
        for number in range(2):
            each_database.execute("INSERT INTO thing VALUES (%s)", [number])
            each_database.execute(NOISE, [3])  # far beyond the headroom, so it must be raised
            forward.until_events(number + 1)
            forward.until_confirmed()
            assert forward.confirmed() <= note(each_database)[1]
    assert forward.failure is None
    acknowledged, bound = note(each_database)
    assert acknowledged == bound == forward.confirmed()
    with Guarded(each_database) as again:
        again.until_streaming()
    assert again.failure is None


def test_a_bound_that_cannot_be_written_holds_the_acknowledgement_and_not_the_events(prepared: Database) -> None:
    with Guarded(prepared) as forward:
        forward.until_streaming()
        with prepared.connect() as blocker, blocker.transaction():
            blocker.execute("LOCK figbridge.slot_guard IN ACCESS EXCLUSIVE MODE")
            limit = forward.guard.bound.limit
            prepared.execute(NOISE, [3])
            prepared.execute("INSERT INTO thing VALUES (1)")
            forward.until_events(1)
            until(lambda: forward.checkpoint.flushed > limit, 20)
            assert forward.confirmed() <= limit
        forward.until_confirmed()
    assert forward.failure is None


@pytest.mark.parametrize("table", [True, False])
def test_two_replicas_take_over_from_each_other(prepared: Database, table: bool) -> None:
    cut = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = %s"
    with Guarded(prepared, table=table) as one:
        one.until_streaming()
        with Guarded(prepared, table=table) as two:
            until(lambda: two.guard._incarnation.others or two.failure, 20)
            for number in range(6):
                prepared.execute("INSERT INTO thing VALUES (%s)", [number])
                prepared.execute(NOISE, [2])
                until(partial(_either, one, two, number), 20)
                until(lambda: prepared.execute(cut, [prepared.slot]), 20)
                end = one.wal_end()
                until(partial(_confirmed, one, end), 30, lambda: f"{one.failure} {two.failure}")
    assert (one.failure, two.failure) == (None, None)


def _either(one: Forward, two: Forward, number: int) -> bool:
    return _has(one, number) or _has(two, number)


def _confirmed(forward: Forward, end: int) -> bool:
    return forward.confirmed() >= end


def _reconnected(forward: Forward, before: float) -> bool:
    return forward.metric("forward_connections_total") > before


def _has(forward: Forward, number: int) -> bool:
    return any(detail["key"] == {"id": number} for detail in forward.sink.details)


def test_a_server_that_crashes_and_forgets_the_confirmation_is_no_alarm() -> None:
    with EmbeddedPostgres() as server:
        database = Database(server, "postgres")
        prepare(database)
        with Guarded(database) as forward:
            forward.until_streaming()
            for number in range(3):
                database.execute("INSERT INTO thing VALUES (%s)", [number])
                forward.until_events(number + 1)
                forward.until_confirmed()
                connections = forward.metric("forward_connections_total")
                server.stop("immediate")
                server.start()
                until(partial(_reconnected, forward, connections), 30)
                forward.until_streaming()
        assert forward.failure is None
        with Guarded(database) as again:
            again.until_streaming()
        assert again.failure is None


def test_without_our_table_a_new_process_takes_the_slot_as_it_is(database: Database) -> None:
    prepare(database, table=False)
    with Guarded(database, table=False) as forward:
        forward.until_streaming()
    remade(database)
    with Guarded(database, table=False) as again:
        again.until_streaming()
        database.execute("INSERT INTO thing VALUES (1)")
        again.until_events(1)
        again.until_confirmed()
    assert again.failure is None


# --- between two runs


def test_a_slot_that_was_made_anew_between_two_runs(each_database: Database) -> None:
    prepare(each_database)
    with Guarded(each_database) as forward:
        forward.until_streaming()
    remade(each_database)
    for _ in range(2):  # a supervisor that starts it again changes nothing
        with Guarded(each_database) as again:
            hint = failed(again, SlotLost, "somebody else moved it, or made it anew")
        assert again.sink.events == []
    each_database.execute(hint[hint.index("DELETE FROM") :])  # the remedy is one
    with Guarded(each_database) as accepted:
        accepted.until_streaming()


def test_a_slot_that_somebody_else_read_after_a_kill(prepared: Database) -> None:
    with Guarded(prepared) as forward:
        forward.until_streaming()
        prepared.execute("INSERT INTO thing VALUES (1)")
        forward.until_events(1)
        forward.until_confirmed()
        forward.guard.settle = forward.guard.move = lambda *_: None  # type: ignore[method-assign]  # as a kill would
        forward.halt()
    prepared.execute(NOISE, [20])
    # behind the noise, which no commit has flushed: a slot is advanced no further than what is flushed
    prepared.execute("INSERT INTO thing VALUES (2)")
    prepared.execute("SELECT pg_replication_slot_advance(%s, pg_current_wal_lsn())", [prepared.slot])
    with Guarded(prepared) as again:
        hint = failed(again, SlotLost, "confirmed up to")
    assert "pg_replication_slot_advance" in hint
    assert again.sink.events == []


def test_a_row_of_another_cluster(prepared: Database) -> None:
    with Guarded(prepared) as forward:
        forward.until_streaming()
    prepared.execute("UPDATE figbridge.slot_guard SET system_identifier = '1'")
    with Guarded(prepared) as again:
        assert "mend legacy.dsn" in failed(again, SlotLost, "leads to another cluster: system identifier")


# --- during a run


@pytest.mark.parametrize("table", [True, False])
def test_a_slot_that_was_made_anew_while_the_connection_was_away(prepared: Database, table: bool) -> None:
    with Guarded(prepared, table=table) as forward:
        forward.until_streaming()
        prepared.execute("INSERT INTO thing VALUES (1)")
        forward.until_events(1)
        with prepared.connect() as admin:
            until(partial(_dropped, prepared))  # the bridge comes back within a fifth of a second
            admin.execute("INSERT INTO thing VALUES (2)")
            admin.execute("SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [prepared.slot])
        failure = forward.ended(30)
        assert isinstance(failure, SlotLost)
        assert "made it anew" in str(failure) or "does not exist" in str(failure)
    assert [it["key"]["id"] for it in forward.sink.details] == [1]


def test_a_slot_that_is_dropped_during_a_run(prepared: Database) -> None:
    with Guarded(prepared) as forward:
        forward.until_streaming()
        until(partial(_dropped, prepared))
        assert "`figbridge init`" in failed(forward, SlotLost, "does not exist")


@pytest.mark.parametrize("table", [True, False])
def test_a_slot_that_is_made_anew_by_ourselves_during_a_run(prepared: Database, table: bool) -> None:
    """The watch looks all the time; with and without the row, what this process knows by heart is no alarm."""
    config = configured(
        prepared, **{"on-slot-loss": "recreate-and-backfill", "slot-guard": "table" if table else "none"}
    )
    recreate = partial(provision.recreate, config)
    with Guarded(prepared, table=table, every=0.05, recreate=recreate) as forward:
        for number in range(3):
            forward.until_streaming()
            prepared.execute("INSERT INTO thing VALUES (%s)", [number])
            forward.until_events(number + 1)
            connections = forward.metric("forward_connections_total")
            until(partial(_dropped, prepared), 20)
            until(partial(_reconnected, forward, connections), 30, lambda: str(forward.failure))
        forward.until_streaming()
    assert forward.failure is None
    runs = prepared.execute("SELECT table_name, state, gap IS NOT NULL FROM figbridge.snapshot")
    assert runs == [("thing", "waiting", True)]


def _dropped(database: Database) -> bool:
    with database.connect() as connection, contextlib.suppress(psycopg.errors.ObjectInUse):
        connection.execute(
            "SELECT pg_terminate_backend(active_pid, 5000) FROM pg_replication_slots WHERE slot_name = %s",
            [database.slot],
        )
        connection.execute("SELECT pg_drop_replication_slot(%s)", [database.slot])
        return True
    return False


def test_the_lag_grows_while_the_sink_takes_nothing_and_nothing_is_read(prepared: Database) -> None:
    # the lag is looked at with each status, of which there are four in the time
    often = f"{prepared.dsn} options='-c wal_sender_timeout=8s'"
    with Guarded(prepared, dsn=often, buffer_bytes=1024) as forward:
        forward.until_streaming()
        forward.sink.open.clear()
        prepared.execute("INSERT INTO thing SELECT generate_series(1, 100)")
        until(lambda: forward.buffer.full, 20)
        prepared.execute(NOISE, [200])
        until(lambda: forward.metric("forward_lag_bytes") > 200 * 100_000, 20, str(forward.metric("forward_lag_bytes")))
        forward.sink.open.set()
        until(lambda: forward.metric("forward_lag_bytes") < 100_000, 20)
    assert forward.failure is None


@pytest.mark.parametrize("version", [15, 16, 18])
def test_a_slot_in_danger_is_measured_and_a_lost_one_stops_the_bridge(version: int) -> None:
    if version not in installations():
        pytest.skip(f"no PostgreSQL {version} here")
    with EmbeddedPostgres(version, {"max_slot_wal_keep_size": "32MB", "wal_keep_size": "0"}) as server:
        database = Database(server, "postgres")
        prepare(database)
        with Guarded(database) as forward:
            forward.until_streaming()
            forward.sink.open.clear()
            database.execute("INSERT INTO thing VALUES (1)")

            def status(name: str) -> bool:
                database.execute("SELECT pg_logical_emit_message(false, 'x', 'x'), pg_switch_wal()")
                return forward.metric("forward_slot_wal_status", status=name) == 1

            until(lambda: status("reserved"), 20)
            room = forward.metric("forward_slot_safe_bytes")
            assert 0 < room < float("inf")
            with structlog.testing.capture_logs() as logs:
                until(lambda: status("unreserved"), 20)
                until(lambda: any(it["event"] == "the slot is in danger" for it in logs), 20)
            assert forward.metric("forward_slot_retained_bytes") > room
            assert forward.metric("forward_slot_safe_bytes") <= 0
            assert forward.metric("forward_slot_seconds_to_loss") == 0
            forward.sink.open.set()
            database.execute("CHECKPOINT")
            assert "copy the tables anew" in failed(forward, SlotLost, "is lost")


def test_a_slot_that_idled_for_too_long() -> None:
    if 18 not in installations():
        pytest.skip("no PostgreSQL 18 here")
    with EmbeddedPostgres(18, {"idle_replication_slot_timeout": "1s"}) as server:
        database = Database(server, "postgres")
        prepare(database)
        with Guarded(database) as forward:
            forward.until_streaming()

        def invalid() -> bool:
            database.execute("SELECT pg_switch_wal()")
            database.execute("CHECKPOINT")
            return bool(database.execute("SELECT invalidation_reason FROM pg_replication_slots")[0][0])

        until(invalid, 30)
        with Guarded(database) as again:
            failed(again, SlotLost, "is lost (idle_timeout)")


@pytest.mark.parametrize(
    ("statement", "said", "remedy"),
    [
        ("DROP PUBLICATION pub", "publication pub is gone", "figbridge init"),
        ("ALTER PUBLICATION pub DROP TABLE thing", "does not publish public.thing any more", "copy that table anew"),
        (
            "DROP TABLE thing; CREATE TABLE thing (id int PRIMARY KEY)",
            "does not publish public.thing any more",
            "made anew",
        ),
        (
            "ALTER PUBLICATION pub SET (publish = 'insert, truncate')",
            "publishes insert, truncate, not insert, update, delete, truncate",
            "ALTER PUBLICATION \"pub\" SET (publish = 'insert, update, delete, truncate')",
        ),
    ],
)
def test_a_publication_that_loses_a_table_during_a_run(
    each_database: Database, statement: str, said: str, remedy: str
) -> None:
    prepared = each_database
    prepare(prepared)
    prepared.execute("CREATE TABLE other (id int PRIMARY KEY); ALTER PUBLICATION pub ADD TABLE other")
    with Guarded(prepared) as forward:
        forward.until_streaming()
        prepared.execute(statement)
        assert remedy in failed(forward, SourceError, said)


def test_a_publication_that_is_made_anew_during_a_run(each_database: Database) -> None:
    """Without a change in between the server says nothing of it, but who knows that there was none?"""
    prepare(each_database)
    with Guarded(each_database) as forward:
        forward.until_streaming()

        def stopped() -> bool:  # more than once: the watch may not have seen the first one
            each_database.execute("DROP PUBLICATION pub; CREATE PUBLICATION pub FOR TABLE thing")
            return forward.failure is not None

        until(stopped, 20)
        assert "copy the tables anew" in failed(forward, SourceError, "publication pub was dropped and made anew")


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize(
    "statements",
    [
        ["ALTER PUBLICATION pub DROP TABLE thing", "ALTER PUBLICATION pub ADD TABLE thing"],
        ["DROP TABLE thing", "CREATE TABLE thing (id int PRIMARY KEY)", "ALTER PUBLICATION pub ADD TABLE thing"],
    ],
)
def test_a_table_that_was_out_of_the_publication_between_two_looks(
    each_database: Database, statements: list[str], table: bool
) -> None:
    prepare(each_database, table=table)
    with Guarded(each_database, table=table) as forward:
        forward.until_streaming()
        forward.until_remembered()
        with (
            each_database.connect() as connection,
            connection.transaction(),
        ):  # at once, for a look must not see it half done
            for statement in statements:
                connection.execute(statement)
        hint = failed(forward, SourceError, "did not publish all changes of public.thing for a while")
        assert "copy that table anew (`figbridge snapshot`)" in hint
        assert ("UPDATE figbridge.slot_guard" in hint) == table


@pytest.mark.parametrize("narrowed", ["thing WHERE (id < 0)", "thing (id)"])
def test_a_publication_that_is_narrowed_during_a_run(database: Database, narrowed: str) -> None:
    """For a moment, which the server keeps no other trace of, and to stay."""
    prepare(database)
    with Guarded(database) as forward:
        forward.until_streaming()
        forward.until_remembered()
        with database.connect() as connection, connection.transaction():
            connection.execute(f"ALTER PUBLICATION pub SET TABLE {narrowed}")
            connection.execute("ALTER PUBLICATION pub SET TABLE thing")
        hint = failed(forward, SourceError, "did not publish all changes of public.thing for a while")
    database.execute(accepted(hint))
    with Guarded(database) as again:
        again.until_streaming()
        again.until_remembered()
        database.execute(f"ALTER PUBLICATION pub SET TABLE {narrowed}")
        failed(again, SourceError, "has another row filter or column list for public.thing than before")


def accepted(hint: str) -> str:
    """The statement in it by which a human accepts the publications as they are."""
    return hint[hint.index("UPDATE figbridge.slot_guard") : hint.index(";") + 1]


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("ALTER PUBLICATION pub ADD TABLES IN SCHEMA secret", "is FOR TABLES IN SCHEMA"),
        ("ALTER PUBLICATION pub SET (publish_via_partition_root = false)", "would name the partitions of public.thing"),
    ],
)
def test_a_publication_that_becomes_one_that_check_refuses(database: Database, statement: str, said: str) -> None:
    database.execute((resources.files("figbridge") / "schema.sql").read_text())
    database.execute("""
        CREATE SCHEMA secret;
        CREATE TABLE thing (id int PRIMARY KEY) PARTITION BY RANGE (id);
        CREATE PUBLICATION pub FOR TABLE thing WITH (publish_via_partition_root = true)
    """)
    database.create_slot()
    with Guarded(database) as forward:
        forward.until_streaming()
        database.execute(statement)
        failed(forward, SourceError, said)


def test_changes_of_a_publication_that_may_be_harmless_are_told_once(each_database: Database) -> None:
    """SET (publish = …) is what PostgreSQL 14 needs for ATTACH PARTITION; of a table too many `check` only warns."""
    prepare(each_database)
    each_database.execute("CREATE TABLE other (id int PRIMARY KEY)")

    def told() -> list[str]:
        return [it["what"] for it in logs if it["event"] == "the publication was changed"]

    with structlog.testing.capture_logs() as logs, Guarded(each_database, every=0.1) as forward:
        forward.until_streaming()
        forward.until_remembered()
        each_database.execute("VACUUM FULL pg_publication_rel")
        each_database.execute("ALTER TABLE thing ADD note text")
        each_database.execute("ALTER PUBLICATION pub SET TABLE thing")
        each_database.execute("ALTER PUBLICATION pub SET (publish = 'insert, update, delete, truncate')")
        until(lambda: told() or forward.failure, 20)
        each_database.execute("ALTER PUBLICATION pub ADD TABLE other")
        until(lambda: len(told()) > 1 or forward.failure, 20)
        each_database.execute("ALTER TABLE thing RENAME TO that")
        each_database.execute("ALTER TABLE that RENAME TO thing")
        each_database.execute("INSERT INTO thing VALUES (1)")
        forward.until_events(1)
    assert forward.failure is None
    assert ["was altered" in told()[0], "also publishes public.other" in told()[1]] == [True, True]
    assert len([it for it in told() if "public.that" not in it]) == 2


def test_a_published_table_that_takes_the_place_of_another_stops_nothing(database: Database) -> None:
    prepare(database)
    database.execute("CREATE TABLE new (id int PRIMARY KEY); ALTER PUBLICATION pub ADD TABLE new")
    with Guarded(database) as forward:
        forward.until_streaming()
        forward.until_remembered()
        database.execute("BEGIN; ALTER TABLE thing RENAME TO old; ALTER TABLE new RENAME TO thing; COMMIT")
        taken = "SELECT published LIKE '%%\"old\"%%' FROM figbridge.slot_guard"
        until(lambda: database.execute(taken) == [(True,)] or forward.failure, 20)
    assert forward.failure is None


def test_the_mark_of_our_own_writes_was_not_published_for_a_while(database: Database) -> None:
    prepare(database)
    database.execute("CREATE PUBLICATION inb FOR TABLE figbridge.inbox WITH (publish = 'insert')")
    with Guarded(database, reverse=True) as forward:
        forward.until_streaming()
        forward.until_remembered()
        database.execute(
            "BEGIN; ALTER PUBLICATION inb DROP TABLE figbridge.inbox; ALTER PUBLICATION inb ADD TABLE figbridge.inbox;"
            "COMMIT"
        )
        hint = failed(forward, SourceError, "publication inb did not publish all changes of figbridge.inbox")
        assert "What the reverse path wrote since then may have left as events" in hint


def test_a_view_in_the_place_of_a_table(database: Database) -> None:
    prepare(database)
    with Guarded(database) as forward:
        forward.until_streaming()
        forward.until_remembered()
        database.execute("BEGIN; ALTER TABLE thing RENAME TO base; CREATE VIEW thing AS TABLE base; COMMIT")
        hint = failed(forward, SourceError, "public.thing is not a table any more")
        assert "leaves as public.base" in hint


def test_a_gap_while_no_bridge_runs(each_database: Database) -> None:
    """`init` puts the table back, as an init container would; `check` and a new process tell until it is accepted."""
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY)")
    config = publishing_as_pub(configured(each_database))
    provision.initialise(config)
    with role(each_database) as (name, dsn):
        each_database.execute(
            f"GRANT USAGE ON SCHEMA figbridge TO {name}; "
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON figbridge.slot_guard TO {name}"
        )
        with Guarded(each_database, dsn=dsn) as forward:
            forward.until_streaming()
            forward.until_remembered()
        each_database.execute("ALTER PUBLICATION pub ADD TABLE other")
        assert inspected(config, "run").errors == []
        each_database.execute("ALTER PUBLICATION pub DROP TABLE thing")
        provision.initialise(config)
        finding = inspected(config, "run").only("error", "publication pub")
        assert finding.what.startswith("did not publish all changes of public.thing")
        with Guarded(each_database, dsn=dsn) as again:
            hint = failed(again, SourceError, "did not publish all changes of public.thing")
        assert accepted(hint) == accepted(finding.remedy)
        each_database.execute(accepted(hint))
        assert inspected(config, "run").errors == []
        with Guarded(each_database, dsn=dsn) as third:
            third.until_streaming()
            third.until_remembered()
        assert (forward.failure, third.failure) == (None, None)


def test_a_table_of_an_older_figbridge_gets_its_column_from_init(database: Database) -> None:
    database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config = configured(database)
    provision.initialise(config)
    insert = "INSERT INTO figbridge.slot_guard VALUES (%s, '1', 1, 'x', '0/1', '0/1')"
    database.execute(insert, [database.slot])
    database.execute("ALTER TABLE figbridge.slot_guard DROP COLUMN published")
    finding = inspected(config, "run").only("error", "schema figbridge")
    assert ("published" in finding.what, finding.remedy) == (True, "run `figbridge init`")
    assert "schema figbridge: brought up to date" in provision.initialise(config)
    assert database.execute("SELECT bound::text, published FROM figbridge.slot_guard") == [("0/1", None)]
    assert inspected(config, "run").errors == []


def publishing_as_pub(config: Config) -> Config:
    return config.model_copy(update={"database": config.legacy.model_copy(update={"publication": "pub"})})


def test_a_table_that_is_gone_for_good_stops_nothing(prepared: Database) -> None:
    prepared.execute("CREATE TABLE other (id int PRIMARY KEY); ALTER PUBLICATION pub ADD TABLE other")
    with structlog.testing.capture_logs() as logs, Guarded(prepared) as forward:
        forward.until_streaming()
        prepared.execute("DROP TABLE thing")
        until(lambda: any(it["event"] == "a table of the file does not exist any more" for it in logs), 20)
        prepared.execute("INSERT INTO other VALUES (1)")
        forward.until_events(1)
    assert forward.failure is None


# --- another server


def test_a_name_that_leads_to_another_cluster(servers: Any) -> None:
    here, there = (servers.get(version) for version in list(servers.versions)[-2:])
    database, other = Database(here, "postgres"), Database(there, "postgres")
    try:
        for each in (database, other):
            each.execute("CREATE TABLE thing (id int PRIMARY KEY); CREATE PUBLICATION pub FOR TABLE thing")
            each.create_slot()
        with Guarded(database, table=False) as forward:
            forward.until_streaming()
            forward.guard._dsn = other.dsn  # what a new connection would now get
            assert "mend legacy.dsn" in failed(forward, SlotLost, "leads to another cluster now")
    finally:
        for each in (database, other):
            each.execute("DROP TABLE thing; DROP PUBLICATION pub")
            each.execute("SELECT pg_drop_replication_slot(%s)", [each.slot])


def test_a_cluster_restored_from_a_copy_of_its_disks(prepared: Database) -> None:
    """The row came back with it; only a process that had read further knows."""
    with Guarded(prepared) as forward:
        forward.until_streaming()
        source, end = forward.source, forward.wal_end()
        forward.stop()
        with pytest.raises(SlotLost, match="WAL ends at") as caught:
            source.connect(Lsn(end + (1 << 30)))
        assert "restored from a copy of its disks" in caught.value.hint


def test_two_connections_that_lead_to_two_servers_are_tried_again(servers: Any, prepared: Database) -> None:
    versions = list(servers.versions)
    other: Server = servers.get(versions[-2])
    guard = SlotGuard(prepared.dsn, prepared.slot, table=True)
    source = GuardedSource(prepared.dsn, prepared.slot, ("pub",), guard)
    try:
        source.connect(Lsn(0))
        with psycopg.connect(other.dsn(), autocommit=True) as connection:
            place = place_of(connection)
            with pytest.raises(LegacyUnavailable, match="two servers"):
                guard.move(connection, place)
    finally:
        source.close()


# --- init and teardown


def configured(database: Database, **forward: Any) -> Config:
    section = {"sink": {"type": "stdout"}, "slot-guard": "table", **forward}
    return config_of(database.dsn, "public.thing", slot=database.slot, forward=section)


def test_a_slot_that_init_makes_anew_is_taken_as_it_is(each_database: Database) -> None:
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config = configured(each_database)
    provision.initialise(config)
    each_database.execute("CREATE PUBLICATION pub FOR TABLE thing")
    remade(each_database)
    with Guarded(each_database) as forward:
        forward.until_streaming()
    before = each_database.execute("SELECT * FROM figbridge.slot_guard")
    provision.initialise(config)  # as an init container does at every start
    assert each_database.execute("SELECT * FROM figbridge.slot_guard") == before
    each_database.execute("SELECT pg_drop_replication_slot(%s)", [each_database.slot])
    each_database.execute(NOISE, [1])
    provision.initialise(config)
    with Guarded(each_database) as again:
        again.until_streaming()
    assert again.failure is None


def test_the_script_forgets_only_a_slot_that_is_not_there(each_database: Database) -> None:
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    script = provision.script(configured(each_database))
    each_database.execute(script)
    insert = "INSERT INTO figbridge.slot_guard VALUES (%s, '1', 1, 'x', '0/1', '0/1')"
    each_database.execute(insert, [each_database.slot])
    each_database.execute(script)
    assert each_database.execute("SELECT count(*) FROM figbridge.slot_guard") == [(1,)]
    each_database.execute("SELECT pg_drop_replication_slot(%s)", [each_database.slot])
    each_database.execute(script)
    assert each_database.execute("SELECT count(*) FROM figbridge.slot_guard") == [(0,)]
    assert len(each_database.execute(CONFIRMED, [each_database.slot])) == 1


@pytest.mark.parametrize(
    ("section", "then"),
    [
        ({}, "copy the tables anew (`figbridge snapshot`)"),
        ({"snapshot": "when-needed"}, "every table will be read again"),
        ({"on-slot-loss": "recreate-and-backfill"}, "every table will be read again"),
    ],
)
def test_init_says_that_a_slot_was_there_before(each_database: Database, section: dict[str, str], then: str) -> None:
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
    config = configured(each_database, **section)

    def warned() -> list[str]:
        return [line for line in provision.initialise(config) if line.startswith("warning: there was a slot before")]

    assert warned() == []
    leave_a_note = "INSERT INTO figbridge.slot_guard VALUES (%s, '1', 1, 'x', '0/1', '0/1')"
    each_database.execute(leave_a_note, [each_database.slot])
    assert warned() == []
    each_database.execute("SELECT pg_drop_replication_slot(%s)", [each_database.slot])
    assert warned() == [f"warning: there was a slot before, and changes since then are in no event: {then}"]


ORDERS = "SELECT table_name, state, cursor IS NULL, gap IS NOT NULL FROM figbridge.snapshot ORDER BY 1"
ORDERED = [("other", "waiting", True, True), ("thing", "waiting", True, True)]


@pytest.mark.parametrize("by", ["init", "script"])
def test_a_slot_that_is_made_anew_without_the_bridge_orders_the_backfill(each_database: Database, by: str) -> None:
    """The script is what a DBA runs where `figbridge init` may not; the gap behind the new slot is the same."""
    each_database.execute("CREATE TABLE thing (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY)")
    config = recreating(each_database)

    def set_up() -> None:
        if by == "init":
            provision.initialise(config)
        else:
            each_database.execute(provision.script(config))

    set_up()
    assert each_database.execute(ORDERS) == [], "there was no slot before, so nothing is missing"
    leave_a_note = "INSERT INTO figbridge.slot_guard VALUES (%s, '1', 1, 'x', '0/1', '0/1')"
    each_database.execute(leave_a_note, [each_database.slot])
    set_up()
    assert each_database.execute(ORDERS) == [], "the slot is there"
    each_database.execute("SELECT pg_drop_replication_slot(%s)", [each_database.slot])
    set_up()
    assert each_database.execute(ORDERS) == ORDERED
    assert each_database.execute("SELECT count(*) FROM figbridge.slot_guard") == [(0,)]
    assert each_database.execute("SELECT count(DISTINCT run) FROM figbridge.snapshot") == [(2,)]
    set_up()
    assert each_database.execute(ORDERS) == ORDERED


@pytest.mark.parametrize("by", ["init", "script"])
@pytest.mark.parametrize("table", [True, False])
def test_a_backfill_outlives_whoever_ordered_it_and_was_ended_before_there_was_a_slot(
    database: Database, by: str, table: bool
) -> None:
    """The slot waits for open transactions, for as long as somebody may lose patience."""
    database.execute("CREATE TABLE thing (id int PRIMARY KEY); CREATE TABLE other (id int PRIMARY KEY)")
    config = recreating(database, **({} if table else {"slot-guard": "none"}))
    provision.initialise(config)
    database.execute("SELECT pg_drop_replication_slot(%s)", [database.slot])
    with database.connect() as connection:  # all that a bridge, an `init` or a script leaves behind that far
        backfill.order(connection, database.slot, config.snapshot_tables, "its slot was dropped")
    database.execute("""UPDATE figbridge.snapshot SET state = 'running', cursor = '[3]' WHERE table_name = 'thing'""")
    if by == "init":
        lines = provision.initialise(config)
        assert any("every table will be read again" in line for line in lines), lines
    else:
        database.execute(provision.script(config))
    assert database.execute(ORDERS) == ORDERED


def recreating(database: Database, **forward: Any) -> Config:
    section = {"sink": {"type": "stdout"}, "on-slot-loss": "recreate-and-backfill", **forward}
    return config_of(database.dsn, "public.thing", "public.other", slot=database.slot, forward=section)


def test_teardown_takes_the_row_along(prepared: Database) -> None:
    with Guarded(prepared) as forward:
        forward.until_streaming()
    provision.teardown(configured(prepared), keep_schema=True)
    assert prepared.execute("SELECT count(*) FROM figbridge.slot_guard") == [(0,)]


def test_the_loop_ends_at_once_when_it_is_told_to(prepared: Database) -> None:
    guard = SlotGuard(prepared.dsn, prepared.slot, table=True)
    source = GuardedSource(prepared.dsn, prepared.slot, ("pub",), guard)
    stop = threading.Event()
    forward = Guarded(prepared)
    watch = SlotWatch(guard, source, {}, forward.metrics)
    thread = threading.Thread(target=watch.run, args=(stop,))
    thread.start()
    until(lambda: forward.metric("forward_slot_wal_status", status="reserved") == 1)
    stop.set()
    thread.join(60)
    assert not thread.is_alive()
    source.close()
    forward.source.close()
