"""python client.py workflows/api/teach_then_draw.json [http://127.0.0.1:8188]   runs it, saves its pictures here"""

import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path

graph = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
server = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8188"
# without a client ComfyUI tells no outputs of what it has in its cache
data = json.dumps({"prompt": graph, "client_id": uuid.uuid4().hex}).encode()
request = urllib.request.Request(f"{server}/prompt", data, {"Content-Type": "application/json"})
try:
    prompt = json.load(urllib.request.urlopen(request))["prompt_id"]
except urllib.error.HTTPError as refused:
    sys.exit(f"ComfyUI refused {sys.argv[1]}: {refused.read().decode()}")
while not (done := json.load(urllib.request.urlopen(f"{server}/history/{prompt}"))):
    time.sleep(0.5)
status = done[prompt]["status"]
if status["status_str"] != "success":
    sys.exit(
        next((told["exception_message"] for kind, told in status["messages"] if kind == "execution_error"), "it was cancelled")
    )
for output in done[prompt]["outputs"].values():
    for image in output.get("images", []):
        file = urllib.request.urlopen(f"{server}/view?{urllib.parse.urlencode(image)}").read()
        Path(image["filename"]).write_bytes(file)
