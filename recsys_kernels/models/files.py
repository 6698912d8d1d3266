"""Model folders: `model.safetensors`, `model.json` with its SHA-256, and `vocabularies.json`.

A folder appears whole or not at all (written beside its place, then renamed). What a folder may hold, and how it is
checked when it is loaded, stands in `format.py`.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from recsys_kernels.data.examples import Schema
from recsys_kernels.ops.embedding_bag import QuantizedEmbeddingBag
from recsys_kernels.ops.linear.int8 import Int8Linear
from recsys_kernels.ops.linear.sparse import SparseLinear

from .dlrm import DLRM, MLP_FORMS, SPARSE_FORMS, empty_tables, layer_pattern
from .format import (
    CONFIG,
    FORMAT,
    KIND,
    MAX_WEIGHT,
    VOCABULARIES,
    WEIGHTS,
    ModelFileError,
    check_hashes,
    check_key,
    check_saved,
    check_vocabularies,
    check_weights,
    digest,
    file_sha256,
    read_config,
    read_json,
    signature,
    vocabularies_limit,
)
from .requests import normalize


class RankingModel(nn.Module):
    """A trained ranking model together with the encoding of its fields.

    Attributes:
        model: the `DLRM`, in eval mode.
        schema: dense features, categorical features and vocabularies.
    """

    def __init__(self, model: DLRM, schema: Schema) -> None:
        super().__init__()
        self.model = model
        self.schema = schema
        self.eval()

    def forward(self, dense: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Logits [B] float32 of an encoded batch (see `DLRM.forward`)."""
        return self.model(dense, indices, offsets)

    def predict(self, examples: Iterable[Mapping[str, Any]]) -> torch.Tensor:
        """Probabilities [B] float32 of raw examples.

        Args:
            examples: dicts, one an example (`frame.to_dict("records")` of a DataFrame): a dense feature's name
                to a number; a categorical one's to an id (a string or a whole number) or to a list or array of
                them. What is missing, None or NaN is unknown.

        Raises:
            KeyError: an example has a field that the model does not read.
            TypeError: the examples are something else, or a value is; the message names the feature.
            ValueError: a number that its feature cannot have: an infinite one, a negative count, 1.5 as an id; the
                message names the feature.
        """
        batch = self.schema.encode(normalize(examples, self.schema))
        with torch.inference_mode():
            return self(batch.dense, batch.indices, batch.offsets).sigmoid()


def save_model(model: DLRM, schema: Schema, folder: Path, *, key: bytes | None = None) -> None:
    """Writes the three files of a model into an existing folder (see `new_folder`).

    Args:
        model: what to save, in any form that `compress` makes.
        schema: how raw examples are encoded.
        folder: where to write.
        key: a secret of at least 16 bytes, with which the folder is signed (HMAC-SHA-256). `load_model` with the same
            key then refuses a folder that someone without the key has changed.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
        ModuleNotFoundError: safetensors is not installed.
        TypeError: the key is not bytes.
        ValueError: the tables are not all of one form (float32, int8 or int4), or the MLPs are not; the schema does not
            fit the model; the key is too short.
    """
    check_key(key)
    # `model.config` does not hold the changes that `rk.optimize` and other code made.
    form = _mlp_form(model)
    pattern = _mlp_pattern(model) if form in SPARSE_FORMS else None
    widths = model.hidden_widths()
    config = replace(model.config, embedding=_form(model), mlp=form, mlp_pattern=pattern, **widths)
    tokens = {table: schema.vocabularies[table].tokens for table in dict(schema.features).values()}
    body: dict[str, Any] = {"format": FORMAT, "kind": KIND, "config": config.to_json(), "schema": schema.to_json()}
    body = json.loads(json.dumps(body))  # tuples become lists, as they will be when the file is read
    check_saved(folder / CONFIG, body, tokens)
    _write_weights(model, folder / WEIGHTS)
    (folder / VOCABULARIES).write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    body["sha256"] = {name: file_sha256(folder / name) for name in (WEIGHTS, VOCABULARIES)}
    if key is not None:
        body["hmac_sha256"] = signature(body, key)
    body["self_sha256"] = digest(body)
    (folder / CONFIG).write_text(json.dumps(body, indent=1), encoding="utf-8")


def _write_weights(model: DLRM, path: Path) -> None:
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    safetensors = _safetensors()
    try:
        safetensors.torch.save_file(state, path)
    except safetensors.SafetensorError as error:  # safetensors' Rust writer reports an I/O error without an errno
        found = re.search(r"os error (\d+)", str(error))
        code = int(found[1]) if found else errno.EIO
        raise OSError(code, os.strerror(code), str(path)) from error
    path.chmod(0o666 & ~_umask())  # safetensors makes a file that only its owner can read


