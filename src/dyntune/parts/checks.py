"""What cannot stand together on a backbone: gates, reductions, bypasses and modules, each pairing with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError
from dyntune.parts.policies.base import TokenPolicy
from dyntune.parts.policies.gating import GatingPolicy
from dyntune.parts.policies.reducing import ReducingPolicy


def check_gates(backbone: Backbone, policies: Sequence[TokenPolicy]) -> None:
    """Checks that everything installed on a backbone can run under its gates.

    Raises:
        BackboneError: two gates decide about the same unit, or a gate around a block hides tokens from a module in it
            that looks at all of them.
    """
    for policy in policies:
        for kind, hook in ((GatingPolicy, "gates"), (ReducingPolicy, "reduces")):
            if getattr(type(policy), hook) is not getattr(TokenPolicy, hook) and not isinstance(policy, kind):
                raise BackboneError(
                    f"{policy.name()} has {hook}() but does not derive from {kind.__name__}, whose other hooks a "
                    "forward pass asks. Derive from it."
                )
    for block in backbone.blocks:
        gated = [unit for policy in policies for unit in (block, block.attn, block.mlp) if policy.gates(unit)]
        if len(gated) != len(set(gated)) or (block in gated and len(gated) > 1):
            paths = " and ".join(sorted({unit.path for unit in gated}))
            raise BackboneError(
                f"{paths}: several gates at the same time. Give one gate per unit, and either "
                "for a whole layer or for its sub-layers; dyt contains dispatch."
            )
        for unit in gated:
            if block.attn.opaque and unit is not block.mlp:
                raise BackboneError(
                    f"a gate at {unit.path} would take tokens out of an attention that the host computes as a whole, "
                    "among all tokens in their places. Gate the MLP (dispatch:where=mlp, dyt:dispatch=mlp)."
                )
        for inner in (block.attn, block.mlp) if block in gated else ():
            for name, module in zip(inner.parallel, inner.beside(), strict=True):
                if not module.tokenwise:
                    raise BackboneError(
                        f"{name} at {inner.path} looks at all tokens of an image, but a gate around the layer shows it "
                        "the active ones only. Gate the sub-layers instead (where=attn, mlp or attn-mlp), or put it "
                        "beside the whole layer if it can stand there."
                    )


def check_reductions(backbone: Backbone, policies: Sequence[TokenPolicy]) -> None:
    """Checks that everything installed on a backbone can run where tokens are merged, dropped or hidden.

    Raises:
        BackboneError: two policies reduce tokens, a gate hides from the reducing one what it reads, or a module or
            the head needs the whole grid of patches.
    """
    reducing = [
        policy
        for policy in policies
        if isinstance(policy, ReducingPolicy) and any(map(policy.reduces, backbone.all_units()))
    ]
    if len(reducing) > 1:
        names = " and ".join(policy.name() for policy in reducing)
        raise BackboneError(f"{names} would each decide which tokens there are; give one of them.")
    for policy in reducing:
        merged = False
        for block in backbone.blocks:
            if block.attn.opaque:
                raise BackboneError(
                    f"{policy.name()} takes tokens away, but {block.attn.path} is computed by the host as a whole, "
                    "among all tokens in their places. Use dispatch on the MLP, which keeps every token."
                )
            gated = next((unit for unit in (block, block.attn) if any(other.gates(unit) for other in policies)), None)
            if gated is not None and policy.reduces(block.mlp):
                raise BackboneError(
                    f"{policy.name()} reads queries and keys of all tokens in {block.attn.path}, which a gate at "
                    f"{gated.path} does not compute for skipped tokens. Gate the MLP (dispatch:where=mlp, "
                    "dyt:dispatch=mlp)."
                )
            merged |= not policy.drops and policy.reduces(block.mlp)
            if gated is not None and merged:
                raise BackboneError(
                    f"{policy.name()} merges tokens in front of {block.attn.path}, which may count there by size; a "
                    f"gate at {gated.path} does not know of sizes. Gate the MLP (dispatch:where=mlp, dyt:dispatch=mlp)."
                )
        if policy.drops and backbone.head_reads_grid:
            raise BackboneError(
                f"{policy.name()} drops patches, but the backbone's head reads every one of them. Use a policy that "
                "merges (tome, pyra, fpet, evit with fuse=true) or dispatch, which keeps every token."
            )
        for unit in backbone.all_units():
            for name, module in zip(unit.parallel, unit.beside(), strict=True):
                if module.reads_grid:
                    raise BackboneError(
                        f"{name} at {unit.path} needs every patch in its place in the grid, which {policy.name()} "
                        "does not leave there. Use dispatch, which keeps every token, or another method."
                    )


def check_grid(backbone: Backbone) -> None:
    """Checks that no module takes slices of a clip, one above the other in the grid, for one image.

    Raises:
        BackboneError: one does.
    """
    if backbone.slices == 1:
        return
    for unit in backbone.all_units():
        for name, module in zip(unit.parallel, unit.beside(), strict=True):
            if module.reads_grid:
                raise BackboneError(
                    f"{name} at {unit.path} reads patches beside each other in an image, but this backbone's tokens "
                    "are of a whole clip. Use a method that reads each token by itself, such as adaptformer or lora."
                )


def check_bypass(backbone: Backbone, policies: Sequence[TokenPolicy]) -> None:
    """Checks that nothing which a bypass cuts off waits for a gradient.

    Raises:
        BackboneError: a gate, or a trained parameter, stands before the output of the last block.
    """
    if backbone.bypass is None:
        return
    behind = {*backbone.bypass.parameters(), *(p for m in (*backbone.heads, *backbone.necks) for p in m.parameters())}
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad and p not in behind]
    if policies or trained:
        raise BackboneError(
            "a bypass reads every token behind each block and lets no gradient into the backbone, so "
            f"{policies[0].name() if policies else trained[0]} cannot stand beside it. Give the bypass alone."
        )
