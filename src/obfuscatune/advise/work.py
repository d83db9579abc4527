"""How much work a step, a forward pass or a decoded token is, counted from the model's shape alone.

A model without weights runs on torch's `meta` device, which computes nothing; every product is counted by its shape.
Those of layers that go to a worker are told from the ones that stay by their shapes, which the plan of the model gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig

from obfuscatune.bench.measures import Product, ProductCounter
from obfuscatune.bench.workload import lora_of
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.mixing import KroneckerMixer
from obfuscatune.enclave.plan import Plan, make_plan
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.target_layers import Expert, LayerGroup, find_groups
from obfuscatune.errors import ConfigError
from obfuscatune.training.adapter import without_peft_warnings

Kind = Literal["step", "forward", "decode"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_EXPERTS_ON_META = "batched_mm"
"""The one implementation of experts whose shapes do not depend on what is computed."""


@dataclass(frozen=True)
class Request:
    """Rows of one request: `rows` of the model's, (rows, p) times (p, q); `sent` with what is mixed in.

    `transposed`: the worker holds the matrix as (q, p), as backward has it.
    """

    rows: int
    p: int
    q: int
    sent: int
    transposed: bool = False

    @property
    def flops(self) -> int:
        """Of the worker's product."""
        return 2 * self.sent * self.p * self.q


@dataclass(frozen=True)
class Work:
    """What one step, one pass or one decoded token (of each stream) computes and sends.

    Attributes:
        products: all of the plain run, by shape.
        kept: those of them that stay in the enclave.
        others, other_bytes: operations but products, and the bytes that they write; the same plain and protected.
        trained: parameters that the optimizer steps.
        requests: to the worker, by shape, each with how often it is asked.
        tokens: that are processed, or decoded.
        parameters, worker_parameters: of the model; and of those that lie on the worker.
        dtype, wire_dtype: of the model; of rows and products on their way.
    """

    kind: Kind
    products: Counter[Product]
    kept: Counter[Product]
    others: int
    other_bytes: float
    trained: int
    requests: Counter[Request]
    tokens: int
    parameters: int
    worker_parameters: int
    dtype: torch.dtype
    wire_dtype: torch.dtype

    @property
    def plain_flops(self) -> int:
        """Of all products of the plain run."""
        return flops_of(self.products)

    @property
    def enclave_flops(self) -> int:
        """Of those that stay."""
        return flops_of(self.kept)

    @property
    def worker_flops(self) -> int:
        """Of the worker's products, shield rows included."""
        return sum(request.flops * count for request, count in self.requests.items())

    @property
    def crossings(self) -> int:
        """Requests to the worker."""
        return self.requests.total()

    @property
    def bytes_up(self) -> int:
        """Of rows to the worker."""
        return sum(count * it.sent * it.p for it, count in self.requests.items()) * self.wire_dtype.itemsize

    @property
    def bytes_down(self) -> int:
        """Of products from the worker."""
        return sum(count * it.sent * it.q for it, count in self.requests.items()) * self.wire_dtype.itemsize

    @property
    def whole_bytes(self) -> tuple[int, int]:
        """Up and down, what every worker of several passes where each has a share of the columns.

        All of them get the same rows; of a transposed matrix, all of them answer with a summand of the same product.
        """
        up = sum(count * it.sent * it.p for it, count in self.requests.items() if not it.transposed)
        down = sum(count * it.sent * it.q for it, count in self.requests.items() if it.transposed)
        return up * self.wire_dtype.itemsize, down * self.wire_dtype.itemsize

    @property
    def crossing_bytes(self) -> int:
        """Both ways."""
        return self.bytes_up + self.bytes_down


def flops_of(products: Counter[Product]) -> int:
    """Floating-point operations of all of them."""
    return sum(product.flops * count for product, count in products.items())


