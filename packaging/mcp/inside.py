"""Runs in the machine: gives each connection to port 9000 an MCP server of its own."""

import socket
import subprocess

listener = socket.create_server(("127.0.0.1", 9000))
while True:
    connection, _ = listener.accept()
    subprocess.Popen(["/usr/bin/aegis-mcp-guest"], stdin=connection, stdout=connection)
    connection.close()
