"""The engine's answers are those of `generate`, alone and beside others that come and go."""

from __future__ import annotations

import asyncio
import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from obfuscatune import RootKey, protect
from obfuscatune.enclave.client import RetryPolicy
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.errors import (
    ConfigError,
    ConnectionLost,
    DataError,
    ModelFileError,
    NonFiniteError,
    Overloaded,
    RequestTimeout,
    ServiceClosed,
    ServiceError,
    WrongProduct,
)
from obfuscatune.service.engine import EngineLimits
from obfuscatune.service.requests import FinishEvent, PromptEvent, Request, TokenEvent
from obfuscatune.service.sampling import SamplingParams
from obfuscatune.training.provider_adapter import load_provider_adapter
from tests.contract.architectures import ARCHITECTURES
from tests.service.answers import (
    GREEDY,
    answered_while_joining,
    engine_of,
    files_of,
    generated,
    some_requests,
    text,
    tiny_model,
    tiny_tokenizer,
    tokens,
    with_random_lora,
)
from tests.worker.serving import serving

CAUSAL = [name for name, architecture in ARCHITECTURES.items() if architecture.is_causal]
PROMPT = (40, 41, 42, 43, 44)


@pytest.fixture(scope="module")
def plain() -> Any:
    """The embedded model. Not to be changed."""
    return tiny_model()


@pytest.mark.parametrize("name", CAUSAL)
def test_answers_are_those_of_generate(name: str, request: pytest.FixtureRequest) -> None:
    if ARCHITECTURES[name].directory is not None:
        request.getfixturevalue("stories260k")
    model = ARCHITECTURES[name].build(torch.float64)  # no ties by rounding: equal tokens, not nearly
    asked = some_requests(len(name), 8, model.config.vocab_size)
    with engine_of(model) as engine:
        found = answered_while_joining(engine, asked, seed=3)
        engine.drain(30)
        stats = engine.stats()
    assert found == [generated(model, each) for each in asked]
    assert stats.rows > 1.5 * stats.steps  # they did run together
    assert stats.finished == 8


@pytest.mark.parametrize("profile", ["private", pytest.param("guarded", marks=pytest.mark.long)])
def test_a_protected_model_answers_as_the_plain_one(
    plain: Any, profile: str, worker: LocalWorker, mask_worker: LocalWorker
) -> None:
    masks = {"mask_worker": mask_worker.address} if profile == "guarded" else {}
    asked = some_requests(1, 6, 1000)
    with (
        protect(tiny_model(), worker.address, profile, key=RootKey(bytes(32)), base="closed", **masks) as model,
        engine_of(model) as engine,
    ):
        found = answered_while_joining(engine, asked, seed=5)
    assert found == [generated(plain, each) for each in asked]


def test_adapters_by_name_beside_the_base_model(plain: Any, worker: LocalWorker) -> None:
    """Three adapters of which two are in memory at a time; names as clients choose them."""
    adapted = {
        name: with_random_lora(tiny_model(), seed) for seed, name in enumerate(("ft:a.b", "default", "provider"))
    }
    files = {name: files_of(model) for name, model in adapted.items()}
    asked = some_requests(2, 7, 1000, (None, *adapted))
    with (
        protect(tiny_model(), worker.address, key=RootKey(bytes(32)), base="closed") as model,
        engine_of(model, source=files.__getitem__, adapters=2) as engine,
    ):
        found = answered_while_joining(engine, asked, seed=7)
        assert engine.stats().adapters == 2
        for name in adapted:
            engine.unload(name)
        again = list(engine.submit(asked[0]))  # its step comes after the unloading
        assert engine.stats().adapters == (asked[0].adapter is not None)
    expected = [generated(adapted[each.adapter] if each.adapter else plain, each) for each in asked]
    assert found == expected
    assert tokens(again) == expected[0]
    for each, own in zip(asked, expected, strict=True):
        assert not each.adapter or each.max_tokens < 4 or own != generated(plain, each)


