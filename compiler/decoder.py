"""planish.compile_decoder: a causal language model with its cache, for prompts and for one token after another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from planish.api import CompiledModel, Inputs, compile
from planish.budget import Budget
from planish.causal import Step
from planish.errors import DimError, InputError
from planish.pipeline import Pass
from planish.program import Dim
from planish.sampling import Sampling
from planish.state import State
from planish.targets import Target

Prompts = Sequence[Tensor] | Sequence[Sequence[int]] | Tensor


def compile_decoder(
    model: nn.Module,
    target: str | Target = "cpu",
    *,
    max_len: int,
    batch: int = 1,
    passes: Sequence[str | Pass] | None = None,
    dump: str | Path | None = None,
    calibration: Iterable[Inputs] | None = None,
    budget: Budget | None = None,
    pin: Mapping[str, str] | None = None,
    executor: Executor | None = None,
    cache: bool = True,
) -> CompiledDecoder:
    """Compile a causal language model of transformers to one native function over packed tokens and a cache.

    Args:
        model: with a language model's head, in eval mode, on the CPU. Weights changed later are not seen.
        target: a name from ``planish targets``, or a Target.
        max_len: tokens that a sequence can have, its prompt among them.
        batch: sequences that are kept at a time.
        passes, dump, calibration, budget, pin, executor, cache: see ``planish.compile``. Calibration inputs are those
            of ``planish.causal.Step``.

    Raises:
        CaptureError: the model has no cached form.
        DimError: it knows fewer positions than ``max_len``.
        PlanishError: see ``planish.compile``.
    """
    if max_len < 1 or batch < 1:
        raise DimError(f"max_len={max_len} and batch={batch} leave no room for a token", fix="use 1 or more")
    step = Step(model, batch, max_len)
    tokens, reads = Dim("tokens", 1, batch * max_len), Dim("reads", 1, batch)
    zeros = torch.zeros(2, dtype=torch.int64)
    example = {"ids": zeros, "sequence": zeros, "position": torch.arange(2) % max_len, "reads": zeros}
    dynamic = {name: {0: reads if name == "reads" else tokens} for name in example}
    compiled = compile(
        step,
        example,
        target,
        dynamic=dynamic,
        passes=passes,
        dump=dump,
        calibration=calibration,
        budget=budget,
        pin=pin,
        executor=executor,
        cache=cache,
    )
    return CompiledDecoder(compiled, batch, max_len, step.vocabulary)


class CompiledDecoder:
    """A compiled language model and the texts that it has read: ``batch`` sequences of at most ``max_len`` tokens.

    One thread uses it at a time; ``fork`` makes another one, with the same code and weights and a copy of the texts.
    """

    def __init__(
        self, compiled: CompiledModel, batch: int, max_len: int, vocabulary: int, state: State | None = None
    ) -> None:
        self.compiled, self.batch, self.max_len, self.vocabulary = compiled, batch, max_len, vocabulary
        self._state = compiled.new_state() if state is None else state
        self._lengths = [0] * batch

    def __repr__(self) -> str:
        return f"CompiledDecoder({self.batch} sequences of {self.max_len} tokens, lengths {self._lengths})"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that the model has read."""
        return tuple(self._lengths)

    def reset(self) -> None:
        """Forget all texts."""
        self._lengths = [0] * self.batch

    def fork(self) -> CompiledDecoder:
        """A decoder that has read the same texts and goes on by itself; it shares code and weights."""
        made = CompiledDecoder(self.compiled, self.batch, self.max_len, self.vocabulary, self._state.clone())
        made._lengths = list(self._lengths)
        return made

    def memory(self) -> dict[str, int]:
        """Bytes of the weights, of the cache, and of what else a step of one token for each sequence needs."""
        zeros = torch.zeros(self.batch, dtype=torch.int64)
        inputs = dict.fromkeys(("ids", "sequence", "position", "reads"), zeros)
        found = self.compiled.memory(inputs)
        cached = sum(self._state[name].nbytes for name in self._state.names)
        return {"weights": found["weights_bytes"], "cache": cached, "working": found["arena_bytes"]}

    def prefill(self, ids: Prompts, lengths: Sequence[int] | Tensor | None = None) -> Tensor:
        """Read a text for each sequence, after what it has read already; returns logits [B, vocabulary] after them.

        Args:
            ids: for each sequence its tokens; or int64 [B, S], padded on the right.
            lengths: tokens of each row of a padded ``ids``; all if None.

        Raises:
            InputError: no text, or an empty one, or tokens that are no numbers below the vocabulary's size.
            DimError: a sequence would be longer than ``max_len``; nothing has changed then.
        """
        texts = _texts(ids, lengths)
        if len(texts) != self.batch:
            raise InputError(f"{len(texts)} texts were given for {self.batch} sequences", fix="give one for each")
        return self._read(list(range(self.batch)), texts)

    def decode(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Read one token for each sequence, [B]; returns logits [B, vocabulary].

        Raises:
            InputError, DimError: see ``prefill``.
        """
        return self.prefill([[int(token)] for token in ids])

    def generate(
        self,
        ids: Prompts | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        *,
        max_new: int | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[int] = (),
        seed: int = 0,
    ) -> Iterator[list[int | None]]:
        """Read texts, then write tokens, one for each sequence at a time, as they are made.

        Args:
            ids: see ``prefill``; the prompts.
            lengths: see ``prefill``.
            max_new: tokens to write; as many as there is room for if None.
            temperature: see ``Sampling``; 0 takes the most probable token.
            top_k: see ``Sampling``.
            top_p: see ``Sampling``.
            stop: tokens that end a sequence; they are written.
            seed: of the random numbers.

        Yields:
            A token for each sequence, None for those that have ended. The last token has not been read.

        Raises:
            InputError, DimError: see ``prefill``.
        """
        sampling, generator = Sampling(temperature, top_k, top_p), torch.Generator().manual_seed(seed)
        return self._generate(_texts(ids, lengths), max_new, sampling, frozenset(stop), generator)

    def _generate(
        self,
        texts: list[Tensor],
        max_new: int | None,
        sampling: Sampling,
        stop: frozenset[int],
        generator: torch.Generator,
    ) -> Iterator[list[int | None]]:
        logits, going = self.prefill(texts), list(range(self.batch))
        written = 0
        while going and (max_new is None or written < max_new):
            drawn = sampling.draw(logits, generator)
            tokens: list[int | None] = [None] * self.batch
            for sequence, token in zip(going, drawn.tolist(), strict=True):
                tokens[sequence] = token
            yield tokens
            written += 1
            ended = [t in stop or self._lengths[s] == self.max_len for s, t in zip(going, drawn.tolist(), strict=True)]
            drawn = drawn[[not end for end in ended]]
            going = [s for s, end in zip(going, ended, strict=True) if not end]
            if going and (max_new is None or written < max_new):
                logits = self._read(going, list(drawn[:, None]))

    def _read(self, sequences: list[int], texts: Sequence[Tensor]) -> Tensor:
        """Logits after the texts, which go on with the given sequences."""
        for sequence, text in zip(sequences, texts, strict=True):
            self._check(sequence, text)
        counts = torch.tensor([len(text) for text in texts])
        begins = torch.tensor([self._lengths[s] for s in sequences])
        ends = counts.cumsum(0)
        within = torch.arange(int(ends[-1])) - (ends - counts).repeat_interleave(counts)
        inputs: dict[str, Any] = {
            "ids": torch.cat(list(texts)),
            "sequence": torch.tensor(sequences).repeat_interleave(counts),
            "position": within + begins.repeat_interleave(counts),
            "reads": ends - 1,
        }
        logits = self.compiled(**inputs, state=self._state)
        for sequence, count in zip(sequences, counts.tolist(), strict=True):
            self._lengths[sequence] += count
        return logits

    def _check(self, sequence: int, text: Tensor) -> None:
        if not len(text):
            raise InputError(f"the text for sequence {sequence} is empty", fix="give one token at least")
        if int(text.min()) < 0 or int(text.max()) >= self.vocabulary:
            raise InputError(
                f"the text for sequence {sequence} has a token outside 0..{self.vocabulary - 1}",
                fix="use the model's own tokenizer",
            )
        if self._lengths[sequence] + len(text) > self.max_len:
            raise DimError(
                f"sequence {sequence} has {self._lengths[sequence]} tokens, and {len(text)} more do not fit",
                why=f"the decoder was compiled for max_len={self.max_len}",
                fix="reset() it, or compile it with a larger max_len",
            )


def _texts(ids: Prompts | None, lengths: Sequence[int] | Tensor | None) -> list[Tensor]:
    """Each sequence's tokens, int64."""
    if ids is None or not len(ids):
        raise InputError("there is no text to go on from", fix="give ids")
    texts = [torch.as_tensor(text) for text in ids]
    if any(t.dim() != 1 or (len(t) and (t.is_floating_point() or t.is_complex())) for t in texts):
        raise InputError("a text is no row of token numbers", fix="give a list of lists of int, or an int64 matrix")
    if lengths is not None:
        counts = [int(n) for n in lengths]
        if len(counts) != len(texts) or any(not 0 < n <= len(t) for n, t in zip(counts, texts, strict=False)):
            raise InputError(
                f"lengths {counts} are not those of {len(texts)} rows of {[len(t) for t in texts]} tokens",
                fix="give one for each row, from 1 to its size",
            )
        texts = [t[:n] for t, n in zip(texts, counts, strict=True)]
    return [t.long() for t in texts]
