"""A stand-in for an agent: starts the server that .mcp.json names and uses its tools, as a language
model would, but with a fixed plan. Runs inside a machine, with nothing but Python."""

import json
import subprocess
import sys


class Server:
    """An MCP server over stdio: one JSON object per line, both ways."""

    def __init__(self, name):
        entry = json.load(open(".mcp.json"))["mcpServers"][name]
        self.process = subprocess.Popen(
            [entry["command"], *entry["args"]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.last = 0
        hello = self.ask("initialize", {
            "protocolVersion": "2025-06-18",
            "capabilities": {},
            "clientInfo": {"name": "agent.py", "version": "1"},
        })
        self.tell({"method": "notifications/initialized"})
        self.instructions = hello["instructions"]

    def tell(self, message):
        print(json.dumps({"jsonrpc": "2.0", **message}), file=self.process.stdin, flush=True)

    def ask(self, method, params):
        self.last += 1
        self.tell({"id": self.last, "method": method, "params": params})
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            sys.exit(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def call(self, tool, **arguments):
        """Uses a tool: its result, or what the agent reads when it was refused."""
        result = self.ask("tools/call", {"name": tool, "arguments": arguments})
        print(f"> {tool} {json.dumps(arguments)}")
        text = result["content"][0]["text"]
        print(text if len(text) < 500 else text[:500] + " …")
        return result.get("isError"), json.loads(text)


server = Server("aegis")
print(server.instructions)
print("tools:", ", ".join(tool["name"] for tool in server.ask("tools/list", {})["tools"]))

_, me = server.call("self_info")

# A first wish that is too large. The refusal names the rule and what would pass.
size = 100_000
refused, machine = server.call("instance_spawn", command=["sleep", "infinity"], memory_mb=size, disk_gb=0.5)
if refused:
    allowed = me["capabilities"]["max_memory_mb"]
    refused, machine = server.call(
        "instance_spawn", command=["sleep", "infinity"], memory_mb=min(256, allowed), disk_gb=0.5
    )
if refused:
    sys.exit(machine["error"])

server.call("instance_exec", id=machine["id"], command=["sh", "-c", "uname -n; echo built > out; cat out"])
server.call("instance_list")
server.call("instance_delete", id=machine["id"])
