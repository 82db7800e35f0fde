"""A host of any family inside Hugging Face's ``PeftModel``; imported only where there is one."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Self

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.owners import open_passes
from dyntune.backbones.peft_config import check_config, config_to_json
from dyntune.backbones.sites import Changed, JointSite, Site
from dyntune.core.errors import BackboneError, in_one_line
from dyntune.core.tokens import Tokens

_WHOLE = re.compile(r"(^|\.)((blocks|layers?)(\.\d+)?|encoder|attn|attention|self_attn|mlp)$")
"""Names of blocks, attentions and MLPs, or of modules with all of them."""


class PeftBackbone(Backbone):
    """A backbone of any family whose host PEFT has wrapped.

    ``host`` is the family's model with PEFT's layers in it. The active adapters are trained as far as PEFT would train
    them; inactive ones, and the modules that ``modules_to_save`` has copied, stay as they are.

    Args:
        model: what ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returned.
        wrap: puts a plain host, or one with PEFT's layers in it, behind the interface.

    Raises:
        BackboneError: the model inside is not supported, or PEFT's method or its state is not.
    """

    peft: Any
    inner: Backbone
    wrap: Callable[[nn.Module], Backbone]

    def __init__(self, model: nn.Module, wrap: Callable[[nn.Module], Backbone]) -> None:
        if not isinstance(model, peft.PeftModel):
            raise BackboneError(
                f"{type(model).__name__} contains PEFT's layers but is no peft.PeftModel. Give what get_peft_model "
                "(without mixed=True) or PeftModel.from_pretrained returned."
            )
        for name in model.active_adapters:
            check_config(model.peft_config[name])
        _check_copies(model.get_base_model())
        inner = wrap(model.get_base_model())
        super().__init__(inner.host)
        self.blocks = inner.blocks
        # Not registered: its host and blocks are, under the names that they have without PEFT, and the host owns PEFT's
        # layers.
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "peft", model)
        object.__setattr__(self, "wrap", wrap)
        layers = [module for module in self.host.modules() if isinstance(module, BaseTunerLayer)]
        if not model.active_adapters or any(layer.disable_adapters for layer in layers):
            raise BackboneError("PEFT's adapters are switched off. Switch one on: peft_model.set_adapter(name).")
        if any(layer.merged for layer in layers):
            raise BackboneError(
                "PEFT's adapters are merged into the backbone's weights. Call peft_model.unmerge_adapter() before, or "
                "tune the plain model that peft_model.merge_and_unload() gives."
            )
        if any(isinstance(module, BaseTunerLayer) for head in self.heads for module in head.modules()):
            raise BackboneError(
                "PEFT adapts the classifier, which is always trained as a whole here. Leave it out of target_modules "
                "(exclude_modules=['head']), and give modules_to_save=['head'] if PEFT shall save it too."
            )
        self._image_shape = self.plain().image_shape
        adopted = [tensor for _, tensor in self._own() if isinstance(tensor, nn.Parameter) and tensor.requires_grad]
        if any(getattr(config, "bias", "none") != "none" for config in self._configs.values()):
            adopted += [p for name, p in self.host.named_parameters() if p.requires_grad and name.endswith("bias")]
        self.adopted = tuple(adopted)

    @classmethod
    def knows(cls, host: nn.Module) -> bool:
        return isinstance(host, peft.PeftModel)

    @property
    def _configs(self) -> dict[str, Any]:
        return {name: self.peft.peft_config[name] for name in self.peft.active_adapters}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.inner.train(mode)  # behind it: what the family keeps in eval mode stays so
        return self

    def embed(self, images: Tensor) -> Tokens:
        return self.inner.embed(images)

    def finish(self, tokens: Tokens) -> Tokens:
        return self.inner.finish(tokens)

    def readout(self, tokens: Tokens) -> Tensor:
        return self.inner.readout(tokens)

    def pooled(self, tokens: Tokens) -> Tensor:
        return self.inner.pooled(tokens)

    @property
    def prefix_tokens(self) -> int:
        return self.inner.prefix_tokens

    def unpooled(self, tokens: Tokens) -> Tensor:
        return self.inner.unpooled(tokens)

    def as_finished(self, x: Tensor) -> Tokens:
        return self.inner.as_finished(x)

    def reset_classifier(self, classes: int) -> None:
        if any(isinstance(head, ModulesToSaveWrapper) for head in self.inner.heads):
            raise BackboneError(
                "PEFT keeps a copy of the classifier (modules_to_save). Replace it in the plain model, before "
                "get_peft_model."
            )
        self.inner.reset_classifier(classes)

    @property
    def head_reads_grid(self) -> bool:
        return self.inner.head_reads_grid

    @property
    def read_first(self) -> int | None:
        return self.inner.read_first

    @property
    def class_token(self) -> bool:
        return self.inner.class_token

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        return tuple(_active(head) for head in self.inner.heads)

    @property
    def necks(self) -> tuple[nn.Module, ...]:
        return self.inner.necks

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self._image_shape

    @property
    def input_shape(self) -> tuple[int, ...]:
        return *self.inner.input_shape[:-3], *self._image_shape

    @property
    def grid(self) -> tuple[int, int]:
        return self.inner.grid

    @property
    def slices(self) -> int:
        return self.inner.slices

    @property
    def gradient_checkpointing(self) -> bool:
        return self.inner.gradient_checkpointing

    def switch_gradient_checkpointing(self, on: bool) -> None:
        self.inner.switch_gradient_checkpointing(on)

    def fold_factors(self) -> None:
        self.inner.fold_factors()

    def all_sites(self) -> Iterator[Site]:
        for site in self.inner.all_sites():
            yield _wrapped(site)

    def plain(self) -> Backbone:
        return self.wrap(_stripped(self.host))

    @property
    def idle(self) -> tuple[nn.Parameter, ...]:
        return self.inner.idle + tuple(
            parameter
            for layer in self.host.modules()
            if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
            for name, parameter in layer.named_parameters()
            if self._inactive(name)
            or (name.startswith("original_module.") and _active(layer) is not layer.original_module)
            or (hasattr(layer, "ln_tuning_layers") and name.startswith("base_layer."))
        )

    def companions(self) -> dict[str, Tensor]:
        return {f"host.{name}": tensor for name, tensor in self._own() if not tensor.requires_grad}

    @property
    def config(self) -> Any:
        return self.inner.config

    @property
    def passes(self) -> tuple[nn.Module, ...]:
        return self.inner.passes

    def host_logits(self, images: Tensor) -> Tensor:
        return self.inner.host_logits(images)

    def answer(self, loss: Tensor | None, logits: Tensor) -> Any:
        return self.inner.answer(loss, logits)

    def saved_name(self, name: str) -> str:
        # Inactive adapters, which are not saved, put a level into the names of the host's own tensors too.
        return re.sub(r"\.(base_layer|original_module)(?=\.)", "", self.inner.saved_name(name))

    def published_name(self, name: str) -> str:
        return self.inner.published_name(name)

    def recipe(self) -> dict[str, Any]:
        dtype = next(self.host.parameters()).dtype
        return {
            "version": version("peft"),
            "adapters": {name: self._as_saved(name, config_to_json(config)) for name, config in self._configs.items()},
            "upcast": any(tensor.is_floating_point() and tensor.dtype != dtype for _, tensor in self._own()),
        }

    def _as_saved(self, adapter: str, options: dict[str, Any]) -> dict[str, Any]:
        """An adapter's options, with the modules that it is on called as in files, where these have names of their own.

        Args:
            adapter: its name.
            options: as PEFT was given them: names of modules, ends of names, or expressions.
        """

        def saved(path: str) -> str:
            return self.inner.saved_name(f"host.{path}").removeprefix("host.")

        layers: dict[str, Any] = {
            path.removesuffix(".base"): module
            for path, module in self.host.named_modules()
            if isinstance(module, BaseTunerLayer) and adapter in module._get_available_adapters()
        }
        if all(saved(path) == path for path in layers):
            return options
        given = {"target_modules": sorted(map(saved, layers))}
        if options.get("feedforward_modules"):
            given["feedforward_modules"] = sorted(saved(path) for path, layer in layers.items() if layer.is_feedforward)
        if options.get("modules_to_save"):
            copies = [(path, m) for path, m in self.host.named_modules() if isinstance(m, ModulesToSaveWrapper)]
            given["modules_to_save"] = sorted(saved(path) for path, m in copies if adapter in m.modules_to_save)
        patterns = {
            option: {saved(path): values[key] for path in layers if (key := get_pattern_key(values, path)) in values}
            for option, values in options.items()
            if option.endswith("_pattern") and isinstance(values, dict)
        }
        found = dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
        return {name: (given | patterns | found).get(name, value) for name, value in options.items()}

    def fold(self) -> dict[str, str]:
        # PEFT replaces whatever stands in the place of a layer that it merges, so the changes step aside.
        changes = [(site, site.changes) for site in self.sites()]
        for site, _ in changes:
            site.restore()
        try:
            reason = self._merge()
        finally:
            for site, named in changes:
                for name, change in named.items():
                    site.add(name, change)
        if reason:
            return {"peft": reason}
        stays = super().fold()
        self.inner.describe_fold()
        return stays

    def _merge(self) -> str | None:
        """Merges PEFT's layers, or says why they cannot be."""
        layers = [module for module in self.host.modules() if isinstance(module, BaseTunerLayer)]
        weights = {p: p.detach().clone() for layer in layers for p in layer.get_base_layer().parameters()}
        try:
            self.peft.merge_and_unload()
        except Exception as error:  # each of PEFT's methods has its own
            # Layers that are gone have been merged completely; another may have been written to without being merged.
            for layer in layers:
                if any(module is layer for module in self.host.modules()):
                    layer.merged_adapters.clear()
                    for parameter in layer.get_base_layer().parameters():
                        parameter.data.copy_(weights[parameter])
            return in_one_line(error).rstrip(".")
        for path, wrapper in list(self.host.named_modules()):
            if isinstance(wrapper, ModulesToSaveWrapper):
                self.host.set_submodule(path, _active(wrapper))
        return None

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors in the state of PEFT's active adapters, each once, by name in the host."""
        seen: set[int] = set()
        for path, layer in self.host.named_modules():
            if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
                for name, tensor in layer.state_dict(keep_vars=True).items():
                    own = not name.startswith(("base_layer.", "original_module.")) and not self._inactive(name)
                    if own and id(tensor) not in seen:
                        seen.add(id(tensor))
                        yield f"{path}.{name}", tensor

    def _inactive(self, name: str) -> bool:
        """Whether a tensor of one of PEFT's layers belongs to an adapter that is not active."""
        return not set(self.peft.peft_config).difference(self.peft.active_adapters).isdisjoint(name.split("."))