def test_adapters_stand_on_the_provider_s(tmp_path: Path) -> None:
    """Who names no adapter gets the model with the provider's; the owner's are on top of it, and of no other."""
    for name, content in files_of(with_random_lora(tiny_model(), 1)).items():
        (tmp_path / name).write_bytes(content)

    def provided() -> Any:
        return load_provider_adapter(tiny_model(), tmp_path)

    owners = with_random_lora(provided(), 2)
    files = {"owner's": files_of(owners)}
    asked = [Request(PROMPT, 12, SamplingParams(seed=3), adapter=name) for name in (None, "owner's")]
    expected = [generated(provided(), asked[0]), generated(owners, asked[1])]
    with engine_of(provided(), source=files.__getitem__) as engine:
        handles = [engine.submit(each) for each in asked]
        assert [tokens(list(handle)) for handle in handles] == expected
    assert generated(tiny_model(), asked[0]) != expected[0] != expected[1]
    with (
        engine_of(tiny_model(), source=files.__getitem__) as engine,
        pytest.raises(ModelFileError, match="no provider's adapter"),
    ):
        list(engine.submit(asked[1]))


def test_an_adapter_that_cannot_be_read_fails_its_requests_alone(plain: Any) -> None:
    good = files_of(with_random_lora(tiny_model(), 1))
    other = files_of(with_random_lora(ARCHITECTURES["gpt2"].build(torch.float32), 1))
    files = {
        "good": good,
        "of another model": other,
        "cut off": good | {"adapter_model.safetensors": good["adapter_model.safetensors"][:-9]},
        "no config": {"adapter_model.safetensors": b""},
        "not LoRA": good | {"adapter_config.json": b'{"peft_type": "IA3"}'},
        "not JSON": good | {"adapter_config.json": b"\xff"},
        "huge": good | {"adapter_config.json": b'{"peft_type": "LORA", "r": 1000000000}'},
        "dora": good | {"adapter_config.json": b'{"peft_type": "LORA", "use_dora": true}'},
    }
    with engine_of(tiny_model(), source=files.__getitem__) as engine:
        for name in files:
            handle = engine.submit(Request(PROMPT, 4, GREEDY, adapter=name))
            if name == "good":
                list(handle)
                continue
            with pytest.raises((ModelFileError, ConfigError)):
                list(handle)
        with pytest.raises(ServiceError, match="its log says"):  # the source raised an error that is not ours
            list(engine.submit(Request(PROMPT, 4, GREEDY, adapter="unknown")))
        base = Request(PROMPT, 9, GREEDY)
        assert tokens(list(engine.submit(base))) == generated(plain, base)
    with engine_of(tiny_model()) as engine, pytest.raises(ConfigError, match="no adapters"):
        list(engine.submit(Request(PROMPT, 4, GREEDY, adapter="good")))


