"""Result files with a type: each is one model, read and written here alone.

    class Timing(Record):
        file = "timing.json"
        version: int = 1

        milliseconds: float

A record has the version of its layout. One that a newer mqa-hf has written is refused; one without a version is of
the first layout. Fields that a layout does not have are passed over. Those that are missing or of another type are
named in one message with the file.
"""

import json
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import MQAError, listing
from .files import read_json, write_whole

T = TypeVar("T", bound="Record")


class Record(BaseModel):
    """What a result file holds."""

    model_config = ConfigDict(extra="ignore", ser_json_inf_nan="null", protected_namespaces=())

    file: ClassVar[str]
    version: int = 1

    @classmethod
    def of(cls: type[T], content: dict[str, Any], where: str) -> T:
        """The record in a JSON object; `where` it stands is for messages.

        Raises:
            MQAError: naming the fields that are missing or of another type.
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
        """The record in a file, or in the file of its name in a directory.

        Raises:
            MQAError: where there is none, or it is no such record.
        """
        path = path / cls.file if path.is_dir() else path
        return cls.of(read_json(path), str(path))

    def write(self, path: Path) -> None:
        """Write it whole, or not at all, to a file, or to the file of its name in a directory."""
        path = path / self.file if path.is_dir() else path
        write_whole(path, self.to_json() + "\n")

    def to_json(self, indent: int | None = 2) -> str:
        """As JSON; what is no number is null, and what was never set is left out."""
        return json.dumps(self.model_dump(mode="json", exclude_unset=False), indent=indent, ensure_ascii=False)
