"""The shadow: everything is done and rolled back, and what it would have changed is kept, told and acknowledged."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from figbridge import cli
from figbridge.config import Config
from figbridge.deadletter import TableDeadLetterStore
from figbridge.metrics import Metrics
from figbridge.reverse.purge import purge
from figbridge.reverse.setup import open_consumer, purged
from figbridge.transports.local import LocalSink, LocalSource
from fixtures.bridge import Bridge
from fixtures.checked import inspected, role
from fixtures.clock import until
from fixtures.postgres import Database
from fixtures.reverse import COLUMNS, body, count, make_shop, orders

BLIND = ("error", "reverse.mode")
OURS = ("inbox", "entity_version", "parked", "conflict", "dead_letter")


@pytest.fixture
def shop(database: Database) -> Database:
    return filled(database)


def filled(database: Database) -> Database:
    make_shop(database)
    database.execute("""
        ALTER TABLE shop.orders ADD touched text;
        CREATE FUNCTION shop.touch() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN NEW.touched := NEW.status; RETURN NEW; END';
        CREATE TRIGGER touch BEFORE INSERT OR UPDATE ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.touch();
        CREATE FUNCTION shop.keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
        CREATE TRIGGER keep BEFORE UPDATE ON shop.orders
            FOR EACH ROW WHEN (NEW.status = 'keep') EXECUTE FUNCTION shop.keep();
        CREATE TABLE shop.late (id int PRIMARY KEY, n int UNIQUE DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO shop.orders (id, status, note, quantity) VALUES (1, 'new', 'n', 5), (2, 'new', 'n', 5);
        INSERT INTO shop.late VALUES (1, 1)
    """)
    return database


def mappings() -> list[dict[str, Any]]:
    def one(kind: str, action: str, **options: Any) -> dict[str, Any]:
        tree = {
            "match": {"source": "shop.next", "detail-type": kind},
            "into": "shop.orders",
            "action": action,
            "key": {"id": "detail.id"},
            "set": COLUMNS,
        }
        return tree | options

    before = {"status": "detail.before.status"}
    return [
        one("order", "upsert", version="detail.v"),
        one("changed", "update", entity="detail.entity"),
        one("made", "insert", key={}, set={"id": "detail.id", "status": "detail.status"}),
        one("gone", "delete", set={}),
        one("ruled", "update", conflicts={"policy": "legacy_wins", "before": before}, entity="detail.entity"),
        one("unique", "upsert", into="shop.late", set={"n": "detail.n"}, conflicts={"policy": "reject"}),
    ]


def config_of(shop: Database, directory: Path, **reverse: Any) -> Path:
    section = {
        "source": {"type": "local", "path": str(directory / "bus.sqlite"), "subscriber": "shadow"},
        "mappings": mappings(),
        "mode": "dry-run",
    }
    tree = {"legacy": {"dsn": shop.dsn, "tables": ["shop.orders"]}, "reverse": section | reverse}
    path = directory / "bridge.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def publish(path: Path, *bodies: bytes, first: int = 0) -> None:
    """Whatever they are: a sink would publish events only."""
    with closing(LocalSink(path)) as sink:
        sink.check()
    with closing(sqlite3.connect(path)) as bus, bus:
        rows = [("test", str(number), text) for number, text in enumerate(bodies, first)]
        bus.executemany("INSERT INTO event (source, id, body) VALUES (?, ?, ?)", rows)


class Shadow:
    """A dry run in a thread of its own."""

    def __init__(self, shop: Database, directory: Path, **reverse: Any) -> None:
        self.config = Config.load(config_of(shop, directory, **reverse))
        assert self.config.reverse is not None
        self.path, self.metrics, self.stop = directory / "bus.sqlite", Metrics(), threading.Event()
        self.source = LocalSource(self.path, subscriber="shadow")
        letters = TableDeadLetterStore(shop.dsn)
        self.consumer = open_consumer(self.config, self.config.reverse, self.source, letters, self.metrics)
        self.failure: BaseException | None = None
        self.sent = 0

    def send(self, *bodies: bytes) -> None:
        """Each is a message of its own; then wait until all of them are rehearsed."""
        publish(self.path, *bodies, first=self.sent)
        self.sent += len(bodies)
        until(lambda: sum(self.would.values()) == self.sent or self.failure, 20, lambda: f"{self.would}")
        assert self.failure is None

    @property
    def would(self) -> dict[str, float]:
        return self._values("figbridge_reverse_would_have_total", "outcome")

    def _values(self, name: str, *labels: str) -> dict[str, float]:
        return {
            "/".join(sample.labels[label] for label in labels): sample.value
            for metric in self.metrics.registry.collect()
            for sample in metric.samples
            if sample.name == name and sample.value
        }

    @property
    def would_conflict(self) -> dict[str, float]:
        return self._values("figbridge_reverse_would_have_conflicts_total", "kind", "decision")

    @property
    def really(self) -> dict[str, float]:
        return self._values("figbridge_reverse_events_total", "outcome")

    def run(self) -> None:
        try:
            self.consumer.run(self.stop)
        except BaseException as error:  # noqa: BLE001 (the test looks at it)
            self.failure = error


@contextmanager
def running(shadow: Shadow) -> Iterator[Shadow]:
    thread = threading.Thread(target=shadow.run, daemon=True)
    thread.start()
    try:
        yield shadow
    finally:
        shadow.stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert shadow.failure is None


@pytest.fixture
def shadow(shop: Database, tmp_path: Path) -> Iterator[Shadow]:
    with running(Shadow(shop, tmp_path)) as found:
        yield found


def recorded(shop: Database) -> list[Any]:
    return shop.execute("SELECT outcome, reason, differences, conflicts FROM figbridge.dry_run ORDER BY id")


def nothing_was_written(shop: Database) -> None:
    assert orders(shop) == [(1, "new"), (2, "new")]
    assert shop.execute("SELECT * FROM shop.late") == [(1, 1)]
    for table in OURS:
        assert shop.execute(f"SELECT count(*) FROM figbridge.{table}") == [(0,)], table


def test_what_would_be_changed_is_kept_and_nothing_is_changed(shop: Database, shadow: Shadow) -> None:
    shadow.send(
        body("1", id=1, v=1, status="paid", note="n", n=5),
        body("2", "made", id=3, status="fresh"),
        body("3", "gone", id=2),
    )
    assert shadow.would == {"applied": 3}
    (updated, inserted, deleted) = recorded(shop)
    row = {"id": 1, "customer_id": None, "status": "new", "note": "n", "quantity": 5, "touched": "new"}
    after = row | {"status": "paid", "touched": "paid"}
    difference = {"statement": 1, "table": "shop.orders", "columns": ["status", "touched"]}
    assert updated == ("applied", "", [difference | {"before": row, "after": after}], [])
    assert [(it["before"], it["after"] and it["after"]["touched"]) for it in inserted[2]] == [(None, "fresh")]
    assert [(it["before"] and it["before"]["id"], it["after"]) for it in deleted[2]] == [(2, None)]
    nothing_was_written(shop)
    assert shadow.really == {}, "the live metrics tell of what is done"


def test_columns_are_compared_to_the_last_digit(shop: Database, shadow: Shadow) -> None:
    shop.execute(f"""
        ALTER TABLE shop.orders ALTER quantity TYPE numeric, ADD deep jsonb;
        UPDATE shop.orders SET quantity = 12345678901234567.1234 WHERE id = 1;
        UPDATE shop.orders SET deep = '{"[" * 3000}{"]" * 3000}' WHERE id = 2;
    """)
    shadow.send(
        body("1", "changed", id=1, n="12345678901234567.6234", entity="a"),
        body("2", "changed", id=1, n="1e5000", entity="b"),
        body("3", "changed", id=2, n=6, entity="c"),
    )
    assert shadow.would == {"applied": 3}
    found = shop.execute(
        "SELECT differences #>> '{0,columns}', differences #>> '{0,after,quantity}' FROM figbridge.dry_run ORDER BY id"
    )
    # nobody compares what is nested that deeply
    assert found == [('["quantity"]', "12345678901234567.6234"), ('["quantity"]', f"1{'0' * 5000}"), (None, "6")]
    nothing_was_written(shop)


def test_floats_are_compared_to_the_last_digit(shop: Database, tmp_path: Path) -> None:
    shop.execute("ALTER TABLE shop.orders ALTER quantity TYPE float8")
    shop.execute(f"ALTER DATABASE {shop.name} SET extra_float_digits = 0")
    with running(Shadow(shop, tmp_path)) as shadow:
        shadow.send(body("1", "changed", id=1, n=5.000000000000001, entity="a"))
        assert shadow.would == {"applied": 1}
    assert shop.execute("SELECT differences #>> '{0,after,quantity}' FROM figbridge.dry_run") == [
        ("5.000000000000001",)
    ]


def test_documents_that_jsonb_cannot_have(shop: Database, tmp_path: Path) -> None:
    """They are told as the column of type json has them; also where a row without a key is compared with them."""
    shop.execute(r"""
        ALTER TABLE shop.orders ALTER note TYPE json USING NULL;
        UPDATE shop.orders SET note = '"\u0000"' WHERE id = 1;
        UPDATE shop.orders SET note = '"\ud800"' WHERE id = 2;
        CREATE TABLE shop.log (note json, n int); INSERT INTO shop.log VALUES ('"\u0000"', 1)
    """)
    log = {
        "match": {"source": "shop.next", "detail-type": "logged"},
        "into": "shop.log",
        "action": "insert",
        "set": {"note": "detail.note", "n": "detail.n"},
    }
    with running(Shadow(shop, tmp_path, mappings=[*mappings(), log])) as shadow:
        shadow.send(
            body("1", id=1, v=1, status="new", note=[], n=5),
            body("2", id=2, v=1, status="new", note=[], n=5),
            body("3", "logged", note=[], n=1),
        )
        assert shadow.would == {"applied": 3}
    texts = [text for (text,) in shop.execute("SELECT differences::text FROM figbridge.dry_run ORDER BY id")]
    assert (r'"note":"\u0000"' in texts[0], r'"note":"\ud800"' in texts[1]) == (True, True)
    assert '"columns":["note"]' in texts[0]
    assert '"before":null' in texts[2]


def test_where_both_systems_agree_nothing_is_kept(shop: Database, shadow: Shadow) -> None:
    shadow.send(body("1", id=1, v=1, status="new", note="n", n=5), body("2", "unheard-of", id=1))
    assert shadow.would == {"unchanged": 1, "ignored": 1}
    assert recorded(shop) == []
    nothing_was_written(shop)


def test_events_of_a_batch_see_each_other(shop: Database, tmp_path: Path) -> None:
    shadow = Shadow(shop, tmp_path)
    bodies = [
        body("1", id=1, v=1, status="a"),
        body("2", id=1, v=2, status="b"),
        body("3", id=1, v=1, status="late"),
        body("2", id=1, v=2, status="b"),
        body("2", id=1, v=2, status="another"),
    ]
    publish(shadow.path, *bodies)
    with running(shadow):
        until(lambda: sum(shadow.would.values()) == len(bodies))
    changes = [[it["after"]["status"] for it in differences] for _, _, differences, _ in recorded(shop)]
    assert changes[:2] == [["a"], ["b"]]
    assert recorded(shop)[2][:2] == ("ignored", "stale_version")
    nothing_was_written(shop)


@pytest.mark.parametrize(
    ("message", "outcome", "reason"),
    [
        (body("1", "changed", id=9, status="x", entity="e"), "retried", "update_missing"),
        (body("1", id=1, v=1, customer=404), "retried", "23503"),
        (body("1", id=1, v=1, n="many"), "dead_letter", "22P02"),
        (b"no event", "dead_letter", "malformed"),
        (body("1", "gone", id=9), "ignored", "delete_missing"),
        (body("1", "changed", id=1, status="keep", entity="e"), "ignored", "suppressed"),
        (body("1", "unique", id=2, n=1), "ignored", "unique_other"),
    ],
    ids=lambda it: it if isinstance(it, str) else "",
)
def test_what_would_not_be_applied_says_why(
    shop: Database, shadow: Shadow, *, message: bytes, outcome: str, reason: str
) -> None:
    """The unique constraint is deferred: only COMMIT would have said so."""
    shadow.send(message, body("after", id=2, v=1, status="paid"))
    assert shadow.would == {outcome: 1, "applied": 1}
    assert recorded(shop)[0][:2] == (outcome, reason)
    nothing_was_written(shop)


def test_conflicts_that_it_would_have(shop: Database, shadow: Shadow) -> None:
    shadow.send(
        body("1", "ruled", id=1, status="paid", before={"status": "seen"}, entity="a"),
        body("2", "unique", id=2, n=1),
    )
    assert shadow.would_conflict == {"update_conflict/legacy": 1, "unique_other/rejected": 1}
    assert [it[3] for it in recorded(shop)] == [
        [{"kind": "update_conflict", "decision": "legacy"}],
        [{"kind": "unique_other", "decision": "rejected"}],
    ]
    nothing_was_written(shop)


def test_what_is_recorded_is_acknowledged_and_a_bad_event_blocks_nobody(
    shop: Database, shadow: Shadow, tmp_path: Path
) -> None:
    shadow.send(*(body(str(n), id=1, v=n, n="many" if n % 7 == 0 else n) for n in range(1, 50)))
    with closing(sqlite3.connect(tmp_path / "bus.sqlite")) as bus:
        until(lambda: bus.execute("SELECT count(*) FROM delivery").fetchone() == (0,))
        assert bus.execute("SELECT frontier FROM subscriber").fetchone() == (49,)
    nothing_was_written(shop)


def test_an_id_that_the_encoding_lacks_stands_there_as_an_escape(database: Database, tmp_path: Path) -> None:
    name = f"{database.name}_latin"
    database.execute(f"CREATE DATABASE {name} ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'")
    try:
        latin = filled(Database(database.server, name))
        with running(Shadow(latin, tmp_path)) as shadow:
            shadow.send(body("größe-日本", id=1, v=2, status="x"), body("größe", id=2, v=2, status="größe"))
        with latin.connect(client_encoding="utf8") as connection:
            status = "differences->0->'after'->>'status'"
            found = connection.execute(
                f"SELECT event_id, outcome, reason, {status} FROM figbridge.dry_run ORDER BY id"
            ).fetchall()
        assert found == [
            (r"größe-\u65e5\u672c", "dead_letter", "22P05", None),
            ("größe", "applied", "", "größe"),
        ]
    finally:
        database.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_rehearsals_are_purged_with_age(shop: Database, tmp_path: Path) -> None:
    section = Config.load(config_of(shop, tmp_path)).reverse
    assert section is not None
    (kept,) = [it for it in purged(section) if it.table == "dry_run"]
    shop.execute("""
        INSERT INTO figbridge.dry_run (outcome, reason, message, differences, conflicts, created_at)
        SELECT 'applied', '', '', '[]', '[]', now() - n * interval '1 day' FROM generate_series(1, 20) AS n
    """)
    assert purge(shop.dsn, kept) == 14


def test_the_check_says_what_a_shadow_does_and_may(shop: Database, tmp_path: Path) -> None:
    with role(shop) as (name, dsn):
        shop.execute(
            f"GRANT USAGE ON SCHEMA figbridge TO {name}; GRANT ALL ON ALL TABLES IN SCHEMA figbridge TO {name}; "
            f"GRANT ALL ON ALL TABLES IN SCHEMA shop TO {name}; REVOKE SELECT ON shop.orders FROM {name}; "
            f"GRANT SELECT (id, status, note, quantity, customer_id) ON shop.orders TO {name}"
        )
        path = config_of(shop, tmp_path)
        path.write_text(path.read_text().replace(shop.dsn, dsn))
        blind = [it.remedy for it in inspected(Config.load(path), "run") if (it.level, it.where) == BLIND]
        assert all("GRANT USAGE ON SCHEMA" in remedy for remedy in blind)
        assert len(blind) == 2
        shop.execute(f"GRANT USAGE ON SCHEMA shop TO {name}")
        found = inspected(Config.load(path), "run")
        assert "nothing of it is written" in found.only("warning", "reverse.mode").what
        finding = found.only("error", "reverse.mode")
        shop.execute(finding.remedy)
        assert inspected(Config.load(path), "run").errors == []


def test_letters_are_not_redriven_by_a_shadow(shop: Database, tmp_path: Path) -> None:
    path = config_of(shop, tmp_path)
    shop.execute("""
        INSERT INTO figbridge.dead_letter (id, direction, reason, message, attempts, body)
        VALUES ('x', 'reverse', 'r', 'm', 1, '{}')
    """)
    done = CliRunner().invoke(cli.main, ["dead-letters", "redrive", "--all", "-c", str(path)])
    assert done.exit_code == 2, done.output
    assert shop.execute("SELECT count(*) FROM figbridge.dead_letter") == [(1,)]


@pytest.mark.timeout(120)
def test_a_shadow_beside_a_forward_path_publishes_nothing_of_its_own(database: Database, tmp_path: Path) -> None:
    """`figbridge run`, both directions, on a mapping whose table is published: what is rolled back is not decoded."""
    make_shop(database)
    database.execute("DROP SCHEMA figbridge CASCADE; INSERT INTO shop.orders (id, status) VALUES (1, 'new')")
    path = config_of(database, tmp_path)
    tree = yaml.safe_load(path.read_text()) | {
        "forward": {"sink": {"type": "file", "path": str(tmp_path / "events.jsonl")}},
        "http": {"listen": "${HTTP_LISTEN}"},
    }
    tree["legacy"]["slot"] = database.slot
    tree["reverse"]["mappings"] = tree["reverse"]["mappings"][:1]
    path.write_text(yaml.safe_dump(tree))
    environment = {"HTTP_LISTEN": "127.0.0.1:0"}
    made = CliRunner().invoke(cli.main, ["init", "-c", str(path)], env=environment)
    assert made.exit_code == 0, made.output
    with Bridge(path, tmp_path / "log") as bridge:
        bridge.until_ready()
        publish(tmp_path / "bus.sqlite", *(body(str(n), id=1, v=n, status=f"secret-{n}") for n in range(20)))
        until(lambda: count(database, "figbridge.dry_run") == 20, 30, lambda: bridge.log[-3000:])
        database.execute("UPDATE shop.orders SET status = 'legacy'")
        events = tmp_path / "events.jsonl"
        until(lambda: events.exists() and events.read_text().count("\n") >= 1, 30)
        assert bridge.metric('figbridge_reverse_would_have_total{outcome="applied"}') == 20
        assert bridge.terminate() == 0
    (line,) = events.read_text().splitlines()
    assert json.loads(line)["detail"]["after"]["status"] == "legacy"
    assert count(database, "figbridge.inbox") == 0
    assert "secret" not in bridge.log
