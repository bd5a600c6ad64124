"""What stands in deploy/ against the code: every file parses, every series exists, the example is a configuration."""

import re
from pathlib import Path

import pytest
import yaml
from prometheus_client import Counter, Histogram

from figbridge.config import Config, EventBridgeSinkSection, HttpSection, SqsSourceSection
from figbridge.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"


class _Tags(yaml.SafeLoader):
    """CloudFormation's short functions (!Ref, !Sub …) as their plain values."""


_Tags.add_multi_constructor("!", lambda _loader, _suffix, node: node.value)


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_file_is_yaml(path: Path) -> None:
    assert list(yaml.load_all(path.read_text(), _Tags))


def test_the_example_is_a_configuration() -> None:
    text = (DEPLOY / "examples" / "bridge.yaml").read_text()
    config = Config.parse(text, {"LEGACY_DSN": "host=db", "REVERSE_QUEUE": "https://sqs/queue"})
    assert config.forward
    assert isinstance(config.forward.sink, EventBridgeSinkSection)
    assert config.reverse
    assert isinstance(config.reverse.source, SqsSourceSection)
    assert {mapping.action for mapping in config.reverse.mappings} == {"insert", "update"}
    assert config.http == HttpSection()


def test_every_series_in_an_alert_exists() -> None:
    known = set()
    for metric in vars(Metrics()).values():
        if hasattr(metric, "_name"):
            known.add(metric._name + ("_total" if isinstance(metric, Counter) else ""))
            if isinstance(metric, Histogram):
                known |= {f"{metric._name}_{part}" for part in ("bucket", "count", "sum")}
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    assert rules
    for rule in rules:
        used = set(re.findall(r"\bfigbridge_\w+", rule["expr"]))
        assert used <= known, f"{rule['alert']} uses {used - known}"
        assert rule["annotations"]["description"]
