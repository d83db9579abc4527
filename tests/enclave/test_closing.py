"""A model that starts its own worker, closes, and ends the worker with itself."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import obfuscatune
from obfuscatune.errors import ConfigError, ProtectionError

IDS = torch.arange(3, 20)[None]
CLOSED = "closed, .*: load or protect the model again"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model of two blocks."""
    folder = tmp_path_factory.mktemp("closing") / "model"
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(directory):
    return AutoModelForCausalLM.from_pretrained(directory).eval()(IDS).logits


def children() -> set[int]:
    """Processes that this one has started and not yet waited for."""
    return {int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def own_worker(make):
    """What `make` makes, and the process of the worker that it started."""
    before = children()
    model = make()
    (pid,) = (pid for pid in children() - before if is_running(pid) and b"worker" in cmdline(pid))
    return model, pid


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("way", ["load", "protect"])
def test_without_a_worker_one_is_started_and_ends_with_the_with(directory, expected, way):
    def make():
        if way == "load":
            return obfuscatune.load(directory)
        return obfuscatune.protect(AutoModelForCausalLM.from_pretrained(directory).eval())

    model, pid = own_worker(make)
    with model as entered:
        assert entered is model
        torch.testing.assert_close(model(IDS).logits, expected)
    assert not is_running(pid)
    with pytest.raises(ProtectionError, match=CLOSED):
        model(IDS)
    model.close()


def test_a_model_ends_its_worker_when_nothing_refers_to_it(directory):
    model, pid = own_worker(lambda: obfuscatune.load(directory))
    model(IDS)
    del model
    gc.collect()
    assert not is_running(pid)


def test_a_peft_model_closes_the_one_that_it_wraps(directory, worker):
    model = get_peft_model(obfuscatune.load(directory, worker.address), LoraConfig(r=2, target_modules="all-linear"))
    model.close()
    with pytest.raises(ProtectionError, match=CLOSED):
        model(IDS)


def test_a_peft_model_that_was_protected_closes_itself(directory, worker):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory), LoraConfig(r=2, target_modules="all-linear")
    )
    with obfuscatune.protect(model, worker.address):
        model(IDS)
    with pytest.raises(ProtectionError, match=CLOSED):
        model(IDS)


def test_a_closed_model_neither_trains_nor_renews_its_secrets(directory, worker):
    model = get_peft_model(obfuscatune.load(directory, worker.address), LoraConfig(r=2, target_modules="all-linear"))
    loss = model(IDS, labels=IDS).loss
    model.close()
    with pytest.raises(ProtectionError, match=CLOSED):
        loss.backward()
    with pytest.raises(ProtectionError, match=CLOSED):
        model.protection.rekey()


def test_a_named_worker_goes_on_for_others(directory, expected, worker):
    with obfuscatune.load(directory, worker.address) as first, obfuscatune.load(directory, worker.address) as second:
        first.close()
        torch.testing.assert_close(second(IDS).logits, expected)
    assert worker.process.poll() is None


def test_the_class_is_known_by_its_name(directory, worker):
    with obfuscatune.load(directory, worker.address) as model:
        assert isinstance(model, LlamaForCausalLM)
        assert str(type(model)) == str(LlamaForCausalLM)


def test_nothing_is_closed_where_nothing_was_sent(directory, expected):
    with obfuscatune.load(directory, profile="enclave") as model:
        torch.testing.assert_close(model(IDS).logits, expected)


def test_certificates_are_for_a_named_worker(directory):
    with pytest.raises(ConfigError, match="certificates are for a worker across a network"):
        obfuscatune.load(directory, tls=object())


def test_the_end_of_the_process_ends_the_worker_without_a_word(directory):
    code = (
        "import sys, obfuscatune, torch\n"
        "model = obfuscatune.load(sys.argv[1])\n"
        "model(torch.arange(3, 20)[None])\n"
        "from pathlib import Path\n"
        "print(*[file.read_text() for file in Path('/proc/self/task').glob('*/children')])\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", code, directory], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    (pid,) = done.stdout.split()
    assert not is_running(int(pid))


def test_a_product_that_is_awaited_when_another_thread_closes_connects_nothing_anew(worker):
    """As a thread does that draws masks ahead."""
    client = obfuscatune.WorkerClient.open(worker.address)
    client.store(bytes(15) + b"\x01", lambda: torch.eye(8), shape=(8, 8), dtype=torch.float32)
    pending = client.submit(bytes(15) + b"\x01", torch.ones(2, 8), transpose=False)
    client.close()
    with pytest.raises(ProtectionError, match=CLOSED):
        pending.result()
    assert not client._driver.connected
