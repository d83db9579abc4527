"""Few rows cross by kernels that rotate and mix at once: as torch would, forth and back, and seen from a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from obfuscatune import RootKey, native, protect
from obfuscatune.enclave.autograd import OffloadedCall
from obfuscatune.enclave.client import ClientStats, WorkerLink
from obfuscatune.enclave.kernels import REFERENCE
from obfuscatune.enclave.keys import SecretStream
from obfuscatune.enclave.local_worker import LocalWorker
from obfuscatune.enclave.mixing import FewMixing, KroneckerMixer
from obfuscatune.enclave.product import FewRows, Held, InFlight, OffloadedProduct
from obfuscatune.enclave.transforms import TransformSpec
from obfuscatune.enclave.transforms.structured import StructuredTransform
from obfuscatune.enclave.verification import Verifier
from obfuscatune.errors import BadReply, NonFiniteError, WrongProduct

if not native.are_there():
    pytest.skip("no native kernels here; torch computes", allow_module_level=True)

from obfuscatune.enclave.kernels.native import RotationOfFew
from obfuscatune.enclave.mixing import SIZE_OF_ROWS, RowScales
from tests.contract.comparison import float64_kept

KEY = RootKey(b"f" * 32)
SHIELD = 8
DTYPES = (torch.float32, torch.float64)
DIMS = (256, 300, 331, 768, 1021)  # of one grid and of two, a prime among them
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))


def some(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return KEY.stream("x", *shape).normal(*shape).to(dtype)


def structured(dim: int, side: str = "in") -> StructuredTransform:
    return StructuredTransform(dim, KEY.stream("transform", dim, side))


def by_torch(R: StructuredTransform, x: Tensor, *, undo: bool) -> Tensor:
    """x R, or x R⁻¹, in float64."""
    return REFERENCE.rotate(x.double(), R._rotation(torch.float64, x.device, undo=undo))


def most_rows(dtype: torch.dtype) -> int:
    """With more of them, another kernel rotates."""
    table = native.kernels(dtype.itemsize)
    assert table is not None
    return table.lanes // 2 - 1


def is_few(crossing: InFlight) -> bool:
    return crossing.sent is not None and isinstance(crossing.sent.passage, FewRows)


def of_few(R: StructuredTransform, rows: int, dtype: torch.dtype, *, undo: bool = False) -> RotationOfFew:
    found = R.of_few(rows, dtype, undo=undo)
    assert found is not None
    return found


def drawn(rows: int, width: int, dtype: torch.dtype, shield: int = SHIELD) -> FewMixing:
    mixer = KroneckerMixer(shield, KEY.stream("mixing", rows, width))
    mixing = mixer.draw_few(rows, width, dtype)
    assert mixing is not None
    return mixing


def unrotated(dim: int, rows: int, dtype: torch.dtype) -> RotationOfFew:
    """R = 1."""
    found = TransformSpec.parse("none").make(dim, KEY.stream("none")).of_few(rows, dtype, undo=False)
    assert found is not None
    return found


def sent_before(rows: int, width: int, dtype: torch.dtype) -> FewMixing:
    """Secrets by which rows were sent."""
    mixing, x = drawn(rows, width, dtype), some(rows, width, dtype=dtype)
    assert unrotated(width, rows, dtype).send(x, mixing.secrets, torch.empty(mixing.rows, width, dtype=dtype))
    return mixing


def near(found: Tensor, expected: Tensor) -> bool:
    """To rounding: a few dozen sums of products of numbers of about 1 in a row."""
    size = expected.square().mean().sqrt().item()
    return torch.allclose(found.double(), expected, rtol=0, atol=100 * torch.finfo(found.dtype).eps * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("undo", [False, True])
def test_what_is_sent_is_rotated_and_mixed(dim: int, dtype: torch.dtype, undo: bool) -> None:
    """A [x R; N] for every number of rows, with shield rows of the size asked for."""
    R = structured(dim)
    for rows in range(1, most_rows(dtype) + 1):
        x, mixing = some(rows, dim, dtype=dtype) * 3, drawn(rows, dim, dtype)
        memory = torch.full((mixing.rows * dim + 100,), 7.0, dtype=dtype)
        sent = memory[50:-50].view(mixing.rows, dim)
        assert of_few(R, rows, dtype, undo=undo).send(x, mixing.secrets, sent)
        shield, A = mixing.secrets.stack[rows:].double(), mixing.secrets.A.double()
        torch.testing.assert_close(A @ A.T, torch.eye(mixing.rows).double(), rtol=0, atol=8 * torch.finfo(dtype).eps)
        assert shield.square().mean().sqrt().item() == pytest.approx(SIZE_OF_ROWS, rel=0.1)
        scales = RowScales.of(x)
        assert list(mixing.secrets.job.up[:rows]) == scales.up.flatten().tolist()
        assert mixing.mean_square == pytest.approx(scales.mean_square, rel=1e-6)
        expected = A @ torch.cat([by_torch(R, scales.scaled(x), undo=undo), shield])
        assert near(sent, expected)
        assert bool((memory[:50] == 7).all() and (memory[-50:] == 7).all())
        v = some(dim, 8)
        torch.testing.assert_close(mixing.secrets.image(v), sent.double() @ v, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("undo", [False, True])
def test_what_is_received_is_unmixed_and_rotated_back(dim: int, dtype: torch.dtype, undo: bool) -> None:
    R = structured(dim)
    for rows in range(1, most_rows(dtype) + 1):
        x, mixing = some(rows, 70, dtype=dtype) * 4.0 ** torch.arange(rows)[:, None], drawn(rows, 70, dtype)
        x[-1] *= rows > 1  # of the width that was sent, which is another; and the product of nothing is nothing
        assert unrotated(70, rows, dtype).send(x, mixing.secrets, torch.empty(mixing.rows, 70, dtype=dtype))
        up = RowScales.of(x).up.double()
        came, bias = some(mixing.rows, dim, dtype=dtype), some(1, dim, dtype=dtype)[0]
        kept = came.clone()
        turned = by_torch(R, (mixing.secrets.A.double().T @ came.double())[:rows], undo=undo)
        for plus in (None, bias):
            found = of_few(R, rows, dtype, undo=undo).receive(came, mixing.secrets, plus)
            assert found is not None
            assert near((found - (0 if plus is None else plus)) / up.where(up > 0, 1).to(dtype), turned * (up > 0))
            assert mixing.secrets.job.squares == pytest.approx(turned.square().sum().item(), rel=1e-4)
        assert torch.equal(came, kept)


@pytest.mark.parametrize("shield", [0, 1, 24])
def test_any_number_of_shield_rows(shield: int) -> None:
    x, mixing = some(5, 300, dtype=torch.float32), drawn(5, 300, torch.float32, shield=shield)
    assert mixing.rows == 5 + shield
    sent, R = torch.empty(mixing.rows, 300), structured(300)
    of_few(R, 5, torch.float32).send(x, mixing.secrets, sent)
    back = of_few(R, 5, torch.float32, undo=True).receive(sent, mixing.secrets, None)
    assert back is not None
    assert near(back, x.double())


@pytest.mark.parametrize("view", ["columns", "every other row", "one row again and again"])
def test_rows_need_not_lie_side_by_side(view: str) -> None:
    base = some(12, 900, dtype=torch.float32)
    x = {
        "columns": base[:5, 50:381],
        "every other row": base[::2, :331][:5],
        "one row again and again": base[:1, :331].expand(5, 331),
    }[view]
    sent = []
    for rows in (x, x.contiguous()):
        mixing = drawn(5, 331, torch.float32)
        of_few(structured(331), 5, torch.float32).send(rows, mixing.secrets, out := torch.empty(mixing.rows, 331))
        sent.append(out)
    assert torch.equal(*sent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [300, 331])
def test_each_number_that_is_not_finite_shows(dim: int, dtype: torch.dtype) -> None:
    """Of what is received; numbers that are large and finite do not."""
    mixing, back = sent_before(3, dim, dtype), of_few(structured(dim), 3, dtype, undo=True)
    y = some(mixing.rows, dim, dtype=dtype) * 1e30
    assert back.receive(y, mixing.secrets, None) is not None
    for column in range(dim):
        bad = y.clone()
        bad[column % len(y), column] = NOT_FINITE[column % 3]
        assert back.receive(bad, mixing.secrets, None) is None, f"column {column}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 300, 331])
def test_without_a_rotation_rows_are_mixed_alone(dim: int, dtype: torch.dtype) -> None:
    """As with one, by the same kernels: A [x; N], and back."""
    R = TransformSpec.parse("none").make(dim, KEY.stream("none"))
    for rows in range(1, most_rows(dtype) + 1):
        x, mixing = some(rows, dim, dtype=dtype) * 3, drawn(rows, dim, dtype)
        turn, back = R.of_few(rows, dtype, undo=False), R.of_few(rows, dtype, undo=True)
        assert turn is not None
        assert back is not None
        assert turn.dim == dim
        sent = torch.empty(mixing.rows, dim, dtype=dtype)
        turn.send(x, mixing.secrets, sent)
        scaled = RowScales.of(x).scaled(x)
        assert near(sent, mixing.secrets.A.double() @ torch.cat([scaled, mixing.secrets.stack[rows:]]).double())
        found = back.receive(sent, mixing.secrets, None)
        assert found is not None
        assert near(found, x.double())
        for bad in NOT_FINITE:
            sent[-1, dim // 2] = bad
            assert back.receive(sent, mixing.secrets, None) is None
    assert R.of_few(most_rows(dtype) + 1, dtype, undo=False) is None


def test_shield_rows_beside_nothing_are_not_nothing() -> None:
    mixing, sent = drawn(2, 300, torch.float32), torch.empty(10, 300)
    of_few(structured(300), 2, torch.float32).send(torch.zeros(2, 300), mixing.secrets, sent)
    assert sent.square().mean() > 0.25


def test_the_same_input_gives_unrelated_requests() -> None:
    """As for many rows: correlated no more than random rows are."""
    x, R, mixer = some(4, 768, dtype=torch.float32), structured(768), KroneckerMixer(SHIELD, KEY.stream("unrelated"))
    requests = []
    for _ in range(2):
        mixing = mixer.draw_few(4, 768, torch.float32)
        assert mixing is not None
        of_few(R, 4, torch.float32).send(x, mixing.secrets, sent := torch.empty(12, 768))
        requests.append(torch.nn.functional.normalize(sent, dim=1))
    assert (requests[0] @ requests[1].T).abs().max() < 0.75


class Worker:
    """A link to one that multiplies at once."""

    corrects, corrected = WorkerLink.corrects, WorkerLink.corrected

    def __init__(self, W_star: Tensor) -> None:
        self.W_star, self.stats = W_star, ClientStats()
        self.seen: list[Tensor] = []
        self.tamper: Any = lambda product: product

    def allocate(self, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, cols, dtype=dtype)

    def submit(self, matrix_id: bytes, rows: Tensor, *, transpose: bool, **_: object) -> Any:
        self.seen.append(rows.clone())
        product = rows.to(self.W_star) @ (self.W_star.T if transpose else self.W_star)
        return SimpleNamespace(result=lambda: self.tamper(product.to(rows.dtype)), own=Tensor.clone, dtype=rows.dtype)

    def refusing(self) -> AbstractContextManager[None]:
        return nullcontext()


def offloaded(W: Tensor, shield: int = SHIELD, verify: float = 0.0) -> tuple[OffloadedProduct, Worker]:
    R_in, R_out = structured(W.shape[0]), structured(W.shape[1], "out")
    W_star = R_out.weight_right(R_in.weight_left(W))
    worker = Worker(W_star)
    verifier = Verifier(W_star, SecretStream.fresh(), verify) if verify else None
    mixer = KroneckerMixer(shield, SecretStream.fresh())
    return OffloadedProduct(worker, Held(b"", verifier=verifier), R_in, R_out, mixer), worker  # type: ignore[arg-type]


@pytest.mark.parametrize("verify", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "q"), [(300, 331), (768, 256), (256, 1021)])
def test_a_product_of_few_rows_is_the_plain_one(p: int, q: int, dtype: torch.dtype, verify: float) -> None:
    """Both ways, for one row up to more than few; few until a kernel has no more room."""
    W = some(p, q, dtype=dtype) / p**0.5
    product, worker = offloaded(W, verify=verify)
    for rows in range(1, most_rows(dtype) + 2):
        x, g = some(rows, p, dtype=dtype), some(rows, q, dtype=dtype)
        forth, back = product.start_forward(x), product.start_backward(g)
        few = rows <= most_rows(dtype)
        assert (is_few(forth), is_few(back)) == (few, few)
        found = product.finish_backward(back), product.finish_forward(forth)
        for one, expected in zip(found, (g.double() @ W.double().T, x.double() @ W.double()), strict=True):
            assert (one.dtype, one.shape) == (dtype, expected.shape)
            assert near(one, expected)
        assert worker.seen[-1].shape == (rows + SHIELD, q)
    assert worker.stats.verified == (2 * rows if verify else 0)


@pytest.mark.parametrize(
    ("x", "shield"),
    [(some(3, 300).bfloat16(), SHIELD), (some(3, 300).float(), 30)],
    ids=["16 bits", "many shield rows"],
)
def test_the_rest_goes_another_way(x: Tensor, shield: int) -> None:
    W = some(300, 331) / 300**0.5
    product, _ = offloaded(W, shield)
    crossing = product.start_forward(x)
    assert not is_few(crossing)
    found = product.finish_forward(crossing)
    assert found.dtype == x.dtype
    error = (found.double() - x.double() @ W).norm() / (x.double() @ W).norm()
    assert error < 32 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize("bad", NOT_FINITE)
def test_rows_that_are_not_finite_are_not_sent(bad: float) -> None:
    product, worker = offloaded(some(300, 331))
    x = some(3, 300)
    x[1, 299] = bad
    with pytest.raises(NonFiniteError):
        product.start_forward(x)
    assert not worker.seen


@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_very_large_and_very_small_rows_cross(size: float) -> None:
    """Their squares are no float32."""
    W = some(300, 331, dtype=torch.float32) / 300**0.5
    product, worker = offloaded(W)
    x = some(3, 300, dtype=torch.float32) * size
    x = x.T.contiguous().T if size > 1 else x  # and columns may lie side by side
    found = product.finish_forward(product.start_forward(x))
    assert near(found, x.double() @ W.double())
    assert len(worker.seen) == 1


@pytest.mark.parametrize("verify", [0.0, 1.0])
@pytest.mark.parametrize("bad", NOT_FINITE)
def test_a_product_that_is_not_finite_is_refused(bad: float, verify: float) -> None:
    product, worker = offloaded(some(300, 331), verify=verify)
    worker.tamper = lambda y: y.index_fill(1, torch.tensor([330]), bad)
    with pytest.raises(BadReply):
        product.finish_forward(product.start_forward(some(3, 300)))


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_product_is_found(backward: bool) -> None:
    product, worker = offloaded(some(300, 331), verify=1.0)
    worker.tamper = lambda y: y + torch.zeros_like(y).index_fill(1, torch.tensor([7]), 1e-3)
    with pytest.raises(WrongProduct):
        if backward:
            product.finish_backward(product.start_backward(some(3, 331)))
        else:
            product.finish_forward(product.start_forward(some(3, 300)))


@pytest.mark.parametrize("widths", [(331,), (100, 200, 31)])
def test_gradients_flow_through_few_rows(widths: tuple[int, ...]) -> None:
    """Of the rows and of the biases."""
    W = some(300, 331) / 300**0.5
    product, worker = offloaded(W, verify=1.0)
    x, biases = some(2, 2, 300).requires_grad_(), [some(width).requires_grad_() for width in widths]
    call = OffloadedCall(product, widths)
    call.start(x)
    parts = call.finish(*biases)
    expected = [part + bias for part, bias in zip((x @ W).split(widths, dim=-1), biases, strict=True)]
    assert all(near(*pair) for pair in zip(parts, expected, strict=True))
    found = torch.autograd.grad(sum(part.pow(3).sum() for part in parts), [x, *biases])
    plain = torch.autograd.grad(sum(part.pow(3).sum() for part in expected), [x, *biases])
    assert all(near(*pair) for pair in zip(found, plain, strict=True))
    assert [seen.shape for seen in worker.seen] == [(4 + SHIELD, 300), (4 + SHIELD, 331)]


def small(kind: str) -> PreTrainedModel:
    """Wide enough for the kernels, with biases where that kind has some."""
    sizes: dict[str, Any] = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind == "gpt2":
            no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
            config = GPT2Config(n_embd=256, n_head=4, n_layer=2, n_positions=32, **no_dropout, **sizes)
            return GPT2LMHeadModel(config)
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(hidden_size=256, intermediate_size=331, **heads, **sizes))


@pytest.fixture
def few_sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows were sent by the kernel for few, each time."""
    counts: list[int] = []
    send = RotationOfFew.send

    def counted(self: RotationOfFew, x: Tensor, *rest: Any) -> float:
        counts.append(x.shape[0])
        return send(self, x, *rest)

    monkeypatch.setattr(RotationOfFew, "send", counted)
    return counts


