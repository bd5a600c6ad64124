"""A legacy server that is to shut down while the sink takes nothing: it must not wait for us."""

import threading

from figbridge import provision
from figbridge.demo.postgres import EmbeddedPostgres
from figbridge.forward.guard import SlotGuard
from figbridge.forward.guarded import GuardedSource
from figbridge.forward.source import ReplicationSource
from figbridge.forward.watch import SlotWatch
from figbridge.preflight import stream
from fixtures.checked import config_of
from fixtures.clock import until
from fixtures.forward import Forward
from fixtures.postgres import Database


class Watched(Forward):
    """The forward path with the loop that watches slot and server, which it looks at each minute, as in production."""

    def __init__(self, database: Database) -> None:
        provision.initialise(config_of(database.dsn, "public.thing", slot=database.slot))
        self.guard = SlotGuard(database.dsn, database.slot, table=False)
        super().__init__(database, "figbridge")
        assert isinstance(self.source, GuardedSource)
        published = {"figbridge": ([("public", "thing")], stream.PUBLISHED)}
        self._loops.append(SlotWatch(self.guard, self.source, published, self.metrics))

    def make_source(self, dsn: str, publications: tuple[str, ...]) -> ReplicationSource:
        return GuardedSource(dsn, self.database.slot, publications, self.guard)


def test_a_server_shuts_down_while_the_sink_is_away_and_nothing_is_lost() -> None:
    with EmbeddedPostgres() as server:
        database = Database(server, "postgres")
        database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
        with Watched(database) as forward:
            database.execute("INSERT INTO thing VALUES (1)")
            forward.until_events(1)
            forward.sink.open.clear()
            database.execute("INSERT INTO thing VALUES (2), (3)")
            until(lambda: forward.sink.refused > 0)
            stopping = threading.Thread(target=server.stop)
            stopping.start()
            stopping.join(30)
            assert not stopping.is_alive(), "the server waits for what the sink does not take"
            server.start()
            database.execute("INSERT INTO thing VALUES (4)")
            forward.sink.open.set()
            assert [it["key"]["id"] for it in forward.until_events(4)] == [1, 2, 3, 4]
        assert forward.failure is None


def test_what_a_sink_still_takes_is_confirmed_before_the_server_is_down() -> None:
    with EmbeddedPostgres() as server:
        database = Database(server, "postgres")
        database.execute("CREATE TABLE thing (id int PRIMARY KEY)")
        with Watched(database) as forward:
            forward.until_streaming()
            database.execute("INSERT INTO thing VALUES (1)")
            server.stop()
            assert [it["key"]["id"] for it in forward.until_events(1)] == [1]
            server.start()
            database.execute("INSERT INTO thing VALUES (2)")
            assert [it["key"]["id"] for it in forward.until_events(2)] == [1, 2]
        assert forward.failure is None
