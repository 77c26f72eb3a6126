"""Decoders: every token is the one that the eager model writes when it reads the whole text again."""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor, nn

import planish
from planish.errors import CaptureError, DimError, InputError
from planish.ops import CACHED
from planish.sampling import Sampling

VOCABULARY, MAX_LEN = 97, 48

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: tr.LlamaConfig(**_SMALL),
    "qwen2": lambda: tr.Qwen2Config(**_SMALL),
    "qwen3": lambda: tr.Qwen3Config(**_SMALL, head_dim=20),
    "mistral": lambda: tr.MistralConfig(**_SMALL, sliding_window=9),
    "gemma2": lambda: tr.Gemma2Config(**_SMALL, head_dim=16, sliding_window=9),
    "gpt2": lambda: tr.GPT2Config(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
    "phi3": lambda: tr.Phi3Config(**_SMALL),
}
PROMPTS = [[5, 17, 3, 88, 41, 7, 2, 9, 60, 33, 12, 5, 71], [4], [90, 1, 1, 45, 23]]


@cache
def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = tr.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3.0)  # or the logits are so small that all tokens are alike
    return model


@cache
def decoder_of(name: str, batch: int = 3) -> planish.CompiledDecoder:
    return planish.compile_decoder(model_of(name), max_len=MAX_LEN, batch=batch)


def fresh(name: str, batch: int = 3) -> planish.CompiledDecoder:
    decoder = decoder_of(name, batch).fork()
    decoder.reset()
    return decoder


@torch.inference_mode()
def eager(name: str, text: list[int], count: int) -> list[int]:
    text = list(text)
    for _ in range(count):
        text.append(int(model_of(name)(torch.tensor([text])).logits[0, -1].argmax()))
    return text[-count:]


def written(decoder: planish.CompiledDecoder, prompts: Any, **options: Any) -> list[list[int]]:
    columns = zip(*decoder.generate(prompts, **options), strict=True)
    return [[t for t in column if t is not None] for column in columns]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_of_ragged_prompts_are_those_of_eager(name: str) -> None:
    assert written(fresh(name), PROMPTS, max_new=32) == [eager(name, p, 32) for p in PROMPTS]


@pytest.mark.parametrize("target", ["reference", "cpu-avx2"])
def test_attention_over_the_cache(target: str) -> None:
    class Model(nn.Module):
        def __init__(self, options: tuple[float, int, float]) -> None:
            super().__init__()
            self.options = options

        def forward(self, q: Tensor, k: Tensor, v: Tensor, sequence: Tensor, position: Tensor) -> Tensor:
            return CACHED(q, k, v, sequence, position, *self.options)

    torch.manual_seed(0)
    k, v = torch.randn(3, 21, 2, 12), torch.randn(3, 21, 2, 20)
    q, sequence, position = torch.randn(5, 6, 12), torch.tensor([0, 2, 1, 2, 0]), torch.tensor([0, 20, 7, 8, 15])
    tokens = planish.Dim("tokens", 1, 9)
    for options in ((0.3, 0, 0.0), (0.3, 5, 0.0), (1.0, 0, 2.0)):
        inputs = (q, k, v, sequence, position)
        dynamic = {name: {0: tokens} for name in ("q", "sequence", "position")}
        native = planish.compile(Model(options).eval(), inputs, target, dynamic=dynamic)
        want = []
        for row, (s, p) in zip(q, zip(sequence.tolist(), position.tolist(), strict=True), strict=True):
            first = max(0, p + 1 - options[1]) if options[1] else 0
            keys, values = (c[s, first : p + 1].repeat_interleave(3, 1).transpose(0, 1) for c in (k, v))
            scores = (keys @ row[:, :, None])[..., 0] * options[0]
            scores = options[2] * torch.tanh(scores / options[2]) if options[2] else scores
            want.append((scores.softmax(-1)[:, None] @ values)[:, 0])
        torch.testing.assert_close(native(*inputs), torch.stack(want), rtol=1e-5, atol=2e-6)


def test_texts_can_be_read_in_parts_and_padded() -> None:
    whole, parts = fresh("llama"), fresh("llama")
    want = whole.prefill(PROMPTS)
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([p + [0] * (longest - len(p)) for p in PROMPTS])
    torch.testing.assert_close(fresh("llama").prefill(padded, [len(p) for p in PROMPTS]), want)
    first = [p[: max(1, len(p) - 3)] for p in PROMPTS]
    assert parts.prefill(first).shape == (3, VOCABULARY)
    logits = parts._read([0, 2], [torch.tensor(p[len(f) :]) for p, f in zip(PROMPTS, first, strict=True) if p != f])
    torch.testing.assert_close(logits, want[[0, 2]], rtol=1e-4, atol=1e-4)
    assert parts.lengths == whole.lengths == tuple(map(len, PROMPTS))


