"""The rules of the configuration's fields: names, addresses, templates, mappings, conflicts."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from figbridge.config import MappingSection, own_sql, split_table
from fixtures.configured import LEGACY, MAPPING, mapping, parse, problems, reverse, tree

# --- the fields' own rules


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("shop.orders", ("shop", "orders")),
        ("Shop.Orders", ("shop", "orders")),
        ('"Shop"."Order Items"', ("Shop", "Order Items")),
        ('shop."a.b"', ("shop", "a.b")),
        ('"say ""hi"""._t$1', ('say "hi"', "_t$1")),
    ],
)
def test_a_table_is_read_as_sql_reads_it(text: str, names: tuple[str, str]) -> None:
    assert split_table(text) == names


@pytest.mark.parametrize(
    "text", ["orders", "a.b.c", "shop.", ".orders", 'shop."orders', "1a.b", "a b.c", "a.b\n", '"".a']
)
def test_what_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"schema\.table"):
        split_table(text)
    assert problems(tree(legacy=LEGACY | {"tables": [text]})).keys() == {"legacy.tables.0"}


@pytest.mark.parametrize("text", ["figbridge.inbox", '"figbridge".orders', "FIGBRIDGE.canary"])
def test_our_own_tables_are_neither_published_nor_mapped_into(text: str) -> None:
    content = reverse(mapping(into=text)) | {"legacy": LEGACY | {"tables": [text]}}

    assert problems(content).keys() == {"legacy.tables.0", "reverse.mappings.0.into"}


def test_a_table_twice_is_an_error_however_it_is_spelt() -> None:
    found = problems(tree(legacy=LEGACY | {"tables": ["shop.orders", 'SHOP."orders"']}))

    assert found["legacy.tables"].what == "'SHOP.\"orders\"' is the same table as 'shop.orders'"
    assert problems(tree(legacy=LEGACY | {"tables": ["a.b", "a.b"]}))["legacy.tables"].what == "'a.b' is there twice"
    assert parse(tree(legacy=LEGACY | {"tables": ["a.b", 'a."B"']})).legacy.tables == ("a.b", 'a."B"')


@pytest.mark.parametrize("text", ["Figbridge", "fig-bridge", "", "x" * 64, "slot\n"])
def test_a_slot_that_the_server_would_refuse(text: str) -> None:
    assert problems(tree(legacy=LEGACY | {"slot": text})).keys() == {"legacy.slot"}


@pytest.mark.parametrize(
    ("dsn", "what"),
    [
        ("", "is empty"),
        ("not a dsn", "libpq cannot read it as a connection string"),
        ("postgresql://u:p%@h/d", "libpq cannot read it as a connection string"),
        ("host=db replication=database", "has the parameter replication"),
        ("postgresql://u:hunter2@tail@h:1/d", "cannot be meant: its host holds an @"),
        ("postgresql://u:hunter2@@h:1/d", "cannot be meant: its host holds an @"),
        ("host=hunter2@h", "cannot be meant: its host holds an @"),
        ("postgresql://u:12/hunter2@h:1/d", "cannot be meant: its database holds an unescaped @"),
        ("postgresql://u/hunter2@h", "cannot be meant: its database holds an unescaped @"),
        (
            "postgresql://u:hunter2/tail@h:1/d",
            "cannot be meant: its database holds an unescaped @, its port is no number from 1 to 65535",
        ),
        ("postgresql://u:hunter2/tail?x", "libpq cannot read it as a connection string"),
        (
            "postgresql://h/d?load_balance_hosts=hunter2&gssencmode=hunter2&connect_timeout=hunter2&keepalives_idle=1.5",
            (
                "cannot be meant: gssencmode is none of disable | prefer | require, load_balance_hosts is none of "
                "disable | random, connect_timeout is no whole number, keepalives_idle is no whole number"
            ),
        ),
        ("host=h sslnegotiation=''", "cannot be meant: sslnegotiation is none of postgres | direct"),
        ("host=h tcp_user_timeout=2147483648", "cannot be meant: tcp_user_timeout is no whole number"),
        ("host=a,b port=1,2,3", "cannot be meant: it has 3 ports for 2 hosts"),
        ("hostaddr=127.0.0.1 port=1,2", "cannot be meant: it has 2 ports for 1 hosts"),
        ("host=a,b hostaddr=127.0.0.1", "cannot be meant: it has 2 hosts and 1 host addresses"),
        ("host=h port=hunter2", "cannot be meant: its port is no number from 1 to 65535"),
        ("host=a,b port=1,65536", "cannot be meant: its port is no number from 1 to 65535"),
    ],
)
def test_a_dsn_is_checked_before_anything_connects(dsn: str, what: str) -> None:
    problem = problems(tree(legacy=LEGACY | {"dsn": dsn}))["legacy.dsn"]
    assert problem.what == what
    assert "hunter2" not in str(problem)


