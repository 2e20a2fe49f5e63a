"""Tuning plans: ordered rules say how each part of a model is trained, and nothing is trained or frozen by accident.

A rule names parts by a component pattern (`vision.layers[-4:]`, `connector`, `language.layers[0:8]`). The first rule
that matches a parameter decides; every rule must decide something and the rules together must cover the model. LoRA
(Hu et al. 2021, arXiv 2106.09685) is put in place by peft: no wrapper around the model, one named adapter for each
setting, several settings side by side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from triptych.core.config import did_you_mean
from triptych.core.errors import ModelError, Problem
from triptych.core.types import ParameterGroup
from triptych.models.adapters import activate_adapters, adapter_names, inject_adapter
from triptych.models.components import Components, resolve_pattern
from triptych.models.tuning_rules import FrozenRule, FullRule, LoraRule, TuningRule

_QUERY_VALUE = ("q_proj", "v_proj", "query", "value", "qkv", "qkv_proj", "query_key_value", "c_attn")
"""Last parts of names; a fused projection is adapted whole, since its query and value rows share one matrix."""

_ATTENTION = (
    *_QUERY_VALUE,
    *("k_proj", "key", "o_proj", "out_proj", "projection_layer"),
    # A bare `proj` or `dense` would also hit patch embeddings and feed-forward layers.
    *("attn.proj", "attn.c_proj", "attention.dense", "attention.output.dense"),
)

PRESETS: Mapping[str, tuple[str, ...]] = {"qv": _QUERY_VALUE, "attention": _ATTENTION}
"""Target preset -> endings of module names, compared part by part; `all-linear` takes every linear layer."""


@dataclass(frozen=True)
class ParameterCount:
    """How much of a model is trained; adapters count in `total`."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trainable share in percent."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {self.percent:.4f}"


@dataclass(frozen=True)
class PlanRow:
    """What one rule did."""

    number: int
    """1-based position in the recipe."""
    rule: TuningRule
    components: tuple[str, ...]
    """Components with a parameter under this rule."""
    adapter: str | None
    """Name of the peft adapter, for `lora`."""
    lr: float | None
    """Learning rate as used; None when frozen."""
    weight_decay: float | None
    """Weight decay as used; None when frozen."""
    count: ParameterCount
    """Parameters under this rule, its adapter included."""


@dataclass(frozen=True)
class TuningPlan:
    """How a model is trained: what `apply_tuning` did to it."""

    rows: tuple[PlanRow, ...]
    """One for each rule, in order."""
    groups: list[ParameterGroup]
    """Every trainable parameter exactly once, tied ones too."""
    count: ParameterCount
    """Of the whole model."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order of their rules."""
        return tuple(dict.fromkeys(row.adapter for row in self.rows if row.adapter is not None))

    @property
    def full_matches(self) -> tuple[str, ...]:
        """Patterns whose base weights are trained; switching adapters off does not undo those."""
        return tuple(row.rule.match for row in self.rows if isinstance(row.rule, FullRule))

    def table(self) -> RenderableType:
        """The plan for reading on 80 columns, a line for each rule, and the trainable-parameter line."""
        table = Table(title="Tuning plan", title_justify="left", box=SIMPLE_HEAD, collapse_padding=True)
        table.add_column("", justify="right")
        longest = max((len(row.rule.match) for row in self.rows), default=0)
        table.add_column("match", overflow="fold", min_width=min(longest, 32))
        table.add_column("method\nrank/alpha/scale")
        for heading in ("lr", "decay", "trained", "of"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                str(row.number),
                # Rich reads square brackets as markup; layer ranges need them literally.
                row.rule.match.replace("[", r"\["),
                _describe(row.rule),
                "" if row.lr is None else f"{row.lr:g}",
                "" if row.weight_decay is None else f"{row.weight_decay:g}",
                f"{row.count.trainable:,}",
                f"{row.count.total:,}",
            )
        return Group(table, Text(str(self.count)))

    def summary(self) -> list[dict[str, object]]:
        """The rows of `table` as plain values."""
        return [
            {
                "match": row.rule.match,
                "method": _describe(row.rule),
                "lr": row.lr,
                "weight_decay": row.weight_decay,
                "trainable": row.count.trainable,
                "total": row.count.total,
            }
            for row in self.rows
        ]


