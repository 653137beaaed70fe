"""The Triton kernels (in Triton's interpreter without a GPU), the choice of an implementation, and the bank."""

from __future__ import annotations

import pytest
import torch

import bottleneck.losses.exponentials as exponentials
import bottleneck.losses.fused as fused_module
import bottleneck.losses.linear as linear
from bottleneck.heads.bank import HeadBank, HeadKey
from bottleneck.losses import choice, choose, linear_cross_entropy, logit_step, step, targets, weights
from bottleneck.losses.fused import FLASH_RANK, Tile, _flash, chunk_rows, padded_rank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(N, R, V, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    z, A = torch.randn(N, R, generator=g), scale * torch.randn(V, R, generator=g)
    y = torch.randint(0, V, (N,), generator=g).int()
    y[::4] = -1
    return z.to(DEVICE), A.to(DEVICE), y.to(DEVICE)


def exact(z, A, y):
    """float64, from the definition: loss [N], dz, dA of the summed loss."""
    z, A = (t.double().requires_grad_() for t in (z, A))
    log_p = torch.log_softmax(z @ A.T, -1)
    loss = -log_p.gather(1, y.clamp(min=0).long()[:, None]).squeeze(1) * (y >= 0)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (z, A))


# a GPU's compiler takes minutes over large tiles of float32 operands, which no run uses
@pytest.mark.parametrize(
    "tile", [Tile(16, 64, 4, 2, 1), Tile(64, 32, 4, 2, 4)] + [Tile(128, 256, 4, 2, 2)] * (DEVICE == "cpu")
)
@pytest.mark.parametrize("N, R, V", [(33, 16, 1000), (64, 64, 257), (1, 32, 31)])
def test_every_tiling_gives_the_same_loss_and_gradients(tile, N, R, V):
    """However the two passes are cut, tails of N and V and several parts of V included."""
    z, A, y = problem(N, R, V)
    dA = torch.full_like(A, 7.0)
    loss, dz = _flash(z, A, y, dA, 0.5, tile, tile)
    for got, want in zip((loss, dz, (dA - 7) / 0.5), exact(z, A, y)):
        assert torch.allclose(got.double(), want, rtol=1e-4, atol=3e-5)


def test_a_nearly_certain_head_keeps_its_small_gradients():
    """p_y − 1 is computed in float32 from the target's logit: 16 bits would round it away where p_y is near 1."""
    g = torch.Generator().manual_seed(0)
    A = torch.nn.functional.normalize(torch.randn(300, 32, generator=g), dim=1).to(DEVICE).half()
    y = torch.arange(100, device=DEVICE).int()
    z = (A[:100] * 14).half()
    loss, dz = logit_step(z, A, y, "fused", torch.zeros(300, 32, device=DEVICE))
    want_loss, want_dz, _ = exact(z, A, y)
    assert want_loss.median() < 2e-2
    assert (loss - want_loss).norm() < 2e-3 * want_loss.norm() and (dz - want_dz).norm() < 2e-3 * want_dz.norm()


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("N, R, V, scale, hot", [(40, 48, 257, 1, 30), (5, 32, 31, 0.1, 0), (34, 48, 200, 30, 0)])
def test_exponentials_give_the_loss_and_gradients_of_float64(N, R, V, scale, hot, tma):
    """Ragged tiles, chunks, a target that many tokens share, and logits so large that every block is repaired."""
    z, A, y = problem(N, R, V, scale=scale)
    y[1:hot] = 7
    z, A = (z.bfloat16(), A.bfloat16()) if DEVICE == "cuda" else (z, A)
    want = exact(z.float(), A.float(), y)
    dA = torch.full(A.shape, 7.0, device=DEVICE)
    loss, dz = exponentials.step(z.clone(), A, y, dA, 0.5, rows=32, tma=tma)
    bound = 4e-3 if DEVICE == "cuda" else 5e-6  # bfloat16
    for got, wanted in zip((loss, dz, (dA - 7) / 0.5), want):
        assert (got.double() - wanted).norm() <= bound * wanted.norm()


