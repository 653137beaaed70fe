"""Pretrain the embedded backbone: a small GPT-NeoX on the text that `data.recipes.debian` builds.

    python -m data.recipes.pretrain --corpus 'DIR/*.jsonl.zst' --out OUT    all three parts, which are
    python -m data.recipes.pretrain --corpus … --out OUT --do tokenizer     byte-level BPE
    python -m data.recipes.pretrain --corpus … --out OUT --do tokens        documents to token files
    python -m data.recipes.pretrain --out OUT --do train --minutes 7        the model on those files

OUT then holds `tokenizer/`, `tokens/{train,validation}.bin` (uint16, documents joined by the end token) and `model/`, a
Hugging Face folder in bfloat16. `--tokens` or `--minutes` sets the length; the learning rate follows warm-up and cosine
over that length. `--save-at pythia` also keeps `step0`, `step1`, `step2`, … `step512`, `step1000`, … for studies of
training. A GPU trains in bf16 autocast over float32 weights, compiled. A CPU runs the same code slowly, for trials.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import hashlib
import io
import json
import lzma
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Collection, Iterator, Optional

import numpy as np

END = "<|endoftext|>"
HELD_OUT = 0.003  # share of the documents kept for the validation loss


# ---------------------------------------------------------------- text to tokens
def read(path: str) -> Iterator[dict[str, Any]]:
    """The rows of a JSON-lines file, plain or compressed as .gz, .xz or .zst."""
    kind = str(path).rsplit(".", 1)[-1]
    if kind == "zst":
        import zstandard

        stream: Any = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(open(path, "rb")), encoding="utf-8")
    else:
        opened: dict[str, Any] = {"gz": gzip.open, "xz": lzma.open}
        stream = opened.get(kind, open)(path, "rt", encoding="utf-8")
    with stream:
        for line in stream:
            yield json.loads(line)


def held_out(row: dict[str, Any]) -> bool:
    """Whether a document is for validation, by a hash of its name, or of its text where it has none."""
    name = f"{row['source']}:{row['path']}" if "path" in row else row["text"]
    return int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) < HELD_OUT * 16**12


def train_tokenizer(files: list[str], folder: Path, vocab: int, context: int, characters: int = 120_000_000) -> None:
    """Byte-level BPE on about `characters` of text, taken evenly from the files; the end token has id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    def texts() -> Iterator[str]:
        for file in files:
            left = characters / len(files)
            for row in read(file):
                if left <= 0:
                    break
                if not held_out(row):
                    left -= len(row["text"])
                    yield row["text"]

    tokenizer.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=vocab,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def encode_file(job: tuple[str, Path]) -> list[np.ndarray]:
    """One file of text as two arrays of token ids, train and held out."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    file, tokenizer = job[0], Tokenizer.from_file(str(job[1]))
    out: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    rows = list(read(file))
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        for row, code in zip(part, tokenizer.encode_batch_fast([r["text"] for r in part], add_special_tokens=False)):
            out[held_out(row)].append(np.array([*code.ids, 0], np.uint16))
    return [np.concatenate(x) if x else np.zeros(0, np.uint16) for x in out]


def encode(files: list[str], tokenizer: Path, folder: Path, jobs: int) -> None:
    """Write train.bin and validation.bin: uint16 ids of all documents, each closed by the end token."""
    folder.mkdir(parents=True, exist_ok=True)
    total = [0, 0]
    with (
        open(folder / "train.bin", "wb") as train,
        open(folder / "validation.bin", "wb") as held,
        ProcessPoolExecutor(jobs) as pool,
    ):
        for arrays in pool.map(encode_file, [(f, tokenizer / "tokenizer.json") for f in files]):
            for k, (file, ids) in enumerate(zip((train, held), arrays)):
                file.write(ids.tobytes())
                total[k] += len(ids)
    print(f"tokens: {total[0]:,} to train on, {total[1]:,} held out", flush=True)


# ---------------------------------------------------------------- training
def build(args: argparse.Namespace, vocab: int) -> Any:
    """A GPT-NeoX with fresh weights."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(args.seed)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=vocab,
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=max(1, args.width // 64),
            intermediate_size=4 * args.width,
            max_position_embeddings=args.context,
            use_parallel_residual=True,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            attention_dropout=0.0,
            hidden_dropout=0.0,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            use_cache=True,
        )
    )