@pytest.mark.parametrize(
    "dsn",
    [
        "host=a,b port=5432,5433 target_session_attrs=read-write",
        "host=a,b port=,5433",
        "host=a,b port=5433 sslmode=verify-full connect_timeout=-1 keepalives=0 tcp_user_timeout=2147483647",
        "port=1,2",
        "service=legacy",
        "postgresql:///shop",
        "postgresql://u:p%40%2F@h/d%40?options=-cfoo.bar%3Da@b",
        "postgresql://u:p?x#:y@[::1]:5432/d?application_name=a/b",
        "postgres://u@/d?host=/run/a@b&port=5433",
        "host=@abstract dbname=a@b user=c@d",
    ],
)
def test_every_form_of_libpq_is_a_dsn(dsn: str) -> None:
    assert parse(tree(legacy=LEGACY | {"dsn": dsn})).legacy.dsn.get_secret_value() == dsn


@pytest.mark.parametrize(
    ("field", "template", "accepted"),
    [
        ("source", "legacy", True),
        ("source", "{database}.{schema}.{table}", True),
        ("source", "{{literal}}", True),
        ("source", "{operation}", False),
        ("detail-type", "{operation}", True),
        ("detail-type", "{tabel}", False),
        ("detail-type", "{}", False),
        ("detail-type", "{0}", False),
        ("detail-type", "{table", False),
        ("detail-type", "table}", False),
        ("detail-type", "{table.__class__}", False),
        ("detail-type", "{table[0]}", False),
        ("detail-type", "{table!r}", False),
        ("detail-type", "{table:>20}", False),
        ("detail-type", " ", False),
        ("source", "", False),
        ("source", "aws.shop", False),
    ],
)
def test_templates(field: str, template: str, accepted: bool) -> None:
    content = tree(forward={"sink": {"type": "stdout"}, field: template})

    if accepted:
        parse(content)
    else:
        assert problems(content).keys() == {f"forward.{field}"}


def test_an_unknown_placeholder_names_the_known_ones() -> None:
    found = problems(tree(forward={"sink": {"type": "stdout"}, "detail-type": "{tabel}.{operation}"}))

    assert found["forward.detail-type"].what == "has the placeholder {tabel}"
    assert "{database}, {schema}, {table}, {operation}" in found["forward.detail-type"].remedy


def test_paths_of_a_mapping_are_checked_with_their_column() -> None:
    found = problems(
        reverse(
            mapping(action="upsert", key={"id": "detail."}, set={"status": "detail[", "ok": "detail.ok"}),
            mapping(idempotency_key="a b"),
        )
    )

    assert found.keys() == {
        "reverse.mappings.0.key.id",
        "reverse.mappings.0.set.status",
        "reverse.mappings.1.idempotency_key",
    }
    assert all(problem.what.startswith("not a JMESPath expression (") for problem in found.values())
    assert all("\n" not in problem.what for problem in found.values())


