"""The report of `check_shards`: one HTML page that needs no other file, and the same for programs."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from data_tools.check_statistics import Checked, Histogram, Sample
from data_tools.shard_writing import replacing
from kontext_train.data.shard import IMAGE_FORMATS

_THUMBNAIL_SIDE = 168
_SHOWN_SAMPLES, _SHOWN_GROUPS, _SHOWN_OF_GROUP, _SHOWN_IDENTICAL, _SHOWN_BROKEN = 24, 12, 4, 12, 200
_SHOWN_CHARACTERS = 200
_BLUE, _GREY = "#2563a8", "#666666"

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1d1d1f; background: #f5f5f4; margin: 0; }
main { max-width: 1180px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 36px 0 10px; }
.note { color: #666; margin: 0 0 12px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 18px; }
.tile { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 10px 16px; min-width: 110px; }
.tile b { display: block; font-size: 22px; font-weight: 600; } .tile span { color: #666; }
.bad b { color: #b3261e; } .good b { color: #1b7f3b; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(350px, 1fr)); gap: 12px; }
.plots img { width: 100%; background: #fff; border: 1px solid #ddd; border-radius: 8px; box-sizing: border-box; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; align-items: stretch; }
.card { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 10px; }
.card .row { display: flex; gap: 6px; align-items: flex-end; } figure { margin: 0; }
.card img { display: block; border-radius: 3px; } figcaption { color: #666; font-size: 12px; }
.card p { margin: 8px 0 0; max-width: 100%; overflow-wrap: anywhere; } .card { max-width: 720px; }
.place { color: #666; font-size: 12px; overflow-wrap: anywhere; } .none { color: #999; font-style: italic; }
.group { background: #fff; border: 1px solid #ddd; border-radius: 8px; padding: 10px; }
.groups { display: grid; grid-template-columns: repeat(auto-fill, minmax(550px, 1fr)); gap: 12px; }
.group .row { display: flex; flex-wrap: wrap; gap: 16px; } .group figure { width: 168px; overflow-wrap: anywhere; }
table { border-collapse: collapse; background: #fff; width: 100%; }
td, th { border: 1px solid #ddd; padding: 5px 9px; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { background: #eee; font-weight: 600; } td:first-child { width: 1%; white-space: nowrap; }
td.number { text-align: right; }
"""


def write_report(checked: Checked, out: Path, duplicate_distance: int, t5_tokens: int | None) -> dict[str, Any]:
    """Writes report.html, report.json and the three lists to `out`. Returns what report.json holds."""
    groups = checked.duplicates(duplicate_distance)
    histograms = checked.histograms()
    report = {
        "folder": str(checked.folder.absolute()),
        "shards": len(checked.files),
        "samples": len(checked),
        "broken": len(checked.broken),
        "duplicates": sum(len(group) - 1 for group in groups),
        "duplicate_groups": len(groups),
        "duplicate_distance": duplicate_distance,
        "one_colour": checked.number["target_hash"].null_count,
        "identical": len(checked.identical),
        "prompts": checked.prompts(t5_tokens),
        "histograms": {name: histogram.to_json() for name, histogram in histograms.items()},
    }
    identical = [sample.place() for sample in checked.samples(checked.identical.tolist())]
    _write_lines(out / "broken.jsonl", checked.broken)
    _write_lines(out / "duplicates.jsonl", checked.duplicate_lines(groups))
    _write_lines(out / "identical.jsonl", identical)
    with replacing(out / "report.json") as file:
        file.write(json.dumps(report, indent=2, ensure_ascii=False).encode())
    page = _page(checked, report, histograms, [group.tolist() for group in groups])
    with replacing(out / "report.html") as file:
        file.write(page.encode(errors="replace"))  # a member's name may hold bytes that are no UTF-8
    return report


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    with replacing(path) as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in lines)


def _page(checked: Checked, report: dict[str, Any], histograms: dict[str, Histogram], groups: list[list[int]]) -> str:
    thumbnails = _Thumbnails(checked.folder)
    sections = [
        _tiles(report),
        _plots(checked, histograms),
        _prompts(report["prompts"]),
        _broken(checked.broken),
        _duplicates(checked, report, groups, thumbnails),
        _identical(checked, thumbnails),
        _samples(checked, thumbnails),
    ]
    title = f"Shards in {escape(report['folder'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
        f"<body><main><h1>{title}</h1>\n{''.join(sections)}</main></body></html>\n"
    )


