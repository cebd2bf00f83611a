"""A logits processor that watches transformers' own `generate`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor

from persona_probe.errors import InputError
from persona_probe.models.layers import causal_model
from persona_probe.monitor.generation.actions import AnswerUnderWay
from persona_probe.monitor.generation.following import Follower, WatchedAnswer

NOT_ROW_BY_ROW = (
    "generate gave its rows in another order, or ran several tokens at once: watch greedy decoding or sampling, "
    "without beams and without assisted decoding"
)


class Watch(LogitsProcessor):
    """Reads every token once it has run, and leaves the logits as they are; see `GenerationMonitor.watching`.

    An answer that an action stops gets its end-of-text token next, and nothing else.
    """

    def __init__(
        self,
        model: nn.Module,
        pad_token_id: int | None,
        follower: Follower,
        finish: Callable[[AnswerUnderWay, Sequence[int], str], WatchedAnswer],
        eos_token_id: int | Sequence[int] | None = None,
    ) -> None:
        self.follower, self.finish = follower, finish
        config = causal_model(model).generation_config
        own: Any = eos_token_id if eos_token_id is not None else (None if config is None else config.eos_token_id)
        self.ends = frozenset([own] if isinstance(own, int) else own or ())
        pads: set[Any] = {pad_token_id, None if config is None else config.pad_token_id}
        self.fills = self.ends | (pads - {None})
        """Tokens after which a row is over: what ends an answer, and what fills rows that are done."""
        self.prompt: int | None = None
        self.over: dict[int, int] = {}
        """Rows that are over, with how many tokens their answers have."""
        self._stopped: set[int] = set()
        self._before: Int[Tensor, "batch pos"] | None = None
        self._passes = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Read the latest token of every row.

        Raises:
            InputError: beam search or assisted decoding, or an answer must stop and has no token that ends it.
        """
        self._check(input_ids)
        if self.prompt is None:
            self.prompt = input_ids.shape[1]
        made = input_ids[:, self.prompt :].tolist()
        for row, tokens in enumerate(made):
            if tokens and row not in self.over and tokens[-1] in self.fills:
                self.over[row] = len(tokens) - 1
        live = [row for row in range(len(made)) if row not in self.over]
        if live:
            ended = self.follower.after(live, live, [made[row] for row in live])
            for row in ended:
                self.over[row] = len(made[row])
                self._stopped.add(row)
        self.follower.before([None if row in self.over else row for row in range(len(made))])
        return self._forced(scores)

    def _check(self, input_ids: Int[Tensor, "batch pos"]) -> None:
        before, self._before, passes = self._before, input_ids, self._passes
        self._passes = self.follower.reader.passes
        if before is None:
            return
        kept = before.shape == (len(input_ids), input_ids.shape[1] - 1) and torch.equal(before, input_ids[:, :-1])
        if not kept or self._passes != passes + 1:
            raise InputError(NOT_ROW_BY_ROW)

    def _forced(self, scores: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "batch vocabulary"]:
        if not self._stopped:
            return scores
        if not self.ends:
            raise InputError("an answer cannot be stopped: the model has no end-of-text token; pass eos_token_id=")
        rows = sorted(self._stopped)
        scores = scores.clone()
        scores[rows] = -torch.inf
        scores[rows, min(self.ends)] = 0.0
        return scores

    def answers(self, output: Any) -> list[WatchedAnswer]:
        """The watched answers of what `generate` returned (token ids, or an output with `sequences`).

        Raises:
            InputError: it is not the output of the generation that was watched.
        """
        ids: Any = getattr(output, "sequences", output)
        if self.prompt is None or self._before is None or len(ids) != len(self._before):
            raise InputError(
                "no generation was watched that gave these rows: pass logits_processor=[watch] to generate"
            )
        found = []
        for row, tokens in enumerate(ids[:, self.prompt :].tolist()):
            end = next((n for n, token in enumerate(tokens) if token in self.fills), None)
            length = self.over.get(row, len(tokens) if end is None else end)
            finish = "length" if end is None and row not in self.over else "stop"
            found.append(self.finish(self.follower.end(row), tokens[:length], finish))
        return found
