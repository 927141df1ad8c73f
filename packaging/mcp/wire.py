"""Runs on the host: what a client says on standard input goes to ADDRESS:PORT, and back."""

import os
import socket
import sys
import threading

host, port = sys.argv[1].rsplit(":", 1)
server = socket.create_connection((host, int(port)))


def say():
    while data := os.read(0, 65536):
        server.sendall(data)
    server.shutdown(socket.SHUT_WR)


threading.Thread(target=say, daemon=True).start()
while data := server.recv(65536):
    os.write(1, data)