def test_only_rows_beyond_the_offset_are_repaired():
    """One row of a block has a logit far above its sample; all blocks but that one keep their exponentials."""
    V, R = 400, 16
    z, A = torch.ones(70, R, device=DEVICE), torch.zeros(V, R, device=DEVICE)
    A[V - 1, 0] = 20.0  # not in the sample of 256 of 400 entries
    z[66, 0] = 20.0
    y = torch.zeros(70, device=DEVICE).int()
    loss, dz = exponentials.step(z.clone(), A, y, torch.zeros_like(A), 1.0, rows=70, tma=False)
    want, want_dz, _ = exact(z, A, y)
    assert want[66].item() == pytest.approx(400.0) and torch.allclose(loss.double(), want, rtol=1e-5)
    assert torch.allclose(dz.double(), want_dz, atol=1e-5)


@pytest.mark.parametrize("rank", [FLASH_RANK + 16, 16])
def test_a_loss_alone_keeps_its_logits_in_float32(rank):
    """The validation of 16-bit heads equals that of the same numbers in float32; 16-bit logits would be off by 1e-3."""
    z, A, y = problem(40, rank, 300)
    z, A = z.bfloat16(), (A / 2).bfloat16()
    want = exact(z.float(), A.float(), y)[0]
    assert (logit_step(z, A, y, "fused")[0] - want).abs().max() < 2e-5 * want.max()


@pytest.mark.parametrize("rank", [4, FLASH_RANK + 1])
def test_many_tokens_are_taken_in_parts(rank, monkeypatch):
    """Memory stays bounded for any number of tokens; masked tokens and the order of losses are kept."""
    g = torch.Generator().manual_seed(0)
    h, A, B = (torch.randn(*s, generator=g).to(DEVICE) for s in ((50, 32), (70, rank), (rank, 32)))
    y = targets((torch.arange(50) % 70).masked_fill(torch.arange(50) % 7 == 0, -100).to(DEVICE))
    w = weights(A, B / 6, torch.float32, "fused")
    found = []
    for most in (1000, 16):
        monkeypatch.setattr(fused_module, "most_tokens", lambda rank, most=most: most)
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        found.append((step(h, w, y, dA, dB), dA, dB))

    def same(a, b):  # a sum in another order: rounded at the size of its largest terms
        return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())) and a.abs().sum() > 0

    assert all(same(a, b) for a, b in zip(*found))
    # and through autograd
    x, a, b = (t.clone().requires_grad_() for t in (h, A, B / 6))
    lengths = []
    plain = linear.logit_step
    monkeypatch.setattr(linear, "logit_step", lambda z, *a, **k: lengths.append(len(z)) or plain(z, *a, **k))
    linear_cross_entropy(x, a, b, y.long(), impl="fused", reduction="sum", ignore_index=-1).backward()
    assert lengths == [16, 16, 16, 2] and same(a.grad, found[0][1]) and same(b.grad, found[0][2])


@pytest.mark.parametrize("rank", [1, 8, 48, 200, FLASH_RANK + 1])
def test_ranks_are_padded_and_gradients_are_not(rank):
    h, A, B = (
        torch.randn(20, 300, device=DEVICE),
        torch.randn(90, rank, device=DEVICE),
        torch.randn(rank, 300, device=DEVICE) / 17,
    )
    y = torch.arange(20, device=DEVICE).int()
    w = weights(A, B, torch.float32, "fused")
    assert w.A.shape == (90, padded_rank(rank)) and w.rank == rank
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    step(h, w, y, dA, dB)
    wanted_A, wanted_B = torch.zeros_like(A), torch.zeros_like(B)
    step(h, weights(A, B, torch.float32, "reference"), y, wanted_A, wanted_B)
    assert torch.allclose(dA, wanted_A, atol=1e-4) and torch.allclose(dB, wanted_B, atol=1e-3)


def test_chunks_stay_under_their_memory_and_are_whole_tiles():
    for N, V, R in (
        (8192, 50304, 2048),
        (16384, 50304, 2048),
        (8192, 50304, 512),
        (100, 256_000, 600),
        (8192, 1000, 300),
        (8192, 262_144, 512),
        (8192, 151_936, 512),
        (8192, 128_256, 2048),
    ):
        for memory in (256 << 20, 1 << 30, 5 << 29):
            size = exponentials.row_bytes(V, R)
            rows = chunk_rows(N, size, memory)
            assert rows == N or rows % 128 == 0
            assert rows * size <= memory or (rows == N and N < 128)
    assert chunk_rows(8192, 1 << 30, 1) == 128  # a tile at least


