"""`mqa-hf report`: quality against speed on one page.

    mqa-hf evaluate ORIGINAL CONVERTED ... --text held-out.jsonl --output evaluation
    mqa-hf benchmark ORIGINAL CONVERTED ... --kv-heads original --engines mqa-hf --output benchmark.jsonl
    mqa-hf report evaluation --benchmark benchmark.jsonl --output report

writes `report/index.html`, which needs no network and no other file, its pictures as PNGs, and `report/report.json`.
What a checkpoint's `conversion.json` and `uptraining.json` say is in there too.
"""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from mqa_hf.base.errors import MQAError
from mqa_hf.base.options import Job, Option, function

if TYPE_CHECKING:
    from rich.console import Console

PAGE = "index.html"


@dataclass(frozen=True)
class Report(Job[Path]):
    """Show quality against speed on one page that needs no network.

    Returns:
        The page.

    Raises:
        MQAError: where there are no such results, or `output` holds something else.
    """

    name = "report"

    evaluation: Annotated[
        Path | str, Option("What `mqa-hf evaluate` has written: `evaluation.json` or its directory.")
    ]
    _: KW_ONLY
    benchmark: Annotated[
        Sequence[Path | str], Option("File that `mqa-hf benchmark` has written with an output; may be repeated.")
    ] = ()
    output: Annotated[Path | str, Option("Directory for the page and its pictures.")] = Path("report")
    title: Annotated[str | None, Option("Title of the page. Default: the name of the original.")] = None
    cards: Annotated[bool, Option("Put table and pictures into the model cards of converted checkpoints, too.")] = (
        False
    )

    def run(self) -> Path:
        try:
            from .report_data import read_results
            from .report_page import write_page
        except ImportError as error:
            raise MQAError(f"this needs {error.name}: pip install 'mqa-hf[benchmark]'") from error
        results = read_results(Path(self.evaluation), [Path(file) for file in self.benchmark])
        return write_page(results, Path(self.output), self.title, self.cards)

    def show(self, page: Path, console: "Console") -> None:
        console.print(str(page), soft_wrap=True)


report = function(Report)
