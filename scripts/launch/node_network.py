"""How this node meets the others: prints whether HOST is this node, its own address on the way there, its interface.

torchrun looks for HOST among the names of a machine, not among the addresses of its interfaces, and gives the others
the machine's full name, which they may not know. gloo takes the interface of that name, on many systems the loopback.
usage: python node_network.py HOST
"""

import fcntl
import socket
import struct
import sys

SIOCGIFADDR = 0x8915  # <linux/sockios.h>: the IPv4 address of an interface


def is_here(family: int, address: tuple) -> bool:
    """Whether an address is one of this machine's: only those can be bound."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address[0], 0))
        except OSError:
            return False
    return True


def own_address(family: int, address: tuple) -> str:
    """The address that packets to `address` leave with; nothing is sent for it."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def interface_of(own: str) -> str:
    """The name of the interface that has this IPv4 address, "-" where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, request)
            except OSError:  # an interface without an IPv4 address
                continue
            if socket.inet_ntoa(answer[20:24]) == own:
                return name
    return "-"


def main(host: str) -> str:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        own = own_address(family, address)
    except OSError as problem:
        print(f"error: no way to the host {host}: {problem.strerror}", file=sys.stderr)
        sys.exit(2)
    if own.startswith("127."):  # many systems give their own name a loopback address: the others know that name better
        return f"{int(is_here(family, address))} {socket.getfqdn()} -"
    return f"{int(is_here(family, address))} {own} {interface_of(own)}"


if __name__ == "__main__":
    print(main(sys.argv[1]))
