"""Probes of the way to a standby: would the slot be there after a promotion, with everything that it needs?

From 17 on a standby can keep a slot that was made with failover = true. That takes settings on both sides, and no error
is raised anywhere when one of them is missing: the slot is simply not there on the day. The primary shows its own side;
the standby's is looked at where legacy.dsn names several hosts.

https://www.postgresql.org/docs/current/logicaldecoding-explanation.html#LOGICALDECODING-REPLICATION-SLOTS-SYNCHRONIZATION
https://www.postgresql.org/docs/current/logical-replication-failover.html

Without a standby there is nothing to find, and nothing is said.
"""

from collections.abc import Iterator
from typing import Final

import psycopg
from psycopg import conninfo

from figbridge.config import LegacySection
from figbridge.preflight import catalogue
from figbridge.preflight.catalogue import Slot
from figbridge.preflight.finding import Finding, ok, warning
from figbridge.preflight.server import setting

_SINCE: Final = 170000
_PATIENCE: Final = 3  # seconds until a host counts as away


def alter(slot: str) -> str:
    """How an existing slot is made one that a standby keeps. Only the replication protocol can, and only while idle.

    https://www.postgresql.org/docs/current/protocol-replication.html#PROTOCOL-REPLICATION-ALTER-REPLICATION-SLOT
    """
    return (
        "stop the bridge, then over a replication connection: "
        f"""psql "dbname=… replication=database" -c 'ALTER_REPLICATION_SLOT {slot} (FAILOVER true)'"""
    )


def probe(connection: psycopg.Connection, section: LegacySection) -> Iterator[Finding]:
    """The primary's side, and every other host of the DSN."""
    standbys = _standbys(connection)
    slot = catalogue.slot(connection, section.slot)
    if section.failover and (standbys or slot):
        yield from _primary(connection, section.slot, slot, standbys)
    version = connection.info.server_version
    for host in _other_hosts(connection, section.dsn.get_secret_value()):
        yield from _host(host, section, version)


def _standbys(connection: psycopg.Connection) -> list[tuple[str, bool]]:
    """(physical slot, whether a standby reads it now), without the temporary ones of pg_basebackup."""
    return connection.execute(
        "SELECT slot_name::text, active FROM pg_replication_slots "
        "WHERE slot_type = 'physical' AND NOT temporary ORDER BY 1"
    ).fetchall()


def _primary(
    connection: psycopg.Connection, name: str, slot: Slot | None, standbys: list[tuple[str, bool]]
) -> Iterator[Finding]:
    place, version = "failover", connection.info.server_version
    if version < _SINCE:
        if standbys:
            yield warning(
                place,
                f"PostgreSQL {version // 10000} does not carry slot {name} over to a standby: after a failover it is "
                "gone, and changes with it",
                "upgrade to 17 or newer; until then let the cluster's own tool keep the slot (Patroni: slots, "
                "or the extension pg_failover_slots)",
            )
        return
    if slot and not slot.failover and standbys:
        yield warning(place, f"slot {name} is not kept by a standby: after a failover it is gone", alter(name))
    named = setting(connection, "synchronized_standby_slots")
    wanted = [part.strip().strip('"') for part in named.split(",") if part.strip()]
    if not wanted and standbys and (slot is None or slot.failover):
        yield warning(
            place,
            "synchronized_standby_slots is empty: an event may leave before a standby has its change, and after a "
            "failover the change never happened",
            f"ALTER SYSTEM SET synchronized_standby_slots = '{', '.join(it for it, _ in standbys)}'; "
            "SELECT pg_reload_conf(); (from then on events wait for those standbys)",
        )
    active = {it for it, reading in standbys if reading}
    if away := [it for it in wanted if it not in active]:
        yield warning(
            place,
            f"events wait for {', '.join(away)} in synchronized_standby_slots, which no standby reads",
            "start that standby, or take it out: ALTER SYSTEM SET synchronized_standby_slots = "
            f"'{', '.join(it for it in wanted if it in active)}'; SELECT pg_reload_conf();",
        )
    elif wanted and slot and slot.failover:
        yield ok(place, f"slot {name} is for failover, events wait for {', '.join(wanted)}")


