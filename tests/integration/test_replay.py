"""Random work on two tables: whatever the transactions did, the events in their order give exactly the tables.

A machine of hypothesis chooses: inserts, updates, changes of key, deletes, truncates, savepoints, some rolled back,
ALTER TABLE, over a table with a key and one with REPLICA IDENTITY FULL and none. One session works while the stream
runs; a second, whose transaction is long, mixes with it in the WAL.
"""

from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from fixtures.forward import Forward
from fixtures.postgres import Database
from fixtures.replay import FENCE, Replica, rows_of, settled

KEYS = st.integers(1, 6)
TABLES = st.sampled_from(["keyed", "bag"])
# short, toasted, empty, absent
VALUES = st.one_of(st.none(), st.text('aé"\\\n,{}', max_size=5), st.sampled_from(["x" * 5000, "y" * 5000]))
SET_UP = """
CREATE TABLE keyed (id int PRIMARY KEY, n int, body text); ALTER TABLE keyed ALTER body SET STORAGE EXTERNAL;
CREATE TABLE bag (id int, n int, body text); ALTER TABLE bag REPLICA IDENTITY FULL;
ALTER TABLE bag ALTER body SET STORAGE EXTERNAL;
CREATE TABLE elsewhere (id serial PRIMARY KEY);
CREATE PUBLICATION pub FOR TABLE keyed, bag, elsewhere;
"""


class Work(RuleBasedStateMachine):
    """One example is a run of transactions; each ends with the proof."""

    database: Database
    forward: Forward

    def __init__(self) -> None:
        super().__init__()
        self.session = self.database.connect()
        self.other = self.database.connect()
        self.session.execute("TRUNCATE keyed, bag")
        self.depth = 0  # of BEGIN and the savepoints in it
        self.mixed = False
        self.columns = 0

    def teardown(self) -> None:
        self.session.close()
        self.other.close()
        columns = "SELECT string_agg('DROP ' || attname, ', ') FROM pg_attribute WHERE attrelid = 'keyed'::regclass "
        ((added,),) = self.database.execute(columns + "AND attnum > 3 AND NOT attisdropped")
        if added:
            self.database.execute(f"ALTER TABLE keyed {added}")

    def attempt(self, statement: str, *parameters: Any) -> None:
        """A statement that may meet a unique violation, which undoes it alone."""
        if self.depth:
            self.session.execute("SAVEPOINT one")
        try:
            self.session.execute(statement, parameters)
        except psycopg.errors.UniqueViolation:
            if self.depth:
                self.session.execute("ROLLBACK TO one")
        if self.depth:
            self.session.execute("RELEASE one")

    @rule(table=TABLES, key=KEYS, value=VALUES, rows=st.integers(1, 3))
    def insert(self, table: str, key: int, value: str | None, rows: int) -> None:
        insert = f"INSERT INTO {table} (id, n, body) SELECT %s + i, i, %s::text || i FROM generate_series(0, %s) i"
        self.attempt(insert, key, value, rows - 1)

    @rule(table=TABLES, key=KEYS)
    def update_without_its_toast(self, table: str, key: int) -> None:
        self.attempt(f"UPDATE {table} SET n = n + 1 WHERE id <= %s", key)

    @rule(table=TABLES, key=KEYS, value=VALUES)
    def update(self, table: str, key: int, value: str | None) -> None:
        self.attempt(f"UPDATE {table} SET body = %s, n = 0 WHERE id = %s", value, key)

    @rule(table=TABLES, key=KEYS, to=KEYS)
    def change_the_key(self, table: str, key: int, to: int) -> None:
        self.attempt(f"UPDATE {table} SET id = %s WHERE id = %s", to, key)

    @rule(table=TABLES)
    def shift_all_keys(self, table: str) -> None:
        self.attempt(f"UPDATE {table} SET id = id - 1")

    @rule(table=TABLES, key=KEYS)
    def delete(self, table: str, key: int) -> None:
        self.attempt(f"DELETE FROM {table} WHERE id = %s", key)

    @rule(tables=st.sampled_from(["keyed", "bag", "keyed, bag"]))
    def truncate(self, tables: str) -> None:
        self.attempt(f"TRUNCATE {tables}")

    @rule()
    def copy(self) -> None:
        with self.session.cursor().copy("COPY bag FROM STDIN") as copy:
            for row in [(1, 1, "z"), (1, 1, "z"), (2, None, None)]:
                copy.write_row(row)

    @rule(kind=st.sampled_from(["int DEFAULT 7", "text", "jsonb DEFAULT '[null]'"]))
    def add_a_column(self, kind: str) -> None:
        self.columns += 1
        self.attempt(f"ALTER TABLE keyed ADD c{self.columns} {kind}")

    @precondition(lambda self: self.depth < 4)
    @rule()
    def begin(self) -> None:
        self.session.execute(f"SAVEPOINT s{self.depth}" if self.depth else "BEGIN")
        self.depth += 1

    @precondition(lambda self: self.depth > 0)
    @rule()
    def roll_back(self) -> None:
        self.depth -= 1
        self.session.execute(f"ROLLBACK TO s{self.depth}; RELEASE s{self.depth}" if self.depth else "ROLLBACK")

    @precondition(lambda self: self.depth > 0)
    @rule()
    def commit(self) -> None:
        self.depth -= 1
        self.session.execute(f"RELEASE s{self.depth}" if self.depth else "COMMIT")

    @rule(commits=st.booleans())
    def mix(self, *, commits: bool) -> None:
        """Another transaction, begun before and ended after some of ours."""
        if not self.mixed:
            self.other.execute("BEGIN")
        self.other.execute("INSERT INTO elsewhere DEFAULT VALUES")
        self.mixed = not commits
        if commits:
            self.other.execute("COMMIT")

    @invariant()
    def events_give_the_tables(self) -> None:
        if self.depth:
            return
        replica = Replica(settled(self.forward))
        for table in ("bag", "elsewhere"):
            assert replica.rows(table) == rows_of(self.database, table)
        # a default that ADD COLUMN gives to the rows that are there changes no row
        theirs = {row["id"]: row for row in rows_of(self.database, "keyed")}
        ours = {row["id"]: row for row in replica.rows("keyed")}
        assert ours == {key: {name: row[name] for name in ours.get(key, row)} for key, row in theirs.items()}


@pytest.mark.slow
def test_the_events_give_the_tables(each_database: Database) -> None:
    each_database.execute(SET_UP)
    each_database.create_slot()
    with Forward(each_database, messages=[FENCE]) as forward:
        forward.until_streaming()
        machine = type("Machine", (Work,), {"database": each_database, "forward": forward})
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=12, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
            ),
        )
