"""A user's model and variables, checked and made into what the training step takes."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.core
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ait_jax.convert.values import negative_variance
from ait_jax.quant.calls import KernelCall, KernelReads, NormError, kernel_reads
from ait_jax.quant.frozen import apply_frozen
from ait_jax.quant.kernels import find_kernels
from ait_jax.quant.policy import SITES, Kernels, leaf_name, named_leaves
from ait_jax.quant.sites import find_sites
from ait_jax.quant.taps import apply_tapped
from ait_jax.zero_shot.networks import FunctionNetwork, LinenNetwork, NetworkError, NNXNetwork
from ait_jax.zero_shot.probabilities import makes_probabilities

__all__ = ["Brought", "bring", "network_of"]

_COLLECTIONS = ("params", "batch_stats")


class Brought(NamedTuple):
    """A network and what is known of it.

    Attributes:
        model: a Linen module or one of `networks`.
        variables: `params` and `batch_stats`, float32 numpy arrays.
        kernels: what is quantized of it.
        batch_norms: names of those whose inputs can be seen.
        activations: how many ReLUs and ReLU6s it calls, gates left out.
        inputs: how many sites there are if what enters a kernel is one as well.
        reads: what its kernels read, by `QuantPolicy.sites`.
        probabilities: whether it seems to return probabilities in place of logits.
    """

    model: Any
    variables: dict[str, Any]
    kernels: Kernels
    batch_norms: tuple[str, ...]
    activations: int
    inputs: int
    reads: dict[str, KernelReads]
    probabilities: bool


def bring(
    model: Any,
    variables: Mapping[str, Any] | None,
    image_shape: tuple[int, int, int],
    num_classes: int,
    apply_kwargs: Mapping[str, Any],
    keep_float: str,
) -> Brought:
    """Checks a model and its variables; computes nothing but, of some models, a few logits.

    Args:
        model: a Linen module, an NNX module, or a function `(variables, images) -> logits`.
        variables: its variables; None for an NNX module.
        image_shape: (H, W, C) of one image.
        num_classes: width of the logits.
        apply_kwargs: what the model takes beside images.
        keep_float: regex that matches the whole names of parameters to leave as they are.

    Returns:
        The network, its variables, and what is known of it.

    Raises:
        NetworkError: on a model or variables that cannot be used; says what to do.
        KernelsError: if there is nothing to quantize, or what there is cannot be.
    """
    network, variables = network_of(model, variables, apply_kwargs)
    variables = {name: _arrays(name, variables.get(name, {})) for name in _COLLECTIONS}
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    logits, observed = _traced(network, variables, image, model)
    _check_logits(logits, num_classes, model)
    _check_statistics(variables["batch_stats"], observed, model)
    try:
        matches = re.compile(keep_float).fullmatch
    except re.error as error:
        raise NetworkError(f"keep_float = {keep_float!r} is no regex: {error}") from error
    params, batch_stats = variables["params"], variables["batch_stats"]

    def forward(params, batch_stats, images):
        return apply_frozen(network, {"params": params, "batch_stats": batch_stats}, images)

    kernels = find_kernels(
        forward, params, batch_stats, image, keep_float=lambda name: matches(name) is not None
    )
    surveys = {sites: _survey(network, variables, image, sites) for sites in SITES}
    return Brought(
        model=network,
        variables=variables,
        kernels=kernels,
        batch_norms=tuple(observed),
        activations=surveys["paper"][0],
        inputs=surveys["integer"][0],
        reads={sites: reads for sites, (_, reads) in surveys.items()},
        probabilities=makes_probabilities(forward, variables, image.shape),
    )


def network_of(
    model: Any, variables: Mapping[str, Any] | None, apply_kwargs: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """The network that the training step sees.

    Args:
        model: as for `bring`.
        variables: likewise.
        apply_kwargs: likewise.

    Returns:
        The network and its variables.

    Raises:
        NetworkError: if the model is of no known kind, its variables have no params or other
            collections, or its call needs other arguments.
    """
    if isinstance(model, nnx.Module):
        if variables is not None:
            raise NetworkError("an NNX module holds its variables: leave `variables` out")
        _check_arguments(model.__call__, apply_kwargs, skip=1)  # type: ignore[operator]
        network = NNXNetwork(model, apply_kwargs)
        return network, network.variables
    if not callable(model) and not isinstance(model, nn.Module):
        raise NetworkError(
            f"model is a {type(model).__name__}: it must be a Linen module, an NNX module, or a "
            "function of variables and images"
        )
    variables = _checked_collections(variables)
    if isinstance(model, nn.Module):
        _check_arguments(type(model).__call__, apply_kwargs, skip=2)
        unfrozen = flax.core.unfreeze(dict(variables))
        return (LinenNetwork(model, apply_kwargs) if apply_kwargs else model), unfrozen
    _check_arguments(model, apply_kwargs, skip=2)
    function = FunctionNetwork(_with_checked_outputs(model), variables, apply_kwargs)
    return function, function.variables


def _checked_collections(variables: Any) -> Mapping[str, Any]:
    if not isinstance(variables, Mapping) or "params" not in variables:
        found = sorted(map(str, variables)) if isinstance(variables, Mapping) else type(variables)
        raise NetworkError(
            f"variables has no 'params' (it has {found}): pass what model.init returned, trained, "
            "or {'params': params, 'batch_stats': batch_stats}"
        )
    others = sorted(set(variables) - set(_COLLECTIONS))
    if others:
        raise NetworkError(
            f"variables has the collection {others[0]!r}: only params and batch_stats can be "
            "quantized; leave it out if inference does not need it, or pass a function of "
            "variables and images that adds it (and returns (logits, {name: what enters it}) if "
            "there are batch norms)"
        )
    return nn.meta.unbox(dict(variables))


def _arrays(collection: str, tree: Any) -> Any:
    """float32 numpy arrays, all finite, each with a name of its own; no variance below zero."""
    named_leaves(tree)

    def array(path, leaf):
        name = f"{collection}/{leaf_name(path)}"
        value = np.asarray(leaf)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise NetworkError(
                f"the variable {name} is of {value.dtype}: only floating-point variables can be "
                "trained; keep constants in the model"
            )
        value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise NetworkError(
                f"the variable {name} has {np.sum(~np.isfinite(value))} values of {value.size} "
                "that are NaN or infinite: train the model anew, or take an older checkpoint"
            )
        problem = negative_variance(name, value)
        if problem:
            raise NetworkError(
                f"the variable {name} {problem}: train the model anew, or take an older checkpoint"
            )
        return value

    return jax.tree_util.tree_map_with_path(array, tree)


def _check_arguments(call: Callable[..., Any], kwargs: Mapping[str, Any], *, skip: int) -> None:
    """Whether a call can be made with images and `kwargs`; `skip` arguments are taken."""
    try:
        parameters = list(inspect.signature(call).parameters.values())
    except (TypeError, ValueError):
        return
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return  # A wrapper, which says nothing of what it wraps.
    rest = parameters[skip:]
    needed = [p.name for p in rest if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    missing = [name for name in needed if name not in kwargs]
    if missing:
        switches = {name: _SWITCHES.get(name, False) for name in missing}
        raise NetworkError(
            f"the model takes {', '.join(map(repr, missing))} beside images: say how it is called "
            f"in inference, such as apply_kwargs={switches}"
        )
    known = [p.name for p in rest if p.kind not in (p.POSITIONAL_ONLY, p.VAR_KEYWORD)]
    unknown = [name for name in kwargs if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in rest):
        raise NetworkError(
            f"apply_kwargs has {unknown[0]!r}, which the model does not take: it takes "
            f"{', '.join(map(repr, known)) or 'images alone'}"
        )


# Names under which models are told whether they train, and what they are told in inference.
_SWITCHES = {
    **dict.fromkeys(("train", "training", "is_training"), False),
    **dict.fromkeys(("deterministic", "use_running_average", "eval"), True),
}


def _observed(network, variables, image) -> tuple[Any, dict[str, Any]]:
    outputs = apply_tapped(network, variables, image)
    return outputs.logits, outputs.batch_norms


def _traced(network, variables, image, model) -> tuple[Any, dict[str, Any]]:
    try:
        return jax.eval_shape(functools.partial(_observed, network), variables, image)
    except NetworkError:
        raise
    except NormError as error:
        raise NetworkError(str(error)) from error
    except Exception as error:
        call = type(model).__call__ if isinstance(model, nn.Module) else model
        taken = inspect.signature(call).parameters
        switches = {name: value for name, value in _SWITCHES.items() if name in taken}
        hint = "check that variables are this model's, and image_shape what it takes"
        if isinstance(error, (flax.errors.ModifyScopeVariableError, flax.errors.InvalidRngError)):
            switch = "the switch of its call in apply_kwargs, or of its fields when it is built"
            if switches:
                switch = f"apply_kwargs={switches}"
            hint = f"it runs in training mode; inference needs {switch}"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NetworkError(
            f"the model cannot be applied to an image of shape {image.shape}: {hint} ({reason})"
        ) from error


def _check_logits(logits: Any, num_classes: int, model: Any) -> None:
    if getattr(logits, "shape", None) == (1, num_classes):
        return
    shapes = jax.tree.map(jnp.shape, logits)
    message = (
        f"the model makes {shapes} of one image, and num_classes = {num_classes}: it must return "
        f"logits of shape (1, {num_classes}) and nothing else"
    )
    pick = _pick(logits, (1, num_classes))
    if hasattr(logits, "shape") or not pick:
        raise NetworkError(f"{message}; correct num_classes, or let the model return them")
    if isinstance(model, nnx.Module):
        raise NetworkError(f"{message}; pass nnx.Sequential(model, {pick})")
    raise NetworkError(
        f"{message}; pass nn.Sequential([model, {pick}]) and, for variables, "
        "{name: {'layers_0': tree} for name, tree in variables.items()}"
    )


def _pick(outputs: Any, shape: tuple[int, ...]) -> str:
    """A function, as the next layer in a Sequential, of the output of that shape."""
    if isinstance(outputs, Mapping):
        keys = [k for k, x in outputs.items() if getattr(x, "shape", None) == shape]
        return f"lambda **out: out[{keys[0]!r}]" if keys else ""
    if isinstance(outputs, (tuple, list)):
        places = [i for i, x in enumerate(outputs) if getattr(x, "shape", None) == shape]
        # Sequential hands a tuple on as so many arguments.
        star = "*" * isinstance(outputs, tuple)
        return f"lambda {star}out: out[{places[0]}]" if places else ""
    return ""


def _with_checked_outputs(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function; what it returns must be what a function may return."""

    @functools.wraps(fn)
    def checked(variables, images, **kwargs):
        out = fn(variables, images, **kwargs)
        if hasattr(out, "shape"):
            return out
        if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], Mapping):
            return out
        raise NetworkError(
            f"the function returns {jax.tree.map(jnp.shape, out)} of one image: it must return "
            "logits, or (logits, {name: what enters that normalization}), and nothing else"
        )

    return checked


def _check_statistics(batch_stats, observed, model) -> None:
    names = {
        leaf_name(path).rpartition("/")[0] for path, _ in jax.tree.leaves_with_path(batch_stats)
    }
    unseen = sorted(names - set(observed))
    if not unseen:
        return
    of_function = "return (logits, {name: what enters the normalization})"
    if isinstance(model, nnx.Module):
        why = f"pass a function that calls it, and must {of_function}, or remove it"
    elif isinstance(model, nn.Module):
        why = (
            "if it is no nn.BatchNorm, or is applied within another module by `.apply`, pass a "
            f"function, which must {of_function}"
        )
    else:
        why = f"a function must {of_function}; if it calls a Flax module, pass that one itself"
    raise NetworkError(
        f"batch_stats has {unseen[0]!r}, and no batch norm of that name was seen: {why}"
    )


def _survey(network, variables, image, sites: str) -> tuple[int, KernelReads]:
    """How many sites there are by a policy, and what kernels read then."""
    calls: list[KernelCall] = []
    found = find_sites(
        functools.partial(apply_frozen, network),
        variables,
        image,
        on_kernel=calls.append,
        kernel_inputs=sites == "integer",
        keep_loops=True,
    )
    return len(found), kernel_reads(calls)
