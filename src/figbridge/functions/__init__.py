"""The bridge's parts that AWS Lambda can run: one handler a file.

The configuration is the file of `figbridge run`; the variable FIGBRIDGE_CONFIG has its path, or the YAML itself. It is
read at the first event of an execution environment, where a failure is an error of the function.
"""

import os
from pathlib import Path

from figbridge.config import Config
from figbridge.errors import ConfigError, Problem

VARIABLE = "FIGBRIDGE_CONFIG"


def configuration() -> Config:
    """What FIGBRIDGE_CONFIG says. Raises ConfigError."""
    text = os.environ.get(VARIABLE, "")
    if not text.strip():
        problem = Problem(VARIABLE, "is not set", "give it the path of the configuration file, or the YAML itself")
        raise ConfigError("no configuration", [problem])
    if "\n" in text or text.lstrip().startswith("{"):
        return Config.parse(text, os.environ, name=VARIABLE)
    return Config.load(Path(text))