def cross_entropy(model: Any, block: Any) -> Any:
    """Mean next-token loss of `block` [batch, context + 1]. Logits are bf16 under autocast, their log-sum-exp float32.

    Calls the layers one by one: when compiled, the model's own forward builds a mask, which rules out flash attention.
    """
    import torch
    from torch.nn import functional as F

    body, position = model.gpt_neox, torch.arange(block.shape[1] - 1, device=block.device)[None]
    hidden = body.embed_in(block[:, :-1])
    angles = body.rotary_emb(hidden, position_ids=position)
    for layer in body.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=position, position_embeddings=angles)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    hidden = body.final_layer_norm(hidden)
    return F.cross_entropy(model.get_output_embeddings()(hidden).flatten(0, 1).float(), block[:, 1:].flatten())


def batches(tokens: Any, context: int, batch: int, seed: int) -> Iterator[Any]:
    """Endless batches [batch, context + 1]. Each epoch cuts the stream at another offset and reorders the blocks."""
    import torch

    order, epoch = np.zeros(0, np.int64), 0
    span = torch.arange(context + 1, device=tokens.device)
    while True:
        while len(order) < batch:
            rng = np.random.default_rng((seed, epoch))
            order = np.concatenate(
                [order, rng.permutation(np.arange(rng.integers(context), len(tokens) - context - 1, context))]
            )
            epoch += 1
        starts, order = torch.from_numpy(order[:batch]).to(tokens.device), order[batch:]
        yield tokens[starts[:, None] + span].long()