def _tiles(report: dict[str, Any]) -> str:
    def tile(name: str, label: str, kind: str = "") -> str:
        return f'<div class="tile {kind}"><b>{report[name]:,}</b><span>{label}</span></div>'

    tiles = [
        tile("samples", "good samples"),
        tile("shards", "shards"),
        tile("broken", "broken", "bad" if report["broken"] else "good"),
        tile("duplicates", "look like an earlier one"),
        tile("identical", "target is a context"),
        tile("one_colour", "of one colour"),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>\n'


def _plots(checked: Checked, histograms: dict[str, Histogram]) -> str:
    if len(checked) == 0:
        return ""
    pictures = [_size_plot(checked)]
    pictures += [_bar_plot(name, _labels(name, histogram), histogram.counts) for name, histogram in histograms.items()]
    images = "".join(f'<img alt="" src="data:image/png;base64,{picture}">' for picture in pictures)
    return f'<h2>Distributions</h2>\n<div class="plots">{images}</div>\n'


def _labels(name: str, histogram: Histogram) -> list[str]:
    """What each bar counts."""
    edges = histogram.edges
    match name:
        case "target pixels":
            sides = [round((edge - 1) ** 0.5) for edge in edges]
            return [*(f"≤{side}²" for side in sides), f">{sides[-1]}²"]
        case "context images":
            return [str(number) for number in range(len(histogram.counts))]
        case "target width / height":
            texts = [f"{edge:.2f}".rstrip("0").rstrip(".") for edge in edges]
        case _:
            texts = [str(int(edge)) for edge in edges]
    return [f"<{texts[0]}", *(f"{low}–{high}" for low, high in pairwise(texts)), f"≥{texts[-1]}"]


def _size_plot(checked: Checked) -> str:
    height, width = checked.array("height"), checked.array("width")
    sizes, counts = np.unique(np.stack([width, height]), axis=1, return_counts=True)
    figure = Figure(figsize=(4.6, 3.1), layout="constrained")
    axes = figure.subplots()
    area = 8 + 150 * counts / counts.max()
    axes.scatter(sizes[0], sizes[1], s=area, color=_BLUE, alpha=0.6, linewidths=0)
    limits = (0, 1.1 * max(width.max(), height.max()))
    axes.plot(limits, limits, color=_GREY, linewidth=0.6, linestyle="--")
    axes.set(title="target size (area: how many)", xlabel="width, pixels", ylabel="height, pixels")
    axes.set(xlim=limits, ylim=limits)
    return _png(figure)


def _bar_plot(name: str, labels: Sequence[str], counts: Sequence[int]) -> str:
    figure = Figure(figsize=(4.6, 3.1), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(range(len(counts)), counts, color=_BLUE)
    axes.bar_label(bars, [f"{count:,}" if count else "" for count in counts], fontsize=7, color=_GREY)
    axes.set_xticks(range(len(labels)), labels, rotation=45 if len(labels) > 6 else 0, fontsize=8)
    axes.set(title=name, ylabel="samples")
    return _png(figure)


def _png(figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize(11)
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    return base64.b64encode(file.getvalue()).decode()


def _prompts(prompts: dict[str, Any]) -> str:
    def quantiles(values: dict[str, int]) -> str:
        return ", ".join(
            f"{name} {values[name]:,}" for name in ("least", "median", "p95", "p99", "most") if name in values
        )

    rows = [
        ("different prompts", f"{prompts['different']:,}"),
        ("empty", f"{prompts['empty']:,}"),
        ("not readable (no JSON, not UTF-8, no prompt)", f"{prompts['broken']:,}"),
        ("characters", quantiles(prompts["characters"])),
    ]
    if tokens := prompts.get("t5_tokens"):
        rows.append(("T5 tokens", quantiles(tokens)))
        rows.append((f"longer than {tokens['limit']:,} tokens, cut in training", f"{tokens['cut']:,}"))
    repeated = "".join(
        f'<tr><td class="number">{entry["times"]:,} ×</td><td>{_prompt(entry["prompt"])}</td></tr>'
        for entry in prompts["most_repeated"]
    )
    table = "".join(f"<tr><td>{name}</td><td>{value}</td></tr>" for name, value in rows)
    most = f'<p class="note" style="margin-top:12px">Repeated most:</p><table>{repeated}</table>' if repeated else ""
    return f"<h2>Prompts</h2>\n<table>{table}</table>{most}\n"


def _prompt(text: str) -> str:
    shown = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…"
    return escape(shown) if shown else '<span class="none">empty</span>'


def _more(shown: int, total: int, file: str) -> str:
    return f'<p class="note">{shown:,} of {total:,}; all are in {file}</p>' if total > shown else ""


def _broken(broken: list[dict[str, str]]) -> str:
    if not broken:
        return ""
    rows = "".join(
        f"<tr><td>{escape(problem['shard'])}</td><td>{escape(problem['key'])}</td><td>{escape(problem['reason'])}</td></tr>"
        for problem in broken[:_SHOWN_BROKEN]
    )
    note = _more(_SHOWN_BROKEN, len(broken), "broken.jsonl")
    return f"<h2>Broken</h2>\n{note}<table><tr><th>shard</th><th>key</th><th>reason</th></tr>{rows}</table>\n"


def _duplicates(checked: Checked, report: dict[str, Any], groups: list[list[int]], thumbnails: "_Thumbnails") -> str:
    if not groups:
        return ""
    parts = []
    for group in groups[:_SHOWN_GROUPS]:
        figures = "".join(
            f"<figure>{thumbnails.target(sample)}<figcaption>{_place(sample)}<br>{_prompt(sample.prompt)}</figcaption></figure>"
            for sample in checked.samples(group[:_SHOWN_OF_GROUP])
        )
        parts.append(
            f'<div class="group"><p class="note">{len(group):,} targets</p><div class="row">{figures}</div></div>'
        )
    bits = report["duplicate_distance"]
    text = f"Targets whose perceptual hashes differ in at most {bits} of 64 bits, largest groups first."
    note = _more(_SHOWN_GROUPS, len(groups), "duplicates.jsonl")
    return f'<h2>Look alike</h2>\n<p class="note">{text}</p>{note}<div class="groups">{"".join(parts)}</div>\n'


def _identical(checked: Checked, thumbnails: "_Thumbnails") -> str:
    if len(checked.identical) == 0:
        return ""
    note = _more(_SHOWN_IDENTICAL, len(checked.identical), "identical.jsonl")
    cards = _cards(checked.samples(checked.identical[:_SHOWN_IDENTICAL].tolist()), thumbnails)
    text = "Pixel for pixel: such an edit teaches to change nothing."
    return f'<h2>Target is a context image</h2>\n<p class="note">{text}</p>{note}{cards}\n'


def _samples(checked: Checked, thumbnails: "_Thumbnails") -> str:
    if len(checked) == 0:
        return ""
    numbers = np.unique(np.linspace(0, len(checked) - 1, _SHOWN_SAMPLES).round().astype(int)).tolist()
    cards = _cards(checked.samples(numbers), thumbnails)
    return f'<h2>Samples</h2>\n<p class="note">Evenly over all shards.</p>{cards}\n'


def _cards(samples: Sequence[Sample], thumbnails: "_Thumbnails") -> str:
    cards = []
    for sample in samples:
        contexts = "".join(
            f"<figure>{image}<figcaption>context {number}</figcaption></figure>"
            for number, image in enumerate(thumbnails.contexts(sample))
        )
        target = f"<figure>{thumbnails.target(sample)}<figcaption>target</figcaption></figure>"
        width = 20 + (_THUMBNAIL_SIDE + 6) * (1 + len(sample.contexts))
        cards.append(
            f'<div class="card" style="width:{width}px"><div class="row">{contexts}{target}</div>'
            f"<p>{_prompt(sample.prompt)}</p>{_place(sample)}</div>"
        )
    return f'<div class="cards">{"".join(cards)}</div>'


def _place(sample: Sample) -> str:
    return f'<span class="place">{escape(sample.shard)} · {escape(sample.key)}</span>'


class _Thumbnails:
    """Small pictures as HTML, read again from the shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def target(self, sample: Sample) -> str:
        return self._image(sample, sample.target)

    def contexts(self, sample: Sample) -> list[str]:
        return [self._image(sample, span) for span in sample.contexts]

    def _image(self, sample: Sample, span: Sequence[int]) -> str:
        with open(self.folder / sample.shard, "rb") as file:
            file.seek(span[0])
            raw = file.read(span[1])
        with Image.open(io.BytesIO(raw), formats=IMAGE_FORMATS) as encoded:
            image = ImageOps.exif_transpose(encoded).convert("RGB")
        image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        file_bytes = io.BytesIO()
        image.save(file_bytes, "JPEG", quality=82)
        data = base64.b64encode(file_bytes.getvalue()).decode()
        return f'<img alt="" width="{image.width}" height="{image.height}" src="data:image/jpeg;base64,{data}">'