def count_work(
    kind: Kind,
    config: PretrainedConfig,
    batch: int,
    length: int,
    profile: Profile,
    dtype: torch.dtype = torch.float32,
) -> Work:
    """Count the work of `bench step`, `bench forward` or one token of `bench decode`: seconds, and little memory.

    Raises:
        ConfigError: other work; a profile that trains adapters on the worker; or a model that cannot run without
            numbers.
    """
    if kind not in KINDS:
        raise ConfigError(f"--work: expected {', '.join(KINDS)}, found {kind!r}")
    if profile.lora_on == "worker":
        raise ConfigError(
            "the cost model has LoRA in the enclave, and no speeds of a worker's optimizer: use private or guarded"
        )
    config._experts_implementation = _EXPERTS_ON_META
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        plan = make_plan(model, profile, dtype)
        groups = find_groups(model, 0)
        try:
            counter, trained = _run(kind, model, torch.zeros(batch, length, dtype=torch.long))
        except (NotImplementedError, RuntimeError) as error:
            raise ConfigError(f"this architecture cannot be counted without its weights: {error}") from error
    rows = batch if kind == "decode" else batch * length
    routed = _Routed.of(plan, rows)
    products, gathered = routed.regrouped(counter.products, groups)
    kept, requests, count_rows = products.copy(), Counter[Request](), _row_counter(profile)
    for group, times in routed.moved(groups, profile):
        own = rows if times == 1 and not _is_expert(group) else routed.rows
        p, q = group.shape
        ways = [(p, q)] if kind != "step" or group.name == groups[0].name else [(p, q), (q, p)]
        for transposed, (first, second) in enumerate(ways):
            requests[Request(own, first, second, count_rows(own, first), bool(transposed))] += times
            for width in group.widths:
                _take(kept, times, own, *((first, width) if first == p else (width, second)))
    wire_dtype = torch.float64 if profile.masks else profile.crossing_dtype(dtype)
    other_bytes = counter.other_nbytes - gathered * dtype.itemsize
    return Work(
        kind, products, kept, counter.others, other_bytes, trained, requests,
        rows, plan.parameters, plan.worker_parameters, dtype, wire_dtype,
    )  # fmt: skip


def _run(kind: Kind, model: Any, ids: Tensor) -> tuple[ProductCounter, int]:
    """Run the model on `meta`; what was counted, and how many parameters are trained."""
    if kind == "step":
        with without_peft_warnings():
            tuned = get_peft_model(model, lora_of(model.config)).train()
        with ProductCounter() as counter:
            tuned(input_ids=ids, labels=ids).loss.backward()
        return counter, sum(it.numel() for it in tuned.parameters() if it.requires_grad)
    with torch.inference_mode():
        if kind == "forward":
            with ProductCounter() as counter:
                model.eval()(input_ids=ids)
            return counter, 0
        cache = DynamicCache()
        model.eval()(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        with ProductCounter() as counter:
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    return counter, 0


def _take(products: Counter[Product], times: int, rows: int, inner: int, columns: int) -> None:
    """Take products of that shape out, whichever way their second factor lies."""
    for transposed in (False, True):
        product = Product(rows, inner, columns, transposed)
        taken = min(times, products[product])
        products[product] -= taken
        times -= taken
        if not products[product]:
            del products[product]


def _is_expert(group: LayerGroup) -> bool:
    return isinstance(group.targets[0].layer, Expert)


@dataclass(frozen=True)
class _Routed:
    """How rows spread over experts: as evenly as can be, so that as many are hit as there are rows for."""

    hit: int
    """Experts of each stack that get rows."""
    rows: int
    """Of each."""

    @classmethod
    def of(cls, plan: Plan, rows: int) -> _Routed:
        """As the plan's first stack of experts has it; all rows to one where there are no experts."""
        count, active = next(((it.count, it.active) for it in plan.layers if it.count > 1), (1, 1))
        hit = min(count, rows * active)
        return cls(hit, -(-rows * active // hit))

    def regrouped(self, products: Counter[Product], groups: list[LayerGroup]) -> tuple[Counter[Product], int]:
        """On `meta` each row of each expert is a product of its own, by a copy of the matrix.

        Returns:
            The products with the rows of one expert together; and the elements of these copies.
        """
        forward = {it.shape for it in groups if _is_expert(it)}
        shapes = forward | {shape[::-1] for shape in forward}
        together, copied = Counter[Product](), 0
        for product, count in products.items():
            if product.columns == 1 and (product.inner, product.rows) in shapes:
                stacks = max(1, round(count / (self.hit * self.rows)))
                together[Product(self.rows, product.inner, product.rows)] += stacks * self.hit
                if (product.inner, product.rows) in forward:
                    copied += count * product.inner * product.rows
            else:
                together[product] += count
        return together, copied

    def moved(self, groups: list[LayerGroup], profile: Profile) -> Iterator[tuple[LayerGroup, int]]:
        """Groups that go to a worker, and how many requests a pass makes for each; a stack of experts is one."""
        seen: set[str] = set()
        for group in groups:
            stack = group.targets[0].parameter
            if profile.offload and group.block >= profile.first_blocks and not (_is_expert(group) and stack in seen):
                seen.add(stack)
                yield group, self.hit if _is_expert(group) else 1


def _row_counter(profile: Profile) -> Callable[[int, int], int]:
    """How many rows cross for (rows, width): what the profile's mixing makes of them."""
    mixer = KroneckerMixer(profile.shield_rows, SecretStream.fresh(), in_buckets=profile.buckets == "ladder")

    @cache
    def count(rows: int, width: int) -> int:
        return mixer.draw(rows, width).rows if profile.mixing else rows

    return count