@pytest.mark.parametrize(
    ("action", "has_key", "has_set", "what"),
    [
        ("insert", False, True, None),
        ("insert", True, True, "action insert takes no key"),
        ("insert", False, False, "action insert needs set"),
        ("update", True, True, None),
        ("update", False, True, "action update needs key"),
        ("update", True, False, "action update needs set"),
        ("upsert", True, True, None),
        ("upsert", True, False, None),
        ("upsert", False, True, "action upsert needs key"),
        ("delete", True, False, None),
        ("delete", True, True, "action delete takes no set"),
        ("delete", False, False, "action delete needs key"),
    ],
)
def test_what_each_action_needs(action: str, has_key: bool, has_set: bool, what: str | None) -> None:
    content = reverse(
        mapping(action=action, key={"id": "detail.id"} if has_key else None, set={"a": "detail.a"} if has_set else None)
    )

    if what is None:
        parse(content)
    else:
        assert problems(content)["reverse.mappings.0"].what == what


def test_a_column_is_either_found_by_or_written() -> None:
    content = reverse(mapping(action="update", key={"id": "detail.id"}, set={"id": "detail.id", "a": "detail.a"}))

    assert problems(content)["reverse.mappings.0"].what == "columns both in key and in set: id"


@pytest.mark.parametrize(
    "given", ["{value: .inf}", "{value: [{a: -.inf}]}", "{path: detail.n, default: .nan}", "{value: 1.0e+400}"]
)
def test_a_constant_is_a_number_that_json_has(given: str) -> None:
    value = yaml.safe_load(given)
    for content in (
        mapping(set={"n": value}),
        mapping(action="delete", key={"id": "detail.id"}, set=None, soft={"n": value}),
        mapping(into=None, action=None, set=None, sql="SELECT %(n)s", **{"with": {"n": value}}),
    ):
        (problem,) = problems(reverse(content)).values()
        assert problem.what == "has a number that JSON has not"
        assert "'Infinity'" in problem.remedy
    parse(reverse(mapping(set={"n": {"value": "Infinity"}, "m": {"value": [1.5, None]}})))


def test_a_column_has_a_name() -> None:
    assert problems(reverse(mapping(set={"": "detail.id"})))["reverse.mappings.0.set"].what == "has an empty key"


def test_a_reverse_path_without_mappings_is_an_error() -> None:
    assert problems(reverse())["reverse.mappings"].what == "is empty"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("park-timeout", 0),
        ("statement-timeout", 0),
        ("statement-timeout", float("inf")),
        ("lock-timeout", float("nan")),
    ],
)
def test_settings_out_of_their_range(field: str, value: float) -> None:
    assert problems(reverse(MAPPING, **{field: value})).keys() == {f"reverse.{field}"}


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("[::1]:9464", ("::1", 9464)),
        ("[::]:0", ("::", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_addresses(listen: str, address: tuple[str, int]) -> None:
    assert parse(tree(http={"listen": listen})).http.address == address


@pytest.mark.parametrize(
    "listen", ["", "9464", ":9464", "[]:9464", "::1:9464", "[::1:9464", "host:", "host:http", "host:65536", "host:²"]
)
def test_what_is_no_address(listen: str) -> None:
    assert problems(tree(http={"listen": listen})).keys() == {"http.listen"}


def test_sections_cannot_be_changed_after_they_were_checked() -> None:
    section = MappingSection.model_validate(MAPPING)

    with pytest.raises(ValueError, match="frozen"):
        section.into = "shop.widgets"  # type: ignore[misc]  # that it is refused is the test


# --- conflicts

OWN: dict[str, Any] = {"match": MAPPING["match"]}


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        *((it, f"contains {it.split()[0].upper()}") for it in (
            "ROLLBACK", "commit ;", "Abort", "END WORK", "BEGIN", "START TRANSACTION", "SAVEPOINT a", "RELEASE a",
            "rollback to a", "PREPARE TRANSACTION 'a'", "COMMIT AND CHAIN",
        )),
        ("/* a /* b */ c */ -- d\n ROLLBACK", "contains ROLLBACK"),
        ("SELECT 1 -- ;\n; ; ROLLBACK", "contains ROLLBACK"),
        ("SELECT E'\\'', 1; ROLLBACK -- '", "contains ROLLBACK"),
        ("SELECT $$'$$, $a$ $$ $a$, a$a$a; ROLLBACK", "contains ROLLBACK"),
        ("SELECT '\\'; ROLLBACK; SELECT '", "contains ROLLBACK"),
        ("set transaction READ ONLY", "contains SET TRANSACTION"),
        ("COPY shop.orders FROM STDIN", "contains a COPY"),
        ("copy (SELECT 1) to -- all\n stdout csv", "contains a COPY"),
        *((it, "sets the session") for it in (
            "SET ROLE a", "set /* */ search_path TO a", "SET SESSION AUTHORIZATION a", "SET TIME ZONE 'UTC'",
            "SELECT 1; SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY",
            "SELECT pg_catalog.set_config('search_path', 'a', false)",
        )),
    ],
)  # fmt: skip
def test_sql_that_ends_the_bridges_transaction_is_refused(sql: str, said: str) -> None:
    found = problems(reverse(OWN | {"sql": sql}))
    assert any(said in it.what and "write" in it.remedy for it in found.values()), found


