"""Typed result files, each defined by one pydantic model.

    class Timing(Record):
        file = "timing.json"
        version: int = 1

        milliseconds: float

A record has a version; one from a newer mqa-hf is refused, and one without a version has version 1. Unknown fields are
ignored. Missing fields and those of the wrong type are named in one message with the file.
"""

import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import MQAError, listing
from .files import read_json, write_whole

T = TypeVar("T", bound="Record")


class Record(BaseModel):
    """Base class of result files."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="null", protected_namespaces=())

    file: ClassVar[str]
    version: int = 1

    @classmethod
    def of(cls: type[T], content: dict[str, Any], where: str) -> T:
        """Parse a JSON object; `where` names it in messages.

        Raises:
            MQAError: naming the fields that are missing or have the wrong type.
        """
        known, found = cls.model_fields["version"].default, content.get("version", 1)
        if isinstance(found, int) and found > known:
            raise MQAError(
                f"{where} has version {found}, but this mqa-hf reads {known} at most; update mqa-hf to read it"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            problems = [
                f"{'.'.join(map(str, e['loc'])) or 'the whole'}: {e['msg'][:1].lower()}{e['msg'][1:]}"
                for e in error.errors()
            ]
            raise MQAError(f"{where} is not a valid {cls.file}: {listing(problems, 4)}") from error

    @classmethod
    def read(cls: type[T], path: Path) -> T:
        """Read from a file, or from the record's file in a directory.

        Raises:
            MQAError: if there is no valid record.
        """
        path = path / cls.file if path.is_dir() else path
        return cls.of(read_json(path), str(path))

    def write(self, path: Path) -> None:
        """Write atomically to a file, or to the record's file in a directory."""
        path = path / self.file if path.is_dir() else path
        write_whole(path, self.to_json() + "\n")

    def append(self, path: Path) -> None:
        """Append the record as a JSON line to a file; raise MQAError if it cannot be written."""
        line = json.dumps(self.model_dump(exclude_none=True), ensure_ascii=False)
        try:
            with path.open("a", encoding="utf-8") as lines:
                lines.write(line + "\n")
        except OSError as error:
            raise MQAError(f"{path} cannot be written: {error}") from error

    def to_json(self, indent: int | None = 2) -> str:
        """Convert to JSON; NaN and infinity become null."""
        return json.dumps(self.model_dump(mode="json", exclude_unset=False), indent=indent, ensure_ascii=False)
