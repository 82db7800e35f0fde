"""Parts of a tuned model as typed, frozen dataclasses, and their two written forms: spec strings and JSON."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from dyntune.core.discovery import named
from dyntune.core.errors import SpecError, unknown_name
from dyntune.core.fields import descriptions

LARGEST = 65536
"""Of an option that is a whole number; wider is no backbone, and a file could ask for any memory by a larger one."""
_FACTOR = "scale is lora_alpha / rank"
_WIDTH = "bottleneck is the width of the tokens / reduction_factor"
ELSEWHERE = {
    "r": "rank,bottleneck",
    **dict.fromkeys(("lora_r", "lora_rank", "rank_dim"), "rank"),
    **dict.fromkeys(("lora_alpha", "alpha"), f"scale: {_FACTOR}"),
    **dict.fromkeys(("scaling", "adapter_scalar", "adapter_scale", "scaler", "s"), "scale"),
    **dict.fromkeys(("drop", "drop_rate", "p", "lora_dropout", "adapter_dropout", "proj_drop"), "dropout"),
    **dict.fromkeys(("target_modules", "target", "modules"), "targets"),
    **dict.fromkeys(
        ("bottleneck_size", "bottleneck_dim", "adapter_dim", "adapter_size", "hidden_dim", "ffn_num", "dim", "size"),
        "bottleneck,rank",
    ),
    "reduction_factor": f"bottleneck: {_WIDTH}",
    **dict.fromkeys(("non_linearity", "act", "act_layer", "nonlinearity"), "activation"),
    **dict.fromkeys(("init_lora_weights", "init_weights"), "init"),
    **dict.fromkeys(("num_virtual_tokens", "num_tokens", "num_prompts", "prompt_tokens", "prompt_length"), "prompts"),
    **dict.fromkeys(("num_experts", "n_experts"), "experts"),
    **dict.fromkeys(("token_target_ratio", "target_rate", "activation_rate", "ratio", "keep_rate"), "rate,keep"),
    **dict.fromkeys(("keep_ratio", "base_rate", "token_ratio"), "keep,rate"),
    **dict.fromkeys(("drop_loc", "pruning_loc"), "layers"),
}
"""What PEFT, timm, adapters and public code call options, and what they are here."""


class OptionError(SpecError):
    """A part refuses the values of its options; ``expected`` says which it takes."""

    expected = ""

    @classmethod
    def of(cls, part: Part, expected: str) -> Self:
        """The error with a part's name, and its options as they are written."""
        error = cls(f"{part.name()}: expected {expected}; given {format_spec(part)!r}.")
        error.expected = expected
        return error


