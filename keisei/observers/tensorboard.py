"""TensorBoardObserver: the figures of each update as curves; needs the extra ``tensorboard``."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

from keisei.events import Event, UpdateCompleted, WorkerIncident
from keisei.observers.background import BackgroundObserver
from keisei.observers.figures import figures_of
from keisei.observers.files import AppendedFile
from keisei.observers.missing import require

__all__ = ["TensorBoardObserver"]


class TensorBoardObserver(BackgroundObserver):
    """Writes scalars that ``tensorboard --logdir`` shows, with environment steps as the axis.

    Names are those of the learner's metrics, and "pool/…" and "episode/…" for the library's own.
    Incidents are a text, "pool/incidents". A thread writes; the loop never waits. A full disk
    costs the points for which there is no room, is told once, and leaves a file that can be read.

    Args:
        log_dir: A folder, which is made; each run adds a file of its own.
        max_pending: See ``BackgroundObserver``.

    Raises:
        ImportError: The extra is missing; names the command that installs it.
    """

    wanted = (UpdateCompleted, WorkerIncident)

    def __init__(self, log_dir: str | os.PathLike[str], *, max_pending: int = 10_000) -> None:
        require("tensorboard", "keisei.observers.tensorboard", "tensorboard", "tensorboard")
        super().__init__(max_pending=max_pending)
        self._folder = Path(log_dir).absolute()
        self._file: AppendedFile | None = None
        self._num_steps = 0
        self._runs = 0

    @property
    def target(self) -> str:
        """The folder."""
        return f"TensorBoard's folder {self._folder}"

    def open(self) -> None:
        """Begin a file of events."""
        from tensorboard.compat.proto.event_pb2 import Event as Record

        self._runs += 1
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendedFile(self._folder / f"{name}.{self._runs}")
        try:
            self._append(Record(wall_time=time.time(), file_version="brain.Event:2"))
        except OSError:
            self.close()
            raise

    def write(self, event: Event) -> None:
        """Append the points of one update, or the text of one incident."""
        from tensorboard.compat.proto.event_pb2 import Event as Record
        from tensorboard.compat.proto.summary_pb2 import Summary

        if isinstance(event, UpdateCompleted):
            self._num_steps = event.num_steps
            values = [
                Summary.Value(tag=name, simple_value=value)
                for name, value in figures_of(event).items()
            ]
            summary = Summary(value=values)
        else:
            assert isinstance(event, WorkerIncident)  # noqa: S101 - what is wanted
            summary = _text_of("pool/incidents", event.incident.summary)
        self._append(Record(wall_time=event.time, step=self._num_steps, summary=summary))

    def _append(self, record: Any) -> None:
        import io

        from tensorboard.summary.writer.record_writer import RecordWriter

        framed = io.BytesIO()
        RecordWriter(framed).write(record.SerializeToString())
        if self._file is not None:
            self._file.append(framed.getvalue())

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _text_of(tag: str, text: str) -> Any:
    """Return a summary that TensorBoard shows as text."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    plugin = SummaryMetadata.PluginData(plugin_name="text")
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(
        dtype="DT_STRING", string_val=[text.encode("utf-8", "replace")], tensor_shape=shape
    )
    metadata = SummaryMetadata(plugin_data=plugin)
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