def test_tokens_of_the_end_and_stop_strings() -> None:
    """An answer ends at a token that the model or the request names, and before a stop string, wherever tokens part."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    whole = Request(PROMPT, 24, SamplingParams(seed=3))
    with engine_of(model) as engine:
        written = generated(model, whole)
        events = list(engine.submit(whole))
        full = text(events)
        assert full == tokenizer.decode([*PROMPT, *written])[len(tokenizer.decode(PROMPT)) :]
        assert events[-1] == FinishEvent("length", events[-1].text, len(PROMPT), 24)  # type: ignore[union-attr]
        for begin in range(0, len(full) - 6, 11):
            stop = full[begin : begin + 6]
            stopped = list(engine.submit(Request(PROMPT, 24, whole.sampling, stop=("\x00never", stop))))
            assert text(stopped) == full[: full.index(stop)]
            assert isinstance(stopped[-1], FinishEvent)
            assert stopped[-1].reason == "stop"
            assert stopped[-1].completion_tokens <= 24
        last = written[11]
        ended = list(engine.submit(Request(PROMPT, 24, whole.sampling, stop_ids=(last,))))
        assert tokens(ended) == written[: written.index(last)]
        assert isinstance(ended[-1], FinishEvent)
        assert (ended[-1].reason, ended[-1].completion_tokens) == ("stop", written.index(last) + 1)
    with engine_of(model, ends=True) as engine:
        (end,) = engine.ends
        forced = list(engine.submit(Request(PROMPT, 24, SamplingParams(logit_bias={end: 100.0}))))
        assert forced == [FinishEvent("stop", "", len(PROMPT), 1)]


def test_log_probabilities_are_those_of_a_direct_pass(plain: Any) -> None:
    """Of the model's own logits, whatever temperature, bias and penalties chose; in the prompt, read in chunks, too."""
    sampling = SamplingParams(temperature=1.3, top_p=0.8, seed=5, logit_bias={50: 5.0}, frequency_penalty=1.0)
    asked = [
        Request(tuple(range(20, 20 + length)), 12, sampling, logprobs=4, prompt_logprobs=True) for length in (1, 5, 40)
    ]
    with engine_of(plain, prefill_tokens=24) as engine:
        handles = [engine.submit(each) for each in asked]
        answers = [list(handle) for handle in handles]
    for each, events in zip(asked, answers, strict=True):
        ids = [*each.prompt, *tokens(events)]
        with torch.no_grad():
            expected = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        assert isinstance(events[0], PromptEvent)
        told = [*events[0].logprobs, *(event.logprobs for event in events if isinstance(event, TokenEvent))]
        assert [one.token for one in told if one] == ids
        assert told[0] is not None
        assert (told[0].logprob, told[0].top) == (None, ())
        for place, one in enumerate(told[1:]):
            assert one is not None
            assert one.logprob is not None
            assert math.isclose(one.logprob, float(expected[place, ids[place + 1]]), abs_tol=2e-4)
            best = expected[place].topk(4)
            assert [token for token, _ in one.top] == best.indices.tolist()
            assert torch.allclose(torch.tensor([value for _, value in one.top]), best.values, atol=2e-4)


def test_a_prompt_alone_is_scored(plain: Any) -> None:
    with engine_of(plain) as engine:
        events = list(engine.submit(Request(PROMPT, 0, GREEDY, logprobs=0, prompt_logprobs=True)))
    assert [type(event) for event in events] == [PromptEvent, FinishEvent]
    assert events[-1] == FinishEvent("length", "", len(PROMPT), 0)


def test_a_repetition_penalty_of_the_model_is_applied_as_generate_does() -> None:
    model = tiny_model()
    model.generation_config.repetition_penalty = 1.3
    asked = [Request(PROMPT, 20, GREEDY), Request(PROMPT, 20, SamplingParams(seed=4, temperature=0.9, top_p=0.9))]
    with engine_of(model) as engine:
        assert [tokens(list(engine.submit(each))) for each in asked] == [generated(model, each) for each in asked]
    assert generated(model, asked[0]) != generated(tiny_model(), asked[0])
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ConfigError, match="no_repeat_ngram_size"), engine_of(model):
        pass


def test_cancelled_before_and_while_it_runs(plain: Any) -> None:
    with engine_of(plain, batch=1) as engine:
        running = engine.submit(Request(PROMPT, 200, GREEDY))
        queued = engine.submit(Request(PROMPT, 200, GREEDY))
        events = iter(running)
        next(events)
        queued.cancel()
        assert list(queued) == [FinishEvent("cancelled", "", len(PROMPT), 0)]
        running.cancel()
        *_, last = events
        assert isinstance(last, FinishEvent)
        assert last.reason == "cancelled"
        assert last.completion_tokens < 200
        running.cancel()  # of what has ended: nothing
        assert engine.drain(30)
        stats = engine.stats()
    assert (stats.cancelled, stats.queued, stats.running, stats.cache_tokens) == (2, 0, 0, 0)