def apply_tuning(
    model: nn.Module,
    components: Components,
    rules: Sequence[TuningRule],
    default_lr: float,
    default_weight_decay: float = 0.0,
) -> TuningPlan:
    """Freeze, unfreeze and inject adapters in place. Everything is checked before anything is changed.

    Args:
        model: a plain Hugging Face model; its outputs are the same right after this call, since B = 0.
        components: where its parts are.
        rules: in order; the first that matches a parameter decides.
        default_lr: for rules without `lr`.
        default_weight_decay: for `full` rules without `weight_decay`.

    Raises:
        ModelError: a rule matches nothing that is still free, parameters are left uncovered, a LoRA rule finds no
            linear layer, targets a tied head or an embedding it does not own, or the model already has adapters. All
            problems at once.
    """
    present = adapter_names(model)
    if present:
        raise ModelError(
            f"the model already has the adapters {', '.join(present)}; a second plan would nest new ones inside them",
            remedy="apply one plan to a freshly loaded model, or call merge_adapters first",
        )
    owner = assign_rules(model, components, rules)
    targets = _find_targets(model, components, rules, owner)
    adapters = _name_adapters(rules)
    for name, rule in adapters.items():
        numbers = [number for number, other in enumerate(rules) if _setting(other) == _setting(rule)]
        _inject(model, components, name, rule, [path for number in numbers for path in targets[number]])
    activate_adapters(model)
    return _finish(model, components, rules, _Outcome(owner, targets, adapters, default_lr, default_weight_decay))


def check_gradients(parameters: Mapping[str, nn.Parameter]) -> list[str]:
    """Trainable parameters that the backward pass did not reach.

    Reported are parameters whose gradient is None, and those whose gradient is exactly zero together with that of
    every other parameter of their module. A LoRA pair counts as one module: at the first step B = 0 makes the
    gradient of A exactly zero, which is as it should be, while B's is not. Call it on all ranks alike: sharded
    gradients are gathered one at a time.

    Args:
        parameters: qualified name -> parameter, after the backward pass and before gradients are cleared.

    Returns:
        Names in the given order; empty when all is well.
    """
    alive: dict[str, bool] = {}
    missing: set[str] = set()
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            continue
        alive.setdefault(_module_of(name), False)
        if parameter.grad is None:
            missing.add(name)
        elif _has_nonzero(parameter.grad):
            alive[_module_of(name)] = True
    return [
        name
        for name, parameter in parameters.items()
        if parameter.requires_grad and (name in missing or not alive[_module_of(name)])
    ]


def eval_frozen(model: nn.Module, components: Components) -> None:
    """Put components and blocks without a trainable parameter in evaluation mode; call it after every `train()`.

    `train()` would otherwise switch dropout and batch statistics of a frozen tower on again.
    """
    modules = dict(model.named_modules())
    for paths in (*components.modules.values(), *components.layers.values()):
        for path in paths:
            module = modules.get(path)
            if module is not None and not any(item.requires_grad for item in module.parameters()):
                module.eval()


@dataclass(frozen=True)
class _Outcome:
    """What is known once the rules are resolved."""

    owner: Mapping[int, int]
    """id of a base parameter -> index of its rule."""
    targets: Mapping[int, tuple[str, ...]]
    """Index of a LoRA rule -> modules it adapts."""
    adapters: Mapping[str, LoraRule]
    default_lr: float
    default_weight_decay: float


