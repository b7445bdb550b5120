"""Pages of reports, read as a browser does, and runs for them."""

import argparse
import html.parser
from pathlib import Path

from sclong_ds.report import arguments, report
from sclong_ds.run_folder.files import RunFolder
from sclong_ds.run_folder.record import RunRecord, read_run

NASTY = '<script>alert("x")</script>&'


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, its text and its table cells; checks that tags are closed."""

    VOID = frozenset({"meta", "img", "br", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [str(v) for k, v in attrs if k in ("src", "href", "srcset", "data")]
        if tag in ("td", "th"):
            self.cells.append("")
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.cells[-1] += data

    def value(self, name: str) -> str:
        return self.cells[self.cells.index(name) + 1]


def call(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser)
    return report.run(parser.parse_args(list(argv)))


def validated(folder: Path, **changes: float) -> RunRecord:
    """Return a run with one validation, whose strongest baseline is `linear`."""
    row = {
        "val/n_hidden": 90.0, "val/mse": 0.25, "val/strongest_mse": 0.2, "val/gene_mean/mse": 0.4,
        "val/linear/mse": 0.2, "val/linear/mse_several": 0.125, "val/mse/dataset/pbmc": 0.5,
        "val/linear/mse/dataset/pbmc": 0.75, "attention/mse": 0.4,
        "attention/decoder/mean_mse": 0.6, "attention/large_encoder/mean_mse": 0.402,
        "attention/large_encoder.1/eps_share": 0.9531, "attention/softmax_mse": 0.3,
    }  # fmt: skip
    with RunFolder(folder) as files:
        files.append_metrics(5, {"val/mse": 0.1, "val/baseline_mse": 0.5})
        files.append_metrics(10, row | changes)
    return read_run(folder)