def test_no_more_than_max_len_and_nothing_changes() -> None:
    decoder = fresh("llama")
    decoder.prefill(PROMPTS)
    want = decoder.fork().decode([1, 2, 3])
    with pytest.raises(DimError, match=r"sequence 0 has 13 tokens, and 36 more do not fit(.|\n)*max_len=48"):
        decoder.prefill([[1] * 36, [1], [1]])
    with pytest.raises(InputError, match=r"sequence 1 has a token outside 0\.\.96"):
        decoder.decode([1, 97, 3])
    assert torch.equal(decoder.decode([1, 2, 3]), want)
    tokens = written(fresh("llama"), PROMPTS)
    assert [len(p) + len(t) for p, t in zip(PROMPTS, tokens, strict=True)] == [MAX_LEN + 1] * 3


def test_forks_go_their_own_ways() -> None:
    decoder = fresh("qwen2")
    decoder.prefill(PROMPTS)
    other = decoder.fork()
    texts = [list(p) for p in PROMPTS]
    for token in (3, 50):
        decoder.decode([token] * 3)
        other.decode([token + 1] * 3)
        for text in texts:
            text.append(token)
    want = torch.stack([model_of("qwen2")(torch.tensor([[*t, 8]])).logits[0, -1] for t in texts])
    torch.testing.assert_close(decoder.decode([8] * 3), want, rtol=1e-4, atol=1e-4)
    assert other.compiled is decoder.compiled


def test_decoders_in_two_threads() -> None:
    decoders, found = [fresh("llama"), fresh("llama")], {}
    prompts = [PROMPTS, PROMPTS[::-1]]

    def run(i: int) -> None:
        found[i] = written(decoders[i], prompts[i], max_new=20)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1][::-1] == [eager("llama", p, 20) for p in PROMPTS]


def test_tokens_come_one_by_one_and_stop() -> None:
    want = [eager("llama", p, 12) for p in PROMPTS]
    stop = want[0][4]
    stream = fresh("llama").generate(PROMPTS, max_new=12, stop=[stop])
    assert next(stream) == [w[0] for w in want]
    ended = [w[: w.index(stop) + 1] if stop in w else w for w in want]
    assert written(fresh("llama"), PROMPTS, max_new=12, stop=[stop]) == ended


def test_sampling() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9, -1.0], [5.0, 0.0, 0.0, 4.9]])

    def drawn(sampling: Sampling) -> list[set[int]]:
        generator = torch.Generator().manual_seed(0)
        rows = [sampling.draw(logits, generator).tolist() for _ in range(200)]
        return [set(column) for column in zip(*rows, strict=True)]

    assert drawn(Sampling()) == [{1}, {0}]
    assert drawn(Sampling(1.0, top_k=2)) == [{1, 2}, {0, 3}]
    assert drawn(Sampling(1.0, top_p=0.4)) == [{1}, {0}]
    assert drawn(Sampling(5.0)) == [{0, 1, 2, 3}] * 2
    first, again = (written(fresh("llama"), PROMPTS, max_new=8, temperature=1.0, seed=3) for _ in range(2))
    assert first == again
    with pytest.raises(InputError, match="draw no tokens"):
        Sampling(-1.0)


def test_memory_is_told() -> None:
    found = fresh("llama").memory()
    assert found["cache"] == 2 * 2 * 3 * MAX_LEN * 2 * 16 * 4
    assert found["weights"] > 0 < found["working"]


@pytest.mark.parametrize(
    ("prompts", "lengths", "message"),
    [
        ([], None, "no text to go on from"),
        ([[1], [], [2]], None, "is empty"),
        ([[1], [2]], None, "2 texts were given for 3 sequences"),
        (torch.zeros(3, 4), None, "no row of token numbers"),
        (torch.ones(3, 4, dtype=torch.int64), [1, 5, 2], "lengths"),
    ],
)
def test_wrong_texts(prompts: Any, lengths: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fresh("llama").prefill(prompts, lengths)


def test_what_is_no_decoder() -> None:
    with pytest.raises(CaptureError, match="Linear is no causal language model"):
        planish.compile_decoder(nn.Linear(3, 3), max_len=4)
    with pytest.raises(DimError, match="knows 64 positions"):
        planish.compile_decoder(model_of("gpt2"), max_len=65)
    mamba = tr.AutoModelForCausalLM.from_config(
        tr.MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)
    )
    with pytest.raises(CaptureError, match=r"does not run with a cache|keeps no keys"):
        planish.compile_decoder(mamba.eval(), max_len=8)
