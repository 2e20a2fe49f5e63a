"""Tokens that were added to a vocabulary must be trained: their rows start at the mean and mean nothing yet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from triptych.core.errors import ModelError
from triptych.models.components import Components, component_parameters
from triptych.models.load import LoadedVlm
from triptych.models.tuning import assign_rules
from triptych.models.tuning_rules import FullRule, LoraRule, TuningRule


def untrained_tokens(loaded: LoadedVlm) -> tuple[int, ...]:
    """Ids that are new to the model and can be read or written.

    The picture token is left out (features take its place and it is never a target), and so is padding.
    """
    unread = {loaded.model.config.image_token_id}
    if loaded.tokenizer.pad_token_id != loaded.tokenizer.eos_token_id:
        unread.add(loaded.tokenizer.pad_token_id)
    return tuple(index for index in loaded.tokens.new_ids if index not in unread)


def cover_new_tokens(
    model: nn.Module, components: Components, rules: Sequence[TuningRule], new_ids: Sequence[int]
) -> tuple[TuningRule, ...]:
    """The rules, with the rows of new tokens trained in embedding and output head.

    Where the embedding is trained in full nothing is missing. Otherwise the ids go into the `train_tokens` of a LoRA
    rule: the one that has some already, else the one that matches the embedding, else the first on the language model.

    Raises:
        ModelError: no rule trains the new rows of the embedding, or of a head that has rows of its own.
    """
    rules = tuple(rules)
    if not new_ids:
        return rules
    owner = assign_rules(model, components, rules)
    embedding = model.get_submodule(components.embeddings).weight
    if isinstance(rules[owner[id(embedding)]], FullRule):
        head = None if components.head is None else model.get_submodule(components.head).weight
        if head is not None and not isinstance(rules[owner[id(head)]], FullRule):
            raise ModelError(
                f"{len(new_ids)} new tokens would be trained in the embedding, but not in the output head",
                key="tuning",
                remedy="add `- {match: language.head, method: full}` before the rule that decides the head",
            )
        return rules
    language = {owner[id(item)] for item in component_parameters(components, "language", model).values()}
    adapting = [index for index, rule in enumerate(rules) if isinstance(rule, LoraRule) and index in language]
    if not adapting:
        raise ModelError(
            f"{len(new_ids)} tokens were added (ids {new_ids[0]} to {new_ids[-1]}), but no rule trains the language "
            "model: their rows would stay at the mean they start from",
            key="tuning",
            remedy="train the language model with `lora` or `full`, or add the tokens in the stage that does",
        )
    chosen = min(adapting, key=lambda index: (not _train_tokens(rules[index]), owner[id(embedding)] != index, index))
    ids = tuple(sorted({*_train_tokens(rules[chosen]), *new_ids}))
    extended = rules[chosen].model_copy(update={"train_tokens": ids})
    return (*rules[:chosen], extended, *rules[chosen + 1 :])


def _train_tokens(rule: TuningRule) -> tuple[int, ...]:
    return rule.train_tokens if isinstance(rule, LoraRule) else ()
