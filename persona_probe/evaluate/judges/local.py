"""A local Hugging Face model as judge, whatever its tokenizer; heavy imports, so import it where it is used."""

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from persona_probe.data.tokens import encode
from persona_probe.errors import InputError
from persona_probe.evaluate.judges.replies import Ask, Failure, Replies, Reply
from persona_probe.files import words
from persona_probe.models.identity import model_key, why_not
from persona_probe.models.layers import autocast, causal_model, decoder_layers, evaluating, transformer_config
from persona_probe.models.prefix import CACHED_LAYERS

# --- The strings that a judge may say, as a trie of token sequences

DIGITS = "0123456789"
ROOT = -1


@dataclass
class Node:
    """A token sequence from the trie's root."""

    children: dict[int, "Node"] = field(default_factory=dict)
    """By token id."""
    numbers: list[str] = field(default_factory=list)
    """Number strings that this sequence spells: they count where no digit follows."""
    labels: list[str] = field(default_factory=list)
    """Labels that it spells: they count whatever follows."""


@dataclass(frozen=True)
class Tree:
    """A trie's nodes in one list, parents before children."""

    nodes: list[Node]
    parents: list[int]
    """Each node's parent in the list, `ROOT` for the first tokens."""
    tokens: Int[Tensor, " nodes"]
    depths: Int[Tensor, " nodes"]
    """0 for the first tokens."""
    visible: Bool[Tensor, "nodes nodes"]
    """Which nodes a node's token may see: those before it in its own sequence, and itself."""

    @classmethod
    def of(cls, trie: Node) -> "Tree":
        """Flatten a trie; its root has no token and is left out."""
        nodes, parents, tokens, level = [trie], [ROOT], [0], [0]
        for place, node in enumerate(nodes):
            for token, child in node.children.items():
                nodes.append(child)
                parents.append(place)
                tokens.append(token)
                level.append(level[place] + 1)
        visible = torch.eye(len(nodes), dtype=torch.bool)
        for place in range(1, len(nodes)):
            visible[place] |= visible[parents[place]]
        shifted_parents = [parent - 1 for parent in parents[1:]]
        return cls(nodes[1:], shifted_parents, torch.tensor(tokens[1:]), torch.tensor(level[1:]) - 1, visible[1:, 1:])


def spellings(tokenizer: PreTrainedTokenizerBase, text: str) -> set[tuple[int, ...]]:
    """The token sequences that stand for `text` at the start of a reply.

    These are the tokenizer's own encodings of the text, bare and after a space. Other ways to cut the same string into
    tokens are not counted: a model was trained on the tokenizer's own.
    """
    encoded = {tuple(tokenizer.encode(form, add_special_tokens=False)) for form in (text, f" {text}")}
    return {ids for ids in encoded if ids}


def build_trie(tokenizer: PreTrainedTokenizerBase, numbers: Iterable[str], labels: Iterable[str] = ()) -> Node:
    """The trie of all spellings."""
    root = Node()
    for number in numbers:
        for ids in spellings(tokenizer, number):
            _descend(root, ids).numbers.append(number)
    for label in labels:
        for ids in spellings(tokenizer, label):
            _descend(root, ids).labels.append(label)
    return root


def _descend(node: Node, ids: Sequence[int]) -> Node:
    for token in ids:
        node = node.children.setdefault(token, Node())
    return node