class Trainer:
    """Compiles once, then trains the model from the same start several times, to compare learning rates."""

    def __init__(self, args: argparse.Namespace):
        import torch

        self.args, self.torch = args, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_float32_matmul_precision("high")

        def load(name: str) -> Any:
            return torch.from_numpy(np.fromfile(args.out / "tokens" / name, np.int16)).to(self.device)

        self.train_tokens, held = load("train.bin"), load("validation.bin")
        blocks = min((len(held) - 1) // args.context, 512 if self.device == "cuda" else 16)
        self.held = torch.stack([held[i * args.context : (i + 1) * args.context + 1] for i in range(blocks)]).long()
        self.model = build(args, args.vocab).to(self.device)
        self.start = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.loss = torch.compile(cross_entropy) if args.compile else cross_entropy

    def autocast(self) -> Any:
        return self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.device == "cuda")

    def validate(self) -> float:
        """Mean loss of the held-out blocks."""
        size = min(self.args.batch, len(self.held))
        with self.torch.no_grad(), self.autocast():
            return float(np.mean([cross_entropy(self.model, b).item() for b in self.held.split(size)]))

    def save(self, folder: Path) -> None:
        """A Hugging Face folder in bfloat16, with the tokenizer."""
        torch = self.torch
        with torch.random.fork_rng():
            twin = build(self.args, self.args.vocab)
        twin.load_state_dict(self.model.state_dict())
        twin.to(torch.bfloat16).save_pretrained(folder)
        shutil.copytree(self.args.out / "tokenizer", folder, dirs_exist_ok=True)

    def fit(
        self,
        lr: float,
        minutes: Optional[float] = None,
        tokens: Optional[int] = None,
        save_at: Collection[int] = (),
        folder: Optional[Path] = None,
        every: int = 200,
    ) -> tuple[float, int]:
        """Train from the start; returns (held-out loss, tokens seen)."""
        torch, args = self.torch, self.args
        self.model.load_state_dict(self.start)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)
        stream, per_step = batches(self.train_tokens, args.context, args.batch, args.seed), args.batch * args.context
        steps, step, share = max(1, tokens // per_step) if tokens else None, 0, 0.0
        for _ in range(3 if minutes else 0):  # compile before the clock starts
            with self.autocast():
                self.loss(self.model, next(stream)).backward()
        optimizer.zero_grad()
        began = tick = time.time()
        while True:
            if step in save_at and folder:
                self.save(folder.parent / f"step{step}")
            if share >= 1:
                break
            warm = min(1, (step + 1) / args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr * warm * (args.floor + (1 - args.floor) * 0.5 * (1 + math.cos(math.pi * share)))
            with self.autocast():
                loss = self.loss(self.model, next(stream))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or steps:  # reading the loss waits for the device, so that the clock is right
                if step % 10 == 0:
                    loss.item()
                share = step / steps if steps else (time.time() - began) / 60 / (minutes or 1)
            if step % every == 0 or step == 20:
                speed, left = step * per_step / (time.time() - began), (time.time() - began) * (1 / share - 1)
                seen, rate = f"{step * per_step / 1e6:.0f}M", optimizer.param_groups[0]["lr"]
                pace = f"{speed / 1e3:,.0f}k tokens/s, {left:.0f} s left"
                print(f"step {step} tokens {seen} loss {loss.item():.4f} lr {rate:.2e} {pace}", flush=True)
                if folder and time.time() - tick > args.save_minutes * 60:
                    self.save(folder)
                    tick = time.time()
        result = self.validate()
        seen, seconds = f"{step * per_step / 1e6:.0f}M", time.time() - began
        print(f"lr {lr:g}: {step} steps, {seen} tokens, {seconds:.0f} s, held-out loss {result:.4f}", flush=True)
        if folder:
            self.save(folder)
        return result, step * per_step


def pythia_steps(most: int = 10**6) -> set[int]:
    """The steps at which Pythia's checkpoints were saved."""
    return {0, *(2**k for k in range(10)), *range(1000, most, 1000)}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", help="glob of JSON-lines files, plain, .gz, .xz or .zst")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="folder of the result (default: OUT/model)")
    parser.add_argument(
        "--do", nargs="+", default=["tokenizer", "tokens", "train"], choices=["tokenizer", "tokens", "train"]
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256, help="blocks a step")
    parser.add_argument("--tokens", type=int, help="train on this many tokens (default 1e9, unless --minutes is given)")
    parser.add_argument("--minutes", type=float, help="train this long instead")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument(
        "--try-lr", type=float, nargs="+", default=[], help="short runs first; the best of these is used"
    )
    parser.add_argument("--try-minutes", type=float, default=0.3)
    parser.add_argument(
        "--floor", type=float, default=0.1, help="the schedule's last learning rate as a share of the peak"
    )
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-at", nargs="+", default=[], help="steps to keep as OUT/stepN, or 'pythia'")
    parser.add_argument("--save-minutes", type=float, default=2, help="how often the model so far is written")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if args.vocab > 2**15:
        parser.error(f"--vocab {args.vocab}: tokens are kept in 15 bits; at most {2**15}")
    args.files = sorted(glob.glob(args.corpus or ""))
    if not args.files and args.do != ["train"]:
        parser.error(f"--corpus {args.corpus!r} matches no file")
    return args


def main() -> None:
    args = parse_arguments()
    files, tokenizer = args.files, args.out / "tokenizer"
    if "tokenizer" in args.do:
        train_tokenizer(files, tokenizer, args.vocab, args.context)
    if "tokens" in args.do:
        encode(files, tokenizer, args.out / "tokens", args.jobs)
    if "train" in args.do:
        trainer = Trainer(args)
        tried = {lr: trainer.fit(lr, minutes=args.try_minutes)[0] for lr in args.try_lr}
        lr = min(tried, key=tried.__getitem__) if tried else args.lr
        save_at = pythia_steps() if args.save_at == ["pythia"] else {int(s) for s in args.save_at}
        length = {"minutes": args.minutes} if args.minutes else {"tokens": args.tokens or 10**9}
        loss, seen = trainer.fit(lr, **length, save_at=save_at, folder=args.model or args.out / "model")
        result = {"held_out_loss": loss, "tokens": seen, "unique_tokens": len(trainer.train_tokens)}
        print(json.dumps(result | {"lr": lr, "tried": tried}))


if __name__ == "__main__":
    main()
