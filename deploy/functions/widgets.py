"""Service B: valid events become rows of a DynamoDB table, and counts that are never behind them.

An AWS Lambda function; event source is an SQS queue, target of a rule for ``valid.cwi.servicea``. AppSync reads the
table. One transaction writes the widget and raises the count of its kind, so a repeated event, whatever repeats it (the
bus, the queue, a replay of the archive), finds its widget and counts nothing.

    widget#abc123   one widget: widget_id, source, made_at, event_id
    total#widgets   how many there are
"""

import json
import logging
import os
from decimal import Decimal
from typing import Any

import boto3
from botocore.exceptions import ClientError

TABLE = "WIDGETS_TABLE"  # the variable with the table's name

_log = logging.getLogger(__name__)


def handler(event: dict[str, Any], _context: object, client: Any = None) -> dict[str, Any]:
    """``{"batchItemFailures": [...]}`` of an SQS event: what is in there, the queue delivers again.

    `client` is a DynamoDB client; by default one of boto3's usual chain.
    """
    client = client or _client()
    failed = []
    for record in event["Records"]:
        try:
            keep(client, json.loads(record["body"], parse_float=Decimal))
        except Exception:  # noqa: BLE001 (whatever it is, the others of the batch are not to blame)
            _log.exception("message %s is left for another try", record["messageId"])
            failed.append({"itemIdentifier": record["messageId"]})
    return {"batchItemFailures": failed}


def keep(client: Any, envelope: dict[str, Any]) -> bool:
    """Write the widget of an event and count it; False when it was there already."""
    detail = envelope["detail"]
    table = os.environ[TABLE]
    widget = {
        "pk": {"S": f"widget#{detail['widget_id']}"},
        "widget_id": {"S": detail["widget_id"]},
        "source": {"S": envelope["source"]},
        "made_at": {"S": envelope["time"]},
        # the id that every repetition has; the envelope's own is another one each time
        "event_id": {"S": detail["relayed"]["id"]},
    }
    new = {"TableName": table, "Item": widget, "ConditionExpression": "attribute_not_exists(pk)"}
    count = {
        "TableName": table,
        "Key": {"pk": {"S": "total#widgets"}},
        "UpdateExpression": "ADD #count :one",
        "ExpressionAttributeNames": {"#count": "count"},
        "ExpressionAttributeValues": {":one": {"N": "1"}},
    }
    try:
        client.transact_write_items(TransactItems=[{"Put": new}, {"Update": count}])
    except ClientError as error:
        reasons = [it.get("Code") for it in error.response.get("CancellationReasons", [])]
        if reasons[:1] == ["ConditionalCheckFailed"]:
            return False
        raise
    return True


def _client() -> Any:
    global _kept  # noqa: PLW0603 (Lambda keeps a module from one event to the next)
    if _kept is None:
        _kept = boto3.client("dynamodb")
    return _kept


_kept: Any = None