@pytest.mark.parametrize(
    ("sql", "sets"),
    [
        ("SET LOCAL ROLE app", True),
        ("-- who\n SET LOCAL app.user = 'a'; UPDATE a SET b = 1", True),
        ("SELECT Set_Config('app.user', %(u)s, true)", True),
        ("SELECT pg_catalog.set_config('app.user', 'a', true)", True),
        ("RESET ROLE", True),
        ("DO $$ BEGIN SET LOCAL app.user = 'a'; END $$", True),
        ("UPDATE a SET b = 1 WHERE c = 'set_config'; -- SET", False),
        ("INSERT INTO a VALUES (1) ON CONFLICT DO NOTHING", False),
    ],
)
def test_sql_that_sets_something_for_its_transaction_is_known(sql: str, *, sets: bool) -> None:
    assert own_sql.sets(sql) is sets


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT '; ROLLBACK', \"; COMMIT\" FROM a",
        "SELECT E'\\'; ROLLBACK', $$; COMMIT$$, $a$; END; $$; END $a$",
        "-- ; ROLLBACK\nSELECT 1 /* ; COMMIT /* ; END */ ; END */",
        "DO $$ BEGIN PERFORM 1; END $$",
        'UPDATE a SET "end" = 1, start = 2 WHERE release = CASE WHEN b THEN 1 END',
        "COPY shop.orders TO '/stdout'; PREPARE a AS SELECT 1; DEALLOCATE a",
        "SELECT 'is not closed; ROLLBACK",
        "SET LOCAL search_path TO a; SET CONSTRAINTS ALL IMMEDIATE; SELECT 'SET ROLE a'; RESET search_path",
        "UPDATE a SET role = false; SELECT set_config('a.b', 'c', true), false",
        "",
    ],
)
def test_sql_that_only_looks_like_it_is_taken(sql: str) -> None:
    assert parse(reverse(OWN | {"sql": sql})).reverse is not None


