"""What a setting may be: the types of the file's fields, with their checks.

A check's message has two parts, ``what is wrong; what to do``, and repeats no value that may be a password.
"""

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Annotated, ClassVar, Final
from urllib.parse import urlsplit

import jmespath
import jmespath.exceptions
import psycopg
from psycopg import conninfo
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, WithJsonSchema

from figbridge.config.dsn import faults

# figbridge.legacy.SCHEMA, which configuration may not import: both stand in one layer
_OUR_SCHEMA: Final = "figbridge"

_IDENTIFIER = r'(?:"(?:[^"]|"")+"|[A-Za-z_][A-Za-z0-9_$]*)'
_TABLE = re.compile(rf"({_IDENTIFIER})\.({_IDENTIFIER})")


class Section(BaseModel):
    """A part of the file. Unknown keys are errors: a misspelt option must not be a silent default.

    Its validator is made when it is first asked: a section that is a part of another one is made with that.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, defer_build=True
    )


def split_table(text: str) -> tuple[str, str]:
    """The (schema, table) of ``schema.table``, as the catalogue spells them. Raises ValueError.

    SQL's rule holds: what is not in double quotes is folded to lower case.
    """
    match = _TABLE.fullmatch(text)
    if match is None:
        raise ValueError(f'{text!r} is not of the form schema.table (quote odd names: "My Schema"."T")')
    schema, table = (part[1:-1].replace('""', '"') if part.startswith('"') else part.lower() for part in match.groups())
    return schema, table


def _legacy_table(text: str) -> str:
    try:
        schema, _ = split_table(text)
    except ValueError:
        raise ValueError('is not of the form schema.table; quote odd names: "My Schema"."T"') from None
    if schema == _OUR_SCHEMA:
        # published, our own bookkeeping would be events; and the loop guard relies on its being elsewhere
        raise ValueError(f"the schema {_OUR_SCHEMA} is the bridge's own; name tables of the legacy application")
    return text


def _different(tables: tuple[str, ...]) -> tuple[str, ...]:
    first: dict[tuple[str, str], str] = {}
    for table in tables:
        if (earlier := first.setdefault(split_table(table), table)) is not table:
            same = "is there twice" if earlier == table else f"is the same table as {earlier!r}"
            raise ValueError(f"{table!r} {same}; list each table once")
    return tables


def check_path(text: str) -> str:
    """`text`, if it is JMESPath."""
    try:
        jmespath.compile(text)
    except jmespath.exceptions.JMESPathError as error:
        # its second and third line draw an arrow, which a log line tears apart
        reason = str(error).partition("\n")[0].removesuffix(":").removesuffix(", for expression")
        raise ValueError(
            f"not a JMESPath expression ({reason}); a path such as detail.order_id, a constant such as 'paid' "
            "with its single quotes (in YAML: \"'paid'\")"
        ) from error
    return text


_ESCAPE: Final = "in a URL write special characters of a password as %XX (@ is %40, / is %2F, % is %25)"


def _conninfo(dsn: SecretStr) -> SecretStr:
    # libpq's own words quote the part they could not read, and that is where an unescaped password is
    try:
        known = conninfo.conninfo_to_dict(dsn.get_secret_value())
    except psycopg.ProgrammingError:
        raise ValueError(
            f"libpq cannot read it as a connection string; {_ESCAPE}, in the key=value form put the value in "
            "single quotes"
        ) from None
    if not known:
        raise ValueError("is empty; such as postgresql://user:password@host:5432/database")
    if "replication" in known:
        raise ValueError("has the parameter replication; remove it, the bridge adds it where it belongs")
    if wrong := ", ".join(faults(dsn.get_secret_value(), known)):
        raise ValueError(f"cannot be meant: {wrong}; mend it. {_ESCAPE}")
    return dsn


def template(*names: str) -> Callable[[str], str]:
    """A check that a text is a template of exactly these names: no conversions, formats, attributes or indexes."""
    known = ", ".join(f"{{{name}}}" for name in names)

    def check(text: str) -> str:
        try:
            parts = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(f"is not a template ({error}); write a literal brace twice") from error
        for _, name, form, conversion in parts:
            if name is not None and (name not in names or form or conversion):
                raise ValueError(f"has the placeholder {{{name}}}; there are {known}, without formats or conversions")
        if not text.strip():
            raise ValueError("is empty; EventBridge refuses an event without it")
        return text

    return check


def not_aws(text: str) -> str:
    """An event's source, or the template of one."""
    if text.startswith("aws."):
        raise ValueError("must not begin with 'aws.'; EventBridge keeps that for itself")
    return text


def _slot(text: str) -> str:
    if re.fullmatch(r"[a-z0-9_]{1,63}", text) is None:  # ReplicationSlotValidateName in the server's slot.c
        raise ValueError("is not a slot's name; lower-case letters, digits and _ only, at most 63")
    return text


def client_is_installed(name: str) -> str:
    """The AWS Common Runtime is an extra."""
    if name == "crt" and importlib.util.find_spec("awscrt") is None:
        raise ValueError("needs the AWS Common Runtime; pip install 'figbridge[crt]', or set client: boto3")
    return name


