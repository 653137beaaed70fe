"""head.whiten: B trained in coordinates of variance 1. Start and kind of head are the same, the steps differ."""

from __future__ import annotations

import json

import pytest
import torch

from bottleneck.config.schema import OptimConfig
from bottleneck.core.errors import UserError
from bottleneck.heads.bank import HeadBank, HeadKey
from bottleneck.heads.calibration import roots
from bottleneck.training.optim import build_optimizer, clip_per_head
from bottleneck.training.run_folder import LAST
from conftest import assert_same_heads, heads_of, shell

V, D, N = 60, 10, 400
KEYS = [HeadKey(3, 1e-2, 0), HeadKey(D, 3e-3, 0)]


def hidden(outlier: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states with one large entry, as in language models; targets; the head [V, D] that targets come from."""
    g = torch.Generator().manual_seed(0)
    h = torch.randn(N, D, generator=g) @ (torch.eye(D) + 0.3 * torch.randn(D, D, generator=g))
    W = torch.randn(V, D, generator=g)
    y = torch.multinomial(torch.softmax(h @ W.T, -1), 1, generator=g).squeeze(1)
    h[:, 4] *= outlier
    W[:, 4] /= outlier
    return h, y, W


PLAIN = OptimConfig()


def trained(h, y, start, whiten=None, steps=5, optim=PLAIN):
    """Losses before each step, and the bank after the last."""
    bank = HeadBank(KEYS, V, D, "chunked", coordinates=whiten is not None)
    for key in KEYS:
        bank[key].set(*start[key])
    if whiten is not None:
        bank.use_coordinates(*whiten)
    optimizer, losses = build_optimizer(bank, optim), []
    for _ in range(steps):
        bank.zero_gradients()
        cast = bank.cast(torch.float32)
        sums = sum(bank.accumulate(h[i::2], y[i::2], cast, 1 / N) for i in range(2))
        bank.finish_gradients()
        _, optimizer.divisors = clip_per_head(bank, optim.clip, sums, optimizer.norms())
        optimizer.step()
        losses.append((sums / N).tolist())
    return losses, bank


def test_it_is_training_on_whitened_hidden_states():
    """Against an independent implementation that trains A and C = B Σ^½ on hidden states x = Σ^-½ h."""
    h, y, _ = hidden(30.0)
    root, inverse = roots((h.double().T @ h.double()) / N)
    g = torch.Generator().manual_seed(1)
    start = {k: (torch.randn(V, k.rank, generator=g), torch.randn(k.rank, D, generator=g) / 10) for k in KEYS}
    losses, bank = trained(h, y, start, (root, inverse))
    x = (h.double() @ inverse).float()
    want, plain = trained(x, y, {k: (A, (B.double() @ root).float()) for k, (A, B) in start.items()})
    assert torch.allclose(torch.tensor(losses), torch.tensor(want), atol=1e-4)
    for key in KEYS:
        A, B = bank.factors(key)
        assert torch.allclose(h @ B.T @ A.T, x @ plain[key].B.T @ plain[key].A.T, atol=2e-3)
    assert torch.allclose(x.T @ x / N, torch.eye(D), atol=1e-3)


@pytest.mark.parametrize("ratio", [0.3, 4.0])
def test_a_ratio_of_rates_is_two_rates(ratio):
    """PyTorch's AdamW with a group for A and one for B. Decay and clipping, which act on C, are off."""
    h, y, _ = hidden(1.0)
    g = torch.Generator().manual_seed(1)
    start = {k: (torch.randn(V, k.rank, generator=g), torch.randn(k.rank, D, generator=g) / 10) for k in KEYS}
    one = torch.eye(D, dtype=torch.float64)
    losses, bank = trained(
        h, y, start, (one / ratio, one * ratio), optim=OptimConfig(weight_decay=0, eps=1e-30, clip=None)
    )
    for i, key in enumerate(KEYS):
        A, B = (t.clone().requires_grad_() for t in start[key])
        optimizer = torch.optim.AdamW(
            [{"params": [A], "lr": key.lr}, {"params": [B], "lr": ratio * key.lr}],
            betas=(0.9, 0.95),
            eps=1e-30,
            weight_decay=0,
        )
        for k in range(5):
            loss = torch.nn.functional.cross_entropy(h @ B.T @ A.T, y)
            assert abs(loss.item() - losses[k][i]) < 1e-4
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(bank.factors(key), (A.detach(), B.detach()), rtol=1e-3, atol=1e-4)


def test_an_outlier_dimension_does_not_spoil_a_good_start():
    """The same step is small in all directions of x; in coordinates of h the outlier's is 300 times too long."""
    h, y, W = hidden(300.0)
    root, inverse = roots((h.double().T @ h.double()) / N)
    u, s, v = torch.linalg.svd(W @ root.float())
    start = {k: (u[:, : k.rank] * s[: k.rank], v[: k.rank] @ inverse.float()) for k in KEYS}
    for i in range(len(KEYS)):
        plain, white = ([step[i] for step in trained(h, y, start, w)[0]] for w in (None, (root, inverse)))
        assert abs(plain[0] - white[0]) < 1e-4 and max(plain) > plain[0] + 0.3 and max(white) < white[0] + 0.01


def test_a_run_with_a_ratio_of_rates(run, tmp_path):
    """The start is the same head; the trained heads differ."""
    for extra in ((), ("head.whiten=true",)):
        plain, slow = (
            run("ranks=[4]", "optim.lr=1e-2", *extra, *ratio, run_dir=tmp_path / f"{len(extra)}{len(ratio)}").curve
            for ratio in ((), ("optim.lr_ratio=0.1",))
        )
        assert (
            abs(plain["heads"][0]["initial_loss"] - slow["heads"][0]["initial_loss"])
            < 1e-4
            < abs(plain["heads"][0]["loss"] - slow["heads"][0]["loss"])
        )
        assert slow["recipe"]["lr_ratio"] == 0.1 and "lr_ratio" not in plain["recipe"]
    for wrong in ("0", "-1", "nan"):
        with pytest.raises(UserError, match="optim.lr_ratio"):
            run("ranks=[4]", f"optim.lr_ratio={wrong}")


def test_a_run_in_whitened_coordinates(run, tmp_path):
    """It starts where the plain run does; its files hold the heads of its curve; a resumed run has the same bits."""
    plain = run(run_dir=tmp_path / "plain").curve
    result = run("head.whiten=true", run_dir=tmp_path / "whole")
    for a, b in zip(plain["heads"], result.curve["heads"]):
        assert abs(a["initial_loss"] - b["initial_loss"]) < 1e-4 and a["loss"] != b["loss"]
    assert result.curve["recipe"]["whiten"] is True and "whiten" not in plain["recipe"]
    run("head.whiten=true", run_dir=tmp_path / "cut")
    (tmp_path / "cut" / LAST).unlink()  # as if it had been killed: the checkpoint before is there
    assert run("head.whiten=true", "ckpt_path=last", run_dir=tmp_path / "cut").curve == result.curve
    assert_same_heads(heads_of(tmp_path / "whole"), heads_of(tmp_path / "cut"))
    files = heads_of(tmp_path / "whole")
    module = result.module
    sums, count = torch.zeros(len(files), dtype=torch.float64), 0
    for inputs, y in module.validation(0, 1):
        h, y = module.backbone(inputs).flatten(0, 1), y.flatten()
        count += int((y != -100).sum())
        for i, t in enumerate(files[k.name] for k in module.bank.keys):
            sums[i] += torch.nn.functional.cross_entropy(h @ t["B"].T @ t["A"].T, y, reduction="sum").double()
    assert torch.allclose(
        sums / count, torch.tensor([h["loss"] for h in result.curve["heads"]], dtype=torch.float64), atol=1e-5
    )


@pytest.mark.slow
def test_two_processes_in_whitened_coordinates(toy, tmp_path):
    found = []
    for n in (1, 2):
        done = shell(*toy, "head.whiten=true", f"trainer.devices={n}", f"hydra.run.dir={tmp_path / str(n)}")
        assert done.returncode == 0, done.stderr
        found.append([h["loss"] for h in json.loads((tmp_path / str(n) / "curve.json").read_text())["heads"]])
    assert torch.allclose(*map(torch.tensor, found), atol=1e-5)