def digit_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that go on with a number: those that begin with a digit, single bytes (<0x35>) included."""
    bytes_of_digits = {f"<0x{ord(d):02X}>" for d in DIGITS}
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [i for i, t in enumerate(tokens) if t and (t[0] in DIGITS or t in bytes_of_digits)]


# --- Probabilities of a trie's strings as the continuation of a prompt, over the prompt's keys and values

_ROWS_AT_ONCE = 64
SLIDES = {"sliding_attention"}
"""What a configuration with a window and without a list of its layers means (Mistral)."""


class TrieWalk:
    """Scores prompts one by one, so a score never depends on which others are in a batch.

    The probability of a number is the sum, over its spellings in the trie, of P(spelling | prompt) times the
    probability that the token after it does not begin with a digit. Of a label it is the sum of P(spelling | prompt).
    All spellings are computed.

    All sequences run at once behind the prompt, each token seeing only its own prefix (a tree of attention masks,
    as in speculative decoding: SpecInfer, arXiv 2305.09781). If a model's attention cannot take such a mask, each
    sequence gets its own row with a copy of the prompt's keys and values: the same result, about a third as fast.

    Args:
        digits: tokens that begin with a digit.
        tree: whether to use the tree where it fits.
    """

    def __init__(self, model: nn.Module, trie: Node, digits: Sequence[int], *, tree: bool = True) -> None:
        self.model, self.trie, self.tree = model, trie, Tree.of(trie)
        self.device = next(model.parameters()).device
        self.digits = torch.tensor(digits, dtype=torch.long)
        self._use_tree = tree

    @torch.no_grad()
    def probabilities(self, prompt: Int[Tensor, " pos"]) -> dict[str, float]:
        """Strings and their probabilities after a prompt."""
        if self._remembers_more():
            return self._sums(self._whole(prompt[None])[0], self._by_whole_rows(prompt))
        cache = DynamicCache(config=transformer_config(self.model))
        first = self._run(cache, prompt[None], logits_to_keep=1)[0, -1]
        after = self._by_tree(cache, len(prompt)) if self._fits(len(prompt)) else self._by_rows(cache)
        return self._sums(first, after)

    def _run(self, cache: DynamicCache, ids: Int[Tensor, "rows pos"], **inputs: object) -> Float[Tensor, "rows pos v"]:
        """Distributions of the next token; the cache grows by `ids`."""
        out = self.model(input_ids=ids.to(self.device), past_key_values=cache, use_cache=True, **inputs)
        return out.logits.float().softmax(dim=-1).cpu()

    def _fits(self, prompt: int) -> bool:
        """Whether the attention kernel takes a mask for each pair, and no layer has forgotten some of the prompt."""
        config = transformer_config(self.model)
        kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
        window = getattr(config, "sliding_window", None)
        slides = "sliding_attention" in (getattr(config, "layer_types", None) or kinds | SLIDES)
        forgets = slides and window is not None and prompt + len(self.tree.nodes) >= window
        known = kinds <= {"full_attention", "sliding_attention"} and config._attn_implementation in ("sdpa", "eager")
        return self._use_tree and known and not forgets

    def _remembers_more(self) -> bool:
        """Whether layers keep a state that cannot be branched: convolutions, linear attention, state-space layers."""
        kinds = set(getattr(transformer_config(self.model), "layer_types", None) or ())
        return causal_model(self.model)._is_stateful or not kinds <= CACHED_LAYERS

    def _whole(self, ids: Int[Tensor, "rows pos"]) -> Float[Tensor, "rows v"]:
        """Distributions after whole rows, without a cache."""
        logits = self.model(input_ids=ids.to(self.device), use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].float().softmax(dim=-1).cpu()

    def _by_whole_rows(self, prompt: Int[Tensor, " pos"]) -> Float[Tensor, "nodes vocab"]:
        """The next token's distribution after every node, each behind a prompt of its own."""
        paths: list[list[int]] = []
        for parent, token in zip(self.tree.parents, self.tree.tokens.tolist(), strict=True):
            paths.append([*(paths[parent] if parent != ROOT else []), token])
        after: dict[int, Tensor] = {}
        for depth in sorted({len(path) for path in paths}):
            below = [n for n, path in enumerate(paths) if len(path) == depth]
            for start in range(0, len(below), _ROWS_AT_ONCE):
                part = below[start : start + _ROWS_AT_ONCE]
                rows = torch.stack([torch.cat([prompt, torch.tensor(paths[n])]) for n in part])
                after |= dict(zip(part, self._whole(rows), strict=True))
        return torch.stack([after[n] for n in range(len(paths))])

    def _by_tree(self, cache: DynamicCache, prompt: int) -> Float[Tensor, "nodes vocab"]:
        """The next token's distribution after every node of the tree, in one forward pass."""
        whole = torch.ones(len(self.tree.nodes), prompt, dtype=torch.bool)
        mask = torch.cat([whole, self.tree.visible], dim=1)[None, None].to(self.device)
        if transformer_config(self.model)._attn_implementation == "eager":
            mask = torch.zeros(mask.shape, device=self.device).masked_fill(~mask, torch.finfo(torch.float32).min)
        positions = (self.tree.depths + prompt)[None].to(self.device)
        return self._run(cache, self.tree.tokens[None], attention_mask=mask, position_ids=positions)[0]

    def _by_rows(self, cache: DynamicCache) -> Float[Tensor, "nodes vocab"]:
        """The same, a level at a time."""
        after: dict[int, Tensor] = {}
        self._extend(cache, [ROOT], after)
        return torch.stack([after[n] for n in range(len(self.tree.nodes))])

    def _extend(self, cache: DynamicCache, rows: list[int], after: dict[int, Tensor]) -> None:
        """Run the children of nodes whose sequences are the cache's rows."""
        below = [n for n, parent in enumerate(self.tree.parents) if parent in rows]
        for start in range(0, len(below), _ROWS_AT_ONCE):
            part = below[start : start + _ROWS_AT_ONCE]
            parents = torch.tensor([rows.index(self.tree.parents[n]) for n in part], device=self.device)
            branch = _rows(cache, parents)
            after |= dict(zip(part, self._run(branch, self.tree.tokens[part][:, None])[:, -1], strict=True))
            self._extend(branch, part, after)

    def _sums(self, first: Float[Tensor, " vocab"], after: Float[Tensor, "nodes vocab"]) -> dict[str, float]:
        """Put the conditional probabilities together."""
        ended = (1.0 - after[:, self.digits].double().sum(dim=1)).clamp(min=0.0)  # rounding may leave less
        sums: dict[str, float] = {}
        chances: list[float] = []
        for n, (node, parent) in enumerate(zip(self.tree.nodes, self.tree.parents, strict=True)):
            before, chance = (first, 1.0) if parent == ROOT else (after[parent], chances[parent])
            chances.append(chance * float(before[self.tree.tokens[n]]))
            for number in node.numbers:
                sums[number] = sums.get(number, 0.0) + chances[n] * float(ended[n])
            for label in node.labels:
                sums[label] = sums.get(label, 0.0) + chances[n]
        return sums