def test_a_target_beyond_the_vocabulary_gives_nan_and_reads_nothing():
    for R in (16, FLASH_RANK + 16):
        z, A, y = problem(8, R, 40)
        y[1] = 40
        loss, _ = logit_step(z, A, y, "fused", torch.zeros_like(A))
        assert torch.isnan(loss[1]) and torch.isfinite(loss[[0, 2, 3]]).all()


def test_gradients_are_handed_out_once():
    A, B = torch.randn(30, 4, device=DEVICE, requires_grad=True), torch.randn(4, 6, device=DEVICE, requires_grad=True)
    loss = linear_cross_entropy(torch.randn(5, 6, device=DEVICE), A, B, torch.arange(5, device=DEVICE), impl="chunked")
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


@pytest.mark.parametrize("impl", ["reference", "chunked", "fused"])
def test_a_bank_accumulates_the_bits_of_each_head_alone(impl):
    """Losses and gradients over two micro-batches: a head in a bank has the bits of the head alone."""
    keys = [HeadKey(8, 0.1, 0), HeadKey(8, 0.2, 0), HeadKey(3, 0.1, 0), HeadKey(40, 0.1, 0)]
    g = torch.Generator().manual_seed(0)
    start = {k: (torch.randn(500, k.rank, generator=g), torch.randn(k.rank, 48, generator=g) / 7) for k in keys}
    h, y = torch.randn(2, 60, 48, generator=g).to(DEVICE), torch.randint(0, 500, (2, 60), generator=g).to(DEVICE)

    def trained(some):
        bank = HeadBank(some, 500, 48, impl).to(DEVICE)
        for k in some:
            bank[k].set(*start[k])
        bank.zero_gradients()
        cast = bank.cast(torch.float32)
        losses = sum(bank.accumulate(h[i], y[i], cast, 1 / 120) for i in range(2))
        return {k: (losses[i], bank[k].A.grad, bank[k].B.grad) for i, k in enumerate(some)}

    together = trained(keys)
    for k in keys:
        for one, other in zip(trained([k])[k], together[k]):
            assert torch.equal(one, other)
    a, b = (t.to(DEVICE).requires_grad_() for t in start[keys[0]])
    loss = linear_cross_entropy(h, a, b, y, impl="reference")  # and they are the gradients of the mean loss
    loss.backward()
    assert torch.allclose(a.grad, together[keys[0]][1], atol=1e-6) and torch.allclose(
        loss.double(), together[keys[0]][0] / 120
    )


def test_choice_follows_the_table(tmp_path, monkeypatch):
    """The fastest implementation at the nearest measured point; devices without measurements run the chunked loss."""
    path = tmp_path / "t.csv"
    rows = [
        "cuda,bfloat16,8192,50000,64,fused,1",
        "cuda,bfloat16,8192,50000,64,chunked,2",
        "cuda,bfloat16,8192,50000,4096,fused,9",
        "cuda,bfloat16,8192,50000,4096,chunked,8",
    ]
    path.write_text("device,dtype,tokens,vocab,rank,impl,ms\n" + "\n".join(rows) + "\n")
    read = choice.table
    monkeypatch.setattr(choice, "table", lambda: read(path))
    choose.cache_clear()
    cuda = torch.device("cuda")
    assert choose(cuda, torch.bfloat16, 4096, 32_000, 100) == "fused"
    assert choose(cuda, torch.float16, 4096, 32_000, 3000) == "chunked"
    assert choose(cuda, torch.float32, 4096, 32_000, 100) == choose(cuda, torch.float64, 4096, 32_000, 100) == "chunked"
    assert choose(torch.device("cpu"), torch.float32, 4096, 32_000, 100) == "chunked"
    choose.cache_clear()


def test_the_table_in_the_repository_is_whole():
    rows = choice.table()
    assert {r["impl"] for r in rows} <= set(choice.loss_names()) - {"auto"} and all(r["ms"] > 0 for r in rows)
    assert choose(torch.device("cpu"), torch.float32, 4096, 8192, 64) == "chunked"
    assert choose(torch.device("cuda"), torch.bfloat16, 16384, 50304, 16) == "fused"


def test_targets_keep_their_meaning():
    y = torch.tensor([3, -100, 0])
    assert targets(y).tolist() == [3, -1, 0] and targets(y, 0).tolist() == [3, -100, -1] and y.tolist() == [3, -100, 0]