def _wrapped(site: Site) -> Site:
    """A site of the host with PEFT's layers in it."""
    if isinstance(site, JointSite):
        return replace(site, owner=_active(site.owner), maps=tuple(map(_wrapped, site.maps)))
    return _PeftSite(**vars(site) | {"owner": _active(site.owner)})


class _PeftSite(Site):
    """A site whose module PEFT may have wrapped: changes go around PEFT's layer, ``module`` is what is in it."""

    @property
    def module(self) -> nn.Module:
        return _bare(getattr(self.owner, self.attribute))

    def restore(self) -> None:
        module = getattr(self.owner, self.attribute)
        if isinstance(module, Changed):
            setattr(self.owner, self.attribute, module.base)


def _check_copies(host: nn.Module) -> None:
    """Raises BackboneError where ``modules_to_save`` has copied what gates and methods must see into."""
    for path, module in host.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and _WHOLE.search(path):
            raise BackboneError(
                f"modules_to_save has copied {path} as a whole. It may name the head, norms and patch_embed; to train "
                "the rest of the backbone as well, leave it out and add the method full."
            )


def _active(module: nn.Module) -> nn.Module:
    """The module that computes where ``modules_to_save`` has made a copy."""
    if not isinstance(module, ModulesToSaveWrapper):
        return module
    copies = module.modules_to_save
    name = module.active_adapters[0]
    return copies[name] if name in copies else module.original_module  # noqa: SIM401  a ModuleDict has no get


def _bare(module: nn.Module) -> nn.Module:
    """The host's own module under changes and PEFT's layers."""
    while isinstance(module, Changed | BaseTunerLayer | ModulesToSaveWrapper):
        if isinstance(module, ModulesToSaveWrapper):
            module = _active(module)
        else:
            module = module.base if isinstance(module, Changed) else module.base_layer
    return module


def _stripped(module: nn.Module) -> nn.Module:
    """A copy of a module without changes and PEFT's layers, as it was pretrained; parameters are shared."""
    while isinstance(module, Changed | BaseTunerLayer | AuxiliaryTrainingWrapper):
        if isinstance(module, AuxiliaryTrainingWrapper):
            module = module.original_module
        else:
            module = module.base if isinstance(module, Changed) else module.base_layer
    twin = copy.copy(module)
    open_passes(twin)
    twin.__dict__["_modules"] = {name: child and _stripped(child) for name, child in module._modules.items()}
    return twin