def _rows(cache: DynamicCache, rows: Int[Tensor, " rows"]) -> DynamicCache:
    """Some rows of a cache as a cache of their own. Layers replace their tensors, so shallow copies are enough."""
    branch = copy.copy(cache)
    branch.layers = [copy.copy(layer) for layer in cache.layers]
    branch.batch_select_indices(rows)
    return branch


class LocalBackend:
    """Scores by the probabilities of the number strings at the start of the reply (see `TrieWalk`).

    Args:
        name: the model's name, for people; the cache goes by its weights.
        bf16: run in bf16.

    Raises:
        InputError: hooks or replaced forwards change the model, so that its weights do not tell what it computes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        bf16: bool = False,
    ) -> None:
        if (why := why_not(model, len(decoder_layers(model)) - 1)) is not None:
            raise InputError(f"{name} cannot be a judge as it is ({why}): judge with the plain model")
        self.model, self.tokenizer = model, tokenizer
        self.bf16 = bf16
        self._walk = cache(self._new_walk)
        self.id = json.dumps(
            {
                "backend": "local",
                "model": name,
                "weights": model_key(model),
                "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:16],
                "decoding": {"bf16": bf16},
            },
            sort_keys=True,
        )

    @property
    def block(self) -> int:
        """Few, so that processes share the work evenly."""
        return 16

    def cost(self, ask: Ask) -> tuple[int, int, int]:
        """One call, its prompt tokens (counted), and the one token that is read."""
        return 1, len(encode(self.tokenizer, list(ask.messages)).ids), 1

    def replies(self, asks: Sequence[Ask]) -> Replies:
        """See `Backend.replies`.

        Raises:
            InputError: a criterion whose replies are written out.
        """
        for index, ask in enumerate(asks):
            if ask.written:
                raise InputError("a local judge reads probabilities and writes nothing: use an endpoint for critiques")
            yield index, self._reply(ask)

    def _reply(self, ask: Ask) -> Reply | Failure:
        try:
            return self._read(ask)
        except (RuntimeError, ValueError, IndexError) as error:  # out of memory, or longer than the model reads
            return Failure(words(error))

    def _read(self, ask: Ask) -> Reply:
        ids = encode(self.tokenizer, list(ask.messages)).ids
        with evaluating(self.model), autocast(self.model, self.bf16):
            tokens = self._walk(ask.numbers, ask.labels).probabilities(torch.tensor(ids))
        return Reply(tokens, prompt_tokens=len(ids), completion_tokens=1)

    def _new_walk(self, numbers: tuple[str, ...], labels: tuple[str, ...]) -> TrieWalk:
        trie = build_trie(self.tokenizer, numbers, labels)
        return TrieWalk(self.model, trie, digit_tokens(self.tokenizer))