def _form(model: DLRM) -> str:
    """The one form that all tables of a model have, as `DLRMConfig.embedding` names it."""
    forms: dict[str, list[str]] = {}
    for name, bag in model.embeddings.embedding_bags.items():
        if isinstance(bag, QuantizedEmbeddingBag):
            form = f"int{bag.bits}"
        else:
            form = str(bag.weight.dtype).removeprefix("torch.")
        forms.setdefault(form, []).append(name)
    if len(forms) == 1 and forms.keys() <= {"float32", "int8", "int4"}:
        return next(iter(forms))
    found = "; ".join(f"{form}: {', '.join(names)}" for form, names in forms.items())
    raise ValueError(f"a model is saved with tables of one form, float32, int8 or int4, but has {found}")


def _mlp_form(model: DLRM) -> str:
    """The one form that both MLPs of a model have, as `DLRMConfig.mlp` names it."""
    schemes = {scheme: form for form, scheme in MLP_FORMS.items() if scheme is not None}
    sparse = {scheme: form for form, scheme in SPARSE_FORMS.items()}
    forms: dict[str, list[str]] = {}
    for name in ("bottom", "top"):
        for module in getattr(model.head, name):
            if isinstance(module, Int8Linear):
                kind = "" if module.granularity == "channel" else f" with scales by {module.granularity}"
                forms.setdefault(schemes[module.activation] + kind, []).append(name)
            elif isinstance(module, SparseLinear):
                forms.setdefault(sparse.get(module.activation, f"sparse {module.activation}"), []).append(name)
            elif isinstance(module, nn.Linear):
                forms.setdefault(str(module.weight.dtype).removeprefix("torch."), []).append(name)
            elif not isinstance(module, nn.ReLU | nn.Dropout):
                forms.setdefault(type(module).__name__, []).append(name)
    known = {**MLP_FORMS, **SPARSE_FORMS}
    if len(forms) == 1 and forms.keys() <= known.keys():
        return next(iter(forms))
    found = "; ".join(f"{form}: {', '.join(dict.fromkeys(names))}" for form, names in forms.items())
    raise ValueError(f"a model is saved with MLPs of one form ({', '.join(known)}), but has {found}")


def _mlp_pattern(model: DLRM) -> str:
    """The pattern of the pruned layers of a model, as `DLRMConfig.mlp_pattern` names it."""
    layers = [m for m in (*model.head.bottom.modules(), *model.head.top.modules()) if isinstance(m, SparseLinear)]
    found = {layer.pattern for layer in layers if layer.out_features > 1} or {"unstructured"}
    pattern = min(found)
    if all(layer.pattern == layer_pattern(layer.out_features, pattern) for layer in layers):
        return pattern
    found = {layer.pattern for layer in layers}
    raise ValueError(f"a model is saved with pruned layers of one pattern, but has {', '.join(sorted(found))}")


def load_model(folder: str | os.PathLike[str], *, key: bytes | None = None) -> RankingModel:
    """Loads a model written by `recsys-kernels compress --out DIR`, ready to serve.

    A folder from an unknown source does no harm: it is refused before anything is allocated that its files do not hold,
    and holds no code. The hashes in it show damage, not tampering: whoever changes the weights can compute the hashes
    anew. To notice that, sign the folder (see `save_model`) and load it with the key.

    Args:
        folder: the DIR.
        key: the secret that the folder was signed with; None takes any folder.

    Returns:
        A `RankingModel` in eval mode.

    Raises:
        ModelFileError: a file was cut short, altered, written by a newer version, does not fit the others, cannot be
            read, or is not signed with `key`. A `ValueError`. For a missing file the error is a `FileNotFoundError`,
            too.
        ModuleNotFoundError: safetensors is not installed.
        TypeError, ValueError: `key` is not bytes, or too short.

    Example:
        >>> model = rk.load_model("out")                                           # doctest: +SKIP
        >>> model.predict([                                                        # doctest: +SKIP
        ...     {"user": "196", "item": "242", "gender": "M", "genres": ["Comedy"],
        ...      "liked_items": ["302", "377"], "user_mean": 3.6, "item_count": 117}
        ... ])
        tensor([0.71])
    """
    check_key(key)
    safetensors = _safetensors()
    place = Path(folder)
    config, schema, hashes = read_config(place / CONFIG, key)
    limits = {WEIGHTS: check_weights(place / WEIGHTS, config), VOCABULARIES: vocabularies_limit(config)}
    check_hashes(place, hashes, limits)
    tokens = read_json(place / VOCABULARIES, limits[VOCABULARIES])
    check_vocabularies(place / VOCABULARIES, tokens, config)
    try:
        model = DLRM(config, empty_tables(config))
        model.load_state_dict(safetensors.torch.load_file(place / WEIGHTS))
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise ModelFileError(f"{place / WEIGHTS}: does not fit {CONFIG} ({reason:.300})") from error
    ranking = RankingModel(model, Schema.from_json(schema, tokens))
    _check_values(ranking, place / WEIGHTS)
    return ranking