def _url(text: str, remedy: str) -> str:
    """A URL of HTTP that a client can use, and a log can show."""
    try:
        parts = urlsplit(text)
        known = parts.scheme in {"https", "http"} and parts.hostname and parts.port != 0
    except ValueError:  # a port that is none, half an IPv6 address
        known = False
    if not known or any(it.isspace() or not it.isprintable() for it in text):
        raise ValueError(f"is not a URL; {remedy}")
    if "@" in parts.netloc:
        raise ValueError(
            "holds a user or a password, which logs would show; take it out: credentials of AWS come from boto3's chain"
        )
    return text


def url_of_queue(text: str) -> str:
    """An SQS queue is named by its URL."""
    return _url(text, "give the queue's URL (aws sqs get-queue-url), not its name or ARN")


def url_of_endpoint(text: str | None) -> str | None:
    """Where a service answers."""
    return None if text is None else _url(text, "such as https://host:443, without a blank")


_NAME_OF_STREAM: Final = r"[a-zA-Z0-9_.-]{1,128}"


def name_of_stream(text: str) -> str:
    """A Kinesis data stream is named by its name or its ARN."""
    if re.fullmatch(rf"(arn:aws[^:]*:kinesis:[^:]*:\d{{12}}:stream/)?{_NAME_OF_STREAM}", text) is None:
        raise ValueError(
            "is not a stream; give its name (letters, digits, '_', '.', '-') or its ARN (arn:aws:kinesis:…:stream/name)"
        )
    return text


def name_of_delivery_stream(text: str) -> str:
    """A Firehose stream is named by its name alone; its API takes no ARN."""
    if re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", text) is None:
        raise ValueError(
            "is not a Firehose stream; give its name, at most 64 letters, digits, '_', '.', '-', not its ARN"
        )
    return text


def arn_of_topic(text: str) -> str:
    """An SNS topic is named by its ARN."""
    if re.fullmatch(r"arn:aws[^:]*:sns:[^:]+:\d{12}:[A-Za-z0-9_-]{1,256}(\.fifo)?", text) is None:
        raise ValueError("is not a topic; give its ARN (arn:aws:sns:region:account:name)")
    return text


def arn_of_bus(text: str) -> str:
    """A bus of eventbridgev2 is named by its ARN, which ends with an id that AWS gave it."""
    pattern = r"arn:aws[^:]*:events:[^:]+:\d{12}:event-busv2/[A-Za-z0-9][._A-Za-z0-9-]{0,255}/[a-z0-9]{25}"
    if re.fullmatch(pattern, text) is None:
        raise ValueError(
            "is not a Custom Event Bus; give its ARN (arn:aws:events:region:account:event-busv2/name/id). "
            "A bus of the Classic kind is for the sink type eventbridge"
        )
    return text


def _prefix(text: str) -> str:
    if text.startswith("figbridge."):
        raise ValueError("begins with figbridge., which is the bridge's own; choose another")
    if "*" in text:
        raise ValueError("holds a *; here only one prefix may stand, letter by letter")
    return text


def _prefix_or_beginning(text: str) -> str:
    if text != "*":  # every prefix but the bridge's own
        _prefix(text.removesuffix("*"))
    return text


def host_and_port(text: str) -> str:
    """host:port; an IPv6 address in brackets."""
    host, colon, port = text.rpartition(":")
    # without brackets nobody can tell where an IPv6 address ends: ::1:9464 is one, too
    bare = host.removeprefix("[").removesuffix("]")
    if not (colon and bare and port.isascii() and port.isdecimal()) or (":" in bare and host != f"[{bare}]"):
        raise ValueError("is not host:port; such as 127.0.0.1:9464, 0.0.0.0:9464 or [::1]:9464")
    if int(port) > 65535:
        raise ValueError("has no such port; 65535 is the last")
    return text


def _some_path(value: object) -> object:
    if value == "":
        raise ValueError("is empty; write the file's path")  # Path("") is the current directory
    return value


def _unset_if_empty(value: object) -> object:
    return None if value == "" else value  # region: "${AWS_REGION:-}" is how a file says: if there is one


def _strings(value: object) -> object:
    return [value] if isinstance(value, str) else value


TableName = Annotated[str, AfterValidator(_legacy_table)]
Tables = Annotated[tuple[TableName, ...], Field(min_length=1), AfterValidator(_different)]
JmesPath = Annotated[str, AfterValidator(check_path)]
OneOrMore = Annotated[
    tuple[str, ...],
    BeforeValidator(_strings),
    Field(min_length=1),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Dsn = Annotated[SecretStr, AfterValidator(_conninfo)]
TextOrUnset = Annotated[str | None, BeforeValidator(_unset_if_empty)]
FilePath = Annotated[Path, BeforeValidator(_some_path)]
Column = Annotated[str, Field(min_length=1)]
# Of logical messages: pg_logical_emit_message(transactional, prefix, content)
MessagePrefix = Annotated[str, Field(min_length=1), AfterValidator(_prefix)]
MessagePrefixes = Annotated[str, Field(min_length=1), AfterValidator(_prefix_or_beginning)]
SlotName = Annotated[str, AfterValidator(_slot), WithJsonSchema({"type": "string", "pattern": "^[a-z0-9_]{1,63}$"})]