def test_a_full_queue_refuses_and_a_deadline_ends(plain: Any) -> None:
    with engine_of(plain, batch=1, queue=2) as engine:
        first = engine.submit(Request(PROMPT, 200, GREEDY))
        next(iter(first))  # it runs
        late = engine.submit(Request(PROMPT, 200, GREEDY, timeout_s=1e-6))
        with pytest.raises(RequestTimeout):
            list(late)
        waiting = [engine.submit(Request(PROMPT, 1, GREEDY)) for _ in range(2)]
        with pytest.raises(Overloaded):
            engine.submit(Request(PROMPT, 1, GREEDY))
        first.cancel()
        assert [len(list(handle)) for handle in waiting] == [2, 2]
        assert engine.drain(30)
        stats = engine.stats()
    assert (stats.submitted, stats.refused, stats.failed, stats.cancelled, stats.finished) == (4, 1, 1, 1, 2)


def test_caches_stay_within_their_limit(plain: Any) -> None:
    """The limit lets two of these run at a time; all are answered, and the limit is never passed."""
    each = [Request(PROMPT, 30, SamplingParams(seed=seed)) for seed in range(4)]
    with engine_of(plain, cache_tokens=2 * (35 + 64)) as engine:
        handles = [engine.submit(one) for one in each]
        seen = []
        for handle in handles:
            for _ in handle:
                stats = engine.stats()
                seen.append((stats.running, stats.cache_tokens))
        with pytest.raises(DataError, match="there is memory for 198"):
            engine.submit(Request(PROMPT, 200, GREEDY))
    assert max(running for running, _ in seen) == 2
    assert 0 < max(held for _, held in seen) <= 198


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prompt": (5, -1)}, "tokens from 0 to"),
        ({"prompt": (10**6,)}, "tokens from 0 to"),
        ({"sampling": SamplingParams(logit_bias={10**6: 1.0})}, "logit_bias"),
        ({"prompt": (5,) * 250}, "takes 256 in all"),
        ({"max_tokens": 10**9}, "takes 256 in all"),
    ],
)
def test_what_the_model_cannot_answer_is_refused(plain: Any, settings: dict[str, Any], says: str) -> None:
    with engine_of(plain) as engine, pytest.raises(DataError, match=says):
        engine.submit(Request(**{"prompt": PROMPT, "max_tokens": 20, "sampling": GREEDY, **settings}))


def test_a_worker_that_dies_fails_those_who_wait_and_the_engine_goes_on(plain: Any, worker: LocalWorker) -> None:
    """Two requests are running and lose their worker; when it is there again, the next are answered."""
    retry = RetryPolicy(attempts=1, patience_s=0.1)
    with (
        protect(tiny_model(), worker.address, retry=retry, base="closed") as model,
        engine_of(model) as engine,
    ):
        handles = [engine.submit(Request(PROMPT, 240, SamplingParams(seed=seed))) for seed in range(2)]
        readers = [iter(handle) for handle in handles]
        for reader in readers:
            next(reader)
        worker.process.kill()
        worker.process.wait()
        for reader in readers:
            with pytest.raises(ConnectionLost):
                list(reader)
        worker.restart()
        asked = Request(PROMPT, 9, GREEDY)
        assert engine.is_open
        assert tokens(list(engine.submit(asked))) == generated(plain, asked)


def test_a_wrong_product_closes_the_engine(tmp_path: Path) -> None:
    """Whoever runs, waits or comes later gets that error: a worker that lies is not used again."""
    with serving(tmp_path) as worker:
        model = protect(tiny_model(), str(worker.address), verify=1.0, base="closed")
        computer = worker.service.answerer.computer
        honest = computer.multiply

        def multiply(rows: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, **how: bool) -> None:
            honest(rows, matrix, out, **how)
            out.copy_(out.flip(-1))

        with engine_of(model, batch=1) as engine:
            running = iter(engine.submit(Request(PROMPT, 240, GREEDY)))
            queued = engine.submit(Request(PROMPT, 4, GREEDY))
            next(running)
            computer.multiply = multiply  # type: ignore[method-assign]
            with pytest.raises(WrongProduct):
                list(running)
            with pytest.raises(WrongProduct):
                list(queued)
            computer.multiply = honest  # type: ignore[method-assign]
            with pytest.raises(WrongProduct):
                engine.submit(Request(PROMPT, 4, GREEDY))
            assert not engine.is_open
        model.protection.close()


