"""A trained network as a program of its own: StableHLO and arrays, run without nnkit."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from nnkit.checks import unknown_name
from nnkit.interop.safetensors import save_safetensors
from nnkit.packing import unpack
from nnkit.train.files import check_writable, write_atomically
from nnkit.train.preflight import whole
from nnkit.tree import flatten
from nnkit.types import Array, Layer, Params, PyTree, Spec, State

__all__ = ["READER", "export_predict"]

FORMAT = "nnkit export 1"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROGRAM, ARRAYS, MANIFEST, README = "predict.stablehlo", "arrays.safetensors", "manifest.json", "README.md"

READER = """\
import json, math
import jax, jax.export, ml_dtypes, numpy as np  # ml_dtypes comes with jax

NAMES = {"BOOL": "bool", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
KINDS = {"F": "float", "I": "int", "U": "uint", "C": "complex"}


def read_arrays(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype = np.dtype(NAMES.get(entry["dtype"]) or KINDS[entry["dtype"][0]] + entry["dtype"][1:])
            count, at = math.prod(entry["shape"]), entry["data_offsets"][0]
            arrays[name] = np.frombuffer(data, dtype, count, at).reshape(entry["shape"])
    return arrays


def load_predict(folder):
    with open(f"{folder}/predict.stablehlo", "rb") as file:
        program = jax.export.deserialize(bytearray(file.read()))
    with open(f"{folder}/manifest.json") as file:
        if json.load(file)["baked_in"]:
            return jax.jit(program.call)
    arrays = jax.device_put(read_arrays(f"{folder}/arrays.safetensors"))
    run = jax.jit(program.call)
    return lambda x: run(arrays, x)
"""
"""What reads an export, to be copied: it needs JAX, numpy and flatbuffers, and not nnkit."""


def export_predict(
    model: Layer,
    params: Params,
    state: State,
    x: Spec,
    path: str | os.PathLike[str],
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    bake_in: bool = False,
    batch_size: int | None = None,
) -> Path:
    """Writes ``x -> model.apply(params, state, x, train=False)`` as a program that runs without nnkit.

    The folder ``path`` then holds ``predict.stablehlo`` (StableHLO as ``jax.export`` serialises it, for all
    ``platforms`` in one), ``arrays.safetensors`` (parameters and state by path, the program's first
    argument), ``manifest.json`` (names, shapes and dtypes of all that goes in and out) and ``README.md`` with
    the few lines of Python that load and run it. Each file is whole or absent, the manifest comes last.
    Run by the same JAX on the same machine, the program gives what the jitted model gives, to the last bit. JAX
    promises that later versions of it run the file for six months at least.

    Args:
      model: the network.
      params: its parameters.
      state: its state; the new state that a cache would have is not returned.
      x: an array or ``jax.ShapeDtypeStruct`` like the input, of any batch size, or a tree of them. A tree, and
        one of outputs too, is a dict by path in the program: ``{"0": a, "1": b}`` for a pair.
      path: a new or an empty folder, or one with an earlier export, which is replaced.
      platforms: where it shall run: "cpu", "cuda", "rocm", "tpu".
      bake_in: whether parameters and state are constants of the program, which then takes ``x`` alone.
      batch_size: None for a program of any batch size; a number where a model cannot do without.

    Returns:
      The folder.

    Raises:
      ImportError: without flatbuffers, which ``jax.export`` writes with.
      ValueError: for a model that must know its batch size, for unknown platforms, for a folder with
        other files in it.
      TypeError: for arrays that safetensors has no place for.
      OSError: see :func:`nnkit.train.files.write_atomically`.

    See docs/interop.md for an example.
    """
    _check_flatbuffers()
    platforms = _checked_platforms(platforms)
    if batch_size is not None:
        whole(batch_size, "export_predict(batch_size=...)")
    folder = _checked_folder(path)
    trees = {"params": unpack(params), "state": unpack(state)}
    arrays = {name: jnp.asarray(leaf) for name, leaf in flatten(trees).items()}
    structures = jax.tree.structure(trees), jax.tree.structure(x)
    names = list(arrays), list(flatten(x))

    def run(arrays: dict[str, Array], x: Any) -> Any:
        given = (
            [arrays[name] for name in names[0]],
            [x[name] for name in names[1]] if names[1] != [""] else [x],
        )
        (params, state), x = (
            jax.tree.unflatten(structures[0], given[0]).values(),
            structures[1].unflatten(given[1]),
        )
        return _by_path(model.apply(params, state, x, train=False)[0])

    program = _exported(run, arrays, x, platforms, bake_in, batch_size)
    manifest = {
        "format": FORMAT,
        "jax": jax.__version__,
        "platforms": list(platforms),
        "baked_in": bake_in,
        "batch_size": batch_size or "any",
        "inputs": _described(_by_path(_unflattened(program)[-1])),
        "outputs": _described(jax.tree.unflatten(program.out_tree, program.out_avals)),
        "arrays": _described(arrays),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(
        missing_ok=True
    )  # a folder with a manifest is whole, also while it is replaced
    (folder / ARRAYS).unlink(missing_ok=True)
    if not bake_in:
        save_safetensors(folder / ARRAYS, arrays)
    write_atomically(folder / PROGRAM, bytes(program.serialize()))
    write_atomically(folder / README, _readme(manifest).encode())
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return folder


def _check_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError("export_predict needs flatbuffers: pip install 'nnkit[export]'") from None


def _checked_platforms(platforms: Any) -> tuple[str, ...]:
    if isinstance(platforms, str):
        platforms = (platforms,)
    for platform in platforms:
        if platform not in PLATFORMS:
            raise unknown_name("platform", platform, PLATFORMS)
    if not platforms:
        raise ValueError("export_predict(platforms=...) needs one at least, 'cpu' for instance")
    return tuple(platforms)


def _checked_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    check_writable(folder)
    if folder.is_dir():
        others = sorted({file.name for file in folder.iterdir()} - {PROGRAM, ARRAYS, MANIFEST, README})
        if others:
            raise ValueError(
                f"export_predict got the folder {str(path)!r}, which holds {', '.join(others[:3])}: choose a new or "
                "an empty one"
            )
    return folder


def _exported(
    run: Callable[..., Any],
    arrays: dict[str, Array],
    x: Spec,
    platforms: tuple[str, ...],
    bake_in: bool,
    batch_size: int | None,
) -> export.Exported:
    function = jax.jit(functools.partial(run, arrays) if bake_in else run)
    before = () if bake_in else (jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays),)
    exporting = export.export(function, platforms=platforms)
    if batch_size is not None:
        return exporting(*before, _inputs(x, batch_size))
    (any_size,) = export.symbolic_shape("batch")
    inputs = _inputs(x, any_size)
    try:
        return exporting(*before, inputs)
    except Exception as error:
        own = jax.tree.leaves(x)[0].shape[0]
        try:
            jax.eval_shape(functools.partial(run, arrays), _inputs(x, own))
        except Exception:
            raise error from None  # wrong for any batch: what is wrong is said best where it arose
        raise ValueError(
            f"export_predict cannot export this model for any batch size, which it must know ({_first_line(error)}): "
            f"pass export_predict(..., batch_size={own}) for batches of {own}"
        ) from error


def _inputs(x: Spec, size: Any) -> Any:
    """What the program takes: arrays with ``size`` examples, by path where x is no single array."""

    def spec(name: str, a: Any) -> jax.ShapeDtypeStruct:
        if not getattr(a, "shape", ()):
            raise ValueError(
                f"export_predict takes an example of the input with a batch axis, got {a!r}"
                + (f" at {name!r}" if name else "")
            )
        return jax.ShapeDtypeStruct((size, *a.shape[1:]), jax.dtypes.canonicalize_dtype(a.dtype))

    flat = {name: spec(name, a) for name, a in flatten(x).items()}
    return flat[""] if list(flat) == [""] else flat


def _by_path(tree: PyTree) -> Any:
    flat = flatten(tree)
    return flat[""] if list(flat) == [""] else flat


def _unflattened(program: export.Exported) -> tuple[Any, ...]:
    return jax.tree.unflatten(program.in_tree, program.in_avals)[0]


def _described(tree: Any) -> dict[str, dict[str, Any]]:
    """Shapes and dtypes by path; a single array has the name ""."""
    sized = lambda shape: [n if isinstance(n, int) else str(n) for n in shape]
    return {name: {"shape": sized(a.shape), "dtype": str(a.dtype)} for name, a in flatten(tree).items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")


def _readme(manifest: dict[str, Any]) -> str:
    def table(what: str) -> str:
        rows = [
            f"| {name or 'the array'} | {a['shape']} | {a['dtype']} |" for name, a in manifest[what].items()
        ]
        return "\n".join(["| name | shape | dtype |", "|---|---|---|", *rows])

    first = "y = predict(x)" + (
        "" if "" in manifest["inputs"] else f"  # x is a dict: {', '.join(map(repr, manifest['inputs']))}"
    )
    parts = [
        f"# A network as StableHLO, for {', '.join(manifest['platforms'])}",
        f"Written with JAX {manifest['jax']}. It runs with `pip install jax flatbuffers` and these lines:",
        f'```python\n{READER}\n\npredict = load_predict(".")  # this folder\n# {first}\n```',
        f"Batch size: {manifest['batch_size']}.\n\n## Inputs\n\n{table('inputs')}",
        f"## Outputs\n\n{table('outputs')}",
        f"## Parameters and state{', which are in the program' if manifest['baked_in'] else ''}\n\n{table('arrays')}",
    ]
    return "\n\n".join(parts) + "\n"