@dataclasses.dataclass(frozen=True)
class Part:
    """Base of tuning methods, token policies and presets: a configuration that can be written as a spec string.

    A part is named after the module that it lives in (``fact_tt.py`` is ``fact-tt``). Its class docstring describes
    each field once, under ``Args:``.
    """

    source: ClassVar[str] = ""
    published: ClassVar[dict[str, str]] = {}
    """Tensor names of the public code -> ours, as regular expressions; for ``dyntune.load_published``."""

    def __new__(cls, *args: Any, **options: Any) -> Self:
        """Refuses keyword arguments that are no fields, with the nearest one, before Python does."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise cls.unknown(name)
        return super().__new__(cls)

    @classmethod
    def unknown(cls, option: str) -> SpecError:
        """The error for an option that the part does not have."""
        known = [field.name for field in dataclasses.fields(cls)]
        return SpecError(f"{cls.name()}: " + unknown_name("option", option, known, ELSEWHERE))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, coerce(value, _hints(type(self))[field.name]))
            except ValueError as error:
                raise SpecError(f"{self.name()}: {field.name}={value!r} is not valid: expected {error}.") from None
            value = getattr(self, field.name)
            numbers = value if isinstance(value, tuple) else (value,)
            if any(type(number) is int and number > LARGEST for number in numbers):
                raise SpecError(
                    f"{self.name()}: {field.name}={format_value(value)} is beyond {LARGEST:,}, which no backbone has "
                    "room for."
                )
        self.check()

    def check(self) -> None:
        """Raises SpecError when values do not make sense together; fields already have their types."""

    def settled(self) -> Self:
        """The part with every option that it leaves to something else, such as a recipe, as the value that is meant."""
        return self

    def require(self, condition: bool, expected: str) -> None:
        """Raises OptionError naming this part and what was ``expected`` unless ``condition`` holds."""
        if not condition:
            raise OptionError.of(self, expected)

    @classmethod
    def name(cls) -> str:
        """The name that users write."""
        return named(cls)

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the class docstring."""
        return inspect.cleandoc(cls.__doc__ or "").split("\n\n")[0].replace("\n", " ").replace("``", "")

    @classmethod
    def options(cls) -> dict[str, str]:
        """Field name -> its description from the ``Args:`` section of the class docstring."""
        return descriptions(cls)

    @classmethod
    def from_strings(cls, values: dict[str, str]) -> Self:
        """Builds the part from ``key=value`` strings.

        Raises:
            SpecError: unknown key, or a value of another type; lists what is right.
        """
        hints = {field.name: _hints(cls)[field.name] for field in dataclasses.fields(cls)}
        for key in values:
            if key not in hints:
                raise cls.unknown(key)
        converted = {}
        for key, text in values.items():
            try:
                converted[key] = _parse(text, hints[key])
            except ValueError as error:
                raise SpecError(f"{cls.name()}: {key}={text!r} is not valid: expected {error}.") from None
        return cls(**converted)

    @classmethod
    def completed(cls, options: dict[str, Any]) -> dict[str, Any]:
        """Options of a file: those that it does not know yet at what was meant then, without those that are no more."""
        return options

    def from_published(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        """What a tensor of the public code is here: our names (those of ``backbone.named_parameters``) and values.

        Returns:
            None if ``name`` is not this part's, an empty dictionary if the tensor has no use. By default one tensor
            under the name that ``published`` gives.
        """
        for pattern, ours in self.published.items():
            if re.search(pattern, name):
                return {re.sub(pattern, ours, name): tensor}
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: ``type`` (the part's name) and every field."""
        return {"type": self.name(), **dataclasses.asdict(self)}


def format_spec(part: Part) -> str:
    """The spec string that gives ``part`` back: its name and the fields that differ from their defaults."""
    changed = [
        f"{field.name}={format_value(getattr(part, field.name))}"
        for field in dataclasses.fields(part)
        if getattr(part, field.name) != field.default
    ]
    return part.name() + (":" + ",".join(changed) if changed else "")


def split_spec(text: str) -> list[tuple[str, dict[str, str]]]:
    """Splits ``name:key=value,...+name:...`` into names and their key/value strings.

    Raises:
        SpecError: the text does not have that form.
    """
    parts = []
    for piece in re.split(r"\+(?=\s*[A-Za-z])", text):  # not inside a number such as 1e+3
        name, _, options = piece.strip().partition(":")
        values: dict[str, str] = {}
        for option in filter(None, (o.strip() for o in options.split(","))):
            key, equals, value = option.partition("=")
            if not equals or not key or not value:
                raise SpecError(
                    f"{option!r} in {text!r} is not key=value. A spec is name:key=value,key=value; a list is a/b."
                )
            if key in values:
                raise SpecError(f"{key!r} is given twice in {text!r}.")
            values[key] = value
        if "=" in name:
            raise SpecError(f"{piece!r} has no colon between name and options. A spec is name:key=value,key=value.")
        if not name:
            raise SpecError(f"no name in the spec {text!r}. A spec is name or name:key=value,key=value.")
        parts.append((name, values))
    return parts


_LARGEST = torch.finfo(torch.float32).max * (1 + 2**-25)
"""A number from here on would become an infinite one in tensors."""
_HINTS: dict[type[Part], dict[str, Any]] = {}


def _hints(cls: type[Part]) -> dict[str, Any]:
    """The types of a class's fields, found once: finding them takes longer than the rest of making a part."""
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls)
    return _HINTS[cls]


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _expected(hint: Any) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "none"}
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"a list of {_expected(get_args(hint)[0]).removeprefix('a ')}s, written a/b/c"
    return words[hint]


def _parse(text: str, hint: Any) -> Any:
    """A value of type ``hint`` from its written form; ValueError says what was expected."""
    for member in _members(hint):
        if member is type(None) and text.lower() == "none":
            return None
        if get_origin(member) is Literal:
            for choice in get_args(member):
                if text == str(choice):
                    return choice
        elif get_origin(member) is tuple:
            try:
                return tuple(_parse(item, get_args(member)[0]) for item in text.split("/"))
            except ValueError:
                continue
        elif member is bool and text.lower() in ("true", "false", "1", "0", "yes", "no"):
            return text.lower() in ("true", "1", "yes")
        elif member is str:
            return text
        elif member in (int, float):
            try:
                return coerce(member(text), member)
            except ValueError:
                continue
    raise ValueError(" or ".join(map(_expected, _members(hint))))


def coerce(value: Any, hint: Any) -> Any:
    """``value`` as exactly the type ``hint`` (whole numbers as floats, lists as tuples); ValueError otherwise."""
    for member in _members(hint):
        if get_origin(member) is Literal:
            if any(value == choice and type(value) is type(choice) for choice in get_args(member)):
                return value
        elif get_origin(member) is tuple:
            if isinstance(value, list | tuple) and len(value) < 2 and get_args(member)[0] in _members(hint):
                raise ValueError(f"{_expected(member)}, of at least two; one alone is given as a plain number")
            if isinstance(value, list | tuple):
                return tuple(coerce(item, get_args(member)[0]) for item in value)
        elif member is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST:
                return float(value)
        elif type(value) is member:
            return value
    raise ValueError(" or ".join(map(_expected, _members(hint))))


def format_value(value: Any) -> str:
    """A value as it is written in a spec string."""
    if isinstance(value, tuple):
        return "/".join(map(format_value, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
