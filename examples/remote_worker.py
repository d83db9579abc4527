"""A worker reached by TCP and TLS 1.3, each side knowing the other's certificate.

Here both sides are on one machine. On two, run `obfuscatune keygen` on each, carry `cert.pem` (never `key.pem`) to
the other side over a channel that you trust, and start the worker there by the same command.
"""

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoTokenizer

import obfuscatune
from obfuscatune.assets import tiny_model_path

OBFUSCATUNE = [sys.executable, "-m", "obfuscatune"]
KEYS = Path("keys")


def make_keys(name: str) -> Path:
    """The folder of a new certificate and private key."""
    if not (KEYS / name).exists():
        subprocess.run([*OBFUSCATUNE, "keygen", "--out", str(KEYS / name), "--name", name], check=True)
    return KEYS / name


def main() -> None:
    """Start the worker, generate on a model that it multiplies for, and end it."""
    enclave, worker = make_keys("enclave"), make_keys("worker")
    command = [
        *OBFUSCATUNE, "worker", "--listen", "tcp:127.0.0.1:0", "--json",
        "--tls-cert", str(worker / "cert.pem"), "--tls-key", str(worker / "key.pem"),
        "--peer", str(enclave / "cert.pem"),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = json.loads(process.stdout.readline())["address"]  # with the port that it was given
            tls = obfuscatune.TlsConfig(enclave / "cert.pem", enclave / "key.pem", worker / "cert.pem")
            path = tiny_model_path()
            tokenizer = AutoTokenizer.from_pretrained(path)
            with obfuscatune.load(path, address, tls=tls, profile="private", dtype="float32", base="closed") as model:
                ids = tokenizer("It was late in the evening when", return_tensors="pt")
                print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))
        finally:
            process.terminate()


if __name__ == "__main__":
    main()
