"""Greedy generation over several ranks, with and without a speculative draft."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import attrs

from commgraph.coordinator import GroupCoordinator
from commgraph.demo.model import ShardedLlama
from commgraph.demo.reference import KVCache

__all__ = ["Engine", "Generated"]

Progress = Callable[["Generated"], None]


@attrs.define
class Generated:
    """Generated tokens, and the cost of generating them.

    Attributes:
        tokens: without the prompt.
        proposed: tokens that the draft proposed.
        accepted: those of them that the target wrote too.
        seconds: from the prompt to the last token.
        steps: forward passes of the target.
    """

    tokens: list[int] = attrs.field(factory=list)
    proposed: int = 0
    accepted: int = 0
    seconds: float = 0.0
    steps: int = 0

    @property
    def acceptance(self) -> float:
        """Accepted tokens for each proposed one."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


@attrs.frozen
class Engine:
    """One copy of the target on some ranks, and the draft that runs beside it on the first of them.

    The ranks move in step: the driver (the group's first rank) broadcasts the next step by `broadcast_object`, all of them run the target,
    and its last stage broadcasts the result. Ranks of another copy of the draft are idle.

    Attributes:
        group: every rank of this engine, first stage first.
        target, draft: this rank's parts.
    """

    group: GroupCoordinator
    target: ShardedLlama
    draft: ShardedLlama

    def generate(self, prompt: Sequence[int], count: int, *, draft_length: int, progress: Progress | None = None) -> Generated:
        """Generate `count` tokens after `prompt`: those that the target alone would, whatever the draft proposes.

        Args:
            prompt: tokens, the same on every rank.
            count: tokens to write.
            draft_length: tokens that the draft proposes for each pass of the target; 0 does without it.
            progress: called on the driver after every step.
        """
        result = Generated()
        tokens = list(prompt)
        target_cache, draft_cache = KVCache(), KVCache()
        started = time.perf_counter()
        while len(result.tokens) < count:
            guess = self._propose(tokens, draft_cache, draft_length) if self._drafts else []
            # The draft's ranks and the target's may differ: the driver decides for all.
            guess = self.group.broadcast_object(guess, src=0)
            truth = self._verify(tokens[target_cache.length :], guess, target_cache)
            agreed = next((i for i, token in enumerate(guess) if token != truth[i]), len(guess))
            kept = truth[: min(agreed + 1, count - len(result.tokens))]
            tokens += kept
            result.tokens += kept
            result.proposed += len(guess)
            result.accepted += agreed
            result.steps += 1
            result.seconds = time.perf_counter() - started
            # The last token is fed in the next step, which computes its successor.
            target_cache.truncate(len(tokens) - 1)
            draft_cache.truncate(len(tokens) - 1)
            if progress is not None and self.group.is_first_rank:
                progress(result)
        return result

    @property
    def _drafts(self) -> bool:
        """Whether this rank belongs to the copy of the draft that the driver is in."""
        return self.group.first_rank in self.draft.ctx.tp.ranks

    def _propose(self, tokens: Sequence[int], cache: KVCache, length: int) -> list[int]:
        guess: list[int] = []
        for _ in range(length):
            logits = self.draft([*tokens, *guess][cache.length :], cache)
            assert logits is not None  # the draft's pipeline has one stage
            guess.append(int(logits[-1].argmax()))
        return guess

    def _verify(self, new: Sequence[int], guess: Sequence[int], cache: KVCache) -> list[int]:
        """Return the target's own next token after the last one of `new` and after each of the guessed ones."""
        logits = self.target([*new, *guess], cache)
        mine = None if logits is None else logits[len(new) - 1 :].argmax(-1).tolist()
        truth: list[int] = self.group.broadcast_object(mine, src=self.group.world_size - 1)
        return truth