UPDATE: dict[str, Any] = MAPPING | {"action": "update", "key": {"id": "detail.id"}, "set": {"a": "a", "b": "b"}}
RULES: dict[str, tuple[dict[str, Any], str]] = {
    "delta without before": ({"conflicts": {"policy": "delta"}}, "name its value under conflicts.before"),
    "merge without before": ({"conflicts": {"policy": "merge_columns"}}, "by who changed them"),
    "no version": ({"conflicts": {"policy": "version_wins"}}, "no version to compare"),
    "a strange column": (
        {"conflicts": {"policy": "reject", "groups": [{"columns": "c", "policy": "new_wins"}]}}, "groups c",
    ),
    "two groups": (
        {"conflicts": {"policy": "reject", "groups": [{"columns": "a"}, {"columns": ["a", "b"]}]}}, "in two groups",
    ),
    "before of an insert": (
        {"action": "insert", "key": {}, "conflicts": {"policy": "reject", "before": {"a": "a"}}}, "an insert has not",
    ),
    "merged deletion": (
        {"action": "delete", "set": {}, "conflicts": {"policy": "merge_columns", "before": {"a": "a"}}},
        "a delete has none",
    ),
    "of SQL": (
        {"into": None, "action": None, "key": {}, "set": {}, "sql": "SELECT 1", "owner": "legacy"},
        "takes no owner or conflicts",
    ),
    "beside statements": (
        {"into": None, "action": None, "key": {}, "set": {}, "owner": "legacy", "statements": [
            {"into": "a.b", "action": "delete", "key": {"id": "id"}}]},
        "has owner beside statements",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", RULES)
def test_rules_that_contradict_their_statement(case: str) -> None:
    change, said = RULES[case]
    found = problems(reverse(UPDATE | change))
    assert any(said in f"{it.what}; {it.remedy}" for it in found.values()), found


@pytest.mark.parametrize(
    "group",
    [
        {"columns": ["a", "b"], "sql": "1"},
        {"columns": "a", "sql": "1", "policy": "delta"},
        {"columns": "a", "owner": "legacy", "policy": "new_wins"},
        {"columns": []},
    ],
)
def test_groups_that_contradict_themselves(group: dict[str, Any]) -> None:
    assert problems(reverse(UPDATE | {"conflicts": {"policy": "reject", "groups": [group]}}))


def test_what_belongs_to_the_legacy_system_has_rules() -> None:
    section = MappingSection.model_validate(UPDATE | {"owner": "legacy"})
    assert section.rules is not None
    assert section.rules.policy == "legacy_wins"
    assert MappingSection.model_validate(UPDATE).rules is None


# --- URLs


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:4566 ", "is not a URL"),
        (" http://127.0.0.1:4566", "is not a URL"),
        ("http://127.0.0.1:99999", "is not a URL"),
        ("http://[::1", "is not a URL"),
        ("http://", "is not a URL"),
        ("sqs.eu-west-1.amazonaws.com", "is not a URL"),
        ("http://AKIA:secret@127.0.0.1:4566", "holds a user or a password"),
        ("http://secret@127.0.0.1:4566/q", "holds a user or a password"),
    ],
)
def test_a_url_that_no_client_can_use_or_no_log_may_show(url: str, said: str) -> None:
    found = problems(tree(forward={"sink": {"type": "sqs", "queue_url": url, "endpoint_url": url}}))
    assert {"forward.sink.queue_url", "forward.sink.endpoint_url"} == found.keys()
    for problem in found.values():
        assert said in problem.what
        assert "secret" not in str(problem)


def test_a_url_of_an_emulator_or_an_ipv6_address() -> None:
    for url in (
        "http://localhost:4566/000000000000/q",
        "https://[::1]:4566",
        "https://sqs.eu-west-1.amazonaws.com/1/q",
    ):
        assert parse(tree(forward={"sink": {"type": "sqs", "queue_url": url, "endpoint_url": url}}))


# --- ends that are files

FILE, BUS = {"type": "file", "path": "a/../one"}, {"type": "local", "path": "one"}
RELAY = {"source": {"type": "local", "path": "bus"}, "sink": {"type": "stdout"}, "contracts": "contracts"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"relay": RELAY | {"sink": FILE, "quarantine": FILE}}, "relay.sink and relay.quarantine are one file"),
        ({"relay": RELAY | {"sink": BUS, "dead-letters": FILE}}, "relay.sink and relay.dead-letters"),
        ({"forward": {"sink": FILE, "dead-letters": FILE}}, "forward.sink and forward.dead-letters"),
        ({"forward": {"sink": FILE, "contracts": {"path": "c", "quarantine": FILE}}}, "forward.contracts.quarantine"),
        ({"forward": {"sink": BUS}, "relay": RELAY | {"sink": FILE, "quarantine": BUS}}, "forward.sink and relay.sink"),
    ],
)
def test_two_ends_that_would_wait_for_one_file(sections: dict[str, Any], said: str) -> None:
    (problem,) = problems(tree(**sections)).values()
    assert said in problem.what
    assert problem.remedy


def test_ends_that_may_share_a_file(tmp_path: Path) -> None:
    assert parse(tree(forward={"sink": BUS, "dead-letters": FILE | {"path": "l"}},
                      relay=RELAY | {"source": BUS, "sink": BUS, "dead-letters": FILE | {"path": "l"}}))  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path / "one")
    two = [{"type": "file", "path": str(tmp_path / name)} for name in ("one", "link")]
    assert problems(tree(forward={"sink": two[0], "dead-letters": two[1]}))
