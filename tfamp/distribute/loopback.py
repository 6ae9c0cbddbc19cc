"""Keeps the port of a one-machine job to that machine.

TensorFlow's gRPC server binds to all interfaces, whatever address the cluster
gives it, and has no option for another. Who reaches that port can run any
graph. Linux lets a process put a filter on its own socket, without privileges:
here one that drops what does not come from loopback before a connection is
made.
"""

import contextlib
import ctypes
import ipaddress
import os
import socket
import stat
import struct
import sys
from collections.abc import Iterator

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h; Python has no name for it.

# Classic BPF, linux/filter.h: (code, jump if true, jump if false, operand).
_LOAD_BYTE, _LOAD_WORD, _AND, _EQUAL, _RETURN = 0x30, 0x20, 0x54, 0x15, 0x06
_NETWORK_HEADER = -0x100000  # SKF_NET_OFF: offsets from the IP header on.
_SOURCE_IPV4, _SOURCE_IPV6 = _NETWORK_HEADER + 12, _NETWORK_HEADER + 8

# Jumps count the instructions to skip. The kernel itself drops packets from
# other machines that claim a loopback source.
_ACCEPT_LOOPBACK = (
    (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
    (_AND, 0, 0, 0xF0),
    (_EQUAL, 0, 2, 0x40),
    (_LOAD_BYTE, 0, 0, _SOURCE_IPV4),
    (_EQUAL, 9, 10, 127),
    (_EQUAL, 0, 9, 0x60),
    (_LOAD_WORD, 0, 0, _SOURCE_IPV6),
    (_EQUAL, 0, 7, 0),
    (_LOAD_WORD, 0, 0, _SOURCE_IPV6 + 4),
    (_EQUAL, 0, 5, 0),
    (_LOAD_WORD, 0, 0, _SOURCE_IPV6 + 8),
    (_EQUAL, 0, 3, 0),
    (_LOAD_WORD, 0, 0, _SOURCE_IPV6 + 12),
    (_EQUAL, 0, 1, 1),
    (_RETURN, 0, 0, 0xFFFFFFFF),
    (_RETURN, 0, 0, 0),
)


def is_loopback(host: str) -> bool:
    """Whether that name or address reaches this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def accept_loopback_only(port: int) -> bool:
    """Makes this process's server on `port` deaf to other machines.

    Connections that other machines opened before are closed.

    Args:
        port: the TCP port that a socket of this process listens on.

    Returns:
        Whether it holds: False where the system has no such filter (it is
        Linux's), or this process has no server on that port.
    """
    if not sys.platform.startswith("linux"):
        return False
    filtered = False
    for sock in _own_sockets():
        with sock, contextlib.suppress(OSError):
            if sock.getsockname()[1] != port:
                continue
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                _attach(sock)
                filtered = True
    # After the filter: none can follow.
    for sock in _own_sockets():
        with sock, contextlib.suppress(OSError):
            peer = sock.getpeername()[0].removeprefix("::ffff:")
            if sock.getsockname()[1] == port and not is_loopback(peer):
                sock.shutdown(socket.SHUT_RDWR)
    return filtered


def _attach(sock: socket.socket) -> None:
    code = b"".join(
        struct.pack("=HBBI", op, if_true, if_false, operand & 0xFFFFFFFF)
        for op, if_true, if_false, operand in _ACCEPT_LOOPBACK
    )
    program = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(
        socket.SOL_SOCKET,
        _SO_ATTACH_FILTER,
        struct.pack("@HP", len(_ACCEPT_LOOPBACK), ctypes.addressof(program)),
    )


def _own_sockets() -> Iterator[socket.socket]:
    """Duplicates of this process's internet sockets; the caller closes them."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            sock = socket.socket(fileno=os.dup(int(name)))
            if sock.family in (socket.AF_INET, socket.AF_INET6):
                yield sock
            else:
                sock.close()