def test_numbers_that_are_not_finite_fail_their_own_request() -> None:
    """An embedding of NaN poisons its own sequence, and none of those that run beside it."""
    model = tiny_model()
    asked = Request(PROMPT, 30, GREEDY)
    expected = generated(model, asked)
    with torch.no_grad():
        model.transformer.wpe.weight[100] = float("nan")  # the place of the 101st token
    with engine_of(model) as engine:
        healthy = [engine.submit(asked) for _ in range(2)]
        poisoned = engine.submit(Request((50,) * 90, 20, GREEDY))
        with pytest.raises(NonFiniteError):
            list(poisoned)
        healthy.append(engine.submit(asked))
        assert [tokens(list(handle)) for handle in healthy] == [expected] * 3


def test_draining_answers_what_was_asked_and_closing_fails_it(plain: Any) -> None:
    with engine_of(plain) as engine:
        handle = engine.submit(Request(PROMPT, 20, GREEDY))
        assert engine.drain(30)
        assert len(tokens(list(handle))) == 20
        with pytest.raises(ServiceClosed, match="shutting down"):
            engine.submit(Request(PROMPT, 1, GREEDY))
    with engine_of(plain) as engine:
        handle = engine.submit(Request(PROMPT, 240, GREEDY))
        assert not engine.drain(0)
        engine.close()
        engine.close()
        with pytest.raises(ServiceClosed):
            list(handle)


def test_events_arrive_in_an_event_loop(plain: Any) -> None:
    async def ask(engine: Any) -> list[Any]:
        handles = [engine.submit(Request(PROMPT, 9, GREEDY), asyncio.get_running_loop()) for _ in range(3)]
        return [[event async for event in handle] for handle in handles]

    async def leave(engine: Any) -> None:
        engine.submit(Request(PROMPT, 240, GREEDY), asyncio.get_running_loop())

    with engine_of(plain) as engine:
        answers = asyncio.run(ask(engine))
        assert [tokens(events) for events in answers] == [generated(plain, Request(PROMPT, 9, GREEDY))] * 3
        asyncio.run(leave(engine))  # whose loop is closed while it is answered
        assert engine.drain(30)
        assert engine.stats().cancelled == 1


def test_many_threads_at_once(plain: Any) -> None:
    expected = generated(plain, Request(PROMPT, 6, GREEDY))
    wrong: list[list[int]] = []

    def ask() -> None:
        for _ in range(2):
            found = tokens(list(engine.submit(Request(PROMPT, 6, GREEDY))))
            if found != expected:
                wrong.append(found)

    with engine_of(plain, batch=4) as engine:
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert engine.drain(30)
        assert engine.stats().finished == 16
    assert not wrong


def test_memory_of_caches_is_computed_from_the_configuration(plain: Any) -> None:
    config = plain.config
    each = 2 * config.n_layer * config.n_embd * 4
    assert EngineLimits().within(1000 * each, config, torch.float32).cache_tokens == 1000
    llama = ARCHITECTURES["llama"].build(torch.bfloat16)  # 2 layers, 2 of 6 heads, 8 wide
    assert EngineLimits().within(1280, llama.config, torch.bfloat16).cache_tokens == 1280 // (2 * 2 * 2 * 8 * 2)


def test_models_that_cannot_be_served_are_refused(plain: Any) -> None:
    with pytest.raises(ConfigError, match="give it the base model"), engine_of(with_random_lora(tiny_model(), 1)):
        pass
    with pytest.raises(ConfigError, match="queue: expected at least 1"):
        EngineLimits(queue=0)
