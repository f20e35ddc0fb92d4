"""Options of commands that upload their result to the Hub; `hub.py` has the functions."""

from dataclasses import KW_ONLY, dataclass
from typing import Annotated

from .errors import MQAError
from .options import Option, Options


@dataclass(frozen=True)
class Upload(Options, panel="Hub"):
    """Where the result is uploaded."""

    _: KW_ONLY
    push_to_hub: Annotated[str | None, Option("Repository to upload the result to.", recorded="never")] = None
    private: Annotated[bool, Option("Make a new repository private.", recorded="never")] = False

    def check_upload(self) -> None:
        """Raise MQAError for options that contradict each other."""
        if self.private and not self.push_to_hub:
            raise MQAError("`private` needs `push_to_hub`; name the repository to upload to")