def _check_values(ranking: RankingModel, path: Path) -> None:
    """Refuses weights that give no scores: NaN, infinite or so large that sums of their products overflow."""
    for name, tensor in ranking.model.state_dict().items():
        if tensor.is_floating_point() and tensor.numel():
            largest = max(-float(tensor.min()), float(tensor.max()))  # both are NaN if the tensor holds a NaN
            if not largest <= MAX_WEIGHT:
                raise ModelFileError(f"{path}: {name} holds NaN or a magnitude above {MAX_WEIGHT:g}")
    for table, bag in ranking.model.embeddings.embedding_bags.items():
        if isinstance(bag, QuantizedEmbeddingBag):
            scale, bias = bag.scale_bias.float().abs().amax(0).tolist()
            if (scale * (2**bag.bits - 1) + bias) * 2.0 ** int(bag.exponent) > MAX_WEIGHT:
                raise ModelFileError(f"{path}: rows of table {table!r} reach a magnitude above {MAX_WEIGHT:g}")
    try:
        scores = ranking.predict([{}])
    except (RuntimeError, ValueError, IndexError) as error:  # for example, a static layer has no range
        raise ModelFileError(f"{path}: the model cannot score an example ({error})") from error
    if not bool(scores.isfinite().all()):
        raise ModelFileError(f"{path}: the model gives scores that are not finite")


def check_out(folder: Path, ours: frozenset[str]) -> None:
    """Raises OSError if `new_folder` could not put a folder there without losing somebody's files.

    A folder is replaced by renaming, so it must be one that can be renamed: not the current folder (whoever
    stands in it would be left in the old one) and not a mount point.
    """
    place = _place(folder)
    if place.exists():
        _check_replaceable(place, folder, ours)
    elif place.is_symlink():  # links that lead to each other
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder))
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(parent))
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission to write into this folder", str(parent))
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{place.name}-"):
            pass
    except OSError as error:  # the error of /proc, "No such file or directory", names a folder that nobody asked for
        raise OSError(error.errno, f"no folder can be made there ({error.strerror})", str(parent)) from None


def _place(folder: Path) -> Path:
    """The real place of a folder: the target of a link is replaced, not the link."""
    return Path(os.path.realpath(folder))


def _check_replaceable(place: Path, folder: Path, ours: frozenset[str]) -> None:
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(folder))
    if os.path.ismount(place):
        raise OSError(errno.EBUSY, "is a mount point, which cannot be replaced; name a folder inside it", str(folder))
    if os.path.samefile(place, os.curdir):
        raise OSError(errno.EBUSY, "is the current folder, which cannot be replaced; name another one", str(folder))
    if not os.access(place, os.R_OK | os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no permission to write into this folder", str(folder))
    foreign = sorted(entry.name for entry in place.iterdir() if entry.name not in ours)
    if foreign:
        raise FileExistsError(errno.EEXIST, f"holds other files ({foreign[0]}); name a new folder", str(folder))


@contextmanager
def new_folder(folder: Path, ours: frozenset[str]) -> Iterator[Path]:
    """Yields a scratch folder that takes the place of `folder` when the block ends without an exception.

    Args:
        folder: what to create, or to replace if it holds nothing but files named in `ours`.
        ours: names that may be replaced.

    Raises:
        OSError: see `check_out`; and whatever the block raises, after which `folder` is as it was. Where that names
            the scratch folder, or nothing, it names `folder` instead.
    """
    check_out(folder, ours)
    place = _place(folder)
    missing = [parent for parent in place.parents if not parent.exists()]
    scratch = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=place.parent, prefix=f".{place.name}-"))
        made = scratch / "new"
        made.mkdir()
        yield made
        for path in made.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        _replace(made, place, scratch / "old")
    except OSError as error:
        if scratch is None or error.errno is None:
            raise
        name = str(error.filename or scratch)
        if not name.startswith(str(scratch)):
            raise
        inside = Path(name).relative_to(scratch).parts[1:]
        raise OSError(error.errno, os.strerror(error.errno), str(folder.joinpath(*inside))) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if not place.exists():
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()


def _replace(made: Path, folder: Path, aside: Path) -> None:
    """Renames `made` to `folder`; what was there is put back if that fails."""
    existed = folder.exists()
    if existed:
        os.rename(folder, aside)
    try:
        os.rename(made, folder)
    except BaseException:
        if existed and not folder.exists():
            os.rename(aside, folder)
        raise


def _safetensors() -> ModuleType:
    """Imported at first use, so that `from recsys_kernels import *` works without it."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "safetensors":
            raise
        raise ModuleNotFoundError(
            'model files need safetensors: pip install "recsys_kernels[demo]"', name="safetensors"
        ) from None
    return safetensors


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