@pytest.fixture(params=["gpt2", "llama"])
def models(request: pytest.FixtureRequest, worker: LocalWorker) -> Iterator[Any]:
    """Makes a plain model of that dtype, and one like it that is protected."""
    made: list[Any] = []

    def make(dtype: torch.dtype) -> tuple[Any, Any]:
        plain = small(request.param).to(dtype).eval()
        made.append(protect(copy.deepcopy(plain), worker.address, first_blocks=0, verify=1.0))
        made[-1].requires_grad_()  # what is left in the enclave, to see its gradients
        return plain, made[-1]

    yield make
    for model in made:
        model.protection.close()


def test_a_model_computes_few_rows_as_the_plain_one_does(models: Any, few_sent: list[int]) -> None:
    """To rounding in float64, as are its gradients. Norms stay in it, too: see `float64_kept`."""
    plain, model = models(torch.float64)
    with float64_kept():
        for shape in ((1, 1), (1, 3), (2, 2), (1, 7)):
            few_sent.clear()
            ids = torch.arange(shape[0] * shape[1]).view(shape) % 61
            found, expected = (one(ids, labels=ids) for one in (model, plain))
            assert torch.allclose(found.logits, expected.logits, rtol=0, atol=1e-13)
            crossings = len(few_sent)
            if ids.numel() > most_rows(torch.float64):
                continue
            assert crossings >= 8
            if shape[1] > 1:
                found.loss.backward()
                expected.loss.backward()
                assert len(few_sent) == 2 * crossings
            assert set(few_sent) == {ids.numel()}
    others = dict(plain.named_parameters())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(gradients) >= 3  # of embeddings and norms, and biases where there are some
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name].grad, rtol=0, atol=1e-13), name


def test_a_model_decodes_as_the_plain_one_does(models: Any, few_sent: list[int]) -> None:
    """In float32, step by step."""
    plain, model = models(torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ways = {"output_scores": True, "return_dict_in_generate": True}
    found, expected = (one.eval().generate(ids, **options, **ways) for one in (model, plain))
    assert torch.equal(found.sequences, expected.sequences)
    for one, other in zip(found.scores, expected.scores, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-4)
    assert {1, 3} <= set(few_sent)
