"""Pictures that need a library of their own: matplotlib's, and TensorBoard's curves."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import DNALError, reason, told

if TYPE_CHECKING:
    from .record import Report


def plot_widths(report: Report, path: str | os.PathLike[str]) -> None:
    """For ``report.plot_widths(path)``."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DNALError("plot_widths needs matplotlib: pip install matplotlib") from error
    groups = report.groups
    figure = Figure(figsize=(8, max(2.5, 0.2 * len(groups))), layout="constrained")
    axes = figure.add_subplot(xlabel="channels")
    places = range(len(groups))
    axes.barh(places, [g.units for g in groups], color="lightgrey", label="before")
    axes.barh(places, [g.kept for g in groups], color="tab:blue", label="after")
    axes.set_yticks(places, [g.name for g in groups], fontsize=8)
    axes.set_ylim(len(groups) - 0.5, -0.5)  # the first layer on top, no empty room
    figure.legend(loc="outside upper right", ncols=2)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # a ValueError: of a format that is none
        raise DNALError(f"{path} cannot be written: {reason(error)}") from error


def write_events(report: Report, folder: str | os.PathLike[str]) -> None:
    """For ``report.to_tensorboard(folder)``; TensorBoard's own writer, without torch."""
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise DNALError("to_tensorboard needs tensorboard: pip install tensorboard") from error
    with told(f"{folder} cannot be written", OSError):
        writer = EventFileWriter(os.fspath(folder))
    for entry in report.history:
        values = [
            Summary.Value(tag=f"search/{name}", simple_value=entry[name])
            for name in ("cost", "delta", "loss")
            if entry.get(name) is not None
        ]
        if entry.get("gates"):
            values.append(Summary.Value(tag="search/gates", histo=_histogram(entry["gates"])))
        writer.add_event(Event(wall_time=time.time(), step=entry["step"], summary=Summary(value=values)))
    writer.close()


def _histogram(counts: Sequence[int]) -> Any:
    """Counts in equal bins from 0 to 1, as TensorBoard has them."""
    from tensorboard.compat.proto.summary_pb2 import HistogramProto

    edges = [(i + 1) / len(counts) for i in range(len(counts))]
    middles = [edge - 0.5 / len(counts) for edge in edges]
    return HistogramProto(
        min=0.0,
        max=1.0,
        num=sum(counts),
        sum=sum(count * middle for count, middle in zip(counts, middles)),
        sum_squares=sum(count * middle**2 for count, middle in zip(counts, middles)),
        bucket_limit=edges,
        bucket=counts,
    )
