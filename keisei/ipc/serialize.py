"""Turn values into frames and back, without torch's own tensor sharing.

torch pickles a tensor through a queue as a descriptor that needs a living producer. Here a tensor
inside a value travels as plain bytes, so a frame stays readable after its sender died. A small
value is one pickle; ``pickling`` has what large ones need.
"""

from __future__ import annotations

import dis
import functools
import pickle
import signal
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from keisei.exceptions import SerializationError
from keisei.ipc import failures, pickling
from keisei.ipc.pickling import PROTOCOL
from keisei.ipc.sizes import LARGE, is_large
from keisei.ipc.wire import Payload

T = TypeVar("T")

_PLAIN = frozenset({type(None), bool, int, float})
"""Types of which nothing inside could be large or a tensor."""
_TEXT = frozenset({str, bytes})
_RAISE = dis.opmap["RAISE_VARARGS"]


def dumps(value: Any, what: str = "value") -> Payload:
    """Pickle ``value``, tensors as plain bytes.

    Args:
        value: Anything picklable. Tensors of any device and dtype are copied; they arrive on
            the CPU, contiguous and without a graph. Parameters stay parameters.
        what: Names the value in the error.

    Returns:
        One pickle; or the parts of a large value, which keep no reference to anything that can
        still change.

    Raises:
        SerializationError: If it cannot be pickled; its ``__reduce__`` may raise anything.
    """
    kind = type(value)
    if kind in _PLAIN or (kind in _TEXT and len(value) <= LARGE):
        return pickle.dumps(value, PROTOCOL)
    dump = pickling.dump_large if is_large(value) else pickling.dump
    return _packed(dump, value, what)


def dumps_whole(value: Any, what: str = "value") -> bytes:
    """Do as ``dumps``, but return one pickle however large it is, for those who look into it."""
    return _packed(pickling.dump, value, what)


def _packed(dump: Callable[[Any], T], value: Any, what: str) -> T:
    try:
        return dump(value)
    except BaseException as error:
        if _is_from_a_signal(error):
            raise
        reason = failures.summary(error)
        raise SerializationError(f"{what} cannot be pickled ({reason})") from error


def loads(data: Payload | bytearray, what: str = "value") -> Any:
    """Undo ``dumps``, also where the parts of a large value stand one behind the other.

    Tensors and arrays of a large value are views of ``data``, which they keep alive, where it can
    be written to; they are copies where it cannot.

    Raises:
        SerializationError: If it cannot be rebuilt here, whatever was raised by the value: also
            SystemExit or KeyboardInterrupt. A Ctrl-C that comes meanwhile passes through.
    """
    try:
        if isinstance(data, tuple):
            data = b"".join(data)
        if len(data) > LARGE or data[:1] == pickling.LARGE_MARK:
            return pickling.load_large(memoryview(data).cast("B"))
        return pickle.loads(data)
    except BaseException as error:
        if _is_from_a_signal(error):
            raise
        reason = failures.summary(error)
        raise SerializationError(f"{what} cannot be unpickled ({reason})") from error


def _is_from_a_signal(error: BaseException) -> bool:
    """Tell the user's Ctrl-C from a KeyboardInterrupt that a value raises.

    The former comes from the handler of the signal: one in Python is in the traceback, and the one
    in C leaves no ``raise`` where the traceback ends.
    """
    if not isinstance(error, KeyboardInterrupt):
        return False
    if threading.current_thread() is not threading.main_thread():
        return False  # signals are handled in the main thread alone
    handler: Any = signal.getsignal(signal.SIGINT)
    if isinstance(handler, functools.partial):
        handler = handler.func
    code = getattr(handler, "__code__", None)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        if trace.tb_next is None:
            return trace.tb_frame.f_code.co_code[trace.tb_lasti] != _RAISE
        trace = trace.tb_next
    return True


__all__ = ["LARGE", "PROTOCOL", "dumps", "dumps_whole", "is_large", "loads"]
