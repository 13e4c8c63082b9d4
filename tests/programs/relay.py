"""The network between two simulated hosts, in place of a bridge: frames that come at one interface leave at the other, later or never.

    relay.py DELAY LOSS SEED INTERFACE INTERFACE     DELAY: seconds, one way; LOSS: share of the frames

Where the kernel has netem it would do the same. Frames keep the kernel's header of unfinished segments and checksums (PACKET_VNET_HDR).
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import sys
import time
from collections import deque

# linux/if_packet.h, linux/if_ether.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_OUTGOING, ETH_P_ALL = 263, 15, 4, 3


def open_interface(name: str) -> socket.socket:
    opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    opened.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
    opened.bind((name, 0))
    opened.setblocking(False)
    return opened


def main() -> None:
    delay, loss, chance = float(sys.argv[1]), float(sys.argv[2]), random.Random(int(sys.argv[3]))
    first, second = map(open_interface, sys.argv[4:6])
    other = {first: second, second: first}
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()  # in the order of their times, as all wait equally long
    print("ready", flush=True)
    while True:
        patience = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for here in select.select([first, second], [], [], patience)[0]:
            while True:
                try:
                    frame, origin = here.recvfrom(1 << 17)
                except BlockingIOError:
                    break
                if origin[2] != PACKET_OUTGOING and chance.random() >= loss:
                    waiting.append((time.monotonic() + delay, other[here], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, there, frame = waiting.popleft()
            with contextlib.suppress(BlockingIOError):  # a full queue of the device: one more frame that is lost
                there.send(frame)


if __name__ == "__main__":
    main()
