"""Drives every tool of aegis-mcp-guest with the official Python SDK. Usage: drive.py ADDRESS:PORT"""

import asyncio
import json
import os
import sys

from mcp import ClientSession, StdioServerParameters
from mcp.client.stdio import stdio_client

WIRE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wire.py")
TOOLS = {
    "instance_spawn", "instance_list", "instance_info", "instance_start", "instance_stop",
    "instance_delete", "instance_exec", "instance_logs", "self_info", "keepalive_acquire",
    "keepalive_release", "expose_port", "unexpose_port",
}


async def drive(address):
    server = StdioServerParameters(command=sys.executable, args=[WIRE, address])
    async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
        await session.initialize()
        tools = {tool.name for tool in (await session.list_tools()).tools}
        assert tools == TOOLS, tools ^ TOOLS
        used = set()

        async def call(tool, refused=False, **arguments):
            used.add(tool)
            answer = await session.call_tool(tool, arguments)
            text = answer.content[0].text
            assert bool(answer.is_error) == refused, text
            print(f"{tool} {json.dumps(arguments)}\n    {text[:160]}")
            return json.loads(text)

        own = await call("self_info")
        child = await call(
            "instance_spawn", handle="built-by-sdk", vcpus=1, memory_mb=256, disk_gb=0.3,
            command=["sh", "-c", "echo from the primary process; sleep infinity"],
        )
        assert child["parent_id"] == own["id"]
        ran = await call("instance_exec", id="built-by-sdk", command=["sh", "-c", "echo out; exit 3"])
        assert "out" in json.dumps(ran) and ran["exit_code"] == 3, ran
        logs = await call("instance_logs", id="built-by-sdk")
        assert "from the primary process" in json.dumps(logs), logs
        assert (await call("instance_info", id=child["id"]))["state"] == "running"
        listed = await call("instance_list")
        assert child["id"] in json.dumps(listed), listed
        denied = await call("instance_spawn", refused=True, command=["true"], memory_mb=900_000)
        assert denied["rule"] == "max_memory_mb" and "allowed" in denied and "hint" in denied, denied
        await call("instance_stop", id="built-by-sdk")
        await call("instance_start", id="built-by-sdk")
        await call("instance_delete", id="built-by-sdk")
        await call("keepalive_acquire", ttl_ms=30_000, reason="driving")
        await call("keepalive_release")
        await call("expose_port", guest_port=9100)
        await call("unexpose_port", guest_port=9100)
        assert used == TOOLS, TOOLS - used


asyncio.run(drive(sys.argv[1]))
print("every tool was used, by the Python SDK")
