"""No network in tests: with this folder on PYTHONPATH, every Python process refuses to leave the machine.

Connections and name look-ups that are not local raise `OSError`, and each attempt is a line in the file that
BGEM3_NB_NET_LOG names, so that a library that swallows the error is found out all the same. Kernels and subprocesses
inherit it. It does not see code that opens sockets without Python's `socket` module.
"""
import os
import socket
import struct
import sys
from ipaddress import ip_address


def own_addresses():
    "The IPv4 addresses of this machine: a server of its own may be reached by them too (Linux)."
    try: from fcntl import ioctl
    except ImportError: return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            try: yield socket.inet_ntoa(ioctl(s, 0x8915, struct.pack("256s", name.encode()[:15]))[20:24])
            except OSError: pass   # an interface without an address


LOCAL = {None, "", "localhost", socket.gethostname(), *own_addresses()}


def is_local(host):
    "Whether a host is this machine."
    host = host.decode() if isinstance(host, bytes) else host
    if host in LOCAL: return True
    try: address = ip_address(host.split("%")[0])
    except ValueError: return False
    return address.is_loopback or address.is_unspecified


# Ray's head process asks its machine on which cloud it runs, whatever it is told about statistics. It is refused like
# all others, and not counted, since nobody can switch it off.
CLOUD = {"169.254.169.254", "metadata.google.internal"}


def refuse(host):
    "Write the attempt down, then raise."
    own = host in CLOUD and "/ray/dashboard/" in "".join(sys.argv[:1])
    if (log := os.environ.get("BGEM3_NB_NET_LOG")) and not own:
        with open(log, "a", encoding="utf-8") as f: f.write(f"{host} from {' '.join(sys.argv)[:200]}\n")
    raise OSError(f"the tests run without a network, and {host} was asked for")


def guarded(function):
    "A method of `socket.socket` whose last argument is an address, for local addresses only."
    def call(self, *args):
        if isinstance(args[-1], tuple) and not is_local(args[-1][0]): refuse(args[-1][0])
        return function(self, *args)
    return call


def local_only(function):
    "A name look-up, for local names only."
    def call(host, *args, **kwargs):
        if not is_local(host): refuse(host)
        return function(host, *args, **kwargs)
    return call


for name in ("connect", "connect_ex", "sendto"): setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
for name in ("getaddrinfo", "gethostbyname"): setattr(socket, name, local_only(getattr(socket, name)))
