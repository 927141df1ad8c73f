"""A vendor of LLM tokens, as far as its clients can tell: OpenAI's chat completions and responses,
Anthropic's messages, each whole and streamed. Runs on the host and asks for a key.

Usage: vendor.py KEY PORT_FILE SPENT_FILE
Writes its port into the first file, and all tokens that it has told of into the second."""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY, PORT_FILE, SPENT_FILE = sys.argv[1:4]
WORDS = "a vendor that is none says as many words as it is asked for and then it stops".split()
MODELS = {"openai": "gpt-test", "anthropic": "claude-test"}
spent = 0
lock = threading.Lock()


def spend(tokens):
    global spent
    with lock:
        spent += tokens
        with open(SPENT_FILE + ".new", "w") as file:
            file.write(str(spent))
        os.replace(SPENT_FILE + ".new", SPENT_FILE)


class Vendor(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def say(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin_events(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def piece(self, text):
        data = text.encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def event(self, data, name=None):
        head = f"event: {name}\n" if name else ""
        self.piece(f"{head}data: {data if isinstance(data, str) else json.dumps(data)}\n\n")

    def do_GET(self):
        if self.path.split("?")[0].endswith("/models"):
            self.say(200, {"object": "list", "data": [{"id": m} for m in MODELS.values()]})
        else:
            self.say(404, {"error": {"message": "no such path", "type": "invalid_request_error"}})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        path = self.path.removeprefix("/v1")
        key = self.headers.get("x-api-key") or self.headers.get("Authorization", "")[7:]
        if key != KEY:
            error = {"message": "wrong key", "type": "authentication_error"}
            return self.say(401, {"type": "error", "error": error})
        answers = {"/chat/completions": self.chat, "/responses": self.respond, "/messages": self.message}
        answers[path](body, body.get("stream", False))

    def words(self, body, *limits):
        """What is said, and how many tokens went in and out."""
        most = min([body[name] for name in limits if body.get(name)] + [12])
        said = [WORDS[i % len(WORDS)] for i in range(most)]
        return said, len(json.dumps(body)) // 4 + 1, most

    def chat(self, body, stream):
        said, sent, got = self.words(body, "max_completion_tokens", "max_tokens")
        usage = {"prompt_tokens": sent, "completion_tokens": got, "total_tokens": sent + got}
        spend(sent + got)
        base = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
        if not stream:
            message = {"role": "assistant", "content": " ".join(said), "refusal": None}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            whole = {**base, "object": "chat.completion", "choices": [choice], "usage": usage}
            return self.say(200, whole)
        self.begin_events()
        base["object"] = "chat.completion.chunk"

        def chunk(delta, end=None):
            choice = {"index": 0, "delta": delta, "finish_reason": end, "logprobs": None}
            self.event({**base, "choices": [choice]})

        chunk({"role": "assistant", "content": ""})
        for word in said:
            chunk({"content": word + " "})
        chunk({}, "stop")
        if (body.get("stream_options") or {}).get("include_usage"):
            self.event({**base, "choices": [], "usage": usage})
        self.event("[DONE]")
        self.piece("")

    def respond(self, body, stream):
        said, sent, got = self.words(body, "max_output_tokens")
        usage = {
            "input_tokens": sent, "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": got, "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sent + got,
        }
        spend(sent + got)
        text = " ".join(said)
        part = {"type": "output_text", "text": text, "annotations": []}
        item = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
                "content": [part]}
        whole = {
            "id": "resp_1", "object": "response", "created_at": 1, "status": "completed",
            "model": body["model"], "output": [item], "usage": usage, "error": None,
            "incomplete_details": None, "instructions": None, "metadata": {}, "tools": [],
            "parallel_tool_calls": True, "temperature": 1.0, "tool_choice": "auto", "top_p": 1.0,
        }
        if not stream:
            return self.say(200, whole)
        self.begin_events()
        count = 0

        def event(kind, **more):
            nonlocal count
            self.event({"type": kind, "sequence_number": count, **more}, kind)
            count += 1

        place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
        empty = {**whole, "status": "in_progress", "output": [], "usage": None}
        event("response.created", response=empty)
        event("response.in_progress", response=empty)
        event("response.output_item.added", output_index=0,
              item={**item, "status": "in_progress", "content": []})
        event("response.content_part.added", part={**part, "text": ""}, **place)
        for i, word in enumerate(said):
            event("response.output_text.delta", delta=(" " if i else "") + word, logprobs=[], **place)
        event("response.output_text.done", text=text, logprobs=[], **place)
        event("response.content_part.done", part=part, **place)
        event("response.output_item.done", output_index=0, item=item)
        event("response.completed", response=whole)
        self.piece("")

    def message(self, body, stream):
        said, sent, got = self.words(body, "max_tokens")
        spend(sent + got)
        whole = {
            "id": "msg_1", "type": "message", "role": "assistant", "model": body["model"],
            "content": [{"type": "text", "text": " ".join(said)}], "stop_reason": "end_turn",
            "stop_sequence": None, "usage": {"input_tokens": sent, "output_tokens": got},
        }
        if not stream:
            return self.say(200, whole)
        self.begin_events()

        def event(kind, **more):
            self.event({"type": kind, **more}, kind)

        start = {**whole, "content": [], "stop_reason": None,
                 "usage": {"input_tokens": sent, "output_tokens": 1}}
        event("message_start", message=start)
        event("content_block_start", index=0, content_block={"type": "text", "text": ""})
        event("ping")
        for i, word in enumerate(said):
            delta = {"type": "text_delta", "text": (" " if i else "") + word}
            event("content_block_delta", index=0, delta=delta)
        event("content_block_stop", index=0)
        event("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None},
              usage={"output_tokens": got})
        event("message_stop")
        self.piece("")


spend(0)
server = ThreadingHTTPServer(("127.0.0.1", 0), Vendor)
with open(PORT_FILE + ".new", "w") as file:
    file.write(str(server.server_port))
os.replace(PORT_FILE + ".new", PORT_FILE)
server.serve_forever()