def assign_rules(model: nn.Module, components: Components, rules: Sequence[TuningRule]) -> dict[int, int]:
    """id(parameter) -> index of the first rule that matches it, whichever of its names (tied weights) was meant."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    owner: dict[int, int] = {}
    problems: list[Problem] = []
    for index, rule in enumerate(rules):
        try:
            matched = resolve_pattern(components, rule.match, model)
        except ModelError as error:
            problems += [
                Problem(f"rule {index + 1} `{rule.match}`: {item.message}", key=f"tuning[{index}]", remedy=item.remedy)
                for item in error.problems
            ]
            continue
        ids = {id(parameters[name]) for name in matched}
        free = ids - owner.keys()
        if not free:
            earlier = sorted({owner[item] + 1 for item in ids})
            taken = ", ".join(f"rule {number} `{rules[number - 1].match}`" for number in earlier)
            problems.append(
                Problem(
                    f"rule {index + 1} `{rule.match}` decides nothing: all it matches is taken by {taken}",
                    key=f"tuning[{index}]",
                    remedy="the first rule that matches wins: move the narrower rule up, or remove this one",
                )
            )
        owner.update(dict.fromkeys(free, index))
    if not problems:
        problems = _uncovered(model, components, owner)
    if problems:
        raise ModelError(problems)
    return owner


def _uncovered(model: nn.Module, components: Components, owner: Mapping[int, int]) -> list[Problem]:
    groups: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in owner:
            groups.setdefault(_component_of(components, name), []).append(name)
    return [
        Problem(
            f"no rule covers {len(names)} parameters of `{component}`: "
            + ", ".join(names[:3])
            + (", ..." if len(names) > 3 else ""),
            key="tuning",
            remedy=f"add `- {{match: {component}, method: frozen}}` as the last rule, or another method",
        )
        for component, names in groups.items()
    ]


def _component_of(components: Components, name: str) -> str:
    for component, paths in components.modules.items():
        if any(name == path or name.startswith(f"{path}.") for path in paths):
            return component
    return name


def _find_targets(
    model: nn.Module,
    components: Components,
    rules: Sequence[TuningRule],
    owner: Mapping[int, int],
) -> dict[int, tuple[str, ...]]:
    """Index of each LoRA rule -> the linear layers it adapts.

    Raises:
        ModelError: for every LoRA rule that cannot be applied.
    """
    linear = _linear_layers(model)
    head_is_tied = _head_is_tied(model, components)
    targets: dict[int, tuple[str, ...]] = {}
    problems: list[Problem] = []
    token_rules = [index for index, rule in enumerate(rules) if isinstance(rule, LoraRule) and rule.train_tokens]
    for index, rule in enumerate(rules):
        if not isinstance(rule, LoraRule):
            continue
        owned = [path for path, module in linear.items() if owner[id(module.weight)] == index]
        targets[index] = chosen = _choose(owned, rule, components.head)
        message = remedy = None
        if not chosen:
            message = f"finds no linear layer for the targets {rule.targets!r}"
            endings = {path.rpartition(".")[2] for path in owned}
            wanted = rule.targets if isinstance(rule.targets, tuple) else ()
            remedy = (
                did_you_mean(wanted[0], endings) if wanted and endings else f"linear layers here: {sorted(endings)}"
            )
        elif components.head in chosen and head_is_tied:
            message = f"adapts the head `{components.head}`, whose weight is also the embedding: it could not be merged"
            remedy = "name other targets, or train new tokens with `train_tokens`"
        elif rule.train_tokens:
            embedding = model.get_submodule(components.embeddings)
            if index != token_rules[0]:
                message, remedy = "is the second with `train_tokens`", "give all token ids in one rule"
            elif isinstance(rules[other := owner[id(embedding.weight)]], FullRule):
                # Under a frozen rule all other rows stay as they are; a fully trained matrix cannot be wrapped.
                message = (
                    f"has `train_tokens`, but rule {other + 1} `{rules[other].match}` trains all rows of "
                    f"`{components.embeddings}`"
                )
                remedy = "leave out `train_tokens`"
        if message:
            text = f"rule {index + 1} `{rule.match}` {message}"
            problems.append(Problem(text, key=f"tuning[{index}]", remedy=remedy))
    if problems:
        raise ModelError(problems)
    return targets


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> linear layer whose forward is really called.

    The output projection of `nn.MultiheadAttention` is a linear layer by type, but only its weight is read: an adapter
    on it would never run.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            parent = model.get_submodule(path.rpartition(".")[0])
            if not isinstance(parent, nn.MultiheadAttention):
                found[path] = module
    return found


def _choose(owned: Sequence[str], rule: LoraRule, head: str | None) -> tuple[str, ...]:
    if rule.targets == "all-linear":
        inner = tuple(path for path in owned if path != head)
        return inner or tuple(owned)
    endings = PRESETS[rule.targets] if isinstance(rule.targets, str) else rule.targets
    return tuple(path for path in owned if any(f".{path}".endswith(f".{ending}") for ending in endings))


def _head_is_tied(model: nn.Module, components: Components) -> bool:
    if components.head is None:
        return False
    return model.get_submodule(components.head).weight is model.get_submodule(components.embeddings).weight


def _setting(rule: TuningRule) -> tuple[object, ...] | None:
    """What makes two LoRA rules one adapter; None for other methods."""
    if not isinstance(rule, LoraRule):
        return None
    return rule.rank, rule.effective_alpha, rule.dropout, rule.use_rslora, rule.train_tokens, rule.precision


def _name_adapters(rules: Sequence[TuningRule]) -> dict[str, LoraRule]:
    """Adapter name -> the first rule with that setting, e.g. `lora-rank8-alpha16`."""
    named: dict[str, LoraRule] = {}
    seen: set[tuple[object, ...]] = set()
    for rule in rules:
        setting = _setting(rule)
        if not isinstance(rule, LoraRule) or setting is None or setting in seen:
            continue
        seen.add(setting)
        base = f"lora-rank{rule.rank}-alpha{rule.effective_alpha}"
        same = sum(re.fullmatch(rf"{base}(-\d+)?", name) is not None for name in named)
        named[f"{base}-{same + 1}" if same else base] = rule
    return named


def _inject(model: nn.Module, components: Components, name: str, rule: LoraRule, paths: Sequence[str]) -> None:
    tokens = None
    if rule.train_tokens:
        # peft follows a tied head by itself, but would leave an untied one as it was.
        tokens = {components.embeddings: list(rule.train_tokens)}
        if components.head is not None:
            tokens[components.head] = list(rule.train_tokens)
    config = LoraConfig(
        r=rule.rank,
        lora_alpha=rule.effective_alpha,
        lora_dropout=rule.dropout,
        use_rslora=rule.use_rslora,
        target_modules=list(paths),
        trainable_token_indices=tokens,
        bias="none",
    )
    inject_adapter(model, name, config)
    cast_adapter_dtype(model, name, autocast_adapter_dtype=rule.precision == "float32")
    adapted = {
        path for path, module in model.named_modules() if isinstance(module, LoraLayer) and name in module.lora_A
    }
    assert adapted == set(paths), f"peft adapted {sorted(adapted ^ set(paths))} against the plan"


def _finish(
    model: nn.Module,
    components: Components,
    rules: Sequence[TuningRule],
    outcome: _Outcome,
) -> TuningPlan:
    """Set `requires_grad` of every parameter and collect groups and counts."""
    names = {_setting(rule): name for name, rule in outcome.adapters.items()}
    rule_of_target = {path: index for index, paths in outcome.targets.items() for path in paths}
    trained: dict[int, dict[str, nn.Parameter]] = {index: {} for index in range(len(rules))}
    totals = dict.fromkeys(range(len(rules)), 0)
    found: dict[int, dict[str, None]] = {index: {} for index in range(len(rules))}
    token_rule = next((i for i, rule in enumerate(rules) if isinstance(rule, LoraRule) and rule.train_tokens), None)
    for name, parameter in model.named_parameters():
        index = outcome.owner.get(id(parameter))
        is_adapter = index is None
        if index is None:
            index = token_rule if ".trainable_tokens_delta." in name else rule_of_target[name.rpartition(".lora_")[0]]
            assert index is not None
        trains = is_adapter or isinstance(rules[index], FullRule)
        parameter.requires_grad_(trains)
        totals[index] += parameter.numel()
        found[index][_component_of(components, name)] = None
        if trains:
            trained[index][name] = parameter
    rows: list[PlanRow] = []
    groups: list[ParameterGroup] = []
    for index, rule in enumerate(rules):
        lr, decay = _rates(rule, outcome)
        count = ParameterCount(sum(item.numel() for item in trained[index].values()), totals[index])
        rows.append(PlanRow(index + 1, rule, tuple(found[index]), names.get(_setting(rule)), lr, decay, count))
        if lr is not None and decay is not None:
            groups += _groups(rule, components, trained[index], lr, decay)
    whole = ParameterCount(sum(row.count.trainable for row in rows), sum(row.count.total for row in rows))
    return TuningPlan(tuple(rows), groups, whole)


def _rates(rule: TuningRule, outcome: _Outcome) -> tuple[float | None, float | None]:
    """Learning rate and weight decay as used."""
    if isinstance(rule, FrozenRule):
        return None, None
    lr = outcome.default_lr if rule.lr is None else rule.lr
    if isinstance(rule, LoraRule):
        return lr, 0.0
    return lr, outcome.default_weight_decay if rule.weight_decay is None else rule.weight_decay


def _groups(
    rule: TuningRule,
    components: Components,
    parameters: Mapping[str, nn.Parameter],
    lr: float,
    weight_decay: float,
) -> list[ParameterGroup]:
    """One group for each component that the rule reaches."""
    split: dict[str, dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        split.setdefault(_component_of(components, name), {})[name] = parameter
    label = f"{rule.match}.{rule.method}"
    return [
        ParameterGroup(label if len(split) == 1 else f"{component}:{label}", component, items, lr, weight_decay)
        for component, items in split.items()
    ]


def _describe(rule: TuningRule) -> str:
    """The method with its setting, e.g. `lora 8/16/2 and 4 tokens`."""
    if not isinstance(rule, LoraRule):
        return rule.method
    text = f"lora {rule.rank}/{rule.effective_alpha}/{rule.scale:g}"
    return text + (f" and {len(rule.train_tokens)} tokens" if rule.train_tokens else "")


def _module_of(name: str) -> str:
    """The module a parameter belongs to; both halves of a LoRA pair belong to the layer they adapt."""
    head, separator, _ = name.rpartition(".lora_")
    return head + separator if separator else name.rpartition(".")[0]


def _has_nonzero(gradient: Tensor) -> bool:
    full = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return bool(torch.count_nonzero(full.coalesce().values() if full.is_sparse else full))
