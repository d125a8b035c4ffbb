"""One horizontal axis for all charts of a page, so that what lies above each other happened together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from x1_pretrain.report.blocks import Block, Chart, Folded, Section, Views


def aligned(sections: Sequence[Section]) -> list[Section]:
    """From zero to the furthest that any curve goes; a chart that chose a part or a logarithm keeps it."""
    charts = [chart for section in sections for chart in _charts(section.blocks)]
    ends = [float(curve.x.max()) for chart in charts for curve in chart.curves if len(curve.x)]
    if not ends or max(ends) <= 0:
        return list(sections)
    return [replace(section, blocks=_framed(section.blocks, max(ends))) for section in sections]


def _charts(blocks: Sequence[Block]) -> Iterator[Chart]:
    for block in blocks:
        if isinstance(block, Chart):
            yield block
        elif isinstance(block, Views):
            yield from (chart for _, chart in block.views)
        elif isinstance(block, Folded):
            yield from _charts(block.blocks)


def _framed(blocks: Sequence[Block], end: float) -> list[Block]:
    return [_block(block, end) for block in blocks]


def _block(block: Block, end: float) -> Block:
    if isinstance(block, Chart):
        return _chart(block, end)
    if isinstance(block, Views):
        return replace(block, views=[(name, _chart(chart, end)) for name, chart in block.views])
    if isinstance(block, Folded):
        return replace(block, blocks=_framed(block.blocks, end))
    return block


def _chart(chart: Chart, end: float) -> Chart:
    if chart.x_log or (chart.x_range is not None and chart.x_range[0] > 0):
        return chart
    return replace(chart, x_range=(0.0, end))
