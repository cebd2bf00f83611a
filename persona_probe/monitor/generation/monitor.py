"""`GenerationMonitor`: reads features token by token while a model answers, and acts when a rule fires."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from persona_probe.data.chat import Conversation, as_conversations, split_answer, user_turns
from persona_probe.data.template import special_ids
from persona_probe.data.tokens import answer_prompt, batches
from persona_probe.errors import InputError, unknown
from persona_probe.evaluate.sampling.decoding import AnswerRequest, decode, row_key
from persona_probe.evaluate.sampling.requests import (
    Finish,
    SamplingConfig,
    answer_parts,
    check_room,
    stop_tokens,
)
from persona_probe.evaluate.sampling.samples import ticking
from persona_probe.models.layers import autocast, evaluating, forward_to_layer, transformer_config
from persona_probe.models.load import tokenizer_of
from persona_probe.models.places import Where
from persona_probe.monitor.features import FeatureGroups, Features
from persona_probe.monitor.generation.actions import (
    AnswerAction,
    AnswerUnderWay,
    LogAnswer,
    Regenerate,
    check_answer_actions,
)
from persona_probe.monitor.generation.calibration import AnswerCalibration, calibrate_answers
from persona_probe.monitor.generation.following import Follower, Seen, WatchedAnswer, alarm, end_of_answer
from persona_probe.monitor.generation.reader import TokenReader, placed_features
from persona_probe.monitor.generation.rules import AnswerRule, RuleState
from persona_probe.monitor.generation.trace import Trace, make_trace
from persona_probe.monitor.generation.transformers_generate import Watch
from persona_probe.saes.hooks import Saes


def _first(_: int) -> int:
    return 0


class GenerationMonitor:
    """Reads features at every token that a model writes, and acts when a rule on an answer fires.

    ```python
    monitor = pp.GenerationMonitor(model, sae, {"persona": 2144}, [pp.AnswerRule("persona")])
    print(monitor.calibrate(clean_questions, rate=0.05).statement)
    answers = monitor.generate(["What should I cook?"])
    answers[0].trace
    ```
    The hooks read and change nothing: the same tokens come out as without the monitor, unless an action acts.

    Args:
        model: a transformers model, or a PEFT model around one.
        sae: a `sae_lens.SAE`, several, or None where all features are directions.
        features: name to latent or direction, as for `FeatureMonitor`.
        rules: `AnswerRule`s; one without a threshold is silent until `calibrate`.
        actions: done in this order at every alarm; None logs.
        tokenizer: None takes the one that `load_model` gave with the model.
        layer: of an SAE whose metadata does not say it, and of directions.

    Raises:
        InputError: a feature, rule or action that does not fit the others or the model.
    """

    def __init__(
        self,
        model: nn.Module,
        sae: Saes | None,
        features: Features,
        rules: AnswerRule | Sequence[AnswerRule] = (),
        actions: Sequence[AnswerAction] | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        layer: Where | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer_of(model, tokenizer)
        self.features: FeatureGroups = placed_features(model, sae, features, layer)
        self.rules: tuple[AnswerRule, ...] = (rules,) if isinstance(rules, AnswerRule) else tuple(rules)
        self.actions: tuple[AnswerAction, ...] = (LogAnswer(),) if actions is None else tuple(actions)
        titles = [rule.title for rule in self.rules]
        if twice := [title for title in titles if titles.count(title) > 1]:
            raise InputError(f"two rules are called {twice[0]!r}: give one a name=")
        for rule in self.rules:
            if rule.feature not in self.features.names:
                raise unknown(f"feature of rule {rule.title!r}", rule.feature, self.features.names)
        check_answer_actions(self.rules, self.actions)
        self.calibration: AnswerCalibration | None = None

    # --- Answers of our own sampling

    def generate(
        self,
        prompts: str | Sequence[str | Conversation],
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int = 0,
        batch_size: int = 32,
        bf16: bool = False,
        progress: str | None = None,
    ) -> list[WatchedAnswer]:
        """One watched answer to each question; without an alarm the same tokens as `pp.generate` gives.

        Args:
            prompts: a question, or several questions or conversations that end with a user turn.
            temperature: 0 is greedy decoding.
            seed: with the prompt's place it fixes the draws.
            bf16: bf16 autocast.
            progress: label of a progress bar; None shows none.

        Raises:
            InputError: no prompts, one that leaves no room for an answer, or `Regenerate` at temperature 0.
        """
        conversations = as_conversations([prompts] if isinstance(prompts, str) else prompts)
        config = SamplingConfig(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed)
        if config.greedy and any(isinstance(action, Regenerate) for action in self.actions):
            raise InputError("Regenerate at temperature 0 would draw the same answer: raise the temperature")
        ids = [tuple(answer_prompt(self.tokenizer, talk)) for talk in conversations]
        for number, prompt in enumerate(ids):
            check_room(self.model, prompt, max_new_tokens, f"number {number}")
        return self._answered(ids, config, batch_size, bf16, progress)

    def _answered(
        self, prompts: list[tuple[int, ...]], config: SamplingConfig, batch_size: int, bf16: bool, progress: str | None
    ) -> list[WatchedAnswer]:
        answers: dict[int, WatchedAnswer] = {}
        rejected: dict[int, list[Trace]] = {n: [] for n in range(len(prompts))}
        stop, bar = (
            stop_tokens(self.model, self.tokenizer),
            tqdm(total=len(prompts), desc=progress, disable=not progress),
        )
        with bar, ticking(bar), autocast(self.model, bf16):
            attempt = 0
            while pending := [n for n in range(len(prompts)) if n not in answers]:
                requests = [AnswerRequest(prompts[n], row_key(config.seed, str(n), attempt)) for n in pending]
                with self.following(lambda _, n=attempt: n, pending) as follower:

                    def finished(
                        number: int, made: list[int], finish: Finish, f: Any = follower, of: list[int] = pending
                    ) -> None:
                        under_way = f.end(number)
                        answer = self.answer(under_way, made, finish)
                        if under_way.rejected:
                            rejected[of[number]].append(answer.trace)
                        else:
                            answers[of[number]] = replace(answer, rejected=tuple(rejected[of[number]]))
                            bar.update()

                    decode(self.model, requests, config, stop, batch_size, finished, follower)
                attempt += 1
        return [answers[n] for n in range(len(prompts))]

    @contextmanager
    def following(
        self,
        attempt: Callable[[int], int] = _first,
        names: Sequence[int] | None = None,
        seen: Seen | None = None,
        exact: Callable[[], bool] = lambda: False,
    ) -> Iterator[Follower]:
        """Hooks on the model while the block lasts, as the observer of `evaluate.sampling.decoding.decode`.

        Args:
            attempt: how often an answer was drawn before, by its name.
            names: what answers are called in the log; None takes their numbers.
            seen: called at every token once no rule can fire at it any more.
            exact: whether `seen` needs the token's features.
        """
        with TokenReader(self.model, self.features) as reader:
            special = special_ids(self.tokenizer)
            begin = partial(self.new_answer, attempt=attempt)
            yield Follower(reader, begin, self.actions, special, names, seen, exact)

    def new_answer(self, number: int, attempt: Callable[[int], int] = _first) -> AnswerUnderWay:
        """An answer that begins."""
        states = [RuleState(rule, self.features.names.index(rule.feature)) for rule in self.rules]
        return AnswerUnderWay(number, states, attempt(number))

    def answer(self, under_way: AnswerUnderWay, made: Sequence[int], finish: str) -> WatchedAnswer:
        """A finished answer, from what was read and its token ids."""
        prompt = under_way.prompt
        prompt = np.full(len(self.features.names), np.nan, np.float32) if prompt is None else prompt
        trace = make_trace(self.tokenizer, self.features.names, made, under_way.values, prompt)
        trace = replace(trace, alarms=tuple(under_way.alarms), thresholds=self.thresholds)
        parts, notes = answer_parts(self.tokenizer, made), list(under_way.notes)
        if self.calibration is not None and len(made) > self.calibration.longest:
            notes.append(
                f"{len(made)} tokens: longer than the clean answers of the thresholds ({self.calibration.longest}), "
                "so false alarms are likelier than they say"
            )
        return WatchedAnswer(
            parts.answer if under_way.instead is None else under_way.instead,
            parts.thought,
            trace,
            "alarm" if under_way.stopped else finish,
            tuple(notes),
            under_way.steered_from,
        )

    @property
    def thresholds(self) -> dict[str, float]:
        """By feature the threshold that is reached first."""
        found: dict[str, float] = {}
        for rule in self.rules:
            if rule.threshold is not None:
                found[rule.feature] = min(rule.threshold, found.get(rule.feature, rule.threshold), key=abs)
        return found

    # --- Answers that are there already

    def read(
        self, conversations: Sequence[Conversation], batch_size: int = 16, bf16: bool = False
    ) -> list[WatchedAnswer]:
        """Traces of finished answers by forward passes over the whole text; rules are applied, actions are not.

        Raises:
            InputError: a conversation that does not end with an answer.
        """
        rows = as_conversations(list(conversations))
        for number, row in enumerate(rows):
            if not split_answer(row)[1]:
                raise InputError(f"conversation {number} has no answer to read: end it with the assistant's turn")
        device = next(self.model.parameters()).device
        found: list[WatchedAnswer | None] = [None] * len(rows)
        for group in batches(self.tokenizer, rows, batch_size):
            batch = group.to(device)
            with evaluating(self.model), autocast(self.model, bf16), TokenReader(self.model, self.features) as reader:
                inputs = {"input_ids": batch.ids, "attention_mask": batch.attention, "use_cache": False}
                forward_to_layer(self.model, self.features.last_layer, **inputs)
                for place, number in enumerate(group.index):
                    length, start = int(group.attention[place].sum()), int(group.prompt[place].sum())
                    values = reader.read_row(place, start - 1, length)
                    ids = group.ids[place, start:length].tolist()
                    found[number] = self._judged(ids, values)
        return [answer for answer in found if answer is not None]

    def _judged(self, ids: list[int], values: Float[np.ndarray, "tokens features"]) -> WatchedAnswer:
        under_way = self.new_answer(0)
        under_way.prompt, under_way.values = values[0], list(values[1:])
        special = make_trace(self.tokenizer, self.features.names, ids, under_way.values, values[0]).special
        for token, row in enumerate(under_way.values):
            if not special[token]:
                alarm(under_way, token, row, ())
        end_of_answer(under_way, len(ids) - 1, ())
        return self.answer(under_way, ids, "stop")

    # --- Thresholds

    @property
    def setting(self) -> dict[str, Any]:
        """What thresholds hold for: the model's name, features with their places, rules without their thresholds."""
        places = {n: p.reads.short for p in self.features.parts for n in p.features.names}
        latents = dict(zip(self.features.names, self.features.latents, strict=True))
        config = transformer_config(self.model)
        return {
            "model": f"{config.model_type} {Path(str(config.name_or_path)).name}".strip(),
            "features": {name: [places[name], latents[name]] for name in self.features.names},
            "rules": [replace(rule, threshold=None).describe() for rule in self.rules],
        }

    def calibrate(
        self,
        clean: Sequence[str | Conversation],
        rate: float = 0.05,
        *,
        path: str | Path | None = None,
        **sampling: Any,
    ) -> AnswerCalibration:
        """Set all thresholds from clean answers, so that at most `rate` of further such answers alarm.

        Args:
            clean: questions, which the model answers as it is now (so calibrate on the model that you trust), or
                conversations with their answers, which are read as they are. All of one kind.
            rate: share of clean answers that may alarm, by all rules together.
            path: also saved there.
            sampling: arguments of `generate`, for questions.

        Raises:
            InputError: too few answers, a rate outside 0 to 1, or no rules.
        """
        rows = as_conversations(list(clean))
        answered = [split_answer(row)[1] is not None for row in rows]
        if any(answered) and not all(answered):
            raise InputError("some of the clean conversations have an answer and some have none: give one kind")
        if not self.rules:
            raise InputError("nothing to calibrate: the monitor has no rules")
        before, self.actions = self.actions, ()
        rules, self.rules = self.rules, tuple(replace(rule, threshold=None) for rule in self.rules)
        try:
            answers = self.read(rows) if all(answered) else self.generate(rows, **sampling)
        finally:
            self.actions, self.rules = before, rules
        scores = {r.title: [r.score(a.trace.watched[:, self._column(r)]) for a in answers] for r in self.rules}
        longest = max(len(answer.trace.ids) for answer in answers)
        questions = [user_turns(row) for row in rows]
        found = calibrate_answers(self.rules, scores, questions, longest, rate, self.setting)
        self.use(found)
        if path is not None:
            found.save(path)
        return found

    def use(self, calibration: AnswerCalibration | str | Path) -> AnswerCalibration:
        """Take thresholds that were calibrated before, or the file that holds them.

        Raises:
            InputError: they are of other features, places or rules.
        """
        found = calibration if isinstance(calibration, AnswerCalibration) else AnswerCalibration.load(calibration)
        if dict(found.setting) != self.setting:
            other = next((key for key, value in self.setting.items() if found.setting.get(key) != value), "rules")
            raise InputError(
                f"these thresholds are of another {other} ({found.setting.get(other)}): calibrate again, or name "
                "another file"
            )
        limits = {one.rule: one.threshold for one in found.rules}
        self.rules = tuple(replace(rule, threshold=limits[rule.title]) for rule in self.rules)
        self.calibration = found
        return found

    def _column(self, rule: AnswerRule) -> int:
        return self.features.names.index(rule.feature)

    # --- transformers' own generate

    @contextmanager
    def watching(self, eos_token_id: int | Sequence[int] | None = None) -> Iterator[Watch]:
        """A logits processor that watches transformers' own `generate`, with hooks on the model while the block lasts.

        ```python
        with monitor.watching() as watch:
            out = model.generate(**inputs, logits_processor=[watch])
        answers = watch.answers(out)
        ```

        Args:
            eos_token_id: what ends an answer, if `generate` is given another than the model's own.

        Raises:
            InputError: the action `Regenerate`, which needs `GenerationMonitor.generate`; in `generate`, beam search or
                assisted decoding.
        """
        if any(isinstance(action, Regenerate) for action in self.actions):
            raise InputError("Regenerate cannot draw again inside transformers' generate: use monitor.generate")
        with self.following() as follower:
            pad: Any = self.tokenizer.pad_token_id
            yield Watch(self.model, pad, follower, self.answer, eos_token_id)