def _other_hosts(connection: psycopg.Connection, dsn: str) -> Iterator[str]:
    """The DSN of each host that is not the one we are connected to."""
    parts = conninfo.conninfo_to_dict(dsn)
    hosts = str(parts.get("host") or "").split(",")
    ports = str(parts.get("port") or "").split(",")
    if len(hosts) < 2:
        return
    if len(ports) < len(hosts):
        ports = ports[:1] * len(hosts)
    addresses = str(parts.get("hostaddr") or "").split(",")
    for index, (host, port) in enumerate(zip(hosts, ports, strict=False)):
        if (host, port or "5432") == (connection.info.host, str(connection.info.port)):
            continue
        address = addresses[index] if len(addresses) == len(hosts) else ""
        one = {"host": host, "port": port, "hostaddr": address, "target_session_attrs": "any"}
        named = {key: str(value) for key, value in (parts | one).items() if value}
        yield conninfo.make_conninfo(**(named | {"connect_timeout": str(_PATIENCE)}))


def _host(dsn: str, section: LegacySection, version: int) -> Iterator[Finding]:
    parts = conninfo.conninfo_to_dict(dsn)
    place = f"host {parts['host']}:{parts.get('port') or 5432}"
    try:
        with psycopg.connect(dsn, autocommit=True, application_name="figbridge-check", prepare_threshold=None) as it:
            recovering = it.execute("SELECT pg_is_in_recovery()").fetchone()
            if not (recovering and recovering[0]):
                yield warning(
                    place,
                    "takes writes too: of two primaries the bridge may read the wrong one",
                    "stop the old one, or make it a standby of the other",
                )
            elif version >= _SINCE and section.failover:
                yield from _standby(it, place, section.slot)
    except psycopg.OperationalError as error:
        yield warning(
            place, f"does not answer: {str(error).strip()}", "start it, or take it out of legacy.dsn if it is gone"
        )


def _standby(connection: psycopg.Connection, place: str, name: str) -> Iterator[Finding]:
    """A standby's settings, then what became of the slot there."""
    findings = []
    if setting(connection, "sync_replication_slots") != "on":
        findings.append(_switch(place, "sync_replication_slots", "nothing keeps the slot there"))
    if setting(connection, "hot_standby_feedback") != "on":
        findings.append(_switch(place, "hot_standby_feedback", "the primary may remove rows that the slot needs"))
    if not setting(connection, "primary_slot_name"):
        findings.append(
            warning(
                place,
                "primary_slot_name is empty: the slot is not kept there without it",
                "on the primary SELECT pg_create_physical_replication_slot('standby', true); on the standby "
                "ALTER SYSTEM SET primary_slot_name = 'standby'; SELECT pg_reload_conf();",
            )
        )
    findings += _primary_conninfo(connection, place)
    slot = catalogue.slot(connection, name)
    if slot and not slot.synced:
        findings.append(
            warning(
                place,
                f"has a slot {name} of its own, from a time when it was the primary: it stands in the way of the "
                "one to keep",
                f"on that standby: SELECT pg_drop_replication_slot('{name}');",
            )
        )
    elif not findings and (slot is None or slot.temporary or slot.invalidation):
        why = "it is not there" if slot is None else slot.invalidation or "it is not complete yet"
        findings.append(
            warning(
                place,
                f"is not ready to take over with slot {name}: {why}",
                "start the bridge, a slot becomes ready after it has been read for a while; the standby's log says "
                "what it waits for (slot synchronization)",
            )
        )
    yield from findings
    if not findings:
        yield ok(place, f"is ready to take over with slot {name}")


def _switch(place: str, name: str, why: str) -> Finding:
    return warning(place, f"{name} is off: {why}", f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf();")


def _primary_conninfo(connection: psycopg.Connection, place: str) -> Iterator[Finding]:
    """Its value is for pg_read_all_settings only; a role without it is told nothing."""
    try:
        text = setting(connection, "primary_conninfo")
    except psycopg.errors.InsufficientPrivilege:
        return
    if "dbname" not in conninfo.conninfo_to_dict(text):
        yield warning(
            place,
            "primary_conninfo names no dbname: the slot is not kept there without it",
            "add dbname=postgres to primary_conninfo on that standby (ALTER SYSTEM SET primary_conninfo = …), "
            "then SELECT pg_reload_conf();",
        )
