"""The agent shuts its own door: a seccomp filter, set before torch or grpc is imported.

Order: ``shut`` first of all (``socket`` outside AF_UNIX stream answers EAFNOSUPPORT, since grpc probes AF_INET at start and must
not be killed; io_uring, ptrace and the system calls that take another process's memory or sockets are denied), then the
agent listens, then ``deny_connect`` for every thread there is and will be. Filters only add up and survive exec.

It does not hide files (the agent's own user does) and does not stop a file that another process reads.
Where the kernel or libseccomp cannot, the report says so; it never fails silently.
"""

from __future__ import annotations

import errno
import socket
import sys
from dataclasses import dataclass

_SOCK_TYPE_MASK = 0xF


@dataclass(frozen=True)
class Report:
    """What the door does on this machine.

    Attributes:
        shut: Whether the filter is in force.
        why: One line for the operator.
    """

    shut: bool
    why: str


def _unavailable() -> str | None:
    if sys.platform != "linux":
        return f"no seccomp on {sys.platform}"
    try:
        import pyseccomp  # noqa: F401
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"libseccomp cannot be used ({error}); install libseccomp2"
    return None


def shut() -> Report:
    """Denies network sockets, datagram sockets, io_uring and reaching into other processes, for good."""
    if why := _unavailable():
        return Report(False, why)
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)
    no_family, denied = seccomp.ERRNO(errno.EAFNOSUPPORT), seccomp.ERRNO(errno.EACCES)
    rules.add_rule(no_family, "socket", seccomp.Arg(0, seccomp.NE, socket.AF_UNIX))
    for call in ("socket", "socketpair"):
        for kind in range(_SOCK_TYPE_MASK + 1):
            if kind != socket.SOCK_STREAM:
                rules.add_rule(denied, call, seccomp.Arg(1, seccomp.MASKED_EQ, _SOCK_TYPE_MASK, kind))
    for call in (
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "ptrace",
        "process_vm_readv",
        "process_vm_writev",
        "pidfd_getfd",
    ):
        rules.add_rule(denied, call)
    try:
        rules.load()
    except OSError as error:
        return Report(False, f"the kernel refused the filter: {error}")
    return Report(True, "network, datagram sockets and io_uring denied by seccomp")


def deny_connect() -> Report:
    """Denies ``connect`` and ``bind`` in every thread, present and to come; call once the agent listens."""
    if why := _unavailable():
        return Report(False, why)
    import pyseccomp as seccomp

    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    rules.set_attr(seccomp.Attr.CTL_TSYNC, 1)
    for call in ("connect", "bind"):
        rules.add_rule(seccomp.ERRNO(errno.EACCES), call)
    try:
        rules.load()
    except OSError as error:
        return Report(False, f"the kernel refused the filter: {error}")
    return Report(True, "connect and bind denied by seccomp")
