"""Sinks and sources of other packages: a section of the file that an entry point names.

    [project.entry-points."figbridge.sinks"]
    webhook = "figbridge_webhook:WebhookSection"

The section validates its own options, and its ``open`` makes the sink or source: docs/plugins.md.
"""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any, Final, Protocol, get_args, runtime_checkable

from pydantic import GetCoreSchemaHandler, ValidationError, ValidatorFunctionWrapHandler
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from figbridge.config.fields import Section

SINKS: Final = "figbridge.sinks"
SOURCES: Final = "figbridge.sources"


@runtime_checkable
class PluginSection(Protocol):
    """A section of another package: a subclass of `Section` that can do this. ``type`` is the entry point's name."""

    type: Any

    def open(self) -> Any:
        """The sink or source. Raises BridgeError with a hint."""


class OrPlugin:
    """In place of a union: the sections of `own`, or of an entry point of `group` whose name is the ``type``.

    Ours come first, so no package can take the place of one. A package is imported only if the file names its type.
    """

    def __init__(self, group: str, own: Any) -> None:
        self._group = group
        self._own = own
        union, *_ = get_args(own)
        self._names = {get_args(it.model_fields["type"].annotation)[0] for it in get_args(union)}

    def __get_pydantic_core_schema__(self, _source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(self._validate, handler.generate_schema(self._own))

    def _validate(self, value: Any, own: ValidatorFunctionWrapHandler) -> Any:
        name = value.get("type") if isinstance(value, Mapping) else None
        if not isinstance(name, str) or name in self._names:
            return own(value)
        section = self._section(name)
        return own(value) if section is None else _validated(section, value)

    def _section(self, name: str) -> type[Section] | None:
        found = list(entry_points(group=self._group, name=name))
        if not found:
            return None
        try:
            section = found[0].load()
        except Exception as error:  # whatever a foreign module raises when it is imported
            raise ValueError(
                f"the package of the type {name!r} cannot be imported ({type(error).__name__}: {error}); "
                f"mend or reinstall it"
            ) from error
        if not (isinstance(section, type) and issubclass(section, Section) and hasattr(section, "open")):
            raise ValueError(
                f"the entry point of the type {name!r} is no section with open(); tell its author of docs/plugins.md"
            )
        return section


def _validated(section: type[Section], value: Mapping[str, Any]) -> Section:
    try:
        return section.model_validate(value, by_alias=True, by_name=False)
    except ValidationError as error:
        # the file's own words for an unknown key look for the known ones in the schema, which has none of this section
        known = ", ".join(sorted(field.alias or name for name, field in section.model_fields.items()))
        unknown = PydanticCustomError("value_error", "unknown key; remove it; known here: {known}", {"known": known})
        raise ValidationError.from_exception_data(
            error.title,
            [
                InitErrorDetails(
                    type=unknown if it["type"] == "extra_forbidden" else PydanticCustomError(it["type"], it["msg"]),
                    loc=it["loc"],
                    input=it["input"],
                )
                for it in error.errors()
            ],
        ) from None
